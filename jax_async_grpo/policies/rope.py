"""Rotary positions: every pair (x[i], x[i + size/2]) of a head is turned by position · frequency[i].

A product of a turned query and a turned key depends on the difference of their positions only (RoFormer, arXiv 2104.09864).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

__all__ = ["check_rope_scaling", "rotate", "rotation"]

_SCALING = {"factor", "low_frequency_factor", "high_frequency_factor", "original_length"}


def check_rope_scaling(scaling: Mapping[str, float] | None) -> None:
    """Raises ValueError unless it is None or has exactly the four numbers of `rotation`, in order."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping) or set(scaling) != _SCALING:
        raise ValueError(f"rope_scaling is {scaling!r}; it must be None or a dict of exactly {', '.join(sorted(_SCALING))}")
    low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
    if not (0 < low < high and scaling["factor"] > 0 and scaling["original_length"] > 0):
        raise ValueError(f"rope_scaling is {dict(scaling)}; all must be positive, low_frequency_factor < high_frequency_factor")


def rotation(
    positions: jax.Array, size: int, base: float, scaling: Mapping[str, float] | None = None, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Cosine and signed sine of position · frequency for both halves of a head.

    frequency_i = f = base^(−2i/size). With scaling (Llama 3.1) a wave that fits more than `high_frequency_factor` times into
    `original_length` tokens keeps f, one that fits less than `low_frequency_factor` times gets f / factor, and between the two

    f · ((1 − s) / factor + s),  s = (original_length · f / 2π − low) / (high − low)

    Args:
      positions: [..., N] int, tokens.
      size: dimensions of a head, even.
      base: of the wavelengths, in tokens / 2π.
      scaling: None, or a dict of factor, low_frequency_factor, high_frequency_factor, original_length (tokens).
      dtype: of the angles.

    Returns:
      Two arrays [..., 1, N, size] for `rotate`; the 1 is the axis of heads.

    Example:
      >>> cos, sin = rotation(jnp.arange(3), size=4, base=1e4)
      >>> cos.shape, rotate(jnp.ones((2, 3, 4)), (cos, sin)).shape
      ((1, 3, 4), (2, 3, 4))
    """
    frequencies = base ** (-jnp.arange(size // 2, dtype=dtype) * 2 / size)
    if scaling is not None:
        frequencies = _scaled(frequencies, **scaling)
    angles = positions[..., None, :, None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def _scaled(frequencies, factor, low_frequency_factor, high_frequency_factor, original_length) -> jax.Array:
    turns = original_length * frequencies / (2 * jnp.pi)
    keep = jnp.clip((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor), 0, 1)
    return frequencies * ((1 - keep) / factor + keep)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns every head of x[..., heads, N, size] by the tables of `rotation`, in their precision; the dtype of x comes back."""
    cos, sin = tables
    return (x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
