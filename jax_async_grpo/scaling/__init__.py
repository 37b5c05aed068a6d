"""Laws of staleness and learning rate, fitted with honest statistics. NumPy and SciPy in float64 on the host; no jax.

A fit is made in logarithms with an interval; a limit is a measured radius divided by a measured drift; a threshold is an
eigenvalue. Where data cannot determine a number the answer is a named error or a word ("none", "censored", "ill-defined").
"""

from jax_async_grpo.delay_stability import DelayStability, delay_stability, delay_stability_matrix_free
from jax_async_grpo.scaling.limits import StabilityLimit, batch_clip_radius, max_stable_learning_rate, staleness_budget_line
from jax_async_grpo.scaling.power_law import (
    ExponentDifference,
    PowerLawFit,
    bootstrap_difference,
    fit_power_law,
    in_window,
    msd_exponent,
)

__all__ = [
    "DelayStability",
    "ExponentDifference",
    "PowerLawFit",
    "StabilityLimit",
    "batch_clip_radius",
    "bootstrap_difference",
    "delay_stability",
    "delay_stability_matrix_free",
    "fit_power_law",
    "in_window",
    "max_stable_learning_rate",
    "msd_exponent",
    "staleness_budget_line",
]
