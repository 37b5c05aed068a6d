"""A short supervised phase before reinforcement learning: a policy that is right sometimes, as a pretrained model would be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo.policies import completion_logprobs
from jax_async_grpo.types import Params, Policy, Task

__all__ = ["WarmStart", "supervised"]


class WarmStart(NamedTuple):
    """What `supervised` found.

    Attributes:
      params: the parameters at the first update whose expected reward reached the target.
      reward: J at `params`.
      updates: updates made, 0 where the given parameters were there already.
    """

    params: Params
    reward: float
    updates: int


class _Progress(NamedTuple):
    params: Params
    optimizer_state: optax.OptState
    reward: jax.Array
    updates: jax.Array
    is_done: jax.Array


def supervised(
    policy: Policy,
    params: Params,
    task: Task,
    *,
    target_reward: float = 0.4,
    learning_rate: float = 3e-4,
    max_updates: int = 1000,
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam,
) -> WarmStart:
    """Learns the best-scored completions until the expected reward first reaches a target.

    Ascends mean_x mean_{y ∈ best(x)} log π_θ(y|x), best(x) = {y : R(x,y) = max_y' R(x,y')}, and stops at the first θ with
    J(θ) = mean_x Σ_y π_θ(y|x) R(x,y) ≥ `target_reward`; both are exact, so nothing is drawn and the result is a function of the
    arguments. A small learning rate lands closer above the target.

    Args:
      policy: the policy.
      params: where it starts.
      task: prompts, completions and rewards.
      target_reward: J to reach, below the mean reward of the best completions.
      learning_rate: what `optimizer` is called with.
      max_updates: updates to make at most.
      optimizer: learning rate -> optax transformation.

    Returns:
      The parameters, their exact J and the number of updates.

    Raises:
      ValueError: an argument out of its range, or a target not reached within `max_updates`.

    Example:
      >>> from jax_async_grpo.policies import tabular
      >>> from jax_async_grpo.tasks import bandit
      >>> task, policy = bandit([[0.0, 1.0]]), tabular(vocab_size=3, context_length=1)
      >>> supervised(policy, policy.init(jax.random.key(0)), task, target_reward=0.6, learning_rate=0.1).updates
      3
    """
    best = np.isclose(task.rewards, task.rewards.max(axis=1, keepdims=True), rtol=0, atol=1e-12)
    _check_arguments(target_reward, learning_rate, max_updates, float(task.rewards.max(axis=1).mean()))
    weights = best / best.sum(axis=1, keepdims=True) / len(best)
    transformation = optimizer(learning_rate)

    def loss_and_reward(params: Params) -> tuple[jax.Array, jax.Array]:
        logprobs = completion_logprobs(
            policy, params, task.prompts, task.completions, task.mask, prompt_mask=task.prompt_mask, allowed=task.allowed
        ).sum(axis=-1)
        return -jnp.sum(weights * logprobs), jnp.mean(jnp.sum(jnp.exp(logprobs) * task.rewards, axis=-1))

    def step(progress: _Progress) -> _Progress:
        """Evaluates the parameters, then moves them unless they are what was looked for: one compilation of the policy."""
        (_, reward), gradient = jax.value_and_grad(loss_and_reward, has_aux=True)(progress.params)
        # `not <` rather than `>=`: a NaN ends the loop too.
        is_done = ~(reward < target_reward) | (progress.updates >= max_updates)
        change, state = transformation.update(gradient, progress.optimizer_state, progress.params)
        moved = (optax.apply_updates(progress.params, change), state)
        params, state = jax.tree.map(
            lambda new, old: jnp.where(is_done, old, new), moved, (progress.params, progress.optimizer_state)
        )
        return _Progress(params, state, reward.astype(progress.reward.dtype), progress.updates + ~is_done, is_done)

    start = _Progress(params, transformation.init(params), jnp.zeros(()), jnp.array(0), jnp.array(False))
    end = jax.lax.while_loop(lambda progress: ~progress.is_done, step, start)
    if not end.reward >= target_reward:
        raise ValueError(
            f"target_reward={target_reward} is not reached in max_updates={max_updates}: the expected reward after "
            f"{int(end.updates)} updates is {float(end.reward):.4g}; raise max_updates or change learning_rate={learning_rate}"
        )
    return WarmStart(end.params, float(end.reward), int(end.updates))


def _check_arguments(target_reward: float, learning_rate: float, max_updates: int, best_reward: float) -> None:
    if not target_reward < best_reward:
        raise ValueError(
            f"target_reward={target_reward} must be below {best_reward:.4g}, the mean reward of the best completions"
        )
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate={learning_rate} must be positive and finite")
    if max_updates < 1:
        raise ValueError(f"max_updates={max_updates} must be at least 1")
