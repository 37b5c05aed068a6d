"""Scores on disk: one checksummed JSON file per key, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_path", "default_cache_dir", "read_scores", "write_scores"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/jax_async_grpo`, by default `~/.cache/jax_async_grpo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jax_async_grpo"


def cache_path(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The file of a key: the name for the reader's eye, a hash of everything in the key for the rest."""
    return folder / f"{name}-{_digest(key)[:20]}.json"


def read_scores(path: Path) -> Any | None:
    """The content that `write_scores` put there, or None where the file is missing, unreadable, cut short or altered."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content = document["content"]
        return content if document["sha256"] == _digest(content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_scores(path: Path, content: Any) -> None:
    """Writes a file beside `path` and renames it; where that cannot be done it warns, since scores can be made again."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"sha256": _digest(content), "content": content}, file)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"scores are not cached, {path.parent} cannot be written: {error}", stacklevel=2)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
