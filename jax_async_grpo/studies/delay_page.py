"""What the records of the study of delay stability say: summary, page and figures, from rows alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from jax_async_grpo.studies.contract import save_figure
from jax_async_grpo.studies.page_parts import markdown_table

__all__ = ["figures", "page", "summary"]

_DRAWN = 100  # updates: more of an oscillation that alternates would be a blot

Row = Mapping[str, Any]


def summary(rows: Sequence[Row], config: Mapping[str, Any], sources: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """All numbers of the page: agreement, slopes, tables, and what was to hold beside what was measured.

    Args:
      rows: of the study's metrics.jsonl.
      config: of the study; its rules and tolerances.
      sources: unused, the study reads no other.

    Returns:
      A dict of plain numbers, strings and lists.
    """
    del sources
    fits = [_fit(part, config["slope_from"]) for part in _grouped(_of(rows, "threshold"), "loss", "decay", "schedule")]
    shown = {"decay": config["random"]["decay"]}
    result = {
        "equilibria": [_without(row, "kind", "piece", "params") for row in _of(rows, "equilibrium")],
        "fits": fits,
        "table_decay": shown["decay"],
        "table": [_without(row, "kind", "piece", "bracket", "companion") for row in _of(rows, "threshold", **shown)],
        "random": [_without(row, "kind", "piece") | {"error": _error(row)} for row in _of(rows, "random")],
        "beyond": [_without(row, "kind", "piece", "shown_rewards") for row in _of(rows, "beyond")],
        "matrix_free": [
            _without(row, "kind", "piece") | {"error": _relative(row["matrix_free"], row["dense"])}
            for row in _of(rows, "matrix_free")
        ],
        "slope_from": config["slope_from"],
        "staleness": sorted({row["max_staleness"] for row in _of(rows, "threshold")}),
        "deviation": config["deviation"],
        "rewards": list(config["rewards"]),
        "group_size": config["group_size"],
        "random_chains": config["random"]["num_chains"],
        "shown_staleness": config["beyond"]["shown_staleness"],
        "seconds": sum(row["seconds"] for row in _of(rows, "piece")),
    }
    return result | {"checks": _checks(rows, result, config["tolerance"])}


def _fit(part: Sequence[Row], slope_from: int) -> dict[str, Any]:
    """Agreement and slopes of one loss, decay and schedule."""
    errors = [_error(row) for row in part]
    worst = int(np.argmax(errors))
    far = [row for row in part if row["max_staleness"] >= slope_from]
    identity = {key: part[0][key] for key in ("loss", "decay", "schedule")}
    return identity | {
        "largest_error": errors[worst],
        "largest_error_at": part[worst]["max_staleness"],
        **{f"slope_{key}": _slope(far, key) for key in ("theory", "simulated")},
        **{
            f"slope_{name}": _slope([row for row in far if row["max_staleness"] % 2 == parity], "theory")
            for name, parity in (("even", 0), ("odd", 1))
        },
    }


def _slope(rows: Sequence[Row], key: str) -> float | None:
    """Of log η_max on log(S + ½); None with less than two finite points."""
    points = [(row["max_staleness"] + 0.5, row[key]) for row in rows if 0 < row[key] < math.inf]
    return float(np.polyfit(*np.log(points).T, 1)[0]) if len(points) > 1 else None


def _checks(rows: Sequence[Row], result: Mapping[str, Any], tolerance: Mapping[str, float]) -> list[dict[str, Any]]:
    """[{what, measured, allowed, holds}]: the largest deviation of each kind; NaN does not hold."""
    falls = {(row["loss"], row["decay"]): row["growth_bound"] > 0 for row in result["equilibria"]}
    fixed = [fit for fit in result["fits"] if fit["schedule"] == "fixed" and fit["slope_theory"] is not None]
    slopes = {"falling_slope": [], "flat_slope": []}
    for fit in fixed:
        falling = falls[fit["loss"], fit["decay"]]
        slopes["falling_slope" if falling else "flat_slope"] += [
            math.inf if slope is None else abs(slope + (1 if falling else 0))
            for slope in (fit["slope_theory"], fit["slope_simulated"])
        ]
    measured = {
        schedule: [fit["largest_error"] for fit in result["fits"] if fit["schedule"] == schedule]
        for schedule in ("fixed", "periodic")
    }
    measured |= {
        "random": [row["error"] for row in result["random"]],
        "companion": [_relative(row["theory"], row["companion"]) for row in _of(rows, "threshold", schedule="fixed")],
        "matrix_free": [row["error"] for row in result["matrix_free"]],
        "scalar": [_relative(row["theory"], row["closed_form"]) for row in _of(rows, "scalar")],
        **slopes,
    }
    return [
        {"what": _CHECKS[key], "measured": max(values), "allowed": tolerance[key], "holds": max(values) <= tolerance[key]}
        for key, values in measured.items()
        if values
    ]


_CHECKS = {
    "fixed": "fixed lag: simulation against theory, relative",
    "periodic": "periodic lag: the same",
    "random": "random lag: simulation against the Lyapunov exponent's zero, relative",
    "companion": "frequency sweep against the companion matrix, relative",
    "matrix_free": "matrix-free against matrices on the larger policy, relative",
    "scalar": "closed forms of one parameter, relative",
    "falling_slope": "distance of the slope from −1 where the behavior derivative dominates",
    "flat_slope": "distance of the slope from 0 where it does not",
}


def page(summary: Mapping[str, Any]) -> str:
    """docs/laws/delay.md: what was asked, the rule, what was found."""
    failed = [check["what"] for check in summary["checks"] if not check["holds"]]
    verdict = "All of them hold." if not failed else "Not held: " + "; ".join(failed) + "."
    staleness = ", ".join(map(str, summary["staleness"]))
    rewards = ", ".join(f"{value:g}" for value in summary["rewards"])
    parts = [
        "# Delay stability: theory against simulation",
        "Generated by `launch.study` from docs/laws/records/delay. configs/study_delay.py holds every rule and tolerance, set "
        "before the run, but for two options of the matrix-free check, S and the number of eigenvalues: with 8 of them the "
        "solver had not converged. The mathematics is in [delay_stability.md](delay_stability.md).",
        "**Question.** Linearizing a learner that trains on rollouts of an older policy says up to which learning rate η_max "
        "an equilibrium is stable. Does the *nonlinear* learner lose stability there? "
        f"A softmax policy over {len(summary['rewards'])} actions with rewards {rewards}, groups of {summary['group_size']}, "
        f"group-normalized advantages and L2 decay β runs on its exact update field from a deviation of "
        f"{summary['deviation']:g} logits, at S = {staleness}.",
        "**Rule.** Learning rates of a geometric grid, upwards; the first at which the deviation grows and the one below it "
        "are the bracket, which is divided further; between the ends of the last one the growth rate is interpolated. The "
        "simulation does not know the theory.",
        "## What was to hold",
        markdown_table(
            ("What", "Largest measured", "Allowed", ""),
            [
                (check["what"], f"{check['measured']:.2g}", f"{check['allowed']:g}", "holds" if check["holds"] else "**fails**")
                for check in summary["checks"]
            ],
        ),
        verdict,
        "## Thresholds",
        f"η_max at β = {summary['table_decay']:g}, theory / simulation:",
        _threshold_table(summary),
        "![Thresholds of theory and simulation against S, for every loss and lag](figures:delay_thresholds.png)",
        f"Slope of log η_max on log(S+½) for S ≥ {summary['slope_from']}:",
        markdown_table(
            ("Loss", "β", "Lag", "Theory", "Simulation", "Even S", "Odd S", "Largest error"),
            [
                (
                    fit["loss"],
                    f"{fit['decay']:g}",
                    fit["schedule"],
                    *(_signed(fit[f"slope_{key}"]) for key in ("theory", "simulated", "even", "odd")),
                    f"{fit['largest_error']:.1e} (S = {fit['largest_error_at']})",
                )
                for fit in summary["fits"]
            ],
        ),
        _about_slopes(summary),
        "## Random lag",
        "The theory's threshold is the zero of the Lyapunov exponent of the random matrix product, known to its standard "
        f"error. The simulation runs the full field with {summary['random_chains']} other lag sequences. The second moment "
        "decays up to the mean-square bound, a cautious one.",
        markdown_table(
            ("Loss", "β", "S", "Theory", "Simulation", "Difference", "Mean-square bound"),
            [
                (
                    row["loss"],
                    f"{row['decay']:g}",
                    row["max_staleness"],
                    f"{row['theory']:.3f} ± {row['standard_error']:.3f}",
                    f"{row['simulated']:.3f}",
                    f"{100 * row['error']:.1f} %",
                    "-" if row["mean_square"] is None else f"{row['mean_square']:.3f}",
                )
                for row in summary["random"]
            ],
        ),
        "## Past the threshold",
        "The same learners at a multiple of the fixed lag's threshold, left alone. Amplitude: root mean square distance from "
        "the equilibrium in logits over the last quarter of the run; reward: its mean and its lowest value there.",
        markdown_table(
            ("Loss", "S", "η/η_max", "Fate", "Amplitude", "Reward", "Lowest", "At the equilibrium"),
            [
                (
                    row["loss"],
                    row["max_staleness"],
                    f"{row['factor']:g}",
                    row["fate"],
                    f"{row['amplitude']:.2g}",
                    f"{row['reward']:.3f}",
                    f"{row['lowest_reward']:.3f}",
                    f"{row['equilibrium_reward']:.3f}",
                )
                for row in summary["beyond"]
            ],
        ),
        f"![Expected reward past the threshold at S = {summary['shown_staleness']}](figures:delay_beyond.png)",
        _about_beyond(summary["beyond"]),
        "## A larger policy, without matrices",
        markdown_table(
            ("Loss", "Parameters", "Seen by the task", "S", "Companion matrix", "Products alone", "Difference"),
            [
                (
                    row["loss"],
                    row["num_params"],
                    row["num_active"],
                    row["max_staleness"],
                    f"{row['dense']:.6f}",
                    f"{row['matrix_free']:.6f}",
                    f"{row['error']:.1e}",
                )
                for row in summary["matrix_free"]
            ],
        ),
        "Digit sums, a policy linear in features of the context. The companion matrix is that of the directions that the task "
        "sees; in the others only the decay acts, stable below 2/β. The products know nothing of that.",
        "## What it does not say",
        "One small task, exact updates, plain gradient ascent, one equilibrium for each decay. A sampled run does not rest at "
        "an equilibrium of the expected update, and local stability is not collapse: see above for what the reward does.",
    ]
    return "\n\n".join(part for part in parts if part)


def _threshold_table(summary: Mapping[str, Any]) -> str:
    columns = list(dict.fromkeys((row["loss"], row["schedule"]) for row in summary["table"]))
    cells = {(row["loss"], row["schedule"], row["max_staleness"]): row for row in summary["table"]}
    lines = []
    for s in summary["staleness"]:
        found = [cells.get((*column, s)) for column in columns]
        lines.append((s, *("-" if row is None else f"{row['theory']:.3f} / {row['simulated']:.3f}" for row in found)))
    return markdown_table(("S", *(f"{loss}, {schedule}" for loss, schedule in columns)), lines)


def _about_slopes(summary: Mapping[str, Any]) -> str:
    groups: dict[bool, list[Row]] = {True: [], False: []}
    for row in summary["equilibria"]:
        groups[row["growth_bound"] > 0].append(row)
    sentences = []
    for falls, rows in groups.items():
        if not rows:
            continue
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(row["loss"] for row in rows))
        ratios = [row["behavior_norm"] / row["learner_norm"] for row in rows]
        law = "must fall as 1/S for a fixed lag" if falls else "stays above a number whatever S"
        sentences.append(
            f"{names}: ‖B‖/‖A‖ is {min(ratios):.2g} to {max(ratios):.2g} and the growth bound "
            f"{'positive' if falls else 'negative'}, so that η_max {law}."
        )
    flat = [fit for fit in summary["fits"] if fit["schedule"] == "fixed" and not _falls(summary, fit)]
    apart = [fit for fit in flat if None not in (fit["slope_even"], fit["slope_odd"])]
    if apart and max(abs(fit["slope_even"] - fit["slope_odd"]) for fit in apart) > 0.01:
        sentences.append(
            "Where it does not fall, odd and even S have slopes of their own: the threshold alternates with the parity of S, "
            "and a fit needs both."
        )
    return " ".join(sentences)


def _falls(summary: Mapping[str, Any], fit: Row) -> bool:
    return any(row["growth_bound"] > 0 for row in summary["equilibria"] if _same(row, fit, "loss", "decay"))


def _about_beyond(rows: Sequence[Row]) -> str:
    """Whether reward fell where stability was lost: counted, not presumed."""
    finite = [row for row in rows if row["fate"] != "not finite"]
    unstable = [row for row in finite if row["fate"] != "decays"]
    lost = [row for row in unstable if row["reward"] < row["equilibrium_reward"] - 0.01]
    gained = [row for row in unstable if row["reward"] > row["equilibrium_reward"] + 0.01]
    halved = [row for row in unstable if row["lowest_reward"] < 0.5 * row["equilibrium_reward"]]
    largest = max((row["equilibrium_reward"] - row["reward"] for row in unstable), default=0.0)
    fates = {fate: sum(row["fate"] == fate for row in rows) for fate in dict.fromkeys(row["fate"] for row in rows)}
    said = ", ".join(f"{fate} {count}" for fate, count in fates.items())
    sentences = [
        f"Fates of the {len(rows)} runs past the threshold: {said}. The mean reward is more than 0.01 below the equilibrium's "
        f"in {len(lost)} and more than 0.01 above it in {len(gained)}; in {len(halved)} it falls below half of it for a time. "
        f"The largest loss of mean reward is {largest:.3f}."
    ]
    if len(lost) < len(rows):
        sentences.append("Losing stability and losing reward are two things.")
    return " ".join(sentences)


def figures(rows: Sequence[Row], summary: Mapping[str, Any], folder: os.PathLike) -> list[Path]:
    """delay_thresholds and delay_beyond, PNG and SVG."""
    drawn = save_figure(_threshold_figure(_of(rows, "threshold")), folder, "delay_thresholds")
    return drawn + save_figure(_beyond_figure(_of(rows, "beyond")), folder, "delay_beyond")


def _threshold_figure(rows: Sequence[Row]) -> Figure:
    """η_max against S + ½: a column a loss, a row a schedule, a color a decay; theory lines and simulated points by parity."""
    names, schedules, decays = (list(dict.fromkeys(row[key] for row in rows)) for key in ("loss", "schedule", "decay"))
    colors = dict(zip(decays, colormaps["viridis"](np.linspace(0.05, 0.8, len(decays))), strict=True))
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 2.9 * len(schedules) + 0.6), layout="constrained")
    axes = figure.subplots(len(schedules), len(names), sharex=True, sharey=True, squeeze=False)
    staleness = sorted({row["max_staleness"] for row in rows})
    x = np.array([max(8.0, staleness[0]), staleness[-1]]) + 0.5
    guide = 0.7 * x[-1] * min(row["theory"] for row in rows if row["max_staleness"] == staleness[-1])
    for line, schedule in zip(axes, schedules, strict=True):
        for ax, loss in zip(line, names, strict=True):
            for decay, color in colors.items():
                _draw_thresholds(ax, _of(rows, "threshold", loss=loss, schedule=schedule, decay=decay), color)
            ax.plot(x, guide / x, color="0.5", ls="--", lw=1)
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{loss}, {schedule} lag", fontsize=9)
            ax.grid(alpha=0.3, lw=0.5)
        line[0].set_ylabel("η_max")
    ticks = [s for s in (0, 1, 4, 16, 64, 256) if staleness[0] <= s <= staleness[-1]]
    axes[0, 0].set_xticks([s + 0.5 for s in ticks], [str(s) for s in ticks])
    axes[0, 0].xaxis.set_minor_locator(NullLocator())
    for ax in axes[-1]:
        ax.set_xlabel("S (updates), drawn at S + ½")
    figure.legend(handles=_threshold_handles(colors), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("Largest stable learning rate: theory and simulation", fontsize=11)
    return figure


def _draw_thresholds(ax, rows: Sequence[Row], color) -> None:
    """Odd and even S apart: they can lie on two curves, which part at S = 0."""
    for odd, face in ((1, color), (0, "white")):
        part = [row for row in rows if row["max_staleness"] % 2 == odd]
        stale = [row for row in part if row["max_staleness"]]
        ax.plot([row["max_staleness"] + 0.5 for row in stale], [row["theory"] for row in stale], color=color, lw=1)
        x = [row["max_staleness"] + 0.5 for row in part]
        ax.plot(x, [row["simulated"] for row in part], ls="", marker="o", ms=4, mec=color, mfc=face)


def _threshold_handles(colors: Mapping[float, Any]) -> list[Line2D]:
    handles = [Line2D([], [], color=color, label=f"β = {decay:g}") for decay, color in colors.items()]
    handles.append(Line2D([], [], color="0.2", lw=1, label="theory"))
    for label, face in (("simulation, odd S", "0.2"), ("simulation, even S", "white")):
        handles.append(Line2D([], [], ls="", marker="o", ms=4, mec="0.2", mfc=face, label=label))
    return [*handles, Line2D([], [], color="0.5", ls="--", lw=1, label="slope −1")]


def _beyond_figure(rows: Sequence[Row]) -> Figure:
    """Expected reward over the last updates, a panel a loss."""
    names = list(dict.fromkeys(row["loss"] for row in rows))
    shown = [row for row in rows if "shown_rewards" in row]
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    factors = list(dict.fromkeys(row["factor"] for row in shown))
    colors = dict(zip(factors, colormaps["plasma"](np.linspace(0.1, 0.7, len(factors))), strict=True))
    for ax, loss in zip(axes, names, strict=True):
        for row in (row for row in shown if row["loss"] == loss):
            rewards = np.array(row["shown_rewards"], float)[-_DRAWN:]
            ax.plot(np.arange(len(rewards)) - len(rewards), rewards, color=colors[row["factor"]], lw=1)
            ax.axhline(row["equilibrium_reward"], color="0.5", ls="--", lw=1)
        ax.set_title(loss, fontsize=9)
        ax.set_xlabel("updates before the end of the run")
        ax.grid(alpha=0.3, lw=0.5)
    axes[0].set_ylabel("expected reward")
    handles = [Line2D([], [], color=color, label=f"η = {factor:g} η_max") for factor, color in colors.items()]
    handles.append(Line2D([], [], color="0.5", ls="--", lw=1, label="the equilibrium"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    title = f"Past the threshold of a fixed lag, S = {shown[0]['max_staleness']}" if shown else "Past the threshold"
    figure.suptitle(title, fontsize=11)
    return figure


def _of(rows: Iterable[Row], kind: str, **equal) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and all(row.get(key) == value for key, value in equal.items())]


def _grouped(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def _same(one: Row, other: Row, *keys: str) -> bool:
    return all(one[key] == other[key] for key in keys)


def _without(row: Row, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def _error(row: Row) -> float:
    return _relative(row["simulated"], row["theory"])


def _relative(value: float, reference: float) -> float:
    """|value/reference − 1|; inf where that is no number, so that no check passes on it."""
    error = abs(value / reference - 1) if reference else math.inf
    return error if math.isfinite(error) else math.inf


def _signed(slope: float | None) -> str:
    return "-" if slope is None else f"{slope:+.3f}".replace("-", "−")
