"""The page of a training run for `launch.report`: what was run, how reward, lag and bias went, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_async_grpo.html_report import Folded, Items, Page, Part, Picture, Section, Table, Text
from jax_async_grpo.training.pooled_bias import LEVEL, sorted_out
from jax_async_grpo.training.summary import figure, summary, title

__all__ = ["page"]

Record = Mapping[str, Any]
Rows = Sequence[Record]

_ABSENT = "–"
_CAPTION = (
    "Against learner updates. Left: mean reward of the training rollouts (pale) and of held-out questions (marked), a "
    "collapse as a dotted line. Middle, logarithmic: how far the learner is from its rollouts, as k3 estimate of the KL of "
    "a token in nats, and the norm of the update of the parameters. Right, where it was measured: ‖δ‖², the squared "
    "staleness bias of the gradient, each estimate with its standard error, over the mean squared norm of the fresh "
    "gradient (1: as large as that). The estimates are unbiased, so that noise makes some negative; the axis is linear "
    "around 0 and logarithmic further out. Dashes: the squared size that one measurement would see four times in five. "
    "Band: the mean of all with its 90 % interval, in that unit, whose own error it leaves out."
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
    sections = [Section("Outcome", [_outcome(result, config, updates), *_picture(folder, rows, updates, title(config))])]
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


def _picture(folder: Path, rows: Rows, updates: Rows, said: str) -> list[Picture]:
    if not updates:
        return []
    figure(rows, folder, said)
    return [Picture(folder / "train.svg", _CAPTION)]


def _bias(result: Record, biases: Rows) -> list[Part]:
    """What single measurements could see, what all of them say together, and every one."""
    found, kinds = result["bias"], sorted_out(biases)
    nothing = {row["step"] for kind in ("without_lag", "without_gradient", "not_finite") for row in kinds[kind]}
    rows = [
        [
            f"{row['step']}",
            *(_number(row[f"bias/{name}"]) for name in ("norm_squared", "norm", "standard_error", "detection_limit")),
            _number(row["fresh_norm_squared"]),
            *(_number(row[f"bias/{name}"]) for name in ("relative_norm", "cosine")),
            "nothing to measure" if row["step"] in nothing else "yes" if row["detected"] else "no",
            _number(row["ess_ratio"]),
            str(row["method"]),
        ]
        for row in biases
    ]
    columns = ["update", "‖δ‖²", "‖δ‖", "standard error", "detection limit", "‖H(θ,θ)‖²", "over the fresh gradient", "cosine"]
    caption = (
        "‖δ‖², and ‖H(θ,θ)‖² of the fresh gradient, by a U-statistic over blocks of prompts: unbiased, and negative where "
        "noise makes it so. ‖δ‖: its root, 0 where it is negative; the standard error is that of ‖δ‖. Cosine of the stale "
        "with the fresh gradient: a ratio of unbiased estimates, which noise takes beyond 1; none where a squared norm is "
        "not estimated as positive. ESS: effective share of the groups, by which the next measurement chooses between fresh "
        "rollouts (sampled) and weights (reweighted)."
    )
    table = Table([*columns, "detected", "ESS", "fresh gradient"], rows, caption)
    return [Items(list(_said_of_bias(found))), Folded(f"{len(rows)} measurements", [table])]


def _said_of_bias(found: Record) -> Iterable[tuple[str, str]]:
    left_out = {
        "without_lag": "without lag, where δ is 0",
        "without_gradient": "where at most one block of prompts had a gradient (nearly all rewards equal)",
        "not_finite": "not finite",
    }
    words = " and ".join(f"{found[kind]} {why}" for kind, why in left_out.items() if found[kind])
    yield "Measurements", f"{found['measured']}" + (f"; nothing to measure in {words}: not counted below." if words else ".")
    if not found["pooled"]:
        return
    times = found["relative_detection_limit_median"]
    beside = "" if times is None else f", {times:.3g} times the root mean square of the fresh gradient"
    yield (
        "One by one",
        f"told from none in {found['detected']} of {found['pooled']}, where chance alone does so in one of 20. One measurement "
        f"sees a ‖δ‖ of {found['detection_limit_median']:.3g} (median of the detection limits) four times in five{beside}.",
    )
    yield "All together", _pooled_words(found)


def _pooled_words(found: Record) -> str:
    squared, fresh, ratio = (found[name] for name in ("norm_squared", "fresh_norm_squared", "relative_norm_squared"))
    if squared["interval"] is None:
        return "one measurement: no interval."
    low, high = squared["interval"]
    said = (
        f"the mean of ‖δ‖² over these measurements, each of its own θ, is estimated as {squared['mean']:.3g} ± "
        f"{squared['standard_error']:.2g} (standard error), {100 * LEVEL:g} % interval [{low:.3g}, {high:.3g}]; that of the "
        f"squared fresh gradient as {fresh['mean']:.3g} ± {fresh['standard_error']:.2g}. "
    )
    if ratio["interval"] is None:
        said += "The gradient itself cannot be told from 0, so that nothing is said of their ratio"
    else:
        said += f"Their ratio: {ratio['estimate']:.3g} [{ratio['interval'][0]:.3g}, {ratio['interval'][1]:.3g}]"
    if low > 0:
        return f"{said}. The first interval is above 0: together they tell the bias from none (by chance one run in 20)."
    said += ". The first interval is not above 0: together they do not tell the bias from none"
    if ratio["interval"] is None or ratio["interval"][1] <= 0:
        return f"{said}."
    largest = math.sqrt(ratio["interval"][1])
    return f"{said}, nor exclude one of up to {largest:.2g} times the gradient (root mean squares)."


def _evaluations(evaluations: Rows) -> Folded:
    rows = [
        [
            f"{row['step']}",
            _number(row["heldout_reward"]),
            str(sum(number for name, number in row.items() if name.startswith("verifier/"))),
            "collapsed" if row["collapse/flag"] else "no",
        ]
        for row in evaluations
    ]
    columns = ["updates", "held-out reward", "failed samples so far", "collapse"]
    caption = (
        "Collapse: whether the rewards up to there have fallen by config.rule, which is asked from the fourth evaluation on."
    )
    return Folded(f"{len(rows)} evaluations", [Table(columns, rows, caption)])


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
        yield "Staleness bias", _unseen(result["bias"])
    if config["updates_per_batch"] > 1:
        reuse = f"each batch serves {config['updates_per_batch']} updates"
        yield "Independent data", f"{reuse}, so that the learner depends on its data; the bias leaves that out."
    if config["replay"] == "rollouts":
        yield "Drift from the behavior policy", "not measured in the parameters: replay of rollouts keeps no old ones."
    if not config["plan"]:
        yield "Predicted limit of the learning rate", "no plan was given (config.plan)."


def _unseen(found: Record) -> str:
    if not found["pooled"]:
        return "no measurement had anything to measure."
    times = found["relative_detection_limit_median"]
    size = f"{times:.3g} times the fresh gradient" if times is not None else f"norm {found['detection_limit_median']:.3g}"
    return f"no measurement told it from none, which is not to say that it is 0: the median detection limit is {size}."


def _word(dotted: str) -> str:
    return str(dotted).rpartition(".")[2]


def _number(value: float | None) -> str:
    """Four digits; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
