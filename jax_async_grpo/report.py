"""Tables and figures, recomputed from records alone: rows of metrics.jsonl and the fits of summary.json.

A *row* is one cell of the grid: `policy`, `task`, `optimizer`, `loss`, `schedule`, `updates` ("exact" | "sampled"),
`max_staleness`, `learning_rate`, `seed`, `staleness_rms` (realised, updates), `bias_rms`, `relative_bias_rms`, `drift_rms`,
`in_window` (it entered the fit). A *fit* is named by the same first six keys and holds `staleness_exponent`,
`learning_rate_exponent`, `exponent`, `intervals` ({name of the exponent: [low, high]}), `r_squared`, `num_cells`,
`staleness_range` ([smallest, largest] S of its cells, which `staleness_exponent` depends on where the curve bends) and
`variable`, what `exponent` belongs to: "staleness_x_learning_rate" (the default) or "drift"; a `schedule` of "all" means a fit
over every schedule. Values of a fit may be missing or None.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jax_async_grpo.records import atomic_path

__all__ = ["bias_figure", "fits_table"]

Row = Mapping[str, Any]
Fit = Mapping[str, Any]

_PANEL_KEYS = ("policy", "task", "optimizer", "loss", "updates")
_FIT_KEYS = ("policy", "task", "optimizer", "loss", "schedule", "updates")
_PRODUCT = "staleness_x_learning_rate"
_X_LABELS = {
    _PRODUCT: r"rms staleness × learning rate, $S_\mathrm{rms}\,\eta$",
    "drift": r"drift, rms $\Vert\theta-\varphi\Vert$",
}
_Y_LABELS = {
    "bias_rms": r"staleness bias, rms $\Vert\delta\Vert$",
    "relative_bias_rms": r"relative bias, rms $\Vert\delta\Vert/\Vert H\Vert$",
}
_MARKERS = "o^sDvP"
_DASHES = (0, (4, 3))
_MAX_COLUMNS = 3  # panels side by side; a fourth would be too narrow to read
_LEGEND_LINES = 3
_MAX_LEGEND_RATES = 9


def bias_figure(
    rows: Sequence[Row],
    fits: Sequence[Fit],
    path: str | os.PathLike,
    *,
    relative: bool = False,
    width: int = 1200,
) -> Figure:
    """Draws the staleness bias against S_rms·η, or drift, in logarithms and saves it as a PNG, atomically.

    One panel per policy, task, optimizer, loss and kind of updates, and per variable that was fitted there. Color is the
    learning rate, the marker the schedule; filled cells lie in the declared window and entered the fit, hollow ones did not.
    The black line is the fit, solid over its cells and dashed beyond, where saturation bends the data away from it; the dotted
    gray line has slope 1. A least-squares line passes through the mean of its points: of the fit only the exponent is needed.

    Args:
      rows, fits: see the module. Cells whose coordinates are not finite and > 0 (S = 0 has no bias) are counted, not drawn.
      path: of the PNG.
      relative: draw `relative_bias_rms` instead of `bias_rms`; for fits of that column.
      width: pixels, at least 600.

    Returns:
      The figure.

    Raises:
      ValueError: no row can be drawn, or `width` is too small.
    """
    if width < 600:
        raise ValueError(f"width={width} must be at least 600 pixels")
    y_key = "relative_bias_rms" if relative else "bias_rms"
    drawn = [row for row in rows if _point(row, _PRODUCT, y_key)]
    if not drawn:
        raise ValueError(f"rows holds {len(rows)} cell(s), none with staleness_rms * learning_rate > 0 and {y_key} > 0")
    panels = _panels(drawn, fits, y_key)
    lines = _panel_lines(panels)
    columns = max(map(len, lines))
    figure = Figure(figsize=(8, 1.2 + (4.0, 3.4, 2.9)[columns - 1] * len(lines)), dpi=width / 8, layout="constrained")
    FigureCanvasAgg(figure)
    styles = _Styles(drawn)
    for axes, line in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for ax, panel in zip(axes, line, strict=False):
            _draw_panel(ax, panel, y_key, styles)
            ax.set_title(_panel_title(panel, panels), fontsize=7, loc="left", linespacing=1.4)
        for ax in axes[len(line) :]:
            ax.remove()
    figure.suptitle(_figure_title(panels, len(rows) - len(drawn)), fontsize=9, x=0.01, ha="left")
    figure.legend(handles=styles.handles(), loc="outside lower center", ncols=styles.num_columns, fontsize=7.5, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return figure


class _Panel(NamedTuple):
    """What one pair of axes shows: the cells of a setting that have a place there, against one variable."""

    name: tuple[str, ...]
    variable: str
    rows: list[Row]
    fits: list[Fit]

    def points(self, y_key: str, rows: Sequence[Row] | None = None) -> np.ndarray:
        """[n, 2] coordinates of these rows, or all."""
        return np.array([_point(row, self.variable, y_key) for row in (self.rows if rows is None else rows)])


class _Styles:
    """The color of a learning rate and the marker of a schedule, the same in every panel and in the legend."""

    def __init__(self, rows: Sequence[Row]):
        self.rates = sorted({float(f"{row['learning_rate']:.6g}") for row in rows})  # 0.1 * 0.1 and 0.01 are one rate
        self.schedules = sorted({row["schedule"] for row in rows})
        self._norm = LogNorm(self.rates[0], self.rates[-1] * 1.0001)  # a single rate is a norm too
        self._map = colormaps["viridis"]

    def color(self, learning_rate: float):
        return self._map(0.92 * float(self._norm(learning_rate)))  # the last yellow is faint on white

    def marker(self, schedule: str) -> str:
        return _MARKERS[self.schedules.index(schedule) % len(_MARKERS)]

    def groups(self) -> list[list[Line2D]]:
        """Legend entries: learning rates, schedules, markers, lines."""
        step = -(-len(self.rates) // _MAX_LEGEND_RATES)
        gray = dict(color="0.35", linestyle="none", markersize=5)
        return [
            [Line2D([], [], color=self.color(r), linestyle="none", marker="o", label=f"η = {r:g}") for r in self.rates[::step]],
            [Line2D([], [], marker=self.marker(s), label=f"{s} schedule", **gray) for s in self.schedules],
            [
                Line2D([], [], marker="o", label="in the window", **gray),
                Line2D([], [], marker="o", markerfacecolor="none", label="outside", **gray),
            ],
            [
                Line2D([], [], color="black", label="fit"),
                Line2D([], [], color="black", linestyle=_DASHES, label="fit, continued"),
                Line2D([], [], color="0.5", linestyle=":", label="slope 1"),
            ],
        ]

    def handles(self) -> list[Line2D]:
        """The groups, each filled up to whole legend columns."""
        blank = Line2D([], [], linestyle="none", label=" ")
        return [entry for group in self.groups() for entry in [*group, *[blank] * (-len(group) % _LEGEND_LINES)]]

    @property
    def num_columns(self) -> int:
        return len(self.handles()) // _LEGEND_LINES


def _draw_panel(ax, panel: _Panel, y_key: str, styles: _Styles) -> None:
    for schedule in styles.schedules:
        for inside in (False, True):
            rows = [row for row in panel.rows if row["schedule"] == schedule and bool(row["in_window"]) == inside]
            if rows:
                colors = [styles.color(row["learning_rate"]) for row in rows]
                style = dict(s=15, marker=styles.marker(schedule), linewidths=0.8, zorder=3 if inside else 2)
                marks = ax.scatter(*panel.points(y_key, rows).T, **style)
                marks.set(edgecolor=colors, facecolor=colors if inside else "none", gid="inside" if inside else "outside")
    ax.set(xscale="log", yscale="log")
    extent = panel.points(y_key)[:, 0]
    inside = [row for row in panel.rows if row["in_window"]]
    for fit in panel.fits:
        fitted = [row for row in inside if fit.get("schedule") in (row["schedule"], "all", None)]
        if fitted and fit.get("exponent") is not None:
            _draw_line(ax, panel.points(y_key, fitted), float(fit["exponent"]), (extent.min(), extent.max()))
    _draw_guide(ax, panel.points(y_key, inside or panel.rows))
    ax.set_xlabel(_X_LABELS[panel.variable], fontsize=8)
    ax.set_ylabel(_Y_LABELS[y_key], fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _draw_line(ax, points: np.ndarray, exponent: float, extent: tuple[float, float]) -> None:
    """The least-squares line through the mean of log points, solid over them and dashed over the rest of the panel."""
    center_x, center_y = np.exp(np.log(points).mean(axis=0))
    solid = np.array([points[:, 0].min(), points[:, 0].max()])
    for x, style, gid in [(np.array(extent), _DASHES, "fit continued"), (solid, "-", "fit")]:
        ax.plot(x, center_y * (x / center_x) ** exponent, color="black", linestyle=style, linewidth=1.0, zorder=4, gid=gid)


def _draw_guide(ax, points: np.ndarray) -> None:
    """Slope 1, a factor 2.5 below the lowest cell so that it does not hide under the fit."""
    low, high = points[:, 0].min(), points[:, 0].max()
    level = (points[:, 1] / points[:, 0]).min() / 2.5
    ax.plot([low, high], [level * low, level * high], color="0.5", linestyle=":", linewidth=1.0, zorder=1, gid="slope 1")


def _point(row: Row, variable: str, y_key: str) -> tuple[float, float] | None:
    """(x, y) of a cell, None where it has no place on logarithmic axes."""
    if variable == "drift":
        x = _number(row.get("drift_rms"))
    else:
        x = _number(row.get("staleness_rms")) * _number(row.get("learning_rate"))
    y = _number(row.get(y_key))
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _number(value) -> float:
    return math.nan if value is None else float(value)


def _name(record: Row, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(record.get(key)) for key in keys)


def _panels(rows: Sequence[Row], fits: Sequence[Fit], y_key: str) -> list[_Panel]:
    """In the order of the rows; a variable that none of them has gets no panel."""
    panels = []
    for name in dict.fromkeys(_name(row, _PANEL_KEYS) for row in rows):
        own = [fit for fit in fits if _name(fit, _PANEL_KEYS) == name]
        for variable in dict.fromkeys(fit.get("variable") or _PRODUCT for fit in own) or [_PRODUCT]:
            members = [row for row in rows if _name(row, _PANEL_KEYS) == name and _point(row, variable, y_key)]
            if members:
                panels.append(_Panel(name, variable, members, [f for f in own if (f.get("variable") or _PRODUCT) == variable]))
    return panels


def _panel_lines(panels: Sequence[_Panel]) -> list[Sequence[_Panel]]:
    """The panels in lines of at most three, exact updates before sampled ones."""
    ordered = sorted(panels, key=lambda panel: panel.name[_PANEL_KEYS.index("updates")])
    return [ordered[start : start + _MAX_COLUMNS] for start in range(0, len(ordered), _MAX_COLUMNS)]


def _panel_title(panel: _Panel, panels: Sequence[_Panel]) -> str:
    """The policy and what else differs between panels; then a line for every fit, or every exponent of the only one."""
    words = [
        f"{word} updates" if key == "updates" else word
        for index, (key, word) in enumerate(zip(_PANEL_KEYS, panel.name, strict=True))
        if any(other.name[index] != word for other in panels)
    ]
    lines = textwrap.wrap(", ".join(words) or panel.name[0], 40)
    if len(panel.fits) == 1:
        fit = panel.fits[0]
        exponents = {"slope": "exponent", "in S": "staleness_exponent", "in η": "learning_rate_exponent"}
        known = {word: key for word, key in exponents.items() if fit.get(key) is not None}
        said = {word: f"{word} {_with_interval(fit, key)}" for word, key in known.items()}
        if "in S" in said and fit.get("staleness_range"):
            said["in S"] += " for S = {}..{}".format(*fit["staleness_range"])
        return "\n".join([*lines, *said.values()])
    return "\n".join(lines + [f"{fit.get('schedule')}: slope {_with_interval(fit, 'exponent')}" for fit in panel.fits])


def _figure_title(panels: Sequence[_Panel], num_hidden: int) -> str:
    """What all panels share."""
    words = ["Staleness bias of the GRPO gradient"]
    for index, key in enumerate(_PANEL_KEYS):
        values = {panel.name[index] for panel in panels}
        if len(values) == 1 and (key != "policy" or len(panels) > 1):  # a single panel is titled with its policy
            words.append(f"{values.pop()} updates" if key == "updates" else f"{key} {values.pop()}")
    hidden = [f"({num_hidden} cell(s) with no bias or one that is not finite are not drawn)"] if num_hidden else []
    return "\n".join(textwrap.wrap(", ".join(words), 100) + hidden)


def _with_interval(fit: Fit, key: str) -> str:
    value, interval = fit.get(key), (fit.get("intervals") or {}).get(key)
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else "")


def fits_table(fits: Sequence[Fit], *, width: int = 100) -> str:
    """The fits as plain ASCII text, at most `width` columns wide.

    What all fits share stands once above the table. A table that is too wide is split by policy, then by task and so on, and
    where even the numbers alone are too wide, every fit becomes a short paragraph.

    Args:
      fits: see the module.
      width: columns; 24 at least are used.
    """
    return "\n".join(_table_lines(fits, max(width, 24), said=())) if fits else "no fits"


def _table_lines(fits, width: int, said: tuple[str, ...]) -> list[str]:
    names = {key: [str(fit.get(key)) for fit in fits] for key in _FIT_KEYS}
    names["in"] = ["drift" if fit.get("variable") == "drift" else "S*eta" for fit in fits]
    shared = {key: values[0] for key, values in names.items() if len(set(values)) == 1 and key not in said}
    varying = {key: values for key, values in names.items() if len(set(values)) > 1}
    words = (f"{'exponent in' if key == 'in' else key} {value}" for key, value in shared.items())
    heading = textwrap.wrap(", ".join(words), width)
    columns = varying | {
        "exponent": [_with_interval(fit, "exponent") for fit in fits],
        "a_S": [_with_interval(fit, "staleness_exponent") for fit in fits],
        "a_eta": [_with_interval(fit, "learning_rate_exponent") for fit in fits],
        "R^2": [f"{fit['r_squared']:.4f}" if fit.get("r_squared") is not None else "-" for fit in fits],
        "cells": [str(fit.get("num_cells", "-")) for fit in fits],
        "S": ["{}..{}".format(*fit["staleness_range"]) if fit.get("staleness_range") else "-" for fit in fits],
    }
    table = _aligned(columns)
    if max(map(len, table)) <= width:
        return heading + table
    if not varying:
        return heading + _paragraphs(columns, width)
    key, values = next(iter(varying.items()))
    for value in dict.fromkeys(values):
        group = [fit for fit, own in zip(fits, values, strict=True) if own == value]
        heading += ["", *_table_lines(group, width, (*said, *shared))]
    return heading


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    widths = [max(len(head), *map(len, cells)) for head, cells in columns.items()]
    table = [list(columns), ["-" * size for size in widths], *zip(*columns.values(), strict=True)]
    return ["  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in table]


def _paragraphs(columns: Mapping[str, Sequence[str]], width: int) -> list[str]:
    lines = []
    for cells in zip(*columns.values(), strict=True):
        words = ", ".join(f"{head} {cell}" for head, cell in zip(columns, cells, strict=True) if cell != "-")
        lines += textwrap.wrap(words, width, subsequent_indent="  ")
    return lines
