"""Where training under lag stops working: success over (loss, S, η, seed), with S = 0 beside every cell.

The config holds a whole sweep (`swept`); what its records say is here, with the statistics of `collapse_statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo import sweep_summary
from jax_async_grpo.config_checks import check_integer, check_keys
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies.collapse_page import figures, page
from jax_async_grpo.studies.collapse_statistics import compare_falls, proportion_interval, staleness_exponents
from jax_async_grpo.studies.swept import run_sweep as run
from jax_async_grpo.studies.swept import sweep_pieces as pieces
from jax_async_grpo.studies.swept import validate_sweep

__all__ = ["control_pairs", "figures", "measures", "page", "pieces", "run", "summary", "validate"]

_KEYS = ("study", "sources", "precision", "num_bootstrap", "exponent_min_staleness", "fisher_pair", "sweep")
# The next three were set after the sweep had begun, before its records of the losses they concern: they are not in the config,
# which was fixed by then.
EQUAL_REWARD = 0.02  # |difference of the median end rewards of successful runs| up to which a cell has equal reward
SIGNIFICANCE = 0.05  # of p_seeds, below which the page says that two losses differ
MUST_FALL = "no_is"  # the loss whose boundary was to fall with S

Row = Mapping[str, Any]
Groups = Mapping[tuple[str, str, str, int], list[dict[str, Any]]]


def validate(config: Mapping[str, Any]) -> None:
    """ValueError, one line, on what cannot be run or summarized."""
    check_keys(config, _KEYS, "")
    validate_sweep(config)
    check_integer(config["num_bootstrap"], "num_bootstrap", minimum=100)
    check_integer(config["exponent_min_staleness"], "exponent_min_staleness", minimum=1)
    pair, known = tuple(config["fisher_pair"]), tuple(config["sweep"]["algorithms"])
    if len(set(pair)) != 2 or not set(pair) <= set(known):
        raise ValueError(f"config.fisher_pair is {pair}; it must name two of {known}")
    for name, part in config["sweep"]["cases"].items():
        if len(part["schedules"]) != 1:
            raise ValueError(f"config.sweep.cases.{name}.schedules is {tuple(part['schedules'])}; this study takes one")


def summary(rows: Sequence[Row], config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Boundaries, exponents, comparisons of losses and what was to hold, from the rows alone; of what is recorded so far.

    Args:
      rows: of the study's metrics.jsonl.
      config: of the study.
      sources: unused, the study reads no other.

    Returns:
      A dict of plain numbers, strings and lists.
    """
    del sources
    sweep, groups = config["sweep"], sweep_summary.groups(rows)
    rule, confidence = CollapseRule(**sweep["rule"]), sweep["confidence"]
    losses = [_loss(groups, config, case, algorithm) for case, algorithm in dict.fromkeys(key[:2] for key in groups)]
    pairs = [dict(first=tuple(config["fisher_pair"]), cases=(case, case), is_control=False) for case in sweep["cases"]]
    pairs += [dict(first=pair[:2], cases=pair[2:], is_control=True) for pair in control_pairs(sweep)]
    comparisons = [_comparison(groups, rule, **pair) for pair in pairs]
    counts = sorted({cell["num_seeds"] for loss in losses for cell in loss["cells"]})
    result = {
        "losses": losses,
        "comparisons": [comparison for comparison in comparisons if comparison["cells"]],
        "share_intervals": [
            {"num_seeds": n, "intervals": [proportion_interval(k, n, confidence) for k in range(n + 1)]} for n in counts
        ],
        "rule": dict(sweep["rule"]),
        "level": sweep["level"],
        "confidence": confidence,
        "num_bootstrap": config["num_bootstrap"],
        "exponent_min_staleness": config["exponent_min_staleness"],
        "equal_reward": EQUAL_REWARD,
        "significance": SIGNIFICANCE,
        "fisher_pair": list(config["fisher_pair"]),
        "num_runs": sum(len(row["seeds"]) for row in rows if row["kind"] == "cell"),
        "starts": [{key: row[key] for key in _START_KEYS} for row in rows if row["kind"] == "start"],
        "horizons": {name: part["num_updates"] for name, part in sweep["cases"].items()},
    }
    return result | {"checks": _checks(result, sweep)}


_START_KEYS = ("case", "policy", "task", "optimizer", "num_parameters", "reward", "ceiling")


def control_pairs(sweep: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(loss alone, loss with control, case of the first, case of the second), where the cases differ in nothing that matters.

    Args:
      sweep: config of a sweep, validated.
    """

    def world(part):
        left_out = ("algorithms", "max_staleness")
        return {key: value for key, value in part.items() if key not in left_out}

    algorithms, pairs = sweep["algorithms"], []
    placed = [(name, case, part) for case, part in sweep["cases"].items() for name in part["algorithms"]]
    for controlled, case, part in placed:
        if not algorithms[controlled]["control"]:
            continue
        for alone, other_case, other in placed:
            same_loss = all(algorithms[alone][key] == algorithms[controlled][key] for key in ("loss", "loss_options"))
            if same_loss and not algorithms[alone]["control"] and world(other) == world(part):
                pairs.append((alone, controlled, other_case, case))
    return pairs


def _loss(groups: Groups, config: Mapping[str, Any], case: str, algorithm: str) -> dict[str, Any]:
    """Everything about one loss in one case."""
    sweep = config["sweep"]
    rule, lags = CollapseRule(**sweep["rule"]), sorted(key[3] for key in groups if key[:2] == (case, algorithm))
    found = {lag: _of(groups, case, algorithm, lag) for lag in lags}
    cells = [{"max_staleness": lag, **_cell(found[lag], rule, sweep)} for lag in lags]
    fitted = [cell for cell in cells if cell["max_staleness"] >= config["exponent_min_staleness"]]
    common = sorted(set.intersection(*(set(cell["learning_rates"]) for cell in fitted))) if fitted else []
    exponents = None
    if len(fitted) > 1 and len(common) > 1:
        exponents = staleness_exponents(
            common,
            np.array([_successes(found[part["max_staleness"]], rule, common) for part in fitted]),
            [part["max_staleness"] for part in fitted],
            is_found=[part["status"] == "found" for part in fitted],
            num_bootstrap=config["num_bootstrap"],
            confidence=sweep["confidence"],
            seed=sweep["seed"],
        )
    return {"case": case, "algorithm": algorithm, "cells": cells, "exponents": exponents}


def _successes(cells: Sequence[Row], rule: CollapseRule, learning_rates: Sequence[float]) -> list[np.ndarray]:
    return [measures(cell, rule)["success"] for cell in cells if cell["learning_rate"] in learning_rates]


def _of(groups: Groups, case: str, algorithm: str, lag: int) -> list[dict[str, Any]]:
    """The cells of one (case, algorithm, S), ascending in η; [] without any."""
    return next((cells for key, cells in groups.items() if (*key[:2], key[3]) == (case, algorithm, lag)), [])


def _cell(cells: Sequence[Row], rule: CollapseRule, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Boundary and counts of one S. η_80 is `at_level` here, whatever the level declared."""
    levels, confidence = (sweep["level"], 0.5), sweep["confidence"]
    record = sweep_summary.boundary_record(cells, rule, levels=levels, confidence=confidence)
    half = sweep_summary.boundary_record(cells, rule, levels=(0.5,), confidence=confidence)
    names = ("status", "interval", "estimate", "width", "reason", "num_seeds", "learning_rates", "outcomes")
    counted = [measures(cell, rule) for cell in cells]
    return {
        **{name: record[name] for name in names},
        "at_level": record[f"eta_{100 * sweep['level']:g}"],
        "at_half": record["eta_50"],
        "half_interval": half["interval"] if record["eta_50"] is not None else None,
        **{name: [int(found[name].sum()) for found in counted] for name in ("success", "fall", "drawdown")},
        "median_end": [float(np.median(found["end"])) for found in counted],
    }


def measures(cell: Row, rule: CollapseRule) -> dict[str, np.ndarray]:
    """What became of each seed of a cell of `sweep_summary.groups`.

    Returns:
      [n] each: `success`; `fall`, by the first rule (the end lies below keep·peak, or is not finite); `drawdown`, by the second
      (the last reward lies below r_0 + give_back·(peak − r_0)); `failure` = not success; `end`, the end reward, 0 where not
      finite.
    """
    runs = sweep_summary.fates(cell, rule)
    success = np.array([run.outcome == "success" for run in runs])
    return {
        "success": success,
        "fall": np.array([run.outcome in ("fall", "non-finite") for run in runs]),
        "drawdown": np.array([run.collapse_step_second_rule is not None for run in runs]),
        "failure": ~success,
        "end": np.array([0.0 if run.end is None else run.end for run in runs]),
    }


def _comparison(groups: Groups, rule: CollapseRule, *, first, cases, is_control: bool) -> dict[str, Any]:
    """Two losses at equal (S, η), seed by seed."""
    arms = [_arm(groups, case, name, rule) for case, name in zip(cases, first, strict=True)]
    common = sorted(set(arms[0]) & set(arms[1]))
    lagged = [key for key in common if key[0] > 0]
    equal = [key for key in lagged if _is_equal(arms[0][key], arms[1][key])]
    lags = sorted({key[0] for key in common})
    return {
        "first": first[0],
        "second": first[1],
        "case": cases[1],
        "is_control": is_control,
        "first_case": cases[0],
        "cells": len(lagged),
        "lagged": _tests(arms, lagged),
        "equal_reward": _tests(arms, equal),
        "by_staleness": [{"max_staleness": lag, **_tests(arms, [key for key in common if key[0] == lag])} for lag in lags],
        "best": [_best(arms, [key for key in common if key[0] == lag]) for lag in lags],
    }


def _arm(groups: Groups, case: str, name: str, rule: CollapseRule) -> dict[tuple[int, float], dict[str, np.ndarray]]:
    """{(S, η): measures}"""
    found = {key: cells for key, cells in groups.items() if key[:2] == (case, name)}
    return {(key[3], cell["learning_rate"]): measures(cell, rule) for key, cells in found.items() for cell in cells}


def _is_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Both have successful runs, whose median end rewards differ by no more than EQUAL_REWARD."""
    if not (one["success"].any() and other["success"].any()):
        return False
    return bool(abs(np.median(one["end"][one["success"]]) - np.median(other["end"][other["success"]])) <= EQUAL_REWARD)


def _tests(arms, keys) -> dict[str, Any]:
    """`compare_falls` under both rules, and of any failure."""
    stacks = {name: [[arm[key][name] for key in keys] for arm in arms] for name in ("fall", "drawdown", "failure")}
    return {name: compare_falls(*pair) for name, pair in stacks.items()}


def _best(arms, keys) -> dict[str, Any]:
    """The best median end reward over η of each arm, over all its runs, and what else happened at that η."""
    places = [max(keys, key=lambda key, arm=arm: np.median(arm[key]["end"])) for arm in arms]
    found = [arm[key] for arm, key in zip(arms, places, strict=True)]
    rewards = [float(np.median(part["end"])) for part in found]
    return {
        "max_staleness": keys[0][0],
        "learning_rates": [key[1] for key in places],
        "rewards": rewards,
        "difference": rewards[1] - rewards[0],
        **{name: [int(part[name].sum()) for part in found] for name in ("fall", "drawdown", "failure")},
        "num_seeds": len(found[0]["end"]),
    }


def _checks(result: Mapping[str, Any], sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{what, measured, holds}]; holds None where the records do not say."""
    checks = []
    for loss in result["losses"]:
        if loss["algorithm"] == MUST_FALL and loss["exponents"] is not None:
            fits = loss["exponents"]
            known = all(fit["interval"] is not None for fit in fits)
            highest = max(fit["interval"][1] for fit in fits) if known else None
            checks.append(
                {
                    "what": f"{loss['case']}: η_max of {MUST_FALL} falls with S, every interval of its exponent below 0",
                    "measured": "not identifiable"
                    if highest is None
                    else f"highest upper end {highest:+.2f}".replace("-", "−"),
                    "holds": None if highest is None else highest < 0,
                }
            )
    beside = {(loss["case"], loss["algorithm"]) for loss in result["losses"] if loss["cells"][0]["max_staleness"] == 0}
    alone = {(case, name): (other, base) for base, name, other, case in control_pairs(sweep)}
    lacking = [
        f"{loss['case']}/{loss['algorithm']}"
        for loss in result["losses"]
        if not {(loss["case"], loss["algorithm"]), alone.get((loss["case"], loss["algorithm"]))} & beside
    ]
    measured = "lacking: " + ", ".join(lacking) if lacking else f"{len(result['losses'])} of {len(result['losses'])}"
    checks.append({"what": "S = 0 beside every loss, at every η", "measured": measured, "holds": not lacking})
    return checks
