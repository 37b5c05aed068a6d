"""Tasks whose completions can all be enumerated (bandits, digit sums, reasoning-gym questions), and tasks of free text."""

from __future__ import annotations

from jax_async_grpo.tasks.bandit import PROXY_GOLD_LOGITS, bandit, proxy_gold_bandit
from jax_async_grpo.tasks.base import make_task
from jax_async_grpo.tasks.digits import digit_sum, digit_text, digit_tokenizer
from jax_async_grpo.tasks.enumeration import count_completions, enumerate_completions
from jax_async_grpo.tasks.jsonl import jsonl_task
from jax_async_grpo.tasks.reasoning import reasoning_gym
from jax_async_grpo.tasks.reasoning_text import reasoning_text
from jax_async_grpo.tasks.text import TextTask, make_text_task
from jax_async_grpo.tasks.tokenizers import Tokenizer, character_tokenizer, load_tokenizer
from jax_async_grpo.tasks.verification import HangingVerifiers, Scores, Verifiers

__all__ = [
    "PROXY_GOLD_LOGITS",
    "HangingVerifiers",
    "Scores",
    "TextTask",
    "Tokenizer",
    "Verifiers",
    "bandit",
    "character_tokenizer",
    "count_completions",
    "digit_sum",
    "digit_text",
    "digit_tokenizer",
    "enumerate_completions",
    "jsonl_task",
    "load_tokenizer",
    "make_task",
    "make_text_task",
    "proxy_gold_bandit",
    "reasoning_gym",
    "reasoning_text",
]
