"""Log-probs of rows and of trees against the chain rule written out, and what every policy owes its contract."""

from __future__ import annotations

import doctest
import functools
import importlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_async_grpo import policies
from jax_async_grpo.policies.prefix_tree import prefix_tree

V, END, P, L = 6, 4, 5, 3  # digits 0-3, the end token, and one token that never stands in a completion
# Compiles six times as fast, and the tests compile more than they compute.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})

POLICIES = {
    "tabular": policies.tabular(V, 3, init_scale=1.0),
    "linear": policies.linear(V, 4, num_features=60, init_scale=0.5),
    "mlp": policies.mlp(V, 4, width=16),
    "decoder": policies.decoder(V, num_layers=1, width=16, num_heads=2, dtype=jnp.float64),
    "deep": policies.decoder(V, num_layers=2, width=8, num_heads=1, dtype=jnp.float64),
}


def strings(num_digits: int, max_length: int):
    """Every string of 1 to `max_length` digits with an end token: completions, mask, allowed."""
    rows = [(*s, END) for n in range(1, max_length + 1) for s in itertools.product(range(num_digits), repeat=n)]
    completions = np.array([row + (0,) * (max_length + 1 - len(row)) for row in rows])
    mask = np.arange(max_length + 1) < np.array([len(row) for row in rows])[:, None]
    allowed = np.zeros((max_length + 1, V), bool)
    allowed[1:, END] = True
    allowed[:max_length, :num_digits] = True
    return completions, mask, allowed


COMPLETIONS, MASK, ALLOWED = strings(4, 2)  # Y = 20
PROMPTS = np.random.default_rng(0).integers(0, V, (3, P))
PROMPT_MASK = np.arange(P) >= np.array([[0], [3], [1]])


@pytest.fixture(params=["tabular", "linear", "mlp", "decoder"])
def name(request):
    return request.param


@functools.cache
def params_of(name):
    return jit(POLICIES[name].init)(jax.random.key(1))


@functools.cache
def apply_of(name):
    """The hidden states as a compiled function of (params, tokens, **keywords)."""
    return jit(lambda params, tokens, **keywords: POLICIES[name].apply(params, tokens, **keywords)[0])


def logits_of(policy):
    return jit(lambda params, tokens: policy.apply(params, tokens)[0] @ policy.unembed(params))


def log_softmax(logits, allowed=None):
    logits = np.where(True if allowed is None else allowed, np.asarray(logits), -np.inf)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def chain_rule(name, prompts, prompt_mask, completions, mask, allowed):
    """[B, Y, L] from one unpadded, unmasked row a prompt and completion, with the prompt's padding cut out."""
    compiled, params = logits_of(POLICIES[name]), params_of(name)
    out = np.zeros((len(prompts), *completions.shape))
    for b, y in np.ndindex(out.shape[:2]):
        prompt, completion = prompts[b][prompt_mask[b]], completions[y][mask[y]]
        row = np.concatenate([prompt, completion])
        row = np.concatenate([row, np.zeros(P + L - len(row), int)])  # one shape; the zeros come after everything that counts
        logits = np.asarray(compiled(params, row[None]))[0, len(prompt) - 1 : len(prompt) + len(completion) - 1]
        out[b, y][mask[y]] = log_softmax(logits, allowed[mask[y]])[np.arange(len(completion)), completion]
    return out


def as_rows(completions, mask, num_prompts=3):
    return (np.broadcast_to(x, (num_prompts, *x.shape)) for x in (completions, mask))


def by_tree(policy, params, prompt_mask=PROMPT_MASK, allowed=ALLOWED):
    return policies.completion_logprobs(policy, params, PROMPTS, COMPLETIONS, MASK, prompt_mask=prompt_mask, allowed=allowed)


def by_rows(policy, params, prompt_mask=PROMPT_MASK, allowed=ALLOWED):
    rows, mask = as_rows(COMPLETIONS, MASK)
    return policies.token_logprobs(policy, params, PROMPTS, rows, mask, prompt_mask=prompt_mask, allowed=allowed)


def assert_trees_close(first, second, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), first, second)


@functools.cache
def values(name, how, dtype=jnp.float64):
    """[B, Y, L] by one of the two functions, left-padded prompts, with the parameters in some precision."""
    return np.asarray(
        jit(lambda p: how(POLICIES[name], p))(jax.tree.map(lambda x: np.asarray(x).astype(dtype), params_of(name)))
    )


# Truth: the chain rule


@pytest.mark.parametrize("name", POLICIES)
def test_tree_and_rows_equal_the_chain_rule(name):
    few = [0, 3, 7, 18]
    truth = chain_rule(name, PROMPTS, PROMPT_MASK, COMPLETIONS[few], MASK[few], ALLOWED)
    np.testing.assert_allclose(values(name, by_rows)[:, few], truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(values(name, by_tree)[:, few], truth, rtol=0, atol=1e-12)
    np.testing.assert_allclose(values(name, by_tree), values(name, by_rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"prompt_mask": None, "allowed": None}], ids=["padded", "plain"])
def test_tree_equals_rows_in_value_and_gradient(name, options):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, *MASK.shape)))

    def value_and_gradient(how):
        return jit(jax.value_and_grad(lambda p: jnp.sum(how(POLICIES[name], p, **options) ** 2 * weights)))(params_of(name))

    (tree, of_tree), (rows, of_rows) = value_and_gradient(by_tree), value_and_gradient(by_rows)
    assert abs(tree - rows) <= 1e-12 * abs(rows)
    assert max(np.abs(np.asarray(g)).max() for g in jax.tree.leaves(of_rows)) > 0.1
    assert_trees_close(of_tree, of_rows, 1e-11)


def test_probabilities_of_all_completions_sum_to_one(name):
    logprobs = values(name, by_tree).sum(axis=-1)
    assert np.ptp(logprobs) > 0.1
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=-1), 1.0, rtol=0, atol=1e-14)


def test_traced_masks_give_the_same_numbers(name):
    policy, params = POLICIES[name], params_of(name)
    rows, mask = as_rows(COMPLETIONS, MASK)

    def both(prompt_mask, mask, allowed):
        by_rows = policies.token_logprobs(policy, params, PROMPTS, rows, mask, prompt_mask=prompt_mask, allowed=allowed)
        return by_tree(policy, params, prompt_mask=prompt_mask), by_rows

    for logprobs in jit(both)(PROMPT_MASK.astype(float), mask.astype(int), ALLOWED):
        np.testing.assert_allclose(logprobs, values(name, by_tree), rtol=0, atol=1e-12)


# What is masked does not count


def test_masked_tokens_are_zero_and_as_if_dropped(name):
    mask = np.array([[[1, 1, 0, 0], [1, 0, 1, 0]]], float)
    completions = np.array([[[1, 2, 10**6, -7], [3, 10**6, 0, -1]]])  # neither in range nor allowed where masked
    allowed = np.broadcast_to(np.arange(V) < 5, (4, V))

    def masked(p):
        return policies.token_logprobs(POLICIES[name], p, PROMPTS[:1], completions, mask, allowed=allowed)

    def dropped(p):
        return policies.token_logprobs(POLICIES[name], p, PROMPTS[:1], np.array([[[1, 2], [3, 0]]]), allowed=allowed[:2])

    def value_and_gradient(f):
        return jit(lambda p: (f(p), jax.grad(lambda p: f(p).sum())(p)))(params_of(name))

    (logprobs, gradient), (kept, of_kept) = value_and_gradient(masked), value_and_gradient(dropped)
    logprobs = np.asarray(logprobs)
    np.testing.assert_array_equal(logprobs[mask == 0], 0.0)
    np.testing.assert_allclose(logprobs[mask == 1], np.ravel(kept), rtol=0, atol=1e-12)
    assert max(np.abs(np.asarray(g)).max() for g in jax.tree.leaves(of_kept)) > 0.1
    assert_trees_close(gradient, of_kept, 1e-12)


def test_padding_reaches_no_model_as_a_token():
    """The model answers NaN for ids out of range and sums over all it sees, so one such id would show everywhere."""

    def logits(table, tokens, positions=None, attention_mask=None):
        sees = jnp.tril(jnp.ones(2 * tokens.shape[-1:])) if attention_mask is None else attention_mask.astype(float)
        return sees @ jnp.take(table, tokens, axis=0, mode="fill")

    policy = policies.from_logits(logits)
    prompts, completions = np.where(PROMPT_MASK, PROMPTS, 99), np.where(MASK, COMPLETIONS, 99)
    rows, mask = as_rows(completions, MASK)

    def loss(table, policy):
        options = {"prompt_mask": PROMPT_MASK, "allowed": ALLOWED}
        by_rows = policies.token_logprobs(policy, table, prompts, rows, mask, **options)
        return jnp.sum(by_rows**2), jnp.sum(
            policies.completion_logprobs(policy, table, prompts, completions, MASK, **options) ** 2
        )

    table = np.random.default_rng(6).normal(size=(V, V))
    both = jit(lambda t: [jax.jacrev(loss)(t, p) for p in (policy, policy._replace(tree=False))])(table)
    for gradient in jax.tree.leaves(both):
        np.testing.assert_allclose(gradient, both[0][0], rtol=1e-11, atol=1e-11, equal_nan=False)


def test_forced_tokens_have_logprob_exactly_zero(name):
    forced = MASK & (ALLOWED.sum(axis=1) == 1)
    assert forced.any()
    for how in (by_tree, by_rows):
        np.testing.assert_array_equal(values(name, how)[:, forced], 0.0)


def test_a_traced_token_that_is_not_allowed_is_impossible():
    f = jit(lambda c: policies.token_logprobs(POLICIES["tabular"], params_of("tabular"), PROMPTS, c, allowed=ALLOWED))
    logprobs = np.asarray(f(np.array([[[5, 1, END]]] * 3)))
    assert np.isneginf(logprobs[..., 0]).all() and np.isfinite(logprobs[..., 1]).all()


def test_left_padding_does_not_matter(name):
    policy, params = POLICIES[name], params_of(name)
    prompts = np.concatenate([np.full((3, 4), -5), PROMPTS], axis=1)  # the padding holds no token id at all
    prompt_mask = np.broadcast_to(np.arange(P + 4) >= 4, prompts.shape)

    def both(p):
        return (
            policies.completion_logprobs(policy, p, prompts, COMPLETIONS, MASK, prompt_mask=prompt_mask),
            policies.completion_logprobs(policy, p, PROMPTS, COMPLETIONS, MASK),
        )

    padded, bare = jit(both)(params)
    np.testing.assert_allclose(padded, bare, rtol=0, atol=1e-12)


# The contract of apply


def test_later_tokens_do_not_change_earlier_hidden_states(name):
    tokens = np.arange(8)[None] % V
    changed = tokens.copy()
    changed[0, 5] = (tokens[0, 5] + 1) % V
    first, second = (np.asarray(apply_of(name)(params_of(name), t))[0] for t in (tokens, changed))
    np.testing.assert_array_equal(first[:5], second[:5])
    assert np.abs(first[5] - second[5]).max() > 1e-3


def test_packed_segments_equal_separate_rows(name):
    params, apply = params_of(name), apply_of(name)
    one, two = np.array([1, 2, 3, 0]), np.array([5, 0, 2])
    packed = np.concatenate([one, [9], two])[None]
    positions, segment_ids = np.array([[0, 1, 2, 3, 0, 0, 1, 2]]), np.array([[1, 1, 1, 1, 0, 2, 2, 2]])
    hidden = np.asarray(apply(params, packed, positions=positions, segment_ids=segment_ids))[0]
    np.testing.assert_allclose(hidden[:4], np.asarray(apply(params, one[None]))[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(hidden[5:], np.asarray(apply(params, two[None]))[0], rtol=0, atol=1e-13)
    assert np.isfinite(hidden).all()


def test_leading_axes_are_free(name):
    tokens = np.random.default_rng(2).integers(0, V, (2, 3, 4))
    hidden = np.asarray(apply_of(name)(params_of(name), tokens))
    np.testing.assert_allclose(hidden[1, 2], apply_of(name)(params_of(name), tokens[1, 2]), rtol=0, atol=1e-13)


def test_a_shift_of_all_positions_changes_nothing(name):
    tokens = np.array([[0, 3, 2, 5, 1]])
    here, shifted, gap = (
        np.asarray(apply_of(name)(params_of(name), tokens, positions=np.array([p])))
        for p in ([0, 1, 2, 3, 4], [17, 18, 19, 20, 21], [0, 1, 2, 3, 5])
    )
    np.testing.assert_allclose(shifted, here, rtol=0, atol=1e-12)
    assert np.abs(gap - here).max() > 1e-3


def test_a_cache_is_refused(name):
    with pytest.raises(ValueError, match="cache must be None"):
        POLICIES[name].apply(params_of(name), PROMPTS, cache=())


def test_visibility_rules():
    segment_ids = np.array([0, 0, 1, 1, 2])
    expected = np.eye(5, dtype=bool)
    expected[3, 2] = True
    np.testing.assert_array_equal(policies.visibility(np.zeros((2, 5)), segment_ids=segment_ids), [expected] * 2)
    np.testing.assert_array_equal(policies.visibility(np.zeros(3)), np.tril(np.ones((3, 3), bool)))
    mask = np.ones((5, 5), bool)
    np.testing.assert_array_equal(policies.visibility(np.zeros(5), segment_ids=segment_ids, attention_mask=mask), mask)


# Transformations and precision


def test_vmap_and_map_over_parameters_agree(name):
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params_of(name))

    def of_one(p):
        return by_tree(POLICIES[name], p)

    mapped, vmapped = jit(lambda p: (jax.lax.map(of_one, p), jax.vmap(of_one)(p)))(several)
    np.testing.assert_allclose(mapped, vmapped, rtol=0, atol=1e-12)
    mapped = np.asarray(mapped)
    np.testing.assert_allclose(mapped[0], values(name, by_tree), rtol=0, atol=1e-12)
    assert np.abs(mapped[0] - mapped[1]).max() > 1e-3


def test_second_derivatives(name):
    """dᵀ∇²f d: forward over reverse, reverse over reverse and the second difference of f agree."""
    leaves, structure = jax.tree.flatten(params_of(name))
    draws = np.random.default_rng(3)
    direction = structure.unflatten([draws.normal(size=x.shape) for x in leaves])

    def value(t):
        p = jax.tree.map(lambda x, d: x + t * d, params_of(name), direction)
        return jnp.sum(by_tree(POLICIES[name], p) ** 2)

    def dot(tree):
        return sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (tree, direction)), strict=True))

    gradient = jax.grad(lambda p: jnp.sum(by_tree(POLICIES[name], p) ** 2))
    forward = dot(jit(lambda p: jax.jvp(gradient, (p,), (direction,))[1])(params_of(name)))
    reverse = dot(jit(jax.grad(lambda p: dot(gradient(p))))(params_of(name)))
    value, h = jit(value), 3e-4
    central = (value(h) - 2 * value(0.0) + value(-h)) / h**2
    np.testing.assert_allclose(forward, central, rtol=1e-4)
    np.testing.assert_allclose(forward, reverse, rtol=1e-11)


def test_arithmetic_follows_the_parameters(name):
    for dtype, error_bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.2)):
        cast = jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d), params_of(name))
        assert apply_of(name)(cast, PROMPTS).dtype == dtype
        logprobs = values(name, by_tree, dtype)
        assert logprobs.dtype == jnp.float32
        assert 1e-9 < np.abs(logprobs - values(name, by_tree)).max() < error_bound
    assert values(name, by_tree).dtype == values(name, by_rows).dtype == jnp.float64


# The tree


def test_tree_of_111_strings_has_ten_tokens():
    completions, mask = _digits()
    tree = prefix_tree(completions, mask, np.array([True, True, False]))
    assert len(tree.tokens) == 10 and tree.paths.shape == (10, 1)
    assert prefix_tree(completions.copy(), mask, np.array([True, True, False])) is tree  # cached by value
    assert len(prefix_tree(completions, mask).tokens) == 110


def _digits():
    rows = [(*s, 10) for n in range(3) for s in itertools.product(range(10), repeat=n)]
    lengths = np.array([len(row) for row in rows])
    return np.array([row + (0,) * (3 - len(row)) for row in rows]), np.arange(3) < lengths[:, None]


def test_prefixes_without_choice_stay_where_longer_ones_need_them():
    completions = np.array([[0, 5, 1, 2], [0, 5, 3, 2], [1, 5, 1, 2]])
    tree = prefix_tree(completions, None, np.array([True, False, True, False]))
    assert tree.tokens.tolist() == [0, 1, 5, 5] and tree.depth.tolist() == [1, 1, 2, 2]
    np.testing.assert_array_equal(tree.sees, [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(tree.node, [[0, 0, 3, 0], [0, 0, 3, 0], [0, 0, 4, 0]])
    np.testing.assert_array_equal(tree.paths, [[0, 5], [1, 5]])


@pytest.mark.parametrize("length", [3, 1])
def test_uneven_paths_and_single_tokens(length):
    completions = np.array([[0, 0, 0], [0, 0, 1], [1, 2, 0], [2, 0, 0]])[:, :length]
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])[:, :length]
    if length == 1:
        completions, mask = completions[1:], mask[1:]
    policy = POLICIES["tabular"]

    def three_ways(p):
        options = {"prompt_mask": PROMPT_MASK}
        return (
            policies.token_logprobs(policy, p, PROMPTS, *as_rows(completions, mask), **options),
            policies.completion_logprobs(policy, p, PROMPTS, completions, mask, **options),
            policies.completion_logprobs(policy._replace(tree=False), p, PROMPTS, completions, mask, **options),
        )

    rows, tree, paths = jit(three_ways)(params_of("tabular"))
    np.testing.assert_allclose(tree, rows, rtol=0, atol=1e-13)
    np.testing.assert_allclose(paths, rows, rtol=0, atol=1e-13)


# The three policies


def test_tabular_has_a_free_logit_for_every_context_and_token():
    policy = policies.tabular(V, 2, init_scale=1.0)
    params = jit(policy.init)(jax.random.key(3))
    table = np.asarray(params["table"])
    assert table.shape == ((V + 1) ** 2, V)
    logits = logits_of(policy)(params, np.array([[3, 0, 5]]))
    code = lambda newest, before: (newest + 1) + (V + 1) * (before + 1)  # noqa: E731
    np.testing.assert_array_equal(logits[0], table[np.array([code(3, -1), code(0, 3), code(5, 0)])])


def test_tabular_starts_from_the_initial_logits():
    start = np.array([0.0, 1.0, -2.0, 0.5, 0.0, 3.0])
    plain, moved = (
        jit(policies.tabular(V, 1, init_scale=0.5, initial_logits=x).init)(jax.random.key(0))["table"] for x in (None, start)
    )
    np.testing.assert_allclose(moved, plain + start, rtol=0, atol=1e-15)


def test_linear_logits_are_sums_over_the_context():
    policy = policies.linear(V, 2, init_scale=1.0)
    params = jit(policy.init)(jax.random.key(3))
    table = np.asarray(params["table"])
    assert table.shape == (1 + 2 * (V + 1), V)
    newest, before = table[1 : V + 2], table[V + 2 :]
    logits = logits_of(policy)(params, np.array([[3, 0]]))
    np.testing.assert_allclose(logits[0, 0], table[0] + newest[4] + before[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(logits[0, 1], table[0] + newest[1] + before[4], rtol=0, atol=1e-14)


def test_all_products_make_linear_as_free_as_tabular():
    pairs = (V + 1) ** 2
    policy = policies.linear(V, 2, num_features=1 + 2 * (V + 1) + pairs)
    tokens = np.array([[a, b] for a in range(V) for b in range(V)])
    params = {"table": np.zeros((1 + 2 * (V + 1) + pairs, V))}
    hidden = np.asarray(jit(policy.apply)(params, tokens)[0][:, 1])
    assert np.linalg.matrix_rank(hidden) == V * V
    np.testing.assert_array_equal(hidden.sum(axis=1), 4.0)  # bias, two tokens, one product


def test_mlp_looks_up_what_one_hots_would_multiply():
    policy = policies.mlp(V, 2, width=5)
    params, tokens = policy.init(jax.random.key(2)), np.array([[1, 3, 0]])
    params["bias"] = params["bias"] + 0.1
    one_hots = np.zeros((3, 2 * (V + 1)))
    for n, newest, before in ((0, 1 + 1, 0), (1, 3 + 1, 1 + 1), (2, 0 + 1, 3 + 1)):
        one_hots[n, newest] = one_hots[n, V + 1 + before] = 1
    expected = np.tanh(one_hots @ np.asarray(params["hidden"]) + 0.1)
    np.testing.assert_allclose(policy.apply(params, tokens)[0][0], expected, rtol=1e-12)
    with pytest.raises(ValueError, match="keeps no cache"):
        policy.apply(params, tokens, cache=())


def test_linear_products_depend_on_the_seed_alone():
    tokens = np.array([[a, b] for a in range(V) for b in range(V)])
    params = {"table": np.zeros((30, V))}
    first, again, other = (np.asarray(jit(policies.linear(V, 2, 30, seed=s).apply)(params, tokens)[0]) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("make", [policies.tabular, policies.linear])
def test_context_length_and_initial_table(make):
    policy = make(V, 2, init_scale=0.3, dtype=jnp.float32)
    params = jit(policy.init)(jax.random.key(0))
    assert params["table"].dtype == jnp.float32
    assert 0.2 < float(np.std(params["table"])) < 0.4
    other_third, other_second, same = np.asarray(logits_of(policy)(params, np.array([[5, 2, 3], [1, 4, 3], [1, 2, 3]])))[:, -1]
    np.testing.assert_array_equal(other_third, same)
    assert (other_second != same).any()
    zero = jit(make(V, 2).init)(jax.random.key(0))["table"]
    assert zero.dtype == jnp.float64 and not np.any(zero)


def test_decoder_options_change_what_they_name():
    def build(**options):
        policy = policies.decoder(V, **{"num_layers": 1, "width": 16, "num_heads": 2, **options})
        params = jax.eval_shape(policy.init, jax.random.key(0))
        return policy, {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(params)}

    policy, base = build()
    params = jit(policy.init)(jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert policy.unembed(params).shape == (16, V)
    tied, shapes = build(tie_embeddings=True)
    assert set(base) - set(shapes) == {"['unembedding']"}
    np.testing.assert_array_equal(tied.unembed(params), params["embedding"].T)
    assert len(build(num_layers=3)[1]) == len(base) + 2 * (len(base) - 3)
    assert build(mlp_width=24)[1]["['mlp_0']['gate_up']"] == (48, 16)
    hidden = np.asarray(jit(policy.apply)(params, PROMPTS)[0])
    for options in ({"num_heads": 4}, {"rope_base": 100.0}, {"norm_epsilon": 0.1}):
        changed, shapes = build(**options)
        assert shapes == base
        assert np.abs(jit(changed.apply)(params, PROMPTS)[0] - hidden).max() > 1e-4


def test_decoder_equals_its_equations():
    """One layer, one head, in NumPy."""
    policy = policies.decoder(V, num_layers=1, width=4, num_heads=1, mlp_width=3, dtype=jnp.float64)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    draws = np.random.default_rng(5)
    params = jax.tree.map(lambda x: draws.normal(size=x.shape), shapes)
    tokens = np.array([2, 5, 0])

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]

    def rotate(x):  # complex pairs (i, i + 2) turned by position · 10000^(−i/2)
        turned = (x[:, :2] + 1j * x[:, 2:]) * np.exp(1j * np.arange(3)[:, None] * 10_000.0 ** (-np.arange(2) / 2))
        return np.concatenate([turned.real, turned.imag], axis=1)

    attention, mlp = params["attention_0"], params["mlp_0"]
    x = params["embedding"][tokens]
    normed = norm(x, "attention_norm_0")
    key, value = np.split(normed @ attention["key_value"].T, 2, axis=1)
    scores = np.where(np.tri(3, dtype=bool), rotate(normed @ attention["query"].T) @ rotate(key).T / 2, -np.inf)
    x = x + np.exp(log_softmax(scores)) @ value @ attention["out"].T
    gate, up = np.split(norm(x, "mlp_norm_0") @ mlp["gate_up"].T, 2, axis=1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"].T
    np.testing.assert_allclose(jit(policy.apply)(params, tokens)[0], norm(x, "final_norm"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["decoder", "deep"])
def test_decoder_tail_is_the_end_of_the_whole(name):
    policy = POLICIES[name]
    whole, tail, without = jit(
        lambda p: (policy.apply(p, PROMPTS)[0], policy.apply(p, PROMPTS, tail=2)[0], by_tree(policy._replace(tail=False), p))
    )(params_of(name))
    assert tail.shape == (3, 2, whole.shape[-1])
    np.testing.assert_allclose(tail, np.asarray(whole)[:, -2:], rtol=0, atol=1e-13)
    np.testing.assert_allclose(without, values(name, by_tree), rtol=0, atol=1e-13)


def test_a_token_that_sees_nothing_gives_no_nan():
    nothing = np.zeros((3, P, P), bool)
    loss = lambda p: POLICIES["decoder"].apply(p, PROMPTS, attention_mask=nothing)[0].sum()  # noqa: E731
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(jit(jax.grad(loss))(params_of("decoder"))))


# Adapters


def _logits_of(policy, *keywords):
    """The policy as a bare logits function that takes only some keywords."""

    def with_all(params, tokens, *, positions=None, segment_ids=None, attention_mask=None):
        given = {"positions": positions, "segment_ids": segment_ids, "attention_mask": attention_mask}
        return policy.apply(params, tokens, **given)[0] @ policy.unembed(params)

    signatures = {
        (): lambda params, tokens: with_all(params, tokens),
        ("positions", "attention_mask"): lambda params, tokens, positions=None, attention_mask=None: with_all(
            params, tokens, positions=positions, attention_mask=attention_mask
        ),
        ("**",): lambda params, tokens, **rest: with_all(params, tokens, **rest),
    }
    return signatures[keywords]


@pytest.mark.parametrize("name", ["tabular", "decoder"])
@pytest.mark.parametrize("keywords", [(), ("positions", "attention_mask"), ("**",)], ids=["none", "named", "forwarded"])
def test_from_logits_equals_the_wrapped_model(name, keywords):
    wrapped = POLICIES[name]
    policy = policies.from_logits(_logits_of(wrapped, *keywords), init=wrapped.init, tree=True if keywords == ("**",) else None)
    assert policy.tree == bool(keywords)
    assert jax.tree.map(jnp.shape, jax.eval_shape(policy.init, jax.random.key(1))) == jax.tree.map(jnp.shape, params_of(name))
    tree, rows = jit(lambda p: (by_tree(policy, p), by_rows(policy, p)))(params_of(name))
    np.testing.assert_allclose(tree, values(name, by_tree), rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows, values(name, by_tree), rtol=0, atol=1e-12)


def test_gradients_flow_through_plain_paths():
    plain = POLICIES["tabular"]._replace(tree=False)
    gradients = jit(
        lambda p: [
            jax.grad(lambda p, f=f: jnp.sum(f(p) ** 2))(p) for f in (lambda p: by_tree(plain, p), lambda p: by_rows(plain, p))
        ]
    )
    of_tree, of_rows = gradients(params_of("tabular"))
    assert_trees_close(of_tree, of_rows, 1e-12)


def test_from_logits_hands_over_one_axis_of_rows():
    seen = []

    def logits(params, tokens):
        seen.append(tokens.shape)
        return params[tokens]

    policy = policies.from_logits(logits)
    table = jnp.zeros((V, V))
    jax.eval_shape(lambda p: (by_rows(policy, p), by_tree(policy, p)), table)
    assert seen == [(3 * 20, P + L - 1), (3 * 4, P + 1)]  # a row a completion; a row for each longest prefix that has a choice


def test_from_logits_turns_segments_into_a_mask_or_refuses():
    wrapped, params = POLICIES["decoder"], params_of("decoder")
    segment_ids = np.where(PROMPT_MASK, 1, 0)
    masked = policies.from_logits(_logits_of(wrapped, "positions", "attention_mask"))
    expected = apply_of("decoder")(params, PROMPTS, segment_ids=segment_ids) @ wrapped.unembed(params)
    given = jit(lambda p: masked.apply(p, PROMPTS, segment_ids=segment_ids)[0])(params)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-13)
    plain = policies.from_logits(_logits_of(wrapped))
    with pytest.raises(ValueError, match="takes no segment_ids"):
        plain.apply(params, PROMPTS, segment_ids=segment_ids)
    with pytest.raises(ValueError, match="takes no attention_mask, positions"):
        plain.apply(params, PROMPTS, positions=segment_ids, attention_mask=np.ones((3, P, P), bool))
    with pytest.raises(ValueError, match="no init"):
        plain.init(jax.random.key(0))


class Bigram(nnx.Module):
    """Logits from the last two tokens, with a variable that is no parameter."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, 8, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(8, V, param_dtype=jnp.float64, rngs=rngs)
        self.scale = nnx.Variable(jnp.asarray(2.0))

    def __call__(self, tokens):
        x = self.embed(tokens)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self.out(jnp.tanh(x + 0.5 * before)) * self.scale[...]


def test_from_nnx_equals_the_module():
    module = Bigram(nnx.Rngs(0))
    policy = policies.from_nnx(module)
    params = policy.init(jax.random.key(0))
    assert len(jax.tree.leaves(params)) == 3  # embedding, kernel, bias; not the scale
    rows, mask = as_rows(COMPLETIONS, MASK)
    tokens = np.concatenate([np.broadcast_to(PROMPTS[:, None], (3, 20, P)), rows], axis=-1)
    logits = np.asarray(jit(lambda t: module(t))(tokens.reshape(-1, P + L))).reshape(3, 20, P + L, V)[:, :, P - 1 : -1]
    expected = np.take_along_axis(log_softmax(logits, ALLOWED), rows[..., None], axis=-1)[..., 0]
    both = jit(lambda p: (by_tree(policy, p, prompt_mask=None), by_rows(policy, p, prompt_mask=None)))
    for logprobs in both(params):
        np.testing.assert_allclose(logprobs, np.where(mask, expected, 0), rtol=0, atol=1e-12)
    gradient = jit(jax.grad(lambda p: by_tree(policy, p).sum()))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradient))


# Errors: one line that names the argument

TABLE = POLICIES["tabular"]
ROWS = np.broadcast_to(COMPLETIONS, (3, *COMPLETIONS.shape))


def rows_with(**changes):
    arguments = {"prompts": PROMPTS, "completions": ROWS, "mask": None, "prompt_mask": None, "allowed": None, **changes}
    positional = (arguments.pop(k) for k in ("prompts", "completions", "mask"))
    return jax.eval_shape(lambda p: policies.token_logprobs(TABLE, p, *positional, **arguments), params_of("tabular"))


def tree_with(**changes):
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS, "mask": MASK, "prompt_mask": None, "allowed": None, **changes}
    positional = (arguments.pop(k) for k in ("prompts", "completions", "mask"))
    return jax.eval_shape(lambda p: policies.completion_logprobs(TABLE, p, *positional, **arguments), params_of("tabular"))


def _gap():
    mask = MASK.copy()
    mask[19] = [True, False, True]
    return mask


BAD = {
    "prompts rank": (rows_with, {"prompts": PROMPTS[0]}, r"prompts has shape \(5,\); it must be \[B, P\]"),
    "prompts float": (rows_with, {"prompts": PROMPTS * 1.0}, "prompts has dtype float64"),
    "prompts empty": (rows_with, {"prompts": PROMPTS[:, :0]}, "prompts has P = 0"),
    "batch": (rows_with, {"prompts": PROMPTS[:2]}, "completions has 3 prompts .* prompts has 2"),
    "completions rank": (rows_with, {"completions": COMPLETIONS}, r"completions has shape .* it must be \[B, G, L\]"),
    "mask shape": (rows_with, {"mask": MASK}, r"mask has shape \(20, 3\); it must be \(3, 20, 3\)"),
    "mask values": (rows_with, {"mask": ROWS * 0.5}, "mask must be bool or hold only 0 and 1"),
    "prompt_mask shape": (rows_with, {"prompt_mask": PROMPT_MASK[:, 1:]}, "prompt_mask has shape"),
    "prompt_mask empty": (rows_with, {"prompt_mask": PROMPT_MASK & False}, "prompt_mask must be True somewhere"),
    "allowed shape": (rows_with, {"allowed": ALLOWED[1:]}, r"allowed has shape \(2, 6\); it must be \[L, V\] with L = 3"),
    "allowed tokens": (rows_with, {"allowed": ALLOWED[:, 1:]}, "allowed has 5 tokens .* V = 6"),
    "allowed values": (rows_with, {"allowed": ALLOWED * 3}, "allowed must be bool"),
    "allowed nothing": (rows_with, {"allowed": ALLOWED & [[1], [0], [1]]}, "allowed must allow .* none at 1"),
    "row not allowed": (rows_with, {"allowed": ALLOWED}, r"completions\[0, 0, 2\] is 0"),
    "row out of range": (rows_with, {"completions": ROWS + 3}, r"completions\[0, 0, 1\] is 7, .* \(V = 6\)"),
    "tree rank": (tree_with, {"completions": ROWS}, r"completions has shape .* it must be \[Y, L\]"),
    "tree mask": (tree_with, {"mask": MASK[1:]}, "mask has shape"),
    "tree gap": (tree_with, {"mask": _gap()}, "row 19 has a gap"),
    "tree equal": (tree_with, {"completions": COMPLETIONS[[0, 1, 1]], "mask": MASK[[0, 1, 1]]}, "distinct; row 2"),
    "tree not allowed": (tree_with, {"allowed": ALLOWED & [[1], [1], [0]] | (np.arange(V) == 5)}, r"completions\[4, 2\] is 4"),
    "tree out of range": (tree_with, {"completions": COMPLETIONS * 2}, r"completions\[0, 1\] is 8"),
    "tree right padded": (tree_with, {"prompt_mask": PROMPT_MASK[:, ::-1]}, "prompt_mask must be True on the last token"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_name_themselves(case):
    function, changes, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        function(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["completions", "mask", "allowed"])
def test_traced_completions_are_refused(name):
    concrete = {"completions": COMPLETIONS, "mask": MASK, "allowed": ALLOWED}[name]
    with pytest.raises(ValueError, match=f"{name} is traced, .* must be concrete.* close over {name}"):
        jax.eval_shape(lambda x: tree_with(**{name: x}), concrete)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: policies.tabular(0, 2), "vocab_size is 0"),
        (lambda: policies.tabular(4, 0), "context_length is 0"),
        (lambda: policies.tabular(50, 9), "context_length = 9 gives"),
        (lambda: policies.tabular(4, 1, init_scale=-1.0), "init_scale is -1.0"),
        (lambda: policies.tabular(4, 1, initial_logits=np.zeros(3)), r"initial_logits has shape \(3,\); it must be \[V\]"),
        (lambda: policies.linear(4, 2, num_features=10), "num_features is 10; it must be between 11 .* and 36"),
        (lambda: policies.linear(4, 2, num_features=37), "num_features is 37"),
        (lambda: policies.decoder(0), "vocab_size is 0"),
        (lambda: policies.decoder(4, num_layers=0), "num_layers is 0"),
        (lambda: policies.decoder(4, mlp_width=0), "mlp_width is 0"),
        *(
            (lambda f=make: f(4, 1.5), "context_length is 1.5; it must be an integer of at least 1")
            for make in (policies.tabular, policies.linear)
        ),
        (lambda: policies.tabular("4", 1), "vocab_size is '4'"),
        (lambda: policies.linear(4, 2, num_features=11.0), "num_features is 11.0"),
        (lambda: policies.decoder(4, num_layers=2.0), "num_layers is 2.0"),
        (lambda: policies.decoder(4, num_layers=True), "num_layers is True"),
        (lambda: policies.decoder(4, dtype="foo"), "dtype is 'foo'; it must be a floating-point type"),
        (lambda: policies.decoder(4, dtype=int), "dtype is .*int.*; it must be a floating-point type"),
        (lambda: policies.tabular(4, 1, dtype="int32"), "dtype is 'int32'"),
        (lambda: policies.linear(4, 1, dtype="foo"), "dtype is 'foo'"),
        (lambda: policies.decoder(4, width=20, num_heads=4), "width is 20; it must be a multiple of 2·num_heads = 8"),
    ],
)
def test_bad_sizes_name_themselves(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["visibility", "features", "decoder", "logprobs", "prefix_tree", "adapters"])
def test_examples_run(module):
    name = f"jax_async_grpo.policies.{module}"
    importlib.import_module(name)
    names = {"jax": jax, "jnp": jnp, "np": np, **{n: getattr(policies, n) for n in policies.__all__}}
    result = doctest.testmod(sys.modules[name], extraglobs=names)
    assert result.attempted > 0 and result.failed == 0


def test_logits_of_bfloat16_are_not_rounded_again():
    keys = jax.random.split(jax.random.key(0))
    hidden, unembed = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, ((3, 64), (64, 5)), strict=True))
    exact = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
    logits = policies.logits_of(hidden, unembed)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-4)  # one rounding to bfloat16 is 0.03
