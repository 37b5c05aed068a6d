"""What lag, the counterfactual and the lean head cost a training step: ratios against fair baselines in the same run.

    python -m benchmarks.train_step [--smoke]
    .venv-parity/bin/python -m benchmarks.train_step     # and the update against tunix's, after `make parity`

Steps of `launch.train`'s own loop (draw, score, measure, update) on one decoder. Repetitions alternate between the variants, so
that a busy machine hits all alike; a ratio is the median over repetitions, its range in parentheses. Against tunix it is the
update alone (loss, gradient, Adam and each side's own metrics) of one Llama on one batch of given rollouts; both losses and
gradient norms are printed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import train_arithmetic
from jax_async_grpo import advantages, aggregation, losses, policies, records, surrogate, training
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.training.learner import Batch, Learner, _loss_and_gradient, init_state, lean_logprobs, learner_step
from jax_async_grpo.types import Params, Rollouts
from parity import llama

MAX_LAG_RATIO, MAX_BIAS_RATIO = 1.05, 1.25
SAME = 1e-4  # relative: both compute in float32, in other orders


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


def ratio(one: Variant | Updates, other: Variant | Updates) -> tuple[float, float, float]:
    """(median, low, high) over the blocks."""
    found = sorted(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
    return statistics.median(found), found[0], found[-1]


def gradient_memory(job: training.TrainJob, length: int, num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Temporary bytes of the gradient at a long vocabulary: lean head, and logits of all tokens."""
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


class Updates:
    """One system's updates of one model on one batch, timed one by one; step() -> (loss, norm of the gradient)."""

    def __init__(self, step: Callable[[], tuple[jax.Array, jax.Array]]):
        self.step, self.seconds = step, []
        self.first = tuple(map(float, step()))

    def timed(self) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.step())
        self.seconds.append(time.perf_counter() - start)


def random_batch(sizes: llama.Sizes, params: Params, shape: tuple[int, int, int, int]) -> Rollouts:
    """Prompts and completions of random tokens with rewards, recorded under parameters a little off: [B, P] and [B, G, L]."""
    num_prompts, prompt_length, group_size, length = shape
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, sizes.vocab_size, (num_prompts, prompt_length), dtype=np.int32)  # token 0 is tunix's padding
    completions = rng.integers(1, sizes.vocab_size, (num_prompts, group_size, length), dtype=np.int32)
    mask, prompt_mask = jnp.ones(completions.shape, bool), jnp.ones(prompts.shape, bool)
    behavior = jax.tree.map(lambda leaf: leaf * 1.02, params)
    logprobs = jax.jit(lean_logprobs, static_argnums=0)(llama.decoder(sizes), behavior, prompts, completions, mask, prompt_mask)
    rewards = jnp.asarray(rng.random(completions.shape[:2]), jnp.float32)
    version = jnp.zeros(rewards.shape, jnp.int32)
    return Rollouts(jnp.asarray(prompts), prompt_mask, jnp.asarray(completions), mask, logprobs, rewards, version)


def our_updates(sizes: llama.Sizes, params: Params, rollouts: Rollouts, learning_rate: float) -> Updates:
    """`training.learner_step`, jitted and donated as the job does, with its metrics."""
    learner = Learner(
        llama.decoder(sizes), losses.ppo_clip, advantages.group_normalized, aggregation.sequence_mean, optax.adam(learning_rate)
    )
    step = jax.jit(functools.partial(learner_step, learner), donate_argnums=0)
    state = init_state(learner, jax.tree.map(jnp.copy, params), 1)

    def update():
        nonlocal state
        state, logged = step(state, Batch(rollouts, rollouts.behavior_logprobs))
        return logged["loss"], logged["grad/norm"]

    return Updates(update)


def tunix_updates(sizes: llama.Sizes, params: Params, rollouts: Rollouts, learning_rate: float) -> Updates:
    """The jitted step of tunix's trainer, with its GRPO loss as its learner sets it."""
    from tunix.rl import algo_core
    from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
    from tunix.rl.trainer import Trainer
    from tunix.sft.peft_trainer import TrainingConfig

    num_rows, group_size = rollouts.rewards.size, rollouts.rewards.shape[1]
    config = GRPOConfig(num_generations=group_size, beta=0.0)
    config.temperature = 1.0  # the learner copies it from the rollout's config
    example = TrainExample(
        prompt_ids=jnp.repeat(rollouts.prompts, group_size, axis=0),
        prompt_mask=jnp.repeat(rollouts.prompt_mask, group_size, axis=0),
        completion_ids=rollouts.completions.reshape(num_rows, -1),
        completion_mask=rollouts.mask.reshape(num_rows, -1),
        advantages=advantages.group_normalized(rollouts.rewards).reshape(num_rows),
        old_per_token_logps=rollouts.behavior_logprobs.reshape(num_rows, -1),
        ref_per_token_logps=None,
    )

    def loss_fn(model, train_example, algo_config):
        return algo_core.grpo_loss_fn(model, train_example, algo_config, pad_id=0, eos_id=sizes.vocab_size + 7)

    model = llama.tunix_llama(params, sizes)
    trainer = Trainer(model, optax.adam(learning_rate), TrainingConfig(eval_every_n_steps=10**9), lambda: {})
    trainer.with_loss_fn(loss_fn, has_aux=True)
    trainer.with_gen_model_input_fn(lambda batch: {"train_example": batch, "algo_config": config})
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def update():
        loss, _, norm = step(example)
        return loss, norm

    return Updates(update)


def against_tunix(smoke: bool) -> bool:
    """Prints the ratio for a model with a vocabulary and for one of the default run's size; whether both compute the same."""
    small = llama.Sizes(vocab_size=32, num_layers=2, width=64, mlp_width=176)
    cases = [(small, (2, 4, 2, 8), 2)] if smoke else [(llama.Sizes(), (4, 32, 4, 64), 9), (small, (64, 6, 8, 4), 99)]
    are_same = [compare_updates(*case) for case in cases]
    return all(are_same)


def compare_updates(sizes: llama.Sizes, shape: tuple[int, int, int, int], repetitions: int) -> bool:
    """One model and batch, in alternation."""
    params = jax.jit(llama.decoder(sizes).init)(jax.random.key(0))
    rollouts = random_batch(sizes, params, shape)
    ours, theirs = (make(sizes, params, rollouts, 1e-4) for make in (our_updates, tunix_updates))
    for _ in range(repetitions):
        theirs.timed()
        ours.timed()
    is_same = np.allclose(ours.first, theirs.first, rtol=SAME, atol=SAME)
    values = [f"loss {loss:.6f}, gradient {norm:.5f}" for loss, norm in (ours.first, theirs.first)]
    found = ratio(ours, theirs)
    size = f"{sizes.num_layers} x {sizes.width}, V = {sizes.vocab_size}"
    print(f"update / tunix's, {size:<18} {found[0]:.3f} ({found[1]:.3f}..{found[2]:.3f})")
    print(f"  {values[0]} here; {values[1]} there{'' if is_same else ': NOT THE SAME'}")
    return is_same


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
    is_same = True
    if importlib.util.find_spec("tunix") is None:
        print("tunix is left out: it is not importable")
    else:
        is_same = against_tunix(smoke)
    if not is_same:
        return 1
    return 0 if smoke or (lag[0] <= MAX_LAG_RATIO and bias[0] <= MAX_BIAS_RATIO) else 1


if __name__ == "__main__":
    sys.exit(main())
