"""Log-probs, policy loss and its gradient from hidden states and the output matrix; logits [B, L, V] never exist.

The tokens are cut into chunks, and a chunk's logits are made in blocks of the vocabulary, each while its slice of the output
matrix is at hand. Of a chunk e^{z−shift} is kept, [chunk, V]. With z = h·W, p = softmax(z) and w = ∂loss/∂log π(y):

    ∂loss/∂h = w·(W[:, y] − Σ_v p_v·W[:, v])        ∂loss/∂W[:, v] = Σ_tokens w·(1[v = y] − p_v)·h

The sum in the first does not hold w, so it is accumulated along with the normalizer; in the second, w and the normalizer scale
h. No product with the vocabulary is done twice and no gradient of logits is written down: docs/head.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.aggregation import MaskedSum, sequence_mean
from jax_async_grpo.losses.arguments import check_tokens, valid_only
from jax_async_grpo.masked import as_mask

__all__ = ["LossAndGradient", "logprobs_and_entropy", "loss_and_gradient", "policy_loss", "token_logprobs"]

_MAX_CHUNK, _MIN_CHUNK = 512, 128  # tokens
_BLOCK = 2048  # entries of the vocabulary


class LossAndGradient(NamedTuple):
    """A policy loss and what an update needs of it.

    Attributes:
      loss: scalar, at least float32.
      logprobs: [..., L] log π_θ of the tokens, nats, 0 under the mask; no gradient passes.
      hidden: [..., L, D] ∂loss/∂hidden, in the dtype of the hidden states.
      unembed: [D, V] ∂loss/∂unembed, accumulated in at least float32, in the dtype of the output matrix.
    """

    loss: jax.Array
    logprobs: jax.Array
    hidden: jax.Array
    unembed: jax.Array


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


def policy_loss(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    loss_fn: Callable[..., jax.Array],
    aggregation_fn: Callable[..., MaskedSum] = sequence_mean,
    coupling: str = "row",
    chunk_size: int | None = None,
    block_size: int | None = None,
    loss_inputs: Mapping[str, jax.Array] | None = None,
    return_logprobs: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """aggregation_fn(loss_fn(log π_θ, ...), mask).mean(); differentiated, it forms the gradient in the forward pass.

    The backward pass then only scales it. What `loss_fn` computes of one token may depend on that token ("token"), on its
    completion ("row") or on the whole batch ("batch", e.g. `losses.m2po`). A chunk is a whole number of rows unless
    the coupling is "token". Where a row is longer than a chunk, or the coupling is "batch", the log-probs are computed first
    and the gradient makes the logits again: four products with the vocabulary in place of three.

    Differentiable once, in reverse: in the hidden states, the output matrix, old log-probs, advantages and loss inputs.

    Args:
      hidden: [..., L, D].
      unembed: [D, V].
      tokens: [..., L] int.
      old_logprobs: [..., L] log π_old, nats: the denominator of the ratio.
      advantages: [...] or [..., L].
      mask: [..., L] bool or 0/1, None = all valid.
      loss_fn: a policy loss `(logprobs, old_logprobs, advantages, mask, **loss_inputs) -> [..., L]` of any number of rows; bind
        its options with functools.partial.
      aggregation_fn: `(values, mask) -> MaskedSum`, linear in the values with weights from the mask alone.
      coupling: "token", "row" or "batch". A loss that couples more than is said here gives another loss, silently.
      chunk_size: tokens whose logits exist at a time; as in `token_logprobs`.
      block_size: as in `token_logprobs`.
      loss_inputs: further arrays [..., L] by name, such as behavior_logprobs.
      return_logprobs: also returns the log-probs, through which no gradient passes.

    Returns:
      scalar, or (scalar, [..., L] log-probs).

    Raises:
      ValueError: shapes that do not match, a missing denominator, an unknown coupling, a size below 1.
    """
    problem = _problem(
        hidden, unembed, tokens, old_logprobs, advantages, mask, aggregation_fn, coupling, chunk_size, block_size, loss_inputs
    )
    compute = (_one_pass if problem.fits else _two_passes)(loss_fn, problem.sizes)
    loss, logprobs = compute(problem.hidden, problem.unembed, problem.loss_arrays, problem.fixed)
    return (loss, jax.lax.stop_gradient(logprobs).reshape(jnp.shape(tokens))) if return_logprobs else loss


def loss_and_gradient(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    **options: Any,
) -> LossAndGradient:
    """The loss, the log-probs and the gradient in hidden states and output matrix at once; no autodiff around it is needed.

    Hand `hidden` of the result to the vjp of the layers below. Arguments and errors as in `policy_loss`, options its keywords.
    """

    def loss(hidden, unembed):
        return policy_loss(hidden, unembed, tokens, old_logprobs, advantages, mask, **options, return_logprobs=True)

    (value, logprobs), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembed)
    return LossAndGradient(value, logprobs, *gradient)


# The arguments at the door.


class _Fixed(NamedTuple):
    """What no gradient passes to, [R, L] rows."""

    tokens: jax.Array
    valid: jax.Array
    weights: jax.Array


class _Problem(NamedTuple):
    hidden: jax.Array  # [R, L, D]
    unembed: jax.Array
    loss_arrays: dict[str, jax.Array]  # [R, L]; advantages also [R]
    fixed: _Fixed
    fits: bool  # whether a chunk holds what the loss couples
    sizes: tuple[int, int]


def _problem(
    hidden, unembed, tokens, old_logprobs, advantages, mask, aggregation_fn, coupling, chunk_size, block_size, loss_inputs
) -> _Problem:
    if coupling not in ("token", "row", "batch"):
        raise ValueError(f"coupling is {coupling!r}; it must be 'token', 'row' or 'batch'")
    hidden, unembed, tokens, valid = _checked(hidden, unembed, tokens, mask)
    shape, sizes = tokens.shape, _sizes(tokens.size, unembed.shape[1], chunk_size, block_size)
    arrays = {"old_logprobs": old_logprobs, **(loss_inputs or {})}
    for name, array in arrays.items():
        check_tokens(name, array, shape, None)
    if jnp.shape(advantages) not in (shape, shape[:-1]):
        raise ValueError(f"advantages has shape {jnp.shape(advantages)}; it must be {shape} (per token) or {shape[:-1]}")
    arrays = {name: _floating(array) for name, array in {**arrays, "advantages": advantages}.items()}
    if coupling == "token" and jnp.shape(advantages) != shape:
        arrays["advantages"] = jnp.broadcast_to(arrays["advantages"][..., None], shape)
    # linear in the values, so that the gradient anywhere is the weight of every token
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    weights = jax.grad(lambda values: aggregation_fn(values, valid).mean())(jnp.zeros(shape, dtype))
    length = 1 if coupling == "token" else shape[-1]  # a token that couples with no other is a row
    rows = {name: x.reshape((-1, length) if x.shape == shape else (-1,)) for name, x in arrays.items()}
    fixed = _Fixed(*(x.reshape(-1, length) for x in (tokens, valid, weights)))
    hidden = hidden.reshape(*fixed.tokens.shape, -1)
    return _Problem(*_same_axes((hidden, unembed, rows, fixed)), coupling != "batch" and length <= sizes[0], sizes)


def _checked(hidden, unembed, tokens, mask):
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


def _sizes(num_tokens: int, vocab_size: int, chunk_size: int | None, block_size: int | None) -> tuple[int, int]:
    for name, size in dict(chunk_size=chunk_size, block_size=block_size).items():
        if size is not None and not size >= 1:
            raise ValueError(f"{name} is {size}; it must be >= 1, or None")
    default = min(_MAX_CHUNK, max(_MIN_CHUNK, math.ceil(num_tokens / 4)))
    return default if chunk_size is None else chunk_size, min(vocab_size, block_size or _BLOCK)


def _floating(array) -> jax.Array:
    return jnp.asarray(array, jnp.promote_types(jnp.result_type(array), jnp.float32))


def _same_axes(tree):
    """The arrays, inside `shard_map` all varying over the mesh axes that any varies over, as what a loop carries must."""
    zero = sum(_zero_like(leaf, jnp.float32) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: jnp.where(zero == 0, leaf, jnp.zeros((), leaf.dtype)), tree)


def _zero_like(array: jax.Array, dtype) -> jax.Array:
    """Scalar 0 that varies over the mesh axes of `array`; the compiler folds it."""
    return jnp.where(False, array[(0,) * array.ndim].astype(dtype), jnp.zeros((), dtype))


# The loss and its gradient.


def _objective(loss_fn: Callable) -> Callable:
    def objective(logprobs, arrays, fixed):
        inputs = dict(arrays)
        values = loss_fn(logprobs, inputs.pop("old_logprobs"), inputs.pop("advantages"), fixed.valid, **inputs)
        if jnp.shape(values) != logprobs.shape:
            raise ValueError(
                f"loss_fn returns shape {jnp.shape(values)}; it must return that of the log-probs, {logprobs.shape}"
            )
        return jnp.sum(valid_only(values, fixed.valid) * fixed.weights)

    return objective


def _two_passes(loss_fn: Callable, sizes: tuple[int, int]) -> Callable:
    """The gradient of log-probs that are there before the loss is: the backward pass makes each chunk's logits again."""
    objective = _objective(loss_fn)

    def loss(hidden, unembed, arrays, fixed):
        logprobs = _logprobs_of_rows(hidden, unembed, fixed, sizes)
        return objective(logprobs, arrays, fixed), logprobs

    return loss


def _one_pass(loss_fn: Callable, sizes: tuple[int, int]) -> Callable:
    """The same with a gradient that a chunk forms as soon as its log-probs are there; the backward pass scales it."""
    plain, objective = _two_passes(loss_fn, sizes), _objective(loss_fn)

    def forward(hidden, unembed, arrays, fixed):
        dtype = jnp.promote_types(jnp.promote_types(hidden.dtype, unembed.dtype), jnp.float32)
        num_rows, length = fixed.tokens.shape

        def chunk(carry, part):
            total, d_unembed = carry
            states, arrays, fixed = part
            softmax = _softmax(states.reshape(-1, states.shape[-1]), unembed, fixed.tokens.reshape(-1), sizes[1])

            def loss(logprobs, arrays):
                return objective(logprobs.reshape(fixed.tokens.shape), arrays, fixed)

            logprobs = valid_only(softmax.logprobs, fixed.valid.reshape(-1))
            value, (slopes, d_arrays) = jax.value_and_grad(loss, argnums=(0, 1))(logprobs, arrays)
            slopes = valid_only(slopes, fixed.valid.reshape(-1)).astype(dtype)
            d_hidden = slopes[:, None] * (softmax.target_column - softmax.mean_column)
            d_unembed = _add_to_unembed(d_unembed, softmax, slopes, sizes[1])
            d_hidden = d_hidden.astype(hidden.dtype).reshape(states.shape)
            return (total + value, d_unembed), (logprobs.reshape(fixed.tokens.shape), d_hidden, d_arrays)

        cut, join = _cutting(num_rows, max(1, sizes[0] // length))
        zero = _zero_like(hidden, dtype)
        (total, d_unembed), outputs = jax.lax.scan(
            chunk, (zero, jnp.broadcast_to(zero, unembed.shape)), cut((hidden, arrays, fixed))
        )
        logprobs, d_hidden, d_arrays = join(outputs)
        return (total, logprobs), (d_hidden, d_unembed.astype(unembed.dtype), d_arrays)

    def backward(gradients, cotangents):
        return *jax.tree.map(lambda gradient: (cotangents[0] * gradient).astype(gradient.dtype), gradients), None

    loss = jax.custom_vjp(plain)
    loss.defvjp(forward, backward)
    return loss


def _cutting(number: int, size: int) -> tuple[Callable, Callable]:
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


# Products with the vocabulary.


class _Softmax(NamedTuple):
    """The softmax of a chunk of n tokens, not normalized: π_v = exps[:, v]·e^{shifts of v's block}/e^{log_normalizer}."""

    hidden: jax.Array  # [n, D]
    tokens: jax.Array  # [n]
    exps: jax.Array  # [n, V]
    shifts: jax.Array  # [blocks, n]
    log_normalizer: jax.Array  # [n]
    logprobs: jax.Array  # [n] of the tokens
    target_column: jax.Array  # [n, D] W[:, token]
    mean_column: jax.Array  # [n, D] Σ_v π_v·W[:, v]


def _softmax(hidden, unembed, tokens, block_size) -> _Softmax:
    dtype = _operand_dtype(hidden, unembed)
    zero = _zero_like(hidden, jnp.promote_types(dtype, jnp.float32))
    (number, width), vocab_size = hidden.shape, unembed.shape[1]

    def accumulate(kept, block):
        exps, shifts, mean_column = kept
        exps = jax.lax.dynamic_update_slice_in_dim(exps, block.exps.astype(dtype), block.start, axis=1)
        mean_column = mean_column * block.decay[:, None] + _product(block.exps, block.columns, 1, 1, dtype)
        return exps, shifts.at[block.index].set(block.shift), mean_column

    kept = (
        jnp.broadcast_to(zero.astype(dtype), (number, vocab_size)),
        jnp.broadcast_to(zero, (math.ceil(vocab_size / block_size), number)),
        jnp.broadcast_to(zero, (number, width)),
    )
    shift, total, (exps, shifts, mean_column) = _online_softmax(hidden, unembed, block_size, accumulate, kept)
    log_normalizer = shift + jnp.log(total)
    target_logits, target_column = _target(hidden, unembed, tokens)
    logprobs = target_logits - log_normalizer
    return _Softmax(hidden, tokens, exps, shifts, log_normalizer, logprobs, target_column, mean_column / total[:, None])


def _add_to_unembed(d_unembed, softmax: _Softmax, slopes, block_size) -> jax.Array:
    """d_unembed + Σ_n slopes_n·h_n·(onehot_n − π_n), in place block by block; normalizers and slopes scale h, never [n, V]."""
    dtype = softmax.exps.dtype
    states = softmax.hidden.astype(slopes.dtype)

    def step(d_unembed, index, start, size):
        scale = slopes * jnp.exp(softmax.shifts[index] - softmax.log_normalizer)
        exps = jax.lax.dynamic_slice_in_dim(softmax.exps, start, size, axis=1)
        return _add_columns(d_unembed, -_product(states * scale[:, None], exps, 0, 0, dtype), start)

    d_unembed = _over_blocks(step, d_unembed, d_unembed.shape[1], block_size)
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


def _online_softmax(hidden, unembed, block_size, accumulate: Callable, kept):
    """The largest logit, Σ_v e^{logit − largest} and what `accumulate(kept, block)` makes of all blocks."""
    dtype = _operand_dtype(hidden, unembed)
    zero = jnp.broadcast_to(_zero_like(hidden, jnp.promote_types(dtype, jnp.float32)), hidden.shape[:1])

    def step(carry, index, start, size):
        previous, total, kept = carry
        columns = jax.lax.dynamic_slice_in_dim(unembed, start, size, axis=1)
        logits = _product(hidden, columns, 1, 0, dtype)
        shift = jnp.maximum(previous, jnp.max(logits, axis=-1))
        exps, decay = jnp.exp(logits - shift[:, None]), jnp.exp(previous - shift)
        kept = accumulate(kept, _Block(columns, logits, exps, shift, decay, index, start))
        return shift, total * decay + jnp.sum(exps, axis=-1), kept

    return _over_blocks(step, (zero - jnp.inf, zero, kept), unembed.shape[1], block_size)


def _over_blocks(step: Callable, carry, vocab_size: int, block_size: int):
    """`carry = step(carry, index, start, size)` over blocks of the vocabulary, the last of which may be shorter."""
    num_blocks = vocab_size // block_size
    carry = jax.lax.fori_loop(0, num_blocks, lambda i, carry: step(carry, i, i * block_size, block_size), carry)
    rest = vocab_size - num_blocks * block_size
    return step(carry, num_blocks, num_blocks * block_size, rest) if rest else carry


def _target(hidden, unembed, tokens) -> tuple[jax.Array, jax.Array]:
    """h·W[:, token] and W[:, token]."""
    dtype = jnp.promote_types(_operand_dtype(hidden, unembed), jnp.float32)
    columns = jnp.take(unembed, tokens, axis=1, mode="clip").T.astype(dtype)
    return jnp.sum(hidden.astype(dtype) * columns, axis=-1), columns


def _add_columns(matrix, columns, start) -> jax.Array:
    here = jax.lax.dynamic_slice_in_dim(matrix, start, columns.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(matrix, here + columns, start, axis=1)


def _operand_dtype(hidden, unembed) -> jnp.dtype:
    """bfloat16 operands stay what they are, sums are float32; float16 has no range for gradients of a mean."""
    dtype = jnp.promote_types(hidden.dtype, unembed.dtype)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def _product(a, b, a_axis: int, b_axis: int, dtype) -> jax.Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    accumulated = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=accumulated)


# Log-probs by themselves.


def _statistics(hidden, unembed, tokens, mask, chunk_size, block_size, *, entropy: bool):
    hidden, unembed, tokens, valid = _checked(hidden, unembed, tokens, mask)
    sizes = _sizes(tokens.size, unembed.shape[1], chunk_size, block_size)
    flat = _same_axes((hidden.reshape(-1, hidden.shape[-1]), unembed, tokens.reshape(-1)))
    return tuple(valid_only(x.reshape(valid.shape), valid) for x in _recomputing(sizes, entropy)(*flat))


def _logprobs_of_rows(hidden, unembed, fixed, sizes):
    (logprobs,) = _recomputing(sizes, entropy=False)(hidden.reshape(-1, hidden.shape[-1]), unembed, fixed.tokens.reshape(-1))
    return valid_only(logprobs.reshape(fixed.tokens.shape), fixed.valid)


def _recomputing(sizes: tuple[int, int], entropy: bool) -> Callable:
    """(hidden[N, D], unembed[D, V], tokens[N]) -> (log-probs[N],), or (log-probs[N], entropies[N])."""
    chunk_size, block_size = sizes

    def forward(hidden, unembed, tokens):
        dtype = jnp.promote_types(_operand_dtype(hidden, unembed), jnp.float32)
        cut, join = _cutting(tokens.size, chunk_size)

        def weighted_logits(kept, block):
            return kept * block.decay + jnp.sum(block.exps * block.logits, axis=-1) if entropy else kept

        def chunk(part):
            states, tokens = part
            zero = jnp.broadcast_to(_zero_like(states, dtype), tokens.shape)
            shift, total, weighted = _online_softmax(states, unembed, block_size, weighted_logits, zero)
            log_normalizer = shift + jnp.log(total)
            logprobs = _target(states, unembed, tokens)[0] - log_normalizer
            return (logprobs, log_normalizer, log_normalizer - weighted / total)

        logprobs, log_normalizer, entropies = join(jax.lax.map(chunk, cut((hidden, tokens))))
        outputs = (logprobs, entropies) if entropy else (logprobs,)
        return outputs, (hidden, unembed, tokens, log_normalizer, entropies)

    def backward(residuals, cotangents):
        hidden, unembed, *per_token = residuals
        dtype, accumulated = _operand_dtype(hidden, unembed), per_token[1].dtype
        cut, join = _cutting(hidden.shape[0], chunk_size)

        def chunk(d_unembed, part):
            states, (tokens, log_normalizer, entropies), slopes = part

            def step(carry, index, start, size):
                d_hidden, d_unembed = carry
                columns = jax.lax.dynamic_slice_in_dim(unembed, start, size, axis=1)
                logprobs = _product(states, columns, 1, 0, dtype) - log_normalizer[:, None]
                slope = -slopes[0][:, None]
                if entropy:
                    slope = slope - slopes[1][:, None] * (logprobs + entropies[:, None])
                d_logits = slope * jnp.exp(logprobs)
                d_unembed = _add_columns(d_unembed, _product(states, d_logits, 0, 0, dtype), start)
                return d_hidden + _product(d_logits, columns, 1, 1, dtype), d_unembed

            scaled = (slopes[0][:, None] * states).T.astype(accumulated)
            d_hidden = slopes[0][:, None] * _target(states, unembed, tokens)[1]
            d_hidden, d_unembed = _over_blocks(step, (d_hidden, d_unembed), unembed.shape[1], block_size)
            return d_unembed.at[:, tokens].add(scaled), d_hidden.astype(hidden.dtype)

        zeros = jnp.broadcast_to(_zero_like(hidden, accumulated), unembed.shape)
        d_unembed, d_hidden = jax.lax.scan(chunk, zeros, cut((hidden, tuple(per_token), cotangents)))
        return join(d_hidden), d_unembed.astype(unembed.dtype), None

    statistics = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    statistics.defvjp(forward, backward)
    return statistics
