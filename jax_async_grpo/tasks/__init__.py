"""Tasks whose completions can all be enumerated and scored: bandits, digit sums and reasoning-gym questions."""

from __future__ import annotations

from jax_async_grpo.tasks.bandit import PROXY_GOLD_LOGITS, bandit, proxy_gold_bandit
from jax_async_grpo.tasks.base import make_task
from jax_async_grpo.tasks.digits import digit_sum
from jax_async_grpo.tasks.enumeration import count_completions, enumerate_completions
from jax_async_grpo.tasks.reasoning import reasoning_gym

__all__ = [
    "PROXY_GOLD_LOGITS",
    "bandit",
    "count_completions",
    "digit_sum",
    "enumerate_completions",
    "make_task",
    "proxy_gold_bandit",
    "reasoning_gym",
]
