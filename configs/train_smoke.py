"""The whole machinery of a training run within a minute: warm start, lag, bias, evaluation, checkpoints.

python -m launch.train --config=configs/train_smoke.py --workdir=runs/train_smoke
"""

from __future__ import annotations

import ml_collections

from configs.train_arithmetic import get_config as default


def get_config() -> ml_collections.ConfigDict:
    """The default run, small."""
    config = default()
    config.num_updates, config.num_prompts, config.group_size, config.num_heldout = 30, 16, 4, 16
    config.policy_options = ml_collections.ConfigDict(dict(num_layers=1, width=32, num_heads=2))
    config.warm_start.num_updates = 60
    config.staleness.max = 2
    config.evaluation.every, config.bias.every, config.checkpoint.every = 10, 10, 10
    return config
