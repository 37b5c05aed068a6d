"""One learner update on stale rollouts as a pure function of the state: read φ_t, take H, step, remember θ_{t+1}."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from jax_async_grpo import staleness as staleness_lib
from jax_async_grpo.staleness import ParamHistory
from jax_async_grpo.types import Params

__all__ = ["TrainState", "UpdateInfo", "create_state", "update_step"]


class TrainState(NamedTuple):
    """Everything an update changes; random numbers are folded from the step, so no key is kept here.

    Attributes:
      params: θ_t.
      opt_state: of the optax transformation.
      history: the ring; its latest version is θ_t, its step is t.
    """

    params: Params
    opt_state: optax.OptState
    history: ParamHistory

    @property
    def step(self) -> jax.Array:
        """t, the number of updates done."""
        return self.history.step


class UpdateInfo(NamedTuple):
    """What an update used.

    Attributes:
      gradient: H(θ_t, φ_t) or its estimate, ascent direction.
      behavior_params: φ_t.
      staleness: [] int, realised, learner updates.
    """

    gradient: Params
    behavior_params: Params
    staleness: jax.Array


def create_state(params: Params, optimizer: optax.GradientTransformation, capacity: int, **history_options) -> TrainState:
    """The state at step 0, θ_0 already in the ring.

    Args:
      params: θ_0.
      optimizer: an optax transformation.
      capacity: K, the maximum staleness + 1.
      **history_options: of `staleness.create_history`.

    Returns:
      TrainState.
    """
    history = staleness_lib.push(staleness_lib.create_history(params, capacity, **history_options), params)
    return TrainState(params, optimizer.init(params), history)


def update_step(
    state: TrainState,
    staleness: jax.Array,
    gradient_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    max_staleness: int | jax.Array | None = None,
    extra_args_fn: Callable | None = None,
) -> tuple[TrainState, UpdateInfo]:
    """θ_{t+1} = θ_t + (optimizer step on H(θ_t, φ_t)), φ_t = θ_{t−min(s,t)} (arXiv 2607.01083).

    Args:
      state: at step t.
      staleness: [] int, the configured s_t < K, learner updates.
      gradient_fn: `gradient_fn(learner_params, behavior_params, step, policy_version)` -> the gradient, ascent direction.
      optimizer: the optax transformation `create_state` got; it may hold a traced learning rate.
      max_staleness: [] int, the largest lag of the schedule, which the optimizer gets as its extra argument `staleness`
        (the realised lag of this update would say nothing about the next one); None = K − 1.
      extra_args_fn: with the arguments of `gradient_fn` -> dict of further extra arguments, such as `ess`.

    Returns:
      (the state at step t + 1, UpdateInfo).
    """
    behavior_params, realised = staleness_lib.read(state.history, staleness)
    arguments = (state.params, behavior_params, state.step, state.step - realised)
    gradient = gradient_fn(*arguments)
    extra_args = {"staleness": state.history.capacity - 1 if max_staleness is None else max_staleness}
    extra_args |= {} if extra_args_fn is None else extra_args_fn(*arguments)
    # optax descends
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        optax.tree.scale(-1.0, gradient), state.opt_state, state.params, **extra_args
    )
    params = optax.apply_updates(state.params, updates)
    history = staleness_lib.push(state.history, params)
    return TrainState(params, opt_state, history), UpdateInfo(gradient, behavior_params, realised)
