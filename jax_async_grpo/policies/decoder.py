"""A decoder-only transformer of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_async_grpo.policies.attention import Cache, attend, empty_cache, heads_of, reserve, rms_norm, store
from jax_async_grpo.policies.rope import check_rope_scaling, rotation
from jax_async_grpo.policies.sizes import check_dtype, check_sizes
from jax_async_grpo.policies.visibility import visibility
from jax_async_grpo.types import Params, Policy

__all__ = ["decoder"]


def decoder(
    vocab_size: int,
    *,
    num_layers: int = 2,
    width: int = 64,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    tie_embeddings: bool = False,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, float] | None = None,
    norm_epsilon: float = 1e-6,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    remat: bool = False,
    scan_layers: bool = False,
    dtype=jnp.float32,
    compute_dtype=None,
) -> Policy:
    """A decoder-only transformer policy, from two layers of 64 to Llama 3.2 (1B) by its arguments alone.

    Args:
      vocab_size: V.
      num_layers: blocks of attention and SwiGLU.
      width: D, of the residual stream.
      num_heads: attention heads that ask.
      num_kv_heads: heads that are looked at, a divisor of num_heads; None = num_heads.
      head_dim: dimensions of a head, an even number; None = width / num_heads.
      mlp_width: hidden width of the SwiGLU; None = 8/3 · width rounded up to a multiple of 8.
      tie_embeddings: use the transposed token embedding as the output matrix.
      rope_base: base of the rotary wavelengths, in tokens / 2π.
      rope_scaling: None, or dict(factor, low_frequency_factor, high_frequency_factor, original_length) as in Llama 3.1; the
        rule stands in `rope.rotation`.
      norm_epsilon: added to the mean square in RMSNorm.
      qkv_bias: add a bias to queries, keys and values (as Qwen 2 does); zero at first.
      qk_norm: RMSNorm of every query and key head before it is turned (as Qwen 3 does).
      remat: compute each layer again in the backward pass instead of keeping what it computed.
      scan_layers: stack the parameters of the layers, params["layers"], and compile one layer instead of num_layers. The same
        key gives the same weights. Each layer's parameters and cache are then sliced out of the stack, which a decoded token
        pays for, and `tail` saves nothing.
      dtype: of the initial parameters.
      compute_dtype: of products, residual stream, hidden states and cache, to which parameters are cast where they are used
        (their gradients keep their own dtype); None = the dtype of the parameters. Norms, rotary angles, scores and softmax
        are float32 or wider. `unembed` gives the parameters as they are, so that logits have their precision.

    Returns:
      Policy. Initial weights are normal with standard deviation 1/√fan_in (1/√width for the embedding); those that write to the
      residual stream are divided by √(2·num_layers). With a cache the default positions count the valid tokens of the row, and
      slots are taken in order: after `capacity` tokens the cache is full, and what is written then is wrong without notice, so
      count them.

    Raises:
      ValueError: sizes that are no integers of at least 1, a width that the heads do not divide into even parts, an odd
        head_dim, num_kv_heads that does not divide num_heads, a rope_scaling without exactly its four numbers, another dtype
        than a floating one; (when applied) a cache of another policy or number of rows, more tokens than its capacity, an
        attention_mask beside a cache.

    Example:
      >>> policy = decoder(vocab_size=11, num_layers=1, width=16, num_heads=2)
      >>> params = jax.jit(policy.init)(jax.random.key(0))
      >>> hidden, _ = jax.jit(policy.apply)(params, jnp.zeros((2, 5), int))
      >>> hidden.shape, (hidden @ policy.unembed(params)).shape
      ((2, 5, 16), (2, 5, 11))

      Token by token, after a prompt:

      >>> cache = policy.init_cache(params, num_rows=2, capacity=8)
      >>> _, cache = jax.jit(policy.apply)(params, jnp.zeros((2, 5), int), cache=cache)
      >>> hidden, cache = jax.jit(policy.apply, donate_argnames="cache")(params, jnp.ones((2, 1), int), cache=cache)
      >>> hidden.shape, int(cache.length)
      ((2, 1, 16), 6)

      The sizes of Llama 3.2 (1B):

      >>> llama = dict(
      ...     vocab_size=128_256, num_layers=16, width=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_width=8192,
      ...     tie_embeddings=True, rope_base=500_000.0, norm_epsilon=1e-5, compute_dtype="bfloat16", remat=True,
      ...     scan_layers=True,
      ...     rope_scaling=dict(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192),
      ... )
      >>> shapes = jax.eval_shape(decoder(**llama).init, jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
      1235814400
    """
    sizes = {"vocab_size": vocab_size, "num_layers": num_layers, "width": width, "num_heads": num_heads}
    optional = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "mlp_width": mlp_width}
    check_sizes(**sizes, **{name: value for name, value in optional.items() if value is not None})
    check_dtype(dtype)
    if compute_dtype is not None:
        check_dtype(compute_dtype, "compute_dtype")
    check_rope_scaling(rope_scaling)
    _check_heads(width, num_heads, num_kv_heads, head_dim)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = width // num_heads if head_dim is None else head_dim
    mlp_width = -(-width // 3) * 8 if mlp_width is None else mlp_width
    layer = _layer_table(width, num_heads, num_kv_heads, head_dim, mlp_width, (2 * num_layers) ** -0.5, qkv_bias, qk_norm)
    table = _table(vocab_size, width, num_layers, tie_embeddings, layer)
    block = functools.partial(_block, head_dim=head_dim, epsilon=norm_epsilon)

    def init(key: jax.Array) -> Params:
        params = _Parameters(table, dtype).init(key)["params"]
        return _stacked(params, num_layers) if scan_layers else params

    def computes_in(params):
        return params["embedding"].dtype if compute_dtype is None else jnp.dtype(compute_dtype)

    def init_cache(params, num_rows: int, capacity: int) -> Cache:
        check_sizes(num_rows=num_rows, capacity=capacity)
        return empty_cache(num_layers, (num_rows, num_kv_heads, capacity, head_dim), computes_in(params), scan_layers)

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None, tail=None):
        if cache is None:
            sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
            default = jnp.arange(tokens.shape[-1])
        else:
            _check_cache(cache, tokens, attention_mask, functools.partial(init_cache, params))
            start = cache.length
            segments = jnp.broadcast_to(1 if segment_ids is None else jnp.asarray(segment_ids, jnp.int32), tokens.shape)
            cache, sees, default = reserve(cache, segments.astype(jnp.int32))
        positions = jnp.broadcast_to(default if positions is None else positions, tokens.shape)
        x = jnp.asarray(params["embedding"])[tokens].astype(computes_in(params))
        tables = rotation(positions, head_dim, rope_base, rope_scaling, jnp.promote_types(x.dtype, jnp.float32))
        memory = None if cache is None else (cache.keys, cache.values, start)
        layers = _scan if scan_layers else _unrolled
        x, memory = layers(params, block, num_layers, remat, x, tables, sees, memory, tail)
        if cache is not None:
            cache = Cache(memory[0], memory[1], cache.segment_ids, cache.length)
        return rms_norm(x, params["final_norm"]["scale"], norm_epsilon), cache

    def unembed(params) -> jax.Array:
        return params["embedding" if tie_embeddings else "unembedding"].T

    return Policy(init, apply, unembed, tail=True, init_cache=init_cache)


# The layers


def _block(weights, x, tables, sees, memory, layer, *, head_dim, epsilon):
    """One layer on x[..., N, D]: the last tokens of x, as many as `sees` has rows, and the memory with this layer's keys."""
    normed = rms_norm(x, weights["attention_norm"]["scale"], epsilon)
    x = x[..., -sees.shape[-2] :, :]
    q, k, v = heads_of(weights["attention"], normed, tables, sees.shape[-2], head_dim, epsilon)
    if memory is not None:
        keys, values, start = memory
        keys, k = store(keys, k, start, layer)
        values, v = store(values, v, start, layer)
        memory = keys, values, start
    x = x + attend(q, k, v, sees) @ weights["attention"]["out"].astype(x.dtype).T
    return x + _swiglu(weights["mlp"], rms_norm(x, weights["mlp_norm"]["scale"], epsilon)), memory


def _swiglu(weights, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ weights["gate_up"].astype(x.dtype).T, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ weights["down"].astype(x.dtype).T


def _unrolled(params, block, num_layers, remat, x, tables, sees, memory, tail):
    block = jax.checkpoint(block, static_argnums=5) if remat and memory is None else block
    for layer in range(num_layers):
        if tail is not None and layer == num_layers - 1:
            sees = sees[..., -tail:, :]  # the other tokens are only looked at
        x, memory = block(_layer_params(params, layer), x, tables, sees, memory, layer)
    return x, memory


def _scan(params, block, num_layers, remat, x, tables, sees, memory, tail):
    block = jax.checkpoint(block, prevent_cse=False) if remat and memory is None else block

    def step(carry, this):
        weights, layer = this
        x, memory = carry
        return block(weights, x, tables, sees, memory, layer), None

    (x, memory), _ = jax.lax.scan(step, (x, memory), (params["layers"], jnp.arange(num_layers, dtype=jnp.int32)))
    return x if tail is None else x[..., -tail:, :], memory


# The parameters


class _Weight(NamedTuple):
    """Shape and initial values: normal with standard deviation scale / √fan_in, or a constant where fan_in is None."""

    shape: tuple[int, ...]
    fan_in: int | None
    scale: float = 1.0

    def fill(self):
        if self.fan_in is None:
            return nn.initializers.constant(self.scale)
        return nn.initializers.normal(self.scale * self.fan_in**-0.5)


class _Parameters(nn.Module):
    """Makes the parameters of a table, whose order and names (with those of the branches) decide the key of each."""

    table: Mapping[str, Any]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> None:
        for name, entry in self.table.items():
            if isinstance(entry, _Weight):
                self.param(name, entry.fill(), entry.shape, self.dtype)
            else:
                _Parameters(entry, self.dtype, name=name)()


# Weights are stored as [out, in]: their gradient is then a product without transposes, clearly faster on CPUs in float64.
def _layer_table(width, num_heads, num_kv_heads, head_dim, mlp_width, into_stream, qkv_bias, qk_norm):
    asks, looked_at = num_heads * head_dim, 2 * num_kv_heads * head_dim
    attention = {
        "query": _Weight((asks, width), width),
        "key_value": _Weight((looked_at, width), width),
        "out": _Weight((width, asks), asks, into_stream),
    }
    if qkv_bias:
        attention |= {"query_bias": _Weight((asks,), None, 0.0), "key_value_bias": _Weight((looked_at,), None, 0.0)}
    if qk_norm:
        attention |= {"query_norm": _Weight((head_dim,), None), "key_norm": _Weight((head_dim,), None)}
    mlp = {"gate_up": _Weight((2 * mlp_width, width), width), "down": _Weight((width, mlp_width), mlp_width, into_stream)}
    norm = {"scale": _Weight((width,), None)}
    return {"attention_norm": norm, "attention": attention, "mlp_norm": norm, "mlp": mlp}


def _table(vocab_size, width, num_layers, tie_embeddings, layer):
    names = ["embedding"] if tie_embeddings else ["embedding", "unembedding"]
    table: dict[str, Any] = {name: _Weight((vocab_size, width), width) for name in names}
    for number in range(num_layers):
        table |= {f"{part}_{number}": entry for part, entry in layer.items()}
    return table | {"final_norm": {"scale": _Weight((width,), None)}}


def _layer_params(params: Params, layer: int) -> Params:
    return {part: params[f"{part}_{layer}"] for part in ("attention_norm", "attention", "mlp_norm", "mlp")}


def _stacked(params: Params, num_layers: int) -> Params:
    """The parameters with those of the layers stacked under "layers"."""
    each = [_layer_params(params, layer) for layer in range(num_layers)]
    others = {name: params[name] for name in ("embedding", "unembedding", "final_norm") if name in params}
    return others | {"layers": jax.tree.map(lambda *layers: jnp.stack(layers), *each)}


# What is refused


def _check_heads(width, num_heads, num_kv_heads, head_dim) -> None:
    if head_dim is None and width % (2 * num_heads):
        raise ValueError(f"width is {width}; it must be a multiple of 2·num_heads = {2 * num_heads}")
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even, because rotary positions turn pairs")
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}")


def _check_cache(cache, tokens, attention_mask, make) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(f"cache must be None or from init_cache, it is of type {type(cache).__name__}")
    if attention_mask is not None:
        raise ValueError("attention_mask must be None with a cache; segment_ids say which tokens are padding")
    rows, capacity = cache.segment_ids.shape
    if tokens.ndim != 2 or tokens.shape[0] != rows:
        raise ValueError(f"tokens has shape {tokens.shape}; with a cache of {rows} rows it must be [{rows}, N]")
    if tokens.shape[1] > capacity:
        raise ValueError(f"tokens has N = {tokens.shape[1]} tokens a row; the cache has a capacity of {capacity}")
    given, own = (jax.tree.map(lambda x: x.shape, c) for c in (cache, jax.eval_shape(lambda: make(rows, capacity))))
    if given != own:
        raise ValueError(f"cache has keys of {given.keys}; those of this policy are {own.keys}")
