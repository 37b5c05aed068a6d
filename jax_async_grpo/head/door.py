"""The arguments of the head at its door, and how tokens are cut into chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import valid_only
from jax_async_grpo.masked import as_mask

__all__ = ["checked", "cutting", "floating", "same_axes", "sizes_of", "zero_like"]

_MAX_CHUNK, _MIN_CHUNK = 512, 128  # tokens
_BLOCK = 2048  # entries of the vocabulary


def checked(hidden, unembed, tokens, mask) -> tuple[jax.Array, ...]:
    """hidden [..., L, D] and tokens [..., L], 0 under the mask; unembed [D, V]; the mask as bool. Errors name the argument."""
    hidden, unembed, tokens = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens has dtype {tokens.dtype}; it must be an integer")
    if tokens.ndim < 1:
        raise ValueError("tokens is a scalar; it must be [..., L]")
    if unembed.ndim != 2:
        raise ValueError(f"unembed has shape {unembed.shape}; it must be [D, V]")
    if hidden.shape != (*tokens.shape, unembed.shape[0]):
        raise ValueError(f"hidden has shape {hidden.shape}; it must be [..., L, D] = {(*tokens.shape, unembed.shape[0])}")
    valid = as_mask(mask, tokens.shape)
    return valid_only(hidden, valid[..., None]), unembed, valid_only(tokens, valid), valid


def sizes_of(num_tokens: int, vocab_size: int, chunk_size: int | None, block_size: int | None) -> tuple[int, int]:
    """(tokens of a chunk, entries of the vocabulary in a block), defaults from the shapes alone."""
    for name, size in dict(chunk_size=chunk_size, block_size=block_size).items():
        if size is not None and not size >= 1:
            raise ValueError(f"{name} is {size}; it must be >= 1, or None")
    default = min(_MAX_CHUNK, max(_MIN_CHUNK, math.ceil(num_tokens / 4)))
    return default if chunk_size is None else chunk_size, min(vocab_size, block_size or _BLOCK)


def floating(array) -> jax.Array:
    """At least float32."""
    return jnp.asarray(array, jnp.promote_types(jnp.result_type(array), jnp.float32))


def same_axes(tree):
    """The arrays, inside `shard_map` all varying over the mesh axes that any varies over, as what a loop carries must."""
    zero = sum(zero_like(leaf, jnp.float32) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: jnp.where(zero == 0, leaf, jnp.zeros((), leaf.dtype)), tree)


def zero_like(array: jax.Array, dtype) -> jax.Array:
    """Scalar 0 that varies over the mesh axes of `array` inside `shard_map`; the compiler folds it."""
    zeros = jnp.where(False, array, jnp.zeros((), array.dtype))
    return jnp.sum(zeros.astype(dtype), dtype=dtype)


def cutting(number: int, size: int) -> tuple[Callable, Callable]:
    """Cuts [number, ...] into chunks [C, size, ...], the last one filled with zeros (invalid tokens), and joins them again."""
    num_chunks = math.ceil(number / size)

    def cut(tree):
        def one(array):
            padded = jnp.pad(array, [(0, num_chunks * size - number), *[(0, 0)] * (array.ndim - 1)])
            return padded.reshape(num_chunks, size, *array.shape[1:])

        return jax.tree.map(one, tree)

    def join(tree):
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:number], tree)

    return cut, join
