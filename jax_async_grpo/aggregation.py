"""How per-token values of many completions become one number: a sum and a count that can be added across shards.

Every function maps values[..., L] and mask[..., L] to a `MaskedSum`; `.mean()` is sum / count. Sums and counts of
micro-batches or devices may be added before the division, which then gives the value of the whole batch. Options that several
of them share:

- `original_mask`, `denominator`: where tokens or whole rows were thrown out (overlong filtering, rejection), "kept" divides by
  what the mask left and "original" by what stood in `original_mask` before, so that throwing out inflates nothing.
- `count_empty_rows`: whether a row without a token of the denominator counts as a row (TRL) or not (verl).
- `total_count`: the count of the *whole* batch, known beforehand; each part is then divided by it at once, and the parts' means
  (and gradients) add up to those of the batch.
- `segment_ids`, `num_segments`: rows packed one after another in values[..., N]; every segment is a row.

Values may be bfloat16 or float32; at least float32 is summed. What other systems call these: docs/advantages.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.losses.arguments import token_inputs
from jax_async_grpo.masked import as_mask

__all__ = [
    "MaskedSum",
    "constant_length",
    "prompt_mean",
    "sequence_mean",
    "sequence_sum",
    "sum_norm",
    "token_mean",
    "token_sum",
]


class MaskedSum(NamedTuple):
    """An unreduced mean: add those of all parts (`a + b`, or `psum` over devices), then call `mean`.

    Attributes:
      sum: scalar, the weighted sum of the values.
      count: scalar, what the sum is still to be divided by (tokens, rows or prompts, see the function that made it); 0 where
        nothing is: of an empty mask, or because the divisor is a constant and stands in `sum` already.
    """

    sum: jax.Array
    count: jax.Array

    def mean(self) -> jax.Array:
        """sum / count, and the sum itself where the count is 0 (that of an empty mask is 0)."""
        return self.sum / jnp.maximum(self.count, 1)

    def psum(self, axis_name: str) -> MaskedSum:
        """Added over the shards of a mapped axis. Differentiate outside of the map, or see `total_count`."""
        return MaskedSum(*jax.lax.psum(tuple(self), axis_name))

    def __add__(self, other: MaskedSum) -> MaskedSum:
        """Sum and count each added (a tuple's own + would append)."""
        return MaskedSum(self.sum + other.sum, self.count + other.count)


def token_mean(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    original_mask: jax.Array | None = None,
    denominator: str = "kept",
    total_count: jax.Array | float | None = None,
) -> MaskedSum:
    """Every valid token weighs the same: Σ ℓ·m / Σ m (DAPO, arXiv 2503.14476; couples rows of unequal length).

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.
      original_mask: [..., L] bool or 0/1, the mask before anything was thrown out; None = `mask`.
      denominator: "kept" counts the tokens of `mask`, "original" those of `original_mask`.
      total_count: tokens of the whole batch, None = those that are here.

    Returns:
      MaskedSum whose count is the number of tokens; 0 where total_count is given.

    Raises:
      ValueError: an unknown denominator, "original" without original_mask, total_count negative, or shapes that do not match.
    """
    values, counted = _tokens(values, mask, original_mask, denominator)
    return _divided(jnp.sum(values), jnp.sum(counted, dtype=values.dtype), total_count)


def sequence_mean(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    original_mask: jax.Array | None = None,
    denominator: str = "kept",
    count_empty_rows: bool = True,
    total_count: jax.Array | float | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> MaskedSum:
    """Every row weighs the same, its tokens share that weight: mean over rows of Σ_l ℓ·m / L_i (GRPO, arXiv 2402.03300).

    Args:
      values: [..., L], or packed [..., N].
      mask: of the shape of values, bool or 0/1, None = all valid.
      original_mask: of the shape of values, the mask before anything was thrown out; None = `mask`.
      denominator: whose tokens make L_i, and a row empty: "kept" those of `mask`, "original" those of `original_mask`.
      count_empty_rows: whether a row without a token of the denominator counts (contributing 0) or not.
      total_count: rows of the whole batch, None = those that are here.
      segment_ids: [..., N] int, 0 on padding, else 1 to `num_segments`, one number for each row packed into it. A row is there,
        empty or not, if its number occurs; a row of no positions at all cannot be packed.
      num_segments: static; the largest number that may occur.

    Returns:
      MaskedSum whose count is the number of rows; 0 where total_count is given. NaN where a traced segment id is out of range.

    Raises:
      ValueError: an option outside its range, segment ids out of range (where they are concrete) or without num_segments, or
        shapes that do not match.
    """
    values, counted = _tokens(values, mask, original_mask, denominator)
    rows = _rows(values, counted, segment_ids, num_segments)
    return _over_rows(rows.sums / jnp.maximum(rows.lengths, 1), rows, count_empty_rows, total_count)


def sequence_sum(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    original_mask: jax.Array | None = None,
    denominator: str = "kept",
    count_empty_rows: bool = True,
    total_count: jax.Array | float | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> MaskedSum:
    """Tokens are summed, rows averaged: mean over rows of Σ_l ℓ·m (the log-probability of a row is such a sum).

    Args:
      values, mask, original_mask, denominator, count_empty_rows, total_count, segment_ids, num_segments: of `sequence_mean`.

    Returns:
      MaskedSum whose count is the number of rows; 0 where total_count is given.

    Raises:
      ValueError: as `sequence_mean`.
    """
    values, counted = _tokens(values, mask, original_mask, denominator)
    rows = _rows(values, counted, segment_ids, num_segments)
    return _over_rows(rows.sums, rows, count_empty_rows, total_count)


def constant_length(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    length: float | None = None,
    original_mask: jax.Array | None = None,
    denominator: str = "kept",
    count_empty_rows: bool = True,
    total_count: jax.Array | float | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> MaskedSum:
    """Σ_l ℓ·m divided by one constant for all rows, then averaged over rows ("Dr. GRPO", arXiv 2503.20783).

    Args:
      length: tokens; the constant, usually the longest completion that may be generated. None = L of unpacked values.
      values, mask, original_mask, denominator, count_empty_rows, total_count, segment_ids, num_segments: of `sequence_mean`.

    Returns:
      MaskedSum whose count is the number of rows; 0 where total_count is given.

    Raises:
      ValueError: length not positive, or None for packed rows; else as `sequence_mean`.
    """
    if length is None and segment_ids is not None:
        raise ValueError("length of constant_length is None; packed rows need it, their L is not that of values")
    values, counted = _tokens(values, mask, original_mask, denominator)
    length = values.shape[-1] if length is None else length
    if not length > 0:
        raise ValueError(f"length of constant_length is {length}; it must be > 0")
    rows = _rows(values, counted, segment_ids, num_segments)
    return _over_rows(rows.sums / length, rows, count_empty_rows, total_count)


def prompt_mean(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    original_mask: jax.Array | None = None,
    denominator: str = "kept",
    count_empty_rows: bool = True,
    total_count: jax.Array | float | None = None,
) -> MaskedSum:
    """Every prompt weighs the same, the tokens of its G completions share that weight: mean over prompts of Σ_il ℓ·m / Σ_i L_i.

    Args:
      values: [..., G, L].
      mask, original_mask, denominator: of `sequence_mean`.
      count_empty_rows: whether a prompt without a token of the denominator counts (contributing 0) or not.
      total_count: prompts of the whole batch, None = those that are here.

    Returns:
      MaskedSum whose count is the number of prompts; 0 where total_count is given.

    Raises:
      ValueError: values without a group axis; else as `sequence_mean`.
    """
    shape = jnp.shape(values)
    if len(shape) < 2:
        raise ValueError(f"values has shape {shape}; it must be [..., G, L], all completions of a prompt together")
    values, counted = (x.reshape(*shape[:-2], -1) for x in _tokens(values, mask, original_mask, denominator))
    rows = _rows(values, counted, None, None)
    return _over_rows(rows.sums / jnp.maximum(rows.lengths, 1), rows, count_empty_rows, total_count)


def token_sum(values: jax.Array, mask: jax.Array | None = None) -> MaskedSum:
    """Σ ℓ·m, divided by nothing: the step grows with the number of tokens.

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      MaskedSum whose count is 0, so that its mean is the sum.
    """
    return sum_norm(values, mask, norm=1.0)


def sum_norm(values: jax.Array, mask: jax.Array | None = None, *, norm: float) -> MaskedSum:
    """Σ ℓ·m / norm with one constant of the user's, the same for every part of a batch.

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.
      norm: the constant divisor (of the whole batch, where this is a part of it); positive.

    Returns:
      MaskedSum whose count is 0, so that its mean is the sum over norm.

    Raises:
      ValueError: norm not positive.
    """
    if not norm > 0:
        raise ValueError(f"norm of sum_norm is {norm}; it must be > 0")
    values, _ = token_inputs(mask, values=values)
    return MaskedSum(jnp.sum(values) / norm, jnp.zeros((), values.dtype))


class _Rows(NamedTuple):
    """Per row: the sum of its values, the tokens its denominator counts, whether it is a row at all."""

    sums: jax.Array
    lengths: jax.Array
    present: jax.Array


def _tokens(values, mask, original_mask, denominator) -> tuple[jax.Array, jax.Array]:
    """The values, 0 where they were thrown out, and the tokens that the denominator counts, as bool."""
    values, kept = token_inputs(mask, values=values)
    if denominator not in ("kept", "original"):
        raise ValueError(f"denominator is {denominator!r}; it must be 'kept' or 'original'")
    if original_mask is None:
        if denominator == "original":
            raise ValueError("original_mask is None; denominator 'original' counts its tokens")
        return values, kept
    if jnp.shape(original_mask) != values.shape:
        raise ValueError(f"original_mask has shape {jnp.shape(original_mask)}; it must have that of values, {values.shape}")
    original = as_mask(original_mask, values.shape)
    kept = kept & original
    return jnp.where(kept, values, 0), original if denominator == "original" else kept


def _rows(values, counted, segment_ids, num_segments) -> _Rows:
    lengths = counted.astype(values.dtype)
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(f"segment_ids is None, but num_segments is {num_segments}; pass both or neither")
        return _Rows(jnp.sum(values, axis=-1), jnp.sum(lengths, axis=-1), jnp.ones(values.shape[:-1], bool))
    ids = _segment_ids(segment_ids, num_segments, values.shape)
    # a traced number out of range would drop its row without a word
    values = jnp.where(jnp.all((ids >= 0) & (ids <= num_segments)), values, jnp.nan)

    def per_segment(x):
        flat = x.reshape(-1, x.shape[-1]), ids.reshape(-1, x.shape[-1])
        return jax.vmap(lambda row, own: jax.ops.segment_sum(row, own, num_segments + 1))(*flat)[:, 1:]

    return _Rows(per_segment(values), per_segment(lengths), per_segment(jnp.ones_like(values)) > 0)


def _segment_ids(segment_ids, num_segments, shape) -> jax.Array:
    if jnp.shape(segment_ids) != shape:
        raise ValueError(f"segment_ids has shape {jnp.shape(segment_ids)}; it must have that of values, {shape}")
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise ValueError(f"segment_ids has dtype {jnp.result_type(segment_ids)}; it must be integers, 0 on padding")
    if not isinstance(num_segments, int | np.integer) or num_segments < 1:
        raise ValueError(f"num_segments is {num_segments}; it must be an integer >= 1, the largest of segment_ids")
    if not isinstance(segment_ids, jax.core.Tracer):
        lowest, highest = np.min(segment_ids, initial=0), np.max(segment_ids, initial=0)
        if lowest < 0 or highest > num_segments:
            raise ValueError(f"segment_ids reach from {lowest} to {highest}; they must be 0 to num_segments, {num_segments}")
    return jnp.asarray(segment_ids)


def _over_rows(row_values, rows: _Rows, count_empty_rows, total_count) -> MaskedSum:
    counted = rows.present if count_empty_rows else rows.lengths > 0
    return _divided(jnp.sum(row_values), jnp.sum(counted, dtype=row_values.dtype), total_count)


def _divided(total, count, total_count) -> MaskedSum:
    if total_count is None:
        return MaskedSum(total, count)
    if jnp.shape(total_count) != ():
        raise ValueError(f"total_count has shape {jnp.shape(total_count)}; it must be a number")
    if not isinstance(total_count, jax.core.Tracer) and not total_count >= 0:
        raise ValueError(f"total_count is {total_count}; it must be >= 0")
    return MaskedSum(total / jnp.maximum(total_count, 1), jnp.zeros_like(count))
