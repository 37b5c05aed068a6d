"""The whole machinery of a training run within a minute: warm start, lag, bias, evaluation, checkpoints.

python -m launch.train --config=configs/train_smoke.py --workdir=runs/train_smoke
"""

from __future__ import annotations

import ml_collections

from configs.train_arithmetic import get_config as default


def get_config() -> ml_collections.ConfigDict:
    """The default run, small."""
    config = default()
    config.num_updates, config.num_prompts, config.group_size, config.num_heldout = 60, 16, 8, 32
    config.task_options = ml_collections.ConfigDict(dict(num_prompts=136, num_digits=2, base=4))
    config.optimizer.schedule_options.decay_steps = 60
    config.policy_options = ml_collections.ConfigDict(dict(num_layers=1, width=32, num_heads=2))
    config.warm_start.num_updates = 100
    config.staleness.max = 2
    config.evaluation.every, config.bias.every, config.checkpoint.every = 20, 20, 20
    return config
