"""Study: do the cosine of consecutive gradients and γ of MSD announce a collapse, or mark something else?

A landmark analysis: at the end of every window the runs that still stand are told apart by what becomes of them later, and each
indicator, measured within that window, by how well it orders the two. The order is counted within strata alone, so that what
the strata share (the loss, S, η) cannot be what an indicator knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo.scaling import CollapseRule, msd_exponent
from jax_async_grpo.scaling.power_law import percentile_interval
from jax_async_grpo.studies.analysis import pieces, run, source_rows, validate_analysis
from jax_async_grpo.studies.runs import RunTable, run_table, seed_draws
from jax_async_grpo.studies.warnings_page import figures, page

__all__ = [
    "INDICATORS",
    "STRATA",
    "concordance",
    "figures",
    "page",
    "pieces",
    "run",
    "summary",
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
    "late_from",
    "num_bootstrap",
    "confidence",
    "seed",
)


def _window(name: str) -> Callable[[RunTable], np.ndarray]:
    return lambda runs: runs.windows[name]


def _constant(name: str) -> Callable[[RunTable], np.ndarray]:
    return lambda runs: np.repeat(getattr(runs, name)[:, None].astype(np.float64), len(runs.window_ends), axis=1)


# name -> (what it is, its value in every window [n, W])
INDICATORS: dict[str, tuple[str, Callable[[RunTable], np.ndarray]]] = {
    "cosine": ("cosine of consecutive gradients", _window("grad/cosine_prev")),
    "below_twin": (
        "twin cosine − consecutive cosine",
        lambda runs: runs.windows["grad/cosine_twin"] - runs.windows["grad/cosine_prev"],
    ),
    "twin": ("twin cosine", _window("grad/cosine_twin")),
    "eta": ("η", _constant("learning_rate")),
    "staleness": ("S", _constant("max_staleness")),
    "drift": ("drift ‖θ−φ‖", _window("drift/from_behavior")),
    "ess": ("ESS ratio", _window("off_policy/ess_ratio")),
    "grad_norm": ("gradient norm", _window("grad/norm")),
    "entropy": ("entropy", _window("entropy")),
    "reward": ("reward", _window("reward")),
}

# what two runs that are compared have in common, beside the window
STRATA: dict[str, tuple[str, ...]] = {
    "loss": ("algorithm",),
    "staleness": ("algorithm", "max_staleness"),
    "cell": ("algorithm", "max_staleness", "learning_rate"),
}


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, one line, on the first thing that cannot be analyzed."""
    validate_analysis(config, _KEYS, fractions=("confidence", "late_from"))


def summary(rows: Sequence[Any], config: Mapping[str, Any], sources: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """How well every indicator orders runs by their fate and by their lag, for every case.

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
    rule = CollapseRule(**config["rule"])
    cases = [{"case": case} | _case_record(run_table(source, case, rule), config) for case in config["cases"]]
    return {
        "cases": cases,
        "labels": {name: label for name, (label, _) in INDICATORS.items()},
        **{key: config[key] for key in ("source", "confidence", "num_bootstrap", "min_staleness", "late_from")},
    }


def _case_record(runs: RunTable, config: Mapping[str, Any]) -> dict[str, Any]:
    stale = runs.select(runs.max_staleness >= config["min_staleness"])
    sound, falls = _sound(stale), _falls(stale, stale.collapse_step)
    by_strata = {name: _aucs(stale, falls, keys, config) for name, keys in STRATA.items()}
    second = _falls(stale, stale.second_collapse_step)
    ends = runs.window_ends.tolist()
    return {
        "window_ends": ends,
        "num_runs": len(stale),
        "num_sound": int(sound.sum()),
        "num_falls": int(falls.sum()),
        "num_left_out": int((~sound & ~falls).sum()),
        "num_pairs": {name: aucs["cosine"]["num_pairs"] for name, aucs in by_strata.items()},
        "fall": by_strata,
        "second_rule": _aucs(stale, second, STRATA["staleness"], config),
        "any_failure": _aucs(stale, np.isfinite(stale.failure_step), STRATA["staleness"], config),
        "next_window": _aucs(stale, falls, STRATA["staleness"], config, next_only=True),
        "next_window_cell": _aucs(stale, falls, STRATA["cell"], config, next_only=True),
        "windows": [
            {"end": end} | _aucs(stale, falls, STRATA["staleness"], config, windows=[index])
            for index, end in enumerate(ends[:-1])
        ],
        "losses": {
            str(name): _aucs(stale.select(mask := stale.algorithm == name), falls[mask], STRATA["staleness"], config)
            for name in dict.fromkeys(stale.algorithm)
        },
        "lag": _lag_aucs(runs, config),
        "gamma": _gamma_record(stale, falls, config),
        "means": _means(runs),
        "same_without_lag": _same_without_lag(runs),
    }


def _sound(runs: RunTable) -> np.ndarray:
    """[n] runs that fail in no way to the end: no rule fired and the reward did not freeze."""
    return np.isin(runs.outcome, ("success", "never learned")) & np.isinf(runs.failure_step)


def _falls(runs: RunTable, collapse_step: np.ndarray) -> np.ndarray:
    """[n] runs that did not succeed and have collapsed by one of the rules."""
    return np.isfinite(collapse_step) & (runs.outcome != "success")


def _aucs(
    runs: RunTable,
    falls: np.ndarray,
    keys: Sequence[str],
    config: Mapping[str, Any],
    *,
    windows: Sequence[int] | None = None,
    next_only: bool = False,
) -> dict[str, dict[str, Any]]:
    """{indicator: AUC}: the chance that a run that falls later has the larger value, against a sound run of its stratum.

    Args:
      runs: of a case.
      falls: [n] which fall at some time.
      keys: what the runs of a stratum share, beside the window.
      config: of the study.
      windows: which; default all but the last.
      next_only: of the runs that fall, only those that had failed by the end of the next window.
    """
    last = len(runs.window_ends) - 1
    parts = []
    for window in range(last) if windows is None else windows:
        standing = runs.failure_step > runs.window_ends[window]
        soon = runs.failure_step <= runs.window_ends[window + 1] if next_only else True
        parts.append((window, standing & falls & soon, standing & _sound(runs)))
    return _scored(runs, parts, keys, config)


def _lag_aucs(runs: RunTable, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same count for lag: the chance that a sound run with S > 0 has the larger value than one without, at equal η."""
    sound = _sound(runs)
    lagged, synchronous = sound & (runs.max_staleness >= config["min_staleness"]), sound & (runs.max_staleness == 0)
    parts = [(window, lagged, synchronous) for window in range(len(runs.window_ends) - 1)]
    return _scored(runs, parts, ("algorithm", "learning_rate"), config)


def _scored(runs: RunTable, parts, keys: Sequence[str], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """AUCs of all indicators over [(window, positives [n], controls [n])]."""
    shared = np.stack([getattr(runs, key).astype(str) for key in keys])
    strata = np.unique(shared, axis=1, return_inverse=True)[1].ravel()
    windows = np.array([window for window, _, _ in parts])
    positive, control = (np.concatenate([part[index] for part in parts]) for index in (1, 2))
    kept = positive | control
    repeated = np.tile(strata, len(parts)) + len(strata) * np.repeat(np.arange(len(parts)), len(runs))
    seeds = np.tile(runs.seed, len(parts))
    result = {}
    for name, (_, function) in INDICATORS.items():
        values = function(runs)[:, windows].T.ravel()
        result[name] = _auc(values[kept], positive[kept], repeated[kept], seeds[kept], config)
    return result


def _auc(values, positive, strata, seeds, config: Mapping[str, Any]) -> dict[str, Any]:
    """AUC with an interval over seeds; None where no stratum has both kinds."""
    wins, pairs = concordance(values, positive, strata, seeds)
    total = float(pairs.sum())
    if total == 0:
        return {"auc": None, "interval": None, "num_pairs": 0}
    draws = seed_draws(len(wins), config["num_bootstrap"], config["seed"])
    won, counted = (np.einsum("bi,ij,bj->b", draws, matrix, draws, optimize=True) for matrix in (wins, pairs))
    kept = counted > 0
    resampled = won[kept] / counted[kept]
    enough = kept.mean() > 0.5 and len(wins) > 1
    interval = percentile_interval(resampled[:, None], config["confidence"], len(wins))[0].tolist() if enough else None
    return {"auc": float(wins.sum() / total), "interval": interval, "num_pairs": int(total)}


def concordance(values, positive, strata, seeds) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a positive and a control of one stratum, by their seeds, and how many the values order upwards (ties ½).

    Their sums give the stratified AUC, Σ U / Σ n₁n₀ with the Mann-Whitney U of each stratum; counted by seed, a resample of the
    seeds with multiplicities w has wᵀ·wins·w and wᵀ·pairs·w.

    Args:
      values: [n]; runs without a number are left out.
      positive: [n] bool, else control.
      strata, seeds: [n] labels.

    Returns:
      (wins, pairs), both [k, k] for k distinct seeds: first axis the positive's.
    """
    labels, index = np.unique(seeds, return_inverse=True)
    wins, pairs = np.zeros((2, len(labels), len(labels)))
    usable = ~np.isnan(values)
    for stratum in np.unique(strata[usable]):
        inside = usable & (strata == stratum)
        high, low = np.flatnonzero(inside & positive), np.flatnonzero(inside & ~positive)
        if len(high) and len(low):
            where = index[high][:, None], index[low][None]
            larger, equal = values[high][:, None] > values[low], values[high][:, None] == values[low]
            np.add.at(wins, where, larger + 0.5 * equal)
            np.add.at(pairs, where, 1.0)
    return wins, pairs


def _gamma_record(runs: RunTable, falls: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """γ of late falls against that of sound runs: MSD is a mean over the whole run, mostly clean of a late fall alone."""
    late = falls & (runs.failure_step > config["late_from"] * runs.window_ends[-1])
    sound = _sound(runs)
    runs, late = runs.select(late | sound), late[late | sound]
    gamma = np.array([_gamma(msd) for msd in runs.msd.tolist()])
    record: dict[str, Any] = {"num_late": int(late.sum()), "num_without": int(np.isnan(gamma).sum())}
    for name in ("staleness", "cell"):
        shared = np.stack([getattr(runs, key).astype(str) for key in STRATA[name]])
        strata = np.unique(shared, axis=1, return_inverse=True)[1].ravel() if len(runs) else np.zeros(0)
        record[name] = _auc(gamma, late, strata, runs.seed, config)
    record["medians"] = [
        {
            "loss": str(name),
            "max_staleness": int(s),
            "sound": _median(gamma[inside & ~late]),
            "late": _median(gamma[inside & late]),
            "num_late": int((inside & late).sum()),
        }
        for name in dict.fromkeys(runs.algorithm)
        for s in np.unique(runs.max_staleness)
        if (inside := (runs.algorithm == name) & (runs.max_staleness == s)).any()
    ]
    return record


def _gamma(msd: Mapping[int, float]) -> float:
    """γ of one run; NaN where its MSD does not give one."""
    try:
        return float(msd_exponent(list(msd), list(msd.values()), num_bootstrap=100).exponents[0])
    except ValueError:
        return math.nan


def _median(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else None


def _same_without_lag(runs: RunTable) -> bool:
    """Whether the runs at S = 0 are the same for all losses (at ratio 1 many losses have one gradient)."""
    parts = [runs.select((runs.max_staleness == 0) & (runs.algorithm == name)) for name in dict.fromkeys(runs.algorithm)]
    rewards = [part.windows["reward"] for part in parts if len(part)]
    return len(rewards) > 1 and all(np.array_equal(other, rewards[0]) for other in rewards[1:])


def _means(runs: RunTable) -> list[dict[str, Any]]:
    """Cosines of every (loss, S, η) in the first window: of sound runs, and of those that fall after it."""
    sound, falls = _sound(runs), _falls(runs, runs.collapse_step) & (runs.failure_step > runs.window_ends[0])
    cosine, twin = runs.windows["grad/cosine_prev"][:, 0], runs.windows["grad/cosine_twin"][:, 0]
    found = []
    for name in dict.fromkeys(runs.algorithm):
        for s in np.unique(runs.max_staleness):
            for rate in np.unique(runs.learning_rate):
                inside = (runs.algorithm == name) & (runs.max_staleness == s) & (runs.learning_rate == rate)
                record = {"loss": str(name), "max_staleness": int(s), "learning_rate": float(rate)}
                for kind, group in (("sound", inside & sound), ("falls", inside & falls)):
                    group = group & ~np.isnan(cosine) & ~np.isnan(twin)
                    record[f"num_{kind}"] = int(group.sum())
                    record[f"cosine_{kind}"] = float(cosine[group].mean()) if group.any() else None
                    record[f"twin_{kind}"] = float(twin[group].mean()) if group.any() else None
                if record["num_sound"] or record["num_falls"]:
                    found.append(record)
    return found
