"""What a sweep says: the fate of every run, and the learning rate up to which runs hold, recomputed from its records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo.scaling import OUTCOMES, Boundary, CollapseRule, RunOutcome, classify_runs, stable_learning_rate

FIGURES = ("sweep.png", "sweep.svg")

__all__ = ["FIGURES", "boundary_record", "fates", "groups", "summary", "table"]


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, int], list[dict[str, Any]]]:
    """The cells of a sweep by (case, algorithm, schedule, S), ascending in η.

    Every cell carries `start_reward`, `ceiling` and `judged` [n, M], the reward a run is judged by: gold, where there is one.
    """
    starts = {row["case"]: row for row in rows if row["kind"] == "start"}
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] != "cell":
            continue
        start, prefix = starts[row["case"]], "gold_" if "gold_reward" in row else ""
        start_reward = float(f"{start[f'{prefix}reward']:.4g}")  # as the rewards are recorded
        judged = {"judged": np.array(row[f"{prefix}reward"], np.float64), "start_reward": start_reward}
        key = (row["case"], row["algorithm"], row["schedule"], row["max_staleness"])
        found.setdefault(key, []).append(dict(row) | judged | {"ceiling": start[f"{prefix}ceiling"]})
    return {key: sorted(cells, key=lambda cell: cell["learning_rate"]) for key, cells in found.items()}


def fates(cell: Mapping[str, Any], rule: CollapseRule, horizon: float | None = None) -> list[RunOutcome]:
    """What became of every seed of a cell of `groups` by the horizon."""
    return classify_runs(
        cell["steps"], cell["judged"], start_reward=cell["start_reward"], ceiling=cell["ceiling"], horizon=horizon, rule=rule
    )


def boundary_record(
    cells: Sequence[Mapping[str, Any]],
    rule: CollapseRule,
    *,
    levels: tuple[float, ...] = (0.8, 0.5),
    confidence: float = 0.9,
    horizon: float | None = None,
) -> dict[str, Any]:
    """The boundary of one (case, algorithm, schedule, S) at a horizon, and how its runs ended.

    Returns:
      A record: `status`, `eta_80`, `eta_50` (of the levels asked for), `interval` of the first, `width`, `reason`,
      `learning_rates`, `shares` of success, and `outcomes`, the number of runs of every kind for every learning rate.
    """
    found = [fates(cell, rule, horizon) for cell in cells]
    rates = [cell["learning_rate"] for cell in cells]
    successes = np.array([[run.outcome == "success" for run in runs] for runs in found])
    boundary = _boundary(rates, successes, levels, confidence)
    counts = [Counter(run.outcome for run in runs) for runs in found]
    return {
        "horizon": float(horizon if horizon is not None else cells[0]["steps"][-1]),
        "num_seeds": successes.shape[1],
        "status": boundary.status,
        **{f"eta_{100 * level:g}": rate for level, rate in zip(boundary.levels, boundary.learning_rates, strict=True)},
        "interval": boundary.intervals[0],
        "estimate": boundary.estimate,
        "width": boundary.width,
        "separated": boundary.separated,
        "reason": boundary.reason,
        "learning_rates": rates,
        "shares": successes.mean(axis=1).tolist(),
        "outcomes": [{kind: count[kind] for kind in OUTCOMES if count[kind]} for count in counts],
    }


def summary(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Every boundary of a sweep, at the whole horizon and, if it can be told, at half of it; of what is recorded so far."""
    rule, boundaries = CollapseRule(**config["rule"]), []
    for (case, algorithm, schedule, max_staleness), cells in groups(rows).items():
        labels = dict(case=case, algorithm=algorithm, schedule=schedule, max_staleness=max_staleness)
        options = dict(levels=(config["level"], 0.5), confidence=config["confidence"])
        for horizon in _horizons(cells[0]["steps"], rule):
            boundaries.append(labels | boundary_record(cells, rule, horizon=horizon, **options))
    num_runs = sum(len(row["seeds"]) for row in rows if row["kind"] == "cell")
    return {"boundaries": boundaries, "num_runs": num_runs, "versions": dict(versions)}


def table(result: Mapping[str, Any]) -> str:
    """The boundaries as text for a terminal."""
    lines = [f"{'case':<14}{'algorithm':<14}{'S':>4}{'T':>7}  {'eta_80':<10}{'interval':<20}{'width':<7}failures at higher eta"]
    for line in result["boundaries"]:
        key = next(name for name in line if name.startswith("eta_"))
        found = line["status"] == "found"
        number = f"{line[key]:.3g}" if found else line["status"]
        interval = "[{:.3g}, {:.3g}]".format(*line["interval"]) if found else ""
        width = f"{line['width']:.2f}" if found else ""
        lines.append(
            f"{line['case']:<14}{line['algorithm']:<14}{line['max_staleness']:>4}{line['horizon']:>7g}  {number:<10}"
            f"{interval:<20}{width:<7}{_failures(line)}"
        )
    return "\n".join(lines)


def _horizons(steps: Sequence[int], rule: CollapseRule) -> list[float]:
    """The horizon of the runs, and half of it where a reward was measured near its end."""
    half = steps[-1] / 2
    return [steps[-1], half] if any((1 - rule.end_window) * half < step <= half for step in steps) else [steps[-1]]


def _boundary(rates, successes, levels, confidence) -> Boundary:
    if successes.shape[1] > 1:
        return stable_learning_rate(rates, successes, levels=levels, confidence=confidence)
    return stable_learning_rate(
        rates, successes[:, 0].astype(int), np.ones(len(rates), int), levels=levels, confidence=confidence
    )


def _failures(line: Mapping[str, Any]) -> str:
    """Kinds of failure from the best learning rate on, most frequent first."""
    best = int(np.argmax(line["shares"]))
    total = sum((Counter(kinds) for kinds in line["outcomes"][best:]), Counter())
    return ", ".join(f"{kind} {count}" for kind, count in total.most_common() if kind != "success") or "none"
