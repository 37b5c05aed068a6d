"""Which tokens a token sees: the one rule that every policy of this package applies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["visibility"]


def visibility(
    tokens: jax.Array, *, segment_ids: jax.Array | None = None, attention_mask: jax.Array | None = None
) -> jax.Array:
    """True where the row's token sees the column's token: itself and the earlier tokens of its segment.

    visible[n, m] = (m = n) ∨ (m < n ∧ segment[m] = segment[n] ≠ 0)

    Padding (segment 0) sees itself, so that a softmax over the visible tokens is finite in every row.

    Args:
      tokens: [..., N] int, only its shape is used.
      segment_ids: int, broadcasts to [..., N], 0 = padding; None = one segment without padding.
      attention_mask: bool, broadcasts to [..., N, N]; replaces the rule. It should hold at least the diagonal.

    Returns:
      [..., N, N] bool.

    Example:
      >>> visibility(jnp.zeros(3, int), segment_ids=jnp.array([0, 1, 1])).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    shape = (*jnp.shape(tokens), jnp.shape(tokens)[-1])
    if attention_mask is not None:
        return jnp.broadcast_to(attention_mask, shape)
    causal = jnp.tril(jnp.ones(shape[-2:], dtype=bool))
    if segment_ids is None:
        return jnp.broadcast_to(causal, shape)
    row, column = segment_ids[..., :, None], segment_ids[..., None, :]
    seen = (causal & (row == column) & (row != 0)) | jnp.eye(shape[-1], dtype=bool)
    return jnp.broadcast_to(seen, shape)
