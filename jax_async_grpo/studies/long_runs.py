"""Runs many times longer just under the boundary, at new seeds: does success hold, or does η_max fall with the horizon?

If η_max ∝ 1/T, as where cumulative drift T·η is what ends a run (arXiv 2607.01083; equation (7) of the README), a learning rate
just under the boundary at T lies far above that at 10·T, and the runs must fail. The boundaries are those of another study, a
sweep, whose records `config.sources` names: the learning rates, hence the pieces, follow from them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats

from jax_async_grpo import sweep_run, sweep_summary
from jax_async_grpo.config_checks import check_distinct, check_integer, check_keys, check_number
from jax_async_grpo.records import Workdir
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies.collapse_statistics import proportion_interval
from jax_async_grpo.studies.contract import read_sources
from jax_async_grpo.studies.long_runs_page import figures, page
from jax_async_grpo.studies.swept import validate_sweep

__all__ = [
    "expected_share",
    "figures",
    "long_sweep",
    "page",
    "pieces",
    "plan",
    "run",
    "steepest_exponent",
    "summary",
    "survival",
    "validate",
]

_KEYS = (
    "study",
    "sources",
    "precision",
    "case",
    "algorithms",
    "max_staleness",
    "shares",
    "factors",
    "num_measurements",
    "num_windows",
    "first_seed",
    "num_seeds",
    "max_run_updates",
    "sweep",
)
_EDGE_TOLERANCE = 1e-9  # relative; 0.8·η belongs to the rates at or below 0.8·η

Row = Mapping[str, Any]


def validate(config: Mapping[str, Any]) -> None:
    """ValueError, one line, on what cannot be run; the records of the source are not looked at."""
    check_keys(config, _KEYS, "")
    validate_sweep(config)
    if len(config["sources"]) != 1:
        raise ValueError(f"config.sources is {tuple(config['sources'])}; it must name one folder, of a sweep")
    if config["case"] not in config["sweep"]["cases"]:
        raise ValueError(f"config.case is {config['case']!r}; it must be one of {tuple(config['sweep']['cases'])}")
    part = config["sweep"]["cases"][config["case"]]
    for key, allowed in (("algorithms", tuple(part["algorithms"])), ("max_staleness", tuple(part["max_staleness"]))):
        if not config[key] or not set(config[key]) <= set(allowed):
            raise ValueError(f"config.{key} is {tuple(config[key])}; it must hold some of {allowed}, those of the source")
        check_distinct(config[key], config[key], key)
    for share in config["shares"]:
        check_number(share, "shares", lambda x: 0 < x <= 1, "in (0, 1]")
    factors = tuple(config["factors"])
    for factor in factors:
        check_integer(factor, "factors", minimum=1)
    if len(factors) < 2 or factors[0] != 1 or sorted(set(factors)) != list(factors):
        raise ValueError(f"config.factors is {factors}; it must start with 1 and increase")
    for key, least in (
        ("num_measurements", 2),
        ("num_windows", 1),
        ("first_seed", 0),
        ("num_seeds", 2),
        ("max_run_updates", 1),
    ):
        check_integer(config[key], key, minimum=least)
    old = range(part["first_seed"], part["first_seed"] + part["num_seeds"])
    if set(old) & set(range(config["first_seed"], config["first_seed"] + config["num_seeds"])):
        raise ValueError(
            f"config.first_seed is {config['first_seed']}; seeds {old.start} to {old.stop - 1} placed the boundary"
        )
    if config["num_measurements"] % factors[-1]:
        raise ValueError(
            f"config.num_measurements is {config['num_measurements']}; it must be a multiple of {factors[-1]}, the largest of "
            "config.factors, so that every horizon ends with one"
        )
    num_updates = part["num_updates"] * factors[-1]
    cost = math.prod(len(config[key]) for key in ("algorithms", "max_staleness", "shares")) * config["num_seeds"] * num_updates
    if cost > config["max_run_updates"]:
        raise ValueError(f"config.max_run_updates is {config['max_run_updates']}; the plan may take {cost}")


def plan(config: Mapping[str, Any], source_rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The learning rate of every (loss, S, share of η_80), and the boundary it comes from.

    Args:
      config: validated.
      source_rows: of the sweep's metrics.jsonl.

    Returns:
      [{algorithm, max_staleness, share, status, boundary (η_80 or None), width, learning_rate (None: skipped), reason}]; two
      shares may have the same learning rate, and then the same runs.

    Raises:
      ValueError: the source lacks a loss at an S, or some of its learning rates.
    """
    sweep, groups = config["sweep"], sweep_summary.groups(source_rows)
    rates, entries = sorted(sweep["cases"][config["case"]]["learning_rates"]), []
    for algorithm in config["algorithms"]:
        for lag in config["max_staleness"]:
            cells = next((found for key, found in groups.items() if _is(key, config["case"], algorithm, lag)), [])
            if len(cells) != len(rates):
                raise ValueError(
                    f"config.sources has {config['sources'][0]!r}, with {len(cells)} of {len(rates)} learning rates of "
                    f"{config['case']}/{algorithm} at S = {lag}; run that study to the end"
                )
            levels = (sweep["level"], 0.5)
            record = sweep_summary.boundary_record(
                cells, CollapseRule(**sweep["rule"]), levels=levels, confidence=sweep["confidence"]
            )
            boundary = record[f"eta_{100 * sweep['level']:g}"]
            labels = dict(
                algorithm=algorithm, max_staleness=lag, status=record["status"], boundary=boundary, width=record["width"]
            )
            entries += [labels | {"share": share} | _placed(rates, boundary, share, record) for share in config["shares"]]
    return entries


def _is(key: tuple, case: str, algorithm: str, lag: int) -> bool:
    return (key[0], key[1], key[3]) == (case, algorithm, lag)


def _placed(rates: Sequence[float], boundary: float | None, share: float, record: Row) -> dict[str, Any]:
    """The largest rate at or below share·η_80, or why there is none."""
    if boundary is None:
        return {"learning_rate": None, "reason": f"the boundary is {record['status']}: {record['reason']}"}
    below = [rate for rate in rates if rate <= share * boundary * (1 + _EDGE_TOLERANCE)]
    if not below:
        return {"learning_rate": None, "reason": f"no learning rate of the grid is at or below {share:g} of the boundary"}
    return {"learning_rate": float(below[-1]), "reason": ""}


def long_sweep(config: Mapping[str, Any], entries: Sequence[Row]) -> dict[str, Any]:
    """Config of the sweep of all runs planned: a case for every (S, η), with the losses that need it."""
    part = dict(config["sweep"]["cases"][config["case"]])
    part |= {key: config[key] for key in ("num_measurements", "num_windows", "first_seed", "num_seeds")}
    part["num_updates"] *= config["factors"][-1]
    cases: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["learning_rate"] is None:
            continue
        own = {"max_staleness": (entry["max_staleness"],), "learning_rates": (entry["learning_rate"],), "algorithms": ()}
        case = cases.setdefault(_case_name(entry), part | own)
        if entry["algorithm"] not in case["algorithms"]:
            case["algorithms"] += (entry["algorithm"],)
    return {**config["sweep"], "cases": cases}


def _case_name(entry: Row) -> str:
    return f"S{entry['max_staleness']}_{entry['learning_rate']:g}"


def pieces(config: Mapping[str, Any]) -> list[str]:
    """Names of the chunks; the source's records must be there."""
    return [chunk.name for chunk in sweep_run.chunks(_planned_sweep(config))]


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Runs the chunks that the workdir lacks."""
    sweep_run.run_chunks(_planned_sweep(config), workdir, lambda name, seconds: on_piece(name, seconds) if seconds else None)


def _planned_sweep(config: Mapping[str, Any]) -> dict[str, Any]:
    return long_sweep(config, plan(config, _source_rows(config, read_sources(config))))


def _source_rows(config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> Sequence[Row]:
    return sources[Path(config["sources"][0]).name]


def summary(rows: Sequence[Row], config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Success at every horizon beside what the two laws expect, and when runs collapsed.

    Args:
      rows: of the study's metrics.jsonl; what it lacks is left out.
      config: of the study.
      sources: {name of the source's folder: its rows}.

    Returns:
      A dict of plain numbers, strings and lists.
    """
    entries, groups = plan(config, _source_rows(config, sources)), sweep_summary.groups(rows)
    cells, skipped = [], [entry for entry in entries if entry["learning_rate"] is None]
    for entry in entries:
        if entry["learning_rate"] is not None:
            key = (_case_name(entry), entry["algorithm"], entry["max_staleness"])
            cells += [dict(entry) | _cell(found[0], entry, config) for place, found in groups.items() if _is(place, *key)]
    horizon = config["sweep"]["cases"][config["case"]]["num_updates"]
    distinct = {(cell["algorithm"], cell["max_staleness"], cell["learning_rate"]) for cell in cells}
    return {
        "cells": cells,
        "skipped": skipped,
        "pooled": [_pooled(cells, share) for share in config["shares"]],
        "shares": list(config["shares"]),
        "factors": list(config["factors"]),
        "horizons": [horizon * factor for factor in config["factors"]],
        "num_seeds": config["num_seeds"],
        "first_seed": config["first_seed"],
        "num_run_updates": len(distinct) * config["num_seeds"] * horizon * config["factors"][-1],
        "resolution": horizon * config["factors"][-1] // config["num_measurements"],
        "level": config["sweep"]["level"],
        "confidence": config["sweep"]["confidence"],
        "rule": dict(config["sweep"]["rule"]),
        "case": config["case"],
        "source": Path(config["sources"][0]).name,
    }


def _cell(cell: Row, entry: Row, config: Mapping[str, Any]) -> dict[str, Any]:
    """One (loss, S, share): success at every horizon, and the collapse of each seed under both rules."""
    sweep, factors = config["sweep"], config["factors"]
    rule, confidence = CollapseRule(**sweep["rule"]), sweep["confidence"]
    longest = cell["steps"][-1]
    by_horizon = [sweep_summary.fates(cell, rule, longest * factor / factors[-1]) for factor in factors]
    success = np.array([[run.outcome == "success" for run in runs] for runs in by_horizon])
    last = by_horizon[-1]
    expected = [expected_share(entry, factor, sweep["level"]) for factor in factors]
    intervals = [proportion_interval(count, success.shape[1], confidence) for count in success.sum(axis=1)]
    times = [run.collapse_step for run in last]
    return {
        "ratio": cell["learning_rate"] / entry["boundary"],
        "success": success.sum(axis=1).tolist(),
        "kept": (success & success[0]).sum(axis=1).tolist(),
        "intervals": intervals,
        "expected_same": expected[0],
        "expected_horizon_law": expected,
        "steepest_exponent": steepest_exponent(entry, intervals[-1][0], factors[-1], sweep["level"]),
        "excludes_horizon_law": bool(intervals[-1][0] > expected[-1]),
        "excludes_same": bool(intervals[-1][1] < expected[0]),
        "outcomes": {kind: [run.outcome for run in last].count(kind) for kind in dict.fromkeys(run.outcome for run in last)},
        "collapse_times": times,
        "collapse_times_second_rule": [run.collapse_step_second_rule for run in last],
        "survival": survival(times, longest, confidence),
        "median_end": float(np.median([0.0 if run.end is None else run.end for run in last])),
    }


def expected_share(entry: Row, factor: float, level: float) -> float:
    """Share of success at η if the boundary at `factor` horizons lies at η_80/factor: factor 1 says that it stays.

    The curve is that of `stable_learning_rate`, with the width of the source's boundary.

    Args:
      entry: of `plan`, with a learning rate.
      factor: ≥ 1.
      level: share of success at the boundary.
    """
    slope = 2 * special.logit(0.8) / entry["width"]
    distance = math.log(entry["learning_rate"] * factor / entry["boundary"])
    return float(special.expit(special.logit(level) - slope * distance))


def steepest_exponent(entry: Row, lowest_share: float, factor: float, level: float) -> float | None:
    """b of the steepest η_max ∝ T^b under which success at η after `factor` horizons is at least `lowest_share`.

    Args:
      entry: of `plan`, with a learning rate.
      lowest_share: the low end of the interval of the share that was seen; at 0 nothing is excluded: None.
      factor: > 1.
      level: share of success at the boundary.
    """
    if lowest_share <= 0:
        return None
    slope = 2 * special.logit(0.8) / entry["width"]
    moved = math.log(entry["learning_rate"] / entry["boundary"]) + (special.logit(lowest_share) - special.logit(level)) / slope
    return float(moved / math.log(factor))


def survival(times: Sequence[float | None], horizon: float, confidence: float) -> list[dict[str, Any]]:
    """Kaplan-Meier estimate of the share of runs not collapsed, after each time of collapse.

    Args:
      times: of collapse, updates; None for a run that holds to the horizon, where it is censored.
      horizon: updates.
      confidence: of the log-log intervals; None at a share of 0, where there is none.

    Returns:
      [{step, share, interval}], [] without a collapse.
    """
    fallen = [time for time in times if time is not None]
    if not fallen:
        return []
    estimate = stats.ecdf(stats.CensoredData(uncensored=fallen, right=[horizon] * (len(times) - len(fallen)))).sf
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # at shares of 0 and 1 there is no interval, which is said below
        interval = estimate.confidence_interval(confidence, method="log-log")
    columns = (estimate.quantiles, estimate.probabilities, interval.low.probabilities, interval.high.probabilities)
    return [
        {"step": float(step), "share": float(share), "interval": [float(low), float(high)] if 0 < share < 1 else None}
        for step, share, low, high in zip(*columns, strict=True)
        if step in fallen
    ]


def _pooled(cells: Sequence[Row], share: float) -> dict[str, Any]:
    """Counts over all (loss, S) of a share."""
    mine = [cell for cell in cells if cell["share"] == share]
    return {
        "share": share,
        "num_cells": len(mine),
        "num_runs": sum(len(cell["collapse_times"]) for cell in mine),
        "success": np.sum([cell["success"] for cell in mine], axis=0).tolist() if mine else [],
        "kept": np.sum([cell["kept"] for cell in mine], axis=0).tolist() if mine else [],
        "num_excluding_horizon_law": sum(cell["excludes_horizon_law"] for cell in mine),
        "num_excluding_same": sum(cell["excludes_same"] for cell in mine),
    }
