"""Small pieces of Markdown that pages of studies share: tables and numbers with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["list_of", "markdown_table", "with_interval"]


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table; every cell is shown by `str`."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def with_interval(value: float | None, interval: Sequence[float] | None, form: str = ".2f") -> str:
    """`0.61 [0.55, 0.66]`; "-" where there is no number."""
    if value is None:
        return "-"
    shown = f"{value:{form}}" + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")
    return shown.replace("-", "−")


def list_of(words: Iterable[str]) -> str:
    """`a, b and c`; "none" for no word."""
    words = list(words)
    if len(words) < 2:
        return words[0] if words else "none"
    return ", ".join(words[:-1]) + " and " + words[-1]
