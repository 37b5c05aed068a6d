"""How a policy reads token by token: through its cache, or by reading each row again from its beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.types import Params, Policy

__all__ = ["Reader", "make_reader"]


class Reader(NamedTuple):
    """Rows that grow by a token at a time.

    Attributes:
      state: what is read so far: all of every prompt but its last token.
      read: `read(state, tokens[R], positions[R], alive[R]) -> (hidden[R, D], state)` reads a token more in every row.
        A row that is not alive reads padding.
      tokens: [R] int32, the last token of every prompt.
      positions: [R] int32, its position.
    """

    state: Any
    read: Callable[..., tuple[jax.Array, Any]]
    tokens: jax.Array
    positions: jax.Array


def make_reader(
    policy: Policy, params: Params, prompts: jax.Array, prompt_mask: jax.Array, group_size: int, max_length: int
) -> Reader:
    """Reads every prompt once, and hands over group_size rows of each.

    Args:
      policy: with a cache if it has one; without, every step reads all of every row, which suits small policies only.
      params: its parameters.
      prompts: [B, P] int.
      prompt_mask: [B, P] bool.
      group_size: G.
      max_length: L, completion tokens that a row must have room for.

    Returns:
      Reader of R = B·G rows, the members of a group next to each other.
    """
    count = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    cached = policy.init_cache is not None
    # A cached step writes one column for all rows, so their last tokens stand in one column; a policy without one may know no
    # padding, so its rows start with their first token.
    start = prompts.shape[1] - count if cached else jnp.zeros_like(count)
    tokens = _packed(prompts, prompt_mask, start)
    make = _cached if cached else _uncached
    state, read = make(policy, params, tokens, start, group_size, max_length)
    last = jnp.take_along_axis(tokens, (start + count - 1)[:, None], axis=1)[:, 0]
    return Reader(state, read, _repeat(last, group_size), _repeat(count - 1, group_size))


def _cached(policy: Policy, params: Params, tokens: jax.Array, start: jax.Array, group_size: int, max_length: int):
    batch, width = tokens.shape
    capacity = width + max_length - 1  # the last token drawn is not read
    cache = policy.init_cache(params, batch, capacity)
    if width > 1:
        positions = jnp.arange(width - 1, dtype=jnp.int32) - start[:, None]
        segments, positions = (positions >= 0).astype(jnp.int32), jnp.maximum(positions, 0)
        _, cache = policy.apply(params, tokens[:, :-1], positions=positions, segment_ids=segments, cache=cache)
    axes = _row_axes(policy, params, batch, capacity)
    cache = jax.tree.map(lambda axis, leaf: leaf if axis < 0 else _repeat(leaf, group_size, axis), axes, cache)

    def read(cache, tokens, positions, alive):
        segments = alive.astype(jnp.int32)[:, None]
        hidden, cache = policy.apply(params, tokens[:, None], positions=positions[:, None], segment_ids=segments, cache=cache)
        return hidden[:, 0], cache

    return cache, read


def _uncached(policy: Policy, params: Params, tokens: jax.Array, start: jax.Array, group_size: int, max_length: int):
    rows = jnp.pad(_repeat(tokens, group_size), ((0, 0), (0, max_length - 1)))
    column = jnp.arange(rows.shape[1], dtype=jnp.int32)

    def read(rows, tokens, positions, alive):
        del alive  # nothing before a token depends on what follows it
        rows = jnp.where(column == positions[:, None], tokens[:, None], rows)
        hidden, _ = policy.apply(params, rows)
        return jnp.take_along_axis(hidden, positions[:, None, None], axis=1)[:, 0], rows

    return rows, read


def _packed(tokens: jax.Array, valid: jax.Array, start: jax.Array) -> jax.Array:
    """The valid tokens of each row side by side from column `start` on, 0 elsewhere."""
    width = tokens.shape[1]
    column = jnp.where(valid, start[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, width)
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros(tokens.shape, jnp.int32).at[row, column].set(tokens.astype(jnp.int32), mode="drop")


def _repeat(array: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """jnp.repeat as a broadcast, which keeps the sharding of the rows."""
    wide = jnp.broadcast_to(jnp.expand_dims(array, axis + 1), (*array.shape[: axis + 1], count, *array.shape[axis + 1 :]))
    return wide.reshape(*array.shape[:axis], array.shape[axis] * count, *array.shape[axis + 1 :])


def _row_axes(policy: Policy, params: Params, num_rows: int, capacity: int):
    """For every array of a cache the axis of its rows, −1 where it has none: the axis that grows with the number of rows."""
    few, more = (jax.eval_shape(lambda n=n: policy.init_cache(params, n, capacity)) for n in (num_rows, num_rows + 1))

    def axis(path, few, more):
        grown = [i for i, (size, next_size) in enumerate(zip(few.shape, more.shape, strict=True)) if size != next_size]
        if len(grown) > 1 or any(few.shape[i] != num_rows for i in grown):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"cache{where} has shape {few.shape} for {num_rows} rows; at most one axis may be the rows'")
        return grown[0] if grown else -1

    return jax.tree_util.tree_map_with_path(axis, few, more)
