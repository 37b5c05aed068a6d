"""A small transformer learns to add under lag: rollouts are S learner updates old, the bias that makes is measured on the way.

    python -m launch.train --config=configs/train_arithmetic.py --workdir=runs/train_arithmetic

takes about four minutes on two cores; held-out reward goes from 0.34 to 0.98 or more. `--config.staleness.max=0` is the
synchronous control. Behavior is named by dotted names, your own included.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default training run."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.precision = "float32"
    config.num_updates = 1200  # T
    config.num_prompts = 64  # B, a batch
    config.group_size = 8  # G
    config.updates_per_batch = 1  # above 1 data are reused, and the bias is no longer that of independent rollouts
    config.accumulation_steps = 1  # parts of a batch, one after another in memory
    config.staleness = _dict(schedule="fixed", max=4)  # S, learner updates; also "periodic", "random"
    config.replay = "params"  # read θ_{t−s} from the ring; or "rollouts": generate early and keep them
    config.ring = _dict(dtype="", memory_kind="")  # "bfloat16" halves it, "pinned_host" keeps it in host memory

    config.loss = "jax_async_grpo.losses.ppo_clip"
    config.loss_options = _dict()
    config.correction = ""  # e.g. jax_async_grpo.corrections.token_tis, with its options
    config.correction_options = _dict()
    config.denominator = "recorded"  # log-probs as sampled; "recomputed" under φ; "learner", θ at the batch's first update
    config.advantage = "jax_async_grpo.advantages.group_normalized"
    config.advantage_options = _dict()
    config.aggregation = "jax_async_grpo.aggregation.sequence_mean"
    config.aggregation_options = _dict()
    config.optimizer = _dict(
        name="optax.adam",
        learning_rate=1e-3,  # η, the largest where a schedule scales it
        options=_dict(),
        schedule="optax.cosine_decay_schedule",  # of η's factor; "" = constant
        schedule_options=_dict(init_value=1.0, decay_steps=1200, alpha=0.1),
        before=(("optax.clip_by_global_norm", {"max_norm": 1.0}),),
        control="",  # e.g. jax_async_grpo.control.limit_staleness_drift, behind the optimizer
        control_options=_dict(),
    )
    config.max_bad_updates = 10  # in a row with a loss or gradient that is not finite

    config.policy = "jax_async_grpo.policies.decoder"
    config.policy_options = _dict(num_layers=2, width=64, num_heads=4)
    config.task = "jax_async_grpo.tasks.digit_text"
    config.task_options = _dict(num_prompts=5000, num_digits=2, base=10)  # "07+58" -> "65"
    config.num_heldout = 128
    config.warm_start = _dict(num_updates=2000, num_prompts=64, learning_rate=1e-3, target_reward=0.3, every=10)
    config.sampling = _dict(temperature=1.0, top_k=0, top_p=1.0)  # 0 and 1 are all tokens
    config.verifier = _dict(num_threads=2, time_limit=5.0)  # seconds a sample
    config.evaluation = _dict(every=50, num_samples=4, greedy=False)
    config.bias = _dict(every=50, num_blocks=8, ess_threshold=0.8)  # 0 = not measured
    config.checkpoint = _dict(every=100, keep_last=2, keep_best=1)
    config.mesh = _dict(data=-1, fsdp=1)  # -1: all devices that are left
    config.track = _dict(gradient_cosine=True, cumulative_drift=True)  # a copy of the parameters each
    # When held-out reward counts as collapsed (scaling.CollapseRule).
    config.rule = _dict(gain=0.5, keep=0.7, give_back=0.5, frozen_tolerance=0.01, frozen_window=0.25, end_window=0.1)
    config.plan = ""  # the workdir of a plan for this S (launch.plan): its limit is shown, and head-room recorded
    return config


def _dict(**entries) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(entries)
