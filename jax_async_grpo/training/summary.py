"""What a training run came to, from its records: summary.json and the figure of reward, staleness drift and bias."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_async_grpo.studies.contract import save_figure

__all__ = ["FIGURES", "figure", "last_line", "summary"]

FIGURES = ("train.png", "train.svg")
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"


def summary(rows: Sequence[Mapping[str, Any]], versions: Mapping[str, Any]) -> dict[str, Any]:
    """Start and end of a run, how far it lagged, and what was skipped.

    Args:
      rows: of metrics.jsonl.
      versions: of `records.versions`.
    """
    updates, evaluations, biases = (_of_kind(rows, kind) for kind in ("update", "evaluation", "bias"))
    start = next((row for row in rows if row["kind"] == "start"), {})
    rewards = [row["heldout_reward"] for row in evaluations]
    lagged = [row for row in biases if row["staleness"] > 0]
    squares = [sum(row[name] for row in lagged) for name in ("bias/norm_squared", "fresh_norm_squared")]
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
        "bias": {
            "measured": len(biases),
            "detected": sum(row["detected"] for row in biases),
            # of summed squares, whose estimates are unbiased; the mean of what was detected would be too large
            "relative_norm": float(np.sqrt(max(squares[0], 0.0) / squares[1])) if lagged and squares[1] > 0 else None,
            "detection_limit_mean": _mean(row["bias/detection_limit"] for row in lagged),
        },
        "versions": dict(versions),
    }


def last_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The end of a run in one line, ASCII."""
    rewards = [row["heldout_reward"] for row in _of_kind(rows, "evaluation")]
    skipped = sum(1 for row in _of_kind(rows, "update") if not row["update/is_finite"])
    said = f"held-out reward {rewards[0]:.3f} -> {rewards[-1]:.3f} (best {max(rewards):.3f})"
    return said + (f", {skipped} updates skipped as not finite" if skipped else "")


def figure(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike, title: str) -> list[Path]:
    """train.png and train.svg: reward; how far the learner is from its rollouts; the bias, where it was measured."""
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
    axes[1].plot(*_positive(updates, "update/norm"), color=_GREEN, lw=1, label="norm of the update")
    if any(row["off_policy/k3_kl"] > 0 or row["update/norm"] > 0 for row in updates):
        axes[1].set_yscale("log")
    axes[1].set(ylabel="drift")
    if biases:
        for is_detected, fill, label in ((1, _BLUE, "‖δ‖, detected"), (0, "none", "‖δ‖, estimated > 0, not detected")):
            found = [row for row in biases if row["detected"] == is_detected]
            axes[2].plot(*_positive(found, "bias/norm"), color=_BLUE, ls="", marker="o", ms=4, mfc=fill, label=label)
        axes[2].plot(*_positive(biases, "bias/detection_limit"), color="0.5", ls="--", lw=1, label="detection limit")
        axes[2].set(ylabel="staleness bias of the gradient")
        if any(row["bias/norm"] > 0 or row["bias/detection_limit"] > 0 for row in biases):
            axes[2].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("learner updates")
        axis.grid(True, color="0.92")
        axis.set_axisbelow(True)
        axis.legend(fontsize=7, frameon=False)
    drawn.suptitle(title, fontsize=9)
    return save_figure(drawn, folder, "train")


def _of_kind(rows, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def _line(rows, name: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]


def _positive(rows, name: str) -> tuple[list[float], list[float]]:
    """On a logarithmic axis zeros are left out: there is no lag yet."""
    return _line([row for row in rows if row[name] > 0], name)


def _mean(values) -> float | None:
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else None
