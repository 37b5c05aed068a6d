"""A plan as text for a terminal, as plan.json and as a figure of the plane of staleness and learning rate."""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jax_async_grpo import records
from jax_async_grpo.plan_evidence import Evidence, plan_of
from jax_async_grpo.planner import Anchor, Plan
from jax_async_grpo.studies import save_figure

__all__ = ["WRITTEN", "figure", "text", "write_report"]

WRITTEN = ("plan.txt", "plan.json", "plan.png", "plan.svg")
_WIDTH = 80
_NOT_MEASURED = "not measured"
_REACH = 4  # times the anchors' S: as far as the planner goes unasked
_MEASURES = {
    "policy": "the prediction takes the growth of sqrt(KL), the policy's drift, in its place",
    "parameters": "the prediction takes this growth: no KL was measured at both S",
}
_ANCHORS = (
    "runs at S = 0 and at one larger S, each at learning rates that work and at ones that fail: two of them bracket the limit, "
    "runs at one learning rate alone show none. docs/plan.md has the loop for launch.train (under 'Training runs') and the "
    "columns of a log; launch.plan --config=configs/plan.py --measure runs them for a small task"
)
_STATUS = {
    "bracketed": "bracketed by two measured learning rates",
    "order of magnitude": "ORDER OF MAGNITUDE ONLY: no two anchors, nothing places the boundary",
    "censored": "CENSORED: the runs of an anchor never failed; a number here is a lower bound",
    "none": "NONE: no learning rate can be named",
    "not planned": "NOT PLANNED: too little was measured to say anything",
    "ill-defined": "ILL-DEFINED: success has no boundary in the learning rate",
}


def text(plan: Plan, evidence: Evidence) -> str:
    """The plan in lines of at most 80 columns, plain ASCII but for names of the user's."""
    blocks = [
        [("plan", f"S = {plan.max_staleness}, T = {plan.horizon} learner updates"), ("status", _STATUS[plan.status])],
        [("to run", _ANCHORS)] if plan.status == "not planned" else [],
        _rate_lines(plan),
        _limit_lines(plan),
        _drift_lines(plan),
        _question_lines(plan, evidence),
        _evidence_lines(evidence),
        [(f"note {number}", note) for number, note in enumerate(plan.notes, start=1)],
        [("budget", plan.budget)],
    ]
    return "\n\n".join("\n".join(_wrapped(*line) for line in block) for block in blocks if block)


def write_report(plan: Plan, evidence: Evidence, folder: str | os.PathLike) -> list[Path]:
    """Writes plan.txt, plan.json, plan.png and plan.svg; returns their paths.

    plan.json is {"plan": fields of `planner.Plan` and its `budget`, "evidence": fields of `plan_evidence.Evidence`}; what is
    not known is null there, a limit that was not reached "Infinity".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records.write_text(folder / WRITTEN[0], text(plan, evidence) + "\n")
    plain = {"plan": dataclasses.asdict(plan) | {"budget": plan.budget}, "evidence": dataclasses.asdict(evidence)}
    records.write_json(folder / WRITTEN[1], plain)
    return [folder / WRITTEN[0], folder / WRITTEN[1], *save_figure(figure(plan, evidence), folder, "plan")]


def figure(plan: Plan, evidence: Evidence) -> Figure:
    """The (S, eta) plane: predicted eta_80 with its band, half of it, anchors, limits, and what was asked."""
    drawn = Figure(figsize=(7.2, 4.6), layout="constrained")
    ax = drawn.subplots()
    reach = max(plan.max_staleness, *(_REACH * anchor.max_staleness for anchor in evidence.anchors), 1)
    ax.set(xscale="symlog", yscale="log", xlabel="maximum staleness S, updates", ylabel="learning rate η")
    ax.set_xscale("symlog", linthresh=1, base=2)
    ax.set_xlim(-0.15, reach * 1.25)
    ticks = [0, *(2**k for k in range(reach.bit_length()))]
    ax.set_xticks(ticks, map(str, ticks))
    plans = _plans(plan, evidence, reach)
    _draw_prediction(ax, plans)
    _draw_anchors(ax, evidence.anchors)
    _draw_asked(ax, plan)
    _draw_limits(ax, plan, plans)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, color="0.92")
    ax.set_axisbelow(True)
    ax.set_title("\n".join(textwrap.wrap(plan.budget, 88, break_on_hyphens=False)), fontsize=8, loc="left")
    if ax.get_legend_handles_labels()[0]:
        drawn.legend(loc="outside right upper", fontsize=7, frameon=False)
    return drawn


def _rate_lines(plan: Plan) -> list[tuple[str, str]]:
    if plan.max_learning_rate is None:
        return [("use eta", f"no number: see {'to run' if plan.status == 'not planned' else 'note 1'}")]
    sign = ">= " if plan.status == "censored" else ""
    interval = _interval(plan.interval, plan.confidence)
    return [
        ("use eta", f"{plan.recommended:.3g}  (half of the predicted eta_80)"),
        ("eta_80", f"{sign}{plan.max_learning_rate:.3g}  {interval}, where 80 % of runs still succeed"),
    ]


def _limit_lines(plan: Plan) -> list[tuple[str, str]]:
    if plan.max_learning_rate is None:
        return []
    staleness = _limit(plan.staleness_limit, plan.staleness_interval, plan.confidence, "lag was not seen to bind")
    horizon = _limit(plan.horizon_limit, plan.horizon_interval, plan.confidence, "the horizon run did not collapse")
    optimizer = _NOT_MEASURED if plan.optimizer_limit is None else f"{plan.optimizer_limit:.3g}"
    return [
        ("limits on eta", ""),
        ("  staleness", f"{staleness}, lag alone" if plan.staleness_limit is not None else staleness),
        ("  horizon", horizon),
        ("  optimizer", f"{optimizer}, eta_80 at S = 0"),
        ("  binds", plan.binding or "none"),
    ]


def _drift_lines(plan: Plan) -> list[tuple[str, str]]:
    if plan.update_norm is None:
        return [("drift", _NOT_MEASURED)]
    half = plan.drift_exponent
    kind = f"grows as S^{half:.2f} (1 ballistic, 0.5 diffusive)"
    clip = {None: f"{_NOT_MEASURED} (no clip fraction)", math.inf: "not reached: the clip fraction stayed below its level"}
    operational = clip.get(plan.clip_radius) or f"{plan.clip_radius:.3g}  (where the clip fraction reaches its level)"
    effective = plan.batch_radius if plan.batch_radius is not None and math.isfinite(plan.batch_radius) else None
    critical = plan.critical_radius if plan.critical_radius is not None and math.isfinite(plan.critical_radius) else None
    drift = "" if plan.drift is None else f"{plan.drift:.3g}  sqrt(MSD(S))/eta at S = {plan.max_staleness}; "
    return [
        ("G_upd", f"{plan.update_norm:.3g}  norm of an update over eta"),
        ("drift", drift + kind),
        *([] if plan.drift_measure is None else [("", _MEASURES[plan.drift_measure])]),
        ("R_batch", f"{effective:.3g}  effective, drift at the staleness limit" if effective else "effective: none"),
        ("", f"operational: {operational}"),
        ("R_crit", f"{critical:.3g}" if critical else _NOT_MEASURED if plan.horizon_limit is None else "none"),
    ]


def _question_lines(plan: Plan, evidence: Evidence) -> list[tuple[str, str]]:
    if plan.learning_rate is None:
        return [("head-room", "give --learning_rate to ask for it, and for the S it allows")]
    if plan.headroom is None:
        return [("head-room", f"no number at eta = {plan.learning_rate:g}")]
    warning = (
        ", ABOVE the predicted eta_80" if plan.headroom < 1 else ", above the recommended half" if plan.headroom < 2 else ""
    )
    return [
        ("asked", f"eta = {plan.learning_rate:g}"),
        (
            "head-room",
            f"{plan.headroom:.2g}x below the predicted eta_80{warning}" if not warning else f"{plan.headroom:.2g}x{warning}",
        ),
        ("largest S", _largest(plan, evidence)),
    ]


def _largest(plan: Plan, evidence: Evidence) -> str:
    """Words for the S up to which half the predicted η_80 is at least the η asked about."""
    if len(evidence.anchors) < 2:
        return f"{_NOT_MEASURED} (needs two anchors)"
    if plan.largest_staleness is not None:
        reach = _REACH * evidence.anchors[1].max_staleness
        return f"{plan.largest_staleness}{' or more: as far as the anchors reach' if plan.largest_staleness >= reach else ''}"
    limits = [x for x in (plan.optimizer_limit, plan.horizon_limit) if x is not None]
    return (
        "none, it is too much even without lag" if 2 * plan.learning_rate > min(limits) else f"{_NOT_MEASURED} (needs a probe)"
    )


def _evidence_lines(evidence: Evidence) -> list[tuple[str, str]]:
    lines = [("evidence", evidence.source)]
    for anchor in evidence.anchors:
        number = {"found": "", "censored": ">= "}.get(anchor.status)
        rate = anchor.status if number is None else f"eta_80 {number}{anchor.learning_rate:.3g}"
        interval = "" if anchor.interval is None else "  " + _interval(anchor.interval, anchor.confidence)
        seeds = "" if anchor.num_seeds is None else f", {anchor.num_seeds} runs a rate"
        lines.append(("  anchor", f"S = {anchor.max_staleness}, T = {anchor.horizon}: {rate}{interval}{seeds}"))
    if evidence.probe is not None:
        probe, ess = evidence.probe, "" if evidence.ess is None else f", ESS {evidence.ess:.2g}"
        lines.append(("  probe", f"S = {probe.max_staleness}, eta = {probe.learning_rate:g}{ess}"))
    if evidence.horizon_run is not None:
        run = evidence.horizon_run
        end = "held" if run.collapse_step is None else f"fell at step {run.collapse_step:g}"
        lines.append(("  horizon", f"S = 0, eta = {run.learning_rate:g}: {end}, of {run.num_updates} updates"))
    return lines


def _interval(interval: tuple[float, float], confidence: float) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}] ({100 * confidence:g} %)"


def _limit(value: float | None, interval, confidence: float, beyond: str) -> str:
    if value is None:
        return _NOT_MEASURED
    return f"none, {beyond}" if math.isinf(value) else f"{value:.3g}  {_interval(interval, confidence)}"


def _wrapped(name: str, words: str) -> str:
    """A line whose continuation stands below its words."""
    return textwrap.fill(f"{name:<14}{words}", _WIDTH, subsequent_indent=" " * 14, break_on_hyphens=False).rstrip()


def _plans(plan: Plan, evidence: Evidence, reach: int) -> list[Plan]:
    """Plans with a number for other S at the same T; none where there is nothing between which to draw."""
    if len(evidence.anchors) < 2 or plan.max_learning_rate is None:
        return []
    lags = {0, *np.geomspace(1, reach, 24).round().astype(int).tolist(), plan.max_staleness}
    if evidence.probe is None:  # nothing says how drift grows between the anchors
        lags = {0, evidence.anchors[1].max_staleness}
    options = dict(horizon=plan.horizon, confidence=plan.confidence, extrapolate=True)
    made = [plan_of(evidence, max_staleness=lag, **options) for lag in sorted(lags)]
    return [plan for plan in made if plan.max_learning_rate is not None]


def _draw_prediction(ax, plans: Sequence[Plan]) -> None:
    """eta_80(S), its band and its half."""
    if not plans:
        return
    lags, rates = [plan.max_staleness for plan in plans], np.array([plan.max_learning_rate for plan in plans])
    bound = " (lower bound)" if plans[0].status == "censored" else ""
    band = zip(*(plan.interval for plan in plans), strict=True)
    ax.fill_between(lags, *band, color="C0", alpha=0.15, lw=0, label=f"{100 * plans[0].confidence:g} % interval")
    ax.plot(lags, rates, color="C0", label=f"predicted η₈₀{bound}")
    ax.plot(lags, rates / 2, color="C2", ls="--", label="half of it: use this")


def _draw_limits(ax, plan: Plan, plans: Sequence[Plan]) -> None:
    """The limits of which the prediction is made, in the picture as it stands: at small S the one of lag leaves it."""
    bottom, top = ax.get_ylim()
    finite = [(made.max_staleness, made.staleness_limit) for made in plans if math.isfinite(made.staleness_limit)]
    if finite:
        ax.plot(*zip(*finite, strict=True), color="0.45", ls=":", lw=1.2, label="staleness limit")
    levels = (("optimizer", plan.optimizer_limit, "0.45"), ("horizon", plan.horizon_limit, "C3"))
    for name, level, color in levels:
        if level is not None and math.isfinite(level):
            ax.axhline(level, color=color, ls="-.", lw=0.9, label=f"{name} limit")
            bottom, top = min(bottom, level / 1.5), max(top, level * 1.5)
    ax.set_ylim(bottom, top)


def _draw_anchors(ax, anchors: Sequence[Anchor]) -> None:
    numbers = [anchor for anchor in anchors if anchor.status in ("found", "censored")]
    for anchor in numbers:
        low, high = anchor.interval or (anchor.learning_rate,) * 2
        low, high = (end if 0 < end < math.inf else anchor.learning_rate for end in (low, high))
        errors = [[anchor.learning_rate - low], [high - anchor.learning_rate]]
        label = "measured anchors" if anchor is numbers[0] else None
        ax.errorbar(anchor.max_staleness, anchor.learning_rate, errors, fmt="ko", ms=5, capsize=3, label=label, zorder=4)
        if anchor.status == "censored":
            start = (anchor.max_staleness, anchor.learning_rate)
            ax.annotate("", start, (0, 26), "data", "offset points", arrowprops=dict(arrowstyle="<-", color="k"))
            ax.annotate("never failed", start, (8, 14), textcoords="offset points", fontsize=7)
    for anchor in anchors:
        if anchor not in numbers:
            ax.axvline(anchor.max_staleness, color="C3", ls=":", lw=1, label=f"S = {anchor.max_staleness}: {anchor.status}")


def _draw_asked(ax, plan: Plan) -> None:
    S = plan.max_staleness
    if plan.max_learning_rate is not None:
        low, high = plan.interval
        errors = [[plan.max_learning_rate - low], [high - plan.max_learning_rate]]
        style = dict(fmt="o", color="C0", mfc="w", capsize=3, zorder=5)
        ax.errorbar(S, plan.max_learning_rate, errors, label=f"η₈₀ at S = {S}: {plan.status}", **style)
        ax.plot(S, plan.recommended, "*", color="C2", ms=12, zorder=5, label=f"use η = {plan.recommended:.2g}")
    if plan.learning_rate is not None:
        ax.plot(S, plan.learning_rate, "X", color="C1", ms=8, zorder=6, label=f"asked: η = {plan.learning_rate:g}")
