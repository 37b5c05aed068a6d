"""What studies share that run nothing themselves: all they say is computed from the records of one sweep, `config.source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_async_grpo.config_checks import check_integer, check_keys, check_number, check_rule
from jax_async_grpo.records import Workdir
from jax_async_grpo.studies.contract import run_pieces

__all__ = ["pieces", "run", "source_rows", "validate_analysis"]

_PIECE = "analysis"


def validate_analysis(config: Mapping[str, Any], keys: Sequence[str], *, fractions: Sequence[str] = ("confidence",)) -> None:
    """ValueError unless the config has these keys and what all analyses have in common holds; `fractions` lie in (0, 1)."""
    check_keys(config, keys, "")
    check_rule(config["rule"])
    for key, least in (("min_staleness", 1), ("num_bootstrap", 20), ("seed", 0)):
        check_integer(config[key], key, minimum=least)
    for key in fractions:
        check_number(config[key], key, lambda x: 0 < x < 1, "between 0 and 1")
    if isinstance(config["cases"], str) or not config["cases"]:
        raise ValueError(f"config.cases is {config['cases']!r}; it must be a tuple of cases of the sweep")


def pieces(config: Mapping[str, Any]) -> list[str]:
    """One piece: nothing is run here."""
    del config
    return [_PIECE]


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Records that the study was run; what it says is computed from its source in `summary`."""
    run_pieces(pieces(config), workdir, on_piece, lambda name: [])


def source_rows(config: Mapping[str, Any], sources: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Rows of the sweep named `config.source`; ValueError where the sources lack it."""
    if config["source"] not in sources:
        raise ValueError(f"config.source is {config['source']!r}; config.sources has {', '.join(sources) or 'none'}")
    return sources[config["source"]]
