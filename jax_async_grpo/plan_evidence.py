"""What a plan stands on, read from records of sweeps: anchors, a probe and a horizon run, and a plan made of them.

`planner` holds the mathematics and sees only these three; `plan_log` reads the same from logs of any other system.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo import planner, sweep_summary
from jax_async_grpo.scaling import CollapseRule

__all__ = [
    "Evidence",
    "anchor_of_boundary",
    "anchor_staleness",
    "checked_horizon_run",
    "evidence_of_sweep",
    "horizon_run_of_cell",
    "plan_of",
    "probe_of_cell",
    "probe_rate",
]

_REFUTED = 0.5  # of what the horizon law allows: an anchor that held for twice as long refutes it


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is measured of a system.

    Attributes:
      source: folder or file it comes from.
      anchors: ascending in S: two for a plan, fewer for an order of magnitude.
      probe: drift at the wanted S or, if a note says so, at the nearest one measured.
      horizon_run: without lag at a high learning rate.
      ess: mean effective share of the probe's rollouts in (0, 1], None where it was not measured.
      notes: what a reader of the plan must know about it, one sentence each.
    """

    source: str
    anchors: tuple[planner.Anchor, ...] = ()
    probe: planner.Probe | None = None
    horizon_run: planner.HorizonRun | None = None
    ess: float | None = None
    notes: tuple[str, ...] = ()


def plan_of(evidence: Evidence, *, max_staleness: int, horizon: int, **options) -> planner.Plan:
    """`planner.make_plan` of this evidence, with its notes behind the planner's own.

    A lone anchor is left out, with a note, where the probe allows an order of magnitude without.

    Args:
      evidence: of `evidence_of_sweep` or `plan_log.evidence_of_log`.
      max_staleness, horizon: S and T wanted, updates.
      **options: `learning_rate`, `confidence`, `extrapolate` of `planner.make_plan`.

    Raises:
      ValueError: as `planner.make_plan`.
    """
    anchors, notes = evidence.anchors, evidence.notes
    if len(anchors) == 1 and evidence.probe is not None and evidence.probe.total_variation:
        notes += (f"the anchor at S = {anchors[0].max_staleness} alone places no boundary under lag and is not used",)
        anchors = ()
    plan = planner.make_plan(
        max_staleness=max_staleness,
        horizon=horizon,
        probe=evidence.probe,
        anchors=anchors,
        horizon_run=evidence.horizon_run,
        **options,
    )
    return dataclasses.replace(plan, notes=plan.notes + notes)


def anchor_of_boundary(
    record: Mapping[str, Any], max_staleness: int, level: float = 0.8, confidence: float = 0.9
) -> planner.Anchor:
    """The anchor of a `sweep_summary.boundary_record` at S; `level` and `confidence` are the record's."""
    rate = record[f"eta_{100 * level:g}"]
    return planner.Anchor(
        max_staleness=max_staleness,
        horizon=int(record["horizon"]),
        status=record["status"],
        learning_rate=max(record["learning_rates"]) if record["status"] == "censored" else rate,
        interval=None if record["interval"] is None else tuple(record["interval"]),
        confidence=confidence,
        num_seeds=record["num_seeds"],
    )


def probe_of_cell(cell: Mapping[str, Any], others: Iterable[Mapping[str, Any]] = ()) -> planner.Probe:
    """The probe of a cell of `sweep_summary.groups`: means over seeds, and √KL at the S of `others`, cells at the same η."""
    msd = np.mean(cell["msd"], axis=0)
    policy_drift = {
        int(one["max_staleness"]): math.sqrt(max(_window_mean(one, "off_policy/kl"), 0.0)) for one in (cell, *others)
    }
    total_variation = _window_mean(cell, "off_policy/tv")
    return planner.Probe(
        max_staleness=int(cell["max_staleness"]),
        learning_rate=cell["learning_rate"],
        drift={int(lag): float(np.sqrt(value)) for lag, value in zip(cell["msd_lags"], msd, strict=True)},
        policy_drift={lag: value for lag, value in policy_drift.items() if lag and value > 0},
        total_variation=min(total_variation, 1.0) if total_variation > 0 else None,
    )


def _window_mean(cell: Mapping[str, Any], name: str) -> float:
    """Over seeds and windows; 0 where it is not finite, which is no measurement."""
    mean = float(np.mean(cell["windows"][name]))
    return mean if math.isfinite(mean) else 0.0


def horizon_run_of_cell(cell: Mapping[str, Any], rule: CollapseRule) -> planner.HorizonRun:
    """The horizon run of a cell at S = 0: the median collapse step where most seeds collapsed, else None."""
    steps = [run.collapse_step for run in sweep_summary.fates(cell, rule)]
    collapsed = [step for step in steps if step is not None]
    return planner.HorizonRun(
        learning_rate=cell["learning_rate"],
        num_updates=int(cell["steps"][-1]),
        collapse_step=float(np.median(collapsed)) if 2 * len(collapsed) > len(steps) else None,
    )


def anchor_staleness(available: Iterable[int], max_staleness: int) -> int | None:
    """The measured S > 0 next to the wanted one by ratio, the larger of two; None where there is none."""
    stale = [lag for lag in available if lag > 0]
    return min(stale, key=lambda lag: (abs(math.log(lag / max(max_staleness, 1))), -lag), default=None)


def probe_rate(anchors: Iterable[planner.Anchor]) -> float | None:
    """η of a probe, half of the smaller anchor in three digits; None where an anchor is no number."""
    rates = [anchor.learning_rate if anchor.status in ("found", "censored") else None for anchor in anchors]
    return None if not rates or None in rates else float(f"{min(rates) / 2:.3g}")


def checked_horizon_run(
    run: planner.HorizonRun | None, fresh: planner.Anchor | None
) -> tuple[planner.HorizonRun | None, tuple[str, ...]]:
    """(run, notes); no run where the anchor at S = 0 shows that it was not the horizon that ended it.

    If η·t_c were constant, the anchor's runs of T_a updates would end at η = η_hi·t_c/T_a. Where they hold at twice that, the
    high learning rate itself ended the run, as it does wherever the reward cannot be hacked.
    """
    if run is None or run.collapse_step is None or fresh is None or fresh.learning_rate is None:
        return run, ()
    allowed = run.learning_rate * run.collapse_step / fresh.horizon
    if allowed >= _REFUTED * fresh.learning_rate:
        return run, ()
    note = (
        f"the horizon run fell at eta*t = {run.learning_rate * run.collapse_step:.2g}, which would end {fresh.horizon} updates "
        f"at eta = {allowed:.2g}, but they held up to {fresh.learning_rate:.2g}: its learning rate ended it, not the horizon, "
        "so there is no horizon limit"
    )
    return None, (note,)


def evidence_of_sweep(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    *,
    case: str,
    algorithm: str,
    max_staleness: int,
    source: str = "",
    probe_case: str = "",
    horizon_case: str = "",
) -> Evidence:
    """Anchors at S = 0 and the measured S next to the wanted one, a probe, and a horizon run, from records of sweeps.

    Args:
      rows: of metrics.jsonl.
      config: of the sweep: `rule`, `level`, `confidence`.
      case, algorithm: whose learning rate is planned; its first schedule counts.
      max_staleness: S wanted, updates.
      source: what the report calls it.
      probe_case, horizon_case: cases of their own with the same algorithm; without a probe the drift is that of the anchors'
        runs at the nearest S.

    Raises:
      ValueError: there is no record of the case and algorithm.
    """
    groups = sweep_summary.groups(rows)
    mine = [key for key in groups if key[:2] == (case, algorithm)]
    if not mine:
        there = ", ".join(sorted({f"{name}/{loss}" for name, loss, *_ in groups})) or "none"
        raise ValueError(f"{source or 'the sweep'} has no records of {case}/{algorithm}; there are {there}")
    cells = {key[3]: groups[key] for key in mine if key[2] == mine[0][2]}
    rule = CollapseRule(**config["rule"])
    lags = [lag for lag in (0, anchor_staleness(cells, max_staleness)) if lag in cells]
    options = dict(levels=(config["level"], 0.5), confidence=config["confidence"])
    anchors = tuple(
        anchor_of_boundary(
            sweep_summary.boundary_record(cells[lag], rule, **options), lag, config["level"], config["confidence"]
        )
        for lag in lags
    )
    probes = {key[3]: groups[key] for key in groups if key[:2] == (probe_case, algorithm)}
    cells_of = {lag: cells.get(lag, []) + probes.get(lag, []) for lag in {*cells, *probes}}
    chosen, notes = _probe_cell(cells | probes, max_staleness, probe_rate(anchors))
    horizon_run, refuted = None, ()
    if (horizon_case, algorithm) in {key[:2] for key in groups}:
        (found,) = (groups[key][0] for key in groups if key[:2] == (horizon_case, algorithm))
        horizon_run, refuted = checked_horizon_run(horizon_run_of_cell(found, rule), anchors[0] if lags[0] == 0 else None)
    return Evidence(
        source=source,
        anchors=anchors,
        probe=probe_of_cell(chosen, _beside(chosen, cells_of)),
        horizon_run=horizon_run,
        ess=float(np.mean(chosen["windows"]["off_policy/ess_ratio"])),
        notes=notes + refuted,
    )


def _beside(cell, cells_of: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The cells at other S with the learning rate of this one; where there are several, the one of as many updates."""
    found = []
    for lag, there in cells_of.items():
        alike = [
            one for one in there if one["learning_rate"] == cell["learning_rate"] and lag not in (0, cell["max_staleness"])
        ]
        found += sorted(alike, key=lambda one: abs(one["steps"][-1] - cell["steps"][-1]))[:1]
    return found


def _probe_cell(cells, max_staleness, rate) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The cell at the wanted S, or else at the nearest, with the largest η up to `rate`; and a note on another S."""
    lag, notes = max_staleness, ()
    if lag not in cells:
        lag = anchor_staleness(cells, max_staleness) or 0
        notes = (f"no probe at S = {max_staleness}: its drift is continued from runs at S = {lag}",)
    low = [cell for cell in cells[lag] if rate is not None and cell["learning_rate"] <= rate * (1 + 1e-9)]
    return (low[-1] if low else cells[lag][0]), notes
