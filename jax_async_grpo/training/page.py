"""The page of a training run for `launch.report`: what was run, how reward, lag and bias went, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_async_grpo.html_report import Folded, Items, Page, Part, Picture, Section, Table, Text
from jax_async_grpo.training.summary import figure, summary

__all__ = ["page"]

Record = Mapping[str, Any]
Rows = Sequence[Record]

_ABSENT = "–"
_CAPTION = (
    "Against learner updates: mean reward of the training rollouts (pale) and of held-out questions (marked), a collapse as a "
    "dotted line; how far the learner is from its rollouts, as k3 estimate of the KL of a token in nats, and the norm of the "
    "update, both logarithmic; and, where it was measured, the staleness bias ‖δ‖ of the gradient with its standard error, "
    "beside the detection limit (dashed), the size that would be seen four times in five."
)


def page(folder: Path, config: Record, rows: Rows, versions: Record) -> Page:
    """The page of a training run, finished or not; draws train.png and train.svg into the folder.

    Args:
      folder: the --workdir of `launch.train`.
      config: of its config.json.
      rows: of its metrics.jsonl.
      versions: of its summary.json, which the page's caller shows.

    Raises:
      KeyError: a record lacks a name: the run is of another version of the package.
    """
    result = summary(rows, versions)
    S, eta = config["staleness"]["max"], config["optimizer"]["learning_rate"]
    updates, evaluations, biases = ([row for row in rows if row["kind"] == kind] for kind in ("update", "evaluation", "bias"))
    sections = [
        Section("Outcome", [_outcome(result, config, updates), *_picture(folder, rows, updates, f"S = {S}, η = {eta:g}")])
    ]
    if biases:
        sections.append(Section("Staleness bias of the gradient", _bias(result, biases)))
    if evaluations:
        sections.append(Section("Evaluations", [_evaluations(evaluations)]))
    limits = list(_limits(config, result, biases))
    parts: list[Part] = [Items(limits)] if limits else [Text("Nothing: everything asked for was measured.")]
    how = Text("How to read this page: docs/training.md in the repository.")
    return Page(
        title="Training on stale rollouts",
        lead=f"{_word(config['task'])} with {_word(config['policy'])}, trained on rollouts that are up to S = {S} learner "
        f"updates old ({config['staleness']['schedule']} schedule, replay of {config['replay']}), at learning rate "
        f"η = {eta:g}: S·η = {S * eta:.3g}.",
        sections=[*sections, Section("Not measured, censored or refused", [*parts, how])],
        warnings=list(_warnings(config, result, updates)),
    )


def _outcome(result: Record, config: Record, updates: Rows) -> Table:
    reward, lags = result["heldout_reward"], [row["staleness/max"] for row in updates]
    failed = {name.replace("_", " "): number for name, number in result["failed_samples"].items() if number}
    fell = result["collapse_step"]
    lines = {
        "updates": f"{result['num_updates']} of {config['num_updates']}",
        "parameters": _number(result["num_parameters"]),
        "updates of the warm start": _number(result["warm_start_updates"]),
        "held-out reward, start": _number(reward["start"]),
        "held-out reward, end": _number(reward["end"]),
        "held-out reward, best": _number(reward["best"]),
        "collapse": "none" if fell is None else f"after {fell:g} updates",
        "staleness S, configured (updates)": str(config["staleness"]["max"]),
        "staleness, mean (updates)": _number(result["staleness_mean"]),
        "staleness, largest (updates)": _number(max(lags, default=None)),
        "sum of the learning rates, T·η": _number(result["t_eta"]),
        "updates skipped as not finite": str(result["skipped_updates"]),
        "samples that the verifier failed on": ", ".join(f"{number} {why}" for why, number in failed.items()) or "0",
    }
    return Table(["quantity", "value"], [[name, value] for name, value in lines.items()])


def _picture(folder: Path, rows: Rows, updates: Rows, title: str) -> list[Picture]:
    if not updates:
        return []
    figure(rows, folder, title)
    return [Picture(folder / "train.svg", _CAPTION)]


def _bias(result: Record, biases: Rows) -> list[Part]:
    """How often it was told from none, and every measurement."""
    found = result["bias"]
    said = f"Measured {found['measured']} times, told from none {found['detected']} times"
    if found["relative_norm"] is not None:
        said += f"; over all of them ‖δ‖ is estimated as {found['relative_norm']:.3g} of the fresh gradient"
    if found["detection_limit_mean"] is not None:
        said += f". A bias of norm {found['detection_limit_mean']:.3g} (mean of the limits) would be seen four times in five"
    rows = [
        [
            f"{row['step']}",
            *(
                _number(row[f"bias/{name}"])
                for name in ("norm", "standard_error", "detection_limit", "relative_norm", "cosine")
            ),
            "yes" if row["detected"] else "no",
            _number(row["ess_ratio"]),
            str(row["method"]),
        ]
        for row in biases
    ]
    columns = ["update", "‖δ‖", "standard error", "detection limit", "over the fresh gradient", "cosine", "detected", "ESS"]
    caption = (
        "‖δ‖ by a U-statistic over blocks of prompts, 0 where the estimate of its square is negative; cosine of the stale with "
        "the fresh gradient; ESS: effective share of the groups, by which the next measurement chooses between fresh rollouts "
        "(sampled) and weights (reweighted)."
    )
    return [Text(said + "."), Folded(f"{len(rows)} measurements", [Table([*columns, "fresh gradient"], rows, caption)])]


def _evaluations(evaluations: Rows) -> Folded:
    rows = [
        [
            f"{row['step']}",
            _number(row["heldout_reward"]),
            str(sum(number for name, number in row.items() if name.startswith("verifier/"))),
            "collapsed" if row["collapse/flag"] else _ABSENT,
        ]
        for row in evaluations
    ]
    columns = ["updates", "held-out reward", "failed samples so far", "by the rule"]
    return Folded(f"{len(rows)} evaluations", [Table(columns, rows)])


def _warnings(config: Record, result: Record, updates: Rows) -> Iterable[str]:
    done, wanted = result["num_updates"], config["num_updates"]
    last = updates[-config["max_bad_updates"] :]
    if len(last) == config["max_bad_updates"] and not any(row["update/is_finite"] for row in last):
        yield f"This run gave up after {done} of {wanted} updates: loss or gradient of the last {len(last)} are not finite."
    elif done < wanted:
        yield (
            f"This run is not finished: {done} of {wanted} updates are done. The numbers are those of what is there and will "
            "change; the same command goes on from there."
        )


def _limits(config: Record, result: Record, biases: Rows) -> Iterable[tuple[str, str]]:
    if not biases:
        why = "bias.every is 0." if not config["bias"]["every"] else "no measurement was due yet."
        yield "Staleness bias", f"not measured: {why}"
    elif not result["bias"]["detected"]:
        yield "Staleness bias", "never told from none: it lies below the detection limits, which is not to say that it is 0."
    if config["updates_per_batch"] > 1:
        reuse = f"each batch serves {config['updates_per_batch']} updates"
        yield "Independent data", f"{reuse}, so that the learner depends on its data; the bias leaves that out."
    if config["replay"] == "rollouts":
        yield "Drift from the behavior policy", "not measured in the parameters: replay of rollouts keeps no old ones."
    if not config["plan"]:
        yield "Predicted limit of the learning rate", "no plan was given (config.plan)."


def _word(dotted: str) -> str:
    return str(dotted).rpartition(".")[2]


def _number(value: float | None) -> str:
    """Four digits; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
