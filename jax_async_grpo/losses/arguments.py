"""What every loss does at its door: shapes checked by name, at least float32, 0 under the mask; nothing else is changed."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.masked import as_mask

__all__ = [
    "PolicyInputs",
    "check_number",
    "check_positive",
    "check_tokens",
    "detached",
    "policy_inputs",
    "shape_of",
    "token_inputs",
    "valid_only",
]


class PolicyInputs(NamedTuple):
    """The arguments of a policy loss, all [..., L], at least float32 and 0 where `valid` is False.

    Attributes:
      logprobs: log π_θ.
      old_logprobs: log π_old, of the ratio's denominator.
      advantages: A, one per token.
      valid: the mask, bool.
    """

    logprobs: jax.Array
    old_logprobs: jax.Array
    advantages: jax.Array
    valid: jax.Array


def policy_inputs(logprobs, old_logprobs, advantages, mask) -> PolicyInputs:
    """Checked arguments of a policy loss.

    Args:
      logprobs: [..., L].
      old_logprobs: [..., L].
      advantages: [..., L] or [...]; the rank alone decides.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      PolicyInputs.

    Raises:
      ValueError: a missing denominator, or shapes that do not match, naming the argument.
    """
    if old_logprobs is None:
        raise ValueError("old_logprobs is None; the ratio needs its denominator (pass the recorded behavior log-probs)")
    shape = shape_of("logprobs", logprobs)
    valid = check_tokens("old_logprobs", old_logprobs, shape, mask)
    given = shape_of("advantages", advantages)
    rank = len(given)
    if given != (shape if rank == len(shape) else shape[:-1]):
        raise ValueError(f"advantages has shape {given}; it must be {shape} (per token) or {shape[:-1]}")
    dtype = jnp.promote_types(jnp.result_type(logprobs), jnp.float32)
    advantages = jnp.asarray(advantages, dtype)
    advantages = advantages if rank == len(shape) else advantages[..., None]
    tokens = (valid_only(jnp.asarray(x, dtype), valid) for x in (logprobs, old_logprobs))
    return PolicyInputs(*tokens, valid_only(jnp.broadcast_to(advantages, shape), valid), valid)


def token_inputs(mask, **arrays) -> tuple[jax.Array, ...]:
    """The named arrays [..., L], checked against the first, at least float32, 0 under the mask; then the mask as bool."""
    (first, values), *others = arrays.items()
    shape = shape_of(first, values)
    if not shape:
        raise ValueError(f"{first} is a scalar; it must be [..., L], one value per completion token")
    for name, array in others:
        _check_shape(name, array, shape, first)
    valid = as_mask(mask, shape)
    dtype = jnp.promote_types(jnp.result_type(*arrays.values()), jnp.float32)
    return *(valid_only(jnp.asarray(x, dtype), valid) for x in arrays.values()), valid


def detached(detached_logprobs, logprobs, valid) -> jax.Array:
    """What a loss uses of the learner as a weight, [..., L]: `detached_logprobs`, or the log-probs behind a stop_gradient."""
    if detached_logprobs is None:
        return jax.lax.stop_gradient(logprobs)
    _check_shape("detached_logprobs", detached_logprobs, logprobs.shape, "logprobs")
    return valid_only(jnp.asarray(detached_logprobs, logprobs.dtype), valid)


def check_tokens(name: str, other, shape: tuple[int, ...], mask) -> jax.Array:
    """The mask as bool of the log-probs' shape; raises ValueError where `other` has another one."""
    if len(shape) < 1:
        raise ValueError("logprobs is a scalar; it must be [..., L], one log-prob per completion token")
    _check_shape(name, other, shape, "logprobs")
    return as_mask(mask, shape)


def shape_of(name: str, values) -> tuple[int, ...]:
    """The shape of an array or a number; raises ValueError, naming the argument, for None, lists and what else is no array."""
    if values is None:
        raise ValueError(f"{name} is None; it must be an array")
    if not hasattr(values, "shape") and not isinstance(values, numbers.Number):
        raise ValueError(f"{name} is a {type(values).__name__}; it must be an array")
    return jnp.shape(values)


def check_number(name: str, value) -> None:
    """Raises ValueError unless an option is a Python number: bounds are checked, so they cannot be traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} is traced; options are Python numbers (close over them or mark them static)")
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def check_positive(**options: float) -> None:
    """Raises ValueError on the first option that is not a positive finite number."""
    for name, value in options.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be > 0 and finite")


def valid_only(values: jax.Array, valid: jax.Array) -> jax.Array:
    """The values, exactly 0 where `valid` is False."""
    return jnp.where(valid, values, jnp.zeros((), values.dtype))


def _check_shape(name, other, shape, like):
    if other is None:
        raise ValueError(f"{name} is None; pass an array of the shape of {like}, {shape}")
    if shape_of(name, other) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(other)}; it must have the shape of {like}, {shape}")
