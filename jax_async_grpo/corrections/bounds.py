"""Bounds on a ratio, checked as ratios and compared as logarithms, so that nothing overflows on its way to a bound."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

__all__ = ["check_band", "inside", "log_bound"]


def check_band(low: float, high: float) -> None:
    """Raises ValueError unless low < 1 < high: a band without 1 drops the tokens of a policy that has not moved."""
    if not 0 <= low < 1:
        raise ValueError(f"low is {low}; it is a ratio and must be in [0, 1)")
    if not high > 1:
        raise ValueError(f"high is {high}; it is a ratio and must be > 1 (1 + epsilon)")


def inside(log_ratio: jax.Array, low: float, high: float) -> jax.Array:
    """Whether low ≤ ratio ≤ high, bool of the shape of `log_ratio`; NaN is not inside."""
    return (log_ratio >= log_bound(low)) & (log_ratio <= log_bound(high))


def log_bound(ratio: float) -> float:
    """log of a bound, which may be 0 or inf."""
    return math.log(ratio) if ratio > 0 else -jnp.inf
