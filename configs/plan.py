"""A plan: the learning rate for S = 16 and T = 800, from a sweep at S = 0 and 8 and a probe, for a small policy on a digit sum.

    python -m launch.plan --config=configs/plan.py --workdir=runs/plan --measure

takes about a minute on two cores; after that --max_staleness, --horizon and --learning_rate ask for other values. Another loss:
--config.algorithm=clip. Anchors of a sweep that has run: --config.anchors=runs/sweep_digits --config.algorithm=no_is.
docs/plan.md says how to read the answer.
"""

from __future__ import annotations

import ml_collections

from configs.sweep_digits import algorithm, case
from configs.sweep_digits import get_config as default_sweep


def get_config() -> ml_collections.ConfigDict:
    """The default plan."""
    config = ml_collections.ConfigDict()
    config.precision = "float32"  # that of the sweep
    config.max_staleness = 16  # S wanted, learner updates
    config.horizon = 800  # T wanted, learner updates
    config.anchors = ""  # workdir of a sweep whose records hold the anchors; "" measures those of config.sweep
    config.case = ""  # of the sweep; "" if it has one only
    config.algorithm = "no_is"  # whose learning rate is planned
    # At the wanted S and half of the smaller anchor; longer where 3 S is more.
    config.probe = ml_collections.ConfigDict(dict(num_updates=80, num_measurements=20, first_seed=200, num_seeds=20))
    # At S = 0 and `factor` times the anchor there (20 is a good one); 0 = none. For rewards that can be hacked.
    config.horizon_run = ml_collections.ConfigDict(
        dict(factor=0.0, num_updates=200, num_measurements=50, first_seed=300, num_seeds=5)
    )
    config.sweep = sweep = default_sweep()
    sweep.algorithms = ml_collections.ConfigDict(
        dict(no_is=algorithm("reinforce"), clip=algorithm("ppo_clip"), is_=algorithm("importance_sampling"))
    )
    digits = case(
        policy="jax_async_grpo.policies.mlp",
        policy_options=dict(context_length=7, width=32),
        task_options=dict(num_prompts=8, num_digits=2, base=4, seed=21),
        warm_start=dict(target_reward=0.3, learning_rate=3e-3),
        algorithms=("no_is", "clip", "is_"),
        max_staleness=(0, 8),
        learning_rates=tuple(round(2e-3 * 2**k, 6) for k in range(8)),
        num_updates=400,
        num_measurements=20,
        num_windows=2,
        num_seeds=20,
        first_seed=100,
    )
    sweep.cases = ml_collections.ConfigDict(dict(digits=digits))
    return config
