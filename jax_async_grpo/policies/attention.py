"""Grouped-query attention over the tokens of a row, or over those and the earlier ones that a cache holds.

Axes: `H` query heads, `K` key-value heads (each serves H / K query heads, GQA, arXiv 2305.13245), `h` dimensions of a head,
`N` new tokens of a row, `M` tokens they may see, `R` rows, `C` slots of the cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_async_grpo.policies.rope import rotate
from jax_async_grpo.types import Params

__all__ = ["Cache", "attend", "empty_cache", "heads_of", "reserve", "rms_norm", "store"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the tokens written so far left for later ones. A pytree of arrays: carry it through loops, donate it.

    A layer's keys [R, K, C, h] are what its two products read as they stand: no transposes. A tuple with one array a layer
    keeps a layer from being sliced out of all of them; `scan_layers` needs them stacked, [layers, R, K, C, h].

    Attributes:
      keys: already turned by their positions.
      values: as the keys.
      segment_ids: [R, C] int32, 0 = padding or not written yet.
      length: [] int32, slots written, in every row.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]
    segment_ids: jax.Array
    length: jax.Array


def empty_cache(num_layers: int, shape: tuple[int, int, int, int], dtype, stacked: bool) -> Cache:
    """A cache in which nothing is written; shape is (R, K, C, h), of one layer."""

    def buffers():  # new arrays at each call: a donated buffer must stand in the cache once
        return jnp.zeros((num_layers, *shape), dtype) if stacked else tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))

    rows, _, capacity, _ = shape
    return Cache(buffers(), buffers(), jnp.zeros((rows, capacity), jnp.int32), jnp.zeros((), jnp.int32))


def reserve(cache: Cache, segment_ids: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
    """Takes the next N slots of every row.

    Args:
      cache: its keys and values stay as they are; `store` writes them layer by layer.
      segment_ids: [R, N] int32 of the new tokens.

    Returns:
      The cache with the slots taken; sees [R, N, C] bool, by the rule of `visibility`; positions [R, N] int32, the number of
      valid tokens before each one.
    """
    valid = segment_ids != 0
    before = jnp.sum(cache.segment_ids != 0, axis=-1, keepdims=True, dtype=jnp.int32)
    positions = jnp.maximum(before + jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)
    all_segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    own = (cache.length + jnp.arange(segment_ids.shape[1], dtype=jnp.int32))[:, None]
    slots = jnp.arange(all_segments.shape[1], dtype=jnp.int32)
    together = (all_segments[:, None, :] == segment_ids[:, :, None]) & valid[:, :, None]
    sees = ((slots < own) & together) | (slots == own)
    taken = dataclasses.replace(cache, segment_ids=all_segments, length=cache.length + segment_ids.shape[1])
    return taken, sees, positions


def store(buffer, new: jax.Array, start: jax.Array, layer) -> tuple:
    """Writes new[R, K, N, h] at slot `start` of a layer; the buffer, and what of it belongs to the layer, [R, K, C, h]."""
    if isinstance(buffer, tuple):
        own = jax.lax.dynamic_update_slice_in_dim(buffer[layer], new, start, axis=2)
        return (*buffer[:layer], own, *buffer[layer + 1 :]), own
    zero = jnp.zeros_like(start)
    buffer = jax.lax.dynamic_update_slice(buffer, new[None], (layer, zero, zero, start, zero))
    return buffer, jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)


def heads_of(
    weights: Params, x: jax.Array, tables: tuple[jax.Array, jax.Array], num_queries: int, head_dim: int, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries of the last `num_queries` tokens of x[..., N, D], keys and values of all: [..., heads, tokens, h].

    Args:
      weights: query [H·h, D] and key_value [2·K·h, D]; optional query_bias [H·h], key_value_bias [2·K·h], and query_norm and
        key_norm [h], the scales of an RMSNorm of every head before it is turned.
      x: [..., N, D].
      tables: of `rope.rotation` for the N tokens.
      num_queries: at most N.
      head_dim: h.
      epsilon: of the norms.
    """
    q = _split(_project(x[..., -num_queries:, :], weights, "query"), head_dim)
    if "query_norm" in weights:
        q = rms_norm(q, weights["query_norm"], epsilon)
    q = q * head_dim**-0.5
    k, v = (_split(y, head_dim) for y in jnp.split(_project(x, weights, "key_value"), 2, axis=-1))
    if "key_norm" in weights:
        k = rms_norm(k, weights["key_norm"], epsilon)
    return rotate(q, tuple(table[..., -num_queries:, :] for table in tables)), rotate(k, tables), v


def attend(q: jax.Array, k: jax.Array, v: jax.Array, sees: jax.Array) -> jax.Array:
    """Softmax attention; the H / K queries of a key-value head share one product with it, so that no head is repeated.

    Args:
      q: [..., H, N, h], scaled; query head i looks at key-value head i // (H / K).
      k: [..., K, M, h].
      v: [..., K, M, h].
      sees: [..., N, M] bool.

    Returns:
      [..., N, H·h]. Scores and softmax are float32 or wider.
    """
    grouped = (*k.shape[:-2], -1, q.shape[-1])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    sees = sees[..., None, :, :]
    scores = jnp.matmul(q.reshape(grouped), jnp.swapaxes(k, -1, -2), preferred_element_type=wide)
    per_head = scores.reshape(*q.shape[:-1], k.shape[-2])
    # Finite, so that a token that sees nothing gives no NaN.
    per_head = jnp.where(sees, per_head, jnp.finfo(wide).min)
    mixed = jax.nn.softmax(per_head, axis=-1).astype(v.dtype).reshape(scores.shape) @ v
    mixed = jnp.swapaxes(mixed.reshape(q.shape), -2, -3)
    return mixed.reshape(*mixed.shape[:-2], -1)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / √(mean x² + ε) · scale over the last axis, in float32 or wider; the dtype of x comes back."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


def _project(x: jax.Array, weights: Params, name: str) -> jax.Array:
    y = x @ weights[name].astype(x.dtype).T
    return y + weights[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in weights else y


def _split(x: jax.Array, head_dim: int) -> jax.Array:
    """[..., N, heads·h] -> [..., heads, N, h]."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, head_dim), -2, -3)
