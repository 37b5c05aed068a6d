"""What a config may hold: each check raises one line that names the field and says what is allowed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo.scaling import CollapseRule

__all__ = [
    "check_choice",
    "check_distinct",
    "check_integer",
    "check_keys",
    "check_mapping",
    "check_number",
    "check_rule",
    "check_window",
    "first_line",
    "job_of",
    "resolve",
]

# What a config of the job holds and no other does; `config.study` is what makes a study, whatever else stands there.
_SIGNS = {
    "study": {"study"},
    "audit": {"rank_at", "losses"},
    "sweep": {"rule", "algorithms", "cases"},
    "measure_bias": {"clip_level", "cases"},
    "plan": {"anchors", "horizon_run", "sweep"},
    "train": {"num_prompts", "staleness", "denominator"},
}


def resolve(name: str, field: str) -> Any:
    """The function a dotted name stands for.

    Raises:
      ValueError: naming the field, when nothing importable has that name, or it cannot be called.
    """
    module_name, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise ValueError(f"config.{field} is {name!r}; it must be an importable dotted name ({error})") from None
    if not callable(found):
        raise ValueError(f"config.{field} is {name!r}; it must name a function, not a {type(found).__name__}")
    return found


def job_of(config: Any) -> str | None:
    """The launch script a config is for, as far as its keys tell: "sweep" for launch.sweep."""
    return next((job for job, keys in _SIGNS.items() if isinstance(config, Mapping) and keys <= config.keys()), None)


def check_keys(part: Any, known: Sequence[str], field: str) -> None:
    """The keys of a mapping are exactly the known ones; `field` is its dotted name, "" for the config itself."""
    prefix = f"config.{field}." if field else "config."
    check_mapping(part, field)
    for key in part:
        if key not in known:
            raise ValueError(f"{prefix}{key} is not a key of this job; the keys are {', '.join(known)}")
    for key in known:
        if key not in part:
            raise ValueError(f"{prefix}{key} is missing")


def check_mapping(value: Any, field: str) -> None:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"config.{field} is {value!r}; it must be a ConfigDict")


def check_window(value: Any, field: str) -> None:
    """(low, high) with 0 <= low < high, finite."""
    pair = tuple(value) if isinstance(value, Sequence) else ()
    is_number = len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)
    if not is_number or not 0 <= pair[0] < pair[1] < math.inf:
        raise ValueError(f"config.{field} is {value!r}; it must be (low, high) with 0 <= low < high")


def check_choice(part: Mapping[str, Any], key: str, allowed: Sequence[str], field: str) -> None:
    """ValueError unless the key holds some of the allowed words."""
    unknown = [value for value in part[key] if value not in allowed]
    if unknown or not part[key]:
        raise ValueError(f"config.{field}.{key} is {tuple(part[key])}; it must name some of {tuple(allowed)}")


def check_distinct(shown: Sequence[str], values: Sequence[Any], field: str) -> None:
    """ValueError if one of the values, as they are shown in names, stands there twice."""
    twice = next((value for value in shown if shown.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"config.{field} is {tuple(values)}; {twice} stands there twice")


def check_integer(value: Any, field: str, *, minimum: int) -> None:
    """An integer, not a bool, of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"config.{field} is {value!r}; it must be an integer >= {minimum}")


def check_number(value: Any, field: str, is_allowed: Callable[[float], bool], allowed: str) -> None:
    """A finite number for which `is_allowed`; `allowed` says in words what that is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not is_allowed(value):
        raise ValueError(f"config.{field} is {value!r}; it must be a number {allowed}")


def check_rule(rule: Any) -> None:
    """ValueError unless `rule` holds options of a `CollapseRule`."""
    check_mapping(rule, "rule")
    try:
        CollapseRule(**rule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.rule: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return str(error).strip().split("\n")[0]
