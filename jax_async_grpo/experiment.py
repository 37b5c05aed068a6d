"""From a config to the objects of a bias measurement: everything is checked here, before anything is traced.

Config values that are behavior are dotted names, resolved once: `"jax_async_grpo.losses.ppo_clip"`, or a user's own
`"my_package.my_loss"`. What the keys mean stands in `configs/measure_bias.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import bias, compositions, exact, sampling, staleness, surrogate, warm_start
from jax_async_grpo.aggregation import sequence_mean
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.config_checks import (
    check_choice,
    check_distinct,
    check_integer,
    check_keys,
    check_mapping,
    check_number,
    check_window,
    first_line,
    resolve,
)
from jax_async_grpo.types import Params, Policy, Task

__all__ = [
    "Algorithm",
    "Case",
    "Cell",
    "Chunk",
    "build_algorithm",
    "build_case",
    "check_algorithm",
    "check_case",
    "check_grid",
    "check_world",
    "chunks",
    "describe",
    "validate",
]

SCHEDULES = ("fixed", "periodic", "random")
UPDATES = ("exact", "sampled")
FIT_VARIABLES = ("staleness_x_learning_rate", "drift")
MIN_CYCLES = 4
MAX_UPDATES = 2**31 - 1  # steps are int32
_TINY_DRIFT = 1e-5  # of logits: inside every clip, and far above rounding in float64

_TOP_KEYS = (
    "seed",
    "group_size",
    "loss",
    "loss_options",
    "unclipped_loss",
    "advantage",
    "advantage_options",
    "aggregation",
    "aggregation_options",
    "max_compositions",
    "clip_level",
    "clip_epsilons",
    "collapse_fraction",
    "confidence",
    "num_bootstrap",
    "cases",
)
_CASE_KEYS = (
    "policy",
    "policy_options",
    "task",
    "task_options",
    "warm_start",
    "optimizer",
    "optimizer_options",
    "updates",
    "schedules",
    "max_staleness",
    "learning_rates",
    "time_window",
    "num_measurements",
    "num_seeds",
    "fit_variable",
    "fit_window",
    "vectorize",
    "first_order",
    "horizon_learning_rate",
    "horizon_updates",
)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What is averaged and differentiated; the same for every case.

    Attributes:
      group_size: G.
      loss_fn, unclipped_loss_fn, advantage_fn, aggregation_fn: as in `exact.surrogate_objective`.
      max_compositions: as there.
      loss_name: for the records.
    """

    group_size: int
    loss_fn: Callable
    unclipped_loss_fn: Callable
    advantage_fn: Callable
    aggregation_fn: Callable
    max_compositions: int
    loss_name: str

    def arguments(self, *, clipped: bool = True) -> dict[str, Any]:
        """Keyword arguments of `exact.surrogate_gradient`."""
        return dict(
            group_size=self.group_size,
            loss_fn=self.loss_fn if clipped else self.unclipped_loss_fn,
            advantage_fn=self.advantage_fn,
            aggregation_fn=self.aggregation_fn,
            max_compositions=self.max_compositions,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy on a task with an optimizer, ready to run.

    Attributes:
      name: its key in the config.
      policy, task, params: with θ_0 after the warm start, if there is one.
      algorithm: shared.
      optimizer_fn: learning rate -> optax transformation.
      config: the case's own part of the config.
      labels: policy, task, optimizer and loss, for the records.
    """

    name: str
    policy: Policy
    task: Task
    params: Params
    algorithm: Algorithm
    optimizer_fn: Callable
    config: Mapping[str, Any]
    labels: dict[str, str]

    def gradient(self, learner_params: Params, behavior_params: Params) -> Params:
        """H(θ,φ), exactly."""
        return exact.surrogate_gradient(self.policy, learner_params, behavior_params, self.task, **self.algorithm.arguments())

    def role_gradient(self, learner_params, sampling_params, denominator_params, statistics_params, *, clipped=True) -> Params:
        """H with the behavior policy's three roles apart."""
        return exact.surrogate_gradient(
            self.policy,
            learner_params,
            denominator_params,
            self.task,
            sampling_params=sampling_params,
            statistics_params=statistics_params,
            **self.algorithm.arguments(clipped=clipped),
        )

    def update_gradient(self, updates: str) -> Callable:
        """What the learner follows: `(key, learner_params, behavior_params, step, policy_version)` -> gradient."""

        def exact_update(key, learner_params, behavior_params, step, policy_version):
            del key, step, policy_version  # nothing is drawn
            return self.gradient(learner_params, behavior_params)

        def sampled_update(key, learner_params, behavior_params, step, policy_version):
            rollouts = self.rollouts(key, behavior_params, step, policy_version)
            functions = {k: v for k, v in self.algorithm.arguments().items() if k.endswith("_fn")}
            return surrogate.enumerated_gradient(self.policy, learner_params, rollouts, self.task, **functions)

        return {"exact": exact_update, "sampled": sampled_update}[updates]

    def rollouts(self, key, behavior_params, step, policy_version):
        """A group of every prompt, drawn from φ."""
        logprobs = exact.task_logprobs(self.policy, behavior_params, self.task)
        return sampling.sample_enumerated(
            key, self.task, logprobs, self.algorithm.group_size, step=step, policy_version=policy_version
        )

    def rewards(self, params: Params) -> dict[str, jax.Array]:
        """J on what the learner is trained on, and on what it is judged on."""
        expected = functools.partial(exact.expected_reward, self.policy, params, self.task)
        return {"reward": expected(), "gold_reward": expected(rewards=self.task.gold_rewards)}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a chunk."""

    schedule: str
    max_staleness: int
    seed: int

    def staleness(self, seed: int, num_updates: int) -> np.ndarray:
        """[num_updates] int32: the configured schedule; a random one of every (S, seed) is its own."""
        if self.schedule == "random":
            return staleness.random(seed + 1000 * self.seed + self.max_staleness, self.max_staleness, num_updates)
        return {"fixed": staleness.fixed, "periodic": staleness.periodic}[self.schedule](self.max_staleness, num_updates)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The runs of one case that share a learning rate: one call of the compiled program.

    Attributes:
      case: name of the case.
      updates: "exact" or "sampled".
      learning_rate: η.
      cells: the runs.
      measure_steps: [M] int, ascending; one step of every stratum of the declared η·t window, fewer where strata are
        narrower than an update.
    """

    case: str
    updates: str
    learning_rate: float
    cells: tuple[Cell, ...]
    measure_steps: np.ndarray

    @property
    def name(self) -> str:
        """Unique within a config."""
        return f"{self.case}/{self.updates}/{self.learning_rate:g}"

    @property
    def num_updates(self) -> int:
        """T, learner updates of every run."""
        return int(self.measure_steps[-1]) + 1

    def staleness(self, seed: int, num_updates: int) -> np.ndarray:
        """[N, num_updates] int32: the configured schedule of every cell, padded so that all chunks of a case share a shape."""
        return np.stack([cell.staleness(seed, num_updates) for cell in self.cells])


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError on the first thing in the config that cannot be run; builds no task and traces nothing large."""
    check_keys(config, _TOP_KEYS, "")
    check_integer(config["seed"], "seed", minimum=0)
    check_integer(config["max_compositions"], "max_compositions", minimum=1)
    check_integer(config["num_bootstrap"], "num_bootstrap", minimum=100)
    check_integer(config["group_size"], "group_size", minimum=1)
    for key in ("confidence", "clip_level", "collapse_fraction"):
        check_number(config[key], key, lambda x: 0 < x < 1, "between 0 and 1")
    for key in ("loss_options", "advantage_options", "aggregation_options", "cases"):
        check_mapping(config[key], key)
    if not isinstance(config["clip_epsilons"], Sequence) or len(config["clip_epsilons"]) != 2:
        raise ValueError(f"config.clip_epsilons is {config['clip_epsilons']!r}; it must be (epsilon_low, epsilon_high)")
    for value in config["clip_epsilons"]:
        check_number(value, "clip_epsilons", lambda x: x > 0, "> 0")
    _check_group_size(config, build_algorithm(config))
    _check_clip_epsilons(config)
    if not config["cases"]:
        raise ValueError("config.cases is empty; there is nothing to measure")
    for name in config["cases"]:
        _validate_case(config["cases"][name], f"cases.{name}")


def build_algorithm(config: Mapping[str, Any]) -> Algorithm:
    """The functions the config names, with their options; tried once on the smallest arrays so that bad options show here."""

    def function(key, options=None):
        resolved = resolve(config[key], key)
        return functools.partial(resolved, **dict(config[options])) if options and config[options] else resolved

    algorithm = Algorithm(
        group_size=config["group_size"],
        loss_fn=function("loss", "loss_options"),
        unclipped_loss_fn=function("unclipped_loss"),
        advantage_fn=function("advantage", "advantage_options"),
        aggregation_fn=function("aggregation", "aggregation_options"),
        max_compositions=config["max_compositions"],
        loss_name=str(config["loss"]).rpartition(".")[2],
    )
    rows, token = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    trials = {
        "advantage": lambda: jax.eval_shape(
            algorithm.advantage_fn, jax.ShapeDtypeStruct((2, config["group_size"]), jnp.float32)
        ),
        "loss": lambda: jax.eval_shape(algorithm.loss_fn, token, token, rows),
        "unclipped_loss": lambda: jax.eval_shape(algorithm.unclipped_loss_fn, token, token, rows),
        "aggregation": lambda: jax.eval_shape(lambda x: algorithm.aggregation_fn(x, None).mean(), token),
    }
    for key, trial in trials.items():
        try:
            trial()
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.{key} ({config[key]}) refuses its options: {first_line(error)}") from None
    return algorithm


def build_case(config: Mapping[str, Any], name: str, *, start: bool = True) -> Case:
    """The case of that name: task, policy, θ_0 and optimizer.

    Args:
      config: validated.
      name: of the case.
      start: False leaves the parameters as `jax.ShapeDtypeStruct`, which takes no time and is enough to check and to plan.

    Returns:
      Case.

    Raises:
      ValueError: the task has too many reward levels for the oracle, or a factory refuses its options.
    """
    part, algorithm, field = config["cases"][name], build_algorithm(config), f"cases.{name}"
    task = _call(part, "task", field, Task)
    levels = len(np.unique(task.rewards))
    total = compositions.num_compositions(levels, algorithm.group_size)
    if total > algorithm.max_compositions:
        raise ValueError(
            f"config.{field}.task has {levels} distinct rewards, which give {total} compositions at group_size "
            f"{algorithm.group_size}, above max_compositions = {algorithm.max_compositions}; lower group_size or the number of "
            "reward levels"
        )
    policy = _call(part, "policy", field, Policy, task.vocab_size)
    key = jax.random.fold_in(jax.random.key(config["seed"]), 0)
    # jitted: a transformer's initialization is hundreds of small operations
    params = jax.jit(policy.init)(key) if start else jax.eval_shape(policy.init, key)
    if start and part["warm_start"]:
        try:
            params = warm_start.supervised(policy, params, task, **dict(part["warm_start"])).params
        except ValueError as error:
            raise ValueError(f"config.{field}.warm_start: {first_line(error)}") from None
    labels = {key: str(part[key]).rpartition(".")[2] for key in ("policy", "optimizer")}
    return Case(
        name=name,
        policy=policy,
        task=task,
        params=params,
        algorithm=algorithm,
        optimizer_fn=functools.partial(resolve(part["optimizer"], f"{field}.optimizer"), **dict(part["optimizer_options"])),
        config=part,
        labels={**labels, "task": task.name, "loss": algorithm.loss_name},
    )


def check_algorithm(config: Mapping[str, Any]) -> None:
    """Tries the loss and the advantage on four completions of two tokens, before a run depends on them.

    Raises:
      ValueError: naming the field; they couple rows, so that the oracle is not exact, or the loss has no first-order law or is
        not the unclipped loss near ratio 1, and a case asks for the law and the parts.
    """
    algorithm = build_algorithm(config)
    if not any(case["first_order"] for case in config["cases"].values()):
        return
    rewards = np.array([[1.0, 0.0, 0.0, 1.0]])
    group_size = min(algorithm.group_size, 4)  # what is looked for does not depend on it, the cost does
    options = dict(group_size=group_size, max_compositions=group_size, aggregation_fn=sequence_mean)

    def gradient(learner_logits, behavior_logits, clipped=True):
        arguments = algorithm.arguments(clipped=clipped) | options

        def objective(logits):
            return exact.surrogate_objective(_two_tokens(logits), _two_tokens(behavior_logits), rewards, **arguments)

        return jax.grad(objective)(learner_logits)

    logits, direction = jnp.array([[0.3, 0.0], [-0.2, 0.4], [0.1, 0.5]]), jnp.array([[0.5, 0.2], [0.1, -0.7], [-0.3, 0.4]])
    try:
        bias.check_first_order(gradient, logits, direction)
    except bias.FirstOrderError as error:
        raise ValueError(f"{_refusal(config, error)}; or measure its bias alone, with first_order=False in all cases") from None
    except (TypeError, ValueError) as error:
        raise ValueError(_refusal(config, error)) from None
    _check_unclipped_loss(config, gradient, logits, direction)


def _check_group_size(config, algorithm: Algorithm) -> None:
    """A lone reward is its own mean: most advantages are defined there, and 0, so that a run would learn nothing."""
    group_size = algorithm.group_size
    if not np.asarray(algorithm.advantage_fn(jnp.asarray(np.arange(group_size) == 0, float))).any():
        raise ValueError(
            f"config.advantage is {config['advantage']!r}: group_size is {group_size} and every advantage is 0; take "
            f"group_size >= {group_size + 1} or an advantage without the mean of the group"
        )


def check_case(config: Mapping[str, Any], case: Case) -> None:
    """Tries a case on shapes alone, so that what the oracle or the optimizer refuses is refused before anything runs.

    Raises:
      ValueError: naming the field.
    """
    if (case.task.rewards == case.task.rewards[:, :1]).all():
        raise ValueError(
            f"config.cases.{case.name}.task ({case.config['task']}) gives all completions of a prompt the same reward; "
            "there is nothing to learn, so nothing goes stale"
        )
    _check_memory(config, case)
    params = jax.eval_shape(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), case.params))
    try:
        jax.eval_shape(lambda p: case.optimizer_fn(0.1).init(p), params)
    except (AttributeError, TypeError, ValueError) as error:
        field = f"config.cases.{case.name}.optimizer"
        raise ValueError(f"{field} ({case.config['optimizer']}) cannot be used: {first_line(error)}") from None
    try:
        jax.eval_shape(case.gradient, params, params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_refusal(config, error)} (config.cases.{case.name})") from None


def _check_clip_epsilons(config) -> None:
    """R_batch is where the loss clips, so a loss that says where it does must say the same."""
    try:
        parameters = inspect.signature(resolve(config["loss"], "loss")).parameters
    except ValueError:  # a builtin
        return
    for name, value in zip(("epsilon_low", "epsilon_high"), config["clip_epsilons"], strict=True):
        if name not in parameters:
            continue
        of_loss = config["loss_options"].get(name, parameters[name].default)
        if of_loss != value:
            raise ValueError(
                f"config.clip_epsilons is {tuple(config['clip_epsilons'])} and config.loss_options.{name} is {of_loss}; "
                "R_batch is where the loss clips, so both must be the same"
            )


def _check_unclipped_loss(config, gradient, logits, direction) -> None:
    """Near ratio 1 nothing is clipped: there the loss and the one without its clip have the same gradient and the same bias."""
    behaviors = jnp.stack([logits, logits + _TINY_DRIFT * direction, logits - _TINY_DRIFT * direction])

    @jit_once
    def fresh_and_bias(behaviors):
        def of(clipped):
            fresh, *stale = jax.lax.map(lambda behavior: gradient(logits, behavior, clipped), behaviors)
            return fresh, jnp.stack(stale) - fresh

        return of(True), of(False)

    of_loss, of_unclipped = fresh_and_bias(behaviors)
    for clipped, unclipped in zip(of_loss, of_unclipped, strict=True):
        difference, scale = float(jnp.linalg.norm(clipped - unclipped)), float(jnp.linalg.norm(clipped))
        if not difference <= 0.01 * scale:
            raise ValueError(
                f"config.unclipped_loss is {config['unclipped_loss']!r} and config.loss is {config['loss']!r}; near ratio 1, "
                f"where nothing is clipped, their gradients or biases differ by {difference / max(scale, 1e-300):.0%}: name "
                "the loss without its clip (the loss itself if it has none), or set first_order=False in all cases"
            )


def _check_memory(config, case):
    """The old parameter versions of the cells that run side by side must fit into the machine."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    num_cells = max(len(chunk.cells) for chunk in chunks(config) if chunk.case == case.name)
    needed, there = _ring_bytes(case, num_cells), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        cells = f" for each of {num_cells} cells side by side" if case.config["vectorize"] else ""
        raise ValueError(
            f"config.cases.{case.name}.max_staleness = {max(case.config['max_staleness'])} keeps as many old versions of the "
            f"parameters{cells}: {needed / 2**30:.3g} GiB, where the machine has {there / 2**30:.3g}; lower max_staleness"
            + (", lower num_seeds or set vectorize=False" if cells else "")
        )


def _ring_bytes(case, num_cells):
    """Of the parameter histories that one compiled program holds."""
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(case.params))
    return parameters * (max(case.config["max_staleness"]) + 1) * (num_cells if case.config["vectorize"] else 1)


def _refusal(config, error) -> str:
    """The oracle's complaint, with the field it is about."""
    message = first_line(error)
    key = next((key for key in ("advantage", "aggregation") if message.startswith(f"{key}_fn")), "loss")
    return f"config.{key} is {config[key]!r}: {message}"


def _two_tokens(logits):
    """[1, 4, 2] log-probs of two binary tokens from [3, 2] logits: of the first, and of the second after either."""
    first, after_0, after_1 = jax.nn.log_softmax(logits)
    return jnp.stack([jnp.repeat(first, 2), jnp.concatenate([after_0, after_1])], axis=-1)[None]


def chunks(config: Mapping[str, Any]) -> list[Chunk]:
    """All chunks of the config, in the order in which they run."""
    result = []
    for name, part in config["cases"].items():
        # one jittered step a stratum, the same fractions for every η: no schedule's phase is favored, η·t is matched
        jitter = np.random.default_rng(config["seed"]).uniform(size=part["num_measurements"])
        start, end = part["time_window"]
        times = start + (np.arange(part["num_measurements"]) + jitter) / part["num_measurements"] * (end - start)
        for updates in part["updates"]:
            cells = tuple(
                Cell(schedule, int(max_staleness), seed)
                for schedule in part["schedules"]
                for max_staleness in part["max_staleness"]
                for seed in range(part["num_seeds"] if updates == "sampled" else 1)
            )
            for learning_rate in part["learning_rates"]:
                steps = np.unique(np.floor(times / learning_rate).astype(np.int32))
                result.append(Chunk(name, updates, float(learning_rate), cells, steps))
    return result


def describe(config: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """The plan and its cost, as `--dry_run` prints it."""
    lines = ["case                updates  cells  eta from .. to      updates  H evaluations  ring MiB   Y  compositions"]
    planned = chunks(config)
    for case in cases:
        for updates in case.config["updates"]:
            mine = [chunk for chunk in planned if chunk.case == case.name and chunk.updates == updates]
            num_updates = sum(len(chunk.cells) * chunk.num_updates for chunk in mine)
            measured = sum(len(chunk.cells) * len(chunk.measure_steps) for chunk in mine)
            ring = _ring_bytes(case, len(mine[0].cells)) / 2**20
            count = compositions.num_compositions(len(np.unique(case.task.rewards)), case.algorithm.group_size)
            rates = case.config["learning_rates"]
            lines.append(
                f"{case.name:<20}{updates:<9}{sum(len(chunk.cells) for chunk in mine):>5}  {min(rates):<8g} {max(rates):<8g}"
                f"{num_updates:>10}{num_updates + 2 * measured:>15}{ring:>10.1f}{case.task.rewards.shape[1]:>4}{count:>14}"
            )
    lines.append(f"{len(planned)} chunks; records after each, so an interrupted run continues where it was")
    return "\n".join(lines)


def _call(part, key, field, kind, *arguments):
    factory = resolve(part[key], f"{field}.{key}")
    try:
        made = factory(*arguments, **dict(part[f"{key}_options"]))
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"config.{field}.{key} ({part[key]}): {first_line(error)}") from None
    if not isinstance(made, kind):
        raise ValueError(f"config.{field}.{key} ({part[key]}) returns a {type(made).__name__}; it must be a {kind.__name__}")
    return made


def check_grid(part: Mapping[str, Any], field: str) -> None:
    """ValueError unless a case's schedules, max_staleness and learning_rates are tuples of what they may hold, each once."""
    check_choice(part, "schedules", SCHEDULES, field)
    for key in ("max_staleness", "learning_rates"):
        if isinstance(part[key], str) or not isinstance(part[key], Sequence) or not part[key]:
            raise ValueError(f"config.{field}.{key} is {part[key]!r}; it must be a tuple of numbers, not empty")
    for value in part["max_staleness"]:
        check_integer(value, f"{field}.max_staleness", minimum=0)
    for value in part["learning_rates"]:
        check_number(value, f"{field}.learning_rates", lambda x: x > 0, "> 0")
    for key in ("schedules", "max_staleness", "learning_rates"):
        # chunks are told apart by six digits of the learning rate
        check_distinct([value if isinstance(value, str) else f"{value:g}" for value in part[key]], part[key], f"{field}.{key}")


def check_world(part: Mapping[str, Any], field: str) -> None:
    """ValueError unless a case's policy, task and optimizer can be found, and its options are mappings of known names."""
    for key in ("policy_options", "task_options", "optimizer_options", "warm_start"):
        check_mapping(part[key], f"{field}.{key}")
    options = inspect.signature(warm_start.supervised).parameters
    for key in part["warm_start"]:
        if key not in options:
            raise ValueError(f"config.{field}.warm_start.{key} is not an option; the options are {', '.join([*options][3:])}")
    for key in ("policy", "task", "optimizer"):
        resolve(part[key], f"{field}.{key}")


def _validate_case(part, field):
    check_keys(part, _CASE_KEYS, field)
    check_choice(part, "updates", UPDATES, field)
    check_distinct(part["updates"], part["updates"], f"{field}.updates")
    check_grid(part, field)
    check_world(part, field)
    if part["fit_variable"] not in FIT_VARIABLES:
        raise ValueError(f"config.{field}.fit_variable is {part['fit_variable']!r}; it must be one of {FIT_VARIABLES}")
    for key in ("time_window", "fit_window"):
        check_window(part[key], f"{field}.{key}")
    for key in ("vectorize", "first_order"):
        if not isinstance(part[key], bool):
            raise ValueError(f"config.{field}.{key} is {part[key]!r}; it must be True or False")
    check_integer(part["num_measurements"], f"{field}.num_measurements", minimum=2)
    check_integer(part["num_seeds"], f"{field}.num_seeds", minimum=1)
    check_integer(part["horizon_updates"], f"{field}.horizon_updates", minimum=0)
    if part["horizon_updates"]:
        check_number(part["horizon_learning_rate"], f"{field}.horizon_learning_rate", lambda x: x > 0, "> 0")
    first_step = part["time_window"][0] / max(part["learning_rates"])
    lag = max(*part["max_staleness"], 1)  # the norm of one update is measured too
    if first_step < lag:
        raise ValueError(
            f"config.{field}.time_window starts at eta*t = {part['time_window'][0]:g}, step {math.floor(first_step)} at the "
            f"largest learning rate, before there have been {lag} updates; start at {max(part['learning_rates']) * lag:g} or "
            "later"
        )
    last_step = part["time_window"][1] / min(part["learning_rates"])
    if last_step > MAX_UPDATES:
        raise ValueError(
            f"config.{field}.time_window ends at eta*t = {part['time_window'][1]:g}, update {last_step:.3g} at the smallest "
            f"learning rate; at most {MAX_UPDATES} updates are allowed"
        )
