"""One line per training run of a sweep: what it was given, what was measured along it, how and when it failed.

For studies that ask of single runs what a sweep's summary asks of cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo import sweep_summary
from jax_async_grpo.scaling import CollapseRule

__all__ = ["RunTable", "run_table", "seed_draws"]


@dataclasses.dataclass(frozen=True, eq=False)
class RunTable:
    """n runs of one case of a sweep, W windows a run.

    Attributes:
      algorithm, schedule: [n] keys of the sweep's config.
      max_staleness: [n] S, updates.
      learning_rate: [n] η.
      seed: [n]; equal seeds of two cells drew the same noise.
      outcome: [n], of `scaling.OUTCOMES`.
      collapse_step, second_collapse_step: [n] of either rule of `scaling.classify_run`; inf where it did not fire.
      failure_step: [n] when a run had failed in any way: the earlier collapse step or, for a frozen run, the step from which
        its reward stands still; inf for a run that did neither.
      window_ends: [W] last measured step of each window.
      windows: {name: [n, W]} means over the windows; `reward` among them.
      msd: n dicts {lag: mean of ‖θ_t − θ_{t−lag}‖² over the whole run}.
    """

    algorithm: np.ndarray
    schedule: np.ndarray
    max_staleness: np.ndarray
    learning_rate: np.ndarray
    seed: np.ndarray
    outcome: np.ndarray
    collapse_step: np.ndarray
    second_collapse_step: np.ndarray
    failure_step: np.ndarray
    window_ends: np.ndarray
    windows: dict[str, np.ndarray]
    msd: np.ndarray

    def __len__(self) -> int:
        return len(self.seed)

    def select(self, mask: np.ndarray) -> RunTable:
        """The runs for which `mask` [n] is true."""
        shared = {"window_ends": self.window_ends, "windows": {name: part[mask] for name, part in self.windows.items()}}
        names = [field.name for field in dataclasses.fields(self) if field.name not in shared]
        return RunTable(**{name: getattr(self, name)[mask] for name in names}, **shared)


def run_table(rows: Sequence[Mapping[str, Any]], case: str, rule: CollapseRule) -> RunTable:
    """The runs of one case.

    Args:
      rows: of the metrics.jsonl of a sweep.
      case: its key in the sweep's config.
      rule: what collapse is.

    Returns:
      A `RunTable`.

    Raises:
      ValueError: the rows hold no run of the case.
    """
    cells = [cell for key, group in sweep_summary.groups(rows).items() if key[0] == case for cell in group]
    if not cells:
        raise ValueError(f"case={case!r} has no cell in the records")
    fates = [fate for cell in cells for fate in sweep_summary.fates(cell, rule)]
    sizes = [len(cell["seeds"]) for cell in cells]

    def each(key, dtype=None):
        return np.repeat(np.array([cell[key] for cell in cells], dtype), sizes)

    first, second = (
        np.array([math.inf if getattr(fate, name) is None else getattr(fate, name) for fate in fates])
        for name in ("collapse_step", "collapse_step_second_rule")
    )
    outcome = np.array([fate.outcome for fate in fates])
    frozen = np.where(outcome == "frozen", np.concatenate([_standstill(cell, rule) for cell in cells]), math.inf)
    windows = {name: np.concatenate([_numbers(cell["windows"][name]) for cell in cells]) for name in cells[0]["windows"]}
    windows["reward"] = np.concatenate(
        [cell["judged"].reshape(len(cell["judged"]), len(cell["window_ends"]), -1).mean(axis=-1) for cell in cells]
    )
    return RunTable(
        algorithm=each("algorithm"),
        schedule=each("schedule"),
        max_staleness=each("max_staleness"),
        learning_rate=each("learning_rate", np.float64),
        seed=np.concatenate([cell["seeds"] for cell in cells]),
        outcome=outcome,
        collapse_step=first,
        second_collapse_step=second,
        failure_step=np.minimum(np.minimum(first, second), frozen),
        window_ends=np.array(cells[0]["window_ends"]),
        windows=windows,
        msd=np.array([dict(zip(cell["msd_lags"], run, strict=True)) for cell in cells for run in cell["msd"]], object),
    )


def seed_draws(num_seeds: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """[num_bootstrap, num_seeds] how often each seed stands in each resample of the seeds."""
    shares = np.full(num_seeds, 1 / num_seeds)
    return np.random.default_rng(seed).multinomial(num_seeds, shares, size=num_bootstrap).astype(np.float64)


def _standstill(cell: Mapping[str, Any], rule: CollapseRule) -> np.ndarray:
    """[n] first recorded step from which on the reward of a run stays within the rule's tolerance."""
    backwards = np.asarray(cell["judged"])[:, ::-1]
    spread = np.maximum.accumulate(backwards, axis=1) - np.minimum.accumulate(backwards, axis=1)
    still = spread[:, ::-1] < rule.frozen_tolerance * (cell["ceiling"] - cell["start_reward"])
    return np.asarray(cell["steps"], np.float64)[np.argmax(still, axis=1)]


def _numbers(values) -> np.ndarray:
    return np.array(values, np.float64)
