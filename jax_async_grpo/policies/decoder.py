"""A small decoder-only transformer in the style of Llama: RMSNorm, rotary positions, SwiGLU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_async_grpo.policies.sizes import check_dtype, check_sizes
from jax_async_grpo.policies.visibility import visibility
from jax_async_grpo.types import Policy

__all__ = ["decoder"]


def decoder(
    vocab_size: int,
    *,
    num_layers: int = 2,
    width: int = 64,
    num_heads: int = 4,
    mlp_width: int | None = None,
    tie_embeddings: bool = False,
    rope_base: float = 10_000.0,
    norm_epsilon: float = 1e-6,
    dtype=jnp.float32,
) -> Policy:
    """A decoder-only transformer policy; all arithmetic is done in the dtype of the parameters.

    Args:
      vocab_size: V.
      num_layers: blocks of attention and SwiGLU.
      width: D, of the residual stream.
      num_heads: attention heads, of width / num_heads dimensions each, an even number.
      mlp_width: hidden width of the SwiGLU; None = 8/3 · width rounded up to a multiple of 8.
      tie_embeddings: use the transposed token embedding as the output matrix.
      rope_base: base of the rotary wavelengths, in tokens / 2π.
      norm_epsilon: added to the mean square in RMSNorm.
      dtype: of the initial parameters.

    Returns:
      Policy. Initial weights are normal with standard deviation 1/√fan_in (1/√width for the embedding); those that write to the
      residual stream are divided by √(2·num_layers).

    Raises:
      ValueError: sizes that are no integers of at least 1, a width that the heads do not divide into even parts, another dtype
        than a floating one; (when applied) a cache.

    Example:
      >>> policy = decoder(vocab_size=11, num_layers=1, width=16, num_heads=2)
      >>> params = jax.jit(policy.init)(jax.random.key(0))
      >>> hidden, _ = jax.jit(policy.apply)(params, jnp.zeros((2, 5), int))
      >>> hidden.shape, (hidden @ policy.unembed(params)).shape
      ((2, 5, 16), (2, 5, 11))
    """
    sizes = {"vocab_size": vocab_size, "num_layers": num_layers, "width": width, "num_heads": num_heads, "mlp_width": mlp_width}
    check_sizes(**{name: value for name, value in sizes.items() if value is not None})
    check_dtype(dtype)
    if width % (2 * num_heads):
        raise ValueError(f"width is {width}; it must be a multiple of 2·num_heads = {2 * num_heads}")
    mlp_width = -(-width // 3) * 8 if mlp_width is None else mlp_width
    model = _Decoder(vocab_size, num_layers, width, num_heads, mlp_width, tie_embeddings, rope_base, norm_epsilon, dtype)

    def init(key: jax.Array):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return model.init(key, tokens, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool))["params"]

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None, tail=None):
        if cache is not None:
            raise ValueError("cache must be None: the decoder keeps no cache yet")
        sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
        positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
        return model.apply({"params": params}, tokens, jnp.broadcast_to(positions, tokens.shape), sees, tail), None

    def unembed(params) -> jax.Array:
        return params["embedding" if tie_embeddings else "unembedding"].T

    return Policy(init, apply, unembed, tail=True)


class _Decoder(nn.Module):
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    tie_embeddings: bool
    rope_base: float
    norm_epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, sees: jax.Array, tail: int | None = None) -> jax.Array:
        embedding = self.param("embedding", _normal(self.width), (self.vocab_size, self.width), self.dtype)
        if not self.tie_embeddings:
            self.param("unembedding", _normal(self.width), (self.vocab_size, self.width), self.dtype)
        x = jnp.asarray(embedding)[tokens]
        rotation = _rotation(positions, self.width // self.num_heads, self.rope_base, x.dtype)
        into_stream = (2 * self.num_layers) ** -0.5
        for layer in range(self.num_layers):
            if tail is not None and layer == self.num_layers - 1:
                sees = sees[..., -tail:, :]  # the other tokens are only looked at
            normed = _RMSNorm(self.norm_epsilon, self.dtype, name=f"attention_norm_{layer}")(x)
            x = x[..., -sees.shape[-2] :, :]
            x = x + _Attention(self.num_heads, into_stream, self.dtype, name=f"attention_{layer}")(normed, rotation, sees)
            normed = _RMSNorm(self.norm_epsilon, self.dtype, name=f"mlp_norm_{layer}")(x)
            x = x + _SwiGLU(self.mlp_width, into_stream, self.dtype, name=f"mlp_{layer}")(normed)
        return _RMSNorm(self.norm_epsilon, self.dtype, name="final_norm")(x)


class _RMSNorm(nn.Module):
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * scale


class _Attention(nn.Module):
    num_heads: int
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], sees: jax.Array) -> jax.Array:
        """[..., K, width] for the last K tokens of x[..., N, width], where sees is [..., K, N]."""
        width, num_queries = x.shape[-1], sees.shape[-2]
        query = self.param("query", _normal(width), (width, width), self.dtype)
        key_value = self.param("key_value", _normal(width), (2 * width, width), self.dtype)
        out = self.param("out", _normal(width, self.out_scale), (width, width), self.dtype)
        q = self._heads(x[..., -num_queries:, :] @ query.T) * (width // self.num_heads) ** -0.5
        k, v = (self._heads(y) for y in jnp.split(x @ key_value.T, 2, axis=-1))
        q, k = _rotate(q, tuple(table[..., -num_queries:, :] for table in rotation)), _rotate(k, rotation)
        # Finite, so that a token that sees nothing gives no NaN.
        scores = jnp.where(sees[..., None, :, :], q @ jnp.swapaxes(k, -1, -2), jnp.finfo(x.dtype).min)
        mixed = jnp.swapaxes(jax.nn.softmax(scores, axis=-1) @ v, -2, -3)
        return mixed.reshape(*mixed.shape[:-2], width) @ out.T

    def _heads(self, x: jax.Array) -> jax.Array:
        """[..., N, width] -> [..., heads, N, width / heads]."""
        return jnp.swapaxes(x.reshape(*x.shape[:-1], self.num_heads, -1), -2, -3)


class _SwiGLU(nn.Module):
    hidden: int
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        gate_up = self.param("gate_up", _normal(width), (2 * self.hidden, width), self.dtype)
        down = self.param("down", _normal(self.hidden, self.out_scale), (width, self.hidden), self.dtype)
        gate, up = jnp.split(x @ gate_up.T, 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ down.T


# Weights are stored as [out, in]: their gradient is then a product without transposes, clearly faster on CPUs in float64.
def _normal(fan_in: int, scale: float = 1.0):
    return nn.initializers.normal(scale * fan_in**-0.5)


def _rotation(positions: jax.Array, size: int, base: float, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and signed sine of position · base^(−2i/size) for the two halves of a head, each [..., 1, N, size]."""
    frequencies = base ** (-jnp.arange(size // 2, dtype=dtype) * 2 / size)
    angles = positions[..., None, :, None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (x[i], x[i + size/2]) of every head by their angles."""
    cos, sin = rotation
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin
