"""Rows for a plan from the workdirs of `launch.train`, by the columns of `plan_log`.

A row is an update t and, where θ_t was evaluated, its held-out reward; the evaluation behind the last update is a row too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jax_async_grpo import records
from jax_async_grpo.config_checks import job_of

__all__ = ["read_training", "training_notes"]

# Where runs of one plan may differ: what is planned, what is drawn, what is only watched, and where it is computed.
_FREE = frozenset("seed num_updates staleness replay ring evaluation bias checkpoint mesh track plan rule".split())
_WHOLE = 1e-3  # of a mean staleness in float32
_ADVICE = "give a file or the --workdir of launch.train"


def read_training(folder: Path, name: str) -> tuple[list[tuple[str, dict[str, Any]]], Mapping[str, Any]]:
    """([(place, row by the columns of a log)] of a run, its config).

    Args:
      folder: the --workdir of `launch.train`, finished or not.
      name: of the run.

    Raises:
      ValueError: the folder is no training run's, or it has no records, no update or no evaluation yet.
    """
    try:
        config = records.read_json(folder / "config.json")
    except (OSError, ValueError):
        raise ValueError(f"--log={folder} is a folder without a config.json; {_ADVICE}") from None
    if job_of(config) != "train":
        raise ValueError(f"--log={folder} is the folder of another job; {_ADVICE}")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"--log={folder} has no metrics.jsonl: the run has not begun")
    found = records.read_jsonl(path)
    updates, evaluations = ([row for row in found if row["kind"] == kind] for kind in ("update", "evaluation"))
    for what, there in (("update", updates), ("evaluation", evaluations)):
        if not there:
            raise ValueError(f"--log={folder} has no {what} in its metrics.jsonl yet: it says nothing for a plan")
    return _rows(path, name, config, updates, evaluations), config


def training_notes(configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What a reader of the plan must know about runs whose configs are these, by name."""
    reused = sorted(name for name, config in configs.items() if config["updates_per_batch"] > 1)
    notes = (f"data are used more than once in {', '.join(reused)}: their lag exceeds S",) if reused else ()
    differ = _differences(configs.values())
    return notes + ((f"the training runs differ in {', '.join(differ)}: a plan supposes that they do not",) if differ else ())


def _rows(path: Path, name: str, config, updates: Sequence[Mapping], evaluations: Sequence[Mapping]):
    """Rows ascending in step; η of a row without an update is that of the update before."""
    rewards = {row["step"]: row["heldout_reward"] for row in evaluations}
    slowest = min((row["lr/current"] for row in updates if row["lr/current"] > 0), default=math.nan)
    made = {row["step"]: _of_update(row, slowest) for row in updates}
    for step in rewards.keys() - made.keys():
        before = [rate for at, rate in ((at, made[at]["learning_rate"]) for at in sorted(made)) if at <= step]
        made[step] = {"learning_rate": before[-1] if before else slowest}
    stated = {"run": name, "max_staleness": config["staleness"]["max"], "outcome": _outcome(config, updates)}
    return [
        (f"{path}: step {step}", stated | {"step": step, "reward": rewards.get(step)} | made[step]) for step in sorted(made)
    ]


def _of_update(row: Mapping[str, Any], slowest: float) -> dict[str, Any]:
    """The measured columns; none where η_t = 0, as what is measured per η says nothing there."""
    if not row["lr/current"] > 0:
        return {"learning_rate": slowest}
    staleness = row["staleness/mean"]
    cells = {
        "learning_rate": row["lr/current"],
        "update_norm": row["update/norm"],
        "clip_fraction": _within(row["pg_clipfrac"]) if "pg_clipfrac" in row else None,
        "ess": _within(row["off_policy/ess_ratio"]),
    }
    if math.isfinite(staleness) and abs(staleness - round(staleness)) < _WHOLE:
        # an empty staleness would stand for S, so what belongs to a lag is left out with it
        kl = max(row["off_policy/k3_kl"], 0.0)
        cells |= {"staleness": round(staleness), "kl": kl, "drift": row.get("drift/from_behavior")}
    return cells


def _within(share: float) -> float:
    """Float32 takes a share of 1 just above it."""
    return min(share, 1.0)


def _outcome(config: Mapping[str, Any], updates: Sequence[Mapping[str, Any]]) -> str:
    """ "non-finite" where the job gave up, else "": the rewards decide."""
    last = updates[-config["max_bad_updates"] :]
    gave_up = len(last) == config["max_bad_updates"] and not any(row["update/is_finite"] for row in last)
    return "non-finite" if gave_up else ""


def _differences(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys in which configs differ and, of one plan, should not."""
    flat = [flatten_dict(dict(config), sep=".", is_leaf=lambda _, value: not value) for config in configs]
    keys = {key for config in flat for key in config if key.partition(".")[0] not in _FREE} - {"optimizer.learning_rate"}
    return sorted(key for key in keys if len({repr(config.get(key)) for config in flat}) > 1)
