"""Study: where training under lag stops working, for every loss and for control of the step (in progress)."""

from jax_async_grpo.studies.swept import run_sweep as run, sweep_pieces as pieces, validate_sweep as validate


def summary(rows, config, sources):
    return {}


def page(summary):
    return "in progress"


def figures(rows, summary, folder):
    return []
