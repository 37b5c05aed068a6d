"""The decoder against a forward pass written in NumPy, and its ways of computing the same numbers against each other."""

from __future__ import annotations

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import policies
from jax_async_grpo.policies.rope import rotate, rotation

V, R, P, N = 11, 3, 4, 7  # the first P of N tokens are a prompt, padded on the left
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})

SCALING = dict(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
# Every option away from its default; heads · head_dim is not the width.
FULL = dict(
    num_layers=3, width=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20, rope_base=50.0, rope_scaling=SCALING,
    norm_epsilon=1e-2, qkv_bias=True, qk_norm=True, dtype=jnp.float64,
)  # fmt: skip
PLAIN = dict(num_layers=2, width=8, num_heads=2, tie_embeddings=True, dtype=jnp.float64)
TOKENS = np.random.default_rng(0).integers(0, V, (R, N))
SEGMENTS = (np.arange(N) >= np.array([[0], [2], [3]])).astype(int)


def decoder(**options):
    return policies.decoder(V, **options)


@functools.cache
def full_params():
    """Parameters of FULL with biases and norms that are neither 0 nor 1."""
    return perturbed(jit(decoder(**FULL).init)(jax.random.key(0)))


def perturbed(params):
    draws = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + 0.3 * draws.normal(size=x.shape).astype(x.dtype), params)


def stacked(params, num_layers):
    """The same weights in the layout of scan_layers=True."""
    parts = ("attention_norm", "attention", "mlp_norm", "mlp")
    layers = [{part: params[f"{part}_{i}"] for part in parts} for i in range(num_layers)]
    others = {name: params[name] for name in ("embedding", "unembedding", "final_norm") if name in params}
    return others | {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}


def alone(hidden, other, tolerance):
    """Both agree wherever a token is no padding."""
    valid = SEGMENTS.astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[valid], np.asarray(other)[valid], rtol=0, atol=tolerance)


# Truth: NumPy, token by token and head by head


def llama3_frequencies(size, base, factor, low_frequency_factor, high_frequency_factor, original_length):
    """The published rule, with its three cases by wavelength."""
    out = []
    for i in range(size // 2):
        frequency = base ** (-2 * i / size)
        wavelength = 2 * np.pi / frequency
        if wavelength < original_length / high_frequency_factor:
            out.append(frequency)
        elif wavelength > original_length / low_frequency_factor:
            out.append(frequency / factor)
        else:
            smooth = (original_length / wavelength - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(out)


def numpy_forward(params, tokens):
    """Hidden states [n, D] of one row without padding under FULL."""
    o, half = FULL, FULL["head_dim"] // 2
    frequencies = llama3_frequencies(o["head_dim"], o["rope_base"], **SCALING)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + o["norm_epsilon"]) * scale

    def turned(x, position):
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
        return np.concatenate([z.real, z.imag])

    def heads(y):
        return y.reshape(-1, o["head_dim"])

    stream = [params["embedding"][token] for token in tokens]
    for i in range(o["num_layers"]):
        a, m = params[f"attention_{i}"], params[f"mlp_{i}"]
        normed = [norm(x, params[f"attention_norm_{i}"]["scale"]) for x in stream]
        looked_at = [a["key_value"] @ x + a["key_value_bias"] for x in normed]
        kv = 2 * o["head_dim"]
        keys = [[turned(norm(k, a["key_norm"]), n) for k in heads(y[:kv])] for n, y in enumerate(looked_at)]
        values = [heads(y[kv:]) for y in looked_at]
        after = []
        for n, x in enumerate(stream):
            mixed = []
            for h, q in enumerate(heads(a["query"] @ normed[n] + a["query_bias"])):
                q, g = turned(norm(q, a["query_norm"]), n), h // 2
                scores = np.array([q @ keys[m][g] for m in range(n + 1)]) / np.sqrt(o["head_dim"])
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(w * values[m][g] for m, w in enumerate(weights)))
            x = x + a["out"] @ np.concatenate(mixed)
            gate, up = np.split(m["gate_up"] @ norm(x, params[f"mlp_norm_{i}"]["scale"]), 2)
            after.append(x + m["down"] @ (gate / (1 + np.exp(-gate)) * up))
        stream = after
    return np.array([norm(x, params["final_norm"]["scale"]) for x in stream])


@functools.cache
def full_hidden():
    policy = decoder(**FULL)
    return np.asarray(jit(lambda p: policy.apply(p, TOKENS, segment_ids=SEGMENTS)[0])(full_params()))


def test_numpy_forward():
    for row in range(R):
        valid = SEGMENTS[row].astype(bool)
        np.testing.assert_allclose(full_hidden()[row, valid], numpy_forward(full_params(), TOKENS[row, valid]), atol=1e-12)


def test_initial_weights_are_those_of_the_records():
    """Sums under key(0): the studies' runs began with these bits. Made with the decoder before it had options (flax 0.12.8)."""
    params = jit(decoder(num_layers=2, width=8, num_heads=2).init)(jax.random.key(0))
    assert set(params["attention_1"]) == {"query", "key_value", "out"}
    sums = {
        "embedding": params["embedding"], "unembedding": params["unembedding"], "query": params["attention_0"]["query"],
        "key_value": params["attention_1"]["key_value"], "out": params["attention_1"]["out"],
        "gate_up": params["mlp_0"]["gate_up"], "down": params["mlp_1"]["down"],
    }  # fmt: skip
    expected = {
        "embedding": 26.38823, "unembedding": 23.39041, "query": 18.40575, "key_value": 31.61381, "out": 8.898613,
        "gate_up": 107.9704, "down": 14.73275,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(np.abs(np.asarray(sums[name], np.float64)).sum(), value, rtol=1e-6, err_msg=name)


# The cache


def decoded(policy, params, split=P):
    """Hidden states of TOKENS: a prompt of `split` tokens at once, then one a call; slots to spare stay empty."""

    def run(params):
        cache = policy.init_cache(params, R, N + 2)
        first, cache = policy.apply(params, TOKENS[:, :split], segment_ids=SEGMENTS[:, :split], cache=cache)

        def step(cache, token):
            hidden, cache = policy.apply(params, token[:, None], cache=cache)
            return cache, hidden[:, 0]

        cache, rest = jax.lax.scan(step, cache, TOKENS[:, split:].T)
        return jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], axis=1), cache

    return jit(run)(params)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_cached_decode_equals_the_full_forward(scan):
    """Also with remat; the truth is the unrolled forward without cache, which NumPy confirms."""
    params = stacked(full_params(), 3) if scan else full_params()
    hidden, cache = decoded(decoder(**FULL, scan_layers=scan, remat=True), params)
    assert int(cache.length) == N and cache.segment_ids.shape == (R, N + 2)
    alone(hidden, full_hidden(), 1e-12)


def test_cached_decode_equals_the_full_forward_in_float32():
    """To 1e-6 of the largest hidden state; two float32 programs, both about as far from the float64 numbers."""
    policy, params = decoder(**FULL), jax.tree.map(lambda x: x.astype(np.float32), full_params())
    hidden, cache = decoded(policy, params)
    assert hidden.dtype == cache.keys[0].dtype == jnp.float32
    full = jit(lambda p: policy.apply(p, TOKENS, segment_ids=SEGMENTS)[0])(params)
    alone(hidden, full, 1e-6 * np.abs(full_hidden()).max())
    alone(hidden, full_hidden(), 1e-5)


def test_padding_under_a_cache_never_matters():
    """A padded row has the hidden states of the same tokens alone, and gives them whatever stands under its padding."""
    policy, params = decoder(**PLAIN), jit(decoder(**PLAIN).init)(jax.random.key(2))
    hidden, _ = decoded(policy, params)
    bare = np.concatenate([TOKENS[:, 3:], np.zeros((R, 3), int)], axis=1)  # row 2 without its padding; what follows is not seen
    alone_hidden, _ = jit(lambda p: policy.apply(p, bare, cache=policy.init_cache(p, R, N)))(params)
    np.testing.assert_allclose(np.asarray(hidden)[2, 3:], np.asarray(alone_hidden)[2, :4], rtol=0, atol=1e-14)


def test_segments_and_tail_hold_under_a_cache():
    """Two packed sequences written in two pieces, the second one asked for its last two tokens only."""
    policy, params = decoder(**FULL), full_params()
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]] * R)

    @jit
    def both(params):
        cache = policy.init_cache(params, R, N)
        _, cache = policy.apply(params, TOKENS[:, :4], segment_ids=segments[:, :4], cache=cache)
        tail, cache = policy.apply(params, TOKENS[:, 4:], segment_ids=segments[:, 4:], cache=cache, tail=2)
        return policy.apply(params, TOKENS, segment_ids=segments)[0], tail, cache

    whole, tail, _ = both(params)
    np.testing.assert_allclose(tail, np.asarray(whole)[:, -2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_one_token_copies_no_cache(scan):
    """The compiled step writes into the donated cache; no operation yields a second array of its size, or a turned one."""
    policy = decoder(**PLAIN | dict(num_layers=3), scan_layers=scan)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    cache = jax.eval_shape(lambda: policy.init_cache(params, R, 13))
    step = jax.jit(policy.apply, donate_argnames="cache")
    compiled = step.lower(params, jax.ShapeDtypeStruct((R, 1), jnp.int32), cache=cache).compile()
    keys = jax.tree.leaves(cache.keys)[0]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    whole = ",".join(map(str, keys.shape))
    per_layer = ",".join(map(str, keys.shape[-4:]))
    text = compiled.as_text()
    assert f"f64[{whole}]" in text  # the shape is written as expected
    copies = [line for line in text.splitlines() if f"= f64[{whole}]" in line and (" copy(" in line or " transpose(" in line)]
    turned = [line for line in text.splitlines() if f"= f64[{per_layer}]" in line and " transpose(" in line]
    assert copies == turned == []


# Identities


def test_grouped_queries_equal_repeated_heads():
    grouped, full = (decoder(**PLAIN | dict(num_heads=4, num_kv_heads=kv)) for kv in (2, None))
    params = jit(grouped.init)(jax.random.key(1))

    def repeated(weights):
        heads = weights["key_value"].reshape(2, 2, 2, 8)  # keys and values, heads, dimensions of one, width
        return weights | {"key_value": jnp.repeat(heads, 2, axis=1).reshape(16, 8)}

    same = {name: repeated(x) if name in ("attention_0", "attention_1") else x for name, x in params.items()}
    one, other = jit(lambda p, q: (grouped.apply(p, TOKENS)[0], full.apply(q, TOKENS)[0]))(params, same)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


def test_turned_products_depend_on_the_distance_only():
    q, k = np.random.default_rng(3).normal(size=(2, 1, 1, 8))

    @functools.partial(jax.vmap, in_axes=(0, 0))
    def product(m, n):
        of = lambda x, position: rotate(x, rotation(position[None], 8, 30.0, SCALING, jnp.float64))  # noqa: E731
        return jnp.sum(of(q, m) * of(k, n))

    products = np.asarray(product(jnp.array([0, 5, 900, 3]), jnp.array([7, 12, 907, 3])))
    np.testing.assert_allclose(products[:3], products[0], rtol=1e-12)
    np.testing.assert_allclose(products[3], np.sum(q * k), rtol=1e-12)
    assert abs(products[0] - products[3]) > 0.1


@pytest.mark.parametrize(
    "size, base, scaling", [(16, 50.0, SCALING), (64, 5e5, dict(SCALING, factor=32, original_length=8192))]
)
def test_scaled_frequencies_follow_the_published_rule(size, base, scaling):
    expected = llama3_frequencies(size, base, **scaling)
    plain = base ** (-2 * np.arange(size // 2) / size)
    changed = expected / plain
    assert changed[0] == 1 and changed[-1] == 1 / scaling["factor"] and ((changed < 1) & (changed > changed[-1])).any()
    cos, sin = rotation(jnp.arange(3), size, base, scaling, jnp.float64)
    angles = np.arange(3)[:, None] * expected
    np.testing.assert_allclose(cos[0, :, : size // 2], np.cos(angles), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sin[0, :, size // 2 :], np.sin(angles), rtol=0, atol=1e-12)


# Ways to compute the same


def value_and_gradient(policy, params):
    weights = np.random.default_rng(4).normal(size=(R, N, 12)) * SEGMENTS[..., None]

    def value(p):
        hidden = policy.apply(p, TOKENS, segment_ids=SEGMENTS)[0]
        return jnp.sum(hidden.astype(jnp.float64) * weights) + jnp.sum(policy.unembed(p) ** 2)

    return jit(jax.value_and_grad(value))(params)


@functools.cache
def full_gradient():
    return value_and_gradient(decoder(**FULL), full_params())


@pytest.mark.parametrize("remat, scan", [(True, False), (True, True), (False, True)])
def test_remat_and_scan_change_no_gradient(remat, scan):
    layout = (lambda tree: stacked(tree, 3)) if scan else (lambda tree: tree)
    value, gradient = value_and_gradient(decoder(**FULL, remat=remat, scan_layers=scan), layout(full_params()))
    np.testing.assert_allclose(value, full_gradient()[0], rtol=1e-13)
    expected = layout(full_gradient()[1])
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    assert all(np.abs(np.asarray(g)).max() > 1e-3 for g in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11), gradient, expected)


def test_remat_keeps_less_and_scan_has_one_layer():
    """What the options are for: the traced program computes again, and does not grow with the layers."""

    def program(**options):
        policy = decoder(**PLAIN | options)
        params = jax.eval_shape(policy.init, jax.random.key(0))
        return str(jax.make_jaxpr(jax.grad(lambda p: policy.apply(p, TOKENS)[0].sum()))(params))

    assert "remat" not in program() and "remat" in program(remat=True) and "remat" in program(remat=True, scan_layers=True)
    lengths = [len(program(scan_layers=True, num_layers=n).splitlines()) for n in (2, 5)]
    assert lengths[0] == lengths[1] < len(program(num_layers=5).splitlines())


def test_either_layout_begins_with_the_same_weights():
    def both(key):
        return decoder(**FULL).init(key), decoder(**FULL, scan_layers=True).init(key)

    flat, scanned = jit(both)(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, stacked(jax.tree.map(np.asarray, flat), 3), scanned)


def test_bf16_compute_keeps_float32_parameters_and_gradients():
    options = FULL | dict(dtype=jnp.float32, compute_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(np.float32), full_params())
    policy = decoder(**options)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0)))} == {jnp.dtype(jnp.float32)}
    _, gradient = value_and_gradient(policy, params)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    exact, found = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (full_gradient()[1], gradient))
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05
    hidden, cache = jax.eval_shape(
        lambda p: policy.apply(p, TOKENS, cache=policy.init_cache(p, R, N)), jax.eval_shape(policy.init, jax.random.key(0))
    )
    assert hidden.dtype == cache.keys[0].dtype == jnp.bfloat16
    assert (jnp.zeros((1, 12), jnp.bfloat16) @ policy.unembed(params)).dtype == jnp.float32


# Errors: one line that names the argument


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_kv_heads=3), "num_kv_heads is 3; it must divide num_heads = 4"),
        (dict(num_kv_heads=0), "num_kv_heads is 0; it must be an integer of at least 1"),
        (dict(head_dim=7), "head_dim is 7; it must be even"),
        (dict(head_dim=8.0), "head_dim is 8.0"),
        (dict(compute_dtype=int), "compute_dtype is .*int.*; it must be a floating-point type"),
        (dict(rope_scaling=dict(factor=8.0)), "rope_scaling is .* exactly factor, high_frequency_factor"),
        (dict(rope_scaling=8.0), "rope_scaling is 8.0; it must be None or a dict"),
        (dict(rope_scaling=SCALING | dict(factor=0)), "rope_scaling is .* all must be positive"),
        (dict(rope_scaling=SCALING | dict(low_frequency_factor=4.0)), "low_frequency_factor < high_frequency_factor"),
    ],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message) as error:
        decoder(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cache, tokens, options, message",
    [
        (("unrolled", R, 5), TOKENS, {}, "tokens has N = 7 tokens a row; the cache has a capacity of 5"),
        (("unrolled", 2, 9), TOKENS, {}, r"tokens has shape \(3, 7\); with a cache of 2 rows it must be \[2, N\]"),
        (("unrolled", R, 9), TOKENS[0], {}, r"tokens has shape \(7,\)"),
        (("scan", R, 9), TOKENS, {}, "cache has keys of .* those of this policy are"),
        (("unrolled", R, 9), TOKENS, {"attention_mask": np.ones((R, N, N), bool)}, "attention_mask must be None with a cache"),
        (None, TOKENS, {}, "cache must be None or from init_cache, it is of type tuple"),
    ],
)
def test_bad_caches_name_themselves(cache, tokens, options, message):
    policy = decoder(**PLAIN)
    params = jax.eval_shape(policy.init, jax.random.key(0))

    def run(params):
        makers = {"unrolled": policy, "scan": decoder(**PLAIN, scan_layers=True)}
        made = () if cache is None else makers[cache[0]].init_cache(params, *cache[1:])
        return policy.apply(params, jnp.asarray(tokens), cache=made, **options)

    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(run, params)
    assert "\n" not in str(error.value)


def test_cache_sizes_name_themselves():
    with pytest.raises(ValueError, match="capacity is 0; it must be an integer of at least 1"):
        decoder(**PLAIN).init_cache({"embedding": jnp.zeros((V, 8))}, 1, 0)


@pytest.mark.parametrize("module", ["decoder", "rope"])
def test_examples_run(module):
    """The example of the decoder counts the 1,235,814,400 parameters of Llama 3.2 (1B)."""
    names = {"jax": jax, "jnp": jnp, "decoder": policies.decoder}
    result = doctest.testmod(importlib.import_module(f"jax_async_grpo.policies.{module}"), extraglobs=names)
    assert result.attempted > 0 and result.failed == 0
