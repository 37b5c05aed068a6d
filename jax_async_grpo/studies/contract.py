"""What all studies share: finding one by its config, running what is missing, writing what its records say."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jax_async_grpo import records

__all__ = ["finished_pieces", "load_study", "page_text", "read_sources", "run_pieces", "save_figure", "write_results"]

_FUNCTIONS = ("validate", "pieces", "run", "summary", "page", "figures")
_FIGURE_SCHEME = "figures:"  # the page cannot know where it will lie
_UNDATED = {".png": {"Software": None}, ".svg": {"Date": None}}  # what would differ between two drawings of one figure

Rows = list[dict[str, Any]]


def load_study(config: Mapping[str, Any]) -> ModuleType:
    """The module that `config.study` names.

    Raises:
      ValueError: the key is missing, nothing importable has that name, or it lacks a function of a study; `config.sources` is
        no sequence of folders.
    """
    name, sources = config.get("study"), config.get("sources")
    if name is None:
        raise ValueError("config.study is missing: this is no config of a study; configs/study_*.py are")
    try:
        module = importlib.import_module(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config.study is {name!r}; it must be the dotted name of a study ({error})") from None
    missing = [function for function in _FUNCTIONS if not callable(getattr(module, function, None))]
    if missing:
        raise ValueError(f"config.study is {name!r}, which has no function {', '.join(missing)}; see jax_async_grpo/studies")
    if isinstance(sources, str) or not isinstance(sources, Sequence) or not all(isinstance(path, str) for path in sources):
        raise ValueError(f"config.sources is {sources!r}; it must be a tuple of folders")
    return module


def read_sources(config: Mapping[str, Any]) -> dict[str, Rows]:
    """{name of the folder: rows of its metrics.jsonl} of `config.sources`.

    Raises:
      ValueError: a folder holds no records, or damaged ones.
    """
    sources = {}
    for folder in config["sources"]:
        rows = records.read_jsonl(Path(folder) / "metrics.jsonl")
        if not rows:
            raise ValueError(f"config.sources has {folder!r}, which holds no records; run that study first")
        sources[Path(folder).name] = rows
    return sources


def finished_pieces(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{name: seconds it took, 0 where that is not kept} of the pieces whose records are complete."""
    return {row["piece"]: row.get("seconds", 0.0) for row in rows if row["kind"] == "piece"}


def run_pieces(
    names: Iterable[str],
    workdir: records.Workdir,
    on_piece: Callable[[str, float], None],
    measure: Callable[[str], Iterable[Mapping[str, Any]]],
) -> None:
    """Measures the pieces that metrics.jsonl lacks; the rows of a piece are written at once or, if it is killed, not at all.

    Args:
      names: of all pieces, in order.
      workdir: of the run.
      on_piece: called with (name, seconds) after each piece measured here.
      measure: name -> rows with `kind`; `piece` is added here, and the last row, which says that the piece is finished.
    """
    done = finished_pieces(workdir.read_metrics())
    for name in names:
        if name in done:
            continue
        start = time.perf_counter()
        rows = [{"kind": row["kind"], "piece": name, **row} for row in measure(name)]
        seconds = round(time.perf_counter() - start, 2)
        workdir.append_metrics([*rows, {"kind": "piece", "piece": name, "seconds": seconds}])
        on_piece(name, seconds)


def write_results(study: ModuleType, config: Mapping[str, Any], workdir: records.Workdir, page: os.PathLike) -> list[Path]:
    """Writes summary.json, the figures and the page of a finished study from its records alone.

    Args:
      study: of `load_study`.
      config: validated.
      workdir: holds the records and gets summary.json and the figures.
      page: file of the page, Markdown; its folder is made.

    Returns:
      The files written.

    Raises:
      ValueError: pieces are missing, or sources without records.
    """
    rows = workdir.read_metrics()
    done = finished_pieces(rows)
    missing = [name for name in study.pieces(config) if name not in done]
    if missing:
        raise ValueError(f"{workdir.path} lacks {len(missing)} of its pieces, the first is {missing[0]}; run it to the end")
    result = study.summary(rows, config, read_sources(config))
    workdir.write_summary({**result, "versions": records.versions()})
    drawn = study.figures(rows, result, workdir.path)
    page = Path(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(page, page_text(study, result, os.path.relpath(workdir.path, page.parent)))
    return [workdir.path / "summary.json", *drawn, page]


def page_text(study: ModuleType, summary: Mapping[str, Any], figures: str) -> str:
    """The page with its figures in the folder `figures`, relative to the page."""
    prefix = "" if figures == "." else Path(figures).as_posix() + "/"
    return study.page(summary).replace(f"]({_FIGURE_SCHEME}", f"]({prefix}").rstrip("\n") + "\n"


def save_figure(
    figure: Figure,
    folder: os.PathLike,
    name: str,
    *,
    formats: Sequence[str] = ("png", "svg"),
    outlines: bool = False,
) -> list[Path]:
    """Writes name.png and name.svg; the same figure gives the same bytes, so that they change with its numbers only.

    Args:
      figure: to be drawn.
      folder: where the files go.
      name: of the files, without suffix.
      formats: which of the two.
      outlines: letters of the SVG are shapes, so that formulas look the same in every viewer; else text, and smaller.
    """
    canvas, paths = FigureCanvasAgg(figure), [Path(folder) / f"{name}.{suffix}" for suffix in formats]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path" if outlines else "none"}):
        for path in paths:
            with records.atomic_path(path) as temporary:
                canvas.figure.savefig(temporary, format=path.suffix[1:], dpi=110, metadata=_UNDATED[path.suffix])
    return paths
