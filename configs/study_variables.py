"""Which variable makes the success curves of different S one curve: S·η, drift, ESS, KL, ..., or η alone, by one score.

    python -m launch.study --config=configs/study_variables.py --workdir=docs/laws/records/variables
        --page=docs/laws/variables.md

takes seconds: it reads the records of the study of collapse. The score, the selection of runs, the window and the list of
variables, √S·η (the drift of a random walk) among them, were written before any of those records had been scored; the pilot of
the sweep, with other seeds (1000 to 1003), had shown which runs fail and how early. What the figure shows was chosen later.
"""

from __future__ import annotations

import ml_collections

from configs.study_collapse import get_config as collapse


def get_config() -> ml_collections.ConfigDict:
    """The study."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.variables"
    config.source = "collapse"
    config.sources = ("docs/laws/records/collapse",)
    config.precision = "float32"
    config.cases = ("adam", "sgd")  # the third case changes the step by the very variables compared here
    config.rule = collapse().sweep.rule.to_dict()  # what success is
    config.min_staleness = 4
    config.num_bootstrap = 200  # resamples of the seeds
    config.confidence = 0.9
    config.seed = 0
    config.shown = ("eta", "sqrt_s_eta", "s_eta", "drift")  # of the figure
    return config
