"""What the study of cycles says, from its exact rows, those of the horizon law and the runs of the study of collapse."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jax_async_grpo import sweep_summary
from jax_async_grpo.scaling import Boundary, CollapseRule, fit_power_law, fit_stability_limit, stable_learning_rate
from jax_async_grpo.scaling.power_law import percentile_interval
from jax_async_grpo.studies.collapse_statistics import log_boundaries
from jax_async_grpo.studies.contract import save_figure
from jax_async_grpo.studies.horizon_page import interval_text, signed, synchronous_constants
from jax_async_grpo.studies.page_parts import markdown_table

__all__ = ["figures", "measured_horizon", "page", "summary", "verdict"]

CRITERIA = ("success", "no fall")
_FALLS = ("fall", "non-finite")
_MOST_DROPPED = 0.1  # share of the resamples without an exponent above which there is no interval
_COLORS = ("#0072B2", "#D55E00")  # Okabe and Ito

Row = Mapping[str, Any]


def summary(rows: Sequence[Row], config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """All numbers of the page; what the sweep of collapse has not run yet is left out.

    Args:
      rows: of the study's metrics.jsonl.
      config: of the study.
      sources: "horizon" and "collapse", rows of those studies.

    Returns:
      A dict of plain numbers, strings and lists.
    """
    limits = [{key: row[key] for key in row if key not in ("kind", "piece")} for row in rows if row["kind"] == "limit"]
    constants = synchronous_constants(sources["horizon"])
    groups = {
        (key[1], key[3]): cells
        for key, cells in sweep_summary.groups(sources["collapse"]).items()
        if key[0] == config["case"] and key[2] == "fixed"
    }
    return {
        "exact": [_exact(limits, loss, design, value, constants, config) for loss, design, value in _designs(config)],
        "limits": limits,
        "constants": constants,
        "sampled": [
            _sampled({s: cells for (name, s), cells in groups.items() if name == algorithm}, algorithm, criterion, config)
            for criterion in CRITERIA
            for algorithm in config["algorithms"]
            if any(name == algorithm for name, _ in groups)
        ],
        "paper": {**config["paper"], "cycles": config["paper"]["collapse"] / config["paper"]["boundary"]},
        **{
            key: config[key]
            for key in ("num_updates", "num_cycles", "rounding", "confidence", "exponent_min_staleness", "case")
        },
        **{key: list(config[key]) for key in ("updates", "cycles", "other_updates", "levels", "algorithms")},
        "losses": list(config["losses"]),
        "rule": config["rule"],
        "seconds": sum(row["seconds"] for row in rows if row["kind"] == "piece"),
    }


def _designs(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    return [(loss, design, v) for loss in config["losses"] for design in ("updates", "cycles") for v in config[design]]


def _exact(limits, loss: str, design: str, value: int, constants: Row, config: Mapping[str, Any]) -> dict[str, Any]:
    """The exponent of the exact η_max in S+1, and how far c/T, from a run without lag, is from it."""
    part = [row for row in limits if (row["loss"], row["design"], row["value"]) == (loss, design, value)]
    far = [row for row in part if row["max_staleness"] >= config["exponent_min_staleness"]]
    result = {"loss": loss, "design": design, "value": value}
    for rule in ("first", "second"):
        result |= {f"{rule}_exponent": None, f"{rule}_interval": None}
        try:
            fit = fit_power_law(
                [row["max_staleness"] + 1 for row in far if row[rule]],
                [row[rule][0] for row in far if row[rule]],
                num_bootstrap=config["num_bootstrap"],
                confidence=config["confidence"],
                seed=config["seed"],
            )
        except ValueError:  # too few S with a limit
            continue
        result |= {f"{rule}_exponent": float(fit.exponents[0]), f"{rule}_interval": fit.intervals[0].tolist()}
    found = [row for row in far if row["first"]]
    result["num_unlimited"] = len(far) - len(found)
    result["largest_product"] = max((row["max_staleness"] * row["first"][0] for row in found), default=None)
    ratios = [row["first"][0] * row["horizon"] / constants[loss] for row in found] if constants.get(loss) else []
    return result | {"against_constant": [min(ratios), max(ratios)] if ratios else None}


class _Curves(NamedTuple):
    """One (S, T): T as measured, its boundary, and [1 + num_bootstrap, levels] ln η_level of resampled seeds."""

    horizon: float
    boundary: Boundary
    log_boundaries: np.ndarray


def measured_horizon(steps: Sequence[float], wanted: float, *, rounding: float) -> float | None:
    """The step with a reward that is nearest to a wanted horizon; None where that is off by more than `rounding` of it."""
    nearest = min(steps, key=lambda step: (abs(step - wanted), step))
    return float(nearest) if abs(nearest - wanted) <= rounding * wanted else None


def _curves(cells: Sequence[Row], criterion: str, horizon: float, config: Mapping[str, Any]) -> _Curves:
    runs = [sweep_summary.fates(cell, CollapseRule(**config["rule"]), horizon) for cell in cells]
    successes = np.array(
        [[r.outcome == "success" if criterion == "success" else r.outcome not in _FALLS for r in part] for part in runs]
    )
    rates = np.array([cell["learning_rate"] for cell in cells])
    boundary = stable_learning_rate(rates, successes, levels=tuple(config["levels"]), confidence=config["confidence"])
    return _Curves(horizon, boundary, _resampled(rates, successes, config))


def _sampled(by_lag: Mapping[int, Sequence[Row]], algorithm: str, criterion: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Boundaries of one loss under one criterion at both designs and the other horizons, and exponents in S+1 and in T."""
    lags = sorted(by_lag)
    designs = {"updates": {s: config["num_updates"] for s in lags}, "cycles": {s: config["num_cycles"] * (s + 1) for s in lags}}
    designs |= {f"T={horizon}": dict.fromkeys(lags, horizon) for horizon in config["other_updates"]}

    @functools.cache
    def curves(s: int, wanted: float) -> _Curves | None:
        horizon = measured_horizon(by_lag[s][0]["steps"], wanted, rounding=config["rounding"])
        if horizon is None or horizon == wanted:
            return None if horizon is None else _curves(by_lag[s], criterion, horizon, config)
        return curves(s, horizon)

    tables = {name: {s: curves(s, t) for s, t in wanted.items()} for name, wanted in designs.items()}
    lines = {name: [_boundary(s, found, designs[name][s]) for s, found in part.items()] for name, part in tables.items()}
    fixed = [name for name in lines if name != "cycles"]
    by_horizon = {name: tables[name] for name in fixed}
    num_seeds = len(by_lag[lags[0]][0]["seeds"])
    return {
        "algorithm": algorithm,
        "criterion": criterion,
        "num_seeds": num_seeds,
        "boundaries": lines,
        "exponents": [_exponents(tables, lines, i, num_seeds, config) for i in range(len(config["levels"]))],
        "horizon_exponents": [_horizon_exponent(by_horizon, lines, i, num_seeds, config) for i in range(len(config["levels"]))],
        "constraints": _constraints([line for part in lines.values() for line in part], config),
    }


def _boundary(max_staleness: int, found: _Curves | None, wanted: float) -> dict[str, Any]:
    """A record of one (S, T)."""
    line = {"max_staleness": max_staleness, "wanted": float(wanted)}
    if found is None:
        return line | {"horizon": None, "status": "not measured", "rates": None, "intervals": None, "shares": None}
    return line | {
        "horizon": found.horizon,
        "status": found.boundary.status,
        "rates": list(found.boundary.learning_rates),
        "intervals": list(found.boundary.intervals),
        "shares": list(found.boundary.shares),
    }


def _has(line: Row, index: int) -> bool:
    """Whether there is an η of the level number `index`."""
    return line["status"] == "found" and line["rates"][index] is not None


def _resampled(learning_rates: np.ndarray, successes: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """[1 + num_bootstrap, levels] ln η_level of the seeds as they are and resampled, the same resamples for every (S, T)."""
    num_seeds = successes.shape[1]
    chance = np.full(num_seeds, 1 / num_seeds)
    draws = np.random.default_rng(config["seed"]).multinomial(num_seeds, chance, config["num_bootstrap"])
    counts = np.concatenate([np.ones((1, num_seeds), int), draws]) @ successes.T
    distinct, index = np.unique(counts, axis=0, return_inverse=True)
    return log_boundaries(np.log(learning_rates), distinct / num_seeds, num_seeds, config["levels"])[index]


def _exponents(tables, lines, index: int, num_seeds: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Exponents of η_level in S+1 at fixed updates and at fixed cycles, and their difference over the S that have both."""
    usable = {name: [line["max_staleness"] for line in lines[name] if _has(line, index)] for name in ("updates", "cycles")}
    usable = {name: [s for s in lags if s >= config["exponent_min_staleness"]] for name, lags in usable.items()}
    both = [s for s in usable["updates"] if s in usable["cycles"]]
    result = {"level": config["levels"][index], "staleness": usable, "staleness_of_both": both}
    for name, lags in usable.items():
        result[name] = _estimate(_slopes(tables[name], lags, index), num_seeds, config)
    first, second = (_slopes(tables[name], both, index) for name in ("cycles", "updates"))
    return result | {"difference": _estimate(None if first is None else first - second, num_seeds, config)}


def _slopes(part, lags: Sequence[int], index: int) -> np.ndarray | None:
    """[draws] slopes of ln η_level on ln(S+1); None with fewer than three S."""
    if len(lags) < 3:
        return None
    x = np.log1p(lags) - np.log1p(lags).mean()
    return np.column_stack([part[s].log_boundaries[:, index] for s in lags]) @ x / (x @ x)


def _horizon_exponent(tables, lines, index: int, num_seeds: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The exponent of η_level in T at the same S, S = 0 apart: slopes within every S that has a boundary at two T or more."""
    result = {"level": config["levels"][index]}
    lags = sorted({line["max_staleness"] for part in lines.values() for line in part})
    for name, chosen in (("synchronous", [s for s in lags if s == 0]), ("lagged", [s for s in lags if s > 0])):
        moments, weight, used = 0.0, 0.0, []
        for s in chosen:
            kept = [
                (line["horizon"], tables[design][s])
                for design in tables
                for line in lines[design]
                if line["max_staleness"] == s and _has(line, index)
            ]
            if len(kept) < 2:
                continue
            x = np.log([horizon for horizon, _ in kept])
            x -= x.mean()
            moments = moments + np.column_stack([curves.log_boundaries[:, index] for _, curves in kept]) @ x
            weight, used = weight + x @ x, [*used, s]
        result[name] = _estimate(moments / weight if used else None, num_seeds, config) | {"staleness": used}
    return result


def _estimate(draws: np.ndarray | None, num_seeds: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The first draw, and an interval from the others unless more than a tenth of them have no value."""
    if draws is None or not np.isfinite(draws[0]):
        return {"exponent": None, "interval": None, "num_dropped": None}
    kept = draws[1:][np.isfinite(draws[1:])]
    num_dropped, interval = len(draws) - 1 - len(kept), None
    if num_dropped <= _MOST_DROPPED * (len(draws) - 1):
        interval = percentile_interval(kept[:, None], config["confidence"], num_seeds)[0].tolist()
    return {"exponent": float(draws[0]), "interval": interval, "num_dropped": num_dropped}


def _constraints(lines: Iterable[Row], config: Mapping[str, Any]) -> dict[str, Any]:
    """The two-constraint law and its rivals on all boundaries of the first level, every (S, T) once."""
    points = {(line["max_staleness"], line["horizon"]): line["rates"][0] for line in lines if _has(line, 0)}
    lagged = {key: rate for key, rate in points.items() if key[0]}
    result = {"num_points": len(lagged)}
    try:
        fit = fit_stability_limit(
            [s for s, _ in lagged],
            [t for _, t in lagged],
            list(lagged.values()),
            groups=[s for s, _ in lagged],
            num_bootstrap=config["num_bootstrap"],
            confidence=config["confidence"],
            seed=config["seed"],
        )
    except ValueError as error:  # too few boundaries
        return result | {"reason": str(error)}
    return result | {
        "radii": {
            name: {"value": radius.value, "interval": radius.interval, "status": radius.status}
            for name, radius in (("S·η", fit.batch_radius), ("T·η", fit.critical_radius))
        },
        "num_staleness_limited": fit.num_staleness_limited,
        "scores": [
            {"law": score.name, "rms": score.rms_log_error, "aicc": score.aicc, "left_out": score.leave_one_out_error}
            for score in fit.scores
        ],
    }


_NO_FALL = -0.5  # an interval that reaches below it does not say that there is no fall


def verdict(fixed: Row, in_horizon: Row) -> str:
    """What the exponents in S+1 at the same T, and in T at the same S, say of the horizon law as a disguise.

    Args:
      fixed: `exponent` and `interval` of η_max in S+1 at fixed T.
      in_horizon: those in T at the same S.

    Returns:
      "staleness": it falls with S though every run has the same T, and does not fall with T; "both": it falls with either;
      "horizon": it falls with T and not with S; "neither": with neither. Not to fall is an interval that ends above −0.5, half
      way to the exponent of a law of its own; one that reaches further down leaves the question open: "staleness at least",
      "horizon at least", "undetermined", and so does an exponent in T without an interval.
    """
    if fixed["interval"] is None or in_horizon["interval"] is None:
        return "staleness at least" if fixed["interval"] is not None and fixed["interval"][1] < 0 else "undetermined"
    falls = fixed["interval"][1] < 0, in_horizon["interval"][1] < 0
    if falls == (True, False) and in_horizon["interval"][0] <= _NO_FALL:
        return "staleness at least"
    if falls == (False, True) and fixed["interval"][0] <= _NO_FALL:
        return "horizon at least"
    if falls == (False, False) and min(fixed["interval"][0], in_horizon["interval"][0]) <= _NO_FALL:
        return "undetermined"
    return {(True, False): "staleness", (True, True): "both", (False, True): "horizon", (False, False): "neither"}[falls]


def page(summary: Mapping[str, Any]) -> str:
    """docs/laws/cycles.md: what was asked, the rule, what was found."""
    updates, cycles = summary["num_updates"], summary["num_cycles"]
    parts = [
        "# Fixed updates against fixed cycles",
        "Generated by `launch.study` from docs/laws/records/cycles, horizon and collapse. configs/study_cycles.py holds the "
        "designs, the criteria and the levels.",
        _question(summary),
        "## Exact: a system with a horizon and no staleness limit",
        f"The over-optimized bandit of the [horizon law](horizon.md), fixed lag: η_max is the largest learning rate below the "
        f"first that has collapsed by T. Exponents of η_max in S+1 over S ≥ {summary['exponent_min_staleness']}; c is t_c·η of "
        "a run without lag at the smallest learning rate, from the records of that study.",
        _exact_table(summary),
        _about_exact(summary),
        "## Sampled: the runs of the study of collapse",
        f"Case `{summary['case']}`, shorter horizons read off the same runs. *Updates*: T = {updates} for every S. *Cycles*: "
        f"T = {cycles}·(S+1), rounded to the nearest step with a reward, not further than {summary['rounding']:.0%}: "
        f"{_rounded(summary)}. A run counts as stable by one of two criteria: *success* (it learned and kept it, as in that "
        "study), or *no fall* (it did not lose what it had by T, whether or not it had learned by then; a short T leaves no "
        "time to learn). Exponents of η_level in S+1 over the S ≥ "
        f"{summary['exponent_min_staleness']} with a boundary, at least three; intervals ({summary['confidence']:.0%}) "
        "resample whole seeds, the same ones everywhere, and know nothing of the gaps between the rates tried. "
        "In T: at the same S, over "
        f"T = {', '.join(map(str, sorted([*summary['other_updates'], updates])))}.",
        _exponent_table(summary),
        "![η_max against S+1 at fixed updates and at fixed cycles](figures:cycles.png)",
        _conclusion(summary),
        _about_hazard(summary),
        "## Boundaries",
        _boundary_table(summary),
        "## Two constraints",
        "Every (S ≥ 1, T) with an η of the first level, once: min{a/S, b/T} against its rivals. AICc: lower is better; left "
        "out: rms error in ln η of points not fitted.",
        _constraint_table(summary),
        _about_constraints(summary),
        "## What it does not say",
        "The sampled runs learn one task from a fixed reward with one optimizer; the exact ones are a bandit whose reward can "
        "be hacked. Horizons read off the same runs are not independent: the intervals know that, the constraints' AICc does "
        "not. The range of T is small. Where the boundary of a short horizon is “none” or “censored” nothing was put in its "
        "place. What happens at ten times the horizon, just under the boundary, is another study, [long runs](long_runs.md).",
    ]
    return "\n\n".join(part for part in parts if part)


def _question(summary: Mapping[str, Any]) -> str:
    paper = summary["paper"]
    factor, lags = paper["cycles"], paper["max_staleness"]
    times = ", ".join(f"{factor * s:g}" for s in lags)
    return (
        "**Question.** arXiv 2607.01083 is reported to find two laws: collapse at t_c·η ≈ "
        f"{paper['collapse']:g} for every S, and η_max ∝ 1/S with S·η ≈ {paper['boundary']:g} at the boundary (S = "
        f"{', '.join(map(str, lags))}). Their quotient is {factor:g}: at the boundary t_c is {factor:g}·S = {times} updates. "
        "If every run collapses at t_c = c/η whatever S, it has collapsed by T iff η ≥ c/T, and η_max = c/T *at every S*: for "
        "a T that is the same for all S the first law excludes the second. So either T grew with S, as T = M·(S+1) with "
        f"M ≈ {factor:g} would make it, and then 1/S is the first law once more; or the first law holds only past the "
        "boundary, and a run below it never collapses, however long. The two reported numbers fit both; the horizons of those "
        "runs, and what came after them, are not known to us. Varying T apart from S tells which it is. A disguised horizon "
        "law has exponent 0 in S+1 at fixed T, −1 in T at fixed S and −1 in S+1 at T = M·(S+1); a limit set by staleness alone "
        "has the same exponent in both designs, and 0 in T."
    )


def _exact_table(summary: Mapping[str, Any]) -> str:
    return markdown_table(
        ("Loss", "T", "Exponent in S+1", "second rule", "Largest S·η", "η_max·T/c, least and most"),
        [
            (
                line["loss"],
                _design_text(line["design"], line["value"]),
                *(
                    "-"
                    if line[f"{rule}_exponent"] is None
                    else interval_text(line[f"{rule}_exponent"], line[f"{rule}_interval"], 3)
                    for rule in ("first", "second")
                ),
                "-" if line["largest_product"] is None else f"{line['largest_product']:.2f}",
                "-" if line["against_constant"] is None else "{:.2f}, {:.2f}".format(*line["against_constant"]),
            )
            for line in summary["exact"]
        ],
    )


def _design_text(design: str, value: int) -> str:
    return f"{value}" if design == "updates" else f"{value}·(S+1)"


def _about_exact(summary: Mapping[str, Any]) -> str:
    """Whether the second law appears from the first alone: counted over losses and designs."""
    parts = {name: [line for line in summary["exact"] if line["design"] == name] for name in ("updates", "cycles")}
    known = {
        name: [line["first_exponent"] for line in part if line["first_exponent"] is not None] for name, part in parts.items()
    }
    if not all(known.values()):
        return "Too few limits for an exponent."
    spans = {name: f"{signed(min(v), 2)} to {signed(max(v), 2)}" for name, v in known.items()}
    manufactured = all(abs(value + 1) < 0.1 for value in known["cycles"]) and all(value > -0.1 for value in known["updates"])
    text = f"At fixed updates the exponent is {spans['updates']}, at fixed cycles {spans['cycles']}. "
    text += (
        "So a system whose η_max does not fall with S at all shows η_max ∝ 1/(S+1), to the eye perfect, once every S is given "
        "the same number of cycles. The intervals say how straight the points lie; there is no noise."
        if manufactured
        else "Fixed cycles do not turn this horizon law into a clean 1/(S+1) here: lag also moves t_c·η (see the largest S·η)."
    )
    unlimited = sum(line["num_unlimited"] for line in summary["exact"])
    return text + (
        f" In {unlimited} cells no learning rate of the window collapses by T; they are left out." if unlimited else ""
    )


def _rounded(summary: Mapping[str, Any]) -> str:
    """How the horizons of the cycles were rounded."""
    if not summary["sampled"]:
        return "no runs yet"
    lines = summary["sampled"][0]["boundaries"]["cycles"]
    return "; ".join(
        f"S = {line['max_staleness']}: {line['wanted']:g} "
        + (
            "has none"
            if line["horizon"] is None
            else "measured"
            if line["horizon"] == line["wanted"]
            else f"→ {line['horizon']:g}"
        )
        for line in lines
    )


def _exponent_table(summary: Mapping[str, Any]) -> str:
    lines = []
    for part in summary["sampled"]:
        for found, in_horizon in zip(part["exponents"], part["horizon_exponents"], strict=True):
            lines.append(
                (
                    part["algorithm"],
                    part["criterion"],
                    f"{100 * found['level']:g}",
                    _exponent_text(found["updates"], found["staleness"]["updates"]),
                    _exponent_text(found["cycles"], found["staleness"]["cycles"]),
                    _exponent_text(found["difference"], found["staleness_of_both"]),
                    *(_exponent_text(in_horizon[key], in_horizon[key]["staleness"]) for key in ("lagged", "synchronous")),
                    _SHORT.get(word := verdict(found["updates"], in_horizon["lagged"]), word),
                )
            )
    head = (
        "Loss",
        "Criterion",
        "η_",
        "S+1, fixed updates",
        "S+1, fixed cycles",
        "Cycles − updates",
        "T at S ≥ 1",
        "T at S = 0",
    )
    return markdown_table((*head, "η_max falls with"), lines)


_SHORT = {"staleness": "S", "staleness at least": "S, T unclear", "both": "S and T", "horizon": "T"}


def _exponent_text(found: Row, staleness: Sequence[int]) -> str:
    if found["exponent"] is None:
        return f"not identifiable (S = {', '.join(map(str, staleness)) or 'none'})"
    if found["interval"] is None:
        return f"{signed(found['exponent'])} (no interval: {found['num_dropped']} resamples without a boundary)"
    return interval_text(found["exponent"], found["interval"])


def _conclusion(summary: Mapping[str, Any]) -> str:
    """The paragraph: what the exponents of the first level say, loss by loss."""
    sentences = []
    for algorithm in summary["algorithms"]:
        parts = [part for part in summary["sampled"] if part["algorithm"] == algorithm]
        if not parts:
            sentences.append(f"`{algorithm}` has not been run.")
            continue
        words = [verdict(part["exponents"][0]["updates"], part["horizon_exponents"][0]["lagged"]) for part in parts]
        sentences.append(_about_algorithm(algorithm, parts, words))
    reach = f"by η_{100 * summary['levels'][0]:g}, S ≥ {summary['exponent_min_staleness']}, T ≤ {summary['num_updates']}"
    return f"**Answer** ({reach}). " + " ".join(sentences)


_SAID = {
    "staleness": "falls with S though every run has the same number of updates, and not with T: no horizon law in disguise",
    "staleness at least": "falls with S though every run has the same number of updates; whether with T too is unclear",
    "horizon at least": "falls with T at the same S; whether with S too is unclear",
    "both": "falls with S at the same T, and with T at the same S: fixed cycles add the two, too steep a law in S",
    "horizon": "does not fall with S at the same T, but with T: what it shows in S at fixed cycles is the horizon's",
    "neither": "falls neither with S at the same T nor with T at the same S",
    "undetermined": "cannot be judged by these runs",
}


def _about_algorithm(algorithm: str, parts: Sequence[Row], words: Sequence[str]) -> str:
    texts = []
    for part, word in zip(parts, words, strict=True):
        found, horizon = part["exponents"][0], part["horizon_exponents"][0]["lagged"]
        numbers = f"S+1: {_exponent_text(found['updates'], found['staleness']['updates'])}"
        numbers += f"; T: {_exponent_text(horizon, horizon['staleness'])}"
        if found["difference"]["exponent"] is not None:
            numbers += f"; cycles − updates: {_exponent_text(found['difference'], found['staleness_of_both'])}"
        said = "likewise" if texts and len(set(words)) == 1 else f"it {_SAID[word]}"
        texts.append(f"by *{part['criterion']}* {said} ({numbers})")
    return f"`{algorithm}`: {'; '.join(texts)}."


def _about_hazard(summary: Mapping[str, Any]) -> str:
    """What an exponent in T between −1 and 0 is not."""
    between = {
        part["algorithm"]
        for part in summary["sampled"]
        for interval in [part["horizon_exponents"][0]["lagged"]["interval"]]
        if interval is not None and -1 < interval[0] and interval[1] < 0
    }
    if not between:
        return ""
    names = ", ".join(f"`{name}`" for name in summary["algorithms"] if name in between)
    return (
        f"Exponents in T of {names} lie between −1 and 0, both excluded. That is not t_c·η = c either, which would make them "
        "−1: falls at random times with a hazard ∝ η^h would give −1/h."
    )


def _boundary_table(summary: Mapping[str, Any]) -> str:
    columns = ["updates", "cycles", *(f"T={horizon}" for horizon in summary["other_updates"])]
    level = f"{100 * summary['levels'][0]:g}"
    lines = []
    for part in summary["sampled"]:
        for index, line in enumerate(part["boundaries"]["updates"]):
            cells = [part["boundaries"][name][index] for name in columns]
            lines.append((part["algorithm"], part["criterion"], line["max_staleness"], *map(_rate_text, cells)))
    heads = [f"T = {summary['num_updates']}", f"T = {summary['num_cycles']}·(S+1)"]
    heads += [f"T = {horizon}" for horizon in summary["other_updates"]]
    return f"η_{level} with its interval, or why there is none:\n\n" + markdown_table(("Loss", "Criterion", "S", *heads), lines)


def _rate_text(line: Row) -> str:
    if line["status"] != "found" or line["rates"][0] is None:
        return line["status"]
    return "{:.2e} [{:.2e}, {:.2e}]".format(line["rates"][0], *line["intervals"][0])


def _constraint_table(summary: Mapping[str, Any]) -> str:
    lines = []
    for part in summary["sampled"]:
        found = part["constraints"]
        head = (part["algorithm"], part["criterion"], found["num_points"])
        if "reason" in found:
            lines.append((*head, *("-",) * 2, found["reason"]))
            continue
        radii = [
            radius["status"]
            if radius["value"] is None
            else "{:.3g} [{:.3g}, {:.3g}]".format(radius["value"], *radius["interval"])
            for radius in found["radii"].values()
        ]
        ranked = sorted((s for s in found["scores"] if s["aicc"] is not None), key=lambda score: score["aicc"])
        laws = "; ".join(f"{s['law']} {s['aicc']:.1f} ({_finite(s['left_out'])})" for s in ranked)
        lines.append((*head, *radii, laws))
    return markdown_table(
        ("Loss", "Criterion", "Points", "S·η at the limit", "T·η at the limit", "Laws: AICc (left out)"), lines
    )


def _finite(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _about_constraints(summary: Mapping[str, Any]) -> str:
    """Which law with X = S, Y = T describes the boundaries best, counted."""
    best: dict[str, list[str]] = {}
    for part in summary["sampled"]:
        scores = [s for s in part["constraints"].get("scores", ()) if s["aicc"] is not None]
        if scores:
            law = min(scores, key=lambda score: score["aicc"])["law"]
            best.setdefault(law, []).append(f"`{part['algorithm']}` ({part['criterion']})")
    if not best:
        return ""
    said = "; ".join(f"{law} for {', '.join(names)}" for law, names in best.items())
    return f"Here X = S and Y = T. Lowest AICc: {said}. c/Y alone, the horizon law, is lowest for {len(best.get('c/Y', []))}."


def figures(rows: Sequence[Row], summary: Mapping[str, Any], folder: os.PathLike) -> list[Path]:
    """cycles.png and cycles.svg."""
    del rows
    return save_figure(_figure(summary), folder, "cycles")


def _figure(summary: Mapping[str, Any]) -> Figure:
    """Left: the exact limits; then a column a loss, a row a criterion: η_level at fixed updates and at fixed cycles."""
    algorithms = [name for name in summary["algorithms"] if any(part["algorithm"] == name for part in summary["sampled"])]
    figure = Figure(figsize=(2.5 * (1 + len(algorithms)) + 0.8, 6.2), layout="constrained")
    axes = figure.subplots(2, 1 + len(algorithms), squeeze=False, sharex=True)
    for ax, updates, cycles in zip(axes[:, 0], summary["updates"], summary["cycles"], strict=False):
        _draw_exact(ax, summary, updates, cycles)
    for row, criterion in zip(axes, CRITERIA, strict=True):
        for ax, algorithm in zip(row[1:], algorithms, strict=True):
            part = next(p for p in summary["sampled"] if (p["algorithm"], p["criterion"]) == (algorithm, criterion))
            _draw_sampled(ax, part)
            ax.set_title(f"{algorithm}, {criterion}", fontsize=8)
            if ax is not row[1]:
                ax.sharey(row[1])
        if algorithms:
            row[1].set_ylabel(f"η_{100 * summary['levels'][0]:g}")
        row[0].set_ylabel("η_max")
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.3, lw=0.5)
    lags = sorted({row["max_staleness"] for row in summary["limits"]} & {0, 1, 4, 16, 64})
    axes[0, 0].set_xticks([s + 1 for s in lags], [str(s) for s in lags])
    axes[0, 0].minorticks_off()
    for ax in axes[1]:
        ax.set_xlabel("S, drawn at S+1")
    handles = [axes[0, 0].plot([], [], "-", marker=m, color=c, mfc=f)[0] for m, c, f in _STYLES.values()]
    handles.append(axes[0, 0].plot([], [], color="0.5", ls="--", lw=1)[0])
    labels = ["the same updates T for every S", "the same cycles, T = M·(S+1)", "∝ 1/(S+1)"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("Largest learning rate: exact, with a horizon and no limit in S·η (left), and sampled runs", fontsize=10)
    return figure


_STYLES = {"updates": ("o", _COLORS[0], _COLORS[0]), "cycles": ("s", _COLORS[1], "white")}


def _draw_exact(ax, summary: Mapping[str, Any], updates: int, cycles: int) -> None:
    for loss, line in zip(summary["losses"], ("-", "--", ":"), strict=False):
        for (design, value), (marker, color, face) in zip(
            (("updates", updates), ("cycles", cycles)), _STYLES.values(), strict=True
        ):
            points = [
                (row["max_staleness"] + 1, row["first"][0])
                for row in summary["limits"]
                if (row["loss"], row["design"], row["value"]) == (loss, design, value) and row["first"]
            ]
            if points:
                ax.plot(*zip(*points, strict=True), line, marker=marker, color=color, mfc=face, ms=4, lw=1)
                if design == "cycles" and loss == summary["losses"][0]:
                    _guide(ax, points)
    ax.set_title(f"exact, T = {updates} and {cycles}·(S+1)", fontsize=8)


def _draw_sampled(ax, part: Row) -> None:
    for index, (design, (marker, color, face)) in enumerate(_STYLES.items()):
        found = [line for line in part["boundaries"][design] if line["status"] == "found" and line["rates"][0] is not None]
        if not found:
            continue
        x = (np.array([line["max_staleness"] for line in found]) + 1) * 1.06 ** (2 * index - 1)  # apart, where both are equal
        y = np.array([line["rates"][0] for line in found])
        ends = np.clip([line["intervals"][0] for line in found], 1e-6, 1.0)
        errors = np.abs(ends.T - y)
        ax.errorbar(x, y, yerr=errors, fmt="-", marker=marker, color=color, mfc=face, ms=5, lw=1, capsize=2)
    if not any(line["status"] == "found" for design in _STYLES for line in part["boundaries"][design]):
        words = ", ".join(dict.fromkeys(line["status"] for line in part["boundaries"]["updates"]))
        ax.text(0.5, 0.5, f"no boundary:\n{words}", transform=ax.transAxes, ha="center", fontsize=8, color="0.3")
    lagged = [line for line in part["boundaries"]["updates"] if line["max_staleness"] and line["status"] == "found"]
    if len(lagged) > 1:
        _guide(ax, [(line["max_staleness"] + 1, line["rates"][0]) for line in lagged])


def _guide(ax, points: Sequence[tuple[float, float]]) -> None:
    """A line ∝ 1/(S+1) a little above the points, through their middle."""
    x, y = np.array(points).T
    ax.plot(x, 1.4 * np.exp(np.mean(np.log(x * y))) / x, color="0.5", ls="--", lw=1)
