"""A supervised warm start on reference answers, until sampled held-out reward reaches a target: RL needs some successes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo.masked import masked_mean
from jax_async_grpo.tasks import TextTask
from jax_async_grpo.training.learner import lean_logprobs
from jax_async_grpo.training.rollouts import WARM_START_STREAM, batch_prompts
from jax_async_grpo.types import Params, Policy

__all__ = ["WarmStarted", "supervised"]


class WarmStarted(NamedTuple):
    """Attributes: params, θ_0 of the RL run; num_updates done; reward, the last held-out one."""

    params: Params
    num_updates: int
    reward: float


def supervised(
    policy: Policy,
    params: Params,
    task: TextTask,
    reward_of: Callable[[Params], float],
    *,
    seed: int,
    num_updates: int,
    num_prompts: int,
    learning_rate: float,
    target_reward: float,
    every: int,
    put: Callable = jnp.asarray,
    on_check: Callable[[int, float], None] = lambda step, reward: None,
) -> WarmStarted:
    """Adam on the mean log-probability of the answers' tokens, stopped at the first check at or above the target.

    Args:
      policy: its hidden states and output matrix are used.
      params: to start from; donated.
      task: questions with answers.
      reward_of: params -> held-out reward.
      seed: of the order of the questions.
      num_updates: at most; 0 = none.
      num_prompts: a batch.
      learning_rate: of Adam.
      target_reward: stops.
      every: updates between checks.
      put: host array -> device array.
      on_check: (updates so far, reward), after each check.

    Returns:
      WarmStarted.
    """
    optimizer = optax.adam(learning_rate)

    def loss(params, prompts, prompt_mask, targets, mask):
        logprobs = lean_logprobs(policy, params, prompts, targets[:, None], mask[:, None], prompt_mask)
        return -masked_mean(logprobs, mask[:, None])

    def step(params, opt_state, *batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, *batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=(0, 1))
    opt_state, done, reward = jax.jit(optimizer.init)(params), 0, reward_of(params)
    on_check(0, reward)
    while done < num_updates and reward < target_reward:
        rows, _ = batch_prompts(seed, len(task.questions), num_prompts, done, stream=WARM_START_STREAM)
        batch = (task.prompts[rows], task.prompt_mask[rows], task.targets[rows], task.target_mask[rows])
        params, opt_state = step(params, opt_state, *map(put, batch))
        done += 1
        if done % every == 0 or done == num_updates:
            reward = reward_of(params)
            on_check(done, reward)
    return WarmStarted(params, done, reward)
