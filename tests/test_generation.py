"""Completions drawn token by token: their distribution, their log-probs, what they depend on, and what a step reads."""

from __future__ import annotations

import doctest
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jax_async_grpo import metrics, policies, tasks
from jax_async_grpo.policies import visibility
from jax_async_grpo.sampling import generate, sampling_logits
from jax_async_grpo.sampling.choice import most_probable
from jax_async_grpo.sampling.noise import completion_keys, exponential_noise, threefry
from jax_async_grpo.types import Policy

V, END, B, P, G, L = 7, 6, 3, 5, 4, 6
LEVEL = 1e-3  # of the chi-square tests; the keys are fixed, so a test that passes always passes
NUM_DEVICES = 8


def cached_attention(vocab_size=V, width=8, num_layers=2, longest=32, dtype=jnp.float64) -> Policy:
    """Attention with a cache, as small as the contract of `Policy.init_cache` allows; it keeps the inputs of every layer."""

    def init(key):
        shapes = {"embedding": (vocab_size, width), "place": (longest, width), "out": (width, vocab_size)}
        shapes |= {name: (num_layers, width, width) for name in ("query", "key", "value")}
        keys = jax.random.split(key, len(shapes))
        return {name: jax.random.normal(k, s, dtype) for k, (name, s) in zip(keys, shapes.items(), strict=True)}

    def init_cache(params, num_rows, capacity):
        inputs = jnp.zeros((num_layers, num_rows, capacity, width), dtype)
        return {"inputs": inputs, "valid": jnp.zeros((num_rows, capacity), bool), "length": jnp.zeros((), jnp.int32)}

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None):
        positions = jnp.arange(tokens.shape[1]) if positions is None else positions
        x = params["embedding"][tokens] + params["place"][positions]
        sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
        if cache is not None:
            start, zero, inputs = cache["length"], jnp.zeros((), jnp.int32), []
            valid = jax.lax.dynamic_update_slice(cache["valid"], segment_ids != 0, (zero, start))
            own = start + jnp.arange(tokens.shape[1])[:, None]
            column = jnp.arange(valid.shape[1])
            sees = (column <= own) & (valid[:, None] | (column == own))
        for layer in range(num_layers):
            before = x
            if cache is not None:
                before = jax.lax.dynamic_update_slice(cache["inputs"][layer], x, (zero, start, zero))
                inputs.append(before)
            query, key, value = x @ params["query"][layer], before @ params["key"][layer], before @ params["value"][layer]
            scores = jnp.where(sees, query @ jnp.swapaxes(key, 1, 2) / width, -1e9)
            x = jnp.tanh(x + jax.nn.softmax(scores) @ value)
        if cache is not None:
            cache = {"inputs": jnp.stack(inputs), "valid": valid, "length": start + jnp.int32(tokens.shape[1])}
        return x, cache

    return Policy(init, apply, lambda params: params["out"], init_cache=init_cache)


POLICIES = {
    "tabular": policies.tabular(V, 2, init_scale=1.0),
    "logits": policies.from_logits(lambda table, tokens: table[tokens], lambda key: jax.random.normal(key, (V, V))),
    "decoder": policies.decoder(V, num_layers=1, width=8, num_heads=1, dtype=jnp.float64),
    "cached": cached_attention(),
}


@functools.cache
def params_of(name):
    return jax.jit(POLICIES[name].init)(jax.random.key(3))


def prompts_of(num=B, seed=0):
    """Prompts of several lengths, padded on the left."""
    rng = np.random.default_rng(seed)
    mask = np.arange(P) >= P - rng.integers(1, P + 1, (num, 1))
    return np.where(mask, rng.integers(0, V, (num, P)), 0), mask


def drawn(name, prompts, mask, key=0, group_size=G, **options):
    options = dict(max_length=L, end_token=END) | options
    draw = functools.partial(generate, POLICIES[name], group_size=group_size, **options)
    return jax.tree.map(np.asarray, jax.jit(draw)(params_of(name), prompts, mask, jax.random.key(key)))


@pytest.fixture(scope="module")
def whole():
    """The draws that others are held against."""
    return {name: drawn(name, *prompts_of(), group_size=40) for name in ("tabular", "cached")}


# The noise


def test_threefry_is_that_of_jax():
    rng = np.random.default_rng(0)
    key, count = (rng.integers(0, 2**32, n, np.uint32) for n in (2, 10))
    expected = jax.extend.random.threefry_2x32(key, count)
    np.testing.assert_array_equal(jnp.concatenate(threefry(key[0], key[1], count[:5], count[5:])), expected)


def test_noise_is_exponential_and_stands_where_its_address_says():
    keys = jax.jit(completion_keys, static_argnums=4)(jax.random.key(0), 0, 0, jnp.arange(2), 2).reshape(4, 2)
    draw = jax.jit(exponential_noise, static_argnums=2)
    noise = np.asarray(draw(keys, 3, 5000))
    assert noise.dtype == np.float32
    assert scipy.stats.kstest(np.asarray(noise).ravel(), "expon").pvalue > LEVEL
    np.testing.assert_array_equal(draw(keys[1:2], 3, 100), noise[:100, 1:2])
    others = [draw(keys, 4, 5000), noise[:, [1, 0, 3, 2]], noise[:, [2, 3, 0, 1]]]
    assert all(abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.03 for other in others)


def test_every_part_of_the_address_gives_another_key():
    fold = jax.jit(completion_keys, static_argnums=4)

    def keys(seed=0, stream=0, step=0, prompts=(0, 1)):
        return fold(jax.random.key(seed), stream, step, jnp.array(prompts), 3).reshape(-1, 2).tolist()

    addresses = [keys(), keys(seed=1), keys(stream=1), keys(step=1), keys(prompts=(2, 3)), keys(stream=1, step=1)]
    assert len({tuple(key) for rows in addresses for key in rows}) == 6 * len(addresses)
    assert keys(prompts=(1, 0)) == keys()[3:] + keys()[:3]


# The distribution


@pytest.mark.parametrize("name", ["tabular", "cached"])
def test_completions_have_the_probabilities_of_the_policy(name):
    task = tasks.digit_sum(num_prompts=2, num_digits=2, base=5, variable_length=True)  # V = 7, the end is 6
    strings = (task.prompts, task.completions, task.mask)
    enumerate_all = jax.jit(lambda p: policies.completion_logprobs(POLICIES[name], p, *strings, allowed=task.allowed))
    logprobs = enumerate_all(params_of(name))
    options = dict(group_size=5000, max_length=2, end_token=task.end_token, allowed=task.allowed)
    result = drawn(name, task.prompts, task.prompt_mask, **options)
    same = (result.completions[:, :, None] == task.completions) | ~task.mask
    index = (same & (result.mask[:, :, None] == task.mask)).all(axis=-1)
    assert (index.sum(axis=-1) == 1).all()
    for prompt in range(2):
        expected = 5000 * np.exp(np.asarray(logprobs[prompt]).sum(axis=-1))
        counts = index[prompt].sum(axis=0)
        rare = expected < 5
        cells = [np.append(x[~rare], [x[rare].sum()] * int(rare.any())) for x in (counts, expected)]
        assert scipy.stats.chisquare(*cells).pvalue > LEVEL


def test_two_policies_that_share_noise_agree_as_often_as_the_coupling_says():
    policy = policies.from_logits(lambda table, tokens: table[tokens])
    first = jax.random.normal(jax.random.key(0), (1, V))
    second = first + 0.5 * jax.random.normal(jax.random.key(1), (1, V))
    options = dict(group_size=20_000, max_length=1)
    draw = jax.jit(lambda table, key: generate(policy, table, jnp.zeros((1, 1), int), None, key, **options).completions)
    key = jax.random.key(2)
    one, two = draw(first, key), draw(second, key)
    p, q = jax.nn.softmax(first[0]), jax.nn.softmax(second[0])
    # Both choose i iff E_i max(p_j/p_i, q_j/q_i) <= E_j for all j.
    same = np.sum(1 / np.sum(np.maximum(p[None] / p[:, None], q[None] / q[:, None]), axis=1))
    assert abs(np.mean(one == two) - same) < 4 * (same * (1 - same) / 20_000) ** 0.5
    np.testing.assert_array_equal(draw(first + 0.0, key), one)
    assert abs(np.mean(draw(first, jax.random.key(3)) == one) - np.sum(p * p)) < 0.02 < same - np.sum(p * p)


def reference_logits(logits, temperature, top_k, top_p):
    """The distribution that is sampled from, token by token."""
    logits = logits / temperature
    for row in logits:
        order = np.argsort(-row)
        kept = [i for i in order if np.isfinite(row[i])][:top_k]
        probabilities = np.exp(row[kept]) / np.exp(row[kept]).sum()
        total, nucleus = 0.0, []
        for index, probability in zip(kept, probabilities, strict=True):
            if top_p is not None and total >= top_p and top_p < 1:
                break
            nucleus.append(index)
            total += probability
        row[[i for i in range(len(row)) if i not in nucleus]] = -np.inf
    return logits


@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
def test_truncated_distributions(top_k, top_p):
    logits = 2 * np.random.default_rng(0).normal(size=(20, 11))
    logits[:10, :4] = -np.inf
    result = sampling_logits(jnp.asarray(logits), temperature=1.3, top_k=top_k, top_p=top_p)
    expected = reference_logits(logits, 1.3, top_k, top_p)
    np.testing.assert_allclose(result, expected, rtol=1e-14)
    np.testing.assert_allclose(np.exp(jax.nn.log_softmax(result)).sum(axis=-1), 1, rtol=1e-12)


def logits_of(name, prompts, mask, completions):
    """[B, G, L, V] logits that the tokens were chosen by, from plain rows without padding before them."""
    group = completions.shape[1]
    rows = np.zeros((B, group, P + L), int)
    for prompt, tokens, valid in zip(rows, prompts, mask, strict=True):
        prompt[:, : valid.sum()] = tokens[valid]
    before = mask.sum(axis=1)[:, None, None] + np.arange(L)
    np.put_along_axis(rows, np.broadcast_to(before, completions.shape), completions, axis=-1)
    apply = jax.jit(lambda params, rows: POLICIES[name].apply(params, rows)[0] @ POLICIES[name].unembed(params))
    logits = np.asarray(apply(params_of(name), rows.reshape(-1, P + L))).reshape(B, group, P + L, V)
    return np.take_along_axis(logits, before[..., None] - 1, axis=2)


def test_recorded_logprobs_are_of_the_distribution_drawn_from():
    prompts, mask = prompts_of()
    options = dict(group_size=30, max_length=L, top_k=4)
    draw = jax.jit(
        lambda params, temperature, top_p: generate(
            POLICIES["cached"], params, prompts, mask, jax.random.key(0), temperature=temperature, top_p=top_p, **options
        )
    )
    for temperature, top_p in ((1.6, 0.8), (0.7, 1.0)):
        result = jax.tree.map(np.asarray, draw(params_of("cached"), temperature, top_p))
        logits = logits_of("cached", prompts, mask, result.completions)
        changed = reference_logits(logits.reshape(-1, V).copy(), temperature, 4, top_p).reshape(logits.shape)
        for logprobs, of in ((result.logprobs, changed), (result.policy_logprobs, logits)):
            expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(of)), result.completions[..., None], axis=-1)[..., 0]
            np.testing.assert_allclose(logprobs, expected, rtol=1e-10)
            assert np.isfinite(expected).all()
        assert np.abs(result.logprobs - result.policy_logprobs).max() > 0.1


@pytest.mark.parametrize("name", POLICIES)
def test_logprobs_are_those_that_the_learner_recomputes(name):
    prompts, mask = prompts_of()
    allowed = np.ones((L, V), bool)
    allowed[1, 2:5] = allowed[3, :3] = False
    result = drawn(name, prompts, mask, allowed=allowed)
    options = dict(prompt_mask=mask, allowed=allowed)
    recompute = jax.jit(lambda *arrays: policies.token_logprobs(POLICIES[name], *arrays, **options))
    recomputed = recompute(params_of(name), prompts, result.completions, result.mask)
    np.testing.assert_array_equal(result.logprobs, result.policy_logprobs)
    np.testing.assert_allclose(result.logprobs, recomputed, atol=1e-11)
    assert not result.mask.all() and result.mask.any(axis=-1).all()
    assert (np.isin(result.completions[..., 1], (0, 1, 5, 6)) | ~result.mask[..., 1]).all()
    fault = metrics.logprob_mismatch(result.logprobs, recomputed + 0.01 * result.mask, result.mask)
    np.testing.assert_allclose(list(fault.values()), 0.01, rtol=1e-6)


def test_single_precision_stays_within_the_tolerance():
    policy = cached_attention(dtype=jnp.float32)
    prompts, mask = prompts_of()

    @jax.jit
    def draw(key):
        params = policy.init(key)
        result = generate(policy, params, prompts, mask, key, group_size=20, max_length=L)
        again = policies.token_logprobs(policy, params, prompts, result.completions, result.mask, prompt_mask=mask)
        return result, again

    with jax.default_matmul_precision("highest"):
        result, recomputed = draw(jax.random.key(1))
    assert result.logprobs.dtype == jnp.float32
    mismatch = metrics.logprob_mismatch(result.logprobs, recomputed, result.mask)
    assert 0 < mismatch["logprob_mismatch/max_abs"] <= metrics.logprob_tolerance(jnp.float32) <= 1e-5


# What a completion depends on, and what not


@pytest.mark.parametrize("name", ["tabular", "cached"])
def test_a_completion_is_the_same_in_every_batch(name, whole):
    prompts, mask = prompts_of()
    ids = np.arange(B)

    def agrees(result, rows, group=slice(None)):
        expected = jax.tree.map(lambda x: x[rows, group], whole[name])
        np.testing.assert_array_equal(result.completions, expected.completions)
        np.testing.assert_array_equal(result.mask, expected.mask)
        np.testing.assert_allclose(result.logprobs, expected.logprobs, atol=1e-12)

    order = np.array([2, 0, 1])
    agrees(drawn(name, prompts[order], mask[order], group_size=40, prompt_ids=ids[order]), order)
    agrees(drawn(name, prompts[1:2], mask[1:2], prompt_ids=ids[1:2]), slice(1, 2), slice(0, G))
    # Padding on the left, on the right and inside, and under it tokens that stand for nothing.
    wide, seen = np.full((B, P + 4), 5), np.zeros((B, P + 4), int)
    columns = [2, 3, 5, 6, 7]
    wide[:, columns], seen[:, columns] = prompts, mask
    agrees(drawn(name, wide, seen), slice(None), slice(0, G))


def test_draws_differ_by_member_stream_step_and_key(whole):
    prompts, mask = prompts_of()
    draw = jax.jit(
        lambda params, key, stream, step: (
            generate(
                POLICIES["tabular"],
                params,
                prompts,
                mask,
                key,
                stream=stream,
                step=step,
                group_size=40,
                max_length=L,
                end_token=END,
            ).completions
        )
    )
    draws = [draw(params_of("tabular"), jax.random.key(k), *x) for k, *x in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    np.testing.assert_array_equal(draws[0], whole["tabular"].completions)
    for other in draws[1:]:
        assert np.mean(np.all(draws[0] == other, axis=-1)) < 0.2
    assert len(np.unique(draws[0][0], axis=0)) > 15


def test_nearby_parameters_share_most_tokens(whole):
    prompts, mask = prompts_of()
    moved = jax.tree.map(lambda p: p + 0.01 * jax.random.normal(jax.random.key(9), p.shape), params_of("cached"))
    draw = jax.jit(lambda params, key: generate(POLICIES["cached"], params, prompts, mask, key, group_size=40, max_length=L))
    same, near, far = (draw(*x).completions for x in _coupled_and_not(params_of("cached"), moved))
    share = [np.mean(np.all(same == other, axis=-1)) for other in (near, far)]
    assert share[0] > 0.5 and share[1] < 0.05


def _coupled_and_not(params, moved):
    return (params, jax.random.key(0)), (moved, jax.random.key(0)), (moved, jax.random.key(1))


# Ends


def test_a_completion_ends_with_its_end_token(whole):
    for result in whole.values():
        ended = np.cumsum(result.completions == END, axis=-1) - (result.completions == END) > 0
        np.testing.assert_array_equal(result.mask, ~ended)
        assert result.mask.all(axis=-1).any() and not result.mask.all()
        for array in (result.logprobs, result.policy_logprobs):
            assert (array[result.mask] < 0).all() and not array[~result.mask].any()
    padded = drawn("tabular", *prompts_of(), pad_token=3)
    np.testing.assert_array_equal(padded.completions[~padded.mask], 3)
    np.testing.assert_array_equal(padded.mask, whole["tabular"].mask[:, :G])


def counting(policy: Policy):
    """The policy, with a list of the shapes it is applied to while traced and of the steps it takes while it runs."""
    shapes, steps = [], []

    def apply(params, tokens, **keywords):
        shapes.append(tokens.shape)
        jax.debug.callback(lambda: steps.append(tokens.shape))
        return policy.apply(params, tokens, **keywords)

    return policy._replace(apply=apply), shapes, steps


@pytest.mark.parametrize("name", ["tabular", "cached"])
def test_prompts_are_read_once_and_the_loop_stops_when_all_have_ended(name, whole):
    prompts, mask = prompts_of()
    policy, shapes, steps = counting(POLICIES[name])
    draw = jax.jit(
        lambda params, end: generate(
            policy, params, prompts, mask, jax.random.key(0), group_size=G, max_length=L, end_token=end, top_k=1
        )
    )
    result = draw(params_of(name), END)
    assert set(shapes) == ({(B, P - 1), (B * G, 1)} if name == "cached" else {(B * G, P + L - 1)})
    greedy = drawn(name, prompts, mask, greedy=True)
    np.testing.assert_array_equal(result.completions, greedy.completions)
    for end, expected in ((END, None), (-1, L)):
        steps.clear()
        trips = int(draw(params_of(name), end).mask.sum(axis=-1).max())
        jax.effects_barrier()
        assert len(steps) == trips + (name == "cached")
        assert expected is None or trips == expected


@pytest.mark.parametrize("name", ["tabular", "cached"])
def test_greedy_takes_the_most_probable_allowed_token(name):
    prompts, mask = prompts_of()
    allowed = np.ones((L, V), bool)
    allowed[::2, 1:4] = False
    result = drawn(name, prompts, mask, greedy=True, allowed=allowed, end_token=None, group_size=2)
    logits = np.where(allowed, logits_of(name, prompts, mask, result.completions), -np.inf)
    np.testing.assert_array_equal(result.completions, logits.argmax(axis=-1))
    assert not result.logprobs.any()
    own = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), result.completions[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(result.policy_logprobs, own, atol=1e-11)
    assert (np.diff(result.completions, axis=1) == 0).all()


def test_the_most_probable_token_is_the_first_of_equals():
    scores = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0], [-jnp.inf, 0.0, 0.0], [jnp.nan, 1.0, 2.0]])
    assert most_probable(scores.T).tolist() == [1, 0, 1, 0]
    for vocab_size in (128, 300):  # whole blocks, and a part of one
        scores = np.random.default_rng(0).integers(0, 40, (vocab_size, 50))
        assert most_probable(jnp.asarray(scores)).tolist() == scores.argmax(0).tolist()


# Devices, errors, examples


def on_all_devices() -> dict:
    """The draws of eight prompts, sharded over the devices there are."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    prompts, mask = (jax.device_put(x, split) for x in prompts_of(NUM_DEVICES))
    draw = jax.jit(functools.partial(generate, POLICIES["cached"], group_size=G, max_length=L, end_token=END))
    result = draw(params_of("cached"), prompts, mask, jax.random.key(0))
    shards = len({tuple(map(str, shard.index)) for shard in result.completions.addressable_shards})
    return {"shards": shards} | jax.tree.map(lambda x: np.asarray(x).tolist(), result._asdict())


def test_eight_devices_draw_what_one_draws():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    code = "import json; from tests import test_generation as t; print(json.dumps(t.on_all_devices()))"
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    sharded, one = json.loads(result.stdout.splitlines()[-1]), on_all_devices()
    assert (sharded.pop("shards"), one.pop("shards")) == (NUM_DEVICES, 1)
    for name in ("completions", "mask"):
        assert sharded.pop(name) == one.pop(name)
    for name, expected in one.items():
        np.testing.assert_allclose(sharded[name], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(group_size=0), "group_size is 0; it must be an integer of at least 1"),
        (dict(max_length=2.0), "max_length is 2.0; it must be an integer"),
        (dict(top_k=0), "top_k is 0; it must be an integer"),
        (dict(temperature=0.0), "temperature is 0.0; it must be positive"),
        (dict(top_p=1.5), "top_p is 1.5; it must be above 0 and at most 1"),
        (dict(prompts=np.zeros((2, 3))), "prompts is float64 of shape (2, 3); it must be integers [B, P]"),
        (dict(prompt_mask=np.ones((2, 2))), "prompt_mask has shape (2, 2); it must be that of prompts, (2, 3)"),
        (dict(prompt_mask=np.eye(2, 3) * [[1], [0]]), "prompt_mask must be True somewhere in every prompt"),
        (dict(prompt_ids=np.arange(3)), "prompt_ids is int64 of shape (3,); it must be integers [B] = (2,)"),
        (dict(allowed=np.ones((3, V))), "allowed has shape (3, 7); it must be [L, V] with L = max_length = 2"),
        (dict(allowed=np.ones((2, V + 1))), "allowed has 8 tokens (axis 1), the policy has V = 7"),
        (dict(allowed=np.eye(2, V) * [[1], [0]]), "allowed must allow a token at every position; it allows none at 1"),
    ],
)
def test_errors_name_the_argument(options, complaint):
    given = dict(prompts=np.zeros((2, 3), int), prompt_mask=None, key=jax.random.key(0), group_size=2, max_length=2) | options
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(lambda params: generate(POLICIES["tabular"], params, **given), params_of("tabular"))
    assert complaint in str(caught.value)


def test_rows_of_a_cache_are_an_axis_of_their_own():
    policy = POLICIES["cached"]._replace(
        init_cache=lambda params, num_rows, capacity: {"kv": jnp.zeros((2 * num_rows, capacity))}
    )
    with pytest.raises(ValueError, match=r"cache\['kv'\] has shape \(6, 3\) for 3 rows"):
        generate(policy, params_of("cached"), jnp.zeros((3, 1), int), None, jax.random.key(0), group_size=2, max_length=3)


def test_mismatch_and_its_tolerance():
    mismatch = metrics.logprob_mismatch(
        jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[-1.5, -1.75, 0.0]]), jnp.array([[1, 1, 0]])
    )
    assert {k: float(v) for k, v in mismatch.items()} == {"logprob_mismatch/mean_abs": 0.375, "logprob_mismatch/max_abs": 0.5}
    with pytest.raises(ValueError, match="recomputed has shape"):
        metrics.logprob_mismatch(jnp.zeros((1, 2)), jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="matmul_precision is 'tf32'; it must be one of highest"):
        metrics.logprob_tolerance(jnp.float32, "tf32")
    tolerances = [metrics.logprob_tolerance(*x) for x in ((jnp.float64,), (jnp.float32,), (jnp.float32, "tensorfloat32"))]
    assert tolerances == sorted(tolerances) and tolerances[2] < metrics.logprob_tolerance(jnp.bfloat16)


@pytest.mark.parametrize("module", ["choice", "generation"])
def test_examples(module):
    module = importlib.import_module(f"jax_async_grpo.sampling.{module}")
    result = doctest.testmod(module, extraglobs={"jnp": jnp, "jax": jax})
    assert result.attempted and not result.failed
