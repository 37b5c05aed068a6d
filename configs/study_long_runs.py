r"""Ten times longer just under the boundary: does what succeeds over T updates still succeed over 10·T?

    python -m launch.study --config=configs/study_long_runs.py --workdir=docs/laws/records/long_runs \
      --page=docs/laws/long_runs.md

takes about half an hour on two cores. It needs the records of the study of collapse, whose boundaries place the learning rates:
the largest of its grid at or below a share of η_80. Nothing of these runs was known beforehand; the seeds are new.
"""

from __future__ import annotations

import ml_collections

from configs import study_collapse


def get_config() -> ml_collections.ConfigDict:
    """The study."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.long_runs"
    config.sources = ("docs/laws/records/collapse",)
    config.precision = "float32"
    config.case = "adam"  # of the source; everything but lag, η, horizon and seeds is taken from it
    config.algorithms = ("no_is", "clip", "dual_clip", "is_")
    config.max_staleness = (0, 8, 32)
    config.shares = (0.8, 0.5)  # of η_80: just under it, and the half that is recommended
    config.factors = (1, 2, 5, 10)  # horizons at which success is judged, in horizons of the source
    config.num_measurements = 80  # rewards along the longest horizon
    config.num_windows = 2
    config.first_seed = 200  # those of the source start at 0
    config.num_seeds = 10
    config.max_run_updates = 2_000_000  # all runs together
    config.sweep = study_collapse.get_config().sweep
    return config
