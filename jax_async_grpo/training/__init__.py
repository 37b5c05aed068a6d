"""Training of language models on stale rollouts: from a config to a run that goes on bit for bit wherever it stopped."""

from jax_async_grpo.training.run import BadUpdates, Progress, Stopped, Trainer, sizes
from jax_async_grpo.training.setup import TrainJob, build, describe, validate
from jax_async_grpo.training.summary import FIGURES, figure, last_line, summary, title

__all__ = [
    "FIGURES",
    "BadUpdates",
    "Progress",
    "Stopped",
    "TrainJob",
    "Trainer",
    "build",
    "describe",
    "figure",
    "last_line",
    "sizes",
    "summary",
    "title",
    "validate",
]
