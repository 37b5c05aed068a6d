"""Which learning rate is safe at a wanted staleness and horizon, from two measured learning rates that bracket it. No jax.

A probe alone cannot place the largest stable learning rate; two anchors can. An *anchor* is η_80, the learning rate at which
80 % of the runs still succeed (`scaling.stable_learning_rate`), measured at S = 0 and at one larger staleness S_a. Between and
a little beyond them the planner takes

    1/η_80(S) = 1/η_80(0) + (X(S)/X(S_a)) · (1/η_80(S_a) − 1/η_80(0)),      X(s) = √KL(s)

where KL(s) is the divergence of the learner from the policy of its stale rollouts at lag s, measured by short *probes* at the
wanted S and at S_a that share a learning rate: what the optimizer itself costs and what lag costs add up. Where no KL is known,
the drift of the parameters, √MSD(s) with MSD(s) = E‖θ_t − θ_{t−s}‖², stands in for it, with a wider interval. A *horizon run*
(S = 0, a high learning rate, with the step t_c at which it collapsed) gives the limit of over-optimization, η·T = η_hi·t_c,
where the reward can be hacked. The form is this project's; it is tested by prediction on tasks it has not seen
(docs/laws/second_prediction.md). The rule of arXiv 2607.01083, min{R_batch/(S·G_upd), R_crit/(T·G_upd)}, takes drift as
ballistic and knows no limit of the optimizer's own.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from jax_async_grpo.option_checks import as_fraction, as_integer, as_positive

__all__ = ["LARGEST", "Anchor", "HorizonRun", "Plan", "Probe", "check_reach", "checked_wanted", "make_plan"]

LARGEST = 10**15  # S and T that can be asked for, updates: no run is longer, and every integer up to there is a float
STATUSES = ("found", "none", "censored", "ill-defined")
_MODEL_ERROR = {"policy": 0.35, "parameters": 0.5}  # nats; scatter of η_80 about the form, beyond the anchors' intervals
_HORIZON_ERROR = 0.14  # nats, of t_c·η
_NO_ANCHOR_ERROR = 2.2  # nats, of an estimate without anchors (docs/laws/second_prediction.md)
_TV_AT_BOUNDARY = 0.5  # total variation of completions, continued in proportion to η: its median over docs/laws/prediction.md
_LARGEST_TV = 0.25  # of a probe: beyond it total variation no longer grows as η
_EXTRAPOLATION = 4.0  # times the anchor's S, and times the anchors' T
_NUM_DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A measured boundary.

    Attributes:
      max_staleness: S, updates.
      horizon: T of its runs, updates.
      status: as in `scaling.Boundary`.
      learning_rate: η_80; None unless found. For "censored" the largest learning rate tried, which still holds.
      interval: (low, high) of η_80, or None.
      confidence: of the interval.
      num_seeds: runs a learning rate.
    """

    max_staleness: int
    horizon: int
    status: str
    learning_rate: float | None
    interval: tuple[float, float] | None = None
    confidence: float = 0.9
    num_seeds: int | None = None

    def __post_init__(self) -> None:
        as_integer("max_staleness", self.max_staleness, minimum=0)
        as_integer("horizon", self.horizon, minimum=1)
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r} of an anchor must be one of {STATUSES}")
        if self.status in ("found", "censored"):
            as_positive("learning_rate", math.nan if self.learning_rate is None else self.learning_rate)

        if self.interval is not None and not 0 <= self.interval[0] <= (self.learning_rate or 0) <= self.interval[1]:
            raise ValueError(f"interval={self.interval} of an anchor must hold its learning rate {self.learning_rate}")

    @property
    def log_error(self) -> float:
        """Standard error of ln η_80 from the interval: of its finite side where one is open, 1 where both are, ¼ without."""
        if self.interval is None:
            return 0.25
        low, high = self.interval
        sides = [math.log(self.learning_rate / low)] if low > 0 else []
        sides += [math.log(high / self.learning_rate)] if math.isfinite(high) else []
        return sum(sides) / len(sides) / stats.norm.ppf((1 + self.confidence) / 2) if sides else 1.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a short run at the wanted staleness measures.

    Attributes:
      max_staleness: S, updates.
      learning_rate: η of the run.
      drift: {lag: √MSD(lag)}, parameter distance; lags ≥ 1 updates.
      policy_drift: {S: √KL(S)}, KL(π_φ‖π_θ) of the stale rollouts of runs at S ≥ 1 and this η, √nats, of completions or of
        tokens throughout; empty = not measured. The plan needs the wanted S and that of the larger anchor.
      total_variation: ½·E|w − 1|, w = π_θ/π_φ of whole completions at S, in (0, 1]; None = not measured.
      clip_radius: drift at which the clipped fraction of tokens reaches the declared level; None = not measured.
    """

    max_staleness: int
    learning_rate: float
    drift: dict[int, float]
    policy_drift: dict[int, float] = dataclasses.field(default_factory=dict)
    total_variation: float | None = None
    clip_radius: float | None = None

    def __post_init__(self) -> None:
        as_integer("max_staleness", self.max_staleness, minimum=0)
        as_positive("learning_rate", self.learning_rate)
        if 1 not in self.drift:
            raise ValueError(f"drift of a probe has the lags {sorted(self.drift)}; lag 1, one update, must be among them")
        for name, points in (("drift", self.drift), ("policy_drift", self.policy_drift)):
            for lag, value in points.items():
                as_integer("lag", lag, minimum=1)
                as_positive(f"{name} at lag {lag}", value)
        if self.total_variation is not None:
            as_fraction("total_variation", self.total_variation, closed=True)

    @property
    def update_norm(self) -> float:
        """G_upd = √MSD(1)/η."""
        return self.drift[1] / self.learning_rate

    @property
    def drift_exponent(self) -> float:
        """γ/2 of √MSD(s) ∝ s^{γ/2} by least squares over the lags; 1 (ballistic) where only one lag was measured."""
        lags = np.array(sorted(self.drift), float)
        if len(lags) < 2:
            return 1.0
        return float(np.polyfit(np.log(lags), np.log([self.drift[int(lag)] for lag in lags]), 1)[0])

    def drift_at(self, lag: float) -> float:
        """√MSD(lag)/η, interpolated in logarithms and continued by the last slope (the first below lag 1)."""
        return _interpolated(self.drift, lag) / self.learning_rate

    def drift_ratio(self, max_staleness: int, anchor_staleness: int) -> tuple[float, str]:
        """X(S)/X(S_a), and what X is: "policy" where √KL was measured at both, else "parameters"."""
        kind = "policy" if {max_staleness, anchor_staleness} <= set(self.policy_drift) else "parameters"
        points = self.policy_drift if kind == "policy" else self.drift
        return _interpolated(points, max_staleness) / _interpolated(points, anchor_staleness), kind


def _interpolated(points: dict[int, float], lag: float) -> float:
    """Of {lag: value}, linear in logarithms and continued by the slope at the end; proportional to the lag from one point."""
    lags = np.array(sorted(points), float)
    values = np.log([points[int(x)] for x in lags])
    if len(lags) == 1:
        return float(np.exp(values[0]) * lag / lags[0])
    position = np.clip(np.searchsorted(lags, lag), 1, len(lags) - 1)
    (x0, x1), (y0, y1) = np.log(lags[position - 1 : position + 1]), values[position - 1 : position + 1]
    return float(np.exp(y0 + (y1 - y0) * (math.log(lag) - x0) / (x1 - x0)))


@dataclasses.dataclass(frozen=True)
class HorizonRun:
    """A run without lag at a high learning rate: `collapse_step` t_c in updates, None if it held for `num_updates`."""

    learning_rate: float
    num_updates: int
    collapse_step: float | None

    def __post_init__(self) -> None:
        as_positive("learning_rate", self.learning_rate)
        as_integer("num_updates", self.num_updates, minimum=1)
        if self.collapse_step is not None:
            as_positive("collapse_step", self.collapse_step)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the planner says; η are learning rates.

    Attributes:
      status: "bracketed" (two anchors), "order of magnitude" (no anchors), "none", "censored", "ill-defined", or "not planned"
        where there is too little to say anything.
      max_staleness, horizon: S and T asked for, updates.
      max_learning_rate: predicted η_80; a lower bound where "censored", None where there is no number.
      interval: of it, `confidence`; None where there is no number.
      confidence: of the intervals.
      recommended: half of max_learning_rate.
      staleness_limit, staleness_interval: η at which lag alone would end it, c/X(S); inf where lag was not seen to bind.
      horizon_limit, horizon_interval: η at which the horizon alone would end it; None = not measured.
      optimizer_limit: η_80 at S = 0, whatever ends it there; None without an anchor.
      binding: "staleness", "horizon" or "optimizer", the smallest of the limits; None where there is no number.
      update_norm: G_upd. drift: √MSD(S)/η. drift_exponent: γ/2.
      drift_measure: what X is, "policy" or "parameters"; None where S is that of an anchor, or without anchors.
      batch_radius: drift at the staleness limit, c; the effective R_batch. clip_radius: the operational one of the probe.
      critical_radius: R_crit = horizon_limit·T·G_upd, or None.
      learning_rate: η asked about, or None; headroom: max_learning_rate/η.
      largest_staleness: S up to which half the predicted η_80 is at least the η asked about, or None.
      notes: what a reader must know, one sentence each.
    """

    status: str
    max_staleness: int
    horizon: int
    max_learning_rate: float | None
    interval: tuple[float, float] | None
    confidence: float
    recommended: float | None
    staleness_limit: float | None
    staleness_interval: tuple[float, float] | None
    horizon_limit: float | None
    horizon_interval: tuple[float, float] | None
    optimizer_limit: float | None
    binding: str | None
    update_norm: float | None
    drift: float | None
    drift_exponent: float | None
    drift_measure: str | None
    batch_radius: float | None
    clip_radius: float | None
    critical_radius: float | None
    learning_rate: float | None
    headroom: float | None
    largest_staleness: int | None
    notes: tuple[str, ...]

    @property
    def budget(self) -> str:
        """The one-line staleness budget, ASCII."""
        wanted = f"S={self.max_staleness}, T={self.horizon}"
        if self.max_learning_rate is None:
            return f"{wanted}: no learning rate ({self.status})"
        low, high = self.interval
        sign = ">=" if self.status == "censored" else "="
        line = f"{wanted}: eta_80 {sign} {self.max_learning_rate:.2g} [{low:.2g}, {high:.2g}], use {self.recommended:.2g}"
        line += f" (S*eta={self.max_staleness * self.recommended:.2g}, T*eta={self.horizon * self.recommended:.2g})"
        line += f", {self.binding}-limited" if self.binding else ""
        return line + (f", headroom {self.headroom:.2g}x at eta={self.learning_rate:g}" if self.headroom is not None else "")


def checked_wanted(
    max_staleness: int, horizon: int, learning_rate: float | None = None, *, prefix: str = ""
) -> tuple[int, int, float | None]:
    """(S, T, η) that are asked about; ValueError names what cannot be, with the prefix, such as "--" of a flag, before it."""
    return (
        as_integer(f"{prefix}max_staleness", max_staleness, minimum=0, maximum=LARGEST),
        as_integer(f"{prefix}horizon", horizon, minimum=1, maximum=LARGEST),
        None if learning_rate is None else as_positive(f"{prefix}learning_rate", learning_rate),
    )


def make_plan(
    *,
    max_staleness: int,
    horizon: int,
    probe: Probe | None = None,
    anchors: tuple[Anchor, ...] = (),
    horizon_run: HorizonRun | None = None,
    learning_rate: float | None = None,
    confidence: float = 0.9,
    model_error: float | None = None,
    extrapolate: bool = False,
    seed: int = 0,
) -> Plan:
    """The learning rate for a wanted staleness and horizon.

    Intervals hold the errors of the anchors, drawn log-normal from their intervals, and `model_error`, the scatter of measured
    η_80 about the form, both in ln η.

    Args:
      max_staleness: S wanted, updates.
      horizon: T wanted, updates.
      probe: at the wanted S, or with lags up to it; None is possible where S is 0 or that of an anchor.
      anchors: at S = 0 and at one larger S; none for an order of magnitude from the probe's total variation.
      horizon_run: without it the horizon limit is "not measured".
      learning_rate: η of a launch, for head-room and the S it allows.
      confidence: of the intervals.
      model_error: nats; None = 0.35 where X is √KL, 0.5 where it is √MSD (docs/laws/prediction.md).
      extrapolate: allow S and T beyond four times those of the anchors.
      seed: of the draws behind the intervals.

    Returns:
      A `Plan`.

    Raises:
      ValueError: one anchor, two at the same S, none at S = 0; a missing probe, or one at another S without anchors; S or T
        beyond the stated factor of the anchors' without `extrapolate`; an option out of range.
    """
    max_staleness, horizon, learning_rate = checked_wanted(max_staleness, horizon, learning_rate)
    confidence = as_fraction("confidence", confidence)
    model_error = None if model_error is None else as_positive("model_error", model_error)
    wanted = dict(max_staleness=max_staleness, horizon=horizon, confidence=confidence, learning_rate=learning_rate)
    measured = _measured(probe, max_staleness)
    if not anchors:
        if probe is not None and probe.max_staleness != max_staleness:
            raise ValueError(
                f"probe ran at S = {probe.max_staleness}; without anchors it must be at max_staleness={max_staleness}"
            )
        return _without_anchors(wanted, measured, probe, horizon_run)
    fresh, stale = _checked_anchors(anchors, wanted, probe, extrapolate)
    for word in ("none", "ill-defined"):
        if word in (fresh.status, stale.status):
            where = " and ".join(f"S = {a.max_staleness}" for a in (fresh, stale) if a.status == word)
            note = "no learning rate works" if word == "none" else "success comes and goes, or is lost over too wide a range"
            return _numberless(word, wanted, measured, f"at {where} the sweep found that {note}")
    if fresh.status == "censored" and max_staleness > stale.max_staleness:
        # 1/η(S) = (1−r)/η_0 + r/η_a with r > 1: a larger η_0 would make the prediction smaller.
        note = (
            f"at S = 0 no rate failed up to {fresh.learning_rate:g}; beyond S = {stale.max_staleness} that bounds nothing: try "
            "larger rates at S = 0"
        )
        return _numberless("censored", wanted, measured, note)
    return _bracketed(wanted, measured, probe, fresh, stale, horizon_run, model_error, seed)


def _bracketed(wanted, measured, probe, fresh, stale, horizon_run, model_error, seed) -> Plan:
    S, T, confidence = wanted["max_staleness"], wanted["horizon"], wanted["confidence"]
    rng = np.random.default_rng(seed)
    # The first column is the estimate itself, the others are draws.
    fresh_log, stale_log = (
        math.log(anchor.learning_rate) + np.r_[0.0, anchor.log_error * rng.standard_normal(_NUM_DRAWS)]
        for anchor in (fresh, stale)
    )
    ratio, kind = _drift_ratio(probe, S, stale.max_staleness)
    lost_to_lag = np.maximum(np.exp(-stale_log) - np.exp(-fresh_log), 0.0)
    beyond = _beyond(S, T, stale.max_staleness, (fresh.horizon, stale.horizon))
    notes = [f"EXTRAPOLATED: {words}; the interval does not cover this" for words in beyond]
    horizon_limit = _horizon_limit(horizon_run, T, notes)
    # Where the anchors cannot tell lag from noise, both measure the same boundary.
    pooled = np.exp(np.where(lost_to_lag > 0, fresh_log, (fresh_log + stale_log) / 2))
    if horizon_limit is not None:
        pooled = np.minimum(pooled, horizon_limit * np.exp(np.r_[0.0, _HORIZON_ERROR * rng.standard_normal(_NUM_DRAWS)]))
    with np.errstate(divide="ignore"):
        staleness_limit = 1 / (ratio * lost_to_lag)
    predicted = 1 / (1 / pooled + ratio * lost_to_lag)
    model_error = _MODEL_ERROR[kind or "policy"] if model_error is None else model_error
    spread = predicted * np.exp(np.r_[0.0, model_error * rng.standard_normal(_NUM_DRAWS)])
    estimate = float(predicted[0])
    limits = {"staleness": float(staleness_limit[0]), "optimizer": fresh.learning_rate}
    if horizon_limit is not None and math.isfinite(horizon_limit):
        limits["horizon"] = horizon_limit
    if kind == "parameters":
        notes.append(
            f"the drift is that of the parameters, not of the policy, which predicts better: it needs the KL at S = {S} and at "
            f"S = {stale.max_staleness}"
        )
        if max(probe.drift) < max(S, stale.max_staleness):
            notes.append(
                f"drift was measured up to lag {max(probe.drift)} and continued from there to {max(S, stale.max_staleness)}"
            )
    ran = sorted({fresh.horizon, stale.horizon})
    if ran != [T] and horizon_limit is None:
        notes.append(
            f"the anchors ran {' and '.join(map(str, ran))} updates and T is {T}: without a horizon run the plan assumes that "
            "the limit does not move with T, which holds for true rewards and fails for rewards that can be hacked"
        )
    censored = [anchor.max_staleness for anchor in (fresh, stale) if anchor.status == "censored"]
    if censored:
        notes.append(f"the sweep at S = {', '.join(map(str, censored))} never failed: this is a lower bound")
    c = float(staleness_limit[0]) * measured["drift"] if measured["drift"] else None
    G = measured["update_norm"]
    return Plan(
        status="censored" if censored else "bracketed",
        max_learning_rate=estimate,
        interval=_interval(spread[1:], confidence),
        recommended=estimate / 2,
        staleness_limit=limits["staleness"],
        staleness_interval=_interval(staleness_limit[1:], confidence),
        horizon_limit=horizon_limit,
        horizon_interval=None if horizon_limit is None else _around(horizon_limit, _HORIZON_ERROR, confidence),
        optimizer_limit=fresh.learning_rate,
        binding=min(limits, key=limits.get),
        drift_measure=kind,
        batch_radius=c,
        critical_radius=horizon_limit * T * G if horizon_limit is not None and G is not None else None,
        headroom=None if wanted["learning_rate"] is None else estimate / wanted["learning_rate"],
        largest_staleness=_largest_staleness(wanted["learning_rate"], float(pooled[0]), float(lost_to_lag[0]), stale, probe),
        notes=tuple(notes),
        **wanted,
        **measured,
    )


def _without_anchors(wanted, measured, probe, horizon_run) -> Plan:
    """An order of magnitude: total variation grows as η, up to a rough constant at the boundary."""
    if probe is None:
        raise ValueError("neither anchors nor a probe are given; there is nothing to plan from")
    notes = [
        "an order of magnitude at best: without anchors nothing places the boundary, tests missed by 3x and, one in ten, 60x"
    ]
    horizon_limit = _horizon_limit(horizon_run, wanted["horizon"], notes)
    if probe.total_variation is None:
        reason = "r is 1 without lag" if wanted["max_staleness"] == 0 else "the probe has no total variation"
        return _numberless("not planned", wanted, measured, f"there are no anchors, and {reason}")
    if probe.total_variation > _LARGEST_TV:
        notes.append(
            f"the probe's total variation {probe.total_variation:.2g} is above {_LARGEST_TV}, where it no longer grows in "
            "proportion to the learning rate: probe at a lower one"
        )
    limit = probe.learning_rate * _TV_AT_BOUNDARY / probe.total_variation
    estimate = limit if horizon_limit is None else min(limit, horizon_limit)
    G = measured["update_norm"]
    return Plan(
        status="order of magnitude",
        max_learning_rate=estimate,
        interval=_around(estimate, _NO_ANCHOR_ERROR, wanted["confidence"]),
        recommended=estimate / 2,
        staleness_limit=limit,
        staleness_interval=_around(limit, _NO_ANCHOR_ERROR, wanted["confidence"]),
        horizon_limit=horizon_limit,
        horizon_interval=None if horizon_limit is None else _around(horizon_limit, _HORIZON_ERROR, wanted["confidence"]),
        optimizer_limit=None,
        binding="staleness" if estimate == limit else "horizon",
        drift_measure=None,
        batch_radius=limit * measured["drift"] if measured["drift"] else None,
        critical_radius=None if horizon_limit is None else horizon_limit * wanted["horizon"] * G,
        headroom=None if wanted["learning_rate"] is None else estimate / wanted["learning_rate"],
        largest_staleness=None,
        notes=tuple(notes),
        **wanted,
        **measured,
    )


def _numberless(status, wanted, measured, note) -> Plan:
    empty = dict.fromkeys(
        (
            "max_learning_rate interval recommended staleness_limit staleness_interval horizon_limit horizon_interval "
            "optimizer_limit binding drift_measure batch_radius critical_radius headroom largest_staleness"
        ).split()
    )
    return Plan(status=status, notes=(note,), **empty, **wanted, **measured)


def _measured(probe: Probe | None, max_staleness: int) -> dict[str, float | None]:
    if probe is None:
        return dict.fromkeys(("update_norm", "drift", "drift_exponent", "clip_radius"))
    return dict(
        update_norm=probe.update_norm,
        drift=probe.drift_at(max_staleness) if max_staleness else None,
        drift_exponent=probe.drift_exponent,
        clip_radius=probe.clip_radius,
    )


def _checked_anchors(anchors, wanted, probe, extrapolate) -> tuple[Anchor, Anchor]:
    fresh, stale = sorted(anchors, key=lambda anchor: anchor.max_staleness) if len(anchors) == 2 else (None, None)
    if fresh is None or fresh.max_staleness != 0 or stale.max_staleness == 0:
        given = [anchor.max_staleness for anchor in anchors]
        raise ValueError(f"anchors are given at S = {given}; a plan needs one at S = 0 and one at a larger S")
    S, T = wanted["max_staleness"], wanted["horizon"]
    are_numbers = {fresh.status, stale.status} <= {"found", "censored"}
    if probe is None and are_numbers and S not in (0, stale.max_staleness):
        raise ValueError(f"probe is missing: S = {S} is not that of an anchor, so its drift must be measured")
    if not extrapolate:
        check_reach(S, T, stale.max_staleness, (fresh.horizon, stale.horizon))
    return fresh, stale


def check_reach(max_staleness: int, horizon: int, anchor_staleness: int, horizons: tuple[int, ...]) -> None:
    """ValueError where the wanted S or T lies beyond the stated factor of the larger anchor's S, or of the anchors' T."""
    beyond = _beyond(max_staleness, horizon, anchor_staleness, horizons)
    if beyond:
        raise ValueError(
            f"{beyond[0]}; measure anchors nearer to it, or pass extrapolate (--extrapolate) and do not trust the interval"
        )


def _beyond(max_staleness: int, horizon: int, anchor_staleness: int, horizons: tuple[int, ...]) -> list[str]:
    """What of S and T lies beyond the stated factor, in words."""
    wanted = (("max_staleness", max_staleness, anchor_staleness), ("horizon", horizon, min(horizons)))
    found = [
        f"{name}={value} is more than {_EXTRAPOLATION:g} times the anchors' {reach}"
        for name, value, reach in wanted
        if value > _EXTRAPOLATION * reach
    ]
    if _EXTRAPOLATION * horizon < max(horizons):
        found.append(f"horizon={horizon} is less than 1/{_EXTRAPOLATION:g} of the anchors' {max(horizons)}")
    return found


def _drift_ratio(probe: Probe | None, max_staleness: int, anchor_staleness: int) -> tuple[float, str | None]:
    """X(S)/X(S_a) and what X is; None where S is that of an anchor."""
    if max_staleness in (0, anchor_staleness):
        return float(max_staleness > 0), None
    return probe.drift_ratio(max_staleness, anchor_staleness)


def _horizon_limit(run: HorizonRun | None, horizon: int, notes: list[str]) -> float | None:
    if run is None:
        return None
    if run.collapse_step is None:
        notes.append(f"the horizon run did not collapse within {run.num_updates} updates: no horizon limit was reached")
        return math.inf
    return run.learning_rate * run.collapse_step / horizon


def _around(value: float, log_error: float, confidence: float) -> tuple[float, float]:
    factor = math.exp(stats.norm.ppf((1 + confidence) / 2) * log_error)
    return value / factor, value * factor


def _interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
    return float(low), float(high)


def _largest_staleness(learning_rate, pooled, lost_to_lag, stale, probe) -> int | None:
    """The largest S, up to the reach of the anchors, at which half the predicted η_80 is at least η."""
    if learning_rate is None or 2 * learning_rate > pooled:
        return None
    reach = int(_EXTRAPOLATION * stale.max_staleness)
    if lost_to_lag <= 0 or probe is None:
        return reach if lost_to_lag <= 0 else None
    points = probe.policy_drift if len(probe.policy_drift) > 1 and stale.max_staleness in probe.policy_drift else probe.drift
    ratios = {S: _interpolated(points, S) / _interpolated(points, stale.max_staleness) for S in range(1, reach + 1)}
    return max((S for S, ratio in ratios.items() if 1 / (1 / pooled + ratio * lost_to_lag) >= 2 * learning_rate), default=0)
