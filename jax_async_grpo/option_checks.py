"""What an option of the laws may be, in one line that names it; no jax, as in the laws themselves."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np

__all__ = ["as_fraction", "as_integer", "as_number", "as_positive"]


def as_integer(name: str, value, *, minimum: int, maximum: int | None = None) -> int:
    """The option as an int; ValueError unless it is an integer, not a bool, within minimum..maximum."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name}={repr(value):.30} must be an integer in {minimum}..{maximum}")
    return number


def as_number(name: str, value, is_allowed: Callable[[float], bool], allowed: str) -> float:
    """The option as a float; ValueError unless it is one real number, not a bool, and is allowed; the words finish "must"."""
    try:
        number = None if isinstance(value, (bool, np.bool_, str, bytes)) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise ValueError(f"{name}={' '.join(repr(value).split()):.60} must be one number and {allowed}")
    if not is_allowed(number):
        raise ValueError(f"{name}={number:g} must {allowed}")
    return number


def as_positive(name: str, value, *, infinite: bool = False) -> float:
    """The option as a float; ValueError unless it is > 0, and finite if not `infinite`."""
    words = "be > 0" if infinite else "be > 0 and finite"
    return as_number(name, value, lambda x: x > 0 and (infinite or not math.isinf(x)), words)


def as_fraction(name: str, value, *, closed: bool = False) -> float:
    """The option as a float; ValueError unless it lies in (0, 1), or (0, 1] if `closed`."""
    return as_number(name, value, lambda x: 0 < x < 1 or (closed and x == 1), f"lie in (0, 1{']' if closed else ')'}")
