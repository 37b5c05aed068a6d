"""Policy loss and gradient from hidden states and output matrix: `head` against the plain head, which holds the logits.

python -m benchmarks.loss_head

Both sides get the same arrays (float32, rows of 128 tokens, sequence mean of `losses.ppo_clip`) and give the loss and its
gradient in hidden states and output matrix. The plain head is hidden @ unembed and jax.grad, with log_softmax and a gather as
most write it, and with a gather and logsumexp, which holds half as much; where torch is importable, the latter in torch is a
third rival. Repetitions alternate, so that a change of the machine's speed meets all. The head must be at least as fast as the
fastest rival (median of the ratios within a repetition), take at most 0.35 times the temporary memory of the plain head that
takes least, and agree with it within 1e-5 of the largest entry of each gradient; the exit code says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import aggregation, head, losses

SIZES = ((1024, 512, 151936), (2048, 512, 32768))  # N, D, V
ROW_LENGTH = 128
MAX_TIME_RATIO, MAX_MEMORY_RATIO, TOLERANCE = 1.0, 0.35, 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the heads; exits with 1 where a bound is missed.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunk_size", type=int, default=None)
    parser.add_argument("--block_size", type=int, default=None)
    parser.add_argument("--case", type=int, choices=range(len(SIZES)), help="only this one of the sizes")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    sizes = dict(chunk_size=options.chunk_size, block_size=options.block_size)
    cases = range(len(SIZES)) if options.case is None else (options.case,)
    return 0 if all([compare(*SIZES[case], options.repetitions, sizes) for case in cases]) else 1


def make_inputs(num_tokens: int, width: int, vocab_size: int) -> dict[str, jax.Array]:
    """Rows with logits of standard deviation 2, one in four of them half masked, and old log-probs around the learner's."""
    rng = np.random.default_rng(0)
    shape = (num_tokens // ROW_LENGTH, ROW_LENGTH)
    arrays = dict(
        hidden=rng.standard_normal((*shape, width), np.float32),
        unembed=2 * width**-0.5 * rng.standard_normal((width, vocab_size), np.float32),
        tokens=rng.integers(0, vocab_size, shape),
        old_logprobs=(-np.log(vocab_size) - 2 + 2 * rng.standard_normal(shape)).astype(np.float32),
        advantages=rng.standard_normal(shape[0], np.float32),
        mask=np.arange(ROW_LENGTH) < np.where(np.arange(shape[0]) % 4 == 0, ROW_LENGTH // 2, ROW_LENGTH)[:, None],
    )
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def with_log_softmax(logits, tokens):
    """Log-probs of the tokens, of all entries first."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def with_logsumexp(logits, tokens):
    """Log-probs of the tokens alone."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def plain_head(logprobs_fn, hidden, unembed, tokens, old_logprobs, advantages, mask):
    """The loss and its gradient with logits [B, L, V] and autodiff."""

    def loss(hidden, unembed):
        logprobs = logprobs_fn(hidden @ unembed, tokens)
        return aggregation.sequence_mean(losses.ppo_clip(logprobs, old_logprobs, advantages, mask), mask).mean()

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembed)
    return value, *gradient


def chunked_head(hidden, unembed, tokens, old_logprobs, advantages, mask, **sizes):
    """The same through `head`."""
    arrays = (hidden, unembed, tokens, old_logprobs, advantages, mask)
    result = head.loss_and_gradient(*arrays, loss_fn=losses.ppo_clip, **sizes)
    return result.loss, result.hidden, result.unembed


def torch_head(inputs: dict[str, jax.Array]) -> Callable[[], tuple]:
    """The plain head in torch, as trainers on it write their loss."""
    import torch

    arrays = {name: torch.from_numpy(np.array(array)) for name, array in inputs.items()}
    tokens, mask = arrays["tokens"].long()[..., None], arrays["mask"].float()
    advantages = arrays["advantages"][:, None]

    def run():
        hidden, unembed = (arrays[name].detach().requires_grad_() for name in ("hidden", "unembed"))
        logits = hidden @ unembed
        logprobs = logits.gather(-1, tokens)[..., 0] - logits.logsumexp(-1)
        ratio = torch.exp(logprobs - arrays["old_logprobs"])
        values = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = ((values * mask).sum(-1) / mask.sum(-1)).mean()
        loss.backward()
        return loss.detach().numpy(), hidden.grad.numpy(), unembed.grad.numpy()

    return run


def compare(num_tokens: int, width: int, vocab_size: int, repetitions: int, sizes: dict[str, int | None]) -> bool:
    """Times all heads in alternation, prints the ratios and says whether every bound holds."""
    print(f"N = {num_tokens}, D = {width}, V = {vocab_size}, {repetitions} repetitions")
    inputs = make_inputs(num_tokens, width, vocab_size)
    heads = {
        "plain, log_softmax": functools.partial(plain_head, with_log_softmax),
        "plain, logsumexp": functools.partial(plain_head, with_logsumexp),
        "head": functools.partial(chunked_head, **sizes),
    }
    compiled = {name: jax.jit(function).lower(**inputs).compile() for name, function in heads.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    runs = {name: functools.partial(program, **inputs) for name, program in compiled.items()}
    if importlib.util.find_spec("torch"):
        runs["torch"] = torch_head(inputs)
    error = max_difference(runs["head"](), runs["plain, logsumexp"]())
    seconds = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    for name in runs:
        temporary = f"{memory[name] / 1e6:7.0f} MB temporary" if name in memory else ""
        spread = f"{min(seconds[name]):6.2f}..{max(seconds[name]):.2f}"
        print(f"  {name:<18} {statistics.median(seconds[name]):6.2f} s ({spread}) {temporary}")
    rivals = [name for name in runs if name != "head"]
    ratios = {name: statistics.median(map(float.__truediv__, seconds["head"], seconds[name])) for name in rivals}
    print("  time of head / " + ", / ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    least = min(size for name, size in memory.items() if name != "head")
    bounds = [
        ("time / fastest", max(ratios.values()), MAX_TIME_RATIO, ".2f"),
        ("temporary memory / least of plain", memory["head"] / least, MAX_MEMORY_RATIO, ".3f"),
        ("largest relative difference of loss and gradients", error, TOLERANCE, ".1e"),
    ]
    for what, value, bound, form in bounds:
        print(f"  {what}: {value:{form}}, required {bound:g}: {'PASS' if value <= bound else 'FAIL'}")
    return all(value <= bound for _, value, bound, _ in bounds)


def timed(run: Callable[[], tuple]) -> float:
    """Seconds until all of the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def max_difference(result: tuple, expected: tuple) -> float:
    """max |a − b| / max |b| over the arrays."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(result, expected, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
