"""Records of a bias measurement -> cells, fits, the test of ‖δ‖ ∝ √MSD, summary.json; recomputed from the records alone."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo import scaling
from jax_async_grpo.bias_run import finished_chunks, has_min_cycles
from jax_async_grpo.experiment import chunks

__all__ = ["PREDICTIONS", "cells", "fits", "radii", "summary", "text_report"]

Row = Mapping[str, Any]

_CELL_KEYS = (
    "case",
    "policy",
    "task",
    "optimizer",
    "loss",
    "updates",
    "schedule",
    "max_staleness",
    "learning_rate",
    "seed",
)

PREDICTIONS = {
    "drift": "drift of the same cells",
    "msd": "sqrt(MSD) of runs without lag",
    "response_msd": "first-order law along runs without lag, same seeds",
}


def cells(rows: Sequence[Row], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per run: root mean squares over the measured steps, and whether it entered the fit (by its inputs alone).

    Args:
      rows: of metrics.jsonl; chunks that were cut off are left out.
      config: of the run.

    Returns:
      Rows as `report.bias_figure` draws them.
    """
    done = finished_chunks(rows)
    groups = collections.defaultdict(dict)  # keyed by step too: a chunk that was cut off and run again is not counted twice
    curves = {}
    for row in rows:
        if row.get("chunk") not in done:
            continue
        key = tuple(row.get(name) for name in _CELL_KEYS)
        if row["kind"] == "measurement":
            groups[key][row["step"]] = row
        elif row["kind"] == "cell":
            curves[key] = row["msd"]
    return [_cell(key, list(steps.values()), curves[key], config) for key, steps in groups.items()]


def fits(cell_rows: Sequence[Row], responses: Mapping[str, Row], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bias law of every case, kind of updates and schedule, and over all schedules, with bootstrap intervals.

    Sampled updates resample whole seeds, exact updates resample cells. Each fit carries `predictions`, the exponents that drift
    alone gives for the same cells, with the paired interval of (bias − prediction) in S:
      "drift": the drift ‖θ−φ‖ of the cells themselves;
      "msd": √MSD(s) of the runs without lag;
      "response_msd": the same weighted by the response of H (`sweeps.response_msd`), where updates are sampled: the first-order
        law along runs without lag, with the same seeds. It is measured at one η, so it has no exponent in η.
    `rejected` says whether that interval leaves out 0, for sampled updates; for exact ones the interval is of how straight the
    lines are and rejects nothing. `local_exponents` are a_S between neighboring S: where the curve bends, a_S depends on the
    range of S, `staleness_range`. A setting with too few cells in its window gets no fit.

    Args:
      cell_rows: from `cells`.
      responses: {case: its "response" row}.
      config: of the run.
    """
    result = []
    for name, part in config["cases"].items():
        for updates in part["updates"]:
            mine = [c for c in cell_rows if c["case"] == name and c["updates"] == updates and c["staleness_rms"] > 0]
            schedules = list(dict.fromkeys(c["schedule"] for c in mine))
            for schedule in schedules + (["all"] if len(schedules) > 1 else []):
                chosen = [c for c in mine if schedule in ("all", c["schedule"]) and c["in_window"]]
                fit = _fit(chosen, schedule, _predictions(chosen, cell_rows, responses.get(name)), config)
                if fit is not None:
                    result.append(fit)
    return result


def summary(rows: Sequence[Row], config: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json: fits, first-order law, parts by role, limit, MSD exponents, seconds, and whether every chunk is there."""
    cell_rows = cells(rows, config)
    diagnosed = {row["case"]: row for row in rows if row["kind"] == "diagnostics"}
    measured = {row["chunk"]: row["seconds"] for row in rows if row["kind"] == "chunk"}
    responses = {row["case"]: row for row in rows if row["kind"] == "response" and row["chunk"] in measured}
    return {
        "complete": all(chunk.name in measured for chunk in chunks(config)) and set(diagnosed) == set(config["cases"]),
        "fits": fits(cell_rows, responses, config),
        "msd": _msd_exponents(cell_rows, config),
        "linear_response_error": {case: row.get("linear_response") for case, row in diagnosed.items()},
        "decomposition": {case: row.get("decomposition") for case, row in diagnosed.items()},
        "stability_limit": {case: row["limit"] for case, row in diagnosed.items()},
        "num_cells": len(cell_rows),
        "max_bias_without_staleness": max((c["bias_rms"] for c in cell_rows if c["max_staleness"] == 0), default=None),
        "seconds": sum(measured.values()) + sum(row["seconds"] for row in diagnosed.values()),
        "versions": dict(versions),
    }


def text_report(result: Mapping[str, Any]) -> str:
    """What the job prints below the table of fits: prediction from drift, first-order law, parts by role, limits."""
    lines = ["", "Exponent in S of the bias, and what predicts it for the same cells (interval of the difference):"]
    for fit in result["fits"]:
        siblings = [f for f in result["fits"] if (f["case"], f["updates"]) == (fit["case"], fit["updates"])]
        if fit["schedule"] != "all" and len(siblings) > 1:
            continue
        low, high = fit["staleness_range"]
        lines.append(f"  {fit['case'] + ', ' + fit['updates']:<28} a_S {fit['staleness_exponent']:.3f} over S = {low}..{high}")
        lines.append(f"    between neighboring S: {', '.join(map(_local, fit['local_exponents']))}")
        for name, prediction in fit["predictions"].items():
            low, high = prediction["difference_interval"]
            lines.append(
                f"    {PREDICTIONS[name]:<52} {prediction['staleness_exponent']:.3f}  [{low:+.3f}, {high:+.3f}]"
                f"{'  rejected' if prediction['rejected'] else ''}"
            )
        if any(fit["predictions"].get(name, {}).get("rejected") for name in ("drift", "msd")):
            lines.append("    bias proportional to the distance |theta - phi|, hence to sqrt(MSD), is rejected here")
    for curve in result["msd"]:
        lines.append(
            f"  {curve['case'] + ', ' + curve['updates']:<28} MSD(s) ~ s^{curve['exponent']:.2f} "
            f"[{curve['interval'][0]:.2f}, {curve['interval'][1]:.2f}] without lag (2 ballistic, 1 diffusive): a_S = "
            f"{curve['exponent'] / 2:.2f}"
        )
    lines += ["", "One jvp predicts the bias (relative error at S*eta = 1e-3; its slope in drift), and the parts of the bias:"]
    for case, response in result["linear_response_error"].items():
        if response is None:
            continue
        share = result["decomposition"][case]["share"]
        parts = ", ".join(f"{name} {value:+.0%}" for name, value in share.items())
        lines.append(f"  {case:<28} {response['relative_error_at_1e-3']:.1e}, slope {response['slope']:.3f}; {parts}")
    lines += ["", "Two-constraint limit of the learning rate, eta << min(R_batch/drift per eta, R_crit/(T*G_upd)):"]
    for case, limit in result["stability_limit"].items():
        if limit is None:
            lines.append(f"  {case:<28} not measured: nothing moved")
            continue
        lines += [f"  {case:<28} {limit['staleness_budget']}", f"  {'':<28} {', '.join(radii(limit))}"]
    return "\n".join(lines)


def _cell(key, steps: Sequence[Row], msd: Sequence[float], config) -> dict[str, Any]:
    cell = dict(zip(_CELL_KEYS, key, strict=True))

    def rms(name):
        return math.sqrt(np.mean(np.square([float(row[name]) for row in steps])))

    part = config["cases"][cell["case"]]
    staleness_rms = rms("staleness/realised")
    window = scaling.in_window([staleness_rms * cell["learning_rate"]], tuple(part["fit_window"]))[0]
    return cell | {
        "staleness_rms": staleness_rms,
        "bias_rms": rms("bias/norm"),
        "relative_bias_rms": rms("bias/relative_norm"),
        "drift_rms": rms("drift/from_behavior"),
        "lags": [row["staleness/realised"] for row in steps],
        "reward_last": steps[-1]["reward"],
        "msd": list(msd),
        "in_window": bool(
            window and staleness_rms > 0 and has_min_cycles(cell["max_staleness"], cell["learning_rate"], part["time_window"])
        ),
    }


def _predictions(chosen: Sequence[Row], cell_rows: Sequence[Row], response: Row | None) -> dict[str, np.ndarray]:
    """{name: [n] predicted rms bias of the chosen cells, up to one factor}, from drift alone."""
    result = {"drift": np.array([c["drift_rms"] for c in chosen])}
    free = {(c["case"], c["updates"], c["learning_rate"], c["seed"]): c["msd"] for c in cell_rows if c["max_staleness"] == 0}
    curves = [free.get((c["case"], c["updates"], c["learning_rate"], c["seed"])) for c in chosen]
    if curves and all(curve is not None for curve in curves):
        result["msd"] = np.array([_rms_over_lags(curve, c) for curve, c in zip(curves, chosen, strict=True)])
    if response is not None and chosen and chosen[0]["updates"] == response["updates"]:
        by_seed = dict(zip(response["seeds"], response["response_msd"], strict=True))
        # measured at one learning rate; a drift of s updates scales with it
        scale = [c["learning_rate"] / response["learning_rate"] for c in chosen]
        result["response_msd"] = np.array(
            [k * _rms_over_lags(by_seed[c["seed"]], c) for k, c in zip(scale, chosen, strict=True)]
        )
    return result


def _rms_over_lags(curve: Sequence[float], cell: Row) -> float:
    """√ of the curve's mean over the lags the cell had at its measured steps."""
    return math.sqrt(np.mean([curve[lag] for lag in cell["lags"]]))


def _fit(chosen: Sequence[Row], schedule: str, predictions: Mapping[str, np.ndarray], config) -> dict[str, Any] | None:
    """One entry of `fits`, or None where the cells inside the window cannot determine two exponents and their intervals."""
    inputs = np.array([[c["staleness_rms"], c["learning_rate"]] for c in chosen])
    if len(chosen) < 4 or min(len(np.unique(column.round(12))) for column in inputs.T) < 2:
        return None
    part = config["cases"][chosen[0]["case"]]
    variable = part["fit_variable"]
    groups = [c["seed"] for c in chosen] if chosen[0]["updates"] == "sampled" else None
    if groups is not None and len(set(groups)) < 2:
        return None
    options = dict(groups=groups, num_bootstrap=config["num_bootstrap"], confidence=config["confidence"], seed=config["seed"])
    bias_rms = np.array([c["bias_rms"] for c in chosen])
    both = scaling.fit_power_law(inputs, bias_rms, **options)
    single = scaling.fit_power_law(predictions["drift"] if variable == "drift" else inputs.prod(axis=1), bias_rms, **options)
    return {key: chosen[0][key] for key in ("case", "policy", "task", "optimizer", "loss", "updates")} | {
        "schedule": schedule,
        "variable": variable,
        "staleness_exponent": float(both.exponents[0]),
        "learning_rate_exponent": float(both.exponents[1]),
        "exponent": float(single.exponents[0]),
        "intervals": {
            "staleness_exponent": both.intervals[0].tolist(),
            "learning_rate_exponent": both.intervals[1].tolist(),
            "exponent": single.intervals[0].tolist(),
        },
        "r_squared": both.r_squared if variable != "drift" else single.r_squared,
        "num_cells": len(chosen),
        "window": list(part["fit_window"]),
        "staleness_range": [min(c["max_staleness"] for c in chosen), max(c["max_staleness"] for c in chosen)],
        "local_exponents": _local_exponents(chosen, options),
        "predictions": {name: _prediction(name, both, inputs, y, options) for name, y in predictions.items()},
    }


def _prediction(name: str, fit: scaling.PowerLawFit, inputs: np.ndarray, predicted: np.ndarray, options) -> dict[str, Any]:
    """The exponents of predicted values over the same cells, and the interval of (measured − predicted) in S."""
    own = scaling.fit_power_law(inputs, predicted, **options)
    low, high = scaling.bootstrap_difference(fit, own, confidence=options["confidence"]).intervals[0].tolist()
    return {
        "staleness_exponent": float(own.exponents[0]),
        "learning_rate_exponent": None if name == "response_msd" else float(own.exponents[1]),  # 1 by construction there
        "staleness_interval": own.intervals[0].tolist(),
        "difference_interval": [low, high],
        "rejected": options["groups"] is not None and not low <= 0 <= high,
    }


def _local_exponents(chosen: Sequence[Row], options) -> list[dict[str, Any]]:
    """The slope in S_rms of log ‖δ‖ between neighboring S, over the pairs of cells that share schedule, η and seed."""
    by_staleness = collections.defaultdict(dict)
    for c in chosen:
        by_staleness[c["max_staleness"]][c["schedule"], c["learning_rate"], c["seed"]] = c
    result = []
    for low, high in itertools.pairwise(sorted(by_staleness)):
        shared = [key for key in by_staleness[low] if key in by_staleness[high]]
        pairs = [(by_staleness[low][key], by_staleness[high][key]) for key in shared]
        if pairs:
            result.append({"max_staleness": [low, high], **_local_exponent(pairs, [seed for *_, seed in shared], options)})
    return result


def _local_exponent(pairs: Sequence[tuple[Row, Row]], seeds: Sequence[int], options) -> dict[str, Any]:
    """Least squares over pairs, each about its own mean: what η and schedule do to the level drops out."""
    log_x, log_y = (np.log([[c[name] for c in pair] for pair in pairs]) for name in ("staleness_rms", "bias_rms"))
    x, y = (np.exp(z - z.mean(axis=1, keepdims=True)).ravel() for z in (log_x, log_y))
    groups = np.repeat(np.arange(len(pairs)) if options["groups"] is None else seeds, 2)
    exponent, interval = float(np.log(x) @ np.log(y) / (np.log(x) @ np.log(x))), None
    if len(np.unique(groups)) > 1:
        interval = scaling.fit_power_law(x, y, **options | {"groups": groups}).intervals[0].tolist()
    return {"exponent": exponent, "interval": interval, "num_pairs": len(pairs)}


def _msd_exponents(cell_rows: Sequence[Row], config) -> list[dict[str, Any]]:
    """γ of MSD(s) ∝ s^γ along the runs without lag, per case and kind of updates, at the smallest learning rate."""
    result = []
    for name, part in config["cases"].items():
        for updates in part["updates"]:
            free = [
                c
                for c in cell_rows
                if (c["case"], c["updates"], c["max_staleness"]) == (name, updates, 0)
                and c["learning_rate"] == min(part["learning_rates"])
                and c["schedule"] == part["schedules"][0]
            ]
            curves = [(lag, value, c["seed"]) for c in free for lag, value in enumerate(c["msd"]) if lag and value > 0]
            if len({lag for lag, *_ in curves}) < 3:
                continue
            lags, msd, seeds = (np.array(column) for column in zip(*curves, strict=True))
            groups = seeds if updates == "sampled" and len(set(seeds)) > 1 else None
            fit = scaling.msd_exponent(
                lags, msd, groups=groups, num_bootstrap=config["num_bootstrap"], confidence=config["confidence"]
            )
            result.append(
                {
                    "case": name,
                    "updates": updates,
                    "exponent": float(fit.exponents[0]),
                    "interval": fit.intervals[0].tolist(),
                    "num_runs": len(free),
                }
            )
    return result


def _local(local: Mapping[str, Any]) -> str:
    low, high = local["max_staleness"]
    interval = local["interval"]
    return f"{low}-{high} {local['exponent']:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def radii(limit: Mapping[str, Any]) -> tuple[str, str, str]:
    """G_upd, R_batch and R_crit of a case's limit in words, which say where one was not reached or not measured."""
    clip, critical, collapse = limit["batch_clip_radius"], limit["critical_drift_radius"], limit["collapse"]
    if clip is None:
        batch = "R_batch not measured"
    elif math.isinf(clip):
        batch = f"R_batch above {limit['largest_clip_radius_searched']:.3g}: the clip level is not reached before"
    else:
        batch = f"R_batch {clip:.3g}"
    if collapse["largest_drift"] is None:
        crit = "R_crit not measured"
    elif collapse["collapse_step"] is None:
        crit = f"R_crit above {collapse['largest_drift']:.3g}: no collapse in the run without lag"
    else:
        how = "" if collapse["finite"] else ", not finite"
        radius = "not known" if critical is None else f"{critical:.3g}"
        crit = f"R_crit {radius} (update {collapse['collapse_step']} of a run without lag{how})"
    return f"G_upd {limit['update_norm']:.3g}", batch, crit
