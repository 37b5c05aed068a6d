"""The policy loss of hidden states and output matrix, its gradient formed in the forward pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.aggregation import MaskedSum, sequence_mean
from jax_async_grpo.head.door import checked, cutting, floating, same_axes, sizes_of, zero_like
from jax_async_grpo.head.logprobs import logprobs_of_rows
from jax_async_grpo.head.vocabulary import add_to_unembed, softmax_of
from jax_async_grpo.losses.arguments import check_tokens, valid_only
from jax_async_grpo.separability import check_coupling

__all__ = ["LossAndGradient", "loss_and_gradient", "policy_loss"]


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
      coupling: "token", "row" or "batch"; a loss that couples more is found by probing it and refused.
      chunk_size: tokens whose logits exist at a time; as in `token_logprobs`.
      block_size: as in `token_logprobs`.
      loss_inputs: further arrays [..., L] by name, such as behavior_logprobs.
      return_logprobs: also returns the log-probs, through which no gradient passes.

    Returns:
      scalar, or (scalar, [..., L] log-probs).

    Raises:
      ValueError: shapes that do not match, a missing denominator, an unknown coupling or one the loss goes beyond, a size
        below 1.
    """
    problem = _problem(
        hidden, unembed, tokens, old_logprobs, advantages, mask, aggregation_fn, coupling, chunk_size, block_size, loss_inputs
    )
    check_coupling(loss_fn, coupling, problem.fixed.tokens.shape[-1], tuple(loss_inputs or ()))
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
    hidden, unembed, tokens, valid = checked(hidden, unembed, tokens, mask)
    shape, sizes = tokens.shape, sizes_of(tokens.size, unembed.shape[1], chunk_size, block_size)
    arrays = {"old_logprobs": old_logprobs, **(loss_inputs or {})}
    for name, array in arrays.items():
        check_tokens(name, array, shape, None)
    if jnp.shape(advantages) not in (shape, shape[:-1]):
        raise ValueError(f"advantages has shape {jnp.shape(advantages)}; it must be {shape} (per token) or {shape[:-1]}")
    arrays = {name: floating(array) for name, array in {**arrays, "advantages": advantages}.items()}
    if coupling == "token" and jnp.shape(advantages) != shape:
        arrays["advantages"] = jnp.broadcast_to(arrays["advantages"][..., None], shape)
    # linear in the values, so that the gradient anywhere is the weight of every token
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    # zeros that vary with the mask: inside `shard_map` the gradient of replicated ones would be summed over the devices
    zeros, valid = same_axes((jnp.zeros(shape, dtype), valid))
    weights = jax.grad(lambda values: aggregation_fn(values, valid).mean())(zeros)
    length = 1 if coupling == "token" else shape[-1]  # a token that couples with no other is a row
    rows = {name: x.reshape((-1, length) if x.shape == shape else (-1,)) for name, x in arrays.items()}
    fixed = _Fixed(*(x.reshape(-1, length) for x in (tokens, valid, weights)))
    hidden = hidden.reshape(*fixed.tokens.shape, -1)
    return _Problem(*same_axes((hidden, unembed, rows, fixed)), coupling != "batch" and length <= sizes[0], sizes)


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
        logprobs = logprobs_of_rows(hidden, unembed, fixed, sizes)
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
            softmax = softmax_of(states.reshape(-1, states.shape[-1]), unembed, fixed.tokens.reshape(-1), sizes[1])

            def loss(logprobs, arrays):
                return objective(logprobs.reshape(fixed.tokens.shape), arrays, fixed)

            logprobs = valid_only(softmax.logprobs, fixed.valid.reshape(-1))
            value, (slopes, d_arrays) = jax.value_and_grad(loss, argnums=(0, 1))(logprobs, arrays)
            slopes = valid_only(slopes, fixed.valid.reshape(-1)).astype(dtype)
            d_hidden = slopes[:, None] * (softmax.target_column - softmax.mean_column)
            d_unembed = add_to_unembed(d_unembed, softmax, slopes, sizes[1])
            d_hidden = d_hidden.astype(hidden.dtype).reshape(states.shape)
            return (total + value, d_unembed), (logprobs.reshape(fixed.tokens.shape), d_hidden, d_arrays)

        cut, join = cutting(num_rows, max(1, sizes[0] // length))
        zero = zero_like(hidden, dtype)
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
