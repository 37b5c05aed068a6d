"""Many runs of one static shape as one compiled program: trajectories under lag, and what is measured along them.

The learning rate, the staleness schedules, the seeds and the steps to measure at are traced, so one compilation per
(policy, task, optimizer) serves a whole grid. `bias_grid` measures the staleness bias itself; `training_grid` follows runs to
the end of their horizon, whatever becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jax_async_grpo import bias, invariants, metrics, staleness
from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.types import Params
from jax_async_grpo.update import create_state, update_step

__all__ = ["CellMeasurements", "TrainingCurves", "bias_grid", "response_msd", "training_grid"]

_TWIN_STREAM = 2**32 - 1  # folded into a run's key for draws no update makes; updates fold their step, which is smaller


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


class TrainingCurves(NamedTuple):
    """What `training_grid` measures: N runs, M measured steps, K versions.

    Attributes:
      values: {name: [N, M]}: what `observe_fn` returns for (θ_t, φ_t), and `drift/from_behavior`, `drift/cumulative`,
        `staleness/realised`, `grad/norm`, `grad/cosine_prev` (of the gradients of updates t−1 and t; NaN at t = 0) and
        `grad/cosine_twin` (of two independent batches at the same (θ_t, φ_t): what noise leaves of a cosine of 1).
      msd: [N, M, K], ‖θ_t − θ_{t−s}‖² for s = 0..K−1; NaN where s > t.
      violations: {invariant: [N, M]}.
    """

    values: dict[str, jax.Array]
    msd: jax.Array
    violations: dict[str, jax.Array]


def training_grid(
    update_gradient_fn: Callable,
    observe_fn: Callable,
    optimizer_fn: Callable,
    *,
    capacity: int,
    extra_args_fn: Callable | None = None,
    vectorize: bool = True,
    devices: list[jax.Device] | None = None,
) -> Callable:
    """Compiles runs under lag that are followed from θ_0 to the end of their horizon.

    Args:
      update_gradient_fn: `(key, learner_params, behavior_params, step, policy_version)` -> gradient, what the learner follows.
      observe_fn: `(learner_params, behavior_params)` -> {name: scalar}, measured at chosen steps.
      optimizer_fn: learning_rate -> optax transformation.
      capacity: K, at least the largest staleness + 2, since the gradient of the update before is computed again.
      extra_args_fn: as in `update.update_step`; the optimizer also gets the largest lag of the run's schedule as `staleness`.
      vectorize: run the cells side by side (`vmap`, better for small policies) or in turn (`lax.map`).
      devices: the cells are spread over them, in equal shares; default all local devices.

    Returns:
      A function (params, learning_rates [N], staleness [N, T+1], keys [N], measure_steps [M] ascending, ≤ T) ->
      `TrainingCurves`. N is any number: a share that does not come out even repeats the last cell, which is dropped again.
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("cells",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("cells"), PartitionSpec()

    def run_cell(params, learning_rate, schedule, key, measure_steps):
        def measure(state, configured):
            del configured
            return _measure_training(state, schedule, key, params, update_gradient_fn, observe_fn)

        return _trajectory(
            params,
            learning_rate,
            lambda t: schedule[t],
            key,
            measure_steps,
            update_gradient_fn,
            optimizer_fn,
            capacity,
            measure,
            max_staleness=jnp.max(schedule),
            extra_args_fn=extra_args_fn,
        )[1]

    def share(params, learning_rates, schedules, keys, measure_steps):
        def cell(arguments):
            learning_rate, schedule, key = arguments
            return run_cell(params, learning_rate, schedule, key, measure_steps)

        cells = (learning_rates, schedules, keys)
        return TrainingCurves(*(jax.vmap(cell)(cells) if vectorize else jax.lax.map(cell, cells)))

    # No share needs another: every device runs its own loop to the end, without a collective.
    run_shares = jit_repeated(
        jax.shard_map(share, mesh=mesh, in_specs=(whole, split, split, split, whole), out_specs=split, check_vma=False)
    )

    def run(params, learning_rates, schedules, keys, measure_steps) -> TrainingCurves:
        num_cells = len(learning_rates)
        index = np.minimum(np.arange(-(-num_cells // len(devices)) * len(devices)), num_cells - 1)
        curves = run_shares(
            params, jnp.asarray(learning_rates)[index], jnp.asarray(schedules)[index], keys[index], jnp.asarray(measure_steps)
        )
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_cells], curves)

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


def _trajectory(
    params,
    learning_rate,
    staleness_at,
    key,
    measure_steps,
    update_gradient_fn,
    optimizer_fn,
    capacity,
    measure,
    **update_options,
):
    """Updates up to each of the steps to measure at; (the last state, `measure(state, configured staleness)` stacked)."""
    optimizer = optimizer_fn(learning_rate)

    def advance(step, state):
        def gradient_fn(*arguments):
            return update_gradient_fn(key, *arguments)

        return update_step(state, staleness_at(step), gradient_fn, optimizer, **update_options)[0]

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


def _measure_training(state, schedule, key, start_params, update_gradient_fn, observe_fn):
    """Reward, drift and the character of the gradients at one step; changes nothing."""

    def gradient_at(arguments):
        """The gradient of update t − lag, from the versions it used."""
        lag, key = arguments
        step = state.step - lag
        learner, _ = staleness.read(state.history, lag)
        behavior, age = staleness.read(state.history, lag + jnp.minimum(schedule[step], step))
        return update_gradient_fn(key, learner, behavior, step, state.step - age)

    has_previous = state.step > 0
    behavior_params, _ = staleness.read(state.history, schedule[state.step])
    lags = jnp.stack([0, 0, jnp.where(has_previous, 1, 0)])
    keys = jnp.stack([key, jax.random.fold_in(key, _TWIN_STREAM), key])
    gradients = jax.lax.map(gradient_at, (lags, keys))  # map: one compilation of the policy
    gradient, twin, previous = (jax.tree.map(lambda leaf, i=i: leaf[i], gradients) for i in range(3))
    realised = jnp.minimum(schedule[state.step], state.step)
    drift = optax.tree.norm(optax.tree.sub(state.params, behavior_params))
    values = {
        **observe_fn(state.params, behavior_params),
        "drift/from_behavior": drift,
        "drift/cumulative": optax.tree.norm(optax.tree.sub(state.params, start_params)),
        "staleness/realised": realised,
        "grad/norm": optax.tree.norm(gradient),
        "grad/cosine_prev": jnp.where(has_previous, metrics.gradient_cosine(gradient, previous), jnp.nan),
        "grad/cosine_twin": metrics.gradient_cosine(gradient, twin),
    }
    violations = {
        "ring_version": invariants.ring_version_violation(state.history, schedule[state.step]),
        "zero_drift_at_zero_staleness": jnp.where(realised == 0, drift, 0.0),
    }
    return values, metrics.msd(state.history), violations
