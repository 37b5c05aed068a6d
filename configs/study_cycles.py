"""Fixed updates against fixed cycles: is η_max ∝ 1/S the horizon law in disguise?

    python -m launch.study --config=configs/study_cycles.py --workdir=docs/laws/records/cycles --page=docs/laws/cycles.md

takes about a minute on two cores, once the studies of the horizon law and of collapse have been run. The designs, criteria and
levels were written while the sweep of the study of collapse ran, after a look at success in its runs without importance
sampling and with a clip; M = 24 makes T the whole horizon at S = 32. The
verdict tells "S and T" apart from either alone since the exponents of the clip were seen.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The study of cycles."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.cycles"
    config.sources = ("docs/laws/records/horizon", "docs/laws/records/collapse")
    config.seed = 0  # of the resampling
    config.num_bootstrap = 400
    config.confidence = 0.9
    config.exponent_min_staleness = 4  # exponents in S+1, the length of a cycle, are fitted over S from here on
    config.rule = ml_collections.ConfigDict(
        dict(gain=0.5, keep=0.7, give_back=0.5, frozen_tolerance=0.01, frozen_window=0.25, end_window=0.1)
    )
    # what arXiv 2607.01083 reports, as far as known: t_c·η at collapse, S·η at the boundary, the S compared
    config.paper = ml_collections.ConfigDict(dict(collapse=3.2e-5, boundary=1.6e-6, max_staleness=(8, 16, 32)))

    # exact: the largest learning rate of the proxy bandit that has not collapsed by T, fixed lag
    config.group_size = 8
    losses = "jax_async_grpo.losses."
    config.losses = ml_collections.ConfigDict(
        {name: losses + name for name in ("ppo_clip", "importance_sampling", "reinforce")}
    )
    config.max_staleness = (0, 1, 2, 4, 8, 16, 32, 64)
    config.updates = (800, 3300)  # T, the same for every S, beside ...
    config.cycles = (24, 100)  # ... T = M·(S+1), both equal at S = 32 but for rounding
    config.window = (4.0, 200.0)  # η·T, searched upwards for the first learning rate that has collapsed
    config.grid = 32  # learning rates at once, geometric; then as many in the bracket

    # sampled: the runs of the study of collapse, with shorter horizons read off them
    config.case = "adam"
    config.algorithms = ("no_is", "clip", "dual_clip", "is_")
    config.num_updates = 800  # T
    config.num_cycles = 24  # M
    config.other_updates = (200, 400)  # further T, for the exponent in T at the same S
    config.rounding = 0.1  # a horizon is the nearest step with a reward, not further than this share of it
    config.levels = (0.8, 0.5)
    return config
