"""Laws of staleness and learning rate, fitted with honest statistics. NumPy and SciPy in float64 on the host; no jax.

A fit is made in logarithms with an interval; a limit is a measured radius divided by a measured drift; a threshold is an
eigenvalue. Where data cannot determine a number the answer is a named error or a word ("none", "censored", "ill-defined").
"""

from jax_async_grpo.delay_stability import DelayStability, delay_stability, delay_stability_matrix_free
from jax_async_grpo.scaling.boundary import Boundary, stable_learning_rate
from jax_async_grpo.scaling.collapse import OUTCOMES, CollapseRule, RunOutcome, classify_run, classify_runs
from jax_async_grpo.scaling.constraints import ConstraintFit, ModelScore, Radius, fit_stability_limit
from jax_async_grpo.scaling.drift_character import (
    CosineCeiling,
    DriftCharacter,
    cosine_ceiling,
    drift_character,
    half_batch_cosines,
)
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
    "Boundary",
    "CollapseRule",
    "ConstraintFit",
    "CosineCeiling",
    "DelayStability",
    "DriftCharacter",
    "ExponentDifference",
    "ModelScore",
    "OUTCOMES",
    "PowerLawFit",
    "Radius",
    "RunOutcome",
    "StabilityLimit",
    "batch_clip_radius",
    "bootstrap_difference",
    "classify_run",
    "classify_runs",
    "cosine_ceiling",
    "delay_stability",
    "delay_stability_matrix_free",
    "drift_character",
    "fit_power_law",
    "fit_stability_limit",
    "half_batch_cosines",
    "in_window",
    "max_stable_learning_rate",
    "msd_exponent",
    "stable_learning_rate",
    "staleness_budget_line",
]
