"""The figure of a sweep: how success is lost as the learning rate grows, and the learning rate at which it is, against S."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from jax_async_grpo.studies.contract import save_figure

__all__ = ["level_of", "sweep_figure", "whole_horizon"]

Line = Mapping[str, Any]

_ALGORITHM_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
_LAG_MARKERS, _ALGORITHM_MARKERS = "osD^vP", "*p<>hHd"
_WORDS = {"none": "v", "censored": "^", "ill-defined": "x"}
_STRIP = 0.085  # height of a line of the strip below the shares
_MAX_COLUMNS = 3
_DODGE = 0.09  # nats between algorithms that share an S


def level_of(line: Line) -> tuple[str, float]:
    """The key of a boundary's first level and the share it stands for, e.g. ("eta_80", 0.8)."""
    key = next(name for name in line if name.startswith("eta_"))
    return key, float(key.removeprefix("eta_")) / 100


def whole_horizon(boundaries: Sequence[Line]) -> list[Line]:
    """Of every (case, algorithm, schedule, S) the boundary at the longest horizon, in the order of the list."""
    longest: dict[tuple, Line] = {}
    for line in boundaries:
        key = tuple(line[name] for name in ("case", "algorithm", "schedule", "max_staleness"))
        if key not in longest or line["horizon"] > longest[key]["horizon"]:
            longest[key] = line
    return list(longest.values())


def sweep_figure(summary: Mapping[str, Any], path: str | os.PathLike) -> Figure:
    """Draws the boundaries of a sweep at its whole horizon, as PNG and as SVG beside it, atomically.

    For every case and schedule a panel per algorithm shows the share of successful runs against η, a color and marker per S; in
    the strip below it stands, per S, the fitted η with its interval, or the word that takes its place. One more panel has the
    fitted η against S; "none" stands at its lower edge, "censored" at its upper, "ill-defined" at both.

    Args:
      summary: of `sweep_summary.summary`.
      path: of the PNG; the SVG has the same name but for the suffix.

    Returns:
      The figure.

    Raises:
      ValueError: the summary has no boundary, or `path` does not end in .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path={path} must end in .png")
    lines = whole_horizon(summary["boundaries"])
    if not lines:
        raise ValueError("summary holds no boundary; there is nothing to draw")
    algorithms = list(dict.fromkeys(line["algorithm"] for line in lines))
    lags = sorted({line["max_staleness"] for line in lines})
    worlds = list(dict.fromkeys((line["case"], line["schedule"]) for line in lines))
    panels = [(world, algorithm) for world in worlds for algorithm in (*algorithms, None) if _chosen(lines, world, algorithm)]
    columns = 2 if len(panels) in (2, 4) else _MAX_COLUMNS
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9.6, 0.9 + (3.9, 3.4)[columns - 2] * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (world, algorithm) in zip(axes.flat, panels, strict=False):
        chosen = _chosen(lines, world, algorithm)
        if algorithm is None:
            _draw_boundaries(ax, chosen, algorithms)
        else:
            _draw_shares(ax, chosen, lags)
        named = ", ".join(filter(None, (world[0], world[1] if len({w[1] for w in worlds}) > 1 else "", algorithm)))
        ax.set_title(named, fontsize=9, loc="left")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.legend(handles=_handles(lags, algorithms), loc="outside lower center", ncols=6, fontsize=7.5, frameon=False)
    save_figure(figure, path.parent, path.stem, outlines=True)
    return figure


def _chosen(lines: Sequence[Line], world: tuple[str, str], algorithm: str | None) -> list[Line]:
    mine = [line for line in lines if (line["case"], line["schedule"]) == world]
    return sorted((line for line in mine if algorithm in (None, line["algorithm"])), key=lambda line: line["max_staleness"])


def _lag_style(lags: Sequence[int], lag: int) -> dict[str, Any]:
    index = lags.index(lag)
    color = colormaps["viridis"](0.8 * index / max(len(lags) - 1, 1))  # yellow is faint on white
    return dict(color=color, marker=_LAG_MARKERS[index % len(_LAG_MARKERS)], markersize=5)


def _algorithm_style(algorithms: Sequence[str], name: str) -> dict[str, Any]:
    index = algorithms.index(name)
    styles = dict(color=_ALGORITHM_COLORS, marker=_ALGORITHM_MARKERS)
    return {key: values[index % len(values)] for key, values in styles.items()} | dict(markersize=7)


def _rate_limits(lines: Sequence[Line]) -> tuple[float, float]:
    rates = [rate for line in lines for rate in line["learning_rates"]]
    return min(rates) / 1.6, max(rates) * 1.6


def _draw_shares(ax, lines: Sequence[Line], lags: Sequence[int]) -> None:
    low, high = _rate_limits(lines)
    key, level = level_of(lines[0])
    for index, line in enumerate(lines):
        style, height = _lag_style(lags, line["max_staleness"]), -0.1 - _STRIP * index
        ax.plot(line["learning_rates"], line["shares"], gid="shares", linewidth=1.1, markerfacecolor="none", **style)
        if line["status"] == "found":
            ax.plot(_within(line["interval"], low, high), [height] * 2, color=style["color"], linewidth=2, gid="interval")
            ax.plot(line[key], height, linestyle="none", gid="boundary", **style)
        else:
            place, side = {"none": (low * 1.1, "left"), "censored": (high / 1.1, "right")}.get(
                line["status"], (math.sqrt(low * high), "center")
            )
            ax.text(place, height, line["status"], color=style["color"], fontsize=7, ha=side, va="center")
    ax.axhline(level, color="0.5", linestyle=":", linewidth=1)
    ax.axhline(-0.04, color="0.6", linewidth=0.6)
    ax.set(xscale="log", xlim=(low, high), ylim=(-0.1 - _STRIP * (len(lines) - 0.4), 1.05), yticks=np.linspace(0, 1, 6))
    ax.set_xlabel(r"learning rate $\eta$", fontsize=8)
    ax.set_ylabel("share of successful runs", fontsize=8)
    _tidy(ax)


def _draw_boundaries(ax, lines: Sequence[Line], algorithms: Sequence[str]) -> None:
    low, high = _rate_limits(lines)
    key, _ = level_of(lines[0])
    for index, name in enumerate(algorithms):
        style, mine = _algorithm_style(algorithms, name), [line for line in lines if line["algorithm"] == name]
        # log(S+1) has a place for S = 0; algorithms stand side by side, in the same order everywhere
        shift = math.exp(_DODGE * (index - (len(algorithms) - 1) / 2))
        places = [(line["max_staleness"] + 1) * shift for line in mine]
        rates = [line[key] if line["status"] == "found" else math.nan for line in mine]  # a gap in the thin line
        ax.plot(places, rates, linewidth=0.6, gid="boundary", **style)
        for x, line in zip(places, mine, strict=True):
            if line["status"] == "found":
                ax.plot([x, x], _within(line["interval"], low, high), color=style["color"], linewidth=1.4, gid="interval")
            else:
                edges = {"none": [low * 1.12], "censored": [high / 1.12]}.get(line["status"], [low * 1.12, high / 1.12])
                mark = dict(color=style["color"], marker=_WORDS[line["status"]], markersize=6, markerfacecolor="none")
                ax.plot([x] * len(edges), edges, linestyle="none", gid=line["status"], **mark)
    lags = sorted({line["max_staleness"] for line in lines})
    ax.set(xscale="log", yscale="log", ylim=(low, high), xlim=(0.75, 1.33 * (lags[-1] + 1)))
    ax.set_xticks([lag + 1 for lag in lags], [str(lag) for lag in lags])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("largest staleness S (updates), spaced as log(S + 1)", fontsize=8)
    ax.set_ylabel(rf"$\eta_{{{key.removeprefix('eta_')}}}$ of success", fontsize=8)
    _tidy(ax)


def _within(interval: Sequence[float], low: float, high: float) -> list[float]:
    """The interval as far as the axis shows it: an open side ends at the edge."""
    return [min(max(float(end), low), high) for end in interval]


def _tidy(ax) -> None:
    ax.tick_params(labelsize=7.5)
    ax.grid(True, which="major", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)


def _handles(lags: Sequence[int], algorithms: Sequence[str]) -> list[Line2D]:
    gray = dict(color="0.35", linestyle="none", markersize=6, markerfacecolor="none")
    return [
        *(Line2D([], [], linestyle="-", label=f"S = {lag}", markerfacecolor="none", **_lag_style(lags, lag)) for lag in lags),
        *(Line2D([], [], linestyle="none", label=name, **_algorithm_style(algorithms, name)) for name in algorithms),
        *(Line2D([], [], marker=mark, label=word, **gray) for word, mark in _WORDS.items()),
    ]
