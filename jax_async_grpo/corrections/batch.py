"""What needs the whole batch: normalized weights, a mask by the batch's second moment, and the count of what was dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.aggregation import MaskedSum
from jax_async_grpo.losses.arguments import check_positive, token_inputs
from jax_async_grpo.masked import masked_mean

__all__ = ["batch_normalize", "dropped_fraction", "dropped_row_fraction", "second_moment_mask"]


def batch_normalize(
    weights: jax.Array, mask: jax.Array | None = None, *, by_row: bool = False, axis_name: str | None = None
) -> jax.Array:
    """w / mean(w) over the valid tokens of the batch (self-normalized importance sampling); 0 where all weights are 0.

    The mean is differentiated with the weights. It couples all rows: `exact` refuses a loss with it.

    Args:
      weights: [..., L], of a correction.
      mask: [..., L] bool or 0/1, None = all valid. Dropped tokens, whose weight is 0, count.
      by_row: average the tokens of each completion first, then the completions that have one: long completions weigh no more
        than short ones (verl does so with weights of completions).
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.

    Returns:
      [..., L] weights of mean 1 over all shards.

    Raises:
      ValueError: shapes that do not match.
    """
    weights, valid = token_inputs(mask, weights=weights)
    values, counted = (masked_mean(weights, valid, axis=-1), jnp.any(valid, axis=-1)) if by_row else (weights, valid)
    total, count = jnp.sum(values), jnp.sum(counted, dtype=weights.dtype)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return weights * jnp.where(total > 0, count / jnp.where(total > 0, total, 1.0), 0.0)


def second_moment_mask(
    proximal_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold: float = 0.04,
    axis_name: str | None = None,
) -> jax.Array:
    """0 on the fewest tokens with the largest (log μ − log π_prox)² whose removal leaves a mean < threshold, else 1.

    M2PO (arXiv 2510.01161) as AReaL has it: a mask beside `losses.decoupled_ppo`, where `losses.m2po` adapts the clip. The one
    token with the smallest square always stays. Equal squares are dropped from the back of the batch, so the shards
    of a batch split along its first axis agree with the whole. It couples all rows: `exact` refuses a loss with it.

    Args:
      proximal_logprobs: [..., L] log π_prox of the tokens, nats.
      behavior_logprobs: [..., L] log μ of the policy that drew them, nats.
      mask: [..., L] bool or 0/1, None = all valid.
      threshold: nats², positive.
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.

    Returns:
      [..., L] 0 or 1, float.

    Raises:
      ValueError: a threshold outside its range, or shapes that do not match.
    """
    check_positive(threshold=threshold)
    proximal, behavior, valid = token_inputs(mask, proximal_logprobs=proximal_logprobs, behavior_logprobs=behavior_logprobs)
    squares, candidates, first = ((behavior - proximal) ** 2).ravel(), valid.ravel(), 0
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * valid.size
        squares, candidates = (jax.lax.all_gather(x, axis_name).ravel() for x in (squares, candidates))
    order = jnp.lexsort((squares, ~candidates))  # stable: valid tokens first, smallest square first
    number = jnp.arange(1, squares.size + 1)
    within = (jnp.cumsum(squares[order]) / number < threshold) & candidates[order]
    num_kept = jnp.max(jnp.where(within, number, 1))
    kept = jnp.zeros(squares.shape, bool).at[order].set(number <= num_kept)
    own = jax.lax.dynamic_slice(kept, (first,), (valid.size,)).reshape(valid.shape)
    return (own & valid).astype(proximal.dtype)


def dropped_fraction(weights: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """How many valid tokens have weight exactly 0, of how many; `.mean()` is their fraction.

    Args:
      weights: [..., L], of a correction.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      MaskedSum, to be added over shards and micro-batches.

    Raises:
      ValueError: shapes that do not match.
    """
    weights, valid = token_inputs(mask, weights=weights)
    return MaskedSum(jnp.sum((weights == 0) & valid, dtype=weights.dtype), jnp.sum(valid, dtype=weights.dtype))


def dropped_row_fraction(weights: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """How many completions have weight 0 on every valid token, of how many that have one. As `dropped_fraction` otherwise."""
    weights, valid = token_inputs(mask, weights=weights)
    rows = jnp.any(valid, axis=-1)
    dropped = rows & ~jnp.any((weights != 0) & valid, axis=-1)
    return MaskedSum(jnp.sum(dropped, dtype=weights.dtype), jnp.sum(rows, dtype=weights.dtype))
