"""The main job: the staleness bias of GRPO, exact, over staleness × learning rate × schedule.

    python -m launch.measure_bias --config=configs/measure_bias.py --workdir=runs/measure_bias

takes about four minutes on two cores, half of it compilation. Expect exponents of 1.00 in S and in η where updates are exact,
and an exponent in S well below 1 that grows with S where they are sampled: drift is diffusive at first and ballistic later.
Every default of the job stands here. Rules and seeds were fixed before the run, and so were the windows but two, which a first
run showed to reach into the clipped regime: those of `linear_sampled` and `transformer`.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default measurement."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.group_size = 8
    # Dotted names of functions; your own work too: "my_package.my_loss".
    config.loss = "jax_async_grpo.losses.ppo_clip"
    config.loss_options = ml_collections.ConfigDict(dict(epsilon_low=0.2, epsilon_high=0.2))
    config.unclipped_loss = "jax_async_grpo.losses.importance_sampling"  # the loss without its clip, for the parts of the bias
    config.advantage = "jax_async_grpo.advantages.group_normalized"
    config.advantage_options = ml_collections.ConfigDict()
    config.aggregation = "jax_async_grpo.aggregation.sequence_mean"
    config.aggregation_options = ml_collections.ConfigDict()
    config.max_compositions = 5000  # of the other members' rewards; the oracle's cost
    config.clip_level = 0.05  # R_batch: where this fraction of the tokens is clipped, ...
    config.clip_epsilons = (0.2, 0.2)  # ... by a clip of these
    config.collapse_fraction = 0.7  # R_crit: where the gold reward first falls below this fraction of its peak
    config.confidence = 0.95
    config.num_bootstrap = 2000

    config.cases = ml_collections.ConfigDict()
    config.cases.tabular = _case(**_TABULAR, updates=("exact", "sampled"))
    config.cases.tabular_adam = _case(**_TABULAR, **_ADAM)
    config.cases.linear = _case(**_LINEAR)
    config.cases.linear_sampled = _case(
        **_LINEAR,
        updates=("sampled",),
        schedules=("fixed",),
        # Narrowed after a first run: sampled updates are longer than exact ones, and at η = 0.16 the clip sets in already at
        # S = 1. What is fitted is the unclipped regime.
        fit_window=(0.0, 0.1),
        first_order=False,
    )
    config.cases.linear_adam = _case(**_LINEAR, **_ADAM)
    config.cases.proxy_gold = _case(
        policy="jax_async_grpo.policies.tabular",
        policy_options=dict(context_length=1, initial_logits=(0.0, 0.0, 0.0, -2.0, 0.0)),
        task="jax_async_grpo.tasks.proxy_gold_bandit",
        learning_rates=(0.005, 0.01, 0.02, 0.04),
        time_window=(2.0, 4.0),  # while the gold reward still rises
        first_order=False,
        horizon_learning_rate=0.1,
        horizon_updates=4000,
    )
    config.cases.transformer = _case(
        policy="jax_async_grpo.policies.decoder",
        policy_options=dict(num_layers=2, width=64, num_heads=4, dtype="float64"),
        task="jax_async_grpo.tasks.reasoning_gym",
        task_options=dict(dataset=("gcd", "lcm", "count_bits", "simple_equations"), num_prompts=8, seed=0),
        warm_start=dict(target_reward=0.4),
        schedules=("fixed",),
        max_staleness=(0, 1, 2, 4, 8),
        learning_rates=(5e-4, 1e-3, 2e-3),
        time_window=(0.018, 0.06),
        num_measurements=6,
        fit_variable="drift",
        # Narrowed after a first run: the cell beyond, S = 8 at η = 2e-3, is clipped, and with it the exponent is 1.21. What is
        # fitted is the unclipped regime.
        fit_window=(0.0, 0.009),
        vectorize=False,
    )
    return config


def _case(**changes) -> ml_collections.ConfigDict:
    """One policy on one task with one optimizer; what is not given takes these values."""
    case = dict(
        policy_options={},  # the policy is built as policy(vocab_size, **policy_options)
        task_options={},
        warm_start={},  # options of jax_async_grpo.warm_start.supervised; empty = none
        optimizer="optax.sgd",  # called with the learning rate and optimizer_options
        optimizer_options={},
        updates=("exact",),  # what the learner follows: "exact", "sampled"; the bias is exact either way
        schedules=("fixed", "periodic", "random"),
        max_staleness=(0, 1, 2, 4, 8, 16, 32),  # S, learner updates
        learning_rates=(0.01, 0.02, 0.04, 0.08, 0.16),  # η
        time_window=(6.0, 12.0),  # η·t between which the bias is measured
        num_measurements=48,  # steps measured in that window, one in each of as many strata
        num_seeds=10,  # of sampled updates
        fit_variable="staleness_x_learning_rate",  # or "drift": what `exponent` belongs to
        fit_window=(0.0, 0.2),  # S_rms·η of the cells that enter a fit
        vectorize=True,  # run the cells of a chunk side by side; False is better for transformers on a CPU
        first_order=True,  # also the first-order law and the parts of the bias by role, at one (θ, φ)
        horizon_learning_rate=0.0,  # a run without lag that looks for R_crit
        horizon_updates=0,  # 0 = R_crit is not measured
    )
    return ml_collections.ConfigDict(case | changes)


_TABULAR = dict(
    policy="jax_async_grpo.policies.tabular",
    policy_options=dict(context_length=1, init_scale=1.0),
    task="jax_async_grpo.tasks.bandit",
    task_options=dict(
        rewards=(
            (1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
            (1.0, 0.5, 0.0, 0.0, 0.0, 0.5),
            (0.5, 0.5, 0.0, 0.0, 1.0, 1.0),
            (0.0, 0.0, 0.5, 0.5, 1.0, 0.5),
        )
    ),
)
_LINEAR = dict(
    policy="jax_async_grpo.policies.linear",
    policy_options=dict(context_length=6, init_scale=0.5),
    task="jax_async_grpo.tasks.digit_sum",
    task_options=dict(num_prompts=4, num_digits=2, base=4, partial_credit=True, seed=0),
)
_ADAM = dict(
    optimizer="optax.adam",
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    time_window=(0.2, 0.4),
    fit_window=(0.0, 0.005),
    first_order=False,  # the same H as with plain gradient steps
)
