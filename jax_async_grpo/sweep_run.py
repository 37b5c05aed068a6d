"""Sweeps of whole training runs over (S, η, seed, loss): from a config to chunks of runs, and from chunks to records.

Records in metrics.jsonl, one JSON object a line: "start" (once per case: the reward before the first update and the best there
is), "cell" (all seeds of one (case, algorithm, schedule, S, η)) and "piece" (written last, so that a chunk without it does not
count). A shorter horizon is read off the same run, so horizons cost nothing. Records depend on the config alone: a sweep
that was killed and continued ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import exact, experiment, invariants, sweeps
from jax_async_grpo.config_checks import (
    check_choice,
    check_distinct,
    check_integer,
    check_keys,
    check_mapping,
    check_number,
    check_rule,
    first_line,
    resolve,
)
from jax_async_grpo.records import Workdir

__all__ = ["SweepChunk", "build_case", "chunks", "describe", "finished_chunks", "run_chunks", "validate"]

PRECISIONS = ("float32", "float64")
_SHARED_KEYS = ("group_size", "advantage", "advantage_options", "aggregation", "aggregation_options", "max_compositions")
_TOP_KEYS = ("seed", "precision", *_SHARED_KEYS, "rule", "level", "confidence", "algorithms", "cases")
_ALGORITHM_KEYS = ("loss", "loss_options", "control", "control_options")
_CASE_KEYS = (
    "policy",
    "policy_options",
    "task",
    "task_options",
    "warm_start",
    "optimizer",
    "optimizer_options",
    "algorithms",
    "updates",
    "schedules",
    "max_staleness",
    "learning_rates",
    "num_updates",
    "num_measurements",
    "num_windows",
    "first_seed",
    "num_seeds",
    "vectorize",
)
_TRACED_KEYS = (
    "algorithms",
    "schedules",
    "max_staleness",
    "learning_rates",
    "num_updates",
    "num_measurements",
    "num_windows",
    "first_seed",
    "num_seeds",
)  # what may differ between cases that share a compiled program
_REWARD_DIGITS, _DIGITS = 4, 3  # of recorded numbers: records are kept, and what is sampled is not known any better
_LEFT_OUT = ("staleness/realised", "drift/cumulative")  # in no rule; they would make the records longer
_INVARIANT_TOLERANCE = 0.0  # both are exact statements


@dataclasses.dataclass(frozen=True)
class SweepChunk:
    """The runs of one case and algorithm that share a learning rate: one call of the compiled program.

    Attributes:
      case, algorithm: their keys in the config.
      learning_rate: η.
      cells: the runs, all seeds of one (schedule, S) after another.
    """

    case: str
    algorithm: str
    learning_rate: float
    cells: tuple[experiment.Cell, ...]

    @property
    def name(self) -> str:
        """Unique within a config."""
        return f"{self.case}/{self.algorithm}/{self.learning_rate:g}"


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError on the first thing in the config that cannot be run; builds no task."""
    check_keys(config, _TOP_KEYS, "")
    check_integer(config["seed"], "seed", minimum=0)
    check_integer(config["group_size"], "group_size", minimum=2)
    check_integer(config["max_compositions"], "max_compositions", minimum=1)
    if config["precision"] not in PRECISIONS:
        raise ValueError(f"config.precision is {config['precision']!r}; it must be one of {PRECISIONS}")
    for key in ("level", "confidence"):
        check_number(config[key], key, lambda x: 0 < x < 1, "between 0 and 1")
    for key in ("advantage_options", "aggregation_options", "algorithms", "cases"):
        check_mapping(config[key], key)
    check_rule(config["rule"])
    for kind in ("algorithms", "cases"):
        if not config[kind]:
            raise ValueError(f"config.{kind} is empty; there is nothing to run")
    for name, part in config["algorithms"].items():
        check_keys(part, _ALGORITHM_KEYS, f"algorithms.{name}")
        for key in ("loss_options", "control_options"):
            check_mapping(part[key], f"algorithms.{name}.{key}")
        experiment.build_algorithm(_view(config, next(iter(config["cases"])), name))
        _control(part, f"algorithms.{name}")
    for name, part in config["cases"].items():
        _validate_case(config, part, f"cases.{name}")


def chunks(config: Mapping[str, Any]) -> list[SweepChunk]:
    """All chunks of the config, in the order in which they run."""
    result = []
    for name, part in config["cases"].items():
        cells = tuple(
            experiment.Cell(schedule, int(max_staleness), seed)
            for schedule in part["schedules"]
            for max_staleness in part["max_staleness"]
            for seed in _seeds(part)
        )
        result += [
            SweepChunk(name, algorithm, float(rate), cells)
            for algorithm in part["algorithms"]
            for rate in part["learning_rates"]
        ]
    return result


def describe(config: Mapping[str, Any]) -> str:
    """The plan and its size, as `--dry_run` prints it."""
    width = max(map(len, ["case", *config["cases"]])) + 2
    lines = [f"{'case':<{width}}algorithms  {'S':<15}eta from .. to     seeds  updates  runs"]
    for name, part in config["cases"].items():
        num_runs = math.prod(len(part[key]) for key in ("algorithms", "schedules", "max_staleness", "learning_rates"))
        rates, lags = part["learning_rates"], ",".join(map(str, part["max_staleness"]))
        lines.append(
            f"{name:<{width}}{len(part['algorithms']):>10}  {lags:<15}{min(rates):<9g}{max(rates):<9g}{part['num_seeds']:>6}"
            f"{part['num_updates']:>9}{num_runs * part['num_seeds']:>6}"
        )
    lines.append(f"{len(chunks(config))} chunks; records after each, so an interrupted sweep continues where it was")
    return "\n".join(lines)


def finished_chunks(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the chunks whose records are complete."""
    return {row["piece"] for row in rows if row["kind"] == "piece"}


def build_case(config: Mapping[str, Any], name: str, algorithm: str) -> experiment.Case:
    """The case with one of its algorithms: policy, task, θ_0, optimizer and control transformation.

    Raises:
      ValueError: as `experiment.build_case`, or the optimizer refuses its options.
    """
    case = experiment.build_case(_view(config, name, algorithm), name)
    control, optimizer_fn = _control(config["algorithms"][algorithm], f"algorithms.{algorithm}"), case.optimizer_fn
    try:
        jax.eval_shape(lambda params: optimizer_fn(0.1).init(params), case.params)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config.cases.{name}.optimizer ({case.config['optimizer']}): {first_line(error)}") from None
    if control is None:
        return case
    return dataclasses.replace(case, optimizer_fn=lambda learning_rate: optax.chain(optimizer_fn(learning_rate), control()))


def run_chunks(
    config: Mapping[str, Any],
    workdir: Workdir,
    on_chunk: Callable[[str, float], None],
    programs: dict[Any, tuple[experiment.Case, Callable]] | None = None,
    on_program: Callable[[str], None] = lambda name: None,
) -> None:
    """Runs every chunk the workdir does not hold yet.

    Cases that differ in nothing but S, η, seeds and horizon share one compiled program (and θ_0), if their chunks have the same
    number of runs and measurements.

    Args:
      config: validated.
      workdir: where the records go.
      on_chunk: called after each chunk with its name and seconds (0 for one that was recorded before).
      programs: compiled by an earlier call, to be used again; those compiled here are added.
      on_program: called with the name of a chunk whose warm start and compilation come first, which can take minutes.

    Raises:
      invariants.InvariantViolation: naming chunk, invariant, step and value; the chunk is not recorded.
    """
    rows = workdir.read_metrics()
    done, started = finished_chunks(rows), {row["case"] for row in rows if row["kind"] == "start"}
    programs = {} if programs is None else programs
    for chunk in chunks(config):
        if chunk.name in done:
            on_chunk(chunk.name, 0.0)
            continue
        start = time.perf_counter()
        part, capacity, length = config["cases"][chunk.case], *_sizes(config, chunk.case)
        key = (json.dumps([_world(part), config["algorithms"][chunk.algorithm]], sort_keys=True), capacity, length)
        if key not in programs:
            on_program(chunk.name)
            case = build_case(config, chunk.case, chunk.algorithm)
            programs[key] = case, _compile(case, capacity)
        case, program = programs[key]
        if chunk.case not in started:
            workdir.append_metrics([_start_row(case) | {"case": chunk.case, "piece": chunk.name}])
            started.add(chunk.case)
        curves = program(case.params, *_inputs(config, chunk, length))
        _check(chunk, curves.violations, _measure_steps(part))
        workdir.append_metrics([*_rows(case, part, chunk, curves), {"kind": "piece", "piece": chunk.name}])
        on_chunk(chunk.name, time.perf_counter() - start)


def _view(config, case: str, algorithm: str) -> dict[str, Any]:
    """The config of one case and algorithm, as `experiment` reads it."""
    part = config["algorithms"][algorithm]
    shared = {key: config[key] for key in ("seed", *_SHARED_KEYS)}
    loss = dict(loss=part["loss"], loss_options=part["loss_options"], unclipped_loss=part["loss"])
    return {**shared, **loss, "cases": {case: config["cases"][case]}}


def _control(part, field) -> Callable[[], optax.GradientTransformation] | None:
    """Makes the transformation behind the optimizer; None where the algorithm has none."""
    if not part["control"]:
        return None
    factory, options = resolve(part["control"], f"{field}.control"), dict(part["control_options"])
    try:
        factory(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{field}.control ({part['control']}): {first_line(error)}") from None
    return lambda: factory(**options)


def _validate_case(config, part, field):
    check_keys(part, _CASE_KEYS, field)
    experiment.check_grid(part, field)
    experiment.check_world(part, field)
    check_choice(part, "algorithms", tuple(config["algorithms"]), field)
    check_distinct(part["algorithms"], part["algorithms"], f"{field}.algorithms")
    if part["updates"] not in experiment.UPDATES:
        raise ValueError(f"config.{field}.updates is {part['updates']!r}; it must be one of {experiment.UPDATES}")
    for key, least in (("num_updates", 1), ("num_measurements", 2), ("num_windows", 1), ("first_seed", 0), ("num_seeds", 1)):
        check_integer(part[key], f"{field}.{key}", minimum=least)
    for count, of in (("num_measurements", "num_updates"), ("num_windows", "num_measurements")):
        if part[of] % part[count]:
            raise ValueError(f"config.{field}.{of} is {part[of]}; it must be a multiple of {count} = {part[count]}")
    if max(part["max_staleness"]) >= part["num_updates"]:
        raise ValueError(
            f"config.{field}.max_staleness holds {max(part['max_staleness'])}; a run of num_updates = {part['num_updates']} "
            "never sees such a lag"
        )
    if not isinstance(part["vectorize"], bool):
        raise ValueError(f"config.{field}.vectorize is {part['vectorize']!r}; it must be True or False")


def _seeds(part) -> range:
    return range(part["first_seed"], part["first_seed"] + part["num_seeds"])


def _measure_steps(part) -> np.ndarray:
    """[M] learner updates, one in each of M equal strata: the last; where the lag varies, a random one of no favored phase."""
    stratum = part["num_updates"] // part["num_measurements"]
    ends = (np.arange(part["num_measurements"]) + 1) * stratum
    if tuple(part["schedules"]) == ("fixed",):
        return ends
    early = np.random.default_rng(part["first_seed"]).integers(0, stratum, len(ends) - 1)
    return ends - np.append(early, 0)  # the horizon itself is always measured


def _world(part) -> dict[str, Any]:
    """What a compiled program depends on; the rest of a case is traced."""
    return {key: part[key] for key in _CASE_KEYS if key not in _TRACED_KEYS}


def _sizes(config, name: str) -> tuple[int, int]:
    """(K, longest horizon) over all cases of the same world: fixed by the config, so that a resumed sweep compiles the same."""
    world = _world(config["cases"][name])
    parts = [part for part in config["cases"].values() if _world(part) == world]
    return max(max(part["max_staleness"]) for part in parts) + 2, max(part["num_updates"] for part in parts)


def _compile(case: experiment.Case, capacity: int) -> Callable:
    def observe(learner_params, behavior_params):
        rewards = case.rewards(learner_params)
        return rewards | exact.off_policy(case.policy, learner_params, behavior_params, case.task)

    def extra_args(learner_params, behavior_params, step, policy_version):
        del step, policy_version
        measures = exact.off_policy(case.policy, learner_params, behavior_params, case.task)
        return {"ess": measures["off_policy/ess_ratio"]}

    return sweeps.training_grid(
        case.update_gradient(case.config["updates"]),
        observe,
        case.optimizer_fn,
        extra_args_fn=extra_args,
        capacity=capacity,
        vectorize=case.config["vectorize"],
    )


def _inputs(config, chunk: SweepChunk, length: int) -> tuple:
    part = config["cases"][chunk.case]
    root = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    seeds = np.array([cell.seed for cell in chunk.cells])
    return (
        np.full(len(chunk.cells), chunk.learning_rate),
        np.stack([cell.staleness(config["seed"], length + 1) for cell in chunk.cells]),
        jax.vmap(lambda seed: jax.random.fold_in(root, seed))(seeds),
        _measure_steps(part),
    )


def _check(chunk: SweepChunk, violations: Mapping[str, np.ndarray], steps: np.ndarray) -> None:
    """Raises InvariantViolation with the run it happened in. Runs may become non-finite: that is an outcome, not a defect."""
    for index, cell in enumerate(chunk.cells):
        mine = {name: np.nan_to_num(value[index]) for name, value in violations.items()}
        try:
            invariants.check(mine, steps, dict.fromkeys(mine, _INVARIANT_TOLERANCE))
        except invariants.InvariantViolation as violation:
            where = f"{chunk.name}, {cell.schedule} S={cell.max_staleness} seed {cell.seed}"
            raise invariants.InvariantViolation(f"{where}: {violation}") from None


def _start_row(case: experiment.Case) -> dict[str, Any]:
    """Rewards before the first update, and the best a policy can get."""
    rewards = jax.jit(case.rewards)(case.params)
    task = case.task
    return {
        "kind": "start",
        "case": case.name,
        "policy": case.labels["policy"],
        "task": task.name,
        "optimizer": case.labels["optimizer"],
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(case.params)),
        "reward": float(rewards["reward"]),
        "gold_reward": float(rewards["gold_reward"]),
        "ceiling": float(jnp.mean(jnp.max(task.rewards, axis=1))),
        "gold_ceiling": float(jnp.mean(jnp.max(task.gold_rewards, axis=1))),
    }


def _rows(case: experiment.Case, part, chunk: SweepChunk, curves: sweeps.TrainingCurves) -> list[dict[str, Any]]:
    """A row for all seeds of one (schedule, S)."""
    num_seeds = part["num_seeds"]
    return [
        _row(case, part, chunk, jax.tree.map(lambda leaf, i=i: leaf[i : i + num_seeds], curves), chunk.cells[i])
        | {"seeds": list(_seeds(part))}
        for i in range(0, len(chunk.cells), num_seeds)
    ]


def _row(case, part, chunk, curves, cell) -> dict[str, Any]:
    """Rewards at every measured step; what else was measured as means over equal windows of the run."""
    values = dict(curves.values)
    is_proxy = not np.array_equal(case.task.rewards, case.task.gold_rewards)
    series = {name: values.pop(name) for name in ("reward", "gold_reward")}
    if not is_proxy:
        del series["gold_reward"]
    steps, lags = _measure_steps(part), _recorded_lags(cell.max_staleness)
    msd = curves.msd[:, steps >= max(lags), :][:, :, lags].mean(axis=1)
    kept = {name: value for name, value in values.items() if name not in _LEFT_OUT}
    windowed = {name: _window_means(value, part["num_windows"]) for name, value in kept.items()}
    return {
        "kind": "cell",
        "piece": chunk.name,
        "case": chunk.case,
        "algorithm": chunk.algorithm,
        "schedule": cell.schedule,
        "max_staleness": cell.max_staleness,
        "learning_rate": chunk.learning_rate,
        "steps": steps.tolist(),
        **{name: _rounded(value, _REWARD_DIGITS) for name, value in series.items()},
        "window_ends": steps[len(steps) // part["num_windows"] - 1 :: len(steps) // part["num_windows"]].tolist(),
        "windows": {name: _rounded(value) for name, value in windowed.items()},
        "msd_lags": lags,
        "msd": _rounded(msd),
    }


def _recorded_lags(max_staleness: int) -> list[int]:
    """1, the powers of two below S, and S."""
    powers = [2**k for k in range(max_staleness.bit_length()) if 2**k < max_staleness]
    return sorted({1, *powers, max(max_staleness, 1)})


def _window_means(values: np.ndarray, num_windows: int) -> np.ndarray:
    """[n, M] -> [n, num_windows]."""
    return values.reshape(len(values), num_windows, -1).mean(axis=-1)


def _rounded(values: np.ndarray, digits: int = _DIGITS) -> list:
    """Nested lists of floats of so many digits."""
    if values.ndim > 1:
        return [_rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values]
