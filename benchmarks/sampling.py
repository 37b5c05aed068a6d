"""Greedy decoding of one random Llama by `sampling.generate`, tunix's sampler and Hugging Face's generate.

python -m benchmarks.sampling          # this package alone, greedy and sampled
.venv-parity/bin/python -m benchmarks.sampling     # with the peers, after `make parity`

All get the same float32 weights (4 layers of width 256, V = 32,000) and the same 32 prompts, one row each, and draw 128 tokens
without an end token. What they write is compared token for token; repetitions alternate, so that a change of the machine's
speed meets all. Greedy decoding here must be at least 1.3 times as fast as tunix and 2 times as fast as Hugging Face (median
of the ratios within a repetition); the exit code says so. Where a peer is not importable it is left out, and said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import sampling
from parity import llama

SIZES = llama.Sizes()
ROWS, PROMPT_LENGTH, LENGTH = 32, 32, 128
REQUIRED = {"tunix": 1.3, "hugging face": 2.0}
PAD, NEVER = 0, SIZES.vocab_size + 7  # an end token that no row draws
MIN_AGREEMENT = 0.99  # of rows, token for token: in float32 a near tie may part two orders of the same sums


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares decoders; exits with 1 where a bound is missed.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    policy = llama.decoder(SIZES)
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(1, SIZES.vocab_size, (ROWS, PROMPT_LENGTH), dtype=np.int32)
    cache = "with a cache" if policy.init_cache is not None else "WITHOUT a cache: every step reads all of every row"
    print(f"{ROWS} rows x {LENGTH} tokens, V = {SIZES.vocab_size}; this decoder is {cache}")
    runs = {"greedy": ours(policy, params, prompts, greedy=True), "sampled": ours(policy, params, prompts)}
    for name, module, make in (("tunix", "tunix", tunix_run), ("hugging face", "transformers", hugging_face_run)):
        if options.alone or importlib.util.find_spec(module) is None:
            print(f"  {name} is left out: {module} is not importable" if not options.alone else f"  {name} is left out")
        else:
            runs[name] = make(params, prompts)
    return 0 if compare(runs, options.repetitions) else 1


def ours(policy, params, prompts, **options) -> Callable[[], np.ndarray]:
    """generate, one completion a prompt; tokens alone, as the peers return them."""
    options |= dict(group_size=1, max_length=LENGTH, pad_token=PAD)
    draw = jax.jit(lambda *given: sampling.generate(policy, *given, **options).completions[:, 0])
    key, prompts = jax.random.key(1), jnp.asarray(prompts)
    return lambda: np.asarray(draw(params, prompts, jnp.ones(prompts.shape, bool), key))


def hugging_face_run(params, prompts) -> Callable[[], np.ndarray]:
    """LlamaForCausalLM.generate with its default cache."""
    import torch

    model = llama.hugging_face_llama(params, SIZES)
    tokens = torch.from_numpy(prompts.astype(np.int64))
    length = dict(max_new_tokens=LENGTH, min_new_tokens=LENGTH, pad_token_id=PAD, eos_token_id=None)

    def run():
        with torch.inference_mode():
            drawn = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **length)
        return drawn[:, PROMPT_LENGTH:].numpy()

    return run


class Numbers:
    """A tokenizer for tunix: a text is token ids with spaces between them."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def pad_id(self):
        return PAD

    def bos_id(self):
        return 0

    def eos_id(self):
        return NEVER


def tunix_run(params, prompts) -> Callable[[], np.ndarray]:
    """tunix's own Llama in tunix's Sampler."""
    from tunix.generate import sampler as tunix_sampler

    kept = dict(num_layers=SIZES.num_layers, num_kv_heads=SIZES.num_heads, head_dim=SIZES.width // SIZES.num_heads)
    cache = tunix_sampler.CacheConfig(cache_size=PROMPT_LENGTH + LENGTH, **kept)
    sampler = tunix_sampler.Sampler(llama.tunix_llama(params, SIZES), Numbers(), cache)
    texts = [" ".join(map(str, row)) for row in prompts]

    def run():
        drawn = sampler(texts, max_generation_steps=LENGTH, max_prompt_length=PROMPT_LENGTH, eos_tokens=[NEVER])
        return np.stack([np.asarray(row)[:LENGTH] for row in drawn.tokens])

    return run


def compare(runs: dict[str, Callable[[], np.ndarray]], repetitions: int) -> bool:
    """Times all in alternation, prints rates and ratios, and says whether every bound holds."""
    drawn = {name: run() for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rate = ROWS * LENGTH / statistics.median(times)
        print(f"  {name:<13} {statistics.median(times):6.2f} s ({min(times):.2f}..{max(times):.2f}) {rate:7.0f} tokens/s")
    held = True
    for name in REQUIRED.keys() & runs.keys():
        ratio = statistics.median(map(float.__truediv__, seconds[name], seconds["greedy"]))
        agreement = float(np.mean(np.all(drawn[name] == drawn["greedy"], axis=1)))
        fine = ratio >= REQUIRED[name] and agreement >= MIN_AGREEMENT
        held &= fine
        print(
            f"  {name}: greedy is {ratio:.2f} times as fast, required {REQUIRED[name]:g}; "
            f"rows equal token for token {agreement:.0%}: {'PASS' if fine else 'FAIL'}"
        )
    return held


if __name__ == "__main__":
    sys.exit(main())
