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
from jax_async_grpo.types import Params

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
      invariants.InvariantViolation: naming chunk, run, invariant, step and value. A chunk that violates one is not recorded;
        one whose diagnostics do is.
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
        rollout_violations = diagnostics.rollout_violations(case)
        for chunk in mine:
            reference = _reference_cell(case, chunk) if name not in diagnosed else None
            if chunk.name in done and reference is None:
                on_progress(chunk, 0.0)
                continue
            start = time.perf_counter()
            measured = _run_chunk(config, case, chunk, programs[chunk.updates], mine)
            if chunk.updates == "sampled":
                _check_rollouts(config, case, chunk, measured, rollout_violations)
            if chunk.name not in done:
                learned = [_response_row(config, case, chunk)] if _is_response_chunk(case, chunk) else []
                seconds = time.perf_counter() - start
                workdir.append_metrics([*_rows(case, chunk, measured), *learned, _chunk_row(chunk, seconds)])
            if reference is not None:  # after the chunk's own rows: what goes wrong here costs none of them
                workdir.append_metrics([_diagnose(config, case, chunk, reference, measured, rollout_violations)])
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
    measured = jax.device_get(program(case.params, chunk.learning_rate, schedules, keys, _padded_steps(chunk, siblings)))
    per_step = [jax.tree.map(lambda x: x[:, : len(chunk.measure_steps)], part) for part in measured[:4]]
    measured = sweeps.CellMeasurements(*per_step, *measured[4:])
    for index in range(len(chunk.cells)):
        violations = {name: value[index] for name, value in measured.violations.items()}
        _check(case, chunk, index, violations, chunk.measure_steps)
    return measured


def _padded_steps(chunk: Chunk, siblings: list[Chunk]) -> np.ndarray:
    """The measured steps, the last one repeated until all chunks of a case have the same number: one static shape."""
    most = max(len(other.measure_steps) for other in siblings)
    return np.pad(chunk.measure_steps, (0, most - len(chunk.measure_steps)), mode="edge")


def _check(case: Case, chunk: Chunk, index: int, violations: Mapping[str, Any], steps) -> None:
    """Raises InvariantViolation with the run it happened in."""
    cell = chunk.cells[index]
    applicable = {name: value for name, value in violations.items() if not isinstance(value, str)}
    try:
        invariants.check(applicable, steps, diagnostics.tolerances(case.params))
    except invariants.InvariantViolation as violation:
        where = f"{chunk.name}, {cell.schedule} S={cell.max_staleness} seed {cell.seed}"
        raise invariants.InvariantViolation(f"{where}: {violation}") from None


def _check_rollouts(config, case: Case, chunk: Chunk, measured: sweeps.CellMeasurements, rollout_violations: Callable) -> None:
    """The rollouts of the run with the largest lag, at its last measured step; one run speaks for the program of all."""
    index = int(np.argmax(measured.pair_staleness))
    (key,) = _keys(config, [chunk.cells[index].seed])
    step, lag = int(chunk.measure_steps[-1]), int(measured.pair_staleness[index])
    _check(case, chunk, index, rollout_violations(key, *_pair(measured, index), step, lag), step)


def _pair(measured: sweeps.CellMeasurements, index: int) -> tuple[Params, Params]:
    """(θ_t, θ_{t−s}) of a run; see `sweeps.CellMeasurements`."""
    learner, behavior = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), tree)
        for tree in (measured.learner_params, measured.behavior_params)
    )
    return learner, behavior


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
        "num_measurements": len(chunk.measure_steps),
        "seconds": round(seconds, 3),
    }


def _reference_cell(case: Case, chunk: Chunk) -> int | None:
    """The cell whose last (θ, φ) the diagnostics use, if it lies in this chunk: chosen by inputs alone.

    Exact updates where there are any, the middle learning rate, the fixed schedule (else the first), and the largest S whose
    S·η lies in the fit window; else the smallest S > 0, and S = 0 where there is no other.
    """
    updates = "exact" if "exact" in case.config["updates"] else "sampled"
    if chunk.updates != updates or chunk.learning_rate != _middle_learning_rate(case):
        return None
    schedule = "fixed" if "fixed" in case.config["schedules"] else case.config["schedules"][0]
    low, high = case.config["fit_window"]
    candidates = [
        (cell.max_staleness, -index) for index, cell in enumerate(chunk.cells) if cell.schedule == schedule and cell.seed == 0
    ]
    stale = [c for c in candidates if c[0] > 0]
    inside = [c for c in stale if low <= c[0] * chunk.learning_rate <= high]
    return -(max(inside) if inside else min(stale or candidates))[1]


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


def _diagnose(
    config, case: Case, chunk: Chunk, index: int, measured: sweeps.CellMeasurements, rollout_violations: Callable
) -> dict[str, Any]:
    """First-order law, parts by role, radii and the two-constraint limit at the reference cell; None = not measured."""
    start = time.perf_counter()
    cell = chunk.cells[index]
    learner, behavior = _pair(measured, index)
    lag = int(measured.pair_staleness[index])
    drift = float(optax.tree.norm(optax.tree.sub(learner, behavior)))
    row = {
        "kind": "diagnostics",
        "case": case.name,
        **case.labels,
        "updates": chunk.updates,
        **dataclasses.asdict(cell),
        "learning_rate": chunk.learning_rate,
        "step": int(chunk.measure_steps[-1]),
        "pair_staleness": lag,
        "drift": drift,
        "invariants": None,
        "linear_response": None,
        "decomposition": None,
    }
    if case.config["first_order"]:
        row["invariants"] = diagnostics.invariant_violations(case, learner, rollout_violations)
        _check(case, chunk, index, row["invariants"], row["step"])
    if case.config["first_order"] and drift > 0:
        row["linear_response"] = diagnostics.linear_response(case, learner, behavior, lag * chunk.learning_rate)
        row["decomposition"] = diagnostics.decomposition(case, learner, behavior)
    search = {"batch_clip_radius": None, "largest_searched": None}
    if drift > 0:  # without a drift there is no direction to look along
        epsilons = tuple(config["clip_epsilons"])
        search = diagnostics.batch_clip_radius(case, learner, behavior, level=config["clip_level"], epsilons=epsilons)
    collapse = diagnostics.collapse_radius(case, fraction=config["collapse_fraction"])
    row["limit"] = _limit(chunk, cell.max_staleness, measured.msd[index].mean(axis=0), search, collapse)
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def _limit(
    chunk: Chunk, max_staleness: int, msd: np.ndarray, search: Mapping[str, Any], collapse: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The two-constraint limit for the reference cell's S and T, from its own measured drift; None where nothing moved."""
    if not msd[1] > 0:
        return None
    clip_radius, critical_radius = search["batch_clip_radius"], collapse["critical_drift_radius"]
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
        "largest_clip_radius_searched": search["largest_searched"],
        "critical_drift_radius": critical_radius,
        "collapse": dict(collapse),
        "learning_rate": chunk.learning_rate,
        "headroom": limit.headroom(chunk.learning_rate),
        "staleness_budget": scaling.staleness_budget_line(limit, chunk.learning_rate),
    }
