"""The config of a training run of seconds, for tests of the job."""

from __future__ import annotations

import ml_collections

from configs import train_smoke


def get_config() -> ml_collections.ConfigDict:
    """A network without attention on sums of two base-3 digits; ten updates."""
    config = train_smoke.get_config()
    config.num_updates, config.num_prompts, config.group_size, config.num_heldout = 10, 8, 4, 8
    config.policy = "jax_async_grpo.policies.mlp"
    config.policy_options = ml_collections.ConfigDict(dict(context_length=6, width=8))
    config.task_options = ml_collections.ConfigDict(dict(num_prompts=24, num_digits=2, base=3, partial_credit=True))
    config.warm_start.num_updates = 2
    config.staleness.max = 2
    config.evaluation.every, config.checkpoint.every, config.bias.every = 4, 4, 4
    config.optimizer.learning_rate, config.optimizer.schedule = 0.03, ""
    config.optimizer.schedule_options = ml_collections.ConfigDict()
    return config
