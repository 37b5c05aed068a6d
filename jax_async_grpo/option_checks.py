"""What an option of the laws may be, in one line that names it; no jax, as in the laws themselves."""

from __future__ import annotations

import math
import operator

__all__ = ["as_fraction", "as_integer", "as_positive"]


def as_integer(name: str, value, *, minimum: int) -> int:
    """The option as an int; ValueError unless it is an integer, not a bool, of at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
    return number


def as_positive(name: str, value, *, infinite: bool = False) -> float:
    """The option as a float; ValueError unless it is > 0, and finite if not `infinite`."""
    number = float(value)
    if not number > 0 or (math.isinf(number) and not infinite):
        raise ValueError(f"{name}={number:g} must be > 0{'' if infinite else ' and finite'}")
    return number


def as_fraction(name: str, value, *, closed: bool = False) -> float:
    """The option as a float; ValueError unless it lies in (0, 1), or (0, 1] if `closed`."""
    number = float(value)
    if not (0 < number < 1 or (closed and number == 1)):
        raise ValueError(f"{name}={number:g} must lie in (0, 1{']' if closed else ')'}")
    return number
