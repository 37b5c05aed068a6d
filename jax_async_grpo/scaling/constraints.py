"""The two-constraint law fitted to measured limits, beside the laws with one constraint. No jax.

The least-squares problem is solved exactly: its minimum lies in one of finitely many pieces, and all of them are looked at.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jax_async_grpo.option_checks import as_fraction, as_integer
from jax_async_grpo.scaling.power_law import percentile_interval

__all__ = ["ConstraintFit", "ModelScore", "Radius", "fit_stability_limit"]

_MIN_POINTS = 5
_UNBOUND = 1e9  # nats; stands for an infinite radius among the draws of a bootstrap


class Radius(NamedTuple):
    """`value` and `interval` (low, high), both None unless `status` is "found"; else it begins "not identifiable: "."""

    value: float | None
    interval: tuple[float, float] | None
    status: str


class ModelScore(NamedTuple):
    """How well one law describes the measured limits.

    Attributes:
      name: the law, e.g. "min(a/S, b/T)".
      num_parameters: fitted, the error variance not counted.
      rms_log_error: root mean square of ln(measured/fitted); inf where the law has no finite value at a point (c/S at S = 0).
      aicc: n·ln(SSE/n) + 2K + 2K(K+1)/(n−K−1), K = num_parameters + 1; lower is better. None where n ≤ K + 1.
      leave_one_out_error: rms ln error at points left out of the fit one by one; inf where one cannot be predicted.
    """

    name: str
    num_parameters: int
    rms_log_error: float
    aicc: float | None
    leave_one_out_error: float


@dataclasses.dataclass(frozen=True)
class ConstraintFit:
    """η_max ≈ min{batch_radius/X, critical_radius/Y}; see `fit_stability_limit` for X, Y and the units.

    Attributes:
      batch_radius: R_batch/G_upd, or R_batch.
      critical_radius: R_crit/G_upd, or R_crit.
      regime_ratio: batch_radius/critical_radius, where both limits are equal: X* = regime_ratio·Y.
      num_staleness_limited, num_horizon_limited: points on either side in the two-constraint fit.
      scores: the two-constraint law first, then its rivals.
      num_points: n.
      confidence: of the intervals.
    """

    batch_radius: Radius
    critical_radius: Radius
    regime_ratio: Radius
    num_staleness_limited: int
    num_horizon_limited: int
    scores: tuple[ModelScore, ...]
    num_points: int
    confidence: float

    def regime_boundary(self, horizon) -> np.ndarray | None:
        """S*(T), beyond which staleness limits η: regime_ratio·T for X = S·G_upd, Y = T·G_upd with one G_upd. None where it is
        not identifiable. (For measured drift X this is X* per G_upd.)"""
        return None if self.regime_ratio.value is None else self.regime_ratio.value * np.asarray(horizon, np.float64)


class _Points(NamedTuple):
    """log η, ln X (−inf at S = 0) and ln Y, each [n]."""

    log_eta: np.ndarray
    log_x: np.ndarray
    log_y: np.ndarray


def fit_stability_limit(
    max_staleness,
    horizon,
    max_learning_rate,
    *,
    update_norm=None,
    drift=None,
    groups=None,
    num_bootstrap: int = 1000,
    confidence: float = 0.9,
    seed: int = 0,
) -> ConstraintFit:
    """Fits the two-constraint law (arXiv 2607.01083; README, equation (7)) to measured largest learning rates.

        ln η_max = min{ ln R_batch − ln X, ln R_crit − ln Y } + error

    X = S·G_upd, or the measured drift √MSD(S)/η where it is given; Y = T·G_upd. Without `update_norm` G_upd counts as 1 and
    what is found is R/G_upd (updates × learning rate); a drift is a distance already, so then the batch radius is R_batch
    itself. At S = 0 there is no staleness limit. On which side of the kink a point lies depends on ln R_batch − ln R_crit
    alone: the sum of squares is a quadratic between neighboring values of ln X − ln Y, and its global minimum is found by
    trying all of them.

    Intervals are percentiles of a bootstrap over `groups` (points without), moved outwards to Student's t for the number of
    groups that the constraint binds. A resample in which a constraint binds nowhere puts its radius at infinity; where that
    makes the interval infinite, the radius is "not identifiable" (and the other, where this one binds nowhere, fitted alone).
    So it is with fewer than two staleness values ≥ 1 (or horizons), or where fewer than two of them bind: a limit that was seen
    at one S cannot be told from one that does not depend on S. Neither is identifiable where a constant has the lower AICc.
    Measured coverage of 90 % intervals (21 points, seven S, three T, 200 draws): 90-92 % with errors of 0.2 in ln η, 84-90 %
    with 0.4; 87-92 % with eight groups.

    A radius that was found is no evidence for the law: read `scores`, where one-constraint laws and the smooth sum
    1/η = 1/η_0 + X/c stand beside it. Laws with no value at S = 0 score inf there; leave those points out to compare them on
    the rest.

    Args:
      max_staleness: [n] S ≥ 0, updates.
      horizon: [n] T > 0, updates.
      max_learning_rate: [n] measured η_max > 0. Leave out cells that are "none", "censored" or "ill-defined".
      update_norm: G_upd, number or [n], update norm per η.
      drift: [n] √MSD(S)/η; not looked at where S = 0.
      groups: [n] labels of what was measured independently, e.g. tasks.
      num_bootstrap: at least 100.
      confidence: of the intervals, in (0, 1).
      seed: of the resampling, ≥ 0.

    Returns:
      A `ConstraintFit`.

    Raises:
      ValueError: shapes differ, fewer than 5 points or 2 groups, or a value that is not finite and in its range.
    """
    num_bootstrap = as_integer("num_bootstrap", num_bootstrap, minimum=100)
    confidence, seed = as_fraction("confidence", confidence), as_integer("seed", seed, minimum=0)
    points, staleness, horizon = _points(max_staleness, horizon, max_learning_rate, update_norm, drift)
    size = len(points.log_eta)
    labels = np.arange(size) if groups is None else np.asarray(groups)
    if labels.shape != (size,) or len(np.unique(labels)) < 2:
        raise ValueError(
            f"groups has shape {labels.shape} and {len(np.unique(labels))} label(s); it must be [{size}] with 2 or more"
        )
    labels = np.unique(labels, return_inverse=True)[1]
    weights = _resamples(labels, num_bootstrap, seed)
    fit = [float(v[0]) for v in _fit_min(points, np.ones((1, size)))]
    draws = _fit_min(points, weights)
    bound = points.log_x - points.log_y >= fit[0] - fit[1] - 1e-9
    sides = {"staleness": (bound, staleness, points.log_x), "horizon": (~bound, horizon, points.log_y)}
    scores = _scores(points)
    radii = [_radius(name, fit[i], draws[i], *sides[name][:2], labels, confidence) for i, name in enumerate(sides)]
    if scores[1].aicc is not None and scores[1].aicc <= scores[0].aicc:
        radii = [Radius(None, None, "not identifiable: a constant describes the limits as well")] * 2
    for i, name in enumerate(sides):
        # Where points were seen to be limited by the other constraint they are not this one's, identifiable or not.
        if radii[i].value is not None and radii[1 - i].value is None and not sides[list(sides)[1 - i]][0].any():
            radii[i] = _alone(name, points, sides[name][2], sides[name][1], weights, labels, confidence)
    return ConstraintFit(
        batch_radius=radii[0],
        critical_radius=radii[1],
        regime_ratio=_ratio(fit, draws, radii, min(len(np.unique(labels[b])) for b in (bound, ~bound)), confidence),
        num_staleness_limited=int(bound.sum()),
        num_horizon_limited=int((~bound).sum()),
        scores=scores,
        num_points=size,
        confidence=confidence,
    )


def _points(max_staleness, horizon, max_learning_rate, update_norm, drift) -> tuple[_Points, np.ndarray, np.ndarray]:
    eta = np.asarray(max_learning_rate, np.float64)
    if eta.ndim != 1 or len(eta) < _MIN_POINTS:
        raise ValueError(f"max_learning_rate has shape {eta.shape}; it must be [n] with n >= {_MIN_POINTS}")
    given = {"max_staleness": max_staleness, "horizon": horizon, "max_learning_rate": eta, "drift": drift}
    if update_norm is not None:
        given["update_norm"] = update_norm if np.ndim(update_norm) else np.full(len(eta), update_norm)
    values = {}
    for name, value in given.items():
        if value is None:
            continue
        values[name] = np.asarray(value, np.float64)
        if values[name].shape != eta.shape:
            raise ValueError(f"{name} has shape {values[name].shape}; it must be [{len(eta)}]")
        used = values["max_staleness"] > 0 if name == "drift" else np.full(len(eta), True)
        low_enough = values[name] >= 0 if name == "max_staleness" else values[name] > 0
        bad = used & ~(np.isfinite(values[name]) & low_enough)
        if bad.any():
            allowed = ">= 0" if name == "max_staleness" else "> 0"
            raise ValueError(f"{name}[{np.argmax(bad)}]={values[name][bad][0]:g} must be finite and {allowed}")
    staleness, norm = values["max_staleness"], values.get("update_norm", np.ones(len(eta)))
    distance = values.get("drift", staleness * norm)
    log_x = np.log(distance, out=np.full(len(eta), -np.inf), where=staleness > 0)
    return _Points(np.log(eta), log_x, np.log(values["horizon"] * norm)), staleness, values["horizon"]


def _resamples(labels: np.ndarray, num_bootstrap: int, seed: int) -> np.ndarray:
    """[num_bootstrap, n] how often each point's group was drawn."""
    num_groups = labels.max() + 1
    draws = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_bootstrap)
    return draws[:, labels].astype(np.float64)


def _fit_min(points: _Points, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ln batch radius, ln critical radius), each [b], of weighted least squares with weights [b, n]; inf where unbound.

    With d = ln X − ln Y ascending, point i is staleness-limited iff d_i ≥ α − β. Candidates: every split of the sorted points
    whose α − β lies in its own gap, and α − β = d_j for every j.
    """
    difference = points.log_x - points.log_y
    order = np.argsort(difference, kind="stable")
    log_eta, log_x, log_y, d = (v[order] for v in (*points, difference))
    weights, center = weights[:, order], log_eta.mean() + log_y.mean()
    fresh = np.isneginf(log_x)
    by_x = np.where(fresh, 0, log_eta + np.where(fresh, 0, log_x)) - center
    by_y = log_eta + log_y - center
    size, num_fresh = len(d), int(fresh.sum())

    def sums(values):  # of the first k sorted points, k = 0..n
        return np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights * values, axis=1)], axis=1)

    total, x1, x2, y0, y1, y2 = (sums(v) for v in (np.ones(size), by_x, by_x**2, np.ones(size), by_y, by_y**2))
    x0, x1, x2 = total[:, -1:] - total, x1[:, -1:] - x1, x2[:, -1:] - x2
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha, beta = np.where(x0 > 0, x1 / x0, np.inf), np.where(y0 > 0, y1 / y0, np.inf)
        loss = x2 - np.where(x0 > 0, x1**2 / x0, 0) + y2 - np.where(y0 > 0, y1**2 / y0, 0)
        threshold = np.where(x0 > 0, np.where(y0 > 0, alpha - beta, -np.inf), np.inf)
    edges = np.concatenate([[-np.inf], d, [np.inf]])
    feasible = (threshold >= edges[:-1]) & (threshold <= edges[1:]) & (np.arange(size + 1) >= num_fresh)
    # A kink at a point: alpha = beta + d_j, all points tell beta.
    d_finite = d[num_fresh:]
    shifted = by_y[None] - np.minimum(d_finite[:, None] - np.where(fresh, -np.inf, d)[None], 0)
    kink_beta = weights @ shifted.T / total[:, -1:]
    kink_loss = weights @ shifted.T**2 - total[:, -1:] * kink_beta**2
    # Unbound first: where binding nowhere fits as well, up to rounding, that is the answer.
    rounding = 1e-12 * (weights @ by_y**2)[:, None]
    unbound = np.isinf(alpha) | np.isinf(beta)
    losses = np.concatenate(
        [np.where(feasible, loss + np.where(unbound, 0, rounding), np.inf), kink_loss + 2 * rounding], axis=1
    )
    best = losses.argmin(axis=1)[:, None]
    alphas = np.concatenate([alpha, kink_beta + d_finite], axis=1)
    betas = np.concatenate([beta, kink_beta], axis=1)
    return tuple(np.take_along_axis(v, best, axis=1)[:, 0] + center for v in (alphas, betas))


def _radius(name, fitted, draws, bound, values, labels, confidence) -> Radius:
    """The radius of one constraint, or why there is none. `values` [n] are S or T."""
    what = "staleness >= 1" if name == "staleness" else "horizon"
    if len(np.unique(values[values > 0])) < 2:
        return Radius(None, None, f"not identifiable: fewer than two values of {what}")
    if len(np.unique(values[bound])) < 2 or len(np.unique(labels[bound])) < 2:
        return Radius(
            None, None, f"not identifiable: the {name} limit binds at fewer than two values of {what}, or in one group"
        )
    low, high = percentile_interval(np.minimum(draws, _UNBOUND)[:, None], confidence, len(np.unique(labels[bound])))[0]
    if high > draws[np.isfinite(draws)].max(initial=-np.inf):
        share = np.isinf(draws).mean()
        return Radius(None, None, f"not identifiable: the {name} limit binds nowhere in {share:.0%} of the resamples")
    return Radius(math.exp(fitted), (math.exp(low), math.exp(high)), "found")


def _alone(name, points, log_drift, values, weights, labels, confidence) -> Radius:
    """The radius of a law with this constraint only, from the points that have it."""
    has = np.isfinite(log_drift)
    target = (points.log_eta + np.where(has, log_drift, 0))[has]
    counts = weights[:, has]
    draws = counts[counts.sum(axis=1) > 0] @ target / counts[counts.sum(axis=1) > 0].sum(axis=1)
    return _radius(name, target.mean(), draws, has, values, labels, confidence)


def _ratio(fit, draws, radii, num_groups, confidence) -> Radius:
    missing = [radius.status for radius in radii if radius.value is None]
    if missing:
        return Radius(None, None, missing[0])
    ratios = draws[0] - draws[1]
    low, high = percentile_interval(ratios[np.isfinite(ratios)][:, None], confidence, num_groups)[0]
    return Radius(math.exp(fit[0] - fit[1]), (math.exp(low), math.exp(high)), "found")


def _scores(points: _Points) -> tuple[ModelScore, ...]:
    """All laws, each fitted to all points and to all but one."""
    size = len(points.log_eta)
    weights = np.concatenate([np.ones((1, size)), 1 - np.eye(size)])
    one = np.ones(size)
    alpha, beta = _fit_min(points, weights)
    laws = [
        ("min(a/X, b/Y)", 2, np.minimum(alpha[:, None] - points.log_x, beta[:, None] - points.log_y)),
        ("constant", 1, _linear(points, weights, [one], 0 * one)),
        ("c/X", 1, _linear(points, weights, [one], -points.log_x)),
        ("c/Y", 1, _linear(points, weights, [one], -points.log_y)),
        ("c/X^a", 2, _linear(points, weights, [one, points.log_x], 0 * one)),
        ("1/(1/h + X/c)", 2, _smooth_sum(points, weights)),
    ]
    return tuple(_score(name, parameters, points.log_eta, predicted) for name, parameters, predicted in laws)


def _score(name: str, num_parameters: int, log_eta: np.ndarray, predicted: np.ndarray) -> ModelScore:
    """predicted: [1 + n, n], row 0 from the fit to all points, row 1 + i from that without point i."""
    size, k = len(log_eta), num_parameters + 1
    error, left_out = np.mean((log_eta - predicted[0]) ** 2), np.mean((log_eta - np.diagonal(predicted[1:])) ** 2)
    floor = (np.finfo(np.float64).eps * max(1.0, np.abs(log_eta).max())) ** 2  # rounding: an exact fit is not infinitely good
    aicc = size * math.log(max(error, floor)) + 2 * k + 2 * k * (k + 1) / (size - k - 1) if size > k + 1 else None
    return ModelScore(name, num_parameters, math.sqrt(error), aicc, math.sqrt(left_out))


def _linear(points: _Points, weights, columns, offset) -> np.ndarray:
    """[b, n] predictions of log η = offset + columns·coefficients; inf where X = 0 leaves the law without a finite value."""
    design = np.column_stack(columns)
    if not (np.isfinite(design).all() and np.isfinite(offset).all()):
        return np.full(weights.shape, np.inf)
    gram = np.einsum("bn,ni,nj->bij", weights, design, design)
    moment = np.einsum("bn,ni->bi", weights * (points.log_eta - offset), design)
    return offset + np.einsum("bij,bj->bi", np.linalg.pinv(gram, hermitian=True), moment) @ design.T


def _smooth_sum(points: _Points, weights) -> np.ndarray:
    """[b, n] predictions of 1/η = 1/h + X/c: the mean given ln(h/c), and that on a grid that is refined six times."""
    finite = points.log_x[np.isfinite(points.log_x)]
    center, step = (-finite.mean(), (np.ptp(finite) + 24) / 64) if len(finite) else (0.0, 1.0)
    ratio = np.full(len(weights), center)
    total = weights.sum(axis=1)[:, None]
    for _ in range(7):
        grid = ratio[:, None] + step * np.linspace(-32, 32, 65)  # [b, r]
        bend = np.logaddexp(0, points.log_x + grid[..., None])
        level = np.einsum("bn,brn->br", weights, points.log_eta + bend) / total
        loss = np.einsum("bn,brn->br", weights, (points.log_eta + bend - level[..., None]) ** 2)
        best = loss.argmin(axis=1)
        ratio = grid[np.arange(len(grid)), best]
        step /= 16
    level = level[np.arange(len(grid)), best]
    return level[:, None] - np.logaddexp(0, points.log_x + ratio[:, None])
