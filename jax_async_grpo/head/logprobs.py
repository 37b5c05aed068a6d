"""Log-probs and entropies by themselves: nothing is kept, the backward pass makes the logits of each chunk again."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_async_grpo.head.door import checked, cutting, same_axes, sizes_of, zero_like
from jax_async_grpo.head.vocabulary import add_columns, online_softmax, operand_dtype, over_blocks, product, target
from jax_async_grpo.losses.arguments import valid_only

__all__ = ["logprobs_and_entropy", "logprobs_of_rows", "token_logprobs"]


def token_logprobs(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """log softmax(hidden @ unembed)[token], differentiable once, in reverse: the backward pass makes the logits again.

    Args:
      hidden: [..., L, D]; hidden[..., l, :] are those that predict tokens[..., l].
      unembed: [D, V].
      tokens: [..., L] int, in [0, V) where the mask is 1.
      mask: [..., L] bool or 0/1, None = all valid; elsewhere hidden states and tokens may hold anything.
      chunk_size: tokens whose logits exist at a time. None = a fourth of them, at least 128 and at most 512.
      block_size: entries of the vocabulary per product. None = 2048; V keeps the product whole, for a matrix sharded over V.

    Returns:
      [..., L] nats, at least float32, 0 under the mask.

    Raises:
      ValueError: shapes that do not match, tokens that are not integers, or a size below 1, naming the argument.

    Example:
      >>> hidden, unembed = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
      >>> token_logprobs(hidden, unembed, jnp.zeros((2, 3), int))[0, 0]  # -log 8
    """
    return _statistics(hidden, unembed, tokens, mask, chunk_size, block_size, entropy=False)[0]


def logprobs_and_entropy(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    chunk_size: int | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The log-probs of the tokens and the entropy −Σ_v π_v·log π_v of the next token, each [..., L]; both differentiable.

    Arguments and errors as in `token_logprobs`; both are in nats and 0 under the mask.
    """
    return _statistics(hidden, unembed, tokens, mask, chunk_size, block_size, entropy=True)


def _statistics(hidden, unembed, tokens, mask, chunk_size, block_size, *, entropy: bool):
    hidden, unembed, tokens, valid = checked(hidden, unembed, tokens, mask)
    sizes = sizes_of(tokens.size, unembed.shape[1], chunk_size, block_size)
    flat = same_axes((hidden.reshape(-1, hidden.shape[-1]), unembed, tokens.reshape(-1)))
    return tuple(valid_only(x.reshape(valid.shape), valid) for x in _recomputing(sizes, entropy)(*flat))


def logprobs_of_rows(hidden, unembed, fixed, sizes) -> jax.Array:
    """[R, L] log-probs of rows of tokens, 0 where they are not valid."""
    (logprobs,) = _recomputing(sizes, entropy=False)(hidden.reshape(-1, hidden.shape[-1]), unembed, fixed.tokens.reshape(-1))
    return valid_only(logprobs.reshape(fixed.tokens.shape), fixed.valid)


def _recomputing(sizes: tuple[int, int], entropy: bool) -> Callable:
    """(hidden[N, D], unembed[D, V], tokens[N]) -> (log-probs[N],), or (log-probs[N], entropies[N])."""
    chunk_size, block_size = sizes

    def forward(hidden, unembed, tokens):
        dtype = jnp.promote_types(operand_dtype(hidden, unembed), jnp.float32)
        cut, join = cutting(tokens.size, chunk_size)

        def weighted_logits(kept, block):
            return kept * block.decay + jnp.sum(block.exps * block.logits, axis=-1) if entropy else kept

        def chunk(part):
            states, tokens = part
            zero = jnp.broadcast_to(zero_like(states, dtype), tokens.shape)
            shift, total, weighted = online_softmax(states, unembed, block_size, weighted_logits, zero)
            log_normalizer = shift + jnp.log(total)
            logprobs = target(states, unembed, tokens)[0] - log_normalizer
            return (logprobs, log_normalizer, log_normalizer - weighted / total)

        logprobs, log_normalizer, entropies = join(jax.lax.map(chunk, cut((hidden, tokens))))
        outputs = (logprobs, entropies) if entropy else (logprobs,)
        return outputs, (hidden, unembed, tokens, log_normalizer, entropies)

    def backward(residuals, cotangents):
        hidden, unembed, *per_token = residuals
        dtype, accumulated = operand_dtype(hidden, unembed), per_token[1].dtype
        cut, join = cutting(hidden.shape[0], chunk_size)

        def chunk(d_unembed, part):
            states, (tokens, log_normalizer, entropies), slopes = part

            def step(carry, index, start, size):
                d_hidden, d_unembed = carry
                columns = jax.lax.dynamic_slice_in_dim(unembed, start, size, axis=1)
                logprobs = product(states, columns, 1, 0, dtype) - log_normalizer[:, None]
                slope = -slopes[0][:, None]
                if entropy:
                    slope = slope - slopes[1][:, None] * (logprobs + entropies[:, None])
                d_logits = slope * jnp.exp(logprobs)
                d_unembed = add_columns(d_unembed, product(states, d_logits, 0, 0, dtype), start)
                return d_hidden + product(d_logits, columns, 1, 1, dtype), d_unembed

            scaled = (slopes[0][:, None] * states).T.astype(accumulated)
            d_hidden = slopes[0][:, None] * target(states, unembed, tokens)[1]
            d_hidden, d_unembed = over_blocks(step, (d_hidden, d_unembed), unembed.shape[1], block_size)
            return d_unembed.at[:, tokens].add(scaled), d_hidden.astype(hidden.dtype)

        zeros = jnp.broadcast_to(zero_like(hidden, accumulated), unembed.shape)
        d_unembed, d_hidden = jax.lax.scan(chunk, zeros, cut((hidden, tuple(per_token), cotangents)))
        return join(d_hidden), d_unembed.astype(unembed.dtype), None

    statistics = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    statistics.defvjp(forward, backward)
    return statistics
