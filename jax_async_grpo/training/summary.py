"""What a training run came to, from its records: summary.json and the figure of reward, staleness drift and bias."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_async_grpo.studies.contract import save_figure
from jax_async_grpo.training.pooled_bias import pooled_bias, sorted_out, squared_error

__all__ = ["FIGURES", "figure", "last_line", "summary", "title"]

FIGURES = ("train.png", "train.svg")
_BLUE, _ORANGE, _GREEN, _GRAY = "#0072b2", "#d55e00", "#009e73", "0.45"


def summary(rows: Sequence[Mapping[str, Any]], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Start and end of a run, how far it lagged, and what was skipped.

    Args:
      rows: of metrics.jsonl.
      versions: of `records.versions`.
    """
    updates, evaluations, biases = (_of_kind(rows, kind) for kind in ("update", "evaluation", "bias"))
    start = next((row for row in rows if row["kind"] == "start"), {})
    rewards = [row["heldout_reward"] for row in evaluations]
    return {
        "num_updates": len(updates),
        "num_parameters": start.get("num_parameters"),
        "warm_start_updates": start.get("warm_start_updates"),
        "heldout_reward": {
            "start": rewards[0] if rewards else None,
            "end": rewards[-1] if rewards else None,
            "best": max(rewards, default=None),
        },
        "collapse_step": evaluations[-1]["collapse/step"] if evaluations else None,
        "skipped_updates": sum(1 for row in updates if not row["update/is_finite"]),
        "failed_samples": {k.removeprefix("verifier/"): v for k, v in evaluations[-1].items() if k.startswith("verifier/")}
        if evaluations
        else {},
        "staleness_mean": float(np.mean([row["staleness/mean"] for row in updates])) if updates else None,
        "t_eta": updates[-1]["lr/t_eta"] if updates else None,
        "bias": pooled_bias(biases),
        "versions": dict(versions),
    }


def last_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The end of a run in one line, ASCII."""
    rewards = [row["heldout_reward"] for row in _of_kind(rows, "evaluation")]
    skipped = sum(1 for row in _of_kind(rows, "update") if not row["update/is_finite"])
    said = f"held-out reward {rewards[0]:.3f} -> {rewards[-1]:.3f} (best {max(rewards):.3f})"
    return said + (f", {skipped} updates skipped as not finite" if skipped else "")


def title(config: Mapping[str, Any]) -> str:
    """Of the figure, whoever draws it: the task (its data set or file, where one is chosen), S and η."""
    options = config["task_options"]
    chosen = options.get("dataset") or Path(options.get("path") or "").stem
    task = chosen or str(config["task"]).rpartition(".")[2]
    return f"{task}, S = {config['staleness']['max']}, η = {config['optimizer']['learning_rate']:g}"


def figure(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike, title: str) -> list[Path]:
    """train.png and train.svg: reward; KL and size of the updates; the squared bias with its errors, where it was measured."""
    updates, evaluations, biases = (_of_kind(rows, kind) for kind in ("update", "evaluation", "bias"))
    panels = 3 if biases else 2
    drawn = Figure(figsize=(4.2 * panels, 3.2), layout="constrained")
    axes = drawn.subplots(1, panels)
    steps = [row["step"] for row in updates]
    axes[0].plot(steps, [row["reward"] for row in updates], color=_BLUE, alpha=0.35, lw=0.8, label="rollouts (training)")
    axes[0].plot(*_line(evaluations, "heldout_reward"), color=_BLUE, marker="o", ms=3, label="held out")
    axes[0].set(ylabel="mean reward", ylim=(-0.02, max([1.02, *(1.02 * row["heldout_reward"] for row in evaluations)])))
    fallen = next((row["collapse/step"] for row in evaluations if row["collapse/flag"]), None)
    if fallen is not None:
        axes[0].axvline(fallen, color=_ORANGE, ls=":", label="collapse")
    lagged = [row for row in updates if row["staleness/mean"] > 0]
    axes[1].plot(*_positive(lagged, "off_policy/k3_kl"), color=_ORANGE, lw=0.8, alpha=0.8, label="KL of a token (k3), nats")
    axes[1].plot(*_positive(updates, "update/norm"), color=_GREEN, lw=1, label="norm of the update (of parameters)")
    if any(row["off_policy/k3_kl"] > 0 or row["update/norm"] > 0 for row in updates):
        axes[1].set_yscale("log")
    axes[1].set(ylabel="size, each in its own unit")
    if biases:
        _draw_bias(axes[2], biases)
    for axis in axes:
        axis.set_xlabel("learner updates")
        axis.grid(True, color="0.92")
        axis.set_axisbelow(True)
        axis.legend(fontsize=7, frameon=False)
    drawn.suptitle(title, fontsize=9)
    return save_figure(drawn, folder, "train")


def _draw_bias(axis, biases: Sequence[Mapping[str, Any]]) -> None:
    """‖δ‖² in units of the mean squared gradient, ± its standard error; linear around 0, as estimates may be negative."""
    found, kinds = pooled_bias(biases), sorted_out(biases)
    pooled, mean = kinds["pooled"], found["fresh_norm_squared"]["mean"]
    has_scale = mean is not None and mean > 0
    unit = mean if has_scale else 1.0
    for is_detected, fill, label in ((1, _BLUE, "detected"), (0, "w", "not detected")):
        chosen = [row for row in pooled if row["detected"] == is_detected]
        if chosen:
            steps, squares = _line(chosen, "bias/norm_squared")
            errors = [squared_error(row) / unit for row in chosen]
            style = dict(color=_BLUE, fmt="o", ms=4, mfc=fill, elinewidth=0.8, zorder=3)
            axis.errorbar(steps, np.divide(squares, unit), errors, label=f"{label} (± standard error)", **style)
    limits = [row["bias/detection_limit"] ** 2 / unit for row in pooled]
    if pooled:
        style = dict(color=_GRAY, ls="", marker="_", ms=7)
        axis.plot([row["step"] for row in pooled], limits, label="detection limit, squared", **style)
    if found["norm_squared"]["interval"]:
        low, high = (end / unit for end in found["norm_squared"]["interval"])
        axis.axhspan(low, high, color=_ORANGE, alpha=0.2, lw=0, label="mean of all, 90 % interval")
        axis.axhline(found["norm_squared"]["mean"] / unit, color=_ORANGE, lw=1)
    nothing = [row["step"] for kind in ("without_lag", "without_gradient") for row in kinds[kind]]
    if nothing:
        axis.plot(nothing, [0.0] * len(nothing), color=_GRAY, ls="", marker="x", ms=4, label="nothing to measure")
    axis.axhline(0, color="k", lw=0.6)
    # below the power of ten under the typical limit one measurement tells nothing apart: there the axis may be linear
    threshold = 10.0 ** np.floor(np.log10(np.median(limits))) if pooled else 1.0
    axis.set_yscale("symlog", linthresh=threshold)
    reach = 2 * max([threshold, *limits, *(abs(row["bias/norm_squared"]) / unit for row in pooled)])
    axis.set(ylim=(-reach, reach), ylabel="‖δ‖² / mean ‖H(θ,θ)‖²" if has_scale else "‖δ‖²")


def _of_kind(rows, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _line(rows, name: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]


def _positive(rows, name: str) -> tuple[list[float], list[float]]:
    """On a logarithmic axis zeros are left out: there is no lag yet."""
    return _line([row for row in rows if row[name] > 0], name)
