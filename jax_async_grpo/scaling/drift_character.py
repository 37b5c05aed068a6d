"""Whether parameters drift straight or at random: the noise ceiling of the gradient cosine, and what γ and cosine say. No jax.

Neither number is an alarm. The cosine of consecutive gradients marks lag as well as collapse, in either direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from jax_async_grpo.option_checks import as_fraction, as_integer, as_positive

__all__ = ["CosineCeiling", "DriftCharacter", "cosine_ceiling", "drift_character", "half_batch_cosines"]

_LOWEST = -1 / 3  # half-batch cosine c at which 2c/(1 + c) = −1


class CosineCeiling(NamedTuple):
    """The cosine that two independent full batches would have at the same parameters; see `cosine_ceiling`.

    Attributes:
      ceiling: 2c/(1+c) of the mean half-batch cosine c; it may be negative by chance and is reported as it is, but NaN below
        c = −1/3, where it would be no cosine: the halves are not independent.
      interval: (low, high) of the ceiling in [−1, 1]; NaN where the ceiling is.
      standard_error: of the ceiling, by the derivative 2/(1+c)².
      half_cosine: c, the mean over steps.
      resolved: whether the interval lies above 0, i.e. whether the gradient stands out of its noise at all.
      num_blocks: independent means that the error was computed from.
      confidence: of the interval.
    """

    ceiling: float
    interval: tuple[float, float]
    standard_error: float
    half_cosine: float
    resolved: bool
    num_blocks: int
    confidence: float


class DriftCharacter(NamedTuple):
    """`word`: "ballistic", "diffusive" or "undetermined"; `reason`: one line; `aligned_share`: cosine over ceiling, None where
    the ceiling is not resolved."""

    word: str
    reason: str
    aligned_share: float | None


def half_batch_cosines(first_half, second_half) -> np.ndarray:
    """Cosine between the gradients of two independent halves of a batch, step by step.

    Args:
      first_half: [M, D] gradient of the first half of the batch of each step, parameters raveled.
      second_half: [M, D] of the second half. No prompt group may stand in both.

    Returns:
      [M] cosines.

    Raises:
      ValueError: shapes differ or are not [M, D], a gradient is zero or not finite.
    """
    first, second = np.asarray(first_half, np.float64), np.asarray(second_half, np.float64)
    if first.ndim != 2 or first.shape != second.shape or first.size == 0:
        raise ValueError(f"first_half {first.shape} and second_half {second.shape} must both have shape [M, D], not empty")
    directions = []
    for name, gradients in (("first_half", first), ("second_half", second)):
        peak = np.abs(gradients).max(axis=1)
        bad = ~(np.isfinite(peak) & (peak > 0))
        if bad.any():
            index = int(np.argmax(bad))
            raise ValueError(f"{name}[{index}] has norm {peak[index]:g}; a cosine needs gradients that are finite and not 0")
        scaled = gradients / peak[:, None]  # so that no square overflows or vanishes
        directions.append(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    return np.sum(directions[0] * directions[1], axis=1)


def cosine_ceiling(half_cosines, *, block_length: int = 1, confidence: float = 0.9) -> CosineCeiling:
    """The split-half noise ceiling of the cosine between gradients of consecutive steps (Spearman-Brown, equal halves).

    A batch gradient is g = μ + noise. With v = E‖noise‖² of half a batch, the halves of one batch have the cosine

        c = ‖μ‖²/(‖μ‖² + v);    two full batches, noise v/2, have    ‖μ‖²/(‖μ‖² + v/2) = 2c/(1 + c)

    (insert v = ‖μ‖²(1−c)/c). Sampling noise alone keeps the consecutive cosine below this even where the expected gradient does
    not turn at all, so consecutive cosines are to be read as shares of it. The ratio of expectations stands for the expected
    cosine, right to O(1/D) for D effective parameters. Steps are averaged *before* the transform: that of single noisy cosines
    is biased down. Average over steps of one stage of training, the same as for the consecutive cosine.

    The interval is Student's t for the mean c, carried through the (increasing) transform. Where cosines of neighboring steps
    are correlated, `block_length` steps are averaged to one number first; a remainder at the start is left out.

    Args:
      half_cosines: [M] from `half_batch_cosines`.
      block_length: steps a block, ≥ 1; beyond the correlation of c along the run.
      confidence: of the interval, in (0, 1).

    Returns:
      A `CosineCeiling`.

    Raises:
      ValueError: a cosine is not in [−1, 1], or fewer than 3 blocks are left.
    """
    block_length = as_integer("block_length", block_length, minimum=1)
    confidence = as_fraction("confidence", confidence)
    cosines = np.asarray(half_cosines, np.float64)
    if cosines.ndim != 1:
        raise ValueError(f"half_cosines has shape {cosines.shape}; it must be [M]")
    bad = ~(np.abs(cosines) <= 1 + 1e-9)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(f"half_cosines[{index}]={cosines[index]:g} must lie in [-1, 1]")
    num_blocks = len(cosines) // block_length
    if num_blocks < 3:
        raise ValueError(
            f"half_cosines has {len(cosines)} step(s), {num_blocks} block(s) of {block_length}; at least 3 are needed"
        )
    blocks = cosines[len(cosines) - num_blocks * block_length :].reshape(num_blocks, block_length).mean(axis=1)
    mean, error = blocks.mean(), blocks.std(ddof=1) / math.sqrt(num_blocks)
    margin = stats.t.ppf((1 + confidence) / 2, num_blocks - 1) * error
    is_cosine = mean >= _LOWEST
    low, high = (
        float(_full_batch(min(max(edge, _LOWEST), 1.0))) if is_cosine else math.nan for edge in (mean - margin, mean + margin)
    )
    return CosineCeiling(
        ceiling=float(_full_batch(mean)) if is_cosine else math.nan,
        interval=(low, high),
        standard_error=float(error * 2 / (1 + mean) ** 2) if is_cosine else math.nan,
        half_cosine=float(mean),
        resolved=low > 0,
        num_blocks=num_blocks,
        confidence=confidence,
    )


def drift_character(
    gamma_interval,
    cosine: float,
    ceiling: CosineCeiling,
    *,
    ballistic_gamma: float = 1.75,
    diffusive_gamma: float = 1.25,
    aligned_share: float = 0.5,
    small_cosine: float = 0.2,
) -> DriftCharacter:
    """Ballistic, diffusive or undetermined, by γ of MSD(s) ∝ s^γ and the cosine of consecutive gradients together.

      ballistic  the whole interval of γ ≥ ballistic_gamma and cosine ≥ aligned_share·ceiling, with a ceiling above its noise
      diffusive  the whole interval of γ ≤ diffusive_gamma and |cosine| ≤ small_cosine

    For updates ∝ gradient of equal norms, MSD(2)/MSD(1) = 2 + 2·cosine, so γ between lags 1 and 2 is 1 + log₂(1 + cosine): the
    default 0.2 belongs to 1.26. Everything else is undetermined, γ between the two and confined (oscillating) drift included.

    Args:
      gamma_interval: (low, high), `msd_exponent(...).intervals[0]`.
      cosine: mean cosine of consecutive gradients, [−1, 1].
      ceiling: from `cosine_ceiling`, over the same steps.
      ballistic_gamma, diffusive_gamma: thresholds of γ, diffusive_gamma ≤ ballistic_gamma.
      aligned_share: of the ceiling, in (0, 1].
      small_cosine: in (0, 1).

    Returns:
      A `DriftCharacter`.

    Raises:
      ValueError: the interval is not an ordered pair of numbers, the cosine not in [−1, 1], a threshold out of range.
    """
    low, high = _interval(gamma_interval)
    cosine = float(cosine)
    if not abs(cosine) <= 1:
        raise ValueError(f"cosine={cosine:g} must lie in [-1, 1]")
    ballistic_gamma, diffusive_gamma = (
        as_positive("ballistic_gamma", ballistic_gamma),
        as_positive("diffusive_gamma", diffusive_gamma),
    )
    if diffusive_gamma > ballistic_gamma:
        raise ValueError(f"diffusive_gamma={diffusive_gamma:g} must be at most ballistic_gamma={ballistic_gamma:g}")
    aligned_share = as_fraction("aligned_share", aligned_share, closed=True)
    small_cosine = as_fraction("small_cosine", small_cosine)
    share = cosine / ceiling.ceiling if ceiling.resolved else None
    measured = f"gamma in [{low:.2f}, {high:.2f}], cosine {cosine:.2f}, ceiling {ceiling.ceiling:.2f}"
    if low >= ballistic_gamma:
        if share is None:
            return DriftCharacter("undetermined", f"{measured}: the ceiling is not above its noise", None)
        if share >= aligned_share:
            return DriftCharacter("ballistic", measured, share)
        return DriftCharacter("undetermined", f"{measured}: straight drift, but gradients that turn", share)
    if high <= diffusive_gamma:
        if abs(cosine) <= small_cosine:
            return DriftCharacter("diffusive", measured, share)
        return DriftCharacter("undetermined", f"{measured}: random drift, but gradients that agree or alternate", share)
    return DriftCharacter("undetermined", f"{measured}: gamma is between the thresholds or too uncertain", share)


def _full_batch(half_cosine: float) -> float:
    """2c/(1 + c)."""
    return 2 * half_cosine / (1 + half_cosine)


def _interval(gamma_interval) -> tuple[float, float]:
    edges = np.asarray(gamma_interval, np.float64)
    if edges.shape != (2,) or not edges[0] <= edges[1] or not np.isfinite(edges).all():
        raise ValueError(f"gamma_interval={edges.tolist()} must be a finite pair (low, high), low <= high")
    return float(edges[0]), float(edges[1])
