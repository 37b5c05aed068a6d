"""What the records of the study of the horizon law say: summary, page and figures, from rows alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from jax_async_grpo.scaling import fit_power_law, in_window
from jax_async_grpo.studies.contract import save_figure
from jax_async_grpo.studies.page_parts import markdown_table

__all__ = ["figures", "interval_text", "page", "signed", "summary", "synchronous_constants"]

_RULES = {"first": "t_c", "second": "t_c_second_rule"}
_MARKERS = {"fixed": "o", "periodic": "s", "random": "^"}

Row = Mapping[str, Any]


def summary(rows: Sequence[Row], config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """All numbers of the page: t_c·η inside the window, its first-order correction, where the law ends, what comes then.

    Args:
      rows: of the study's metrics.jsonl.
      config: of the study; its window and tolerances.
      sources: unused, the study reads no other.

    Returns:
      A dict of plain numbers, strings and lists.
    """
    del sources
    cells = _cells(rows)
    groups = [(loss, schedule, rule) for loss in config["losses"] for schedule in config["schedules"] for rule in _RULES]
    parts = {key: [c for c in cells if (c["loss"], c["schedule"]) == key[:2]] for key in groups}
    fits = [_inside(parts[key], *key, config) for key in groups]
    by_loss = [
        _inside([c for c in cells if c["loss"] == loss], loss, "all", rule, config)
        for loss in config["losses"]
        for rule in _RULES
    ]
    result = {
        "fits": fits,
        "pooled": by_loss,
        "ends": [_end(parts[key], *key, config) for key in groups if key[2] == "first"],
        "beyond": [_beyond(parts[key], *key, config) for key in groups if key[2] == "first"],
        "shown": [_shown(cells, loss, config) for loss in config["losses"]],
        **{key: config[key] for key in ("window", "tolerance", "end_deviation", "rule", "group_size", "time")},
        **{key: config[key] for key in ("spacing", "shown_learning_rate", "confidence")},
        **{key: list(config[key]) for key in ("max_staleness", "learning_rates", "schedules", "losses")},
        "beyond_window": list(config["beyond"]),
        "start_reward": cells[0]["start_reward"],
        "seconds": sum(row["seconds"] for row in rows if row["kind"] == "piece"),
    }
    return result | {"checks": _checks(fits, config)}


def _cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record a (loss, schedule, η, S)."""
    listed = ("max_staleness", "mean_staleness", "outcome", "resolution", "peak", "end", "step", *_RULES.values())
    return [
        {key: row[key] for key in ("loss", "schedule", "learning_rate", "start_reward", "horizon")}
        | {key: row[key][i] for key in listed}
        for row in rows
        if row["kind"] == "cells"
        for i in range(len(row["max_staleness"]))
    ]


def synchronous_constants(rows: Sequence[Row]) -> dict[str, float]:
    """{loss: t_c·η of the run without lag at the smallest learning rate, first rule} of the study's rows."""
    cells = _cells(rows)
    return {
        loss: _reference([cell for cell in cells if cell["loss"] == loss], "first")
        for loss in dict.fromkeys(cell["loss"] for cell in cells)
    }


def _inside(cells: Sequence[Row], loss: str, schedule: str, rule: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """t_c·η over the cells inside the window: spread, exponents, and the correction to first order in lag and step."""
    rates = np.array([cell["learning_rate"] for cell in cells])
    lags = np.array([cell["max_staleness"] for cell in cells])
    window = config["window"]
    inside = in_window(lags * rates, (0.0, window["staleness_x_learning_rate"])) & in_window(
        rates, (0.0, window["learning_rate"])
    )
    kept = [cell for cell, keep in zip(cells, inside, strict=True) if keep]
    times = [cell[_RULES[rule]] for cell in kept]
    result = {"loss": loss, "schedule": schedule, "rule": rule, "num_cells": len(kept)}
    result |= {"num_not_collapsed": sum(t is None for t in times)}
    if result["num_not_collapsed"]:
        return result
    rates, lags = rates[inside], lags[inside]
    product = np.array(times) * rates
    lagged = lags > 0
    options = dict(num_bootstrap=config["num_bootstrap"], confidence=config["confidence"])
    fit = fit_power_law(np.column_stack([lags, rates])[lagged], product[lagged], **options)
    mean_lag = np.array([cell["mean_staleness"] for cell in kept])
    design = np.column_stack([np.ones(len(kept)), mean_lag * rates, rates])
    constant, by_lag, by_step = np.linalg.lstsq(design, product, rcond=None)[0]
    left = product - design @ [constant, by_lag, by_step]
    return result | {
        "mean": float(product.mean()),
        "variation": float(product.std(ddof=1) / product.mean()),
        "smallest": float(product.min()),
        "largest": float(product.max()),
        "staleness_exponent": float(fit.exponents[0]),
        "staleness_interval": fit.intervals[0].tolist(),
        "learning_rate_exponent": float(fit.exponents[1]),
        "learning_rate_interval": fit.intervals[1].tolist(),
        "resolution": max(_resolution(cell) for cell in kept),
        "coarsest_rate": max(rates.tolist()),
        "resolution_without_single_updates": max((_resolution(c) for c in kept if c["resolution"] > 1), default=0.0),
        "constant": float(constant),
        "per_mean_staleness": float(by_lag / constant),
        "per_learning_rate": float(by_step / constant),
        "correction_error": float(np.sqrt(np.mean(left**2)) / constant),
    }


def _resolution(cell: Row) -> float:
    """Distance of the measured rewards around t_c, as a share of it."""
    return cell["resolution"] / cell["t_c"]


def _reference(cells: Sequence[Row], rule: str) -> float:
    """t_c·η of the run without lag at the smallest learning rate; NaN where it did not collapse."""
    first = min((cell for cell in cells if cell["max_staleness"] == 0), key=lambda cell: cell["learning_rate"])
    return math.nan if first[_RULES[rule]] is None else first[_RULES[rule]] * first["learning_rate"]


def _end(cells: Sequence[Row], loss: str, schedule: str, rule: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest S·η at which t_c is off that of S = 0 at the same η, and the largest one below it; η inside the window."""
    key, points = _RULES[rule], []
    controls = {cell["learning_rate"]: cell[key] for cell in cells if cell["max_staleness"] == 0}
    for cell in cells:
        rate, control = cell["learning_rate"], controls[cell["learning_rate"]]
        if cell["max_staleness"] and control is not None and in_window([rate], (0.0, config["window"]["learning_rate"]))[0]:
            points.append((cell["max_staleness"] * rate, math.inf if cell[key] is None else cell[key] / control))
    points.sort()
    off = next((i for i, (_, ratio) in enumerate(points) if not abs(ratio - 1) <= config["end_deviation"]), len(points))
    result = {"loss": loss, "schedule": schedule, "reference": _reference(cells, rule)}
    result |= dict(zip(("first_off", "ratio"), points[off] if off < len(points) else (None, None), strict=True))
    return result | {"last_on": points[off - 1][0] if off else None}


def _beyond(cells: Sequence[Row], loss: str, schedule: str, rule: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """How t_c·η goes with S and η where S·η is large, of the runs that collapse, and how many do not; η inside the window."""
    rates = np.array([cell["learning_rate"] for cell in cells])
    products = rates * [cell["max_staleness"] for cell in cells]
    kept = in_window(products, config["beyond"]) & in_window(rates, (0.0, config["window"]["learning_rate"]))
    far = [cell for cell, keep in zip(cells, kept, strict=True) if keep]
    fell = [cell for cell in far if cell[_RULES[rule]] is not None]
    result = {"loss": loss, "schedule": schedule, "num_cells": len(far), "num_collapsed": len(fell)}
    result |= {"outcomes": dict(Counter(cell["outcome"] for cell in far)), "staleness_exponent": None}
    try:
        fit = fit_power_law(
            [(cell["max_staleness"], cell["learning_rate"]) for cell in fell],
            [cell[_RULES[rule]] * cell["learning_rate"] for cell in fell],
            num_bootstrap=config["num_bootstrap"],
            confidence=config["confidence"],
        )
    except ValueError:  # too few cells, or all at one S
        return result
    per_cycle = [cell[_RULES[rule]] / (cell["max_staleness"] + 1) for cell in fell]
    return result | {
        "staleness_exponent": float(fit.exponents[0]),
        "staleness_interval": fit.intervals[0].tolist(),
        "learning_rate_exponent": float(fit.exponents[1]),
        "learning_rate_interval": fit.intervals[1].tolist(),
        "cycles": [min(per_cycle), float(np.median(per_cycle)), max(per_cycle)],
    }


def _shown(cells: Sequence[Row], loss: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """t_c·η, peak and fate over S at the shown learning rate, first schedule."""
    keys = ("max_staleness", "outcome", "peak", "end", "t_c", "t_c_second_rule")
    rate, schedule = config["shown_learning_rate"], config["schedules"][0]
    kept = [c for c in cells if (c["loss"], c["schedule"], c["learning_rate"]) == (loss, schedule, rate)]
    return {"loss": loss, "schedule": schedule, "learning_rate": rate, "rows": [{key: c[key] for key in keys} for c in kept]}


def _checks(fits: Sequence[Row], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{what, measured, allowed, holds, at}]: the worst of every kind and loss; inf where a run did not collapse."""
    tolerance, checks = config["tolerance"], []
    for loss in config["losses"]:
        part = [fit for fit in fits if fit["loss"] == loss]
        for what, key in _CHECKS.items():
            values = [abs(fit.get(_MEASURED[key], math.inf)) for fit in part]
            worst = int(np.argmax(values))
            checks.append(
                {
                    "loss": loss,
                    "what": what,
                    "measured": values[worst],
                    "at": f"{part[worst]['schedule']} lag, {part[worst]['rule']} rule",
                    "allowed": tolerance[key],
                    "holds": values[worst] <= tolerance[key],
                }
            )
    return checks


_CHECKS = {
    "coefficient of variation of t_c·η": "variation",
    "exponent of t_c·η in S, absolute": "staleness_exponent",
    "distance of measured rewards at t_c, where it is more than one update": "resolution",
}
_MEASURED = {
    "variation": "variation",
    "staleness_exponent": "staleness_exponent",
    "resolution": "resolution_without_single_updates",
}


def page(summary: Mapping[str, Any]) -> str:
    """docs/laws/horizon.md: what was asked, the rule, what was found."""
    window, rule, failed = summary["window"], summary["rule"], [c for c in summary["checks"] if not c["holds"]]
    verdict = (
        "All of them hold, for every loss, schedule and both rules."
        if not failed
        else "Not held: " + "; ".join(f"{c['what']} of `{c['loss']}` ({c['measured']:.3g}, {c['at']})" for c in failed) + "."
    )
    edge, largest = window["staleness_x_learning_rate"], window["learning_rate"]
    parts = [
        "# The horizon law: over-optimization comes at a fixed t·η",
        "Generated by `launch.study` from docs/laws/records/horizon. configs/study_horizon.py holds the window, the rules and "
        "the tolerances, set before the run; its grid was chosen after a look at some cells of the same system, which has no "
        "seeds to hold out.",
        "**Question.** arXiv 2607.01083 reports that collapse comes at t_c·η ≈ constant whatever the staleness S. Where does "
        "that hold, and where does it end? Here in the smallest system that is first improved and then ruined by learning: a "
        "bandit of four actions learns from a proxy reward (0, 0, ½, 1) and is judged by a gold one (0, 0, 1, 0). The gold "
        f"reward starts at {summary['start_reward']:.2f}, rises while the third action displaces the first two, and falls for "
        f"good when the fourth displaces it. Updates are exact (float64, groups of {summary['group_size']}, plain gradient "
        "ascent): no noise, no seeds.",
        f"**Rule.** t_c is where the gold reward falls below {rule['keep']:g} of its peak (first rule) or loses "
        f"{1 - rule['give_back']:.0%} of what it had gained (second rule) and stays there to the end, at η·t = "
        f"{summary['time']:g}. Rewards are measured every {summary['spacing']:g} in η·t, where η is larger at every update, "
        "and t_c is read off the line between the two measured rewards around it: at η = "
        f"{largest:g} an update is {max((f.get('resolution', 0) for f in summary['fits']), default=0):.1%} of t_c. The law is "
        f"claimed for S·η ≤ {edge:g} and η ≤ {largest:g}; S = {_listed(summary['max_staleness'])}, "
        f"η = {_listed(summary['learning_rates'])}.",
        "## What was to hold",
        markdown_table(
            ("Loss", "What", "Worst", "At", "Allowed", ""),
            [
                (
                    c["loss"],
                    c["what"],
                    f"{c['measured']:.3g}",
                    c["at"],
                    f"{c['allowed']:g}",
                    "holds" if c["holds"] else "**fails**",
                )
                for c in summary["checks"]
            ],
        ),
        verdict,
        "## Inside the window",
        markdown_table(
            ("Loss", "Lag", "Rule", "Cells", "t_c·η", "from", "to", "CV", "Exponent in S", "Exponent in η"),
            [_inside_line(fit) for fit in [*summary["fits"], *summary["pooled"]]],
        ),
        f"Exponents of t_c·η: one fit over the cells with S ≥ 1, in S and η together ({summary['confidence']:.0%} intervals "
        "over cells: they say how straight the cells lie, the runs have no noise). “All” pools the schedules.",
        "![t_c·η against S·η for every loss and schedule](figures:horizon_constant.png)",
        "**To first order** in lag and step, t_c·η = c·(1 + a·s̄η + b·η), with s̄ the *mean* staleness (S for a fixed lag, S/2 "
        "for the others), fitted to the same cells:",
        markdown_table(
            ("Loss", "Lag", "c", "a", "b", "Error left (rms)"),
            [
                (
                    fit["loss"],
                    fit["schedule"],
                    *(
                        ("-",) * 4
                        if "constant" not in fit
                        else (
                            f"{fit['constant']:.2f}",
                            signed(fit["per_mean_staleness"]),
                            signed(fit["per_learning_rate"]),
                            f"{fit['correction_error']:.2%}",
                        )
                    ),
                )
                for fit in summary["fits"]
                if fit["rule"] == "first"
            ],
        ),
        _about_correction(summary),
        "## Where it ends",
        markdown_table(
            (
                "Loss",
                "Lag",
                "Holds up to S·η =",
                f"Off by {summary['end_deviation']:.0%} from S·η =",
                "There t_c is",
            ),
            [
                (
                    end["loss"],
                    end["schedule"],
                    _number(end["last_on"]),
                    _number(end["first_off"]),
                    "-"
                    if end["ratio"] is None
                    else "never"
                    if end["ratio"] == math.inf
                    else f"{end['ratio']:.2f} of that without lag",
                )
                for end in summary["ends"]
            ],
        ),
        f"Every cell is compared with S = 0 at the same η ≤ {largest:g}: what large steps do is not mistaken for lag.",
        f"**At S·η from {summary['beyond_window'][0]:g} to {summary['beyond_window'][1]:g}** (η ≤ {largest:g}), of the runs "
        f"that collapse within η·t = {summary['time']:g}, t_c·η ∝ S^p η^q; t_c/(S+1) is the same time counted in cycles:",
        markdown_table(
            ("Loss", "Lag", "Collapsed", "p", "q", "Cycles to collapse: least, median, most"),
            [_beyond_line(line) for line in summary["beyond"]],
        ),
        _about_beyond(summary),
        f"At η = {summary['shown_learning_rate']:g}, {summary['schedules'][0]} lag:",
        markdown_table(
            ("Loss", "S", "S·η", "Fate", "Peak", "End", "t_c·η", "second rule"),
            [
                (
                    part["loss"],
                    row["max_staleness"],
                    f"{row['max_staleness'] * part['learning_rate']:g}",
                    row["outcome"],
                    f"{row['peak']:.3f}",
                    f"{row['end']:.3f}",
                    *("-" if row[key] is None else f"{row[key] * part['learning_rate']:.2f}" for key in _RULES.values()),
                )
                for part in summary["shown"]
                for row in part["rows"]
            ],
        ),
        f"![Gold reward against η·t at η = {summary['shown_learning_rate']:g}](figures:horizon_curves.png)",
        "## What it does not say",
        "One bandit with a reward that can be hacked, exact updates, plain gradient ascent: with sampled gradients the drift "
        "is partly diffusive, and with Adam η·t is not the distance driven by the gradient. A learner judged by the reward it "
        "is trained on has no such horizon here. That t_c·η is constant does not say that η_max falls with S, nor that it does "
        "not: the [study of cycles](cycles.md) asks what it implies.",
    ]
    return "\n\n".join(part for part in parts if part)


def _inside_line(fit: Row) -> tuple:
    head = (fit["loss"], fit["schedule"], fit["rule"], fit["num_cells"])
    if fit["num_not_collapsed"]:
        return (*head, f"{fit['num_not_collapsed']} cells did not collapse", *("-",) * 5)
    return (
        *head,
        *(f"{fit[key]:.2f}" for key in ("mean", "smallest", "largest")),
        f"{fit['variation']:.2%}",
        interval_text(fit["staleness_exponent"], fit["staleness_interval"], digits=3),
        interval_text(fit["learning_rate_exponent"], fit["learning_rate_interval"], digits=3),
    )


def _about_correction(summary: Mapping[str, Any]) -> str:
    """Whether the schedules of a loss share the coefficient of the mean staleness."""
    sentences = []
    for loss in summary["losses"]:
        found = [f for f in summary["fits"] if f["loss"] == loss and f["rule"] == "first" and "constant" in f]
        if len(found) < 2:
            continue
        slopes = [fit["per_mean_staleness"] for fit in found]
        low, high = min(slopes), max(slopes)
        shared = low > 0 and high / low < 1.15
        sentences.append(
            f"`{loss}`: a is {low:.3f} to {high:.3f} over the schedules"
            + (": what delays collapse is the mean staleness, whatever the schedule." if shared else ".")
        )
    return " ".join(sentences)


def _beyond_line(line: Row) -> tuple:
    head = (line["loss"], line["schedule"], f"{line['num_collapsed']} of {line['num_cells']}")
    if line["staleness_exponent"] is None:
        return (*head, "-", "-", "-")
    return (
        *head,
        interval_text(line["staleness_exponent"], line["staleness_interval"]),
        interval_text(line["learning_rate_exponent"], line["learning_rate_interval"]),
        ", ".join(f"{value:.3g}" for value in line["cycles"]),
    )


def _about_beyond(summary: Mapping[str, Any]) -> str:
    """What the clock is: still η·t (p ≈ q ≈ 0), the number of cycles (p ≈ q ≈ 1), or something between."""
    sentences = []
    for line in (line for line in summary["beyond"] if line["schedule"] == summary["schedules"][0]):
        p, q, name = line["staleness_exponent"], line.get("learning_rate_exponent"), f"`{line['loss']}`"
        if p is not None:
            sentences.append(
                f"{name}: t_c ∝ S^{p:.2f} η^{signed(q - 1)}"
                + (
                    ", close to a fixed number of *cycles* whatever η: the clock is no longer η·t."
                    if abs(p - 1) < 0.2 and abs(q - 1) < 0.2
                    else ", still close to η·t alone."
                    if abs(p) < 0.1 and abs(q) < 0.1
                    else ", later than η·t alone says."
                    if p > 0
                    else "."
                )
            )
        missing = line["num_cells"] - line["num_collapsed"]
        if missing:
            kinds = {kind: count for kind, count in line["outcomes"].items() if kind != "fall"}
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            sentences.append(
                f"{missing} of its {line['num_cells']} runs have not collapsed by the end ({said} by the gold reward); the "
                "exponents leave them out, so that they are too small."
            )
    return " ".join(sentences)


def figures(rows: Sequence[Row], summary: Mapping[str, Any], folder: os.PathLike) -> list[Path]:
    """horizon_constant and horizon_curves, PNG and SVG."""
    drawn = save_figure(_constant_figure(_cells(rows), summary), folder, "horizon_constant")
    return drawn + save_figure(_curves_figure([row for row in rows if row["kind"] == "curves"]), folder, "horizon_curves")


def _constant_figure(cells: Sequence[Row], summary: Mapping[str, Any]) -> Figure:
    """t_c·η against S·η: a column a loss, a color an η, a marker a schedule; the window is shaded."""
    names, rates = summary["losses"], summary["learning_rates"]
    colors = dict(zip(rates, colormaps["viridis"](np.linspace(0, 0.9, len(rates))), strict=True))
    figure = Figure(figsize=(3.6 * len(names) + 0.4, 3.9), layout="constrained")
    axes = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for ax, loss in zip(axes, names, strict=True):
        ax.axvspan(0, summary["window"]["staleness_x_learning_rate"], color="0.92", lw=0)
        for schedule in summary["schedules"]:
            for rate in rates:
                points = [
                    (cell["max_staleness"] * rate, cell["t_c"] * rate)
                    for cell in cells
                    if (cell["loss"], cell["schedule"], cell["learning_rate"]) == (loss, schedule, rate)
                    and cell["max_staleness"]
                    and cell["t_c"] is not None
                ]
                if points:
                    ax.plot(*zip(*points, strict=True), _MARKERS[schedule], ms=4, mfc="none", color=colors[rate])
        ax.axhline(next(e["reference"] for e in summary["ends"] if e["loss"] == loss), color="0.4", ls="--", lw=1)
        ax.set(xscale="log", yscale="log", xlabel="S·η")
        ax.set_title(loss, fontsize=9)
        ax.grid(alpha=0.3, lw=0.5)
    axes[0].set_ylabel("t_c·η")
    axes[0].set_yticks([20, 30, 50, 100], ["20", "30", "50", "100"])
    axes[0].minorticks_off()
    for schedule in summary["schedules"]:
        axes[0].plot([], [], _MARKERS[schedule], ms=5, mfc="none", color="k", label=f"{schedule} lag, any η")
    for rate in rates:
        axes[0].plot([], [], "o", ms=4, mfc="none", color=colors[rate], label=f"η = {rate:g}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    figure.suptitle("Collapse of the gold reward; gray: where the law is claimed; dashed: without lag", fontsize=10)
    return figure


def _curves_figure(rows: Sequence[Row]) -> Figure:
    """Gold reward against η·t for every S."""
    figure = Figure(figsize=(3.6 * max(1, len(rows)) + 0.4, 3.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(rows)), sharey=True, squeeze=False)[0]
    for ax, row in zip(axes, rows, strict=False):
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(row["max_staleness"])))
        for s, gold, color in zip(row["max_staleness"], row["gold"], colors, strict=True):
            ax.plot(np.array(row["steps"]) * row["learning_rate"], gold, color=color, lw=1.2, label=f"S = {s}")
        end = row["steps"][-1] * row["learning_rate"]
        ax.set(xlabel="η·t", title=row["loss"], xlim=(0, end / 2))  # what follows is flat
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3, lw=0.5)
    axes[0].set_ylabel("gold reward")
    axes[-1].legend(fontsize=7, frameon=False)
    if rows:
        shown = f"η = {rows[0]['learning_rate']:g}, {rows[0]['schedule']} lag"
        figure.suptitle(f"Gold reward along a run, {shown} of S updates", fontsize=10)
    return figure


def interval_text(value: float, interval: Sequence[float], digits: int = 2) -> str:
    """value [low, high] with a proper minus sign."""
    low, high = (signed(end, digits) for end in interval)
    return f"{signed(value, digits)} [{low}, {high}]"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign; "-" for None."""
    return "-" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
