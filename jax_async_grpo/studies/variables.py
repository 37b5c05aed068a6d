"""Study: which variable makes the success curves of different S one curve, by one declared score on the records of a sweep.

The score of a variable x is the Brier score of predicting a run's success from x alone at an S that the curve has not seen:
the curve is the isotonic regression of success on x over the runs of all *other* S, so it knows no functional form, and any
increasing transform of x has the same score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.scaling.power_law import percentile_interval
from jax_async_grpo.studies.analysis import pieces, run, source_rows, validate_analysis
from jax_async_grpo.studies.runs import RunTable, run_table, seed_draws
from jax_async_grpo.studies.variables_page import figures, page

__all__ = [
    "VARIABLES",
    "boundary_value",
    "figures",
    "isotonic_predictions",
    "page",
    "pieces",
    "run",
    "summary",
    "transfer_score",
    "validate",
]

_KEYS = (
    "study",
    "sources",
    "precision",
    "source",
    "cases",
    "rule",
    "min_staleness",
    "num_bootstrap",
    "confidence",
    "seed",
    "shown",
)


def _given(power: float) -> Callable[[RunTable], np.ndarray]:
    return lambda runs: runs.max_staleness.astype(np.float64) ** power * runs.learning_rate


def _first_window(name: str) -> Callable[[RunTable], np.ndarray]:
    return lambda runs: runs.windows[name][:, 0]


def _rms_staleness(runs: RunTable) -> np.ndarray:
    s = runs.max_staleness.astype(np.float64)
    return np.where(runs.schedule == "fixed", s, np.sqrt(s * (2 * s + 1) / 6)) * runs.learning_rate


def _root_msd(runs: RunTable) -> np.ndarray:
    squares = [msd[max(s, 1)] for msd, s in zip(runs.msd, runs.max_staleness.tolist(), strict=True)]
    return np.sqrt(np.array(squares, np.float64))


# name -> (what it is, its value for every run [n]; larger is meant to be worse)
VARIABLES: dict[str, tuple[str, Callable[[RunTable], np.ndarray]]] = {
    "eta": ("η", lambda runs: runs.learning_rate),
    "sqrt_s_eta": ("√S·η", _given(0.5)),
    "s_eta": ("S·η", _given(1.0)),
    "rms_s_eta": ("rms staleness·η", _rms_staleness),
    "drift": ("drift ‖θ−φ‖", _first_window("drift/from_behavior")),
    "ess": ("1/√ESS − 1", lambda runs: 1 / np.sqrt(runs.windows["off_policy/ess_ratio"][:, 0]) - 1),
    "second_moment": ("second moment of log r", _first_window("off_policy/second_moment")),
    "kl": ("KL = E k3", _first_window("off_policy/kl")),
    "tv": ("total variation", _first_window("off_policy/tv")),
    "root_msd": ("√MSD(S), whole run", _root_msd),
}
_GIVEN = ("eta", "sqrt_s_eta", "s_eta", "rms_s_eta")  # known before a run


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, one line, on the first thing that cannot be analyzed."""
    validate_analysis(config, _KEYS)
    unknown = [name for name in config["shown"] if name not in VARIABLES]
    if unknown or not config["shown"]:
        raise ValueError(f"config.shown is {tuple(config['shown'])}; it must name some of {tuple(VARIABLES)}")


def summary(rows: Sequence[Any], config: Mapping[str, Any], sources: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Scores of every variable for every loss, and of one curve for all losses of a case.

    Args:
      rows: unused.
      config: of the study.
      sources: rows of the sweep named `config.source`.

    Returns:
      A dict of plain numbers, strings and lists.

    Raises:
      ValueError: the source is not there or lacks a case.
    """
    del rows
    source = source_rows(config, sources)
    rule, losses, universal = CollapseRule(**config["rule"]), [], []
    for case in config["cases"]:
        runs = run_table(source, case, rule)
        runs = runs.select(runs.max_staleness >= config["min_staleness"])
        runs = runs.select(_from_best_rate(runs))
        for name in dict.fromkeys(runs.algorithm):
            mine = runs.select(runs.algorithm == name)
            if len(np.unique(mine.max_staleness)) > 1:
                losses.append({"case": case, "loss": str(name)} | _loss_record(mine, config))
        standing = runs.select(runs.failure_step > runs.window_ends[0])
        if len(np.unique(runs.algorithm)) > 1:
            universal.append({"case": case} | _scores(standing, standing.algorithm, config, by_cell=True))
    return {
        "losses": losses,
        "universal": universal,
        "labels": {name: label for name, (label, _) in VARIABLES.items()},
        **{key: config[key] for key in ("source", "confidence", "num_bootstrap", "min_staleness", "shown")},
        "given": list(_GIVEN),
    }


def _from_best_rate(runs: RunTable) -> np.ndarray:
    """[n] whether η is at least the smallest one with the highest share of success of its loss, schedule and S.

    Below it runs fail by learning too slowly, which no staleness cures; `scaling.stable_learning_rate` starts there too.
    """
    kept = np.zeros(len(runs), bool)
    groups = np.stack([runs.algorithm, runs.schedule, runs.max_staleness.astype(str)])
    for key in np.unique(groups, axis=1).T:
        inside = (groups == key[:, None]).all(axis=0)
        rates = np.unique(runs.learning_rate[inside])
        shares = [np.mean(runs.outcome[inside & (runs.learning_rate == rate)] == "success") for rate in rates]
        kept |= inside & (runs.learning_rate >= rates[int(np.argmax(shares))])
    return kept


def _loss_record(runs: RunTable, config: Mapping[str, Any]) -> dict[str, Any]:
    """The declared score of one loss, the same under other declarations, curves and boundaries."""
    standing = runs.select(runs.failure_step > runs.window_ends[0])
    failed = runs.outcome != "success"
    declared = _scores(standing, standing.max_staleness, config, by_cell=True)
    others = {
        "per_run": _scores(standing, standing.max_staleness, config, by_cell=False, num_bootstrap=0),
        "all_runs": _scores(runs, runs.max_staleness, config, by_cell=True, num_bootstrap=0),
    }
    values = _cell_values(standing)
    return declared | {
        "num_runs": len(runs),
        "num_failed": int(failed.sum()),
        "num_failed_early": int((failed & (runs.failure_step <= runs.window_ends[0])).sum()),
        "first_window_end": int(runs.window_ends[0]),
        "all_fixed": bool((runs.schedule == "fixed").all()),
        "own_curve": _own_curve(standing),
        "others": {
            name: {variable: score["skill"] for variable, score in other["scores"].items()} for name, other in others.items()
        },
        "boundaries": {name: _boundaries(standing, x) for name, x in values.items()},
        "cells": _cells(standing, values),
    }


def _scores(
    runs: RunTable, held_out: np.ndarray, config: Mapping[str, Any], *, by_cell: bool, num_bootstrap: int | None = None
) -> dict[str, Any]:
    """Brier score of every variable, its skill against η alone with an interval over seeds, and what ties with the best."""
    num_bootstrap = config["num_bootstrap"] if num_bootstrap is None else num_bootstrap
    success = runs.outcome == "success"
    labels, seed_index = np.unique(runs.seed, return_inverse=True)
    draws = seed_draws(len(labels), num_bootstrap, config["seed"])
    weights = np.concatenate([np.ones((1, len(labels))), draws])[:, seed_index]
    values = _cell_values(runs) if by_cell else _run_values(runs)
    briers = {name: transfer_score(x, success, held_out, weights) for name, x in values.items()}
    best = min(briers, key=lambda name: briers[name][0])

    def interval(resampled):
        kept = resampled[np.isfinite(resampled)]
        if num_bootstrap == 0 or len(kept) < num_bootstrap / 2 or len(labels) < 2:
            return None
        return percentile_interval(kept[:, None], config["confidence"], len(labels))[0].tolist()

    scores = {}
    for name, brier in briers.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            skill = 1 - brier / briers["eta"]
        behind = interval(brier[1:] - briers[best][1:])
        scores[name] = {
            "brier": float(brier[0]),
            "skill": float(skill[0]) if math.isfinite(skill[0]) else None,
            "interval": interval(skill[1:]),
            "ties_with_best": behind is not None and behind[0] <= 0,
        }
    constant = transfer_score(np.zeros(len(runs)), success, held_out, weights[:1])[0]
    return {"scores": scores, "constant": float(constant), "best": best, "num_scored": len(runs)}


def _run_values(runs: RunTable) -> dict[str, np.ndarray]:
    """{variable: [n]}; what became non-finite counts as larger than every number."""
    values = {name: np.asarray(function(runs), np.float64) for name, (_, function) in VARIABLES.items()}
    return {name: np.where(np.isfinite(x), x, np.inf) for name, x in values.items()}


def _cell_values(runs: RunTable) -> dict[str, np.ndarray]:
    """{variable: [n]}, the median over the runs of the same loss, schedule, S and η."""
    index, values = _cell_index(runs), _run_values(runs)
    result = {}
    for name, x in values.items():
        medians = np.array([np.quantile(x[index == cell], 0.5, method="lower") for cell in range(index.max() + 1)])
        result[name] = medians[index]
    return result


def _cell_index(runs: RunTable) -> np.ndarray:
    keys = list(zip(runs.algorithm, runs.schedule, runs.max_staleness.tolist(), runs.learning_rate.tolist(), strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def transfer_score(x, success, held_out, weights) -> np.ndarray:
    """Brier score of success predicted from x alone, with a curve from the other groups, each group in turn.

    Args:
      x: [n], larger is worse; infinite allowed.
      success: [n] bool.
      held_out: [n] label of the group, e.g. S.
      weights: [m, n] of the runs, one line for every resample.

    Returns:
      [m], the mean over groups, each counting the same; NaN where a resample leaves a group or its complement empty.
    """
    x, success, weights = (np.asarray(part, np.float64) for part in (x, success, weights))
    places, index = np.unique(x, return_inverse=True)
    scores = []
    for group in np.unique(held_out):
        inside = held_out == group
        train, test = (_counts(index[part], success[part], weights[:, part], len(places)) for part in (~inside, inside))
        scores.append([_brier(places, *parts) for parts in zip(*train, *test, strict=True)])
    return np.mean(scores, axis=0)


def _counts(index, success, weights, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the runs [m, p], and of those that succeed, at each of p values."""
    member = (index[:, None] == np.arange(num_places)).astype(np.float64)
    return weights @ member, (weights * success) @ member


def _brier(places, train, train_success, test, test_success) -> float:
    """Mean of (predicted − success)² over the test runs, from counts at the places."""
    if train.sum() == 0 or test.sum() == 0:
        return math.nan
    below, above, curve = _falling_curve(train_success, train)
    predicted = (curve[below] + curve[above]) / 2
    return float((test * predicted**2 - 2 * predicted * test_success + test_success).sum() / test.sum())


def isotonic_predictions(x, y, weights, at) -> np.ndarray:
    """The falling isotonic regression of y on x, read at other places; nothing but the order of x matters.

    Args:
      x, y, weights: [n]; runs of weight 0 are left out, at least one must stay.
      at: [k]; between two values of x the mean of both stands, beyond the first and last theirs.

    Returns:
      [k].
    """
    x, y, weights = (np.asarray(part, np.float64) for part in (x, y, weights))
    kept = weights > 0
    places, index = np.unique(x[kept], return_inverse=True)
    curve = _falling_curve(np.bincount(index, (weights * y)[kept]), np.bincount(index, weights[kept]))[2]
    below = np.maximum(np.searchsorted(places, at, side="right") - 1, 0)
    above = np.minimum(np.searchsorted(places, at, side="left"), len(places) - 1)
    return (curve[below] + curve[above]) / 2


def _falling_curve(sums, total) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The isotonic regression of sums/total at the places with weight [k], and for all p places their neighbors among those."""
    kept = total > 0
    weight = total[kept]
    curve = isotonic_regression(sums[kept] / weight, weights=weight, increasing=False).x
    counted = kept.cumsum()
    return np.maximum(counted - 1, 0), np.minimum(counted - kept, len(curve) - 1), curve


def _own_curve(runs: RunTable) -> float:
    """Brier score of η alone with a curve of its own for every S, from the other half of the seeds: what is to be reached."""
    success, halves = runs.outcome == "success", runs.seed % 2
    scores = []
    for s in np.unique(runs.max_staleness):
        inside = runs.max_staleness == s
        weights = np.ones((1, int(inside.sum())))
        scores.append(transfer_score(runs.learning_rate[inside], success[inside], halves[inside], weights)[0])
    return float(np.mean(scores))


def _boundaries(runs: RunTable, x: np.ndarray) -> list[dict[str, Any]]:
    """[{max_staleness, value}]: the variable where half of the runs succeed, None where that is not within the runs."""
    found = []
    for s in np.unique(runs.max_staleness):
        inside = runs.max_staleness == s
        found.append(
            {
                "max_staleness": int(s),
                "value": boundary_value(x[inside], runs.outcome[inside] == "success", np.ones(inside.sum())),
            }
        )
    return found


def boundary_value(x, success, weights) -> float | None:
    """The geometric mean of the two values of x between which the falling isotonic curve passes ½; None where it does not."""
    places = np.unique(x)
    curve = isotonic_predictions(np.asarray(x, np.float64), np.asarray(success, np.float64), weights, places)
    above, below = places[curve >= 0.5], places[curve < 0.5]
    if not len(above) or not len(below) or not above[-1] > 0 or not math.isfinite(below[0]):
        return None
    return math.sqrt(above[-1] * below[0])


def _cells(runs: RunTable, values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Share of success of every cell beside its variables: what the figure shows."""
    index, cells = _cell_index(runs), []
    for cell in range(index.max() + 1 if len(index) else 0):
        inside = index == cell
        first = int(np.argmax(inside))
        cells.append(
            {
                "max_staleness": int(runs.max_staleness[first]),
                "learning_rate": float(runs.learning_rate[first]),
                "share": float(np.mean(runs.outcome[inside] == "success")),
                "num_runs": int(inside.sum()),
                **{name: float(x[first]) for name, x in values.items()},
            }
        )
    return cells
