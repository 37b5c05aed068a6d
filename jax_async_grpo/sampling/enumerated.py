"""Groups drawn from the exact distribution over the completions of an enumerable task."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.types import Rollouts, Task

__all__ = ["sample_enumerated"]


def sample_enumerated(
    key: jax.Array,
    task: Task,
    behavior_logprobs: jax.Array,
    group_size: int,
    *,
    prompt_ids: jax.Array | None = None,
    step: jax.Array | int = 0,
    policy_version: jax.Array | int = 0,
) -> Rollouts:
    """Draws G completions of every prompt of an enumerable task, by the Gumbel-max trick over its Y completions.

    Args:
      key: the stream's key; it is folded, not consumed, so that a step can be drawn again.
      task: prompts, completions and rewards.
      behavior_logprobs: [B, Y, L] log π_φ of every token, nats (`exact.task_logprobs`).
      group_size: G.
      prompt_ids: [B] int, global ids of the task's prompts; default their rows. Pass them where a task holds a shard or a
        shuffle of the prompts, so that a prompt keeps its draws.
      step: the learner update that consumes the rollouts.
      policy_version: the learner update whose parameters φ are.

    Returns:
      Rollouts with `completion_index` set.
    """
    step_key = jax.random.fold_in(key, step)

    def of_prompt(prompt, sequence_logprobs):
        prompt_key = jax.random.fold_in(step_key, prompt)
        keys = jax.vmap(lambda member: jax.random.fold_in(prompt_key, member))(jnp.arange(group_size))
        return jax.vmap(lambda member_key: jax.random.categorical(member_key, sequence_logprobs))(keys)

    prompt_ids = jnp.arange(task.prompts.shape[0]) if prompt_ids is None else jnp.asarray(prompt_ids)
    index = jax.vmap(of_prompt)(prompt_ids, jnp.sum(behavior_logprobs, axis=-1))
    return Rollouts(
        prompts=jnp.asarray(task.prompts),
        prompt_mask=jnp.asarray(task.prompt_mask),
        completions=jnp.asarray(task.completions)[index],
        mask=jnp.asarray(task.mask)[index],
        behavior_logprobs=jax.vmap(lambda rows, chosen: rows[chosen])(behavior_logprobs, index),
        rewards=jnp.take_along_axis(jnp.asarray(task.rewards), index, axis=1),
        policy_version=jnp.broadcast_to(jnp.asarray(policy_version), index.shape),
        completion_index=index,
    )
