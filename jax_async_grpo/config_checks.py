"""What a config may hold: each check raises one line that names the field and says what is allowed."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
import sys
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
    "misnamed_options",
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
# A right name for each kind of field, by the field's last part; those of other fields are losses.
_EXAMPLES = {
    "advantage": "jax_async_grpo.advantages.group_normalized",
    "aggregation": "jax_async_grpo.aggregation.sequence_mean",
    "before": "optax.clip_by_global_norm",
    "control": "jax_async_grpo.control.limit_staleness_drift",
    "correction": "jax_async_grpo.corrections.token_tis",
    "loss": "jax_async_grpo.losses.ppo_clip",
    "name": "optax.adam",
    "optimizer": "optax.adam",
    "policy": "jax_async_grpo.policies.decoder",
    "schedule": "optax.cosine_decay_schedule",
    "task": "jax_async_grpo.tasks.digit_text",
}
_CLOSE = 0.7  # similarity of names above which one is taken for a misspelling of the other


def resolve(name: str, field: str) -> Any:
    """The function a dotted name stands for.

    Raises:
      ValueError: naming the field, when nothing importable has that name, or it cannot be called.
    """
    module_name, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        reason = f" ({error})" if module_name else ""
        hint = _right_name(str(name), field)
        raise ValueError(f"config.{field} is {name!r}; it must be an importable dotted name{hint}{reason}") from None
    if not callable(found):
        raise ValueError(f"config.{field} is {name!r}; it must name a function, not a {type(found).__name__}")
    return found


def misnamed_options(
    function: Callable, options: Mapping[str, Any], field: str | None, *, filled: int = 0, taken: Sequence[str] = ()
) -> str:
    """What is wrong with the names of the options of a function that refused them; "" where the names are right.

    Args:
      function: it tells by its signature what it takes.
      options: the keywords it was to get.
      field: where these stand in the config, to say how to replace them all; None where they cannot be replaced alone.
      filled: positional arguments that the job gives.
      taken: keywords that it gives.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins show none
        return ""
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = {*positional[:filled], *taken}
    known = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given]
    names, required = [p.name for p in known], [p.name for p in known if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = {} if takes_any else {name: _close(name, names) for name in options if name not in names}
    missing = [name for name in required if name not in options]
    if not unknown and not missing:
        return ""
    hints = {name: f" (did you mean {' or '.join(close)}?)" for name, close in unknown.items() if close}
    hints |= {name: " (the job gives it)" for name in given}
    asked = [f"{name}{hints.get(name, '')}" for name in unknown]
    said = [f"there is no {', '.join(asked)}"] if asked else []
    said += [f"it needs {', '.join(missing)}"] if missing else []
    said.append(f"it takes {', '.join(names) or 'none'}{' and more' if takes_any else ''}")
    if field and (missing or unknown.keys() - hints.keys()):
        whole = ", ".join(f"{name!r}: {repr(options[name]) if name in options else '...'}" for name in required)
        said.append(f'to replace all that stands there: --config.{field}="{{{whole}}}"')
    return "; ".join(said)


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
        raise ValueError(f"config.rule: {misnamed_options(CollapseRule, rule, None) or first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Of an error's message."""
    return str(error).strip().split("\n")[0]


def _close(name: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=2, cutoff=_CLOSE)


def _right_name(name: str, field: str) -> str:
    """What a name that cannot be resolved may be meant for, else an example for the field."""
    example = _EXAMPLES.get(re.sub(r"\[\d+\]$", "", field).rpartition(".")[2], _EXAMPLES["loss"])
    home, _, attribute = name.rpartition(".")
    home = home or example.rpartition(".")[0]
    if home == example.rpartition(".")[0]:
        importlib.import_module(home)
    module = sys.modules.get(home)  # one that could not be imported is not tried again
    public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"] if module else []
    close = _close(attribute, public)
    return f", did you mean {home}.{close[0]}?" if close else f" such as {example}"
