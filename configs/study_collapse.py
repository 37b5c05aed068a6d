"""Where training under lag stops working: success over (loss, S, η), with S = 0 beside every cell.

    python -m launch.study --config=configs/study_collapse.py --workdir=docs/laws/records/collapse --page=docs/laws/collapse.md

takes about half an hour on two cores. A small transformer learns digit sums with sampled updates. The losses, the optimizers,
the lags, the learning rates, the rules of collapse and the radius of the drift limit were fixed before the run; the ranges of η
and that radius come from a pilot with other seeds (1000 to 1003).
"""

from __future__ import annotations

import ml_collections

from configs.sweep_digits import algorithm, case
from configs.sweep_digits import get_config as default_sweep


def get_config() -> ml_collections.ConfigDict:
    """The study."""
    config = ml_collections.ConfigDict()
    config.study = "jax_async_grpo.studies.collapse"
    config.sources = ()
    config.precision = "float32"
    config.num_bootstrap = 1000  # resamples of the seeds, for the exponents
    config.exponent_min_staleness = 4  # η_50 ∝ S^a is fitted over S from here on
    config.fisher_pair = ("clip", "dual_clip")  # are there fewer falls with the second, at equal (S, η)?
    config.sweep = sweep = default_sweep()
    sweep.seed = 1
    drift = dict(control="jax_async_grpo.control.limit_staleness_drift", control_options=dict(radius=0.15, max_staleness=32))
    ess = dict(control="jax_async_grpo.control.scale_by_ess")
    sweep.algorithms = ml_collections.ConfigDict(
        dict(
            no_is=algorithm("reinforce"),
            clip=algorithm("ppo_clip"),
            dual_clip=algorithm("ppo_clip", dual_clip=3.0),
            is_=algorithm("importance_sampling"),
            no_is_drift=algorithm("reinforce", **drift),
            no_is_ess=algorithm("reinforce", **ess),
            clip_drift=algorithm("ppo_clip", **drift),
            clip_ess=algorithm("ppo_clip", **ess),
        )
    )
    common = dict(num_updates=800, num_measurements=20, num_windows=5, num_seeds=20)
    adam = common | dict(learning_rates=tuple(1e-4 * 2**k for k in range(8)))
    sgd = common | dict(optimizer="optax.sgd", learning_rates=tuple(1e-3 * 2**k for k in range(8)), num_seeds=10)
    sweep.cases = ml_collections.ConfigDict(
        dict(
            adam=case(**adam, algorithms=("no_is", "clip", "dual_clip", "is_"), max_staleness=(0, 4, 8, 16, 32)),
            adam_control=case(**adam, algorithms=("no_is_drift", "no_is_ess", "clip_drift", "clip_ess"), max_staleness=(8, 32)),
            sgd=case(**sgd, algorithms=("no_is", "clip"), max_staleness=(0, 8, 32)),
        )
    )
    return config
