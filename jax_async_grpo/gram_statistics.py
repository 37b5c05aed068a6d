"""Squared lengths, angles and detection limits of a mean vector, from the inner products of K independent noisy copies of it.

x_k = μ + e_k, k = 1..K, are independent and equally distributed: the gradients of K blocks of prompts, say. ‖mean of x‖² is too
large by tr(Σ)/K, Σ = Cov(x_k); the U-statistic over pairs of different copies is not. Nothing here needs more of the x_k than
their Gram matrix [K, K], on the host and in float64. Formulas and their derivation: docs/estimation.md.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

__all__ = [
    "critical_value",
    "detectable_norm",
    "jackknife_error",
    "leave_one_out",
    "noise_spectrum",
    "norm_interval",
    "u_statistic",
]

MAX_DIMENSIONS = 1e6  # the noncentral F distribution is computed up to there; the limit goes with its fourth root


def u_statistic(gram: np.ndarray) -> np.ndarray:
    """Σ_{j≠k} x_j·y_k / (K(K−1)), unbiased for E[x]·E[y]; with x = y it is (‖Σx_k‖² − Σ‖x_k‖²)/(K(K−1)) and may be negative.

    >>> float(u_statistic(np.array([[2.0, 1.0], [3.0, 7.0]])))
    2.0

    Args:
      gram: [..., K, K], x_j·y_k in row j and column k.

    Returns:
      [...].
    """
    apart = _between_blocks(gram)
    num_blocks = apart.shape[-1]
    return apart.sum((-2, -1)) / (num_blocks * (num_blocks - 1))


def leave_one_out(gram: np.ndarray) -> np.ndarray:
    """The U-statistic without block k, for every k.

    Args:
      gram: [..., K, K] with K ≥ 3, as in `u_statistic`.

    Returns:
      [..., K].
    """
    apart = _between_blocks(gram)
    num_blocks = apart.shape[-1]
    without = apart.sum((-2, -1))[..., None] - apart.sum(-1) - apart.sum(-2)
    return without / ((num_blocks - 1) * (num_blocks - 2))


def jackknife_error(values: np.ndarray) -> np.ndarray:
    """√((K−1)/K · Σ_k (v_k − mean v)²), the standard error of a statistic whose values without block k are v_k.

    Args:
      values: [..., K].

    Returns:
      [...]; NaN where a value is.
    """
    values = np.asarray(values, np.float64)
    num_blocks = values.shape[-1]
    return np.sqrt((num_blocks - 1) / num_blocks * np.sum((values - values.mean(-1, keepdims=True)) ** 2, axis=-1))


def noise_spectrum(gram: np.ndarray) -> tuple[float, float]:
    """tr Σ and the effective dimensions ν = (tr Σ)²/tr Σ² of the noise, whatever the mean is.

    With S the sample covariance and n = K − 1, tr Σ² is estimated by n²/((n−1)(n+2)) · (tr S² − (tr S)²/n), unbiased for
    Gaussian noise (Bai and Saranadasa 1996), and (tr Σ)² by (tr S)² − 2/n times that.

    Args:
      gram: [K, K], x_j·x_k, K ≥ 3.

    Returns:
      (tr S, ν), ν in [1, 1e6]; NaN where the Gram matrix is not finite, (0, 1) without noise.
    """
    gram = np.asarray(gram, np.float64)
    centered = gram - gram.mean(0, keepdims=True) - gram.mean(1, keepdims=True) + gram.mean()
    freedom = len(gram) - 1
    trace = np.trace(centered) / freedom
    if not np.isfinite(trace):
        return np.nan, np.nan
    if trace <= 0:
        return 0.0, 1.0
    squared = np.sum((centered / freedom) ** 2)
    trace_of_square = freedom**2 / ((freedom - 1) * (freedom + 2)) * max(squared - trace**2 / freedom, 0.0)
    dimensions = trace**2 / max(trace_of_square, trace**2 / MAX_DIMENSIONS) - 2 / freedom
    return float(trace), float(np.clip(dimensions, 1.0, MAX_DIMENSIONS))


def critical_value(trace: float, dimensions: float, num_blocks: int, level: float) -> float:
    """The U-statistic of ‖μ‖² above which μ = 0 is rejected: (tr Σ/K)·(F_{1−α}(ν, ν(K−1)) − 1).

    Args:
      trace, dimensions: of `noise_spectrum`.
      num_blocks: K.
      level: α, the chance to reject a μ that is 0.

    Returns:
      A squared norm; 0 without noise.
    """
    return trace / num_blocks * (_quantile(dimensions, num_blocks, level) - 1)


def detectable_norm(trace: float, dimensions: float, num_blocks: int, level: float, power: float) -> float:
    """The detection limit: the ‖μ‖ that the test of `critical_value` rejects with the stated power.

    √(λ tr Σ/(K ν)), λ the noncentrality at which F(ν, ν(K−1), λ) exceeds its critical value with that power. It is meant for
    a μ spread over directions as the noise is; one along the noisiest direction alone needs more, one away from the noise less.

    Args:
      trace, dimensions: of `noise_spectrum`.
      num_blocks: K.
      level: α.
      power: the chance to reject.

    Returns:
      A norm, in units of the x_k; 0 without noise, NaN where the trace is.
    """
    if not trace > 0:
        return trace
    quantile = _quantile(dimensions, num_blocks, level)
    noncentrality = _noncentrality(dimensions, num_blocks, quantile, 1 - power)
    return float(np.sqrt(noncentrality * trace / (num_blocks * dimensions)))


def norm_interval(norm_squared: float, trace: float, dimensions: float, num_blocks: int, level: float) -> tuple[float, float]:
    """The ‖μ‖ that tests of the measured 1 + K·U/tr Σ against F(ν, ν(K−1), λ) do not reject, λ = K ν ‖μ‖²/tr Σ.

    U ± its jackknife error is no such interval: U is skewed, and where it comes out small its error does too.

    Args:
      norm_squared: U, the U-statistic of ‖μ‖².
      trace, dimensions: of `noise_spectrum`.
      num_blocks: K.
      level: of the two-sided interval, 0.9 say.

    Returns:
      (low, high), norms ≥ 0; both NaN where the trace is.
    """
    if not trace > 0:
        norm = float(np.sqrt(np.maximum(norm_squared, 0))) + trace
        return norm, norm
    measured = max(1 + num_blocks * norm_squared / trace, 0.0)
    tails = (1 + level) / 2, (1 - level) / 2
    low, high = (_noncentrality(dimensions, num_blocks, measured, tail) * trace / (num_blocks * dimensions) for tail in tails)
    return float(np.sqrt(low)), float(np.sqrt(high))


def _noncentrality(dimensions, num_blocks, value, probability) -> float:
    """The λ at which F(ν, ν(K−1), λ) stays below the value with that probability; 0 where it does so less often at λ = 0."""
    freedom = dimensions, dimensions * (num_blocks - 1)

    def excess(noncentrality):
        return special.ncfdtr(*freedom, noncentrality, value) - probability

    if excess(0.0) <= 0:
        return 0.0
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    return optimize.brentq(excess, 0.0, upper)


def _quantile(dimensions, num_blocks, level) -> float:
    return float(special.fdtri(dimensions, dimensions * (num_blocks - 1), 1 - level))


def _between_blocks(gram) -> np.ndarray:
    gram = np.asarray(gram, np.float64)
    return np.where(np.eye(gram.shape[-1], dtype=bool), 0.0, gram)
