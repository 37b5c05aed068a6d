"""The entropy of the next token, and which tokens have the most of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import token_inputs

__all__ = ["entropy", "top_entropy_mask"]


def entropy(logits: jax.Array) -> jax.Array:
    """−Σ_v π_v·log π_v of softmax(logits): the exact entropy of the next token.

    Args:
      logits: [..., V]; −inf marks a token that cannot be drawn.

    Returns:
      [...] nats, at least float32.

    Raises:
      ValueError: logits is a scalar.
    """
    if jnp.ndim(logits) < 1:
        raise ValueError("logits is a scalar; it must be [..., V]")
    logits = jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32))
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    possible = logprobs != -jnp.inf  # NaN stays NaN
    finite = jnp.where(possible, logprobs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(finite) * finite, 0.0), axis=-1)


def top_entropy_mask(
    entropies: jax.Array, mask: jax.Array | None = None, *, fraction: float, axis_name: str | None = None
) -> jax.Array:
    """True on the valid tokens whose entropy reaches the (1 − fraction) quantile of the batch (arXiv 2506.01939).

    The quantile interpolates linearly between order statistics, as NumPy and torch do. The mask couples all tokens of the
    batch; multiply it into the loss mask.

    Args:
      entropies: [..., L] nats; no gradient passes through a mask.
      mask: [..., L] bool or 0/1, None = all valid.
      fraction: share of tokens to keep, in (0, 1]; ties keep more.
      axis_name: of a mapped axis over which the batch is sharded in equal parts, None = this batch is all of it.

    Returns:
      [..., L] bool, False outside the mask.

    Raises:
      ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
    entropies, valid = token_inputs(mask, entropies=entropies)
    ordered = jnp.where(valid, entropies, jnp.inf).reshape(-1)
    count = jnp.sum(valid)
    if axis_name is not None:
        ordered = jax.lax.all_gather(ordered, axis_name, tiled=True)
        count = jax.lax.psum(count, axis_name)
    ordered = jnp.sort(ordered)
    position = (1 - fraction) * jnp.maximum(count - 1, 0).astype(ordered.dtype)
    below = jnp.floor(position).astype(jnp.int32)
    lower, upper = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
    threshold = lower + (position - below) * jnp.where(upper > lower, upper - lower, 0.0)
    return valid & (entropies >= threshold)
