"""The audit of losses: the exact staleness bias of every loss × correction at the same stale points.

The points come from runs of one reference loss with exact updates, a run per (S, η); every loss is measured at each of them
through its closed form, so that losses are compared at matched drift. What couples rows is refused with the oracle's reason.
The records in audit.jsonl are told apart by `kind`: "point" (a loss at one (S, η)), "curve" (δ along one direction of drift,
the first-order law and its check), "refused", and "entry", written last, so that an entry without it does not count.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import bias, closed_form, corrections, exact, experiment, losses, moments
from jax_async_grpo.audit_points import Points, build_points, guard_step, reference_case
from jax_async_grpo.compiling import jit_once, jit_repeated
from jax_async_grpo.config_checks import check_integer, check_keys, check_mapping, check_number, first_line, resolve
from jax_async_grpo.records import Workdir

__all__ = ["CONTROL", "RECORDS", "Entry", "entries", "finished_entries", "run_entries", "validate"]

RECORDS = "audit.jsonl"
CONTROL = "proximal"  # the correction of weight 1
_KEYS = (
    "seed",
    "group_size",
    "advantage",
    "advantage_options",
    "aggregation",
    "aggregation_options",
    "max_compositions",
    "policy",
    "policy_options",
    "task",
    "task_options",
    "optimizer",
    "optimizer_options",
    "reference_loss",
    "time",
    "max_staleness",
    "learning_rates",
    "rank_at",
    "brute_force_group_size",
    "drifts",
    "proximal_fraction",
    "saturation",
    "losses",
    "corrections",
    "extra_losses",
)


class Entry(NamedTuple):
    """One line of the audit's table.

    Attributes:
      loss, correction: names in the config; correction "none" is the loss alone, "proximal" has the weight 1.
      loss_fn: the loss, correction included.
      proximal: True where the ratio's denominator is the proximal policy, False where it is the behavior policy.
    """

    loss: str
    correction: str
    loss_fn: Callable
    proximal: bool

    @property
    def name(self) -> str:
        """Unique within a config."""
        return f"{self.loss}/{self.correction}"


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, on what cannot be run."""
    check_keys(config, _KEYS, "")
    check_integer(config["seed"], "seed", minimum=0)
    check_integer(config["group_size"], "group_size", minimum=2)
    check_integer(config["max_compositions"], "max_compositions", minimum=1)
    check_integer(config["brute_force_group_size"], "brute_force_group_size", minimum=0)
    check_number(config["time"], "time", lambda x: x > 0, "> 0")
    check_number(config["proximal_fraction"], "proximal_fraction", lambda x: 0 <= x <= 1, "in [0, 1]")
    check_number(config["saturation"], "saturation", lambda x: 0 < x < 1, "between 0 and 1")
    for key in ("advantage_options", "aggregation_options", "policy_options", "task_options", "optimizer_options", "losses"):
        check_mapping(config[key], key)
    check_mapping(config["corrections"], "corrections")
    for key in ("max_staleness", "learning_rates", "drifts", "rank_at"):
        if isinstance(config[key], str) or not isinstance(config[key], Sequence) or not config[key]:
            raise ValueError(f"config.{key} is {config[key]!r}; it must be a tuple of numbers, not empty")
    for value in config["max_staleness"]:
        check_integer(value, "max_staleness", minimum=0)
    for key in ("learning_rates", "drifts"):
        for value in config[key]:
            check_number(value, key, lambda x: x > 0, "> 0")
    _check_grid(config)
    if not config["losses"] and not config["extra_losses"]:
        raise ValueError("config.losses is empty and so is config.extra_losses; there is nothing to audit")
    for name, part in config["losses"].items():
        check_keys(part, ("fn", "options", "corrected", "proximal"), f"losses.{name}")
    for name, part in config["corrections"].items():
        check_keys(part, ("fn", "options"), f"corrections.{name}")
        if name in ("none", CONTROL):
            raise ValueError(f"config.corrections.{name} is the name of a line of its own; give it another one")
    if not isinstance(config["extra_losses"], str):
        raise ValueError(f"config.extra_losses is {config['extra_losses']!r}; it must be dotted names, separated by commas")
    for entry in entries(config):
        _try(entry)


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every loss alone, then with the proximal denominator that corrections have, then beside every correction.

    The second is the control of the others: what differs from it is the weight alone. The user's own losses come first.

    Raises:
      ValueError: naming the field, where a dotted name cannot be found or two losses have one name.
    """
    own = [name.strip() for name in config["extra_losses"].split(",") if name.strip()]
    named = [
        (name.rpartition(".")[2], dict(fn=name, options={}, corrected=True, proximal=False), "extra_losses") for name in own
    ]
    named += [(name, part, f"losses.{name}") for name, part in config["losses"].items()]
    names = [name for name, _, _ in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"config.extra_losses and config.losses name {twice} more than once; give it another name")
    made = []
    for name, part, field in named:
        loss_fn = _function(part, field)
        made.append(Entry(name, "none", loss_fn, part["proximal"]))
        if part["corrected"] and config["corrections"]:
            made.append(Entry(name, CONTROL, loss_fn, True))
            for other, correction in config["corrections"].items():
                weights = _function(correction, f"corrections.{other}")
                made.append(Entry(name, other, corrections.corrected(loss_fn, weights), True))
    return made


def finished_entries(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the entries whose records are complete."""
    return {row["entry"] for row in rows if row["kind"] == "entry"}


def run_entries(config: Mapping[str, Any], workdir: Workdir, on_progress: Callable[[Entry], None]) -> None:
    """Measures every entry that the workdir does not hold yet.

    Args:
      config: validated.
      workdir: where audit.jsonl goes.
      on_progress: called after each entry.

    Raises:
      ValueError: a stale point without drift, or a control whose bias is not exactly 0.
    """
    done = {row["entry"]: row.get("function") for row in workdir.read_rows(RECORDS) if row["kind"] == "entry"}
    todo = []
    for entry in entries(config):
        if entry.name not in done:
            todo.append(entry)
        elif done[entry.name] != _fingerprint(entry):
            raise ValueError(
                f"{workdir.path / RECORDS} holds {entry.name} of a function that has changed since; pass --overwrite or "
                "another --workdir"
            )
        else:
            on_progress(entry)
    if not todo:
        return
    case = reference_case(config)
    points, measurement = build_points(config, case), _measurement(case)
    for entry in todo:
        workdir.append_rows(RECORDS, _audit(config, case, points, measurement, entry))
        on_progress(entry)


def _audit(config, case: experiment.Case, points: Points, measurement: Callable, entry: Entry) -> list[dict[str, Any]]:
    """All records of one entry."""
    identity = {"entry": entry.name, "loss": entry.loss, "correction": entry.correction}
    done = {"kind": "entry", **identity, "function": _fingerprint(entry)}
    try:
        tables, doubled, slopes = _tables(case, entry, config["proximal_fraction"])(
            points.learner, points.behavior, points.proximal, points.tangent
        )
    except ValueError as error:
        refused = {"kind": "refused", **identity, "reason": first_line(error)}
        return [refused | _by_brute_force(config, case, points, entry), done]
    measured = jax.device_get(
        measurement(points.learner, points.behavior, points.tangent, points.jacobian, tables, doubled, slopes)
    )
    if not np.isfinite(measured["fresh_gradient"]).all() or not np.isfinite(measured["stale_gradient"]).all():
        return [{"kind": "refused", **identity, "reason": "its gradient is not finite at some of the points"}, done]
    if not measured["grad/fresh_norm"].all():
        return [{"kind": "refused", **identity, "reason": "its fresh gradient is 0 at some of the points"}, done]
    kinds = np.array([label["kind"] for label in points.labels])
    rows = []
    for index in np.flatnonzero(kinds == "point"):
        numbers = {name: value[index].item() for name, value in measured.items() if np.ndim(value) == 1}
        label = points.labels[index]
        if label["max_staleness"] == 0 and numbers["bias/norm"] != 0:
            raise ValueError(f"{entry.name}: the control at S = 0 has bias {numbers['bias/norm']:.3e}; it must be exactly 0")
        rows.append({**label, **identity, "drift/from_behavior": float(points.drift[index]), **numbers})
    rows.append({"kind": "curve", **identity, **_curve(config, case, points, measured, kinds)})
    return [*rows, done]


def _by_brute_force(config, case: experiment.Case, points: Points, entry: Entry) -> dict[str, Any]:
    """The relative bias at the ranking point by summing over all groups, small ones, and the reference loss's beside it.

    A function that couples rows sees the rows of one group; a batch of several groups would couple more.
    """
    group_size = config["brute_force_group_size"]
    if not group_size:
        return {}
    at = next(i for i, label in enumerate(points.labels) if _is_ranking_point(config, label))
    arrays = (points.learner, points.behavior, points.proximal, points.jacobian)
    learner, behavior, proximal, jacobian = (jnp.asarray(x[at]) for x in arrays)

    def gradient(loss_fn, denominator):
        def objective(logprobs):
            return exact.brute_force_objective(
                logprobs,
                denominator["behavior"],
                case.task.rewards,
                case.task.mask,
                group_size=group_size,
                loss_fn=loss_fn,
                advantage_fn=case.algorithm.advantage_fn,
                aggregation_fn=case.algorithm.aggregation_fn,
                proximal_logprobs=denominator["proximal"] if entry.proximal else None,
                detached_logprobs=learner,
            )

        return jnp.einsum("byl,byld->d", jax.grad(objective)(learner), jacobian)

    @functools.partial(jit_once, static_argnums=0)
    def relative_bias(loss_fn):
        denominators = {"behavior": jnp.stack([learner, behavior]), "proximal": jnp.stack([learner, proximal])}
        fresh, stale = jax.lax.map(functools.partial(gradient, loss_fn), denominators)
        return jnp.linalg.norm(stale - fresh) / jnp.linalg.norm(fresh)

    return {
        "brute_force": {
            "group_size": group_size,
            "relative_bias": float(relative_bias(entry.loss_fn)),
            "reference_relative_bias": float(relative_bias(case.algorithm.loss_fn)),
        }
    }


def _is_ranking_point(config, label: Mapping[str, Any]) -> bool:
    return (label.get("max_staleness"), label.get("learning_rate")) == tuple(config["rank_at"])


def _curve(config, case, points: Points, measured, kinds) -> dict[str, Any]:
    """δ against drift along one direction, the first-order coefficient or why there is none, and where the law ends."""
    on_curve = np.flatnonzero(kinds == "curve")
    drifts, norms = points.drift[on_curve], measured["bias/norm"][on_curve]
    center = int(np.flatnonzero(kinds == "anchor")[0])
    ahead, behind, ahead_near, behind_near = (measured["stale_gradient"][i] for i in np.flatnonzero(kinds == "guard"))
    derivative = measured["derivative"][center] / points.drift[center]
    row = {
        "drift/from_behavior": drifts.tolist(),
        "bias/norm": norms.tolist(),
        "bias/relative_norm": measured["bias/relative_norm"][on_curve].tolist(),
    }
    try:
        bias.check_derivative(
            derivative,
            measured["fresh_gradient"][center],
            [(ahead, behind), (ahead_near, behind_near)],
            step=guard_step(case.params),
        )
    except bias.FirstOrderError as error:
        return row | {"first_order_coefficient": None, "saturation_drift": None, "no_law": str(error)}
    coefficient = float(np.linalg.norm(derivative))
    left = ~(np.abs(norms - coefficient * drifts) <= config["saturation"] * coefficient * drifts)  # NaN has left it
    saturation = float(drifts[np.argmax(left)]) if left.any() else math.inf
    return row | {"first_order_coefficient": coefficient, "saturation_drift": saturation, "no_law": None}


def _tables(case: experiment.Case, entry: Entry, proximal_fraction: float) -> Callable:
    """(learner, behavior, proximal, tangent) with a leading axis of points -> [N, 2, B, Y, C, L], twice [N, B, Y, C, L].

    The derivative of every row's loss in its own log-probs, ascent direction, with fresh and with stale denominators; the
    stale one with all advantages doubled; the derivative of the fresh one along the drift: all that an audit needs of a loss.
    """

    def table(learner, denominator, scale=1.0):
        groups = _groups(
            case,
            learner,
            denominator["behavior"],
            denominator["behavior"],
            entry.loss_fn,
            behavior=denominator["behavior"],
            proximal=denominator["proximal"] if entry.proximal else None,
        )
        groups = groups._replace(advantages=scale * groups.advantages)
        return closed_form.row_gradients(groups, entry.loss_fn, case.algorithm.aggregation_fn)

    def of_point(arguments):
        learner, behavior, proximal, tangent = arguments
        fresh, stale = {"behavior": learner, "proximal": learner}, {"behavior": behavior, "proximal": proximal}
        # fresh and stale are two turns of one loop body, so that a point without drift has a bias of exactly 0
        both = jax.tree.map(lambda *x: jnp.stack(x), fresh, stale)
        direction = {"behavior": tangent, "proximal": proximal_fraction * tangent}
        slope = jax.jvp(functools.partial(table, learner), (fresh,), (direction,))[1]
        return jax.lax.map(functools.partial(table, learner), both), table(learner, stale, 2.0), slope

    return jit_once(lambda *points: jax.lax.map(of_point, points))


def _measurement(case: experiment.Case) -> Callable:
    """(learner, behavior, tangent, jacobian, and the three of `_tables`) of all points -> everything measured there.

    It holds no loss, so that one compilation serves all entries.
    """

    def weights(learner, sampling, statistics):
        return _groups(case, learner, sampling, statistics, losses.reinforce, behavior=learner)

    def gradient(groups, table, jacobian):
        return jnp.einsum("by,bc,bycl,byld->d", groups.own, groups.others, table, jacobian) / len(case.task.prompts)

    def of_point(arguments):
        learner, behavior, tangent, jacobian, tables, doubled, slope = arguments
        draws = jnp.stack([learner, behavior])

        def of_subset(which):
            groups = weights(learner, draws[which[0]], draws[which[2]])
            return gradient(groups, tables[which[1]], jacobian)

        gradients = jax.lax.map(of_subset, jnp.asarray(list(itertools.product((0, 1), repeat=3))))
        stale = weights(learner, behavior, behavior)
        by_draws = jax.jvp(lambda x: gradient(weights(learner, x, x), tables[0], jacobian), (learner,), (tangent,))[1]
        return _numbers(gradients) | {
            "grad/variance": moments.gradient_moments(stale, jacobian, tables[1]).variance,
            "cut_fraction": moments.cut_fraction(stale, tables[1], doubled),
            "derivative": by_draws + gradient(weights(learner, learner, learner), slope, jacobian),
        }

    return jit_repeated(lambda *points: jax.lax.map(of_point, points))


def _groups(case: experiment.Case, learner, sampling, statistics, loss_fn, *, behavior, proximal=None) -> closed_form.Groups:
    return closed_form.enumerate_groups(
        learner,
        behavior,
        case.task.rewards,
        case.task.mask,
        group_size=case.algorithm.group_size,
        loss_fn=loss_fn,
        advantage_fn=case.algorithm.advantage_fn,
        aggregation_fn=case.algorithm.aggregation_fn,
        proximal_logprobs=proximal,
        sampling_logprobs=sampling,
        statistics_logprobs=statistics,
        detached_logprobs=learner,
        max_compositions=case.algorithm.max_compositions,
    )


def _numbers(gradients: jax.Array) -> dict[str, jax.Array]:
    """δ beside the fresh gradient and the share ⟨part, δ⟩/‖δ‖² of each role, from H of the eight subsets of stale roles."""
    fresh, stale = gradients[0], gradients[-1]
    delta = stale - fresh
    norm, fresh_norm, stale_norm = (jnp.linalg.norm(x) for x in (delta, fresh, stale))
    of_subset = dict(zip(itertools.product((0, 1), repeat=3), gradients, strict=True))
    shares = [bias.shapley_share(of_subset, role)[0] for role in range(3)]
    numbers = {
        "bias/norm": norm,
        "bias/relative_norm": jnp.where(norm == 0, 0.0, norm / fresh_norm),
        "bias/cosine": jnp.vdot(stale, fresh) / (stale_norm * fresh_norm),
        "grad/fresh_norm": fresh_norm,
        "grad/norm": stale_norm,
        "fresh_gradient": fresh,
        "stale_gradient": stale,
    }
    for role, share in zip(bias.ROLES, shares, strict=True):
        numbers[f"share/{role}"] = jnp.vdot(share, delta) / jnp.where(norm == 0, 1.0, norm**2)
    return numbers


def _function(part, field: str) -> Callable:
    resolved = resolve(part["fn"], field if field == "extra_losses" else f"{field}.fn")
    return functools.partial(resolved, **dict(part["options"])) if part["options"] else resolved


def _try(entry: Entry) -> None:
    """The entry on two rows of three tokens, by shape alone: bad options show here."""
    try:
        shape = jax.eval_shape(*_trial(entry)).shape
    except Exception as error:  # a user's function: anything can go wrong in it
        raise ValueError(
            f"{entry.name} cannot be called as (logprobs, old_logprobs, advantages, mask) with its options: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    if shape != (2, 3):
        raise ValueError(f"{entry.name} returns shape {shape} for log-probs of shape (2, 3); a loss is per token")


def _fingerprint(entry: Entry) -> str:
    """Changes with what the entry computes: the hash of its trace, places in memory left out."""
    call, *shapes = _trial(entry)
    trace = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(call)(*shapes)))
    return hashlib.sha256(trace.encode()).hexdigest()[:16]


def _trial(entry: Entry) -> tuple[Any, ...]:
    """A function of arrays and their shapes."""
    token, row = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    asked = closed_form.named_parameters(entry.loss_fn)
    names = [name for name in ("behavior_logprobs", "detached_logprobs") if name in asked]

    def call(logprobs, old_logprobs, advantages, mask, *others):
        return entry.loss_fn(logprobs, old_logprobs, advantages, mask, **dict(zip(names, others, strict=True)))

    return call, token, token, row, jax.ShapeDtypeStruct((2, 3), bool), *[token] * len(names)


def _check_grid(config) -> None:
    if tuple(config["rank_at"]) not in itertools.product(config["max_staleness"], config["learning_rates"]):
        raise ValueError(
            f"config.rank_at is {tuple(config['rank_at'])}; it must be one (S, eta) of max_staleness x learning_rates"
        )
    for key in ("max_staleness", "learning_rates", "drifts"):
        if len(set(config[key])) < len(config[key]):
            raise ValueError(f"config.{key} is {tuple(config[key])}; a value stands there twice")
    if config["rank_at"][0] == 0:
        raise ValueError("config.rank_at has S = 0, where every bias is 0; take a larger S")
    if config["time"] / max(config["learning_rates"]) < max(*config["max_staleness"], 1):
        raise ValueError(
            f"config.time is {config['time']:g}: at the largest learning rate that is fewer updates than the largest S; "
            f"raise it to {max(config['max_staleness']) * max(config['learning_rates']):g} or more"
        )
