"""The horizon law: is the update at which over-optimization sets in times the learning rate a constant, whatever the lag?

    python -m launch.study --config=configs/study_horizon.py --workdir=docs/laws/records/horizon --page=docs/laws/horizon.md

takes about a minute on two cores. The window and the tolerances are those of the question, put before anything was run. The
updates are exact, so there is no seed to hold out: the grid and `time` were chosen after a look at five learning rates of the
same system. Expect t_c·η of 21 to 23 inside the window.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The study of the horizon law."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.horizon"
    config.sources = ()
    config.seed = 0  # of the random schedules
    config.group_size = 8
    losses = "jax_async_grpo.losses."
    config.losses = ml_collections.ConfigDict(
        {name: losses + name for name in ("ppo_clip", "importance_sampling", "reinforce")}
    )
    config.schedules = ("fixed", "periodic", "random")
    config.max_staleness = (0, 1, 2, 4, 8, 16, 32, 64, 128)
    config.learning_rates = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    config.time = 240.0  # η·t at which every run ends
    config.spacing = 0.1  # η·t between two measured rewards; every update where η is larger
    config.rule = ml_collections.ConfigDict(
        dict(gain=0.5, keep=0.7, give_back=0.5, frozen_tolerance=0.01, frozen_window=0.25, end_window=0.1)
    )
    # where the law is claimed, by inputs alone, and what must hold there for every loss, schedule and rule
    config.window = ml_collections.ConfigDict(dict(staleness_x_learning_rate=0.5, learning_rate=0.35))
    config.tolerance = ml_collections.ConfigDict(dict(variation=0.03, staleness_exponent=0.03, resolution=0.005))
    config.end_deviation = 0.05  # of t_c from that without lag at the same η: where the law ends
    config.beyond = (2.0, 16.0)  # S·η between which the other side is described
    config.shown_learning_rate = 0.05  # of the curves in the figure
    config.shown_points = 120
    config.num_bootstrap = 1000
    config.confidence = 0.9
    return config
