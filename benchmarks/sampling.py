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
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import policies, sampling

VOCABULARY, WIDTH, LAYERS, HEADS, MLP_WIDTH = 32_000, 256, 4, 4, 688
ROPE_BASE, EPSILON = 1e6, 1e-6  # the base of tunix, whose attention takes no other
ROWS, PROMPT_LENGTH, LENGTH = 32, 32, 128
REQUIRED = {"tunix": 1.3, "hugging face": 2.0}
PAD, NEVER = 0, VOCABULARY + 7  # an end token that no row draws
MIN_AGREEMENT = 0.99  # of rows, token for token: in float32 a near tie may part two orders of the same sums


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares decoders; exits with 1 where a bound is missed.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    policy = make_policy()
    params = jax.jit(policy.init)(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, PROMPT_LENGTH), dtype=np.int32)
    cache = "with a cache" if policy.init_cache is not None else "WITHOUT a cache: every step reads all of every row"
    print(f"{ROWS} rows x {LENGTH} tokens, V = {VOCABULARY}; this decoder is {cache}")
    runs = {"greedy": ours(policy, params, prompts, greedy=True), "sampled": ours(policy, params, prompts)}
    for name, module, make in (("tunix", "tunix", tunix_run), ("hugging face", "transformers", hugging_face_run)):
        if options.alone or importlib.util.find_spec(module) is None:
            print(f"  {name} is left out: {module} is not importable" if not options.alone else f"  {name} is left out")
        else:
            runs[name] = make(params, prompts)
    return 0 if compare(runs, options.repetitions) else 1


def make_policy():
    """The decoder that all of them run."""
    return policies.decoder(
        VOCABULARY,
        num_layers=LAYERS,
        width=WIDTH,
        num_heads=HEADS,
        mlp_width=MLP_WIDTH,
        rope_base=ROPE_BASE,
        norm_epsilon=EPSILON,
    )


def ours(policy, params, prompts, **options) -> Callable[[], np.ndarray]:
    """generate, one completion a prompt."""
    draw = functools.partial(sampling.generate, policy, group_size=1, max_length=LENGTH, pad_token=PAD, **options)
    draw, key, prompts = jax.jit(draw), jax.random.key(1), jnp.asarray(prompts)
    return lambda: np.asarray(draw(params, prompts, jnp.ones(prompts.shape, bool), key).completions[:, 0])


def llama_weights(params) -> dict[str, np.ndarray]:
    """The weights by Hugging Face's names, [out, in], from the flat layout of `policies.decoder`.

    Its heads stand one after the other and turn the pairs (i, i + size/2), as Llama's do in Hugging Face's layout.
    """
    weights = {"model.embed_tokens.weight": params["embedding"], "lm_head.weight": params["unembedding"]}
    weights["model.norm.weight"] = params["final_norm"]["scale"]
    for layer in range(LAYERS):
        attention, mlp, prefix = params[f"attention_{layer}"], params[f"mlp_{layer}"], f"model.layers.{layer}."
        key, value = np.split(np.asarray(attention["key_value"]), 2)
        gate, up = np.split(np.asarray(mlp["gate_up"]), 2)
        of_layer = {"self_attn.q_proj": attention["query"], "self_attn.k_proj": key, "self_attn.v_proj": value}
        of_layer |= {
            "self_attn.o_proj": attention["out"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": mlp["down"],
        }
        of_layer |= {"input_layernorm": params[f"attention_norm_{layer}"]["scale"]}
        of_layer |= {"post_attention_layernorm": params[f"mlp_norm_{layer}"]["scale"]}
        weights |= {f"{prefix}{name}.weight": array for name, array in of_layer.items()}
    return {name: np.array(array, np.float32) for name, array in weights.items()}


def hugging_face_run(params, prompts) -> Callable[[], np.ndarray]:
    """LlamaForCausalLM.generate with its default cache."""
    import torch
    import transformers

    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_hidden_layers=LAYERS)
    config = transformers.LlamaConfig(
        num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=EPSILON, rope_theta=ROPE_BASE, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in llama_weights(params).items()}, strict=True)
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
    from flax import nnx
    from tunix.generate import sampler as tunix_sampler
    from tunix.models.llama3 import model as llama3

    size = WIDTH // HEADS
    heads = dict(num_heads=HEADS, num_kv_heads=HEADS, head_dim=size)
    config = llama3.ModelConfig(
        num_layers=LAYERS, vocab_size=VOCABULARY, embed_dim=WIDTH, hidden_dim=MLP_WIDTH, norm_eps=EPSILON, **heads,
        rope_theta=int(ROPE_BASE),
    )  # fmt: skip
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    weights = llama_weights(params)

    def fill(variable, name, convert):
        array = jnp.asarray(convert(weights[name]))
        assert variable.value.shape == array.shape, (name, variable.value.shape, array.shape)
        variable.value = array

    fill(model.embedder.input_embedding, "model.embed_tokens.weight", lambda w: w)
    fill(model.lm_head.w, "lm_head.weight", lambda w: w.T)
    fill(model.final_norm.w, "model.norm.weight", lambda w: w)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj"):  # [D, heads, size], or [heads, D, size] in older versions
            variable = getattr(layer.attn, name).w
            by_head = lambda w, first=variable.value.shape[0] == HEADS: (  # noqa: E731
                w.reshape(HEADS, size, WIDTH).transpose((0, 2, 1) if first else (2, 0, 1))
            )
            fill(variable, f"{prefix}self_attn.{name}.weight", by_head)
        fill(layer.attn.o_proj.w, f"{prefix}self_attn.o_proj.weight", lambda w: w.T.reshape(HEADS, size, WIDTH))
        for name in ("gate_proj", "up_proj", "down_proj"):
            fill(getattr(layer.mlp, name).kernel, f"{prefix}mlp.{name}.weight", lambda w: w.T)
        for name in ("input_layernorm", "post_attention_layernorm"):
            fill(getattr(layer, name).w, f"{prefix}{name}.weight", lambda w: w)
    cache = tunix_sampler.CacheConfig(cache_size=PROMPT_LENGTH + LENGTH, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=size)
    sampler = tunix_sampler.Sampler(model, Numbers(), cache)
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
