"""A sweep of training runs as one compiled program against a jitted Python loop, and a sweep killed at random moments.

python -m benchmarks.sweep

The grid holds runs of a tabular bandit with exact updates over (S, η), side by side on one device; the loop calls one jitted
update per step and one jitted measurement per measured step, run after run, and waits once, at the end. Both must give the same
numbers, and the grid must be at least 6 times as fast (the exit code says so). Then a sweep is killed (SIGKILL) at five random
moments, started again each time, and must end with the records of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bias_grid import compare
from configs import sweep_digits
from jax_async_grpo import exact, metrics, staleness, sweep_run, sweeps
from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.update import create_state, update_step

REQUIRED_RATIO = 6.0
NUM_KILLS = 5
KEY = 7  # exact updates draw nothing

_REWARDS = ((1.0, 0.0, 0.0, 0.0, 0.5, 1.0), (1.0, 0.5, 0.0, 0.0, 0.0, 0.5), (0.5, 0.5, 0.0, 0.0, 1.0, 1.0))
TABULAR = dict(
    policy="jax_async_grpo.policies.tabular",
    policy_options=dict(context_length=1, init_scale=1.0),
    task="jax_async_grpo.tasks.bandit",
    task_options=dict(rewards=_REWARDS),
    warm_start={},
    optimizer="optax.sgd",
    algorithms=("clip",),
    updates="exact",
    max_staleness=(0, 1, 2, 4, 8, 16),
    learning_rates=(0.02, 0.05, 0.1, 0.2),
    num_updates=400,
    num_measurements=20,
    num_windows=4,
    num_seeds=1,
)


def config(**changes) -> dict:
    """The default sweep with the tabular case alone."""
    plain = sweep_digits.get_config().to_dict()
    cases = {"tabular": sweep_digits.case(**(TABULAR | changes))}
    return plain | dict(precision="float64", algorithms={"clip": sweep_digits.algorithm("ppo_clip")}, cases=cases)


class _Cells(NamedTuple):
    """What `compare` prints of a chunk."""

    cells: list[tuple[int, float]]
    num_updates: int
    measure_steps: np.ndarray


class Problem:
    """The cells (S, η) of the tabular case, and two ways to run them."""

    name = "tabular bandit, exact updates"

    def __init__(self):
        self.case = sweep_run.build_case(config(), "tabular", "clip")
        cells = [(lag, rate) for lag in TABULAR["max_staleness"] for rate in TABULAR["learning_rates"]]
        steps = np.arange(20, 401, 20)
        self.chunk = _Cells(cells, 400, steps)
        self.capacity = max(TABULAR["max_staleness"]) + 2
        self.schedules = np.stack([staleness.fixed(lag, 401) for lag, _ in cells])

    def observe(self, learner_params, behavior_params):
        return self.case.rewards(learner_params) | exact.off_policy(
            self.case.policy, learner_params, behavior_params, self.case.task
        )

    def grid(self) -> Callable[[], dict[str, jax.Array]]:
        """All cells and steps as one program."""
        program = sweeps.training_grid(
            self.case.update_gradient("exact"),
            self.observe,
            self.case.optimizer_fn,
            capacity=self.capacity,
            devices=jax.local_devices()[:1],
        )
        rates, keys = (
            np.array([rate for _, rate in self.chunk.cells]),
            jax.random.split(jax.random.key(KEY), len(self.schedules)),
        )

        def run():
            curves = program(self.case.params, rates, self.schedules, keys, self.chunk.measure_steps)
            return curves.values | {"msd": np.nan_to_num(curves.msd)}

        return run

    def loop(self) -> Callable[[], dict[str, jax.Array]]:
        """One dispatch per update and per measurement; the learning rate is an argument, so both are compiled once."""

        def gradient(learner_params, behavior_params, *_):
            return self.case.gradient(learner_params, behavior_params)

        start = jax.jit(lambda params: create_state(params, optax.sgd(1.0), self.capacity))
        update = jit_repeated(lambda state, lag, rate: update_step(state, lag, gradient, optax.sgd(rate))[0])
        measure = jit_repeated(lambda state, lag, start_params: self.measure(state, lag, start_params, gradient))
        lags = [jnp.asarray(lag) for lag, _ in self.chunk.cells]
        rates = [jnp.asarray(rate) for _, rate in self.chunk.cells]

        def run():
            records = []
            for lag, rate in zip(lags, rates, strict=True):
                state = start(self.case.params)
                for step in range(1, self.chunk.num_updates + 1):
                    state = update(state, lag, rate)
                    if step % 20 == 0:
                        records.append(measure(state, lag, self.case.params))
            shape = (len(lags), len(self.chunk.measure_steps))
            return jax.tree.map(lambda *leaves: np.reshape(leaves, (*shape, *leaves[0].shape)), *jax.block_until_ready(records))

        return run

    def measure(self, state, lag, start_params, gradient):
        """What a grid measures, written down once more."""
        behavior, realised = staleness.read(state.history, lag)
        previous, _ = staleness.read(state.history, 1)
        of_previous, _ = staleness.read(state.history, 1 + jnp.minimum(lag, state.step - 1))
        current = gradient(state.params, behavior)
        return {
            **self.observe(state.params, behavior),
            "drift/from_behavior": optax.tree.norm(optax.tree.sub(state.params, behavior)),
            "drift/cumulative": optax.tree.norm(optax.tree.sub(state.params, start_params)),
            "staleness/realised": realised,
            "grad/norm": optax.tree.norm(current),
            "grad/cosine_prev": metrics.gradient_cosine(current, gradient(previous, of_previous)),
            "grad/cosine_twin": metrics.gradient_cosine(current, gradient(state.params, behavior)),
            "msd": jnp.nan_to_num(metrics.msd(state.history)),
        }


def survives_kills(seed: int = 0) -> bool:
    """Runs a sweep undisturbed, then one that is killed at five random moments; True if their records are the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.sweep", f"--config={__file__}"]
        whole, killed = (Path(folder) / name for name in ("whole", "killed"))
        run = subprocess.run([*command, f"--workdir={whole}"], capture_output=True, check=True, text=True)
        moments = random.Random(seed)
        for kill in range(NUM_KILLS):
            process = subprocess.Popen([*command, f"--workdir={killed}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(moments.randrange(1, 4)):  # so many new chunks later, and a random while into the next one
                while b"recorded before" in process.stdout.readline():
                    pass
            try:
                process.wait(timeout=moments.uniform(0, 0.1))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            done = len((killed / "metrics.jsonl").read_text().splitlines()) if (killed / "metrics.jsonl").exists() else 0
            print(f"  kill {kill + 1}: exit {process.returncode}, {done} records there")
        subprocess.run([*command, f"--workdir={killed}"], capture_output=True, check=True)
        same = (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    print(f"  records of {len(run.stdout.splitlines())} lines of output: {'identical, PASS' if same else 'different, FAIL'}")
    return same


def get_config():
    """The sweep that is killed: this file is its config."""
    import ml_collections

    changes = dict(updates="sampled", learning_rates=tuple(0.05 * 1.1**k for k in range(40)), num_seeds=2)
    return ml_collections.ConfigDict(config(**changes))


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    problem = Problem()
    fast = compare(problem, {"grid": problem.grid()}, repetitions=5, required=REQUIRED_RATIO)
    print(f"a sweep killed at {NUM_KILLS} random moments")
    return 0 if survives_kills() and fast else 1


if __name__ == "__main__":
    sys.exit(main())
