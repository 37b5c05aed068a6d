"""Sums and means over valid positions that stay finite whatever stands under the mask, in the value and in the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_mask", "masked_mean", "masked_sum", "masked_values"]


def as_mask(mask, shape: tuple[int, ...]) -> jax.Array:
    """The mask as bool of `shape`; None means that every position is valid.

    Args:
      mask: bool, or numbers that are all 0 or 1, of exactly `shape`; or None.
      shape: the shape of the values it masks.

    Returns:
      bool array of `shape`.

    Raises:
      ValueError: no array, another shape, or neither bool nor 0/1 (checked where the values are concrete).
    """
    if mask is None:
        return jnp.ones(shape, dtype=bool)
    if not hasattr(mask, "shape"):
        raise ValueError(f"mask is a {type(mask).__name__}; it must be an array, bool or 0/1, of shape {tuple(shape)}")
    if jnp.shape(mask) != tuple(shape):
        raise ValueError(f"mask has shape {jnp.shape(mask)}, it must have the shape of the values, {tuple(shape)}")
    if jnp.result_type(mask) == jnp.bool_:
        return jnp.asarray(mask)
    if not isinstance(mask, jax.core.Tracer) and not np.isin(np.asarray(mask, dtype=np.float64), (0.0, 1.0)).all():
        raise ValueError("mask must be bool or hold only 0 and 1")
    return jnp.asarray(mask) != 0


def masked_values(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The values with 0 where the mask is False; NaN and inf there reach neither the value nor the gradient."""
    values = jnp.asarray(values)
    return jnp.where(as_mask(mask, values.shape), values, jnp.zeros((), values.dtype))


def masked_sum(values: jax.Array, mask: jax.Array | None = None, axis=None) -> jax.Array:
    """Σ of the valid values over `axis` (all axes by default); 0 where none is valid."""
    return jnp.sum(masked_values(values, mask), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array | None = None, axis=None) -> jax.Array:
    """Mean of the valid values over `axis` (all axes by default); 0, not NaN, where none is valid."""
    values = jnp.asarray(values)
    valid = as_mask(mask, values.shape)
    count = jnp.sum(valid, axis=axis)
    return masked_sum(values, valid, axis=axis) / jnp.maximum(count, 1)
