"""Many runs of one static shape as one compiled program: trajectories under lag, and the staleness bias along them.

The learning rate, the staleness schedules, the seeds and the steps to measure at are traced, so one compilation per
(policy, task, optimizer) serves a whole grid. The cells of a chunk share a learning rate, hence the number of updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo import bias, invariants, metrics, staleness
from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.types import Params
from jax_async_grpo.update import create_state, update_step

__all__ = ["CellMeasurements", "bias_grid", "response_msd"]


class CellMeasurements(NamedTuple):
    """What `bias_grid` measures: N cells, M measured steps, K versions.

    Attributes:
      values: {name: [N, M]}, named as in the records: `bias/norm`, `bias/relative_norm`, `bias/cosine`, `grad/norm`,
        `drift/from_behavior`, `drift/cumulative` (‖θ_t − θ_0‖), `staleness/configured`, `staleness/realised`.
      reward: {name: [N, M]}, from `reward_fn`.
      msd: [N, M, K], ‖θ_t − θ_{t−s}‖² for s = 0..K−1.
      violations: {invariant: [N, M]}.
      learner_params: [N, ...], θ_t at the last measured step.
      behavior_params: [N, ...], θ_{t−s} of the same step, s the largest lag of the schedule up to it: a schedule that varies
        may have no lag at that very step.
      pair_staleness: [N], that s, realised.
    """

    values: dict[str, jax.Array]
    reward: dict[str, jax.Array]
    msd: jax.Array
    violations: dict[str, jax.Array]
    learner_params: Params
    behavior_params: Params
    pair_staleness: jax.Array


def bias_grid(
    gradient_fn: Callable,
    update_gradient_fn: Callable,
    reward_fn: Callable,
    optimizer_fn: Callable,
    *,
    capacity: int,
    vectorize: bool = True,
) -> Callable:
    """Compiles runs under lag whose bias δ_t is measured exactly at chosen steps.

    Args:
      gradient_fn: H(learner_params, behavior_params), exact; what δ is measured with.
      update_gradient_fn: `(key, learner_params, behavior_params, step, policy_version)` -> gradient, what the learner follows.
      reward_fn: params -> {name: scalar}.
      optimizer_fn: learning_rate -> optax transformation.
      capacity: K, the largest staleness + 1.
      vectorize: run the cells of a chunk side by side (`vmap`, better for small policies) or in turn (`lax.map`).

    Returns:
      A jitted function (params, learning_rate [], staleness [N, T], keys [N], measure_steps [M] ascending, < T) ->
      CellMeasurements. The params are θ_0 of every cell.
    """

    def run_cell(params, learning_rate, schedule, key, measure_steps):
        def measure(state, configured):
            return _measure(state, configured, params, gradient_fn, reward_fn)

        state, measured = _trajectory(
            params,
            learning_rate,
            lambda t: schedule[t],
            key,
            measure_steps,
            update_gradient_fn,
            optimizer_fn,
            capacity,
            measure,
        )
        largest = jnp.max(jnp.where(jnp.arange(len(schedule)) <= measure_steps[-1], schedule, 0))
        behavior_params, pair_staleness = staleness.read(state.history, largest)
        return CellMeasurements(*measured, state.params, behavior_params, pair_staleness)

    @jit_repeated
    def run(params, learning_rate, schedules, keys, measure_steps):
        def cell(schedule, key):
            return run_cell(params, learning_rate, schedule, key, measure_steps)

        if vectorize:
            return jax.vmap(cell)(schedules, keys)
        return jax.lax.map(lambda arguments: cell(*arguments), (schedules, keys))

    return run


def response_msd(
    gradient_fn: Callable, update_gradient_fn: Callable, optimizer_fn: Callable, *, capacity: int, vectorize: bool = True
) -> Callable:
    """Compiles runs *without* lag that say what bias lag would bring: the drift weighted by how H responds to it.

    M(s) = E‖D_φH(θ_t,φ)|_{φ=θ_t}[θ_{t−s} − θ_t]‖². The plain MSD weighs all directions of the parameters alike, H does not; to
    first order √M(s) is the bias at staleness s.

    Args:
      gradient_fn, update_gradient_fn, optimizer_fn, capacity, vectorize: as in `bias_grid`.

    Returns:
      A jitted function (params, learning_rate [], keys [N], measure_steps [M] ascending, the first ≥ K−1) -> [N, M, K],
      ‖D_φH[θ_{t−s} − θ_t]‖² for s = 0..K−1.
    """

    def measure(state, configured):
        del configured
        _, respond = jax.linearize(lambda behavior: gradient_fn(state.params, behavior), state.params)

        def at_lag(lag):
            version, _ = staleness.read(state.history, lag)
            return optax.tree.norm(respond(optax.tree.sub(version, state.params)), squared=True)

        return jax.vmap(at_lag)(jnp.arange(capacity))

    @jit_repeated
    def run(params, learning_rate, keys, measure_steps):
        def cell(key):
            return _trajectory(
                params, learning_rate, _no_lag, key, measure_steps, update_gradient_fn, optimizer_fn, capacity, measure
            )[1]

        return jax.vmap(cell)(keys) if vectorize else jax.lax.map(cell, keys)

    return run


def _no_lag(step):
    return jnp.zeros_like(step)


def _trajectory(params, learning_rate, staleness_at, key, measure_steps, update_gradient_fn, optimizer_fn, capacity, measure):
    """Updates up to each of the steps to measure at; (the last state, `measure(state, configured staleness)` stacked)."""
    optimizer = optimizer_fn(learning_rate)

    def advance(step, state):
        return update_step(state, staleness_at(step), lambda *arguments: update_gradient_fn(key, *arguments), optimizer)[0]

    def visit(state, target):
        state = jax.lax.fori_loop(state.step, target.astype(state.step.dtype), advance, state)
        return state, measure(state, staleness_at(target))

    return jax.lax.scan(visit, create_state(params, optimizer, capacity), measure_steps)


def _measure(state, configured, start_params, gradient_fn, reward_fn):
    """δ_t, the drift behind it and the invariants at one step; changes nothing."""
    behavior_params, realised = staleness.read(state.history, configured)
    measured = bias.surrogate_bias(gradient_fn, state.params, behavior_params)
    drift = optax.tree.norm(optax.tree.sub(state.params, behavior_params))
    values = {
        "bias/norm": measured.norm,
        "bias/relative_norm": measured.relative_norm,
        "bias/cosine": measured.cosine,
        "grad/norm": optax.tree.norm(measured.stale_gradient),
        "drift/from_behavior": drift,
        "drift/cumulative": optax.tree.norm(optax.tree.sub(state.params, start_params)),
        "staleness/configured": configured,
        "staleness/realised": realised,
    }
    violations = {
        "ring_version": invariants.ring_version_violation(state.history, configured),
        "staleness_within_bound": invariants.staleness_within_bound_violation(realised, configured),
        # without lag the behavior policy is the learner, bit for bit: no drift and no bias
        "zero_bias_at_zero_staleness": jnp.where(realised == 0, drift + measured.norm, 0.0),
        "finite_tree": invariants.finite_tree_violation((state.params, measured.stale_gradient, measured.fresh_gradient)),
    }
    return values, reward_fn(state.params), metrics.msd(state.history), violations
