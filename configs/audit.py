"""What staleness does to each loss: the exact bias of every loss × correction at the same stale points.

    python -m launch.audit --config=configs/audit.py --workdir=runs/audit

takes about four minutes on two cores, nearly all of it compilation, and writes audit.jsonl, audit.md, audit.html and two
figures. Your own loss joins with --config.extra_losses=my_package.my_loss (several: separated by commas). Every default stands
here; the points, the rule of the ranking and the thresholds are fixed before the run.

The points: one run of `reference_loss` with exact updates per (S, η); at η·t = `time` its θ_t, and φ_t = θ_{t−S}. All losses
are measured there, so that drift is matched. A loss alone has the behavior policy φ as the denominator of its ratio. With a
correction, and where `proximal` is set, the denominator is a proximal policy between the two, φ the behavior policy of the
weights.
"""

from __future__ import annotations

import ml_collections

from jax_async_grpo.losses import k3
from jax_async_grpo.masked import masked_mean


def get_config() -> ml_collections.ConfigDict:
    """The default audit."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.group_size = 8
    config.advantage = "jax_async_grpo.advantages.group_normalized"
    config.advantage_options = ml_collections.ConfigDict()
    config.aggregation = "jax_async_grpo.aggregation.sequence_mean"
    config.aggregation_options = ml_collections.ConfigDict()
    config.max_compositions = 5000

    config.policy = "jax_async_grpo.policies.linear"
    config.policy_options = ml_collections.ConfigDict(dict(context_length=9, init_scale=0.5))
    config.task = "jax_async_grpo.tasks.digit_sum"
    config.task_options = ml_collections.ConfigDict(
        dict(num_prompts=4, num_digits=3, base=2, partial_credit=True, variable_length=True, seed=0)
    )
    config.optimizer = "optax.sgd"
    config.optimizer_options = ml_collections.ConfigDict()

    config.reference_loss = "jax_async_grpo.losses.importance_sampling"  # no clip: its drift grows as S·η
    config.time = 4.0  # η·t of the points
    config.max_staleness = (0, 1, 2, 4, 8, 16, 32)  # S, learner updates; 0 is the control
    config.learning_rates = (0.02, 0.04, 0.08)  # η
    config.rank_at = (16, 0.08)  # (S, η) of the point that orders the table
    config.brute_force_group_size = 3  # G of the sum over all groups, for losses that the closed form refuses; 0 = leave it
    config.drifts = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # ‖θ−φ‖ of the curves, along the drift of that point
    config.proximal_fraction = 0.5  # the proximal policy lies at θ + fraction·(φ − θ)
    config.saturation = 0.5  # a curve saturates where ‖δ‖ leaves its first-order law by this fraction

    losses = "jax_async_grpo.losses."
    config.losses = ml_collections.ConfigDict(
        dict(
            ppo_clip=_entry(losses + "ppo_clip"),
            clip_higher=_entry(losses + "ppo_clip", epsilon_high=0.28),
            dual_clip=_entry(losses + "ppo_clip", dual_clip=3.0),
            importance_sampling=_entry(losses + "importance_sampling"),
            reinforce=_entry(losses + "reinforce"),
            gspo=_entry(losses + "gspo"),
            gspo_wide=_entry(losses + "gspo", epsilon_low=0.2, epsilon_high=0.2),
            gspo_token=_entry(losses + "gspo_token"),
            luspo=_entry(losses + "luspo"),
            gmpo=_entry(losses + "gmpo"),
            cispo=_entry(losses + "cispo", ratio_high=5.0),
            cispo_narrow=_entry(losses + "cispo", ratio_low=0.8, ratio_high=1.28),
            rollout_is=_entry(losses + "rollout_is", corrected=False, epsilon_low=0.2, epsilon_high=0.28),
            topr=_entry(losses + "topr"),
            sapo=_entry(losses + "sapo"),
            vespo=_entry(losses + "vespo", corrected=False),
            dppo_tv=_entry(losses + "dppo_tv", threshold_low=0.15, threshold_high=0.15),
            dppo_kl=_entry(losses + "dppo_kl", threshold_low=0.05, threshold_high=0.05),
            dro=_entry(losses + "dro", beta=0.1),
            prime=_entry(losses + "prime"),
            ipo=_entry(losses + "ipo"),
            decoupled_ppo=_entry(losses + "decoupled_ppo", proximal=True, corrected=False, cap=5.0),
            m2po=_entry(losses + "m2po", corrected=False),
        )
    )
    corrections = "jax_async_grpo.corrections."
    config.corrections = ml_collections.ConfigDict(
        dict(
            token_tis=_correction(corrections + "token_tis", cap=2.0),
            token_mis=_correction(corrections + "token_mis", cap=2.0),
            icepop=_correction(corrections + "icepop", low=0.5, high=5.0),
            sequence_tis=_correction(corrections + "sequence_tis", cap=2.0),
            sequence_mis=_correction(corrections + "sequence_mis", cap=3.0),
            sequence_mask_tis=_correction(corrections + "sequence_mask_tis", low=0.5, high=2.0),
            geometric_mask=_correction(corrections + "geometric_mask", low=0.5, high=2.0),
            k3_rejection=_correction(corrections + "k_rejection", estimator=k3, level=masked_mean, threshold=0.05),
            opsm=_correction(corrections + "opsm", threshold=0.05),
        )
    )
    config.extra_losses = ""  # dotted names, separated by commas
    return config


def _entry(fn: str, *, corrected: bool = True, proximal: bool = False, **options) -> ml_collections.ConfigDict:
    """A loss: `corrected` = also beside every correction, `proximal` = its denominator is the proximal policy."""
    return ml_collections.ConfigDict(dict(fn=fn, options=options, corrected=corrected, proximal=proximal))


def _correction(fn: str, **options) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(dict(fn=fn, options=options))
