"""Products of a chunk of tokens with the vocabulary, block by block, each while its slice of the output matrix is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.head.door import zero_like

__all__ = [
    "Softmax",
    "add_columns",
    "add_to_unembed",
    "online_softmax",
    "operand_dtype",
    "over_blocks",
    "product",
    "softmax_of",
    "target",
]


class Softmax(NamedTuple):
    """The softmax of a chunk of n tokens, not normalized: π_v = exps[:, v]·e^{shifts of v's block}/e^{log_normalizer}."""

    hidden: jax.Array  # [n, D]
    tokens: jax.Array  # [n]
    exps: jax.Array  # [n, V]
    shifts: jax.Array  # [blocks, n]
    log_normalizer: jax.Array  # [n]
    logprobs: jax.Array  # [n] of the tokens
    target_column: jax.Array  # [n, D] W[:, token]
    mean_column: jax.Array  # [n, D] Σ_v π_v·W[:, v]


def softmax_of(hidden, unembed, tokens, block_size: int) -> Softmax:
    """The softmax of a chunk, hidden [n, D], tokens [n]."""
    dtype = operand_dtype(hidden, unembed)
    zero = zero_like(hidden, jnp.promote_types(dtype, jnp.float32))
    (number, width), vocab_size = hidden.shape, unembed.shape[1]

    def accumulate(kept, block):
        exps, shifts, mean_column = kept
        exps = jax.lax.dynamic_update_slice_in_dim(exps, block.exps.astype(dtype), block.start, axis=1)
        mean_column = mean_column * block.decay[:, None] + product(block.exps, block.columns, 1, 1, dtype)
        return exps, shifts.at[block.index].set(block.shift), mean_column

    kept = (
        jnp.broadcast_to(zero.astype(dtype), (number, vocab_size)),
        jnp.broadcast_to(zero, (math.ceil(vocab_size / block_size), number)),
        jnp.broadcast_to(zero, (number, width)),
    )
    shift, total, (exps, shifts, mean_column) = online_softmax(hidden, unembed, block_size, accumulate, kept)
    log_normalizer = shift + jnp.log(total)
    target_logits, target_column = target(hidden, unembed, tokens)
    logprobs = target_logits - log_normalizer
    return Softmax(hidden, tokens, exps, shifts, log_normalizer, logprobs, target_column, mean_column / total[:, None])


def add_to_unembed(d_unembed, softmax: Softmax, slopes, block_size) -> jax.Array:
    """d_unembed + Σ_n slopes_n·h_n·(onehot_n − π_n), in place block by block; normalizers and slopes scale h, never [n, V]."""
    dtype = softmax.exps.dtype
    states = softmax.hidden.astype(slopes.dtype)

    def step(d_unembed, index, start, size):
        scale = slopes * jnp.exp(softmax.shifts[index] - softmax.log_normalizer)
        exps = jax.lax.dynamic_slice_in_dim(softmax.exps, start, size, axis=1)
        return add_columns(d_unembed, -product(states * scale[:, None], exps, 0, 0, dtype), start)

    d_unembed = over_blocks(step, d_unembed, d_unembed.shape[1], block_size)
    return d_unembed.at[:, softmax.tokens].add((states * slopes[:, None]).T)


class _Block(NamedTuple):
    """One block of the vocabulary for a chunk of n tokens."""

    columns: jax.Array  # [D, size]
    logits: jax.Array  # [n, size]
    exps: jax.Array  # [n, size] e^{logits − shift}
    shift: jax.Array  # [n] the largest logit so far
    decay: jax.Array  # [n] e^{previous shift − shift}
    index: jax.Array
    start: jax.Array


def online_softmax(hidden, unembed, block_size, accumulate: Callable, kept):
    """The largest logit, Σ_v e^{logit − largest} and what `accumulate(kept, block)` makes of all blocks."""
    dtype = operand_dtype(hidden, unembed)
    zero = jnp.broadcast_to(zero_like(hidden, jnp.promote_types(dtype, jnp.float32)), hidden.shape[:1])

    def step(carry, index, start, size):
        previous, total, kept = carry
        columns = jax.lax.dynamic_slice_in_dim(unembed, start, size, axis=1)
        logits = product(hidden, columns, 1, 0, dtype)
        shift = jnp.maximum(previous, jnp.max(logits, axis=-1))
        exps, decay = jnp.exp(logits - shift[:, None]), jnp.exp(previous - shift)
        kept = accumulate(kept, _Block(columns, logits, exps, shift, decay, index, start))
        return shift, total * decay + jnp.sum(exps, axis=-1), kept

    return over_blocks(step, (zero - jnp.inf, zero, kept), unembed.shape[1], block_size)


def over_blocks(step: Callable, carry, vocab_size: int, block_size: int):
    """`carry = step(carry, index, start, size)` over blocks of the vocabulary, the last of which may be shorter."""
    num_blocks = vocab_size // block_size
    carry = jax.lax.fori_loop(0, num_blocks, lambda i, carry: step(carry, i, i * block_size, block_size), carry)
    rest = vocab_size - num_blocks * block_size
    return step(carry, num_blocks, num_blocks * block_size, rest) if rest else carry


def target(hidden, unembed, tokens) -> tuple[jax.Array, jax.Array]:
    """h·W[:, token] and W[:, token]; NaN for a token that is none of the vocabulary, such as the −100 of other systems."""
    dtype = jnp.promote_types(operand_dtype(hidden, unembed), jnp.float32)
    columns = jnp.take(unembed, tokens, axis=1, mode="clip").T.astype(dtype)
    known = (tokens >= 0) & (tokens < unembed.shape[1])
    return jnp.where(known, jnp.sum(hidden.astype(dtype) * columns, axis=-1), jnp.nan), columns


def add_columns(matrix, columns, start) -> jax.Array:
    """The matrix with `columns` added from column `start` on, in place inside a loop."""
    here = jax.lax.dynamic_slice_in_dim(matrix, start, columns.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(matrix, here + columns, start, axis=1)


def operand_dtype(hidden, unembed) -> jnp.dtype:
    """bfloat16 operands stay what they are, sums are float32; float16 has no range for gradients of a mean."""
    dtype = jnp.promote_types(hidden.dtype, unembed.dtype)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def product(a, b, a_axis: int, b_axis: int, dtype) -> jax.Array:
    """Contracts one axis of each, operands in `dtype`, accumulated in at least float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    accumulated = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=accumulated)
