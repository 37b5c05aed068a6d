"""From a config to the objects of a training run: everything is checked here, before anything is compiled.

What the keys mean stands in `configs/train_arithmetic.py`. Config values that are behavior are dotted names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_async_grpo import corrections, estimation, records
from jax_async_grpo.config_checks import (
    check_integer,
    check_keys,
    check_mapping,
    check_number,
    check_rule,
    first_line,
    misnamed_options,
    resolve,
)
from jax_async_grpo.separability import check_coupling, named_parameters
from jax_async_grpo.tasks import TextTask, Verifiers, load_tokenizer
from jax_async_grpo.training.lag import LagPlan, make_lag_plan
from jax_async_grpo.training.learner import Learner
from jax_async_grpo.training.mesh import make_mesh
from jax_async_grpo.types import Policy, Rollouts

__all__ = ["DENOMINATORS", "REPLAYS", "TrainJob", "build", "describe", "learning_rate_at", "validate"]

REPLAYS = ("params", "rollouts")
DENOMINATORS = ("recorded", "recomputed", "learner")
PRECISIONS = ("float32", "float64")
_MAX_SEED = 2**32 - 1
_LEAST_SAMPLING = 1e-6  # far below, logits overflow and a nucleus is empty in float32
# What the job itself gives the functions of a config: so many positional arguments, and these keywords to those that want them.
_FILLED = {"loss": 4, "advantage": 1, "aggregation": 2, "policy": 1}
_GIVEN = {
    "loss": ("behavior_logprobs", "detached_logprobs"),
    "correction": ("logprobs", "old_logprobs", "advantages", "mask", "behavior_logprobs", "detached_logprobs"),
    "optimizer.name": ("learning_rate",),
}
_COUPLING_TOLERANCE = 1e-4  # below what `estimation` refuses
_TOP_KEYS = (
    "seed precision num_updates num_prompts group_size updates_per_batch accumulation_steps staleness replay ring loss "
    "loss_options correction correction_options denominator advantage advantage_options aggregation aggregation_options "
    "optimizer max_bad_updates policy policy_options task task_options num_heldout warm_start sampling verifier evaluation "
    "bias checkpoint mesh track rule plan"
).split()
_PARTS = {
    "staleness": ("schedule", "max"),
    "ring": ("dtype", "memory_kind"),
    "optimizer": ("name", "learning_rate", "options", "schedule", "schedule_options", "before", "control", "control_options"),
    "warm_start": ("num_updates", "num_prompts", "learning_rate", "target_reward", "every"),
    "sampling": ("temperature", "top_k", "top_p"),
    "verifier": ("num_threads", "time_limit"),
    "evaluation": ("every", "num_samples", "greedy"),
    "bias": ("every", "num_blocks", "ess_threshold"),
    "checkpoint": ("every", "keep_last", "keep_best"),
    "mesh": ("data", "fsdp"),
    "track": ("gradient_cosine", "cumulative_drift"),
}
_COUNTS = {
    "num_updates": 1,
    "num_prompts": 1,
    "group_size": 2,
    "updates_per_batch": 1,
    "accumulation_steps": 1,
    "max_bad_updates": 1,
    "num_heldout": 1,
    "seed": 0,
    "staleness.max": 0,
    "warm_start.num_updates": 0,
    "warm_start.num_prompts": 1,
    "warm_start.every": 1,
    "verifier.num_threads": 1,
    "evaluation.every": 1,
    "evaluation.num_samples": 1,
    "bias.every": 0,
    "bias.num_blocks": 8,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainJob:
    """A checked config.

    Attributes:
      config: as given.
      policy: θ's architecture.
      train_task, heldout_task: without a question in common.
      learner: what an update computes.
      lag: which version generates which batch.
      verifiers: that score completions.
      mesh: of all devices.
      learning_rate: the optimizer's, or its schedule t -> η_t.
      predicted_limit: η_80 of a plan for this S, or None.
      is_separable: whether the loss of a batch is the mean of those of its prompts, so that groups can be reweighted.
    """

    config: Mapping[str, Any]
    policy: Policy
    train_task: TextTask
    heldout_task: TextTask
    learner: Learner
    lag: LagPlan
    verifiers: Verifiers
    mesh: Mesh
    learning_rate: float | Callable[[int], Any]
    predicted_limit: float | None
    is_separable: bool


def validate(config: Mapping[str, Any]) -> None:
    """ValueError on the first thing in the config that cannot be run, with the mend in the message; builds no task."""
    check_keys(config, _TOP_KEYS, "")
    for part, keys in _PARTS.items():
        check_keys(config[part], keys, part)
    for field, least in _COUNTS.items():
        check_integer(_at(config, field), field, minimum=least)
    for key in config:
        if key.endswith("_options"):
            check_mapping(config[key], key)
    if config["seed"] > _MAX_SEED:
        raise ValueError(f"config.seed is {config['seed']}; it must be at most {_MAX_SEED}: keys are made of 32 bits")
    _check_words(config)
    positive = (lambda x: x > 0, "> 0")
    for field in ("optimizer.learning_rate", "verifier.time_limit", "warm_start.learning_rate"):
        check_number(_at(config, field), field, *positive)
    least = _LEAST_SAMPLING
    check_number(config["sampling"]["temperature"], "sampling.temperature", lambda x: x >= least, f">= {least:g}")
    check_number(config["sampling"]["top_p"], "sampling.top_p", lambda x: least <= x <= 1, f"in [{least:g}, 1]")
    check_integer(config["sampling"]["top_k"], "sampling.top_k", minimum=0)
    check_number(config["bias"]["ess_threshold"], "bias.ess_threshold", lambda x: 0 <= x <= 1, "in [0, 1]")
    check_number(config["warm_start"]["target_reward"], "warm_start.target_reward", lambda x: 0 < x <= 1, "in (0, 1]")
    check_rule(config["rule"])
    _check_sizes(config)
    _check_meaning(config)


def build(config: Mapping[str, Any]) -> TrainJob:
    """The objects of a run; the task is made here, and its verifiers started.

    Raises:
      ValueError: as `validate`; a factory that refuses its options; a mesh or a kind of memory that the devices do not have.
    """
    validate(config)
    mesh = make_mesh(**config["mesh"])
    _check_memory_kind(config["ring"]["memory_kind"])
    part = config["num_prompts"] // config["accumulation_steps"]
    if part % mesh.size:
        raise ValueError(
            f"config.num_prompts / accumulation_steps is {part}; {mesh.size} devices must divide it: take a multiple of "
            f"{mesh.size * config['accumulation_steps']} prompts"
        )
    warm = config["warm_start"]
    if warm["num_updates"] and warm["num_prompts"] % mesh.size:
        raise ValueError(f"config.warm_start.num_prompts is {warm['num_prompts']}; {mesh.size} devices must divide it")
    staleness = config["staleness"]
    lag = make_lag_plan(
        staleness["schedule"],
        staleness["max"],
        config["num_updates"],
        updates_per_batch=config["updates_per_batch"],
        seed=config["seed"],
    )
    task = _call({**config, "task_options": _with_tokenizer(config["task_options"])}, "task")
    if not isinstance(task, TextTask):
        raise ValueError(f"config.task ({config['task']}) makes a {type(task).__name__}; it must make a TextTask")
    try:
        train_task, heldout_task = task.split(config["num_heldout"], config["seed"])
    except ValueError as error:
        raise ValueError(f"config.num_heldout: {first_line(error)}") from None
    policy = _call(config, "policy", task.tokenizer.vocab_size)
    learning_rate = _learning_rate(config)
    if config["num_prompts"] > len(train_task.questions):
        raise ValueError(
            f"config.num_prompts is {config['num_prompts']}; there are {len(train_task.questions)} questions to train on: a "
            "batch would hold one twice"
        )
    learner = _learner(config, policy, learning_rate, lag.capacity - 1)
    _try_optimizer(config, learner)
    return TrainJob(
        config=config,
        policy=policy,
        train_task=train_task,
        heldout_task=heldout_task,
        learner=learner,
        lag=lag,
        verifiers=Verifiers(config["verifier"]["num_threads"], config["verifier"]["time_limit"]),
        mesh=mesh,
        learning_rate=learning_rate,
        predicted_limit=_predicted_limit(config),
        is_separable=_is_separable(learner, config["group_size"]),
    )


def learning_rate_at(job: TrainJob, step: int) -> float:
    """η of the optimizer's update number `step`; those that were skipped do not count."""
    return float(job.learning_rate(step)) if callable(job.learning_rate) else float(job.learning_rate)


def describe(job: TrainJob, ring_bytes: int, num_parameters: int) -> str:
    """What a run is before its first update: sizes, S·η, T·η, the ring and the predicted limit."""
    config = job.config
    S, T, eta = config["staleness"]["max"], config["num_updates"], config["optimizer"]["learning_rate"]
    changing = " (largest)" if config["optimizer"]["schedule"] else ""
    limit = "not known; set config.plan to the folder of a plan (launch.plan)"
    if job.predicted_limit is not None:
        headroom = job.predicted_limit / eta
        limit = f"eta_80 = {job.predicted_limit:.3g}, head-room {headroom:.2g}x"
        limit += "" if headroom >= 2 else ": use at most half"
    lines = {
        "task": _said_of_task(job),
        "policy": f"{str(config['policy']).rpartition('.')[2]}, {num_parameters:,} parameters",
        "batch": f"{config['num_prompts']} prompts x {config['group_size']} completions",
        "staleness": f"{config['staleness']['schedule']}, S = {S}, replay of {config['replay']}",
        "S*eta": f"{S * eta:.3g}{changing}",
        "T*eta": f"{T * eta:.3g}{changing}",
        "ring": f"{job.lag.capacity} versions, {ring_bytes / 2**20:.1f} MiB" if ring_bytes else "none",
        "limit": limit,
    }
    if config["updates_per_batch"] > 1:
        lines["reuse"] = (
            f"{config['updates_per_batch']} updates a batch: data are not independent of the learner, and the measured bias "
            "leaves that out"
        )
    if job.mesh.size > 1:
        lines["mesh"] = f"data {job.mesh.shape['data']} x fsdp {job.mesh.shape['fsdp']}"
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def _said_of_task(job: TrainJob) -> str:
    rows, different = len(job.heldout_task.questions), job.config["num_heldout"]
    repeats = f" ({different} different ones and their repeats)" if rows > different else ""
    return f"{job.train_task.name}, {len(job.train_task.questions)} questions, {rows} held out{repeats}"


def _at(config: Mapping[str, Any], field: str) -> Any:
    return functools.reduce(lambda part, key: part[key], field.split("."), config)


def _check_words(config: Mapping[str, Any]) -> None:
    for field, allowed in (("replay", REPLAYS), ("denominator", DENOMINATORS), ("precision", PRECISIONS)):
        if config[field] not in allowed:
            raise ValueError(f"config.{field} is {config[field]!r}; it must be one of {', '.join(allowed)}")
    if config["ring"]["dtype"] not in ("", "bfloat16"):
        raise ValueError(f"config.ring.dtype is {config['ring']['dtype']!r}; it must be '' (as the parameters) or 'bfloat16'")


def _check_sizes(config: Mapping[str, Any]) -> None:
    if config["num_prompts"] % config["accumulation_steps"]:
        raise ValueError(
            f"config.accumulation_steps is {config['accumulation_steps']}; it must divide num_prompts = {config['num_prompts']}"
        )
    if config["updates_per_batch"] > config["num_updates"]:
        raise ValueError(
            f"config.updates_per_batch is {config['updates_per_batch']} and num_updates {config['num_updates']}: the run would "
            "end within its first batch; lower updates_per_batch or raise num_updates"
        )
    if config["bias"]["every"] and config["num_prompts"] % config["bias"]["num_blocks"]:
        raise ValueError(
            f"config.bias.num_blocks is {config['bias']['num_blocks']}; it must divide num_prompts = {config['num_prompts']}"
        )
    if config["replay"] == "rollouts" and config["bias"]["every"]:
        raise ValueError(
            "config.bias.every is set and replay is 'rollouts', which keeps no old parameters: take replay='params'"
        )
    if config["replay"] == "rollouts" and config["denominator"] != "recorded":
        raise ValueError(
            f"config.denominator is {config['denominator']!r} and replay 'rollouts', which keeps no old parameters to compute "
            "it; take denominator='recorded' or replay='params'"
        )
    make_lag_plan(
        config["staleness"]["schedule"], config["staleness"]["max"], config["num_updates"],
        updates_per_batch=config["updates_per_batch"],
    )  # fmt: skip


def _check_memory_kind(kind: str) -> None:
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in ("", *kinds):
        raise ValueError(
            f"config.ring.memory_kind is {kind!r}; a {device.platform} device has {', '.join(kinds)}, and '' is where the "
            "parameters are"
        )


def _with_tokenizer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with `tokenizer` read: the path of a tokenizer.json, or arguments of `tasks.load_tokenizer`; "" is none."""
    options = dict(options)
    given = options.get("tokenizer")
    if isinstance(given, (str, Mapping)):
        try:
            named = {"path": given} if isinstance(given, str) else dict(given)
            options["tokenizer"] = load_tokenizer(**named) if given else None
        except (TypeError, ValueError, ImportError) as error:
            field = "task_options.tokenizer"
            said = misnamed_options(load_tokenizer, named, field) or first_line(error)
            raise ValueError(f"config.{field}: {said}") from None
    return options


def _check_meaning(config: Mapping[str, Any]) -> None:
    """What would run and mean something else than it seems to."""
    recorded, measured = config["denominator"] == "recorded", config["bias"]["every"] > 0
    if config["correction"] and recorded:
        raise ValueError(
            "config.correction weighs the ratio's denominator against the recorded log-probs, and denominator is 'recorded': "
            "it would do nothing; take denominator='learner' or 'recomputed', or correction=''"
        )
    if measured and not recorded:
        raise ValueError(
            f"config.bias.every is set and denominator is {config['denominator']!r}: the bias is measured for recorded "
            "denominators only; take bias.every=0 or denominator='recorded'"
        )
    sampling = config["sampling"]
    if measured and (sampling["temperature"], sampling["top_k"], sampling["top_p"]) != (1, 0, 1):
        raise ValueError(
            "config.bias.every is set and sampling is not the policy's own (temperature 1, top_k 0, top_p 1): stale and fresh "
            "rollouts would differ by more than lag; take bias.every=0 or the policy's own sampling"
        )


@contextlib.contextmanager
def _refusals(field: str, name: str, options: Mapping[str, Any], options_field: str | None) -> Iterator[None]:
    """What the function of a field says against its options within the block, in one line with the names it takes."""
    try:
        yield
    except (TypeError, ValueError, ImportError, OSError) as error:
        given = dict(filled=_FILLED.get(field, 0), taken=_GIVEN.get(field, ()))
        said = misnamed_options(resolve(name, field), options, options_field, **given) or first_line(error)
        raise ValueError(f"config.{field} ({name}) refuses its options: {said}") from None


def _refusals_of(config: Mapping[str, Any], key: str):
    return _refusals(key, config[key], config[f"{key}_options"], f"{key}_options")


def _call(config: Mapping[str, Any], key: str, *arguments) -> Any:
    """config[key] called with its options, in one line where it refuses them."""
    factory = resolve(config[key], key)
    with _refusals_of(config, key):
        return factory(*arguments, **dict(config[f"{key}_options"]))


def _function(config: Mapping[str, Any], key: str) -> Callable:
    function, options = resolve(config[key], key), dict(config[f"{key}_options"])
    return functools.partial(function, **options) if options else function


def _learning_rate(config: Mapping[str, Any]) -> float | Callable:
    part = config["optimizer"]
    if not part["schedule"]:
        return part["learning_rate"]
    field = "optimizer.schedule"
    factory = resolve(part["schedule"], field)
    with _refusals(field, part["schedule"], part["schedule_options"], f"{field}_options"):
        factors = factory(**dict(part["schedule_options"]))
        float(factors(0))
    return lambda step: part["learning_rate"] * factors(step)


def _learner(config: Mapping[str, Any], policy: Policy, learning_rate, max_staleness: int) -> Learner:
    loss_fn = _function(config, "loss")
    with _refusals_of(config, "loss"):
        inspect.signature(loss_fn)  # shows names that it has not
    if config["correction"]:
        correction_fn = _function(config, "correction")
        with _refusals_of(config, "correction"):
            loss_fn = corrections.corrected(loss_fn, correction_fn)
    advantage_fn, aggregation_fn = _function(config, "advantage"), _function(config, "aggregation")
    rows, token = jax.ShapeDtypeStruct((2, config["group_size"]), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    known = {name: token for name in ("behavior_logprobs",) if name in named_parameters(loss_fn)}
    trials = {
        "advantage": lambda: jax.eval_shape(advantage_fn, rows),
        "loss": lambda: jax.eval_shape(loss_fn, token, token, jax.ShapeDtypeStruct((2,), jnp.float32), token, **known),
        "aggregation": lambda: jax.eval_shape(lambda x: aggregation_fn(x, None).mean(), token),
    }
    for key, trial in trials.items():
        with _refusals_of(config, key):
            trial()
    optimizer = _optimizer(config, learning_rate)
    coupling = _coupling(loss_fn, tuple(known))
    if coupling == "batch" and config["accumulation_steps"] > 1:
        raise ValueError(
            f"config.loss ({config['loss']}) couples the rows of a batch; it cannot be accumulated: take accumulation_steps=1"
        )
    parameters = inspect.signature(loss_fn).parameters
    epsilons = {name: parameters[name].default for name in ("epsilon_low", "epsilon_high") if name in parameters}
    return Learner(
        policy=policy,
        loss_fn=loss_fn,
        advantage_fn=advantage_fn,
        aggregation_fn=aggregation_fn,
        optimizer=optimizer,
        coupling=coupling,
        accumulation_steps=config["accumulation_steps"],
        epsilons=tuple(epsilons.values()) if len(epsilons) == 2 else None,
        max_staleness=max_staleness,
    )


def _coupling(loss_fn: Callable, loss_inputs: tuple[str, ...]) -> str:
    """ "row", or "batch" where the loss is seen to couple rows; never "token": a threshold far away hides from probes."""
    try:
        check_coupling(loss_fn, "row", 3, loss_inputs)
    except ValueError:
        return "batch"
    return "row"


def _is_separable(learner: Learner, group_size: int) -> bool:
    """Tried on prompts with completions of unequal lengths."""
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (6, group_size, 1))
    logprobs, behavior = (jnp.asarray(np.where(mask, -rng.random(mask.shape), 0), jnp.float32) for _ in range(2))
    prompts = jnp.zeros((len(mask), 1), jnp.int32)
    rollouts = Rollouts(
        prompts=prompts,
        prompt_mask=prompts == 0,
        completions=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logprobs=behavior,
        rewards=jnp.asarray(rng.random(mask.shape[:2]), jnp.float32),
        policy_version=jnp.zeros(mask.shape[:2], jnp.int32),
    )
    coupling = jax.jit(functools.partial(estimation.prompt_coupling, learner.objective()))  # at once: it has hundreds of steps
    return float(coupling(logprobs, rollouts)) <= _COUPLING_TOLERANCE


def _optimizer(config: Mapping[str, Any], learning_rate) -> optax.GradientTransformation:
    """`before` → the optimizer with its learning rate → the control transformation."""
    part, chain = config["optimizer"], []
    if not isinstance(part["before"], Sequence) or any(len(entry) != 2 for entry in part["before"]):
        raise ValueError("config.optimizer.before must be pairs (dotted name of an optax transformation, its options)")
    steps = [(f"optimizer.before[{k}]", name, dict(options), None, {}) for k, (name, options) in enumerate(part["before"])]
    given = {"learning_rate": learning_rate}
    steps.append(("optimizer.name", part["name"], dict(part["options"]), "optimizer.options", given))
    if part["control"]:
        steps.append(("optimizer.control", part["control"], dict(part["control_options"]), "optimizer.control_options", {}))
    for field, name, options, options_field, given in steps:
        factory = resolve(name, field)
        with _refusals(field, name, options, options_field):
            chain.append(factory(**given, **options))
    return optax.chain(*chain)


def _try_optimizer(config: Mapping[str, Any], learner: Learner) -> None:
    shapes = jax.eval_shape(learner.policy.init, jax.random.key(0))

    def trial(params):
        optimizer = optax.with_extra_args_support(learner.optimizer)
        extra_args = dict(staleness=learner.max_staleness, ess=jnp.ones(()))
        return optimizer.update(params, optimizer.init(params), params, **extra_args)

    try:
        _, state = jax.eval_shape(trial, shapes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.optimizer ({config['optimizer']['name']}) cannot be used: {first_line(error)}") from None
    if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise ValueError("config.optimizer keeps a PRNG key in its state, which checkpoints cannot hold; take one without")


def _predicted_limit(config: Mapping[str, Any]) -> float | None:
    """η_80 of the plan in the folder `config.plan`, which must be for this S."""
    if not config["plan"]:
        return None
    path = Path(config["plan"]) / "plan.json"
    try:
        plan = records.read_json(path)["plan"]
        planned, limit = int(plan["max_staleness"]), plan["max_learning_rate"]
    except (OSError, KeyError, TypeError, ValueError):
        raise ValueError(f"config.plan={config['plan']} holds no plan.json of launch.plan; give its --workdir, or ''") from None
    if planned != config["staleness"]["max"]:
        raise ValueError(
            f"config.plan={config['plan']} is for S = {planned} and staleness.max is {config['staleness']['max']}; plan for it "
            "with launch.plan --max_staleness"
        )
    return None if limit is None else float(np.float64(limit))
