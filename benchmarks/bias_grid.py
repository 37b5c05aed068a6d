"""One compiled grid against a jitted Python loop that does the same work, in one process.

python -m benchmarks.bias_grid

A grid of runs under lag is one program: the steps are a loop inside it, the runs are vectorized (`vmap`) or taken in turn
(`lax.map`). The loop in Python calls one jitted update per step and one jitted measurement per measured step, run after run;
both are compiled beforehand, all their arguments lie on the device, and it waits once, at the end. Both sides must give the
same numbers. Repetitions alternate, so that a change of the machine's speed meets both. On the tabular bandit of the default
config the grid must be at least 5 times as fast (the exit code says so); for a transformer the ratios are printed as they are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import measure_bias
from jax_async_grpo import bias, experiment, metrics, staleness, sweeps
from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.update import create_state, update_step

REQUIRED_RATIO = 5.0
TOLERANCE = 1e-10

TABULAR = dict(learning_rates=(0.02,), time_window=(6.0, 12.0), num_measurements=48)  # 3 schedules x 7 S, 600 updates
TRANSFORMER = dict(
    policy="jax_async_grpo.policies.decoder",
    policy_options=dict(num_layers=2, width=64, num_heads=4, dtype="float64"),
    task="jax_async_grpo.tasks.digit_sum",
    task_options=dict(num_prompts=4, num_digits=2, base=4, partial_credit=True, seed=0),
    schedules=("fixed",),
    max_staleness=(0, 1, 2, 4),
    learning_rates=(1e-3,),
    time_window=(0.02, 0.04),
    num_measurements=5,
)


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    problem = Problem("tabular bandit", TABULAR)
    holds = compare(problem, {"vmap": problem.grid(vectorize=True)}, repetitions=7)
    problem = Problem("transformer, 2 layers of width 64", TRANSFORMER)
    grids = {"vmap": problem.grid(vectorize=True), "lax.map": problem.grid(vectorize=False)}
    compare(problem, grids, repetitions=3, required=None)
    return 0 if holds else 1


class Problem:
    """A case of the default config with changes, the cells of its only learning rate, and two ways to run them."""

    def __init__(self, name: str, changes: dict[str, Any]):
        config = measure_bias.get_config().to_dict()
        config["cases"] = {"case": config["cases"]["tabular"] | changes | {"updates": ("exact",)}}
        self.name, self.case, (self.chunk,) = name, experiment.build_case(config, "case"), experiment.chunks(config)
        self.schedules = jnp.asarray(self.chunk.staleness(config["seed"], self.chunk.num_updates))
        self.capacity = int(self.schedules.max()) + 1

    def grid(self, *, vectorize: bool) -> Callable[[], dict[str, jax.Array]]:
        """All cells and steps as one program."""
        case, chunk = self.case, self.chunk
        program = sweeps.bias_grid(
            case.gradient,
            case.update_gradient("exact"),
            case.rewards,
            case.optimizer_fn,
            capacity=self.capacity,
            vectorize=vectorize,
        )
        steps, keys = jnp.asarray(chunk.measure_steps), jax.random.split(jax.random.key(0), len(chunk.cells))

        def run():
            measured = program(case.params, chunk.learning_rate, self.schedules, keys, steps)
            return measured.values | measured.reward | {"msd": measured.msd}

        return run

    def loop(self) -> Callable[[], dict[str, jax.Array]]:
        """One dispatch per update and per measurement."""
        optimizer = self.case.optimizer_fn(self.chunk.learning_rate)
        measured_at = set(self.chunk.measure_steps.tolist())
        start = jax.jit(lambda params: create_state(params, optimizer, self.capacity))

        def gradient(learner_params, behavior_params, step, policy_version):
            del step, policy_version
            return self.case.gradient(learner_params, behavior_params)

        @jit_repeated
        def update(state, schedule):
            return update_step(state, schedule[state.step], gradient, optimizer)[0]

        @jit_repeated
        def measure(state, schedule):
            return self.measure(state, schedule[state.step])

        def run():
            records = []
            for schedule in schedules:
                state = start(self.case.params)
                for step in range(self.chunk.num_updates):
                    if step in measured_at:
                        records.append(measure(state, schedule))
                    if step < self.chunk.num_updates - 1:
                        state = update(state, schedule)
            shape = (len(schedules), len(measured_at))
            return jax.tree.map(lambda *leaves: np.reshape(leaves, (*shape, *leaves[0].shape)), *jax.block_until_ready(records))

        schedules = list(self.schedules)
        return run

    def measure(self, state, configured):
        """What a row of the records holds, written down once more."""
        behavior_params, realised = staleness.read(state.history, configured)
        measured = bias.surrogate_bias(self.case.gradient, state.params, behavior_params)
        return {
            "bias/norm": measured.norm,
            "bias/relative_norm": measured.relative_norm,
            "bias/cosine": measured.cosine,
            "grad/norm": optax.tree.norm(measured.stale_gradient),
            "drift/from_behavior": optax.tree.norm(optax.tree.sub(state.params, behavior_params)),
            "drift/cumulative": optax.tree.norm(optax.tree.sub(state.params, self.case.params)),
            "staleness/configured": configured,
            "staleness/realised": realised,
            "msd": metrics.msd(state.history),
            **self.case.rewards(state.params),
        }


def compare(
    problem: Problem,
    grids: dict[str, Callable],
    *,
    repetitions: int,
    required: float | None = REQUIRED_RATIO,
) -> bool:
    """Times the grids and the loop in alternation and prints their ratios.

    Args:
      problem: gives the loop.
      grids: {name: run}.
      repetitions: of each, after one that compiles.
      required: the median ratio that every grid must reach, or None.

    Returns:
      Whether the numbers agree and the required ratio is reached.
    """
    chunk = problem.chunk
    print(
        f"{problem.name}: {len(chunk.cells)} cells x {chunk.num_updates} updates, measured at {len(chunk.measure_steps)} steps"
    )
    runs = {**grids, "loop": problem.loop()}
    results, first = zip(*(timed(run) for run in runs.values()), strict=True)
    seconds = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(timed(run)[1])
    for name, compiling in zip(runs, first, strict=True):
        warm = statistics.median(seconds[name])
        print(f"  {name:<8} {warm:8.3f} s, and {max(compiling - warm, 0):.1f} s to compile")
    holds = True
    for name, result in zip(grids, results, strict=False):
        error = largest_difference(result, results[-1])
        ratios = sorted(loop / grid for loop, grid in zip(seconds["loop"], seconds[name], strict=True))
        median = statistics.median(ratios)
        fast = required is None or median >= required
        holds &= fast and error <= TOLERANCE
        verdict = "" if required is None else f"; required {required:g}: {'PASS' if fast else 'FAIL'}"
        print(f"  loop / {name}: {median:.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f}){verdict}")
        print(f"  same numbers: largest relative difference {error:.1e} {'PASS' if error <= TOLERANCE else 'FAIL'}")
    return holds


def timed(run: Callable[[], dict[str, jax.Array]]) -> tuple[dict[str, jax.Array], float]:
    """The result, when all of it is there, and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - start


def largest_difference(result: dict[str, jax.Array], other: dict[str, jax.Array]) -> float:
    """max |a − b| / max |b| over the arrays of a run."""
    if result.keys() != other.keys():
        raise ValueError(f"the runs measure different things: {sorted(result.keys() ^ other.keys())}")
    pairs = [(np.asarray(result[name], float), np.asarray(other[name], float)) for name in result]
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
