"""Forward and backward of every policy loss against plain PPO clip, in one process.

python -m benchmarks.loss_throughput

[64, 8, 512] float32 log-probs, 64 × 8 advantages, a mask of unequal lengths; the mean of the loss and its gradient in the
learner's log-probs, jitted. Repetitions go round the losses, so that a change of the machine's speed meets all of them. Each
pointwise loss must take at most 1.3 times the time of `ppo_clip` (the exit code says so) unless it says why not; losses that
look at whole rows or at the whole batch are printed beside them.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import losses
from jax_async_grpo.aggregation import sequence_mean

REQUIRED_RATIO = 1.3
SHAPE = (64, 8, 512)
REPETITIONS = 41
DEARER = {"dppo_kl": "two probabilities, a ratio and the logarithm of a binary KL"}


def pointwise(behavior: jax.Array) -> dict[str, Callable]:
    """Losses in which a token sees itself alone."""
    return {
        "importance_sampling": losses.importance_sampling,
        "reinforce": losses.reinforce,
        "cispo": functools.partial(losses.cispo, ratio_high=5.0),
        "rollout_is": functools.partial(losses.rollout_is, behavior_logprobs=behavior, epsilon_low=0.2, epsilon_high=0.28),
        "sapo": losses.sapo,
        "dppo_tv": functools.partial(losses.dppo_tv, threshold_low=0.15, threshold_high=0.15),
        "dppo_kl": functools.partial(losses.dppo_kl, threshold_low=0.05, threshold_high=0.05),
        "dro": functools.partial(losses.dro, beta=0.1),
        "prime": losses.prime,
        "ipo": losses.ipo,
        "decoupled_ppo": functools.partial(losses.decoupled_ppo, behavior_logprobs=behavior, cap=5.0),
    }


def coupled() -> dict[str, Callable]:
    """Losses in which a token sees its row, or the batch."""
    return {
        "gspo": losses.gspo,
        "gspo_token": losses.gspo_token,
        "luspo": losses.luspo,
        "gmpo": losses.gmpo,
        "topr": losses.topr,
        "vespo": losses.vespo,
        "m2po": losses.m2po,
    }


def main() -> int:
    rng = np.random.default_rng(0)
    old = -np.abs(rng.normal(1.0, 1.0, SHAPE)).astype(np.float32)
    learner, behavior = (jnp.asarray(old + 0.2 * rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    mask = jnp.asarray(np.arange(SHAPE[-1]) < rng.integers(1, SHAPE[-1] + 1, (*SHAPE[:-1], 1)))
    arguments = learner, jnp.asarray(old), jnp.asarray(rng.normal(size=SHAPE[:-1]).astype(np.float32)), mask
    required = pointwise(behavior)
    times = measure({"ppo_clip": losses.ppo_clip, **required, **coupled()}, arguments)
    base = times["ppo_clip"]
    print(f"ppo_clip: {1e3 * statistics.median(base):.2f} ms forward and backward on {list(SHAPE)} float32")
    holds = True
    for name in list(times)[1:]:
        # of pairs measured side by side: the median of ratios, not the ratio of medians
        ratio = statistics.median(mine / other for mine, other in zip(times[name], base, strict=True))
        verdict = DEARER.get(name, "PASS" if ratio <= REQUIRED_RATIO else "FAIL") if name in required else ""
        holds &= verdict != "FAIL"
        print(f"  {name:<20}{ratio:5.2f}  {verdict}".rstrip())
    return 0 if holds else 1


def measure(loss_fns: dict[str, Callable], arguments) -> dict[str, list[float]]:
    """Seconds of every repetition of every loss, after one that compiles."""
    learner, old, advantages, mask = arguments

    def compiled(loss_fn):
        @jax.jit
        def step(learner, old, advantages, mask):
            return jax.value_and_grad(lambda x: sequence_mean(loss_fn(x, old, advantages, mask), mask).mean())(learner)

        return step

    steps = {name: compiled(loss_fn) for name, loss_fn in loss_fns.items()}
    for step in steps.values():
        jax.block_until_ready(step(learner, old, advantages, mask))
    seconds = {name: [] for name in steps}
    for _ in range(REPETITIONS):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(learner, old, advantages, mask))
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
