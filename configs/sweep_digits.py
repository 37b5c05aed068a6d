"""A sweep of whole training runs: which learning rates hold at which staleness, for three losses on a digit sum.

    python -m launch.sweep --config=configs/sweep_digits.py --workdir=runs/sweep_digits

takes about five minutes on two cores. The workdir gets one record for all seeds of a (loss, S, η), and a table of η_80, the
learning rate at which 80 % of the runs succeed. Rules and seeds stand here, before the run.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default sweep."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.precision = "float32"  # "float64" for exact updates
    config.group_size = 8
    config.advantage = "jax_async_grpo.advantages.group_normalized"
    config.advantage_options = ml_collections.ConfigDict()
    config.aggregation = "jax_async_grpo.aggregation.sequence_mean"
    config.aggregation_options = ml_collections.ConfigDict()
    config.max_compositions = 5000  # of exact updates
    # What became of a run (scaling.CollapseRule).
    config.rule = ml_collections.ConfigDict(
        dict(gain=0.5, keep=0.7, give_back=0.5, frozen_tolerance=0.01, frozen_window=0.25, end_window=0.1)
    )
    config.level = 0.8  # share of successful seeds that makes a learning rate stable
    config.confidence = 0.9
    config.algorithms = ml_collections.ConfigDict(
        dict(
            no_is=algorithm("reinforce"),
            clip=algorithm("ppo_clip"),
            is_=algorithm("importance_sampling"),
        )
    )
    grid = dict(max_staleness=(0, 8, 32), learning_rates=tuple(2e-4 * 2**k for k in range(6)))
    size = dict(num_updates=800, num_measurements=20, num_windows=5, num_seeds=6)
    config.cases = ml_collections.ConfigDict(dict(digits=case(algorithms=("no_is", "clip", "is_"), **grid, **size)))
    return config


def algorithm(loss: str, *, control: str = "", control_options=None, **loss_options) -> dict:
    """A loss of the library, and an optax transformation behind the optimizer ("" = none), by dotted name."""
    return dict(
        loss=f"jax_async_grpo.losses.{loss}",
        loss_options=loss_options,
        control=control,
        control_options=control_options or {},
    )


def case(**changes) -> dict:
    """A policy on a task with an optimizer; what is not given takes these values."""
    defaults = dict(
        policy="jax_async_grpo.policies.decoder",
        policy_options=dict(num_layers=1, width=16, num_heads=2),
        task="jax_async_grpo.tasks.digit_sum",
        task_options=dict(num_prompts=8, num_digits=2, base=4, seed=0),
        warm_start=dict(target_reward=0.3),
        optimizer="optax.adam",
        optimizer_options={},
        algorithms=(),
        updates="sampled",  # or "exact"
        schedules=("fixed",),
        max_staleness=(0, 4, 16),  # S, learner updates
        learning_rates=tuple(round(1e-3 * 2**k, 6) for k in range(6)),  # η
        num_updates=320,  # T
        num_measurements=32,  # rewards along a run
        num_windows=8,  # everything else is averaged over so many windows of the run
        first_seed=0,
        num_seeds=10,
        vectorize=True,
    )
    return defaults | changes
