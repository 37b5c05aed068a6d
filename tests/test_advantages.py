"""Advantages against references written out group by group and token by token, what is defined at their edges, sharding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_async_grpo import advantages, aggregation, losses, separability

_CASES = 200
_SHAPES = [(3, 4, 5), (4, 1, 3)]  # B, G, L
_STEP = 1e-30  # of the complex step: no cancellation, so it may be this small


# References: one group or token at a time, complex so that their derivative is the imaginary part over the step.


def _by_group(group_function):
    return lambda rewards, *others: np.array([group_function(*group) for group in zip(rewards, *others, strict=True)])


def _spread(r, ddof):
    return np.sqrt(sum((x - r.mean()) ** 2 for x in r) / (len(r) - ddof)) if len(set(r.real)) > 1 else 0.0


def _zero_if_equal(group_function):
    return lambda r, *others: group_function(r, *others) if len(set(r.real)) > 1 else np.zeros_like(r)


@_zero_if_equal
def _others(r):
    return np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])


@_zero_if_equal
def _by_length(r, lengths):
    if lengths.sum() == 0:
        return np.zeros_like(r)
    return r - sum(x * n for x, n in zip(r, lengths, strict=True)) / lengths.sum()


def _best(normalize, ddof=0, epsilon=0.0):
    @_zero_if_equal
    def lead(r):
        second, first = np.argsort(r.real)[-2:]
        result = np.zeros_like(r)
        if r[first].real > r[second].real:
            result[first] = (r[first] - r[second]) / ((_spread(r, ddof) + epsilon) if normalize else 1.0)
        return result

    return lead


_centered = _by_group(_zero_if_equal(lambda r: r - r.mean()))


def _normalized(ddof, epsilon):
    return _by_group(_zero_if_equal(lambda r: (r - r.mean()) / (_spread(r, ddof) + epsilon)))


def _batch_scaled(ddof, epsilon):
    return lambda r: _centered(r) / (_spread(r.reshape(-1), ddof) + epsilon)


def _gpg(counted, f_norm):
    def reference(r):
        unequal = sum(len(group) for group in r if len(set(group.real)) > 1)
        number = np.count_nonzero(r.real) if counted == "nonzero_rewards" else unequal
        return _centered(r) * r.size / max(number, 1) / f_norm

    return reference


def _whitened(values, mask, ddof, epsilon):
    result, valid = np.zeros_like(values), values[mask]
    if len(set(valid.real)) > 1:
        variance = sum((x - valid.mean()) ** 2 for x in valid) / (len(valid) - ddof)
        result[mask] = (valid - valid.mean()) / np.sqrt(variance + epsilon)
    return result


def _to_go(rewards, mask, gamma):
    result = np.zeros_like(rewards)
    for row in np.ndindex(rewards.shape[:-1]):
        after = 0.0
        for token in reversed(range(rewards.shape[-1])):
            if mask[row][token]:
                result[row][token] = after = rewards[row][token] + gamma * after
    return result


def _plus_plus_baseline(ddof, epsilon):
    return lambda r, mask: _whitened(np.repeat(_centered(r)[..., None], mask.shape[-1], -1), mask, ddof, epsilon)


def _plus_plus(gamma, ddof, epsilon):
    return lambda r, mask: _whitened(_to_go(r, mask, gamma), mask, ddof, epsilon)


# name, function, reference, further arguments
_TABLE = [
    ("group_centered", {}, _centered, ()),
    ("group_normalized", dict(ddof=0, epsilon=1e-6), _normalized(0, 1e-6), ()),
    ("group_normalized", dict(ddof=1, epsilon=1e-2), _normalized(1, 1e-2), ()),
    ("leave_one_out", {}, _by_group(_others), ()),
    ("batch_scaled", {}, _batch_scaled(0, 1e-6), ()),
    ("batch_scaled", dict(ddof=1, epsilon=1e-4), _batch_scaled(1, 1e-4), ()),
    ("length_weighted", {}, _by_group(_by_length), ("lengths",)),
    ("maxrl", {}, _by_group(_zero_if_equal(lambda r: (r - r.mean()) / (r.mean() + 1e-6))), ()),
    ("maxrl", dict(epsilon=0.1), _by_group(_zero_if_equal(lambda r: (r - r.mean()) / (r.mean() + 0.1))), ()),
    ("pass_at_k", {}, _by_group(_best(False)), ()),
    ("pass_at_k", dict(normalize=True, ddof=1, epsilon=1e-3), _by_group(_best(True, 1, 1e-3)), ()),
    ("gpg", {}, _gpg("nonzero_rewards", 1.0), ()),
    ("gpg", dict(counted="unequal_groups", f_norm=0.5), _gpg("unequal_groups", 0.5), ()),
    ("reinforce_plus_plus_baseline", {}, _plus_plus_baseline(0, 1e-8), ("mask",)),
    ("reinforce_plus_plus_baseline", dict(ddof=1, epsilon=1e-3), _plus_plus_baseline(1, 1e-3), ("mask",)),
    ("reward_to_go", dict(gamma=0.9), lambda r, mask: _to_go(r, mask, 0.9), ("mask",)),
    ("masked_whiten", {}, lambda r, mask: _whitened(r, mask, 0, 1e-8), ("mask",)),
    ("reinforce_plus_plus", {}, _plus_plus(1.0, 0, 1e-8), ("mask",)),
    ("reinforce_plus_plus", dict(gamma=0.8, ddof=1, epsilon=1e-3), _plus_plus(0.8, 1, 1e-3), ("mask",)),
]
_PER_TOKEN = ("reward_to_go", "masked_whiten", "reinforce_plus_plus")
_OF_GROUPS = [
    advantages.group_centered,
    advantages.group_normalized,
    functools.partial(advantages.group_normalized, ddof=1),
    advantages.leave_one_out,
    functools.partial(advantages.batch_scaled, ddof=1),
    lambda r: advantages.length_weighted(r, jnp.full(r.shape, 3)),
    advantages.maxrl,
    advantages.pass_at_k,
    functools.partial(advantages.pass_at_k, normalize=True, ddof=1),
    advantages.gpg,
]


def _random_rewards(rng, shape):
    """Random, few levels, 0 and 1, equal groups, equal batches; not negative."""
    kind = rng.integers(6)
    rewards = [np.abs(rng.normal(size=shape)), rng.integers(3, size=shape) / 10, 1.0 * (rng.random(shape) < 0.3)][kind % 3]
    if kind >= 3:
        rewards[0] = 0.1
    return np.full(shape, 0.1) if rng.random() < 0.05 else rewards


def _random_mask(rng, shape):
    lengths = rng.integers(0, shape[-1] + 1, size=(*shape[:-1], 1)) * (rng.random() > 0.05)
    return (np.arange(shape[-1]) < lengths) & (rng.random(shape) > 0.2)  # with holes


def _random_arguments(rng, shape, name, others):
    rewards = _random_rewards(rng, shape if name in _PER_TOKEN else shape[:-1])
    mask = _random_mask(rng, shape)
    made = dict(mask=mask, lengths=mask.sum(-1))
    return rewards, *(made[other] for other in others)


@pytest.mark.parametrize("shape", _SHAPES, ids=["G=4", "G=1"])
@pytest.mark.parametrize(("name", "options", "reference", "others"), _TABLE)
def test_value_and_gradient_are_the_references(name, options, reference, others, shape):
    rng = np.random.default_rng(sum(map(ord, name)))
    cases = [_random_arguments(rng, shape, name, others) for _ in range(_CASES)]
    function = functools.partial(getattr(advantages, name), **options)

    def value_and_slope(arguments, direction, weights):
        value, pull = jax.vjp(lambda r: function(r, *arguments[1:]), arguments[0])
        return value, jnp.vdot(pull(weights)[0], direction)

    stacked = tuple(np.stack(x) for x in zip(*cases, strict=True))
    # at ties for the second place pass_at_k has a kink: there equal rewards move together
    directions = np.sin(37 * stacked[0]) if name == "pass_at_k" else rng.normal(size=stacked[0].shape)
    weights = rng.normal(size=stacked[0].shape if "mask" not in others else (_CASES, *shape))
    values, slopes = jax.jit(jax.vmap(value_and_slope))(stacked, directions, weights)
    for case, (rewards, *rest) in enumerate(cases):
        stepped = reference(rewards + 1j * _STEP * directions[case], *rest)
        np.testing.assert_allclose(values[case], stepped.real, rtol=1e-12, atol=1e-12 * np.abs(stepped.real).max())
        terms = weights[case] * stepped.imag / _STEP
        assert abs(slopes[case] - terms.sum()) <= 1e-11 * max(1.0, np.abs(terms).sum()), (case, slopes[case], terms.sum())


def test_a_lone_reward_and_equal_rewards_have_advantage_exactly_zero():
    @jax.jit
    def run(rewards):
        return [
            (function(rewards), jax.grad(lambda r, function=function: jnp.sum(function(r) ** 2 + function(r)))(rewards))
            for function in _OF_GROUPS
        ]

    # the mean of seven 0.1 is not 0.1 in floating point
    for rewards in (np.array([[3.0], [0.0]]), np.full((2, 7), 0.1, np.float32), np.zeros((2, 7), np.float32)):
        for value, gradient in run(rewards):
            np.testing.assert_array_equal(value, 0.0)
            assert np.isfinite(gradient).all()


def test_a_batch_of_equal_values_is_whitened_to_exactly_zero():
    @jax.jit
    def run(values, mask):
        functions = (
            lambda x: advantages.masked_whiten(x, mask),
            lambda x: advantages.reinforce_plus_plus(x, mask, gamma=0.0),
            lambda x: advantages.reinforce_plus_plus_baseline(x, jnp.ones((2, 7, 3))),
        )
        return [(function(values), jax.jacobian(function)(values)) for function in functions]

    for value, jacobian in run(np.full((2, 7), 0.1, np.float32), np.arange(14).reshape(2, 7) != 3):
        np.testing.assert_array_equal(value, 0.0)
        assert np.isfinite(jacobian).all()


def test_identities():
    rng = np.random.default_rng(1)
    rewards, lengths = rng.normal(size=(5, 6)), rng.integers(1, 9, size=(5, 6))
    passed = 1.0 * (rng.random((5, 6)) < 0.5)
    tokens = np.broadcast_to(rewards[..., None], (5, 6, 4))
    outcome = np.where(np.arange(4) == 3, tokens, 0.0)

    @jax.jit
    def run():
        return dict(
            centered=advantages.group_centered(rewards),
            others=advantages.leave_one_out(rewards),
            normalized=advantages.group_normalized(rewards, ddof=1, epsilon=1e-2),
            one_group=(advantages.batch_scaled(rewards[:1], ddof=1), advantages.group_normalized(rewards[:1], ddof=1)),
            equal_lengths=advantages.length_weighted(rewards, np.full(rewards.shape, 7)),
            by_length=advantages.length_weighted(rewards, lengths),
            gpg=advantages.gpg(rewards, f_norm=2.0),
            maxrl=(advantages.maxrl(passed, epsilon=1e-3), advantages.group_centered(passed)),
            to_go=advantages.reward_to_go(outcome),
            plus_plus=advantages.reinforce_plus_plus(outcome, epsilon=1e-12),
            baseline=advantages.reinforce_plus_plus_baseline(rewards, np.ones((5, 6, 4)), epsilon=1e-12),
        )

    def same(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)

    found = run()
    same(found["others"], 6 / 5 * found["centered"])
    same(found["normalized"] * (rewards.std(-1, ddof=1, keepdims=True) + 1e-2), found["centered"])
    same(*found["one_group"])
    same(found["equal_lengths"], found["centered"])
    same((lengths * found["by_length"]).sum(-1), 0)
    same(found["gpg"], found["centered"] / 2)  # no reward is 0
    same(found["maxrl"][0] * (passed.mean(-1, keepdims=True) + 1e-3), found["maxrl"][1])
    same(found["to_go"], tokens)
    same(found["plus_plus"], (tokens - rewards.mean()) / rewards.std())
    # equal lengths: the mean over tokens is that over groups, nothing is shifted
    same(found["baseline"], found["centered"][..., None] / np.std(found["centered"]) * np.ones(4))


def test_the_two_counts_of_gpg_part_where_a_group_is_solved():
    rewards = jnp.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(advantages.gpg(rewards)[1], [-1.0, 1.0])  # α = 6/3
    np.testing.assert_allclose(advantages.gpg(rewards, counted="unequal_groups")[1], [-1.5, 1.5])  # α = 6/2


def test_tokens_outside_the_mask_are_stepped_over_whatever_they_hold():
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    rewards = np.arange(10.0).reshape(2, 5)
    dropped = advantages.reward_to_go(rewards[:1, mask[0]], gamma=0.5)
    np.testing.assert_allclose(advantages.reward_to_go(rewards, mask, gamma=0.5)[:1, mask[0]], dropped, rtol=1e-14)
    functions = (advantages.reward_to_go, advantages.masked_whiten, advantages.reinforce_plus_plus)
    run = jax.jit(lambda x: [jax.value_and_grad(lambda r, f=f: jnp.sum(f(r, mask) ** 3))(x) for f in functions])
    clean = run(rewards)
    for garbage in (np.nan, np.inf, -1e300):
        jax.tree.map(np.testing.assert_array_equal, clean, run(np.where(mask, rewards, garbage)))


def test_overlong_penalty_is_the_published_cases():
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 150, size=_CASES)
    function = functools.partial(advantages.overlong_penalty, max_length=100, buffer=40, penalty=0.5)
    expected = [0.0 if n <= 60 else 0.5 * (60 - n) / 40 if n <= 100 else -0.5 for n in lengths]
    np.testing.assert_allclose(function(lengths.astype(float)), expected, rtol=1e-13)
    np.testing.assert_allclose(function(lengths), expected, rtol=1e-6)
    inside = (lengths > 60) & (lengths < 100)
    slope = jax.vmap(jax.grad(function))(lengths.astype(float))
    np.testing.assert_allclose(slope[inside], -0.5 / 40, rtol=1e-14)
    np.testing.assert_array_equal(slope[(lengths < 60) | (lengths > 100)], 0.0)


# Batch statistics over a mapped axis.

_SHARDED = [
    ("batch_scaled", dict(ddof=1), ()),
    ("gpg", {}, ()),
    ("gpg", dict(counted="unequal_groups"), ()),
    ("reinforce_plus_plus_baseline", dict(ddof=1), ("mask",)),
    ("reinforce_plus_plus", dict(gamma=0.9), ("mask",)),
    ("masked_whiten", {}, ("mask",)),
]


@pytest.mark.parametrize(("name", "options", "others"), _SHARDED)
def test_sharded_is_unsharded(name, options, others):
    rng = np.random.default_rng(3)
    rewards, *rest = _random_arguments(rng, (8, 2, 4, 3), name, others)
    weights = rng.normal(size=np.broadcast_shapes(rewards.shape) if not rest else rest[0].shape)
    mixed = rewards + rng.normal(size=rewards.shape)
    mixed[0], mixed[1] = 0.25, 0.5  # each of these shards is constant, the batch is not
    if rest:
        rest[0][2] = False  # a shard without a token
    flat = [x.reshape(-1, *x.shape[2:]) for x in rest]
    function = functools.partial(getattr(advantages, name), **options)
    mesh = jax.make_mesh((jax.device_count(),), ("shards",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("shards")

    def whole(rewards):
        return function(rewards.reshape(-1, *rewards.shape[2:]), *flat).reshape(weights.shape)

    def mapped(rewards):
        return jax.vmap(functools.partial(function, axis_name="shards"), axis_name="shards")(rewards, *rest)

    def on_devices(rewards):  # as many as there are
        run = functools.partial(function, axis_name="shards")
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * (1 + len(rest)), out_specs=spec)
        return sharded(rewards.reshape(-1, *rewards.shape[2:]), *flat).reshape(weights.shape)

    def both(rewards):
        return [
            jax.value_and_grad(lambda r, run=run: (jnp.sum(run(r) * weights), run(r)), has_aux=True)(rewards)
            for run in (whole, mapped, on_devices)
        ]

    compiled = jax.jit(both)
    for case in (mixed, np.full_like(mixed, 0.1)):
        expected, *others = compiled(case)
        for other in others:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), other, expected)
    if name != "reinforce_plus_plus":  # whose returns differ with the tokens left
        assert not expected[0][1].any()


def test_the_oracle_takes_what_stays_within_a_group_and_refuses_batch_statistics():
    options = dict(mask=np.ones((1, 2), bool), levels=[0.0, 0.5, 1.0], group_size=4)

    def check(advantage_fn):
        separability.check_separable(losses.reinforce, advantage_fn, aggregation.sequence_mean, **options)

    check(functools.partial(advantages.pass_at_k, normalize=True))
    for advantage_fn in (advantages.batch_scaled, advantages.gpg):
        with pytest.raises(ValueError, match="couples groups"):
            check(advantage_fn)


def test_low_precision_goes_out_as_float32_and_integers_as_the_default_float():
    functions = [
        *_OF_GROUPS,
        advantages.reinforce_plus_plus,
        functools.partial(advantages.reinforce_plus_plus_baseline, mask=jnp.ones((2, 3, 2))),
        functools.partial(advantages.overlong_penalty, max_length=2, buffer=1),
    ]
    for dtype in (jnp.bfloat16, jnp.float32):
        for function in functions:
            assert jax.eval_shape(function, jax.ShapeDtypeStruct((2, 3), dtype)).dtype == jnp.float32
    for function in _OF_GROUPS:  # integer rewards are exact: they become the default float, float64 here
        assert jax.eval_shape(function, jax.ShapeDtypeStruct((2, 3), jnp.int32)).dtype == jnp.float64


_R = np.array([[0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.group_normalized(1.0), "rewards is a scalar"),
        (lambda: advantages.group_normalized(np.zeros((2, 0))), "rewards has shape"),
        (lambda: advantages.group_normalized(_R, ddof=2), "ddof is 2"),
        (lambda: advantages.group_normalized(_R, epsilon=-1.0), "epsilon is -1.0"),
        (lambda: advantages.batch_scaled(_R, ddof=0.5), "ddof is 0.5"),
        (lambda: advantages.batch_scaled(_R, epsilon=0), "epsilon is 0"),
        (lambda: advantages.group_centered(None), "rewards is None"),
        (lambda: advantages.length_weighted(_R, None), "lengths is None"),
        (lambda: advantages.length_weighted(_R, [1, 2]), r"lengths has shape \(2,\)"),
        (lambda: advantages.length_weighted(_R, [[1, -2]]), "lengths hold a negative"),
        (lambda: advantages.maxrl(-_R), "rewards hold a negative"),
        (lambda: advantages.maxrl(_R, epsilon=float("nan")), "epsilon is nan"),
        (lambda: advantages.pass_at_k(_R, epsilon=0.0), "epsilon is 0.0"),
        (lambda: advantages.pass_at_k(_R, ddof=-1), "ddof is -1"),
        (lambda: advantages.gpg(_R, f_norm=0.0), "f_norm is 0.0"),
        (lambda: advantages.gpg(_R, counted="rewards"), "counted is 'rewards'"),
        (lambda: advantages.reward_to_go(_R, gamma=1.1), "gamma is 1.1"),
        (lambda: advantages.reward_to_go(1.0), "token_rewards is a scalar"),
        (lambda: advantages.reinforce_plus_plus(_R, np.ones(2)), "mask has shape"),
        (lambda: advantages.reinforce_plus_plus(_R, epsilon=0.0), "epsilon is 0.0"),
        (lambda: advantages.reinforce_plus_plus_baseline(_R, None), "mask has shape None"),
        (lambda: advantages.reinforce_plus_plus_baseline(_R, np.ones((2, 2))), r"mask has shape \(2, 2\)"),
        (lambda: advantages.reinforce_plus_plus_baseline(_R, np.full((1, 2, 3), 0.5)), "mask must be bool"),
        (lambda: advantages.masked_whiten(_R, ddof=3), "ddof is 3"),
        (lambda: advantages.overlong_penalty([3], max_length=5, buffer=6), "buffer is 6"),
        (lambda: advantages.overlong_penalty([3], max_length=5, buffer=0), "buffer is 0"),
        (lambda: advantages.overlong_penalty([3], max_length=0, buffer=1), "max_length is 0"),
        (lambda: advantages.overlong_penalty([3], max_length=5, buffer=1, penalty=-1), "penalty is -1"),
    ],
)
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
