"""Delay stability, theory against simulation: where whole policies lose a stable equilibrium under stale rollouts.

    python -m launch.study --config=configs/study_delay.py --workdir=runs/study_delay

took 15 to 20 minutes on two cores that five other jobs shared, and takes far less on idle ones. Every rule stands here before
the run; what must hold is in `tolerance`. Expect slopes of -0.97 without importance sampling, about 0 with it, and simulated
thresholds within 0.1 % of the theory (fixed, periodic).
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The study of delay stability."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.delay"
    config.sources = ()
    config.seed = 0

    # the bandit of four actions
    config.rewards = (0.0, 0.0, 0.0, 1.0)
    config.group_size = 8
    losses = "jax_async_grpo.losses."
    config.losses = ml_collections.ConfigDict(
        {name: losses + name for name in ("reinforce", "importance_sampling", "ppo_clip")}
    )
    config.decays = (0.02, 0.04, 0.1)  # L2: the field is H(θ,φ) − decay·θ

    # fixed and periodic lag; values in one tuple are simulated together
    config.max_staleness = (tuple(range(9)), (15, 16, 31, 32, 63, 64))
    config.updates_per_version = 200  # a simulation has this times K = S + 1 updates, S the largest of its tuple,
    config.min_updates = 4096  # and at least these
    config.window = (0.05, 80.0)  # learning rates; upwards, the first that grows
    config.ratio = 1.5  # of neighbors in the first grid
    config.grid = 8  # learning rates at once: a refinement divides its bracket into one more
    config.num_refinements = 2
    config.deviation = 1e-7  # of the equilibrium at the start, in logits
    config.slope_from = 4  # smallest S of the slopes on log(S + ½)

    # random lag, at one decay
    config.random = ml_collections.ConfigDict(
        dict(
            decay=0.04,
            max_staleness=(1, 2, 4, 8, 16, 32),
            num_updates=16384,  # of each simulated chain
            num_chains=8,  # simulated lag sequences, others than those of the theory
        )
    )

    # past the threshold, fixed lag, at one decay
    config.beyond = ml_collections.ConfigDict(
        dict(
            decay=0.04,
            max_staleness=(1, 4, 5, 16, 64),
            factors=(1.05, 1.5),  # of the threshold of the theory
            num_updates=40000,
            deviation=0.01,  # at the start, in logits
            shown_staleness=16,  # S of the curves in the figure
            shown_updates=200,  # the last ones
        )
    )

    # matrix-free thresholds beside the companion matrix's, of a larger policy, linear in features of the context
    config.matrix_free = ml_collections.ConfigDict(
        dict(
            losses=("reinforce", "importance_sampling"),
            decay=0.04,
            max_staleness=(3,),
            task_options=dict(num_prompts=4, num_digits=2, base=4, seed=0),
            num_features=70,
            num_eigenvalues=4,  # with 8 ARPACK does not converge: most directions share one eigenvalue, that of the decay
            ratio=1.1,  # of neighbors in the search for the companion matrix's first threshold
        )
    )

    # what must hold: largest relative errors; the slope's distance from -1, and from 0
    config.tolerance = ml_collections.ConfigDict(
        dict(
            fixed=0.01,
            periodic=0.02,
            random=0.05,
            companion=1e-6,
            matrix_free=1e-6,
            scalar=1e-10,
            falling_slope=0.06,
            flat_slope=0.1,
        )
    )
    return config
