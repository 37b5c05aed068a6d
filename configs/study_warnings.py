"""Do the cosine of consecutive gradients and γ of MSD announce a collapse under lag, or do they mark lag itself?

    python -m launch.study --config=configs/study_warnings.py --workdir=docs/laws/records/warnings
        --page=docs/laws/warnings.md

takes seconds: it reads the records of the study of collapse. Indicators, rivals, strata and the definition of who falls were
written before those records were looked at for any of them. A third-party note on arXiv
2607.01083 takes a persistently positive cosine for a sign of collapse. The columns of the next window at equal η and of runs
that agree without lag were added when the first losses could be read.
"""

from __future__ import annotations

import ml_collections

from configs.study_collapse import get_config as collapse


def get_config() -> ml_collections.ConfigDict:
    """The study."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.warnings"
    config.source = "collapse"
    config.sources = ("docs/laws/records/collapse",)
    config.precision = "float32"
    config.cases = ("adam", "sgd")
    config.rule = collapse().sweep.rule.to_dict()
    config.min_staleness = 4  # of the runs whose fate is told apart; S = 0 is the control for lag
    config.late_from = 0.75  # share of the horizon from which a fall is late enough for γ of the whole run
    config.num_bootstrap = 1000  # resamples of the seeds
    config.confidence = 0.9
    config.seed = 0
    return config
