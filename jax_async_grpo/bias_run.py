"""The chunked loop of a bias measurement: runs what is not recorded yet, checks the invariants, appends the records.

Records in metrics.jsonl, one JSON object a line, told apart by `kind`: "measurement" (one cell at one measured step),
"cell" (the MSD curve of one cell), "response" (the same weighted by the response of H, along runs without lag, where updates
are sampled), "chunk" (written last, so that a chunk without it does not count) and "diagnostics" (once
per case). Everything reported later is recomputed from them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import diagnostics, invariants, scaling, sweeps
from jax_async_grpo.experiment import MIN_CYCLES, Case, Chunk, build_case, chunks
from jax_async_grpo.records import Workdir

__all__ = ["finished_chunks", "has_min_cycles", "run_chunks"]

_MEASURED = (
    "bias/norm",
    "bias/relative_norm",
    "bias/cosine",
    "grad/norm",
    "drift/from_behavior",
    "drift/cumulative",
    "staleness/configured",
    "staleness/realised",
)


def run_chunks(config: Mapping[str, Any], workdir: Workdir, on_progress: Callable[[Chunk, float], None]) -> None:
    """Measures every chunk and diagnostic that the workdir does not hold yet.

    Args:
      config: validated.
      workdir: where the records go.
      on_progress: called after each chunk with it and its seconds (0 for one that was recorded before).

    Raises:
      invariants.InvariantViolation: naming invariant, step and value; nothing of that chunk is recorded.
    """
    rows = workdir.read_metrics()
    done = finished_chunks(rows)
    diagnosed = {row["case"] for row in rows if row["kind"] == "diagnostics"}
    planned = chunks(config)
    for name in config["cases"]:
        mine = [chunk for chunk in planned if chunk.case == name]
        if name in diagnosed and all(chunk.name in done for chunk in mine):
            for chunk in mine:
                on_progress(chunk, 0.0)
            continue
        case = build_case(config, name)
        programs = {updates: _compile(case, updates) for updates in case.config["updates"]}
        for chunk in mine:
            reference = _reference_cell(case, chunk) if name not in diagnosed else None
            if chunk.name in done and reference is None:
                on_progress(chunk, 0.0)
                continue
            start = time.perf_counter()
            learned = [_response_row(config, case, chunk)] if _is_response_chunk(case, chunk) else []
            measured = _run_chunk(config, case, chunk, programs[chunk.updates], mine)
            if reference is not None:
                workdir.append_metrics([_diagnose(config, case, chunk, reference, measured)])
            if chunk.name not in done:
                seconds = time.perf_counter() - start
                workdir.append_metrics([*_rows(case, chunk, measured), *learned, _chunk_row(chunk, seconds)])
            on_progress(chunk, time.perf_counter() - start)


def finished_chunks(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the chunks whose records are complete."""
    return {row["chunk"] for row in rows if row["kind"] == "chunk"}


def has_min_cycles(max_staleness: int, learning_rate: float, time_window: tuple[float, float]) -> bool:
    """True where the η·t window spans at least four sync cycles of S + 1 updates, which a cell needs to enter a fit."""
    return (time_window[1] - time_window[0]) / learning_rate >= MIN_CYCLES * (max_staleness + 1)


def _compile(case: Case, updates: str) -> Callable:
    return sweeps.bias_grid(
        case.gradient,
        case.update_gradient(updates),
        case.rewards,
        case.optimizer_fn,
        capacity=_capacity(case),
        vectorize=case.config["vectorize"],
    )


def _capacity(case: Case) -> int:
    """K; at least 2, since the norm of one update is read off the ring."""
    return max(*case.config["max_staleness"], 1) + 1


def _keys(config, seeds) -> jax.Array:
    root = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    return jax.vmap(lambda seed: jax.random.fold_in(root, seed))(np.asarray(seeds))


def _run_chunk(config, case: Case, chunk: Chunk, program: Callable, siblings: list[Chunk]) -> sweeps.CellMeasurements:
    longest = max(other.num_updates for other in siblings)  # one static shape for all learning rates
    schedules = chunk.staleness(config["seed"], longest)
    keys = _keys(config, [cell.seed for cell in chunk.cells])
    measured = jax.device_get(program(case.params, chunk.learning_rate, schedules, keys, chunk.measure_steps))
    tolerances = invariants.default_tolerances(np.float64) | {"zero_bias_at_zero_staleness": 0.0}
    for cell, index in zip(chunk.cells, range(len(chunk.cells)), strict=True):
        violations = {name: value[index] for name, value in measured.violations.items()}
        try:
            invariants.check(violations, chunk.measure_steps, tolerances)
        except invariants.InvariantViolation as violation:
            where = f"{chunk.name}, {cell.schedule} S={cell.max_staleness} seed {cell.seed}"
            raise invariants.InvariantViolation(f"{where}: {violation}") from None
    return measured


def _rows(case: Case, chunk: Chunk, measured: sweeps.CellMeasurements) -> list[dict[str, Any]]:
    rows = []
    for index, cell in enumerate(chunk.cells):
        identity = {
            "chunk": chunk.name,
            "case": case.name,
            **case.labels,
            "updates": chunk.updates,
            **dataclasses.asdict(cell),
            "learning_rate": chunk.learning_rate,
        }
        for column, step in enumerate(chunk.measure_steps):
            numbers = {name: measured.values[name][index, column].item() for name in _MEASURED}
            numbers |= {name: value[index, column].item() for name, value in measured.reward.items()}
            rows.append({"kind": "measurement", **identity, "step": int(step), **numbers})
        # the ring is full at every measured step, so the mean over steps is over the same lags everywhere
        rows.append({"kind": "cell", **identity, "msd": measured.msd[index].mean(axis=0).tolist()})
    return rows


def _chunk_row(chunk: Chunk, seconds: float) -> dict[str, Any]:
    return {
        "kind": "chunk",
        "chunk": chunk.name,
        "case": chunk.case,
        "updates": chunk.updates,
        "learning_rate": chunk.learning_rate,
        "num_cells": len(chunk.cells),
        "num_updates": chunk.num_updates,
        "seconds": round(seconds, 3),
    }


def _reference_cell(case: Case, chunk: Chunk) -> int | None:
    """The cell whose last (θ, φ) the diagnostics use, if it lies in this chunk: chosen by inputs alone.

    Exact updates where there are any, the middle learning rate, the fixed schedule (else the first), and the largest S whose
    S·η lies in the fit window.
    """
    updates = "exact" if "exact" in case.config["updates"] else "sampled"
    if chunk.updates != updates or chunk.learning_rate != _middle_learning_rate(case):
        return None
    schedule = "fixed" if "fixed" in case.config["schedules"] else case.config["schedules"][0]
    low, high = case.config["fit_window"]
    candidates = [
        (cell.max_staleness, -index)
        for index, cell in enumerate(chunk.cells)
        if cell.schedule == schedule and cell.seed == 0 and cell.max_staleness > 0
    ]
    inside = [c for c in candidates if low <= c[0] * chunk.learning_rate <= high]
    chosen = max(inside) if inside else min(candidates, default=None)
    return None if chosen is None else -chosen[1]


def _middle_learning_rate(case: Case) -> float:
    rates = sorted(case.config["learning_rates"])
    return rates[(len(rates) - 1) // 2]


def _is_response_chunk(case: Case, chunk: Chunk) -> bool:
    """Runs without lag predict the bias of sampled updates once, at the middle learning rate."""
    return (
        chunk.updates == "sampled" and 0 in case.config["max_staleness"] and chunk.learning_rate == _middle_learning_rate(case)
    )


def _response_row(config, case: Case, chunk: Chunk) -> dict[str, Any]:
    """What runs without lag, with the seeds of the chunk, say about the bias at every lag."""
    seeds = sorted({cell.seed for cell in chunk.cells})
    program = sweeps.response_msd(
        case.gradient,
        case.update_gradient(chunk.updates),
        case.optimizer_fn,
        capacity=_capacity(case),
        vectorize=case.config["vectorize"],
    )
    measured = program(case.params, chunk.learning_rate, _keys(config, seeds), chunk.measure_steps)
    return {
        "kind": "response",
        "chunk": chunk.name,
        "case": case.name,
        **case.labels,
        "updates": chunk.updates,
        "learning_rate": chunk.learning_rate,
        "seeds": seeds,
        "response_msd": np.asarray(measured).mean(axis=1).tolist(),
    }


def _diagnose(config, case: Case, chunk: Chunk, index: int, measured: sweeps.CellMeasurements) -> dict[str, Any]:
    """First-order law, parts by role, radii and the two-constraint limit at the reference cell."""
    cell = chunk.cells[index]
    learner, behavior = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), tree)
        for tree in (measured.learner_params, measured.behavior_params)
    )
    realised = int(measured.values["staleness/realised"][index, -1])
    row = {
        "kind": "diagnostics",
        "case": case.name,
        **case.labels,
        "updates": chunk.updates,
        **dataclasses.asdict(cell),
        "learning_rate": chunk.learning_rate,
        "step": int(chunk.measure_steps[-1]),
        "drift": float(optax.tree.norm(optax.tree.sub(learner, behavior))),
    }
    if realised and case.config["first_order"]:
        violations = diagnostics.invariant_violations(case, learner)
        invariants.check(violations, row["step"], invariants.default_tolerances(np.float64))
        row["linear_response"] = diagnostics.linear_response(case, learner, behavior, realised * chunk.learning_rate)
        row["decomposition"] = diagnostics.decomposition(case, learner, behavior)
    if realised:
        radius = diagnostics.batch_clip_radius(
            case, learner, behavior, level=config["clip_level"], epsilons=tuple(config["clip_epsilons"])
        )
    else:
        radius = math.inf  # no drift, no direction
    collapse = diagnostics.collapse_radius(case, fraction=config["collapse_fraction"])
    msd = measured.msd[index].mean(axis=0)
    row["limit"] = _limit(chunk, cell.max_staleness, msd, radius, collapse["critical_drift_radius"]) | {"collapse": collapse}
    return row


def _limit(chunk: Chunk, max_staleness: int, msd: np.ndarray, clip_radius: float, critical_radius: float) -> dict[str, Any]:
    """The two-constraint limit for the reference cell's S and T, from its own measured drift."""
    update_norm = math.sqrt(msd[1]) / chunk.learning_rate
    limit = scaling.max_stable_learning_rate(
        max_staleness=max_staleness,
        horizon=chunk.num_updates,
        update_norm=update_norm,
        batch_clip_radius=clip_radius,
        critical_drift_radius=critical_radius,
        drift_per_learning_rate=math.sqrt(msd[max_staleness]) / chunk.learning_rate if max_staleness else None,
    )
    return dataclasses.asdict(limit) | {
        "update_norm": update_norm,
        "batch_clip_radius": clip_radius,
        "critical_drift_radius": critical_radius,
        "learning_rate": chunk.learning_rate,
        "headroom": limit.headroom(chunk.learning_rate),
        "staleness_budget": scaling.staleness_budget_line(limit, chunk.learning_rate),
    }
