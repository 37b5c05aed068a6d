"""What studies made of training sweeps share: their config holds a whole sweep under `sweep`, and its chunks are the pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax_async_grpo import sweep_run
from jax_async_grpo.records import Workdir

__all__ = ["run_sweep", "sweep_pieces", "validate_sweep"]


def validate_sweep(config: Mapping[str, Any]) -> None:
    """ValueError unless `config.sweep` can be run."""
    if not isinstance(config.get("sweep"), Mapping):
        raise ValueError(f"config.sweep is {config.get('sweep')!r}; it must be the config of a sweep")
    try:
        sweep_run.validate(config["sweep"])
    except ValueError as error:
        raise ValueError(str(error).replace("config.", "config.sweep.", 1)) from None
    if config.get("precision") != config["sweep"]["precision"]:
        raise ValueError(f"config.precision is {config.get('precision')!r}; it must be that of config.sweep")


def sweep_pieces(config: Mapping[str, Any]) -> list[str]:
    """Names of the chunks."""
    return [chunk.name for chunk in sweep_run.chunks(config["sweep"])]


def run_sweep(
    config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None], programs: dict | None = None
) -> None:
    """Runs the chunks of `config.sweep` that the workdir lacks; `programs` as in `sweep_run.run_chunks`."""
    sweep_run.run_chunks(config["sweep"], workdir, lambda name, seconds: on_piece(name, seconds) if seconds else None, programs)
