"""Policies, and the log-probabilities they give to completions."""

from __future__ import annotations

from jax_async_grpo.policies.adapters import from_logits, from_nnx
from jax_async_grpo.policies.decoder import decoder
from jax_async_grpo.policies.features import linear, mlp, tabular
from jax_async_grpo.policies.logprobs import completion_hidden, completion_logprobs, logits_of, token_logprobs
from jax_async_grpo.policies.visibility import visibility

__all__ = [
    "completion_hidden",
    "completion_logprobs",
    "decoder",
    "from_logits",
    "from_nnx",
    "linear",
    "logits_of",
    "mlp",
    "tabular",
    "token_logprobs",
    "visibility",
]
