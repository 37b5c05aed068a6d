"""Evidence for a plan from a log of any system: a CSV or JSON file, a row for each recorded update; docs/plan.md has the table.

The workdir of a training run is a log of one run (`plan_training`).
Runs at S = 0 and at one larger S, over a few learning rates each, are anchors; the run at the wanted S is the probe.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_async_grpo.option_checks import as_fraction, as_positive
from jax_async_grpo.plan_evidence import Evidence, anchor_staleness, checked_horizon_run, probe_rate
from jax_async_grpo.plan_training import read_training, training_notes
from jax_async_grpo.planner import LARGEST, Anchor, HorizonRun, Probe
from jax_async_grpo.scaling import OUTCOMES, CollapseRule, classify_run, stable_learning_rate

__all__ = ["COLUMNS", "REQUIRED", "ROLES", "LoggedRun", "evidence_of_log", "read_log"]

REQUIRED = ("run", "max_staleness", "learning_rate", "step")
_MEASURED = ("reward", "update_norm", "clip_fraction", "staleness", "ess", "drift", "kl", "tv")
COLUMNS = (*REQUIRED, *_MEASURED, "outcome", "role")
ROLES = ("anchor", "probe", "horizon")
_LEVELS = (0.8, 0.5)
_LONG = 0.5  # of the longest run at the same S: shorter runs are probes, which say nothing about success at the horizon
_JSON_WORDS = {
    dict: "an object",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_OTHER_MARKS = {";": "semicolons", "\t": "tabs"}
_HUGE = 1e50  # learning rates, norms and rewards beyond it are as good as infinite: their ratios' squares must stay finite
_LONGEST_LAG = 10**6  # updates
_MIN_RATES = 2  # learning rates of an anchor


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """The rows of one run, ascending in step.

    Attributes:
      name: of the column `run`.
      max_staleness: S, updates.
      learning_rate: η, the largest of its rows.
      rates: [M] η of each row.
      steps: [M] learner updates, strictly increasing.
      columns: {measured column: [M]}, NaN where a cell is empty; staleness is S there.
      outcome: the stated word, "" where there is none.
      role: the stated word, "" where there is none.
    """

    name: str
    max_staleness: int
    learning_rate: float
    rates: np.ndarray
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    outcome: str
    role: str


def read_log(*paths: str | os.PathLike) -> tuple[list[LoggedRun], tuple[str, ...]]:
    """The runs of a log, and notes about what in it was not read.

    Args:
      *paths: files and workdirs of `launch.train`, which together are the log. A file is .json (a list of objects), .jsonl (an
        object a line) or, with any other ending, CSV with a header. A workdir is a run, named after its folder, or by its path
        where two folders have the same name.

    Raises:
      ValueError: a file cannot be read, holds no rows or lacks a column; a folder is no training run's; a cell that is not what
        its column allows; a run whose S, outcome or role changes or whose step repeats. One line, with file and line.
    """
    places = [Path(path) for path in paths]
    names = [path.resolve().name for path in places if path.is_dir()]
    configs: dict[str, Any] = {}
    runs: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    others: set[str] = set()
    for path in places:
        if path.is_dir():
            name = path.resolve().name
            name = name if names.count(name) == 1 else str(path)
            rows, configs[name] = read_training(path, name)
        else:
            rows = _file_rows(path)
            others |= {str(name) for _, row in rows for name in row} - set(COLUMNS)
        for where, row in rows:
            checked = _checked_row(where, row)
            runs[checked["run"]].append((where, checked))
    notes = (f"columns of the log that were not read: {', '.join(sorted(others))}",) if others else ()
    return [_run(name, rows) for name, rows in runs.items()], notes + training_notes(configs)


def evidence_of_log(
    runs: Sequence[LoggedRun],
    *,
    max_staleness: int,
    ceiling: float | None = None,
    clip_level: float = 0.05,
    confidence: float = 0.9,
    rule: CollapseRule | None = None,
    source: str = "log",
    notes: tuple[str, ...] = (),
) -> Evidence:
    """Anchors, probe and horizon run of the runs of a log.

    A run fails or succeeds as its `outcome` says, else as its rewards do (`scaling.classify_run`, with the mean first reward of
    all runs as r_0). Runs shorter than half the longest at their S count only if they fell, became non-finite or say how they
    ended. T of an anchor is the shortest run that succeeded.

    Drift is √E[drift²] by realised staleness, and √E[update_norm²] at lag 1, both per learning rate. Where no drift is logged,
    update_norm·staleness stands for it: its upper, ballistic bound. R_batch is the smallest drift of a row whose clip_fraction
    reaches `clip_level`; inf if none does.

    Args:
      runs: of `read_log`.
      max_staleness: S wanted, updates.
      ceiling: the highest reward that can be reached; needed where a run does not say how it ended.
      clip_level: in (0, 1].
      confidence: of the anchors' intervals, in (0, 1).
      rule: what counts as success; default `CollapseRule()`.
      source: what the report calls it.
      notes: of `read_log`.

    Raises:
      ValueError: an outcome must be judged and `ceiling` or the rewards are missing; there are neither two anchors nor a
        probe; an option out of range.
    """
    clip_level = as_fraction("clip_level", clip_level, closed=True)
    ceiling = None if ceiling is None else as_positive("ceiling", ceiling)
    start, rule = _start_reward(runs), rule or CollapseRule()
    judged = [run for run in runs if run.role in ("", "anchor")]
    by_lag = {lag: [run for run in judged if run.max_staleness == lag] for lag in {run.max_staleness for run in judged}}
    found = {lag: _anchor(lag, mine, start, ceiling, rule, confidence) for lag, mine in by_lag.items()}
    found = {lag: anchor for lag, anchor in found.items() if anchor is not None}
    anchors = tuple(found[lag] for lag in (0, anchor_staleness(found, max_staleness)) if lag in found)
    horizon_run = _horizon_run([run for run in runs if run.role == "horizon"], start, ceiling, rule)
    horizon_run, refuted = checked_horizon_run(horizon_run, found.get(0))
    probe, ess, said = _probe(runs, max_staleness, probe_rate(anchors), clip_level)
    if probe is None and len(anchors) < 2:
        raise ValueError(
            f"{source}: there is nothing to plan from; give reward or outcome of runs at two learning rates or more, at S = 0 "
            "and at a larger S, or update_norm and tv of a run"
        )
    if any(len(set(run.rates)) > 1 for run in runs):
        said += ("learning rates change within runs: the largest of a run counts as its own",)
    return Evidence(source, anchors, probe, horizon_run, ess, said + refuted + notes)


def _file_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--log={path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    rows = _json_rows(path, text) if path.suffix.lower() in (".json", ".jsonl") else _csv_rows(path, text)
    if not rows:
        raise ValueError(f"{path} holds no rows; docs/plan.md shows what a log looks like")
    _check_columns(path, {name for _, row in rows for name in row})
    return rows


def _check_columns(path: Path, names: set[str]) -> None:
    lacking = [name for name in REQUIRED if name not in names]
    if not lacking:
        return
    alike = next((name for name in names if str(name).strip().lower() == lacking[0]), None)
    mark = next((mark for mark in _OTHER_MARKS if any(mark in str(name) for name in names)), None)
    said = f"; {alike!r} is there: names are in lower case" if alike is not None else ""
    said = f"; the header seems to be separated by {_OTHER_MARKS[mark]}, it must be commas" if mark is not None else said
    raise ValueError(
        f"{path}: column {lacking[0]} is missing{said}; needed are {', '.join(REQUIRED)}, known {', '.join(COLUMNS)}"
    )


def _csv_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of every line that is not empty."""
    reader, rows = csv.DictReader(io.StringIO(text), skipinitialspace=True), []
    if text.strip():
        names = [name.strip() for name in reader.fieldnames]
        _check_columns(path, set(names))
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: column {twice} stands twice in the header; the row can say only one of them")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(f"{where} has another number of cells than the header has names ({len(reader.fieldnames)})")
        rows.append((where, {(name or "").strip(): (cell or "").strip() for name, cell in row.items()}))
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    if path.suffix.lower() == ".jsonl":
        parts = [(f"{path}:{number}", line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        rows = [(where, _parsed(where, line)) for where, line in parts]
    elif text.strip():
        found = _parsed(str(path), text)
        if not isinstance(found, list):
            raise ValueError(f"{path} holds {_JSON_WORDS[type(found)]}; it must be a list of objects, one a row")
        rows = [(f"{path}: entry {number}", row) for number, row in enumerate(found, start=1)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object")
    return rows


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _checked_row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with numbers for its cells, NaN for empty ones; ValueError on a cell that its column does not allow."""
    allowed = {
        "max_staleness": (lambda x: 0 <= x <= _LONGEST_LAG and x == round(x), f"an integer >= 0, at most {_LONGEST_LAG:g}"),
        "step": (lambda x: 0 <= x <= LARGEST and x == round(x), f"an integer >= 0, at most {LARGEST:g}"),
        "learning_rate": (lambda x: 1 / _HUGE < x < _HUGE, "a number > 0 and finite"),
        "staleness": (lambda x: 0 <= x <= _LONGEST_LAG and x == round(x), f"an integer >= 0, at most {_LONGEST_LAG:g}"),
        "ess": (lambda x: 0 < x <= 1, "a share in (0, 1]"),
        "clip_fraction": (lambda x: 0 <= x <= 1, "a share in [0, 1]"),
        "tv": (lambda x: 0 <= x <= 1, "a total variation in [0, 1]"),
        "reward": (lambda x: not x < 0, "a number >= 0 (shift rewards that can be negative)"),
    }
    checked: dict[str, Any] = {"run": str(_cell(row, "run")).strip()}
    if not checked["run"]:
        raise ValueError(f"{where}: run is empty; it must name the run")
    for name in (*REQUIRED[1:], *_MEASURED):
        cell, (is_allowed, words) = _cell(row, name), allowed.get(name, (lambda x: x >= 0, "a number >= 0"))
        number = _number(cell)
        # a run that became non-finite logs that in every column, and before it numbers whose squares are not finite
        unknown = cell == "" if name in (*REQUIRED, "reward") else cell == "" or number is not None and not abs(number) < _HUGE
        if name in REQUIRED and unknown:
            raise ValueError(f"{where}: {name} is empty; it must be {words}")
        if not unknown and (number is None or not is_allowed(number)):
            raise ValueError(f"{where}: {name}={cell!r:.60} must be {words}")
        checked[name] = math.nan if unknown else number
        if name == "reward" and not unknown and not abs(number) < _HUGE:
            checked[name] = math.inf  # told from an empty cell
    for name, words in (("outcome", OUTCOMES), ("role", ROLES)):
        checked[name] = str(_cell(row, name)).strip().lower()
        if checked[name] not in ("", *words):
            raise ValueError(f"{where}: {name}={checked[name]!r} must be empty or one of {', '.join(words)}")
    return checked


def _cell(row, name: str) -> Any:
    cell = row.get(name)
    return "" if cell is None else cell


def _number(cell: Any) -> float | None:
    """Of a number or of text; Python's underscores are none in a log."""
    try:
        return None if isinstance(cell, bool) or "_" in str(cell) else float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _run(name: str, rows: list[tuple[str, dict[str, Any]]]) -> LoggedRun:
    stated = {}
    for key in ("max_staleness", "outcome", "role"):
        values = [(where, row[key]) for where, row in rows if row[key] != ""]
        stated[key] = values[0][1] if values else ""
        other = next((pair for pair in values if pair[1] != stated[key]), None)
        if other is not None:
            raise ValueError(f"{other[0]}: {key}={other[1]} of run {name}, which had {stated[key]} before; a run has one")
    rows = sorted(rows, key=lambda pair: pair[1]["step"])
    twice = next((b for a, b in zip(rows, rows[1:], strict=False) if a[1]["step"] == b[1]["step"]), None)
    if twice is not None:
        raise ValueError(f"{twice[0]}: step {twice[1]['step']:g} of run {name} stands there twice")
    if rows[-1][1]["step"] < 1:
        raise ValueError(f"{rows[-1][0]}: run {name} has no row after step 0")
    columns = {key: np.array([row[key] for _, row in rows]) for key in _MEASURED}
    columns["staleness"] = np.where(np.isnan(columns["staleness"]), stated["max_staleness"], columns["staleness"])
    rates = np.array([row["learning_rate"] for _, row in rows])
    steps = np.array([row["step"] for _, row in rows])
    S, words = int(stated["max_staleness"]), (stated["outcome"], stated["role"])
    return LoggedRun(name, S, float(f"{rates.max():.6g}"), rates, steps, columns, *words)


def _start_reward(runs: Iterable[LoggedRun]) -> float | None:
    """Mean first reward of all runs; None where no reward is logged."""
    rewards = [run.columns["reward"][~np.isnan(run.columns["reward"])] for run in runs]
    first = [values[0] for values in rewards if len(values) and np.isfinite(values[0])]
    return float(np.mean(first)) if first else None


def _has_rewards(run: LoggedRun) -> bool:
    return not np.isnan(run.columns["reward"]).all()


def _fate(run: LoggedRun, start, ceiling, rule) -> tuple[str, float | None]:
    """(outcome, collapse step) of a run, as stated or as its rewards say."""
    if run.outcome and (ceiling is None or not _has_rewards(run)):
        return run.outcome, float(run.steps[-1]) if run.outcome == "fall" else None
    if ceiling is None or not _has_rewards(run):
        lacking = "--ceiling, the highest reward there can be, is not given" if _has_rewards(run) else "it logs no reward"
        raise ValueError(f"run {run.name} states no outcome and cannot be judged by its rewards: {lacking}")
    known = ~np.isnan(run.columns["reward"])
    steps, reward = run.steps[known], run.columns["reward"][known]
    try:
        judged = classify_run(steps, reward, start_reward=start, ceiling=ceiling, rule=rule)
    except ValueError as error:
        raise ValueError(f"run {run.name} cannot be judged by its rewards: {error}") from None
    return run.outcome or judged.outcome, judged.collapse_step


def _anchor(max_staleness, runs, start, ceiling, rule, confidence) -> Anchor | None:
    """None where fewer than two learning rates have a run that says how it ends."""
    runs = [run for run in runs if run.outcome or run.role == "anchor" or _has_rewards(run)]
    if len({run.learning_rate for run in runs}) < _MIN_RATES:
        return None
    longest = max(run.steps[-1] for run in runs)
    counted = []
    for run in runs:
        outcome, _ = _fate(run, start, ceiling, rule)
        is_long = run.role == "anchor" or run.steps[-1] >= _LONG * longest
        if is_long or run.outcome or outcome in ("fall", "non-finite"):
            counted.append((run, outcome == "success"))
    rates = sorted({run.learning_rate for run, _ in counted})
    if len(rates) < _MIN_RATES:
        return None  # the others are short
    fates = [[success for run, success in counted if run.learning_rate == rate] for rate in rates]
    trials = [len(group) for group in fates]
    boundary = stable_learning_rate(rates, [sum(group) for group in fates], trials, levels=_LEVELS, confidence=confidence)
    lasted = [run.steps[-1] for run, success in counted if success]
    return Anchor(
        max_staleness=max_staleness,
        horizon=int(min(lasted, default=longest)),
        status=boundary.status,
        learning_rate=rates[-1] if boundary.status == "censored" else boundary.eta_80,
        interval=boundary.intervals[0],
        confidence=confidence,
        num_seeds=min(trials),
    )


def _horizon_run(runs: Sequence[LoggedRun], start, ceiling, rule) -> HorizonRun | None:
    """Of the runs with that role: at their largest η, the median collapse step where most fell."""
    if not runs:
        return None
    lagged = next((run for run in runs if run.max_staleness), None)
    if lagged is not None:
        raise ValueError(f"run {lagged.name} has role horizon and max_staleness={lagged.max_staleness}; it must be 0")
    rate = max(run.learning_rate for run in runs)
    mine = [run for run in runs if run.learning_rate == rate]
    steps = [_fate(run, start, ceiling, rule)[1] for run in mine]
    fallen = [step for step in steps if step is not None]
    last = int(max(run.steps[-1] for run in mine))
    return HorizonRun(rate, last, float(np.median(fallen)) if 2 * len(fallen) > len(steps) else None)


def _probe(runs, max_staleness, rate, clip_level) -> tuple[Probe | None, float | None, tuple[str, ...]]:
    """(probe, its mean ESS, notes): at the wanted S or the nearest, at the largest η up to `rate`, else at the smallest."""
    usable = [run for run in runs if run.role != "horizon" and 1 in _drift(run)]
    if not usable:
        return None, None, ("no update_norm is logged, nor drift at staleness 1: G_upd and the drift are not known",)
    lags, notes = {run.max_staleness for run in usable}, ()
    lag = max_staleness
    if lag not in lags:
        lag = anchor_staleness(lags, max_staleness) or 0
        notes += (f"no update norms at S = {max_staleness}: the drift is continued from runs at S = {lag}",)
    usable = [run for run in usable if run.max_staleness == lag]
    low = [run.learning_rate for run in usable if rate is not None and run.learning_rate <= rate * (1 + 1e-9)]
    chosen = max(low) if low else min(run.learning_rate for run in usable)
    mine = [run for run in usable if run.learning_rate == chosen]
    values: dict[int, list[float]] = defaultdict(list)
    for run in mine:
        for at, drift in _drift(run).items():
            values[at].append(drift**2)
    drift = {at: chosen * math.sqrt(np.mean(squares)) for at, squares in sorted(values.items())}
    if lag > 0 and set(drift) == {1} and max_staleness > 1:
        notes += (
            "no drift is logged: update_norm * staleness stands for it, the most it can be (every update in one direction)",
        )
    tv, ess = (_mean([run.columns[name] for run in mine]) for name in ("tv", "ess"))
    radius, is_bound = _clip_radius(runs, clip_level)
    if is_bound:
        notes += ("the operational R_batch takes update_norm * staleness for the drift: it may lie too high",)
    of_policy = _policy_drift(runs, chosen, rate)
    return Probe(lag, chosen, drift, of_policy, min(tv, 1.0) if tv else None, radius), ess, notes


def _policy_drift(runs: Sequence[LoggedRun], learning_rate: float, rate: float | None) -> dict[int, float]:
    """{S: √KL at the probe's η}: of rows with the full lag, of the runs with the largest η up to `rate`, in proportion to η."""
    measured: dict[tuple[int, float], list[np.ndarray]] = defaultdict(list)
    for run in runs:
        kl = run.columns["kl"][(run.columns["kl"] > 0) & (run.columns["staleness"] == run.max_staleness)]
        if run.max_staleness and run.role != "horizon" and len(kl):
            measured[run.max_staleness, run.learning_rate].append(kl)
    allowed = max(rate or 0, learning_rate) * (1 + 1e-9)
    return {lag: math.sqrt(_mean(kl)) * learning_rate / eta for (lag, eta), kl in sorted(measured.items()) if eta <= allowed}


def _drift(run: LoggedRun) -> dict[int, float]:
    """{lag: √E[drift²]/η} of a run over the rows that say so."""
    at, drift, norm = (run.columns[name] for name in ("staleness", "drift", "update_norm"))
    found = {}
    for lag in {int(x) for x in at[drift > 0] if x > 0}:
        rows = (at == lag) & (drift > 0)
        found[lag] = math.sqrt(np.mean((drift[rows] / run.rates[rows]) ** 2))
    if (norm > 0).any():
        found[1] = math.sqrt(np.mean((norm[norm > 0] / run.rates[norm > 0]) ** 2))
    return found


def _mean(columns: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate(columns)
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _clip_radius(runs: Sequence[LoggedRun], level: float) -> tuple[float | None, bool]:
    """(smallest drift of a row whose clipped fraction reaches the level, whether it is the ballistic bound)."""
    points = []
    for run in runs:
        columns = run.columns
        bound = columns["update_norm"] * columns["staleness"]
        is_bound = np.isnan(columns["drift"])
        drift = np.where(is_bound, bound, columns["drift"])
        known = np.isfinite(columns["clip_fraction"]) & (drift > 0)
        points += list(zip(drift[known], columns["clip_fraction"][known], is_bound[known], strict=True))
    reached = [(float(drift), bool(is_bound)) for drift, fraction, is_bound in points if fraction >= level]
    return min(reached, default=(math.inf if points else None, False))
