"""The audit's table, page and figures, recomputed from its records alone.

A line of the table is one loss × correction at the ranking point (S, η) of the config, ordered by relative bias; what the
oracle refused stands below with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from tabulate import tabulate

from jax_async_grpo.audit import finished_entries
from jax_async_grpo.html_report import Items, Page, Section, Table, Text, write_page
from jax_async_grpo.records import atomic_path, write_text

__all__ = [
    "LEGEND",
    "bias_variance_figure",
    "curves_figure",
    "lines",
    "markdown_table",
    "refused",
    "sections",
    "summary",
    "title",
    "write_report",
]

Row = Mapping[str, Any]

_COLUMNS = {
    "loss": "loss",
    "correction": "correction",
    "relative_bias": "relative bias",
    "cosine": "cosine",
    "sampling": "sampling",
    "denominator": "denominator",
    "statistics": "statistics",
    "cut": "cut off",
    "relative_slope": "slope at 0",
    "saturation": "law left at",
    "relative_std": "std",
}
_COLUMNS_OF_PANELS = 5
LEGEND = (
    "relative bias: ‖H(θ,φ) − H(θ,θ)‖/‖H(θ,θ)‖, exact · cosine: between the stale and the fresh gradient · sampling, "
    "denominator, statistics: share of the bias by the role in which the behavior policy is stale, 1 in sum · cut off: "
    "expected share of the tokens with an advantage that it does not reach · slope at 0: relative bias per unit of drift to "
    "first order, 'none' where there is no such law (reasons below) · law left at: the first drift of the curve at which the "
    "bias is off that law by half · std: of the gradient of one sampled batch, relative to ‖H(θ,θ)‖, exact"
)


def lines(rows: Sequence[Row], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table as dicts by ascending relative bias; entries without complete records are left out."""
    done = finished_entries(rows)
    curves = {row["entry"]: row for row in rows if row["kind"] == "curve"}
    staleness, rate = config["rank_at"]
    at = [
        row
        for row in rows
        if row["kind"] == "point" and (row["max_staleness"], row["learning_rate"]) == (staleness, rate) and row["entry"] in done
    ]
    return sorted((_line(row, curves[row["entry"]]) for row in at), key=lambda line: line["relative_bias"])


def _line(row: Row, curve: Row) -> dict[str, Any]:
    fresh = row["grad/fresh_norm"]
    slope = curve["first_order_coefficient"]
    return {
        "loss": row["loss"],
        "correction": row["correction"],
        "relative_bias": row["bias/relative_norm"],
        "cosine": row["bias/cosine"],
        **{role: row[f"share/{role}"] for role in ("sampling", "denominator", "statistics")},
        "cut": row["cut_fraction"],
        "relative_slope": None if slope is None else slope / fresh,
        "saturation": curve["saturation_drift"],
        "curve_end": curve["drift/from_behavior"][-1],
        "relative_std": math.sqrt(row["grad/variance"]) / fresh,
        "no_law": curve["no_law"],
    }


def refused(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Loss, correction and reason of what the closed form does not take, and its bias by brute force where summed."""
    kept = ("loss", "correction", "reason", "brute_force")
    return [{key: row[key] for key in kept if key in row} for row in rows if row["kind"] == "refused"]


def summary(rows: Sequence[Row], config: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json holds: the table, the refusals, the largest bias of a control and the versions."""
    controls = [row["bias/norm"] for row in rows if row["kind"] == "point" and row["max_staleness"] == 0]
    return {
        "ranked_at": dict(zip(("max_staleness", "learning_rate"), config["rank_at"], strict=True)),
        "table": lines(rows, config),
        "refused": refused(rows),
        "control_bias": max(controls, default=None),
        "versions": dict(versions),
    }


def markdown_table(table: Sequence[Row], *, limit: int | None = None) -> str:
    """The lines of `lines` as a GitHub table, the first `limit` of them."""
    return tabulate([_cells(line) for line in table[:limit]], list(_COLUMNS.values()), tablefmt="github", disable_numparse=True)


def sections(table: Sequence[Row], refusals: Sequence[Row]) -> list[Section]:
    """The whole table, what its columns mean and what is not in it, as sections of a page."""
    legend = Items([tuple(column.split(": ", 1)) for column in LEGEND.split(" · ")])
    ranked = Table(list(_COLUMNS.values()), [_cells(line) for line in table]) if table else Text("None is finished yet.")
    below = [Section(heading, [Items(notes)]) for heading, notes in _notes(table, refusals)]
    return [Section("Every loss and correction", [ranked]), Section("Columns", [legend]), *below]


def title(result: Mapping[str, Any]) -> str:
    """What the audit is called, from its summary."""
    at = result["ranked_at"]
    return f"Staleness bias of policy losses at S = {at['max_staleness']}, η = {at['learning_rate']:g}"


def write_report(rows: Sequence[Row], result: Mapping[str, Any], folder: os.PathLike) -> list[str]:
    """Writes audit.md, audit.html and, once an entry is finished, the two figures; returns the names of the files."""
    table, refusals = result["table"], result["refused"]
    text = [f"# {title(result)}", "", LEGEND, "", markdown_table(table), ""]
    for heading, notes in _notes(table, refusals):
        text += [f"{heading}:", "", *(f"- `{name}`: {note}" for name, note in notes), ""]
    write_text(os.path.join(folder, "audit.md"), "\n".join(text))
    page = Page(title(result), "Exact, ordered by relative bias.", sections(table, refusals))
    write_page(page, os.path.join(folder, "audit.html"))
    if not table:
        return ["audit.md", "audit.html"]
    bias_variance_figure(table, os.path.join(folder, "bias_variance.png"))
    curves_figure(rows, os.path.join(folder, "curves.png"))
    return ["audit.md", "audit.html", "bias_variance.png", "curves.png"]


def _notes(table: Sequence[Row], refusals: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What stands below the table: (heading, [(entry, note)]), those without notes left out."""
    lawless = [(f"{line['loss']}/{line['correction']}", line["no_law"]) for line in table if line["no_law"]]
    refused_ones = [(f"{row['loss']}/{row['correction']}", _refusal(row)) for row in refusals]
    headed = [("Without a first-order law", lawless), ("Not measured by the closed form", refused_ones)]
    return [(heading, notes) for heading, notes in headed if notes]


def _refusal(row: Row) -> str:
    summed = row.get("brute_force")
    if not summed:
        return row["reason"]
    return (
        f"{row['reason']}. Over all groups of {summed['group_size']}, one at a time: relative bias "
        f"{summed['relative_bias']:.4f}, of the reference loss {summed['reference_relative_bias']:.4f}"
    )


def _cells(line: Row) -> list[str]:
    return [_shown(key, line) for key in _COLUMNS]


def _shown(key: str, line: Row) -> str:
    value = line[key]
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if key == "saturation":
        return f"> {line['curve_end']:.2g}" if math.isinf(value) else f"{value:.2g}"
    return f"{value:.4f}" if key in ("relative_bias", "cosine") else f"{value:.2f}"


def bias_variance_figure(table: Sequence[Row], path: str | os.PathLike) -> Figure:
    """Relative bias against the scatter of a sampled gradient, a point per line: what staleness costs and what its cure does.

    Color is the correction; losses are named where they stand alone. Lower left is better.

    Raises:
      ValueError: no line has a positive bias.
    """
    drawn = [line for line in table if line["relative_bias"] > 0 and line["relative_std"] > 0]
    if not drawn:
        raise ValueError("no line of the table has a positive bias and spread to draw")
    names = _ordered(line["correction"] for line in drawn)
    figure = Figure(figsize=(9, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for name in names:
        mine = [line for line in drawn if line["correction"] == name]
        x, y = ([line[key] for line in mine] for key in ("relative_std", "relative_bias"))
        alone = name == "none"
        ax.scatter(
            x, y, s=34 if alone else 16, color=_color(name, names), label="alone" if alone else name, zorder=3 if alone else 2
        )
    ax.set(yscale="log", xlabel=r"scatter of one sampled gradient, $\sqrt{E\Vert\hat g-H\Vert^2}/\Vert H(\theta,\theta)\Vert$")
    ax.set_ylabel(r"relative staleness bias $\Vert\delta\Vert/\Vert H(\theta,\theta)\Vert$")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    ax.grid(True, which="major", color="0.92")
    ax.set_axisbelow(True)
    left, right = ax.get_xlim()
    ax.set_xlim(left, right + 0.3 * (right - left))
    _name_points(ax, [line for line in drawn if line["correction"] == "none"])
    figure.legend(loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return figure


def _name_points(ax, table: Sequence[Row]) -> None:
    """The losses' names in a column at the right, each as high as its point as far as none lies on another."""
    ordered = sorted(table, key=lambda line: line["relative_bias"])
    low, high = np.log(ax.get_ylim())
    wanted = [(math.log(line["relative_bias"]) - low) / (high - low) for line in ordered]
    gap, heights = 0.034, []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    for index in reversed(range(len(heights))):
        ceiling = heights[index + 1] - gap if index + 1 < len(heights) else 0.98
        heights[index] = min(heights[index], ceiling)
    for line, height in zip(ordered, heights, strict=True):
        ax.annotate(
            line["loss"],
            (line["relative_std"], line["relative_bias"]),
            xytext=(0.86, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            arrowprops=dict(arrowstyle="-", color="0.75", linewidth=0.5),
        )


def _ordered(names: Iterable[str]) -> list[str]:
    """Each name once, "none" first: the order of the colors in every figure."""
    return sorted(set(names), key=lambda name: (name != "none", name))


def _color(name: str, names: Sequence[str]):
    return "black" if name == "none" else colormaps["tab10"]((names.index(name) - 1) % 10)


def curves_figure(rows: Sequence[Row], path: str | os.PathLike) -> Figure:
    """δ against drift, a small panel per loss: the loss alone in black, beside its corrections; dotted its first-order law.

    Raises:
      ValueError: there is no curve.
    """
    curves = [row for row in rows if row["kind"] == "curve"]
    if not curves:
        raise ValueError("there is no finished entry to draw")
    losses = list(dict.fromkeys(row["loss"] for row in curves))
    names = _ordered(row["correction"] for row in curves)
    columns = min(_COLUMNS_OF_PANELS, len(losses))
    lines_of_panels = -(-len(losses) // columns)
    figure = Figure(figsize=(max(2.3 * columns, 6.0) + 0.4, 2.0 * lines_of_panels + 0.9), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines_of_panels, columns, squeeze=False, sharex=True, sharey=True)
    for ax, loss in zip(axes.flat, losses, strict=False):
        _draw_curves(ax, [row for row in curves if row["loss"] == loss], names)
        ax.set_title(loss, fontsize=8, loc="left")
    for ax in axes.flat[len(losses) :]:
        ax.remove()
    for index, ax in enumerate(figure.axes):
        if index % columns == 0:
            ax.set_ylabel("relative bias", fontsize=7)
        if index + columns >= len(losses):
            ax.set_xlabel(r"drift $\Vert\theta-\varphi\Vert$", fontsize=7)
            ax.tick_params(labelbottom=True)
    handles = {line.get_label(): line for ax in figure.axes for line in ax.get_lines() if not line.get_label().startswith("_")}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, 2 * columns + 1), fontsize=7, frameon=False
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return figure


def _draw_curves(ax, curves: Sequence[Row], names: Sequence[str]) -> None:
    for row in curves:
        alone = row["correction"] == "none"
        x, y = np.array(row["drift/from_behavior"]), np.array(row["bias/relative_norm"])
        ax.plot(
            x,
            y,
            color=_color(row["correction"], names),
            linewidth=1.6 if alone else 0.9,
            label="alone" if alone else row["correction"],
            zorder=3 if alone else 2,
        )
        if alone and row["first_order_coefficient"] is not None:
            law = row["first_order_coefficient"] * x * (y[0] / row["bias/norm"][0])
            ax.plot(x, law, color="0.5", linestyle=":", linewidth=1.0, label="first-order law", zorder=1)
    ax.set(xscale="log", yscale="log", ylim=(1e-3, 1e1))
    ax.tick_params(labelsize=6)
    ax.grid(True, which="major", color="0.92")
