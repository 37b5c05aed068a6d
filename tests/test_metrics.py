"""Metrics against enumerated distributions: rows stand in the numbers that make their sample the whole population."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import losses, metrics
from jax_async_grpo.staleness import create_history, push

ON_POLICY = {
    "off_policy/kl": 0.0,
    "off_policy/k3_kl": 0.0,
    "off_policy/chi2_token": 0.0,
    "off_policy/chi2_seq": 0.0,
    "off_policy/ess_ratio": 1.0,
    "is_ratio/mean": 1.0,
    "is_ratio/min": 1.0,
    "is_ratio/max": 1.0,
}


# One compilation per shape is faster than one per operation; the first test runs eagerly.
off_policy, drift, gradient_cosine = map(jax.jit, (metrics.off_policy, metrics.drift, metrics.gradient_cosine))


def population():
    """(log π, log μ) of every pair of tokens, each as often as μ's sixteenths say: 256 rows of L = 2."""
    counts = np.array([[8, 4, 3, 1], [2, 5, 5, 4]])
    behavior = counts / 16
    learner = np.array([[0.4, 0.35, 0.05, 0.2], [0.1, 0.2, 0.3, 0.4]])
    rows = [row for row in itertools.product(range(4), repeat=2) for _ in range(counts[0][row[0]] * counts[1][row[1]])]
    tokens = np.array(rows)
    assert len(tokens) == 256
    position = np.arange(2)
    return np.log(learner[position, tokens]), np.log(behavior[position, tokens]), learner, behavior


def test_off_policy_of_a_whole_population_is_the_enumerated_divergence():
    logprobs, behavior_logprobs, learner, behavior = population()
    kl = np.sum(behavior * np.log(behavior / learner), axis=1)  # KL(μ‖π) of each of the two tokens
    chi2 = np.sum(learner**2 / behavior, axis=1) - 1
    got = metrics.off_policy(logprobs, behavior_logprobs)
    expected = {
        "off_policy/kl": kl.mean(),
        "off_policy/k3_kl": kl.mean(),
        "off_policy/chi2_token": chi2.mean(),
        "off_policy/chi2_seq": np.prod(1 + chi2) - 1,
        "off_policy/ess_ratio": 1 / np.prod(1 + chi2),
        "is_ratio/mean": 1.0,
        "is_ratio/min": (learner / behavior).min(),
        "is_ratio/max": (learner / behavior).max(),
    }
    chex.assert_trees_all_close(got, expected, rtol=1e-12)
    # The opposite direction and another divergence would have been other numbers.
    assert abs(np.sum(learner * np.log(learner / behavior), axis=1).mean() - kl.mean()) > 1e-3
    assert abs(np.sum(behavior**2 / learner, axis=1).mean() - 1 - chi2.mean()) > 1e-2


def test_off_policy_under_jit_with_more_leading_axes():
    logprobs, behavior_logprobs, *_ = population()
    got = off_policy(logprobs.reshape(8, 32, 2), behavior_logprobs.reshape(8, 32, 2))
    chex.assert_trees_all_close(got, metrics.off_policy(logprobs, behavior_logprobs), rtol=1e-12)


def test_the_same_policy_is_exactly_on_policy():
    logprobs = np.random.default_rng(0).normal(-3, 2, size=(8, 32, 2))
    assert {k: float(v) for k, v in off_policy(logprobs, logprobs).items()} == ON_POLICY


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("mask_dtype", [bool, np.float32])
def test_masked_positions_and_rows_are_as_if_dropped(garbage, mask_dtype):
    rng = np.random.default_rng(1)
    learner, behavior = rng.normal(-1, 0.5, size=(2, 6, 4))
    mask = np.zeros((8, 6), bool)
    mask[:6, :4] = True
    wide = [np.full((8, 6), garbage) for _ in range(2)]
    for values, narrow in zip(wide, (learner, behavior), strict=True):
        values[:6, :4] = narrow
    versions = np.array([3, 4, 5, 5, 5, 6, -100, 100])
    got = off_policy(*wide, mask.astype(mask_dtype), versions, 9)
    want = off_policy(learner, behavior, None, versions[:6], 9)
    chex.assert_trees_all_close(got, want, rtol=1e-12)
    assert len(got) == len(ON_POLICY) + 3

    # Rows of unequal length, one by one.
    mask = np.arange(4) < np.array([1, 4, 2, 3, 4, 1])[:, None]
    got = off_policy(np.where(mask, learner, garbage), np.where(mask, behavior, garbage), mask)
    d = np.where(mask, learner - behavior, 0)
    w = np.exp(d.sum(axis=1))
    assert got["off_policy/kl"] == pytest.approx(-d[mask].mean(), rel=1e-12)
    assert got["off_policy/chi2_seq"] == pytest.approx((w**2).mean() - 1, rel=1e-12)
    assert got["off_policy/ess_ratio"] == pytest.approx(w.sum() ** 2 / (6 * (w**2).sum()), rel=1e-12)
    assert got["is_ratio/min"] == pytest.approx(np.exp(d[mask]).min(), rel=1e-12)
    assert got["is_ratio/mean"] == pytest.approx(np.exp(d[mask]).mean(), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_an_empty_mask_gives_the_values_of_on_policy_data(shape):
    nothing = np.full(shape, np.nan)
    got = off_policy(nothing, nothing, np.zeros(shape), np.zeros(shape[:1], int), 5)
    want = ON_POLICY | {"staleness/mean": 0.0, "staleness/min": 0.0, "staleness/max": 0.0}
    assert {k: float(v) for k, v in got.items()} == want


def test_a_nan_inside_the_mask_shows():
    logprobs = np.zeros((8, 32, 2))
    bad = logprobs.copy()
    bad[0, 1, 0] = np.nan
    assert all(np.isnan(v) for v in off_policy(bad, logprobs).values())
    assert all(np.isnan(v) for v in off_policy(logprobs, bad).values())


def test_huge_ratios_are_clamped_and_the_effective_sample_size_is_not():
    behavior = np.zeros((4, 100), np.float32)
    learner = np.full((4, 100), 0.5, np.float32)  # each completion's log w is 50, and w² overflows float32
    got = off_policy(learner, behavior)
    assert got["off_policy/ess_ratio"] == 1.0
    assert got["off_policy/chi2_seq"] == pytest.approx(np.exp(40), rel=1e-5)
    learner[0, 0] = 50.0
    got = off_policy(learner, behavior)
    assert got["off_policy/ess_ratio"] == pytest.approx(1 / 4, rel=1e-5)
    assert got["is_ratio/max"] == pytest.approx(np.exp(20), rel=1e-5)
    assert got["off_policy/chi2_token"] == pytest.approx((np.exp(40) + 399 * np.expm1(1.0)) / 400, rel=1e-5)
    assert got["off_policy/kl"] == pytest.approx(-(50 + 399 * 0.5) / 400, rel=1e-5)  # exponentiates nothing, clamps nothing
    learner[0, 0] = -50.0
    got = off_policy(learner, behavior)
    assert got["is_ratio/min"] == pytest.approx(np.exp(-20), rel=1e-5)
    assert got["off_policy/k3_kl"] == pytest.approx((49 + 399 * (np.expm1(0.5) - 0.5)) / 400, rel=1e-5)
    for impossible in (-80.0, -np.inf):  # a token that the behavior policy hardly draws, or cannot
        behavior[0, 0] = impossible
        got = off_policy(learner, behavior)
        assert got["off_policy/k3_kl"] == pytest.approx((np.exp(20) - 21) / 400, rel=1e-5)


def test_tiny_differences_survive_float32():
    behavior = np.zeros((4, 100), np.float32)
    got = off_policy(behavior + np.float32(1e-7), behavior)
    assert got["off_policy/chi2_token"] == pytest.approx(2e-7, rel=1e-4)
    assert got["off_policy/chi2_seq"] == pytest.approx(2e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((jnp.float32, jnp.float32), jnp.float32),
        ((jnp.bfloat16, jnp.bfloat16), jnp.float32),
        ((jnp.float32, jnp.float64), jnp.float64),
    ],
)
def test_the_values_have_at_least_float32(dtypes, result):
    learner, behavior = (jnp.full((2, 3), -0.5, dtype) for dtype in dtypes)
    assert {v.dtype for v in off_policy(learner, behavior).values()} == {jnp.dtype(result)}
    assert {v.dtype for v in metrics.clip_fraction(learner, behavior, jnp.ones(2)).values()} == {jnp.dtype(jnp.float32)}


def test_staleness_counts_completions_or_tokens():
    logprobs = np.zeros((2, 3))
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    by_row = off_policy(logprobs, logprobs, mask, np.array([2, 5]), 6)
    assert [by_row[f"staleness/{k}"] for k in ("mean", "min", "max")] == [2.5, 1, 4]
    in_flight = np.array([[2, 9, 9], [4, 4, 6]])  # the weights changed while the second completion was generated
    by_token = off_policy(logprobs, logprobs, mask, in_flight, jnp.asarray(6))
    assert [by_token[f"staleness/{k}"] for k in ("mean", "min", "max")] == [2, 0, 4]
    assert not any(k.startswith("staleness") for k in off_policy(logprobs, logprobs, mask))
    from_the_future = off_policy(logprobs, logprobs, mask, np.array([5, 6], np.uint32), jnp.uint8(3))
    assert [from_the_future[f"staleness/{k}"] for k in ("mean", "min", "max")] == [-2.5, -3, -2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(()), np.zeros(())), r"^logprobs is a scalar; it must be \[\.\.\., L\]"),
        (([[0.0]], np.zeros((1, 1))), r"^logprobs is a list; it must be an array$"),
        ((np.zeros((1, 1)), None), r"^behavior_logprobs is None; it must be an array$"),
        ((np.zeros((2, 3)), np.zeros((2, 1))), r"^behavior_logprobs has shape \(2, 1\); it must be .* \(2, 3\)$"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3)), r"^mask has shape \(3,\)"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), None, np.zeros(2)), r"^policy_version is given and step is None"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), None, None, 4), r"^step is given and policy_version is None"),
        (
            (np.zeros((2, 3)), np.zeros((2, 3)), None, np.zeros(3), 4),
            r"^policy_version has shape \(3,\); .* \(2,\) .* \(2, 3\)",
        ),
    ],
)
def test_off_policy_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.off_policy(*arguments)


@pytest.mark.parametrize(("epsilon_low", "epsilon_high"), [(0.2, 0.2), (0.1, 0.3)])
@pytest.mark.parametrize("token_advantages", [False, True])
def test_clip_fraction_counts_where_the_clipped_loss_is_larger(epsilon_low, epsilon_high, token_advantages):
    rng = np.random.default_rng(2)
    learner, behavior = rng.normal(-1, 0.3, size=(2, 40, 6))
    advantages = rng.choice([-1.3, 0.0, 0.7], size=(40, 6) if token_advantages else 40)
    mask = rng.random((40, 6)) < 0.7
    per_token = np.broadcast_to(advantages if token_advantages else advantages[:, None], (40, 6))
    ratio = np.exp(learner - behavior)
    unclipped, clipped = -per_token * ratio, -per_token * np.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    low, high = (ratio < 1 - epsilon_low) & (per_token < 0), (ratio > 1 + epsilon_high) & (per_token > 0)
    want = {
        "pg_clipfrac": (clipped > unclipped)[mask].mean(),
        "clip_ratio/low_mean": low[mask].mean(),
        "clip_ratio/high_mean": high[mask].mean(),
    }
    bounds = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    fraction = jax.jit(metrics.clip_fraction, static_argnames=bounds)
    got = fraction(learner, np.where(mask, behavior, np.nan), advantages, mask, **bounds)
    chex.assert_trees_all_close(got, want, rtol=1e-12)
    assert got["pg_clipfrac"] == pytest.approx(float(got["clip_ratio/low_mean"] + got["clip_ratio/high_mean"]), rel=1e-12)
    assert min(got.values()) > 0
    # The tokens it counts are those whose loss has no gradient although their advantage is not 0.
    gradient = jax.jit(jax.grad(lambda x: losses.ppo_clip(x, behavior, advantages, mask, **bounds).sum()))(learner)
    assert got["pg_clipfrac"] == pytest.approx(float(((gradient == 0) & (per_token != 0))[mask].mean()))


def test_clip_fraction_of_an_empty_mask_and_of_bad_arguments():
    zeros = np.zeros((2, 3))
    assert set(map(float, metrics.clip_fraction(zeros, zeros, zeros, zeros).values())) == {0.0}
    with pytest.raises(ValueError, match="epsilon_low is 0"):
        metrics.clip_fraction(zeros, zeros, zeros, epsilon_low=0)


@pytest.mark.parametrize("spoiled", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_fraction_shows_a_nan_inside_the_mask(spoiled, sign):
    learner, behavior = np.zeros((2, 4, 3))
    arguments = [learner + 0.5, behavior, np.full((4, 3), sign)]
    arguments[spoiled][1, 2] = np.nan
    counted, left_out = np.ones((4, 3), bool), np.ones((4, 3), bool)
    left_out[1, 2] = False
    assert np.isnan(metrics.clip_fraction(*arguments, counted)["pg_clipfrac"])
    assert metrics.clip_fraction(*arguments, left_out)["pg_clipfrac"] == (sign > 0)


def test_trees_that_do_not_match_are_refused():
    tree = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    for name, first, second in (("drift", "learner_params", "behavior_params"), ("gradient_cosine", "gradient", "other")):
        function = getattr(metrics, name)
        with pytest.raises(ValueError, match=rf"^{second}\['w'\] has shape \(3,\); {first}\['w'\] has \(2, 3\)$"):
            function(tree, {**tree, "w": jnp.ones(3)})
        with pytest.raises(ValueError, match=f"^{second} has the structure .*; that of {first} is "):
            function(tree, tree["w"])
        with pytest.raises(ValueError, match=f"^{first} has no leaves"):
            function({}, {})


def test_drift_is_the_norm_over_all_parameters():
    theta = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": (jnp.array([2.0]),)}
    phi = {"w": jnp.array([[0.0, 0.0], [0.0, 1.0]]), "b": (jnp.array([-2.0]),)}
    got = drift(theta, phi)
    assert set(got) == {"drift/from_behavior", "drift/param_norm"}
    assert got["drift/from_behavior"] == 5.0 and got["drift/param_norm"] == pytest.approx(np.sqrt(14))
    assert drift(theta, theta)["drift/from_behavior"] == 0.0


def test_low_precision_parameters_are_summed_in_float32():
    theta = {"w": jnp.ones(4096, jnp.bfloat16)}
    phi = {"w": jnp.full(4096, 2.0**-8, jnp.bfloat16)}  # 1 − 2^−8 is no bfloat16
    got = drift(theta, phi)
    assert got["drift/from_behavior"] == pytest.approx(64 * (1 - 2**-8), rel=1e-6)
    assert gradient_cosine(theta, theta) == pytest.approx(1, rel=1e-6)
    assert got["drift/param_norm"].dtype == gradient_cosine(theta, phi).dtype == jnp.float32


def test_gradient_cosine():
    rng = np.random.default_rng(3)
    first, second = ({"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)} for _ in range(2))
    flat_first, flat_second = (np.concatenate([x.ravel() for x in g.values()]) for g in (first, second))
    want = flat_first @ flat_second / np.linalg.norm(flat_first) / np.linalg.norm(flat_second)
    assert gradient_cosine(first, second) == pytest.approx(want, rel=1e-12)
    assert gradient_cosine(first, jax.tree.map(lambda x: -3 * x, first)) == pytest.approx(-1, rel=1e-12)
    zero = jax.tree.map(np.zeros_like, first)
    assert gradient_cosine(first, zero) == gradient_cosine(zero, zero) == 0.0
    assert np.isnan(gradient_cosine(first, {**second, "b": np.full(4, np.nan)}))
    for scale in (1e-200, 1e200):
        assert gradient_cosine(first, jax.tree.map(lambda x, s=scale: s * x, second)) == pytest.approx(want, rel=1e-12)
    large = [jax.tree.map(lambda x: np.float32(1e25 * x), tree) for tree in (first, second)]
    assert gradient_cosine(*large) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("num_pushes", [3, 9])
def test_msd_of_the_ring(num_pushes, memory_kind):
    rng = np.random.default_rng(4)
    versions = [{"w": jnp.asarray(rng.normal(size=(2, 2))), "b": jnp.asarray(rng.normal(size=3))} for _ in range(num_pushes)]
    history = create_history(versions[0], 5, memory_kind=memory_kind)
    jit_push = jax.jit(push)
    for params in versions:
        history = jit_push(history, params)
    want = [
        sum(((versions[-1][k] - versions[-1 - s][k]) ** 2).sum() for k in ("w", "b")) if s < num_pushes else np.nan
        for s in range(5)
    ]
    got = jax.jit(metrics.msd)(history)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == 0.0 and np.isnan(got).sum() == max(0, 5 - num_pushes)


def test_msd_of_a_straight_walk_is_quadratic_over_many_histories():
    def walk(velocity):
        theta = {"w": jnp.zeros(3, jnp.float32)}
        history = create_history(theta, 4, dtype=jnp.bfloat16)
        for t in range(6):
            history = push(history, {"w": theta["w"] + t * velocity})
        return metrics.msd(history)

    got = jax.jit(jax.vmap(walk))(jnp.array([1.0, 2.0]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.array([[3.0], [12.0]]) * np.arange(4) ** 2, rtol=1e-6)
