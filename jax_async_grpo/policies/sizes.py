"""Sizes and types of a policy, checked where it is built and not where it is first applied."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

__all__ = ["check_dtype", "check_sizes"]


def check_sizes(**sizes: int) -> None:
    """Raises ValueError on the first that is not an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")


def check_dtype(dtype, name: str = "dtype") -> None:
    """Raises ValueError unless it is a floating-point type, or the name of one."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} is {dtype!r}; it must be a floating-point type")
