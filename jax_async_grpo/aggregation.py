"""How per-token values of many completions become one number: a sum and a count that can be added across shards.

Every function maps values[..., L] and mask[..., L] to a `MaskedSum`; `.mean()` is sum / count. Sums and counts of
micro-batches or devices may be added before the division, which then gives the value of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.masked import as_mask, masked_mean, masked_sum

__all__ = ["MaskedSum", "constant_length", "sequence_mean", "sequence_sum", "token_mean"]


class MaskedSum(NamedTuple):
    """An unreduced mean: add `sum` and `count` over shards, then call `mean`.

    Attributes:
      sum: scalar, the weighted sum of the values.
      count: scalar, what the sum is divided by (tokens or rows, see the function that made it).
    """

    sum: jax.Array
    count: jax.Array

    def mean(self) -> jax.Array:
        """sum / count, 0 where the count is 0."""
        return self.sum / jnp.maximum(self.count, 1)


def token_mean(values: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """Every valid token weighs the same: Σ ℓ·m / Σ m (DAPO; couples rows of unequal length).

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      MaskedSum whose count is the number of valid tokens.
    """
    valid = as_mask(mask, jnp.shape(values))
    return MaskedSum(masked_sum(values, valid), jnp.sum(valid, dtype=_float(values)))


def sequence_mean(values: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """Every row weighs the same, its tokens share that weight: mean over rows of Σ_l ℓ·m / L_i (GRPO).

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      MaskedSum whose count is the number of rows; a row without a valid token counts and contributes 0.
    """
    return _over_rows(masked_mean(values, mask, axis=-1))


def sequence_sum(values: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """Tokens are summed, rows averaged: mean over rows of Σ_l ℓ·m (the log-probability of a row is such a sum).

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      MaskedSum whose count is the number of rows.
    """
    return _over_rows(masked_sum(values, mask, axis=-1))


def constant_length(values: jax.Array, mask: jax.Array | None = None, *, length: float | None = None) -> MaskedSum:
    """Σ_l ℓ·m divided by one constant for all rows, then averaged over rows ("Dr. GRPO", arXiv 2503.20783).

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.
      length: tokens; the constant, usually the longest completion that may be generated. None = L.

    Returns:
      MaskedSum whose count is the number of rows.

    Raises:
      ValueError: length not positive.
    """
    length = jnp.shape(values)[-1] if length is None else length
    if not length > 0:
        raise ValueError(f"length of constant_length is {length}; it must be > 0")
    return _over_rows(masked_sum(values, mask, axis=-1) / length)


def _over_rows(row_values: jax.Array) -> MaskedSum:
    return MaskedSum(jnp.sum(row_values), jnp.asarray(row_values.size, dtype=row_values.dtype))


def _float(values) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(values), jnp.float32)
