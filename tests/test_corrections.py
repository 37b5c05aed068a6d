"""Correction weights, masks and proximal approximations against loops in NumPy, and the identities they obey."""

from __future__ import annotations

import cmath
import doctest
import functools
import inspect
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, corrections, exact, losses, masked, policies, staleness
from jax_async_grpo.aggregation import MaskedSum

_STEP = 1e-30  # of the complex step: no cancellation, so as small as one likes
_EXTREME = 50.0  # nats


def _tokens(seed, shape, spread=0.7):
    """(old, behavior, mask) of seeded rows: a few log-ratios are ±50, a few rows have no valid token or a single one."""
    rng = np.random.default_rng(seed)
    behavior = -np.abs(rng.normal(1.0, 1.0, shape))
    log_ratio = spread * rng.normal(size=shape) * rng.choice([0.02, 0.3, 1.0], size=(*shape[:-1], 1))
    log_ratio = np.where(rng.random(shape) < 0.04, rng.choice([-_EXTREME, _EXTREME], size=shape), log_ratio)
    mask = rng.random(shape) < rng.choice([0.0, 0.5, 0.9, 1.0], size=(*shape[:-1], 1))
    return behavior + log_ratio, behavior, mask


# 200 cases in two shapes: a group of four completions for each of 160, then 40 groups of one
BATCHES = [_tokens(0, (160, 4, 5)), _tokens(1, (40, 1, 5))]


def _rho(old, behavior):
    return [cmath.exp(a - b) for a, b in zip(old, behavior, strict=True)]


def _product(old, behavior):
    return math.prod(_rho(old, behavior))


def _geometric(old, behavior):
    return cmath.exp(sum(a - b for a, b in zip(old, behavior, strict=True)) / len(old))


def _clip(value, low, high):
    return low + 0j if value.real < low else high + 0j if value.real > high else value


def _band(value, low, high):
    return value if low <= value.real <= high else 0j


def _terms(name, old, behavior):
    rho = _rho(old, behavior)
    return [{"k1": -cmath.log(r), "k2": cmath.log(r) ** 2 / 2, "k3": r - 1 - cmath.log(r)}[name].real for r in rho]


def _kept_rows(statistic, low, high):
    return lambda old, behavior: [1 + 0j if low <= statistic(old, behavior) <= high else 0j] * len(old)


# name: (the function, its reference on the valid tokens of one row, which it maps to as many complex weights)
CORRECTIONS = {
    "token_tis": (
        functools.partial(corrections.token_tis, cap=1.5),
        lambda old, mu: [_clip(r, 0, 1.5) for r in _rho(old, mu)],
    ),
    "token_tis, low": (
        functools.partial(corrections.token_tis, cap=2.0, low=0.6),
        lambda old, mu: [_clip(r, 0.6, 2.0) for r in _rho(old, mu)],
    ),
    "token_tis, no bound": (functools.partial(corrections.token_tis, cap=np.inf, low=0.0), _rho),
    "token_mis": (
        functools.partial(corrections.token_mis, cap=1.5),
        lambda old, mu: [_band(r, 0, 1.5) for r in _rho(old, mu)],
    ),
    "icepop": (
        functools.partial(corrections.icepop, low=0.7, high=1.5),
        lambda old, mu: [_band(r, 0.7, 1.5) for r in _rho(old, mu)],
    ),
    "sequence_tis": (
        functools.partial(corrections.sequence_tis, cap=1.3),
        lambda old, mu: [_clip(_product(old, mu), 0, 1.3)] * len(old),
    ),
    "sequence_mis": (
        functools.partial(corrections.sequence_mis, cap=1.3),
        lambda old, mu: [_band(_product(old, mu), 0, 1.3)] * len(old),
    ),
    "sequence_mask_tis": (
        functools.partial(corrections.sequence_mask_tis, low=0.95, high=1.1),
        lambda old, mu: [r if 0.95 <= _geometric(old, mu).real <= 1.1 else 0j for r in _rho(old, mu)],
    ),
    "geometric_mask": (
        functools.partial(corrections.geometric_mask, low=0.95, high=1.1),
        _kept_rows(lambda old, mu: _geometric(old, mu).real, 0.95, 1.1),
    ),
    "veto": (
        functools.partial(corrections.veto, low=0.5, high=1.8),
        lambda old, mu: [1 + 0j if all(0.5 <= r.real <= 1.8 for r in _rho(old, mu)) else 0j] * len(old),
    ),
    "veto, defaults": (
        corrections.veto,
        lambda old, mu: [1 + 0j if all(1e-4 <= r.real <= 100 for r in _rho(old, mu)) else 0j] * len(old),
    ),
    "k_rejection, token k3": (
        functools.partial(corrections.k_rejection, estimator=losses.k3, threshold=0.02),
        lambda old, mu: [1 + 0j if k <= 0.02 else 0j for k in _terms("k3", old, mu)],
    ),
    "k_rejection, sum k2": (
        functools.partial(corrections.k_rejection, estimator=losses.k2, level=masked.masked_sum, threshold=0.3),
        _kept_rows(lambda old, mu: sum(_terms("k2", old, mu)), -np.inf, 0.3),
    ),
    "k_rejection, mean k1": (
        functools.partial(
            corrections.k_rejection, estimator=losses.k1, level=masked.masked_mean, threshold=0.05, threshold_low=-0.1
        ),
        _kept_rows(lambda old, mu: np.mean(_terms("k1", old, mu)), -0.1, 0.05),
    ),
    "k_rejection, max k3": (
        functools.partial(corrections.k_rejection, estimator=losses.k3, level=corrections.masked_max, threshold=0.1),
        _kept_rows(lambda old, mu: max(_terms("k3", old, mu)), -np.inf, 0.1),
    ),
}
UNBOUNDED = {"token_tis, no bound", "sequence_mask_tis"}  # weights without an upper bound, by definition


def _row_reference(reference, old, behavior, mask, cotangent):
    """Weights of a row, and the gradients of Σ cotangent·weights by a complex step in every valid token."""
    weights, gradients = np.zeros(len(old)), np.zeros((2, len(old)))
    (valid,) = np.nonzero(mask)
    if len(valid):
        weights[valid] = [w.real for w in reference(old[valid], behavior[valid])]
    for which in range(2):
        for position, token in enumerate(valid):
            moved = [old[valid].astype(complex), behavior[valid].astype(complex)]
            moved[which][position] += 1j * _STEP
            terms = zip(cotangent[valid], reference(*moved), strict=True)
            gradients[which, token] = sum(c * w.imag / _STEP for c, w in terms if w.imag)
    return weights, gradients


def _value_and_gradients(function):
    """Jitted (weights, d/d old, d/d behavior) of Σ cotangent·weights, case by case."""

    def of_case(old, behavior, mask, cotangent):
        def weighted(old, behavior):
            weights = function(old, behavior, mask)
            return jnp.sum(cotangent * weights), weights

        (_, weights), gradients = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(old, behavior)
        return weights, *gradients

    return jax.jit(jax.vmap(of_case))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_and_gradients_match_loops(name):
    function, reference = CORRECTIONS[name]
    compiled = _value_and_gradients(function)
    for seed, (old, behavior, mask) in enumerate(BATCHES):
        cotangent = np.random.default_rng(10 + seed).normal(size=old.shape)
        expected = np.zeros((3, *old.shape))
        for row in np.ndindex(old.shape[:-1]):
            expected[0][row], expected[1:, *row] = _row_reference(reference, old[row], behavior[row], mask[row], cotangent[row])
        measured = compiled(old, behavior, mask, cotangent)
        for got, wanted in zip(measured, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)
        # the cases decide something: both sides of every bound occur
        used = expected[0][mask]
        assert name == "token_tis, no bound" or len(np.unique(used)) > 1
        if "mask" in name or "veto" in name or "rejection" in name or "mis" in name or "icepop" in name:
            assert 0.02 < np.mean(used == 0) < 0.98


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_stands_under_the_mask_touches_neither_weight_nor_gradient(name):
    compiled = _value_and_gradients(CORRECTIONS[name][0])
    old, behavior, mask = BATCHES[1]
    clean = compiled(old, behavior, mask, np.ones(old.shape))
    for garbage in (np.nan, np.inf, -np.inf):
        dirty = compiled(*(np.where(mask, x, garbage) for x in (old, behavior)), mask, np.ones(old.shape))
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("name", sorted(CORRECTIONS.keys() - UNBOUNDED))
def test_sums_far_beyond_the_range_of_float32_stay_finite(name):
    # 20 tokens of ±50 nats: e^1000 has no float32
    signs = np.array([[1.0], [-1.0], [0.0]])
    log_ratio = np.where(signs == 0, np.resize([_EXTREME, -_EXTREME], 20), signs * _EXTREME)
    old, mask = jnp.asarray(log_ratio[:, None], jnp.float32), np.ones((3, 1, 20), bool)
    outputs = _value_and_gradients(CORRECTIONS[name][0])(old, jnp.zeros_like(old), mask, jnp.ones_like(old))
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in outputs)


def test_dtypes_masks_and_ranks_that_come_in():
    @jax.jit
    def all_weights(old, behavior, mask=None):
        return {name: function(old, behavior, mask) for name, (function, _) in CORRECTIONS.items()}

    old, behavior, mask = (jnp.asarray(x) for x in BATCHES[1])
    row = all_weights(old[0, 0], behavior[0, 0])  # no leading axes and no mask
    whole = all_weights(old, behavior, mask | True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0, 0]), row, whole)
    low = [x.astype(jnp.bfloat16) for x in (old, behavior)]
    rounded, expected = all_weights(*low, mask), all_weights(*(x.astype(jnp.float64) for x in low), mask)
    assert all(x.dtype == jnp.float32 for x in rounded.values())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), rounded, expected)
    function = functools.partial(corrections.veto, high=2.0)
    np.testing.assert_array_equal(function(old, behavior, mask.astype(jnp.float32)), function(old, behavior, mask))


def test_corrections_contain_each_other():
    old, behavior, mask = BATCHES[0]
    rho = np.where(mask, np.exp(old - behavior), 0.0)
    np.testing.assert_allclose(corrections.token_tis(old, behavior, mask, cap=np.inf), rho, rtol=1e-13)
    mis = corrections.token_mis(old, behavior, mask, cap=1.5)
    np.testing.assert_array_equal(corrections.icepop(old, behavior, mask, low=0.0, high=1.5), mis)
    geometric = corrections.geometric_mask(old, behavior, mask, low=0.9, high=1.2)
    masked_tis = corrections.sequence_mask_tis(old, behavior, mask, low=0.9, high=1.2)
    np.testing.assert_allclose(masked_tis, rho * geometric, rtol=1e-13)
    # verl's *_k1 bounds hold −log ρ: a band of the ratio is their reciprocal
    options = dict(estimator=losses.k1, level=masked.masked_mean, threshold=math.log(1.2), threshold_low=math.log(0.9))
    np.testing.assert_array_equal(
        corrections.k_rejection(old, behavior, mask, **options),
        corrections.geometric_mask(old, behavior, mask, low=1 / 1.2, high=1 / 0.9),
    )


def _learner_case(shape, seed=3):
    """(learner, behavior, advantages, mask)"""
    learner, behavior, mask = _tokens(seed, shape)
    return learner, behavior, np.random.default_rng(seed).normal(size=shape[:-1]), mask


def test_opsm_drops_bad_completions_the_learner_has_left():
    for seed, shape in enumerate([(160, 4, 5), (40, 1, 5)]):
        learner, behavior, advantage, mask = _learner_case(shape, seed)
        expected = np.zeros(shape)
        for row in np.ndindex(shape[:-1]):
            valid = mask[row]
            moved = (behavior[row] - learner[row])[valid].mean() if valid.any() else 0.0
            expected[row] = valid * (0.0 if advantage[row] < 0 and moved > 0.01 else 1.0)
        function = functools.partial(corrections.opsm, threshold=0.01)
        np.testing.assert_array_equal(function(learner, behavior, advantage, mask), expected)
        assert 0.05 < (expected[mask] == 0).mean() < 0.5
        per_token = np.broadcast_to(advantage[..., None], shape)
        np.testing.assert_array_equal(function(learner, behavior, per_token, mask), expected)
        # the detached learner is what is compared, the differentiated one is not
        np.testing.assert_array_equal(function(learner + 7, behavior, advantage, mask, detached_logprobs=learner), expected)
        slopes = jax.grad(lambda *x, f=function, a=advantage, m=mask: f(*x, a, m).sum(), argnums=(0, 1))(
            jnp.asarray(learner), jnp.asarray(behavior)
        )
        assert all((slope == 0).all() for slope in slopes)
        dirty = [np.where(mask, x, np.nan) for x in (learner, behavior)]
        np.testing.assert_array_equal(function(*dirty, advantage, mask), expected)


def _weights_case(seed, shape):
    rng = np.random.default_rng(seed)
    _, _, mask = _tokens(seed, shape)
    return np.where(mask & (rng.random(shape) < 0.8), rng.lognormal(size=shape), 0.0), mask


def _normalized(weights, mask, by_row):
    """w / mean(w) of one batch, by loops; complex weights pass."""
    rows = [(w, m) for w, m in zip(weights.reshape(-1, weights.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True)]
    if by_row:
        values = [sum(w[m]) / m.sum() for w, m in rows if m.any()]
    else:
        values = [w for row, m in rows for w in row[m]]
    total = sum(values)
    return weights * mask * (len(values) / total) if total else weights * 0.0


@pytest.mark.parametrize("by_row", [False, True])
def test_batch_normalized_weights_and_gradients_match_loops(by_row):
    def of_case(weights, mask, cotangent):
        def weighted(weights):
            normalized = corrections.batch_normalize(weights, mask, by_row=by_row)
            return jnp.sum(normalized * cotangent), normalized

        (_, normalized), slope = jax.value_and_grad(weighted, has_aux=True)(weights)
        return normalized, slope

    compiled = jax.jit(jax.vmap(of_case))
    for seed, shape in enumerate([(160, 3, 4), (40, 1, 4)]):
        weights, mask = _weights_case(seed, shape)
        cotangent = np.random.default_rng(seed).normal(size=shape)
        normalized, slope = compiled(weights, mask, cotangent)
        for case in range(shape[0]):
            value, expected = weights[case], np.zeros(shape[1:])
            for token in zip(*np.nonzero(mask[case]), strict=True):
                moved = value.astype(complex)
                moved[token] += 1j * _STEP
                if value.sum() > 0:  # all zero: defined as 0, where no formula has a slope
                    expected[token] = np.sum(_normalized(moved, mask[case], by_row) * cotangent[case]).imag / _STEP
            np.testing.assert_allclose(normalized[case], _normalized(value, mask[case], by_row), rtol=1e-12, atol=1e-14)
            if value.sum() > 0:
                np.testing.assert_allclose(slope[case], expected, rtol=1e-10, atol=1e-11)
            assert np.isfinite(slope[case]).all()
    assert (weights.sum((1, 2)) == 0).any()


def _over_shards(function):
    """The function on the eight shards of the first axis, with that axis named; differentiable as the whole is."""
    return lambda *arrays: jnp.concatenate(
        list(jax.vmap(function, axis_name="data")(*(x.reshape(8, -1, *x.shape[1:]) for x in arrays)))
    )


@pytest.mark.parametrize("by_row", [False, True])
def test_batch_normalization_sharded_is_unsharded(by_row):
    weights, mask = _weights_case(7, (16, 3, 4))
    fixed = np.random.default_rng(7).normal(size=weights.shape)

    @jax.jit
    def both(weights):
        def whole(weights):
            return jnp.sum(fixed * corrections.batch_normalize(weights, mask, by_row=by_row))

        def sharded(weights):
            function = functools.partial(corrections.batch_normalize, by_row=by_row, axis_name="data")
            return jnp.sum(fixed * _over_shards(function)(weights, jnp.asarray(mask)))

        return jax.value_and_grad(whole)(weights), jax.value_and_grad(sharded)(weights)

    whole, sharded = both(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), whole, sharded)
    local = jnp.sum(fixed * jax.vmap(functools.partial(corrections.batch_normalize, by_row=by_row))(weights, mask))
    assert abs(local - whole[0]) > 1e-2  # a mean of its own in every shard is something else


def _greedy(proximal, behavior, mask, threshold):
    """Drop the largest square, the last one among equals, while the mean of the rest is not below the threshold."""
    kept = [tuple(index) for index in np.argwhere(mask)]
    squares = {index: (behavior[index] - proximal[index]) ** 2 for index in kept}
    while len(kept) > 1 and not math.fsum(squares[i] for i in kept) / len(kept) < threshold:
        kept.remove(max(kept, key=lambda index: (squares[index], index)))
    expected = np.zeros(mask.shape)
    for index in kept:
        expected[index] = 1.0
    return expected


def test_the_second_moment_mask_is_the_greedy_one():
    function = _value_and_gradients(functools.partial(corrections.second_moment_mask, threshold=0.03))
    for proximal, behavior, mask in BATCHES:
        proximal = proximal.copy()
        proximal[::5] = behavior[::5] + np.round(proximal[::5] - behavior[::5], 1)  # every fifth case is full of ties
        kept, *slopes = function(proximal, behavior, mask, np.ones(proximal.shape))
        for case in range(len(kept)):
            np.testing.assert_array_equal(kept[case], _greedy(proximal[case], behavior[case], mask[case], 0.03))
        assert 0.1 < np.mean(np.asarray(kept)[mask] == 0) < 0.9
        assert all((slope == 0).all() for slope in slopes)
        dirty = (np.where(mask, x, np.nan) for x in (proximal, behavior))
        np.testing.assert_array_equal(function(*dirty, mask, np.ones(proximal.shape))[0], kept)


def test_the_second_moment_mask_never_drops_all_and_keeps_what_is_within():
    far = np.array([[3.0, 2.0], [2.5, 2.0]])
    np.testing.assert_array_equal(corrections.second_moment_mask(far, 0 * far), [[0, 1], [0, 0]])
    near = np.full((2, 2), 0.19)  # 0.0361 < 0.04, the default
    np.testing.assert_array_equal(corrections.second_moment_mask(near, 0 * near), 1.0)
    np.testing.assert_array_equal(corrections.second_moment_mask(near + 0.02, 0 * near), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(corrections.second_moment_mask(far, 0 * far, np.zeros((2, 2), bool)), 0.0)
    hidden = np.array([[True, False], [True, True]])  # the smallest square is not valid
    np.testing.assert_array_equal(corrections.second_moment_mask(far, np.array([[0, 2.0], [0, 0]]), hidden), [[0, 0], [0, 1]])


def test_the_second_moment_mask_sharded_is_unsharded():
    proximal, behavior, mask = _tokens(11, (16, 3, 4))
    proximal[4:12] = behavior[4:12] + np.round(proximal[4:12] - behavior[4:12], 1)  # ties across shards
    function = functools.partial(corrections.second_moment_mask, threshold=0.01, axis_name="data")
    sharded = jax.jit(_over_shards(function))(proximal, behavior, mask)
    np.testing.assert_array_equal(sharded, _greedy(proximal, behavior, mask, 0.01))


def test_the_second_moment_mask_beside_decoupled_ppo():
    proximal, behavior, mask = (x[0] for x in BATCHES[0])
    learner, advantage = proximal + 0.1, np.array([1.0, -1.0, 0.5, -2.0])
    keep = np.asarray(corrections.second_moment_mask(proximal, behavior, mask)) == 1
    assert keep.sum() < mask.sum()
    loss_fn = corrections.corrected(
        losses.decoupled_ppo,
        lambda old_logprobs, behavior_logprobs, mask: corrections.second_moment_mask(old_logprobs, behavior_logprobs, mask),
    )
    np.testing.assert_array_equal(
        loss_fn(learner, proximal, advantage, mask, behavior_logprobs=behavior),
        losses.decoupled_ppo(learner, proximal, advantage, keep, behavior_logprobs=behavior),
    )


def test_dropped_tokens_and_rows_are_counted():
    weights = np.array([[0.0, 2.0, 0.0], [0.0, 0.0, 9.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert corrections.dropped_fraction(weights, mask) == MaskedSum(5.0, 6.0)
    assert corrections.dropped_row_fraction(weights, mask) == MaskedSum(2.0, 3.0)
    assert corrections.dropped_fraction(weights, mask).mean() == 5 / 6
    for function in (corrections.dropped_fraction, corrections.dropped_row_fraction):
        parts = [function(weights[:1], mask[:1]), function(weights[1:], mask[1:])]
        assert MaskedSum(*(sum(x) for x in zip(*parts, strict=True))) == function(weights, mask)
        assert function(weights, np.zeros_like(mask)).mean() == 0
        np.testing.assert_array_equal(function(np.where(mask, weights, np.nan), mask), function(weights, mask))


# ---- corrected losses

LOSSES = {
    "ppo_clip": losses.ppo_clip,
    "importance_sampling": losses.importance_sampling,
    "reinforce": losses.reinforce,
    "gspo": losses.gspo,
    "gspo_token": losses.gspo_token,
    "cispo": functools.partial(losses.cispo, ratio_high=5.0),
    "sapo": losses.sapo,
    "dppo_tv": functools.partial(losses.dppo_tv, threshold_low=0.1, threshold_high=0.1),
    "dppo_kl": functools.partial(losses.dppo_kl, threshold_low=0.1, threshold_high=0.1),
    "decoupled_ppo": functools.partial(losses.decoupled_ppo, cap=2.0),
    "rollout_is": functools.partial(losses.rollout_is, epsilon_low=0.5, epsilon_high=0.5),
    "vespo": losses.vespo,
}


def _opsm(logprobs, behavior_logprobs, advantages, mask, detached_logprobs=None):
    return corrections.opsm(logprobs, behavior_logprobs, advantages, mask, threshold=0.1, detached_logprobs=detached_logprobs)


def _second_moment(old_logprobs, behavior_logprobs, mask):
    return corrections.second_moment_mask(old_logprobs, behavior_logprobs, mask)


def _normalized_tis(old_logprobs, behavior_logprobs, mask):
    return corrections.batch_normalize(corrections.token_tis(old_logprobs, behavior_logprobs, mask, cap=2.0), mask)


def test_every_corrected_loss_has_the_gradient_of_reinforce_where_the_three_policies_agree():
    rng = np.random.default_rng(0)
    logprobs, advantage = -rng.exponential(size=(3, 2, 4)), rng.normal(size=(3, 2))
    mask = np.arange(4) < rng.integers(0, 5, size=(3, 2, 1))
    weights = {name: function for name, (function, _) in CORRECTIONS.items()}
    weights |= dict(opsm=_opsm, second_moment_mask=_second_moment, batch_normalize=_normalized_tis)

    @jax.jit
    def gradients(logprobs):
        def gradient(loss_fn):
            def total(learner):
                return loss_fn(learner, logprobs, advantage, mask, behavior_logprobs=logprobs).sum()

            return jax.grad(total)(logprobs)

        one = next(iter(weights.values()))
        by_loss = {name: gradient(corrections.corrected(loss, one)) for name, loss in LOSSES.items()}
        return by_loss | {name: gradient(corrections.corrected(losses.ppo_clip, fn)) for name, fn in weights.items()}

    for name, gradient in gradients(logprobs).items():
        np.testing.assert_allclose(gradient, -advantage[..., None] * mask, rtol=1e-12, atol=1e-14, err_msg=name)


def test_truncated_weights_on_ppo_are_decoupled_ppo():
    proximal, behavior, mask = (x[0] for x in BATCHES[0])
    learner, advantage = proximal + np.linspace(-0.5, 0.5, 5), np.array([1.0, -1.0, 0.5, -2.0])
    loss_fn = corrections.corrected(losses.ppo_clip, functools.partial(corrections.token_tis, cap=1.5))
    np.testing.assert_allclose(
        loss_fn(learner, proximal, advantage, mask, behavior_logprobs=behavior),
        losses.decoupled_ppo(learner, proximal, advantage, mask, behavior_logprobs=behavior, cap=1.5),
        rtol=1e-13,
    )


def test_the_signature_says_what_a_corrected_loss_takes():
    tis = functools.partial(corrections.token_tis, cap=2.0)

    def names(loss_fn, correction_fn=tis):
        parameters = inspect.signature(corrections.corrected(loss_fn, correction_fn)).parameters
        assert list(parameters)[:4] == ["logprobs", "old_logprobs", "advantages", "mask"]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in list(parameters.values())[4:])
        return {name: parameters[name].default for name in list(parameters)[4:]}

    required = inspect.Parameter.empty
    assert names(losses.reinforce) == {"behavior_logprobs": required}
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.3, "dual_clip": None, "behavior_logprobs": required}
    assert names(functools.partial(losses.ppo_clip, epsilon_high=0.3)) == clip
    # vespo may do without behavior log-probs, its correction may not
    assert names(losses.vespo)["behavior_logprobs"] is required
    assert names(losses.cispo)["detached_logprobs"] is None
    assert names(losses.reinforce, _opsm) == {"behavior_logprobs": required, "detached_logprobs": None}
    assert names(losses.reinforce, lambda old_logprobs: old_logprobs) == {}

    def custom(lp, old, adv, m, *, reference_logprobs, **options):
        return (lp - old + reference_logprobs + options["scale"]) * m

    found = names(custom)
    assert list(found) == ["reference_logprobs", "behavior_logprobs", "options"]
    ones = np.ones((2, 3))
    values = corrections.corrected(custom, tis)(
        ones, ones, ones, ones, behavior_logprobs=ones, reference_logprobs=ones, scale=2
    )
    np.testing.assert_array_equal(values, 3.0)


def test_every_array_reaches_the_function_that_asks_for_it():
    rng = np.random.default_rng(1)
    learner, old, behavior, fixed, reference = -rng.exponential(size=(5, 3, 4))
    advantage, mask = rng.normal(size=3), rng.random((3, 4)) < 0.7

    def loss_fn(logprobs, old_logprobs, advantages, mask, *, reference_logprobs, detached_logprobs=None):
        return (logprobs + 2 * old_logprobs + 3 * reference_logprobs + 5 * detached_logprobs) * advantages[:, None] * mask

    def weights(mask, advantages, detached_logprobs, behavior_logprobs, old_logprobs, logprobs, scale=7.0):
        return (logprobs * old_logprobs + behavior_logprobs * detached_logprobs) * scale * advantages[:, None] * mask

    inputs = dict(behavior_logprobs=behavior, detached_logprobs=fixed, reference_logprobs=reference)
    values = corrections.corrected(loss_fn, weights)(learner, old, advantage, mask, **inputs)
    expected = (learner + 2 * old + 3 * reference + 5 * fixed) * 7 * (learner * old + behavior * fixed) * mask
    np.testing.assert_allclose(values, expected * advantage[:, None] ** 2, rtol=1e-13)
    # twice corrected: the weights multiply
    tis, veto = functools.partial(corrections.token_tis, cap=2.0), functools.partial(corrections.veto, low=0.3, high=4.0)
    twice = corrections.corrected(corrections.corrected(losses.ppo_clip, tis), veto)
    product = tis(old, behavior, mask) * veto(old, behavior, mask)
    np.testing.assert_allclose(
        twice(learner, old, advantage, mask, behavior_logprobs=behavior),
        losses.ppo_clip(learner, old, advantage, mask) * product,
        rtol=1e-13,
    )
    assert 0 < corrections.dropped_row_fraction(product, mask).mean() < 1


@functools.cache
def _enumerated():
    """Log-probs [1, 4, 2] of the four strings of two tokens under three policies, and their rewards."""
    tables = np.random.default_rng(2).normal(scale=0.8, size=(3, 1, 2, 2))
    logprobs = np.asarray(jax.nn.log_softmax(tables))
    tokens = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return logprobs[:, :, [0, 1], tokens], np.array([[0.0, 1.0, 0.5, 1.0]])


def test_the_oracle_hands_a_corrected_loss_its_policies():
    (learner, proximal, behavior), rewards = _enumerated()
    loss_fn = corrections.corrected(losses.ppo_clip, functools.partial(corrections.token_tis, cap=1.2))
    by_hand = functools.partial(losses.decoupled_ppo, cap=1.2)
    algorithm = dict(group_size=2, advantage_fn=advantages.group_centered)

    @jax.jit
    def objectives(learner, proximal, behavior):
        given, options = (learner, behavior, rewards), dict(algorithm, proximal_logprobs=proximal)
        closed = exact.surrogate_objective(*given, loss_fn=loss_fn, **options)
        return closed, *(exact.brute_force_objective(*given, loss_fn=loss, **options) for loss in (loss_fn, by_hand))

    closed, enumerated, expected = objectives(learner, proximal, behavior)
    np.testing.assert_allclose([closed, enumerated], expected, rtol=1e-12)
    coupled = corrections.corrected(losses.ppo_clip, _normalized_tis)
    with pytest.raises(ValueError, match="ppo_clip_with__normalized_tis couples rows"):
        exact.surrogate_objective(learner, behavior, rewards, loss_fn=coupled, **algorithm)


# ---- proximal policies


def test_interpolations_and_their_gradients_match_their_formulas():
    rng = np.random.default_rng(4)

    def approximate(alpha, mask, fixed, behavior, learner):
        options = dict(detached_logprobs=fixed)
        return (
            corrections.log_linear_proximal(learner, behavior, alpha, mask, **options),
            corrections.linear_proximal(learner, behavior, alpha, mask, **options),
        )

    @jax.jit
    def compiled(alpha, mask, fixed, behavior, learner, cotangent):
        values = approximate(alpha, mask, fixed, behavior, learner)
        slopes = [
            jax.grad(lambda *x, i=i: jnp.sum(cotangent * approximate(alpha, mask, *x)[i]), argnums=(0, 1, 2))(
                fixed, behavior, learner
            )
            for i in range(2)
        ]
        return values, slopes

    for case in range(200):
        fixed, behavior, mask = _tokens(100 + case, (3, 4))
        alpha = rng.choice([0.0, 0.25, 0.9, 1.0], size=3)
        cotangent = rng.normal(size=(3, 4)) * mask
        values, slopes = compiled(alpha, mask, fixed, behavior, fixed + 1, cotangent)
        a = alpha[:, None]
        log_linear = ((1 - a) * behavior + a * fixed) * mask
        top = np.maximum(fixed, behavior)
        parts = (1 - a) * np.exp(behavior - top), a * np.exp(fixed - top)
        linear = np.where(mask, top + np.log(np.where(sum(parts) > 0, sum(parts), 1.0)), 0.0)
        ends = np.broadcast_to((a == 0) | (a == 1), mask.shape)
        linear = np.where(ends & mask, np.where(a == 1, fixed, behavior), linear)
        np.testing.assert_allclose(values, [log_linear, linear], rtol=1e-12, atol=1e-13)
        share = np.where(ends, a, parts[1] / np.where(sum(parts) > 0, sum(parts), 1.0))
        expected = [(a * cotangent, (1 - a) * cotangent), (share * cotangent, (1 - share) * cotangent)]
        for slope, wanted in zip(slopes, expected, strict=True):
            np.testing.assert_allclose(slope[:2], wanted, rtol=1e-11, atol=1e-13)
            np.testing.assert_array_equal(slope[2], 0.0)  # a constant of the update
    without = corrections.linear_proximal(fixed, behavior, 0.3, mask)
    np.testing.assert_array_equal(without, approximate(0.3, mask, fixed, behavior, fixed)[1])
    np.testing.assert_array_equal(corrections.linear_proximal(fixed, behavior, np.full((3, 4), 0.3), mask), without)
    slope = jax.grad(lambda x: corrections.log_linear_proximal(x, behavior, 0.3, mask).sum())(jnp.asarray(fixed))
    np.testing.assert_array_equal(slope, 0.0)
    dirty = (np.where(mask, x, np.nan) for x in (fixed, behavior))
    np.testing.assert_array_equal(corrections.linear_proximal(*dirty, 0.3, mask), without)


def test_the_proximal_fraction_counts_versions():
    np.testing.assert_array_equal(corrections.proximal_fraction(7, np.array([0, 4, 7, 8]), 8), [7 / 8, 0.75, 0.0, 1.0])
    np.testing.assert_array_equal(jax.jit(corrections.proximal_fraction)(7, np.array([0, 8]), 8), [7 / 8, 1.0])
    with pytest.raises(ValueError, match="behavior_version is above"):
        corrections.proximal_fraction(5, 6, 5)
    for proximal in (2, 9):
        with pytest.raises(ValueError, match="proximal_version must lie between"):
            corrections.proximal_fraction(proximal, np.array([3, 8]), 8)


def test_the_proximal_error_of_known_differences():
    exact_logprobs = -np.ones((2, 3))
    mask = np.array([[True, True, False], [True, False, False]])
    approximate = np.where(mask, exact_logprobs + [[0.1, -0.3, 0], [0.2, 0, 0]], np.nan)
    error = corrections.proximal_error(approximate, exact_logprobs, mask)
    d = np.array([0.1, -0.3, 0.2])
    expected = {"mean_abs": 0.2, "max_abs": 0.3, "k3_kl": np.mean(np.exp(d) - 1 - d)}
    assert error.keys() == {f"proximal/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(error[f"proximal/{name}"], value, rtol=1e-12)
    assert all(value == 0 for value in corrections.proximal_error(approximate, exact_logprobs, mask & False).values())


_POLICY = policies.tabular(vocab_size=3, context_length=1)
_PROMPT, _STRINGS = np.array([[0]]), np.indices((3, 3)).reshape(2, -1).T  # all strings of two tokens
_LAG, _PROXIMAL_LAG = 4, 1


@functools.cache
def _errors():
    """Compiled: a trajectory of parameters [K, ...] through the ring -> errors and exact quantities at its end.

    AReaL's setting: the behavior policy is the oldest version, the proximal one the last before the learner.
    """

    def logprobs(params):
        return policies.completion_logprobs(_POLICY, params, _PROMPT, _STRINGS)

    def of_trajectory(tables):
        history = staleness.create_history({"table": tables[0]}, capacity=_LAG + 1)
        for table in tables:
            history = staleness.push(history, {"table": table})
        learner, proximal, behavior = (logprobs(staleness.read(history, s)[0]) for s in (0, _PROXIMAL_LAG, _LAG))
        alpha = corrections.proximal_fraction(history.step - _PROXIMAL_LAG, history.step - _LAG, history.step)
        of = dict(log_linear=corrections.log_linear_proximal, linear=corrections.linear_proximal)
        approximate = {name: function(learner, behavior, alpha) for name, function in of.items()}
        ends = {
            name: [
                corrections.proximal_error(function(learner, behavior, a), end)["proximal/max_abs"]
                for a, end in ((0.0, behavior), (1.0, learner))
            ]
            for name, function in of.items()
        }
        errors = {name: corrections.proximal_error(value, proximal) for name, value in approximate.items()}
        errors |= dict(rollout=corrections.proximal_error(behavior, proximal))
        signed = {name: value - proximal for name, value in approximate.items()}
        return dict(errors=errors, signed=signed, ends=ends, behavior=behavior, learner=learner, alpha=alpha)

    return jax.jit(of_trajectory)


_DRIFTS = 2.0 ** -np.arange(3, 8)


def _slopes(path):
    """Exponents of the largest error in the drift, of the two approximations and of taking μ itself."""
    start = np.random.default_rng(5).normal(size=(4, 3))
    results = [_errors()(start + drift * path) for drift in _DRIFTS]
    names = ("log_linear", "linear", "rollout")
    errors = {name: [float(r["errors"][name]["proximal/max_abs"]) for r in results] for name in names}
    return results, {name: np.polyfit(np.log(_DRIFTS), np.log(error), 1)[0] for name, error in errors.items()}


def test_the_approximations_err_to_second_order_on_a_straight_or_smooth_path():
    rng = np.random.default_rng(6)
    direction, bend = rng.normal(size=(2, 4, 3))
    t = np.arange(_LAG + 1)[:, None, None] / _LAG
    results, slopes = _slopes(t * direction)
    assert abs(slopes["log_linear"] - 2) < 0.05 and abs(slopes["linear"] - 2) < 0.05
    assert abs(slopes["rollout"] - 1) < 0.1
    for drift, result in zip(_DRIFTS, results, strict=True):
        assert result["alpha"] == 0.75
        assert max(np.ravel([result["ends"][name] for name in ("log_linear", "linear")])) < 1e-15
        # one number a context (the first token has one context, the second three), and never positive: the missing normalizer
        error = np.asarray(result["signed"]["log_linear"])[0].reshape(3, 3, 2)
        assert np.ptp(error[..., 0]) < 1e-14 and np.ptp(error[..., 1], axis=1).max() < 1e-14 and error.max() < 0
        # −½α(1−α)·Var d and ½α(1−α)·(d² − Var d), up to third order, for the first token and for the second after a 1
        d = np.asarray(result["learner"] - result["behavior"])[0].reshape(3, 3, 2)
        p = np.exp(np.asarray(result["behavior"])[0]).reshape(3, 3, 2)
        for context in (np.s_[:, 0, 0], np.s_[1, :, 1]):
            variance = np.dot(p[context], d[context] ** 2) - np.dot(p[context], d[context]) ** 2
            expected = dict(log_linear=np.full(3, -variance), linear=d[context] ** 2 - variance)
            for name, value in expected.items():
                measured = np.asarray(result["signed"][name])[0].reshape(3, 3, 2)[context]
                np.testing.assert_allclose(measured, 0.5 * 0.75 * 0.25 * value, atol=0.05 * drift**3, rtol=0)
    # a smooth path of length ~ drift bends by drift²
    curved = [_errors()(t * drift * direction + (t * drift) ** 2 * bend) for drift in _DRIFTS]
    for name in ("log_linear", "linear"):
        errors = [float(result["errors"][name]["proximal/max_abs"]) for result in curved]
        assert abs(np.polyfit(np.log(_DRIFTS), np.log(errors), 1)[0] - 2) < 0.1


def test_the_approximations_err_to_first_order_on_a_random_walk():
    path = np.cumsum(np.random.default_rng(7).normal(size=(_LAG + 1, 4, 3)), axis=0)
    _, slopes = _slopes(path - path[:1])
    assert all(abs(slope - 1) < 0.1 for slope in slopes.values())


# ---- the doors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *x: corrections.token_tis(*x, cap=0.2), "cap is 0.2"),
        (lambda *x: corrections.token_tis(*x, cap=np.nan), "cap is nan"),
        (lambda *x: corrections.token_tis(*x, cap=2.0, low=1.5), "low is 1.5"),
        (lambda *x: corrections.token_mis(*x, cap=1.0), "cap is 1.0"),
        (lambda *x: corrections.sequence_tis(*x, cap=0.0), "cap is 0.0"),
        (lambda *x: corrections.sequence_mis(*x, cap=1.0), "cap is 1.0"),
        (lambda *x: corrections.icepop(*x, low=-0.1, high=2.0), "low is -0.1"),
        (lambda *x: corrections.icepop(*x, low=0.2, high=0.28), "high is 0.28"),
        (lambda *x: corrections.sequence_mask_tis(*x, low=1.0, high=2.0), "low is 1.0"),
        (lambda *x: corrections.geometric_mask(*x, low=0.5, high=1.0), "high is 1.0"),
        (lambda *x: corrections.veto(*x, low=2.0), "low is 2.0"),
        (lambda *x: corrections.k_rejection(*x, estimator=losses.k1, threshold=0.0), "threshold is 0.0"),
        (
            lambda *x: corrections.k_rejection(*x, estimator=losses.k1, threshold=1.0, threshold_low=0.5),
            "threshold_low is 0.5",
        ),
        (lambda *x: corrections.second_moment_mask(*x, threshold=0.0), "threshold is 0.0"),
        (lambda *x: corrections.second_moment_mask(None, x[1]), "proximal_logprobs"),
        (lambda *x: corrections.opsm(*x[:2], x[0], threshold=-1.0), "threshold is -1.0"),
        (lambda *x: corrections.opsm(x[0], None, x[0], threshold=1.0), "behavior_logprobs"),
        (lambda *x: corrections.opsm(*x[:2], x[0][0], threshold=1.0), "advantages has shape"),
        (lambda *x: corrections.opsm(x[0], x[1][:1], x[0], threshold=1.0), "behavior_logprobs"),
        (lambda *x: corrections.batch_normalize(x[0], x[2][:1]), "mask has shape"),
        (lambda *x: corrections.batch_normalize(1.0), "weights is a scalar"),
        (lambda *x: corrections.dropped_fraction(x[0], x[2][:1]), "mask has shape"),
        (lambda *x: corrections.log_linear_proximal(*x[:2], 1.5), "alpha must be in"),
        (lambda *x: corrections.linear_proximal(*x[:2], -0.5), "alpha must be in"),
        (lambda *x: corrections.linear_proximal(*x[:2], np.ones(7)), "alpha has shape"),
        (lambda *x: corrections.linear_proximal(*x[:2], 0.5, detached_logprobs=x[0][0]), "detached_logprobs has shape"),
        (lambda *x: corrections.proximal_error(x[0], x[1][0]), "exact_logprobs has shape"),
        (lambda *x: corrections.corrected(losses.ppo_clip, corrections.token_tis), "token_tis needs cap"),
        (lambda *x: corrections.corrected(losses.ppo_clip, corrections.veto)(*x[:2], x[0]), "behavior_logprobs is None"),
        (
            lambda *x: corrections.corrected(losses.ppo_clip, lambda mask: np.ones(3))(*x[:2], x[0]),
            r"returns shape \(3,\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(call, message):
    rows = np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=message) as error:
        call(*rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["token_tis", "token_mis", "icepop", "geometric_mask", "veto", "k_rejection, token k3"])
def test_missing_or_misshapen_arrays_are_named(name):
    function, rows = CORRECTIONS[name][0], np.zeros((2, 3))
    with pytest.raises(ValueError, match="behavior_logprobs is None"):
        function(rows, None)
    with pytest.raises(ValueError, match="behavior_logprobs has shape"):
        function(rows, rows[0])
    with pytest.raises(ValueError, match="mask has shape"):
        function(rows, rows, np.ones(3))
    with pytest.raises(ValueError, match="mask must be bool"):
        function(rows, rows, np.full((2, 3), 0.5))


def test_the_document_runs():
    text = (Path(__file__).resolve().parent.parent / "docs" / "corrections.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs/corrections.md", "exec"), {"__name__": "document"})
    assert [name for name in corrections.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("function", [corrections.token_tis, corrections.proximal_fraction, corrections.corrected])
def test_examples_in_docstrings(function):
    result = doctest.testmod(sys.modules[function.__module__])
    assert result.attempted and not result.failed
