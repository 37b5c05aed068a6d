"""The stale points of an audit: pairs (θ, φ) of reference runs, and along one direction of their drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jax_async_grpo import experiment, moments, staleness, sweeps
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.exact import task_logprobs
from jax_async_grpo.types import Params

__all__ = ["Points", "build_points", "guard_step", "reference_case"]

_GUARD_STEP = 1e-6  # times max(1, ‖θ‖): inside the narrowest clip in use, 3e-4 of GSPO


class Points(NamedTuple):
    """Stale points as arrays; N points, D parameters.

    Attributes:
      labels: what each point is, for the records; [N] dicts.
      learner_params: [N, D] θ.
      behavior_params: [N, D] φ.
      learner: [N, B, Y, L] log π_θ.
      behavior: [N, B, Y, L] log π_φ.
      proximal: [N, B, Y, L] log-probs of the proximal policy.
      tangent: [N, B, Y, L] derivative of log π at θ along φ − θ.
      jacobian: [N, B, Y, L, D] of the learner's.
      drift: [N] ‖θ−φ‖.
    """

    labels: list[dict[str, Any]]
    learner_params: jax.Array
    behavior_params: jax.Array
    learner: jax.Array
    behavior: jax.Array
    proximal: jax.Array
    tangent: jax.Array
    jacobian: jax.Array
    drift: np.ndarray


def build_points(config: Mapping[str, Any], case: experiment.Case) -> Points:
    """The grid's points, the curve along the ranking point's drift, and the four of the first-order check."""
    pairs = []  # (label, θ, φ, proximal)
    reference = None
    run = _reference_program(config, case)
    for learning_rate in config["learning_rates"]:
        measured = run(learning_rate)
        for index, max_staleness in enumerate(config["max_staleness"]):
            learner, behavior = (
                ravel_pytree(jax.tree.map(lambda leaf, i=index: leaf[i], tree))[0]
                for tree in (measured.learner_params, measured.behavior_params)
            )
            label = {"kind": "point", "max_staleness": int(max_staleness), "learning_rate": float(learning_rate)}
            pairs.append((label, learner, behavior))
            if (max_staleness, learning_rate) == tuple(config["rank_at"]):
                reference = (learner, behavior)
    learner, behavior = reference
    drift = jnp.linalg.norm(behavior - learner)
    if not drift > 0:
        raise ValueError(f"config.rank_at is {tuple(config['rank_at'])}: the run has no drift there; raise `time` or S")
    unit = (behavior - learner) / drift
    pairs += [({"kind": "curve"}, learner, learner + length * unit) for length in sorted(config["drifts"])]
    step = guard_step(case.params)
    pairs += [({"kind": "guard"}, learner, learner + h * unit) for h in (step, -step, step / 4, -step / 4)]
    pairs.append(({"kind": "anchor"}, learner, learner + step * unit))
    labels, learners, behaviors = zip(*pairs, strict=True)
    return _as_arrays(config, case, list(labels), jnp.stack(learners), jnp.stack(behaviors))


def _as_arrays(config, case, labels, learners, behaviors) -> Points:
    unravel = ravel_pytree(case.params)[1]
    proximals = learners + config["proximal_fraction"] * (behaviors - learners)

    @jit_once
    def compute(learners, behaviors, proximals):
        def logprobs(flat):
            return task_logprobs(case.policy, unravel(flat), case.task)

        jacobian = jax.lax.map(lambda flat: moments.logprob_jacobian(case.policy, unravel(flat), case.task), learners)
        tangent = jnp.einsum("nbyld,nd->nbyl", jacobian, behaviors - learners)
        return *(jax.lax.map(logprobs, x) for x in (learners, behaviors, proximals)), tangent, jacobian

    drift = np.linalg.norm(np.asarray(behaviors - learners), axis=1)
    return Points(labels, learners, behaviors, *compute(learners, behaviors, proximals), drift)


def _reference_program(config, case: experiment.Case) -> Callable:
    """learning rate -> the runs of all S up to η·t = time, one compilation for all learning rates."""
    capacity = max(*config["max_staleness"], 1) + 1
    run = sweeps.bias_grid(
        case.gradient, case.update_gradient("exact"), case.rewards, case.optimizer_fn, capacity=capacity, vectorize=True
    )
    longest = math.floor(config["time"] / min(config["learning_rates"])) + 1
    schedules = np.stack([staleness.fixed(s, longest) for s in config["max_staleness"]])
    keys = jax.random.split(jax.random.key(config["seed"]), len(schedules))  # nothing is drawn

    def of_rate(learning_rate: float) -> sweeps.CellMeasurements:
        last = math.floor(config["time"] / learning_rate)
        return run(case.params, learning_rate, schedules, keys, np.array([last]))

    return of_rate


def reference_case(config: Mapping[str, Any]) -> experiment.Case:
    """The audit's policy, task and functions as a case of the bias measurement, which builds and checks them."""
    names = ("policy", "policy_options", "task", "task_options", "optimizer", "optimizer_options")
    shared = ("seed", "group_size", "advantage", "advantage_options", "aggregation", "aggregation_options", "max_compositions")
    loss = dict(loss=config["reference_loss"], loss_options={}, unclipped_loss=config["reference_loss"])
    part = {name: config[name] for name in names} | {"warm_start": {}}
    return experiment.build_case({name: config[name] for name in shared} | loss | {"cases": {"audit": part}}, "audit")


def guard_step(params: Params) -> float:
    """Parameter distance of the finite differences that check the first-order law."""
    return _GUARD_STEP * max(1.0, float(jnp.linalg.norm(ravel_pytree(params)[0])))
