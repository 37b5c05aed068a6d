"""Bandits: one action a prompt, so every expectation is a short sum. The smallest tasks on which staleness already bites."""

from __future__ import annotations

import numpy as np

from jax_async_grpo.tasks.base import make_task
from jax_async_grpo.tasks.enumeration import enumerate_completions
from jax_async_grpo.types import Task

__all__ = ["PROXY_GOLD_LOGITS", "bandit", "proxy_gold_bandit"]

PROXY_GOLD_LOGITS = (0.0, 0.0, 0.0, -2.0)
"""Initial logits for `proxy_gold_bandit`: the action that only the proxy likes starts rare, so gold rises before it falls."""


def bandit(rewards: np.ndarray, *, gold_rewards: np.ndarray | None = None, name: str = "bandit") -> Task:
    """A contextual bandit: one prompt token per prompt, one completion token per action.

    Tokens 0..A-1 are the actions and A..A+B-1 the prompts; V = A + B.

    Args:
      rewards: [B, A], the reward of every action under every prompt.
      gold_rewards: [B, A], what the learner is judged on; None for the same `rewards`.
      name: what records and tables call it.

    Returns:
      A task with P = L = 1 and Y = A.

    Raises:
      ValueError: `rewards` has no [B, A] shape, fewer than 2 actions, or a value that is not finite.

    Example:
      >>> bandit([[0.0, 1.0, 0.5]]).prompts.tolist()
      [[3]]
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must have shape [B, A] with at least 1 prompt and 2 actions, got {rewards.shape}")
    num_prompts, num_actions = rewards.shape
    allowed = np.arange(num_actions + num_prompts)[None] < num_actions
    completions, mask = enumerate_completions(allowed)
    prompts = num_actions + np.arange(num_prompts)[:, None]
    return make_task(
        name,
        prompts=prompts,
        completions=completions,
        mask=mask,
        allowed=allowed,
        rewards=rewards,
        gold_rewards=gold_rewards,
    )


def proxy_gold_bandit() -> Task:
    """Four actions whose proxy reward (0, 0, ½, 1) is hackable: the gold reward (0, 0, 1, 0) likes another action best.

    Trained on the proxy from `PROXY_GOLD_LOGITS`, the gold reward rises, then falls for good: the smallest over-optimization.

    Returns:
      A one-prompt bandit whose `rewards` are the proxy and whose `gold_rewards` are the gold.

    Example:
      >>> proxy_gold_bandit().gold_rewards.tolist()
      [[0.0, 0.0, 1.0, 0.0]]
    """
    return bandit([[0.0, 0.0, 0.5, 1.0]], gold_rewards=[[0.0, 0.0, 1.0, 0.0]], name="proxy_gold_bandit")
