"""Study: does the planner predict the largest stable learning rate of tasks it has not seen? (in progress)"""

from jax_async_grpo.studies.swept import run_sweep as run, sweep_pieces as pieces, validate_sweep as validate


def summary(rows, config, sources):
    return {}


def page(summary):
    return "in progress"


def figures(rows, summary, folder):
    return []
