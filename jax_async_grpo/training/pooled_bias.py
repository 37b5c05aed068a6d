"""The staleness bias of a whole run, from measurements none of which may tell it from none.

Each estimates ‖δ‖² and ‖H(θ,θ)‖² of its own θ without bias, on rollouts drawn after that θ was fixed: the errors of different
measurements are uncorrelated, and their mean estimates the mean over the measured updates. Its standard error holds the change
from θ to θ too, and so is rather too large than too small. What is counted: docs/training.md; one measurement: `estimation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["LEVEL", "mean_with_interval", "pooled_bias", "ratio_with_interval", "sorted_out", "squared_error"]

LEVEL = 0.9  # of the intervals
_NUMBERS = ("bias/norm_squared", "fresh_norm_squared", "bias/detection_limit")


def sorted_out(biases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Measurements by whether there was anything to measure, each in one list.

    Without lag δ is 0 by construction. Where at most one block of prompts has a gradient (nearly all rewards equal), both
    squares are exactly 0, whatever δ is: no pair of blocks says anything, and the detection limit of that block alone means
    nothing. A limit of 0 says that stale and fresh gradient differ by the same vector in every block: by 0.

    Args:
      biases: rows of kind "bias".

    Returns:
      {"pooled", "without_lag", "without_gradient", "not_finite": rows in their order}.
    """
    found: dict[str, list[Mapping[str, Any]]] = {"pooled": [], "without_lag": [], "without_gradient": [], "not_finite": []}
    for row in biases:
        squared, fresh, limit = (row[name] for name in _NUMBERS)
        if not all(map(math.isfinite, (squared, fresh, limit))):
            found["not_finite"].append(row)
        elif row["staleness"] == 0:
            found["without_lag"].append(row)
        else:
            found["without_gradient" if squared == fresh == 0 or limit == 0 else "pooled"].append(row)
    return found


def pooled_bias(biases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The block `bias` of summary.json.

    Args:
      biases: rows of kind "bias".

    Returns:
      `measured`, the numbers of rows of `sorted_out`, and of the pooled ones: `detected`; `norm_squared` and
      `fresh_norm_squared`, of `mean_with_interval`; `relative_norm_squared`, of `ratio_with_interval`;
      `detection_limit_median`, a norm; `relative_detection_limit_median`, the same over the root of the mean
      `fresh_norm_squared`, None where that is not positive: a single measurement's own estimate of its gradient is too noisy
      to divide by, and often negative.
    """
    kinds = sorted_out(biases)
    squared, fresh, limits = (np.array([row[name] for row in kinds["pooled"]], np.float64) for name in _NUMBERS)
    of_fresh, limit = mean_with_interval(fresh), float(np.median(limits)) if len(limits) else None
    has_scale = limit is not None and of_fresh["mean"] > 0
    return {
        "measured": len(biases),
        **{kind: len(rows) for kind, rows in kinds.items()},
        "detected": sum(row["detected"] for row in kinds["pooled"]),
        "norm_squared": mean_with_interval(squared),
        "fresh_norm_squared": of_fresh,
        "relative_norm_squared": ratio_with_interval(squared, fresh),
        "detection_limit_median": limit,
        "relative_detection_limit_median": limit / math.sqrt(of_fresh["mean"]) if has_scale else None,
    }


def mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean, its standard error and Student's interval at `LEVEL`; not weighted, as small errors come with small estimates.

    Args:
      values: [n].

    Returns:
      {"mean", "standard_error", "interval": [low, high]}; None for what n < 1 or n < 2 values cannot say.
    """
    if len(values) < 2:
        return {"mean": float(values[0]) if len(values) else None, "standard_error": None, "interval": None}
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    reach = _quantile(len(values)) * error
    return {"mean": mean, "standard_error": error, "interval": [mean - reach, mean + reach]}


def ratio_with_interval(values: np.ndarray, scales: np.ndarray) -> dict[str, Any]:
    """Ratio of two means with Fieller's interval at `LEVEL` (1954), which knows that the denominator is uncertain.

    Its ends solve (v̄ − R s̄)² = q² Var(v̄ − R s̄), q Student's quantile. Pairs of zeros add nothing to either sum, so that leaving
    them out leaves the ratio as it is.

    Args:
      values, scales: [n], pairs.

    Returns:
      {"estimate", "interval": [low, high]}; no estimate where the mean of the scales is not positive, no interval where that
      cannot be told from 0, for then no ratio is excluded for being too large, or where n < 2.
    """
    if not len(values) or not np.mean(scales) > 0:
        return {"estimate": None, "interval": None}
    value, scale = float(np.mean(values)), float(np.mean(scales))
    interval = None
    if len(values) > 1:
        covariance = _quantile(len(values)) ** 2 * np.cov(values, scales) / len(values)
        square, half, constant = scale**2 - covariance[1, 1], value * scale - covariance[0, 1], value**2 - covariance[0, 0]
        if square > 0:
            reach = math.sqrt(max(half**2 - square * constant, 0.0))
            interval = [float((half - reach) / square), float((half + reach) / square)]
    return {"estimate": value / scale, "interval": interval}


def squared_error(row: Mapping[str, Any]) -> float:
    """The standard error of `bias/norm_squared`, from that of the norm s = (√(U + e)₊ − √(U − e)₊)/2, which a record has.

    Args:
      row: of kind "bias".

    Returns:
      e; where U is negative and s is 0, the largest that it can be, −U.
    """
    U, s = row["bias/norm_squared"], row["bias/standard_error"]
    return 2 * s * math.sqrt(U - s**2) if 2 * s**2 < U else 4 * s**2 - U


def _quantile(number: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, number - 1))
