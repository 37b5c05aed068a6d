"""The two-constraint limit on the learning rate (arXiv 2607.01083): a measured radius divided by a measured drift. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_async_grpo.option_checks import as_fraction, as_integer, as_positive

__all__ = ["StabilityLimit", "batch_clip_radius", "max_stable_learning_rate", "staleness_budget_line"]


def batch_clip_radius(
    clip_fraction_fn: Callable[[np.ndarray], Any],
    *,
    level: float,
    max_radius: float,
    min_radius: float | None = None,
    num_scan: int = 256,
    relative_tolerance: float = 1e-6,
) -> float:
    """R_batch: the smallest ‖θ−φ‖ along the realised drift direction at which the clipped fraction reaches `level`.

        R_batch = inf { r > 0 : clip_fraction(φ + r·(θ−φ)/‖θ−φ‖) ≥ level }        (arXiv 2607.01083; README, equation (7))

    The fraction of enumerated tokens is a step function of r, and not monotone: a ratio may leave the clip range and come back.
    So no root finding, but a log-spaced scan from `min_radius` to `max_radius`, and then the same number of evenly spaced
    radii inside the first interval that reaches the level, again and again until the interval is narrow enough.

    Resolution: an excursion above the level narrower than one scan step, a factor (max_radius/min_radius)^(1/(num_scan−1))
    (5.6 % at the defaults), can be missed if the fraction falls back before the next radius; wider ones are always found.

    Args:
      clip_fraction_fn: radii [num_scan] -> policy-weighted clipped fractions [num_scan] in [0, 1]. Always called with num_scan
        radii, so that a jitted function compiles once.
      level: the declared fraction q, in (0, 1].
      max_radius: where the search gives up, in the units of ‖θ−φ‖.
      min_radius: where it starts; default 1e-6·max_radius.
      num_scan: radii of every pass, at least 8.
      relative_tolerance: width of the last interval relative to the radius.

    Returns:
      The upper end of the last interval, a radius at which the level *is* reached; inf if none is found up to `max_radius`.

    Raises:
      ValueError: an argument is out of range; the fractions have another shape or leave [0, 1]; the level is reached at
        `min_radius` already, so that the smallest radius lies below the search.
    """
    level = as_fraction("level", level, closed=True)
    max_radius = as_positive("max_radius", max_radius)
    min_radius = 1e-6 * max_radius if min_radius is None else as_positive("min_radius", min_radius)
    num_scan = as_integer("num_scan", num_scan, minimum=8)
    relative_tolerance = as_fraction("relative_tolerance", relative_tolerance)
    if min_radius >= max_radius:
        raise ValueError(f"min_radius={min_radius:g} must be smaller than max_radius={max_radius:g}")
    radii = np.geomspace(min_radius, max_radius, num_scan)
    reached = _reached(clip_fraction_fn, radii, level)
    if not reached.any():
        return math.inf
    first = int(np.argmax(reached))
    if first == 0:
        raise ValueError(
            f"min_radius={min_radius:g}: the clipped fraction reaches level={level:g} there already; lower min_radius"
        )
    low, high = radii[first - 1], radii[first]
    while high - low > relative_tolerance * high:
        radii = np.linspace(low, high, num_scan + 1)[1:]
        reached = _reached(clip_fraction_fn, radii, level)
        reached[-1] = True  # known from the pass before; a recompiled sum may round the other way
        first = int(np.argmax(reached))
        low, high = (low if first == 0 else radii[first - 1]), radii[first]
    return float(high)


@dataclasses.dataclass(frozen=True)
class StabilityLimit:
    """The two-constraint limit on the learning rate; see `max_stable_learning_rate`.

    Attributes:
      max_learning_rate: the smaller of the two limits, or the only one that was found; None where none was. The rule says
        η ≪ this: use a fraction of it.
      staleness_limit: R_batch over the drift per learning rate within S updates, measured where it was given; None where
        R_batch was not measured, inf where a search did not reach it, and at S = 0.
      ballistic_staleness_limit: R_batch/(S·G_upd), the worst case in which every update points the same way.
      horizon_limit: R_crit/(T·G_upd); None where R_crit was not measured, inf where nothing collapsed.
      regime: "staleness-limited" or "horizon-limited" where both were measured; else "horizon not measured", "staleness limit
        not measured" or "neither measured"; "not reached" where both were looked for and neither radius was reached.
      max_staleness: S, updates.
      horizon: T, updates.
    """

    max_learning_rate: float | None
    staleness_limit: float | None
    ballistic_staleness_limit: float | None
    horizon_limit: float | None
    regime: str
    max_staleness: int
    horizon: int

    def headroom(self, learning_rate: float) -> float | None:
        """max_learning_rate / learning_rate: below 1 the limit is exceeded; None where no limit was found."""
        learning_rate = as_positive("learning_rate", learning_rate)
        return None if self.max_learning_rate is None else self.max_learning_rate / learning_rate


def max_stable_learning_rate(
    *,
    max_staleness: int,
    horizon: int,
    update_norm: float,
    batch_clip_radius: float | None,
    critical_drift_radius: float | None = None,
    drift_per_learning_rate: float | None = None,
) -> StabilityLimit:
    """The two-constraint rule (arXiv 2607.01083; README, equation (7)).

        η ≪ min { R_batch/(S·G_upd), R_crit/(T·G_upd) }

    S·G_upd assumes ballistic drift. Where the drift was measured, √MSD(S)/η replaces it in `staleness_limit`, and the ballistic
    limit stays beside it. With a schedule of η, read T·η as Σ_k η_k. On a tie the regime is staleness-limited.

    Args:
      max_staleness: S ≥ 0, updates. 0 has no staleness limit.
      horizon: T ≥ 1, updates.
      update_norm: G_upd, measured norm of one update divided by η.
      batch_clip_radius: R_batch, parameter distance; inf where the search did not reach the clip level, None = not measured.
      critical_drift_radius: R_crit, ‖θ−θ_0‖ at which the declared collapse rule fires; inf where it did not, None = not
        measured.
      drift_per_learning_rate: √MSD(S)/η, parameter distance per unit of learning rate; needs S ≥ 1.

    Returns:
      A `StabilityLimit`.

    Raises:
      ValueError: S < 0, T < 1, a radius or norm that is zero, negative or NaN, an infinite norm, or a drift at S = 0.
    """
    max_staleness = as_integer("max_staleness", max_staleness, minimum=0)
    horizon = as_integer("horizon", horizon, minimum=1)
    update_norm = as_positive("update_norm", update_norm)
    if batch_clip_radius is not None:
        batch_clip_radius = as_positive("batch_clip_radius", batch_clip_radius, infinite=True)
    if critical_drift_radius is not None:
        critical_drift_radius = as_positive("critical_drift_radius", critical_drift_radius, infinite=True)
    ballistic_drift = max_staleness * update_norm
    drift = ballistic_drift
    if drift_per_learning_rate is not None:
        drift = drift_per_learning_rate = as_positive("drift_per_learning_rate", drift_per_learning_rate)
        if max_staleness == 0:
            raise ValueError(f"drift_per_learning_rate={drift_per_learning_rate:g} needs max_staleness >= 1: MSD(0) is 0")
    staleness_limit = _limit(batch_clip_radius, drift)
    horizon_limit = _limit(critical_drift_radius, horizon * update_norm)
    found = [limit for limit in (staleness_limit, horizon_limit) if limit is not None and math.isfinite(limit)]
    return StabilityLimit(
        max_learning_rate=min(found, default=None),
        staleness_limit=staleness_limit,
        ballistic_staleness_limit=_limit(batch_clip_radius, ballistic_drift),
        horizon_limit=horizon_limit,
        regime=_regime(staleness_limit, horizon_limit),
        max_staleness=max_staleness,
        horizon=horizon,
    )


def staleness_budget_line(limit: StabilityLimit, learning_rate: float) -> str:
    """One ASCII line for the hyperparameter table of a paper.

    `S=8, T=400, eta=0.001: S*eta=8.0e-3, T*eta=0.40, eta_max=0.012 (staleness-limited), headroom 12x`; where measured drift
    set the limit, the ballistic limit follows the regime. A limit that was not measured is said not to be.

    Args:
      limit: from `max_stable_learning_rate`; it knows S and T.
      learning_rate: η > 0.
    """
    headroom = limit.headroom(learning_rate)
    parts = [
        f"S={limit.max_staleness}, T={limit.horizon}, eta={learning_rate:g}: "
        f"S*eta={_short(limit.max_staleness * learning_rate)}",
        f"T*eta={_short(limit.horizon * learning_rate)}",
    ]
    if headroom is None:
        return ", ".join([*parts, f"no eta_max found ({limit.regime})"])
    ballistic = ""
    if limit.max_learning_rate == limit.staleness_limit != limit.ballistic_staleness_limit:
        ballistic = f"; {_short(limit.ballistic_staleness_limit)} if drift were ballistic"
    parts += [f"eta_max={_short(limit.max_learning_rate)} ({limit.regime}{ballistic})", f"headroom {_short(headroom)}x"]
    return ", ".join(parts) + (" (exceeded)" if headroom < 1 else "")


def _limit(radius: float | None, drift_per_learning_rate: float) -> float | None:
    """radius / drift per learning rate; inf where there is no drift, whatever the radius."""
    if drift_per_learning_rate == 0:
        return math.inf
    return None if radius is None else radius / drift_per_learning_rate


def _regime(staleness_limit: float | None, horizon_limit: float | None) -> str:
    if staleness_limit is None:
        return "neither measured" if horizon_limit is None else "staleness limit not measured"
    if horizon_limit is None:
        return "horizon not measured"
    if math.isinf(min(staleness_limit, horizon_limit)):
        return "not reached"
    return "staleness-limited" if staleness_limit <= horizon_limit else "horizon-limited"


def _short(value: float) -> str:
    """Two digits: 0.40, 12, 8.0e-3."""
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:#.2g}".rstrip(".") if value < 10 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _reached(clip_fraction_fn, radii: np.ndarray, level: float) -> np.ndarray:
    """[n] bool, writable."""
    fractions = np.asarray(clip_fraction_fn(radii), np.float64)
    if fractions.shape != radii.shape:
        raise ValueError(f"clip_fraction_fn returned shape {fractions.shape} for radii {radii.shape}; it must be the same")
    allowed = (fractions >= 0) & (fractions <= 1 + 1e-9)  # a sum of probabilities may pass 1 by rounding
    if not allowed.all():
        index = int(np.argmin(allowed))
        raise ValueError(f"clip_fraction_fn returned {fractions[index]} at radius {radii[index]:g}; allowed: 0 to 1")
    return fractions >= level
