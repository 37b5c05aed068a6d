"""What an option of the laws may be, in one line that names it; no jax, as in the laws themselves."""

from __future__ import annotations

import operator

__all__ = ["as_integer"]


def as_integer(name: str, value, *, minimum: int) -> int:
    """The option as an int; ValueError unless it is an integer, not a bool, of at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
    return number
