"""What lag, the counterfactual and the lean head cost a training step: ratios against fair baselines in the same run.

    python -m benchmarks.train_step [--smoke]

Steps of `launch.train`'s own loop (draw, score, measure, update) on one decoder. Repetitions alternate between the variants, so
that a busy machine hits all alike; a ratio is the median over repetitions, its range in parentheses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import train_arithmetic
from jax_async_grpo import records, training
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.training.learner import Batch, _loss_and_gradient

MAX_LAG_RATIO, MAX_BIAS_RATIO = 1.05, 1.25


def config_of(max_staleness: int, bias_every: int, smoke: bool) -> dict:
    """The default run without warm start, evaluations and checkpoints on the way."""
    config = train_arithmetic.get_config()
    config.staleness.max, config.bias.every = max_staleness, bias_every
    config.num_updates, config.evaluation.every, config.checkpoint.every = 10**6, 10**6, 10**6
    config.warm_start.num_updates = 0
    if smoke:
        config.num_prompts = 16
        config.policy_options.num_layers, config.policy_options.width = 1, 32
    return config.to_dict()


class Variant:
    """A run whose updates are timed a block at a time."""

    def __init__(self, name: str, config: dict, folder: Path):
        self.name, self.seconds = name, []
        self.rows: list[dict] = []
        workdir = records.open_workdir(folder / name, config)
        self.trainer = training.Trainer(
            training.build(config), workdir, Checkpoints(workdir.path / "checkpoints"), self.rows.append
        )

    def block(self, count: int, *, keep: bool = True) -> None:
        start = time.perf_counter()
        for _ in range(count):
            self.trainer._one_update()
        jax.block_until_ready(self.trainer.state)
        if keep:
            self.seconds.append((time.perf_counter() - start) / count)


def ratio(one: Variant, other: Variant) -> tuple[float, float, float]:
    """(median, low, high) over the blocks."""
    found = sorted(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
    return statistics.median(found), found[0], found[-1]


def gradient_memory(job: training.TrainJob, length: int, num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Temporary bytes of the gradient at a long vocabulary: lean head, and logits of all tokens."""
    from jax_async_grpo import policies, surrogate
    from jax_async_grpo.types import Rollouts

    policy = policies.decoder(vocab_size, num_layers=1, width=64, num_heads=4)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))

    def spec(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = Rollouts(
        prompts=spec(num_rows, 8, dtype=jnp.int32),
        prompt_mask=spec(num_rows, 8, dtype=bool),
        completions=spec(num_rows, 4, length, dtype=jnp.int32),
        mask=spec(num_rows, 4, length, dtype=bool),
        behavior_logprobs=spec(num_rows, 4, length),
        rewards=spec(num_rows, 4),
        policy_version=spec(num_rows, 4, dtype=jnp.int32),
    )
    learner = job.learner
    lean_learner = type(learner)(policy, learner.loss_fn, learner.advantage_fn, learner.aggregation_fn, learner.optimizer)
    lean = jax.jit(
        lambda params, rollouts: _loss_and_gradient(lean_learner, params, Batch(rollouts, rollouts.behavior_logprobs))
    )
    algorithm = dict(loss_fn=learner.loss_fn, advantage_fn=learner.advantage_fn, aggregation_fn=learner.aggregation_fn)
    plain = jax.jit(lambda params, rollouts: surrogate.sampled_gradient(policy, params, rollouts, **algorithm))
    sizes = [f.lower(shapes, rows).compile().memory_analysis().temp_size_in_bytes for f in (lean, plain)]
    return sizes[0], sizes[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small and few, to see that it runs")
    smoke = parser.parse_args().smoke
    warnings.simplefilter("ignore")
    repetitions, count = (2, 10) if smoke else (9, 20)
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            name: Variant(name, config_of(lag, every, smoke), Path(folder))
            for name, lag, every in (("S=0", 0, 0), ("S=8", 8, 0), ("S=8, bias", 8, 10))
        }
        for variant in variants.values():
            variant.block(20, keep=False)
        for _ in range(repetitions):
            for variant in variants.values():
                variant.block(count)
        lag = ratio(variants["S=8"], variants["S=0"])
        bias = ratio(variants["S=8, bias"], variants["S=8"])
        job = variants["S=0"].trainer.job
    limits = [row["bias/detection_limit"] for row in variants["S=8, bias"].rows if row["kind"] == "bias"]
    lean, plain = gradient_memory(job, *((8, 4, 4096) if smoke else (64, 8, 32_768)))
    print(f"S = 8 / S = 0                        {lag[0]:.3f} ({lag[1]:.3f}..{lag[2]:.3f})  allowed {MAX_LAG_RATIO}")
    print(f"bias every 10 updates / never        {bias[0]:.3f} ({bias[1]:.3f}..{bias[2]:.3f})  allowed {MAX_BIAS_RATIO}")
    print(
        f"detection limit of the bias          {statistics.median(limits):.3g} (median of {len(limits)}), norm of the gradient"
    )
    print(f"memory of the gradient, lean / plain {lean / plain:.3f} ({lean / 2**20:.0f} and {plain / 2**20:.0f} MiB)")
    return 0 if smoke or (lag[0] <= MAX_LAG_RATIO and bias[0] <= MAX_BIAS_RATIO) else 1


if __name__ == "__main__":
    sys.exit(main())
