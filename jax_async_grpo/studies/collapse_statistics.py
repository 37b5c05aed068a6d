"""Statistics of success and fall over (S, η, seed): exponents of the boundary in S, and exact tests of two losses. No jax.

Seeds are what was drawn independently: a seed has the same prompts, noise and start at every (loss, S, η). Intervals therefore
resample whole seeds, and the tests that matter permute whole seeds; those that take runs as independent stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special, stats

from jax_async_grpo.scaling.power_law import percentile_interval

__all__ = [
    "compare_falls",
    "firth_fits",
    "log_boundaries",
    "proportion_interval",
    "seed_flip_test",
    "staleness_exponents",
    "stratified_test",
]

_STEPS, _LONGEST_STEP, _AT_REST = 200, 2.0, 1e-7  # of Newton's method, in standardized units
_MOST_DROPPED = 0.1  # share of the resamples without an exponent above which there is no interval
_LEVELS = (0.8, 0.5)


def proportion_interval(count: int, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a share: covers at least at `confidence`, whatever the share."""
    interval = stats.binomtest(int(count), int(trials)).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def firth_fits(design: np.ndarray, counts: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Many logistic regressions at once, each by maximum likelihood with Firth's penalty, as `stable_learning_rate` fits one.

    Args:
      design: [b, n, p], columns of about unit size.
      counts: [b, n] successes.
      trials: [b, n] runs, 0 where a row takes no part.

    Returns:
      [b, p]; NaN where fewer than p rows take part or the iteration did not come to rest.
    """
    possible = (trials > 0).sum(axis=1) >= design.shape[2]
    design = np.where(possible[:, None, None], design, 0.0)
    beta, step = np.zeros((len(design), design.shape[2])), None
    for _ in range(_STEPS):
        p = special.expit(np.einsum("bni,bi->bn", design, beta))
        weights = trials * p * (1 - p)
        inverse = np.linalg.pinv(np.einsum("bni,bn,bnj->bij", design, weights, design), hermitian=True)
        leverage = weights * np.einsum("bni,bij,bnj->bn", design, inverse, design)
        score = np.einsum("bni,bn->bi", design, counts - trials * p + leverage * (0.5 - p))
        step = np.einsum("bij,bj->bi", inverse, score)
        step *= np.minimum(1.0, _LONGEST_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        beta += step
        if np.abs(step).max() < _AT_REST:
            break
    at_rest = np.abs(step).max(axis=1) < math.sqrt(_AT_REST)
    return np.where((possible & at_rest)[:, None], beta, np.nan)


def log_boundaries(log_rates: np.ndarray, shares: np.ndarray, num_seeds: int, levels: Sequence[float] = _LEVELS) -> np.ndarray:
    """ln η at which the share of success falls to each level, by the fit of `stable_learning_rate`, for many curves at once.

    Args:
      log_rates: [n] ln η, ascending.
      shares: [b, n] of success.
      num_seeds: runs behind each share.
      levels: shares of success.

    Returns:
      [b, len(levels)]; NaN where no rate reaches the highest level, the share does not fall, or the boundary lies beyond the
      last rate: what would be "none", "ill-defined" and "censored" there. A wide boundary is a number here.
    """
    trials = num_seeds * _upper_side(shares)
    center, scale = log_rates.mean(), np.ptp(log_rates)
    column = (log_rates - center) / scale
    design = np.broadcast_to(np.column_stack([np.ones_like(column), -column]), (*shares.shape, 2))
    intercept, slope = firth_fits(design, trials * shares, trials).T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = center + scale * (intercept[:, None] - special.logit(np.array(levels))) / slope[:, None]
    bad = (shares.max(axis=1) < max(levels)) | ~(slope > 0)
    return np.where(bad[:, None] | (found > log_rates[-1]), np.nan, found)


def staleness_exponents(
    learning_rates, outcomes, staleness, *, is_found: Sequence[bool], num_bootstrap: int, confidence: float, seed: int = 0
) -> dict[str, Any]:
    """a of η_level ∝ S^a, and of (S+½)^a, with intervals from resampled seeds.

    Two estimates. "boundaries": a boundary for every S that has one, then least squares of ln η_level on ln S; every resample
    of the seeds fits all boundaries anew. "regression": one logistic regression of all runs,

        P(success) = 1/(1 + exp(−k·(m + a·x(S) − ln η))),    x = ln S or ln(S+½),

    whose width is the same at every S, so that η_50 and η_80 share their exponent; it also uses an S whose boundary is censored
    or ill-defined, but needs two S at which success falls below one half within the rates tried. Both look at the upper side
    only, from the η of highest success on.

    Args:
      learning_rates: [n] η, ascending.
      outcomes: [m, n, seeds] 1 for success; the same seed in the same place everywhere.
      staleness: [m] S > 0, distinct, at least two.
      is_found: [m], which boundaries enter the first estimate.
      num_bootstrap: resamples of the seeds.
      confidence: of the intervals.
      seed: of the resampling.

    Returns:
      {"staleness": those with a boundary, "fits": [{method, variable, level (None: of any), exponent, interval, num_dropped}]}.
      exponent None where fewer than two S have a boundary or the fit has no answer; interval None there, and where more than a
      tenth of the resamples have no exponent: leaving these out would not be harmless.
    """
    log_rates, outcomes = np.log(np.asarray(learning_rates, np.float64)), np.asarray(outcomes, np.float64)
    staleness, found = np.asarray(staleness, np.float64), np.asarray(is_found, bool)
    num_seeds = outcomes.shape[2]
    weights = np.random.default_rng(seed).multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_bootstrap)
    weights = np.concatenate([np.ones((1, num_seeds)), weights])  # first the seeds as they are
    shares = np.einsum("mns,bs->bmn", outcomes, weights) / num_seeds
    boundaries = log_boundaries(log_rates, shares.reshape(-1, len(log_rates)), num_seeds).reshape(*shares.shape[:2], -1)
    fits = []
    for variable, x in (("S", np.log(staleness)), ("S+1/2", np.log(staleness + 0.5))):
        for index, level in enumerate(_LEVELS):
            draws = _slopes(x[found], boundaries[:, found, index])
            fits.append(_fit("boundaries", variable, level, draws, confidence, num_seeds))
        draws = _regression(log_rates, shares, x, num_seeds)
        fits.append(_fit("regression", variable, None, draws, confidence, num_seeds))
    return {"staleness": staleness[found].astype(int).tolist(), "fits": fits}


def _fit(method, variable, level, draws, confidence, num_seeds) -> dict[str, Any]:
    """The first draw is the estimate, the others its interval."""
    kept = draws[1:][np.isfinite(draws[1:])]
    num_dropped, estimate, interval = len(draws) - 1 - len(kept), draws[0], None
    if np.isfinite(estimate) and num_dropped <= _MOST_DROPPED * (len(draws) - 1):
        interval = percentile_interval(kept[:, None], confidence, num_seeds)[0].tolist()
    exponent = float(estimate) if np.isfinite(estimate) else None
    labels = dict(method=method, variable=variable, level=level)
    return labels | dict(exponent=exponent, interval=interval, num_dropped=num_dropped)


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[b] least-squares slopes of y [b, m] on x [m]; NaN with fewer than two points or an undetermined one."""
    if len(x) < 2:
        return np.full(len(y), np.nan)
    centered = x - x.mean()
    return y @ centered / (centered @ centered)


def _regression(log_rates, shares, x, num_seeds) -> np.ndarray:
    """[b] exponents a of the one regression; NaN where success does not fall with η, or below one half at fewer than two S."""
    upper = _upper_side(shares)
    crossed = np.where(upper, shares, 1.0).min(axis=-1) < 0.5
    flat = shares.reshape(len(shares), -1)
    trials = num_seeds * upper.reshape(flat.shape)
    lags, rates = (grid.ravel() for grid in np.meshgrid(x, log_rates, indexing="ij"))
    scales = np.ptp(lags), np.ptp(rates)
    columns = [np.ones_like(lags), (lags - lags.mean()) / scales[0], -(rates - rates.mean()) / scales[1]]
    beta = firth_fits(np.broadcast_to(np.column_stack(columns), (*flat.shape, 3)), trials * flat, trials)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((beta[:, 2] > 0) & (crossed.sum(axis=1) > 1), beta[:, 1] / scales[0] / (beta[:, 2] / scales[1]), np.nan)


def _upper_side(shares: np.ndarray) -> np.ndarray:
    """True from the first place of the highest share of the last axis on."""
    return np.arange(shares.shape[-1]) >= shares.argmax(axis=-1)[..., None]


def stratified_test(falls: np.ndarray, trials: np.ndarray) -> float:
    """Two-sided exact p-value of equal odds in every stratum, runs taken as independent: Fisher's test over strata.

    Given the falls of each stratum, those of the first arm are hypergeometric; their sum over strata is compared with the
    observed one. As in Fisher's test, which it is for one stratum, outcomes no likelier than the observed one count.

    Args:
      falls: [k, 2] of both arms in each stratum.
      trials: [k, 2] runs.
    """
    law, lowest = np.ones(1), 0
    for (first, second), (m, n) in zip(falls, trials, strict=True):
        support = np.arange(max(0, first + second - n), min(m, first + second) + 1)
        law = np.convolve(law, stats.hypergeom(m + n, first + second, m).pmf(support))
        lowest += int(support[0])
    observed = law[int(falls[:, 0].sum()) - lowest]
    return float(min(1.0, law[law <= observed * (1 + 1e-7)].sum()))


def seed_flip_test(differences: Sequence[int]) -> float:
    """Two-sided exact p-value of integers whose signs are arbitrary: of |Σ ±d| at least as large as |Σ d|.

    With d_j the falls of seed j under one loss minus those under the other, over all cells, this asks whether the losses could
    be exchanged within every seed. Nothing is assumed of how the cells of a seed hang together.
    """
    differences = [int(d) for d in differences]
    law, reach = np.ones(1), 0
    for size in filter(None, map(abs, differences)):
        coin = np.zeros(2 * size + 1)
        coin[[0, -1]] = 0.5
        law, reach = np.convolve(law, coin), reach + size
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, law[np.abs(sums) >= abs(sum(differences))].sum()))


def compare_falls(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Falls under two losses at equal cells: counts, and three p-values, two-sided.

    Args:
      first, second: [cells, seeds] bool, the same cells and seeds.

    Returns:
      falls (of both), num_cells, num_runs (of each), p_fisher (pooled, runs independent), p_stratified (by cell, runs
      independent), p_seeds (`seed_flip_test`: the one that holds for seeds shared between cells). p None without cells.
    """
    first, second = np.asarray(first, int), np.asarray(second, int)
    counts, num_runs = [int(first.sum()), int(second.sum())], first.size
    result = {"falls": counts, "num_cells": len(first), "num_runs": num_runs}
    if not num_runs:
        return result | dict.fromkeys(("p_fisher", "p_stratified", "p_seeds"))
    falls = np.column_stack([first.sum(axis=1), second.sum(axis=1)])
    return result | {
        "p_fisher": float(stats.fisher_exact([[count, num_runs - count] for count in counts]).pvalue),
        "p_stratified": stratified_test(falls, np.full_like(falls, first.shape[1])),
        "p_seeds": seed_flip_test(first.sum(axis=0) - second.sum(axis=0)),
    }
