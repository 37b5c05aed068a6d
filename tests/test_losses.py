"""What KL terms and the clip mean, and advantages and aggregations against NumPy; losses are in test_policy_losses.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, aggregation, losses, masked

_SHAPE = (5, 4, 3)


def _case(seed, spread=1.0):
    rng = np.random.default_rng(seed)
    old = -np.abs(rng.normal(1.0, 1.0, _SHAPE))
    mask = np.arange(_SHAPE[-1]) < rng.integers(0, _SHAPE[-1] + 1, size=(*_SHAPE[:-1], 1))
    return old + spread * rng.normal(size=_SHAPE), old, rng.normal(size=_SHAPE[:-1]), mask


def test_clipped_tokens_are_those_without_gradient():
    learner, old, advantage, mask = _case(2)
    options = dict(epsilon_low=0.1, epsilon_high=0.4)
    slope = jax.grad(lambda x: losses.ppo_clip(x, old, advantage, mask, **options).sum())(jnp.asarray(learner))
    clipped = losses.clipped_tokens(learner, old, advantage, mask, **options)
    np.testing.assert_array_equal(np.asarray(clipped)[mask] == 1, np.asarray(slope)[mask] == 0)
    assert 0 < clipped.sum() < mask.sum()


def test_kl_terms_average_to_the_kl_divergence():
    rng = np.random.default_rng(0)
    learner, reference = rng.dirichlet(np.ones(6), size=2)
    kl = np.sum(learner * np.log(learner / reference))
    for estimator in (losses.k1, losses.k3):
        terms = estimator(np.log(learner)[:, None], np.log(reference)[:, None])[:, 0]
        np.testing.assert_allclose(np.dot(learner, terms), kl, rtol=1e-12)
    assert losses.k3(np.log(learner), np.log(reference)).min() >= 0
    difference = np.log(learner) - np.log(reference)
    np.testing.assert_allclose(losses.k2(np.log(learner), np.log(reference)), difference**2 / 2, rtol=1e-14)
    np.testing.assert_allclose(losses.abs_kl(np.log(learner), np.log(reference)), np.abs(difference), rtol=1e-14)


def test_only_k2_has_the_gradient_of_the_kl_as_a_loss():
    logits, reference = jnp.array([0.3, -1.0, 0.5]), jnp.log(jnp.array([0.2, 0.5, 0.3]))
    probability = jax.nn.softmax(logits)

    def expected(term):  # the sampling distribution held fixed, as in a loss on samples
        return jax.grad(lambda x: jnp.dot(probability, term(jax.nn.log_softmax(x)[:, None], reference[:, None])[:, 0]))(logits)

    kl = jax.grad(lambda x: jnp.dot(jax.nn.softmax(x), jax.nn.log_softmax(x) - reference))(logits)
    np.testing.assert_allclose(expected(losses.k2), kl, rtol=1e-12)
    np.testing.assert_allclose(expected(losses.k1), 0, atol=1e-15)
    assert np.abs(expected(losses.k3) - kl).max() > 1e-2


def test_entropy_of_uniform_and_of_impossible_tokens():
    np.testing.assert_allclose(losses.entropy(jnp.zeros((2, 8))), np.log(8), rtol=1e-14)
    logits = jnp.array([1.0, -jnp.inf, 2.0])
    p = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    np.testing.assert_allclose(losses.entropy(logits), -(p * np.log(p)).sum(), rtol=1e-14)
    assert np.isfinite(jax.grad(lambda x: losses.entropy(x))(logits)).all()
    assert np.isnan(losses.entropy(jnp.array([1.0, jnp.nan, 2.0])))


def test_the_widest_type_counts():
    low, high = jnp.full((2, 3), -0.5, jnp.float32), jnp.full((2, 3), -0.25, jnp.float64)
    for first, second in ((low, high), (high, low)):
        assert losses.k3(first, second).dtype == jnp.float64
    assert losses.k3(low, low).dtype == losses.k3(low.astype(jnp.bfloat16), low).dtype == jnp.float32


@pytest.mark.parametrize("loss_fn", [losses.ppo_clip, losses.importance_sampling, losses.sapo])
def test_the_bound_of_the_docs_keeps_overflowing_ratios_finite(loss_fn):
    old = jnp.full((3, 2), -1000.0, jnp.float32)
    learner = jnp.stack([old[0] + 3.0, old[1] + 79.0, jnp.zeros(2, jnp.float32)])
    advantages = jnp.array([1.0, -1.0, 0.0, 1.0, -1.0, 0.0])[jnp.array([[0, 1], [2, 3], [4, 5]])]

    def loss(x, bounded):
        return loss_fn(jnp.minimum(x, old + 80) if bounded else x, old, advantages)

    values = loss(learner, True)
    gradient = jax.grad(lambda x: loss(x, True).sum())(learner)
    assert np.isfinite(values).all() and np.isfinite(gradient).all() and not gradient[2].any()
    np.testing.assert_array_equal(values[:2], loss(learner, False)[:2])
    np.testing.assert_array_equal(gradient[:2], jax.grad(lambda x: loss(x, False)[:2].sum())(learner)[:2])
    assert np.isnan(jax.grad(lambda x: loss(x, False)[2].sum())(learner)).any()


@pytest.mark.filterwarnings("error")
def test_what_is_no_array_is_named():
    learner, old, advantage, mask = _case(0)
    for first, second, name in ((None, old, "logprobs"), (learner, None, "reference_logprobs")):
        with pytest.raises(ValueError, match=f"^{name} is None; "):
            losses.k3(first, second)
    with pytest.raises(ValueError, match="^logprobs is a list; it must be an array$"):
        losses.ppo_clip(learner.tolist(), old, advantage, mask)
    with pytest.raises(ValueError, match="^old_logprobs is a list"):
        losses.ppo_clip(learner, old.tolist(), advantage, mask)
    with pytest.raises(ValueError, match="^advantages is a list"):
        losses.ppo_clip(learner, old, advantage.tolist(), mask)
    with pytest.raises(ValueError, match="^mask is a list; it must be an array"):
        losses.ppo_clip(learner, old, advantage, mask.tolist())
    with pytest.raises(ValueError, match="^advantages is None"):
        losses.ppo_clip(learner, old, None, mask)


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).normal(size=(7, 6))
    centered = rewards - rewards.mean(-1, keepdims=True)
    np.testing.assert_allclose(advantages.group_centered(rewards), centered, atol=1e-15)
    for ddof, epsilon in ((0, 1e-6), (1, 1e-2)):
        expected = centered / (rewards.std(-1, ddof=ddof, keepdims=True) + epsilon)
        np.testing.assert_allclose(advantages.group_normalized(rewards, ddof=ddof, epsilon=epsilon), expected, rtol=1e-12)
    others = (rewards.sum(-1, keepdims=True) - rewards) / 5
    np.testing.assert_allclose(advantages.leave_one_out(rewards), rewards - others, rtol=1e-12)


@pytest.mark.parametrize("advantage_fn", [advantages.group_centered, advantages.group_normalized, advantages.leave_one_out])
def test_equal_groups_have_advantage_exactly_zero(advantage_fn):
    equal = np.full((3, 7), 0.1)  # the mean of seven 0.1 is not 0.1 in floating point
    assert np.mean(equal[0]) != 0.1
    np.testing.assert_array_equal(advantage_fn(equal), 0.0)
    assert np.isfinite(jax.grad(lambda r: advantage_fn(r).sum())(jnp.asarray(equal))).all()


def test_advantages_refuse_options_and_shapes_without_meaning():
    with pytest.raises(ValueError, match="rewards is a scalar"):
        advantages.group_centered(1.0)
    with pytest.raises(ValueError, match="ddof is 2"):
        advantages.group_normalized([1.0, 2.0], ddof=2)
    with pytest.raises(ValueError, match="epsilon"):
        advantages.group_normalized([1.0, 2.0], epsilon=0)


def test_aggregations_against_loops():
    _, values, _, mask = _case(5)
    rows = [(v[m], m.sum()) for v, m in zip(values.reshape(-1, 3), mask.reshape(-1, 3), strict=True)]
    expected = {
        aggregation.token_mean: sum(v.sum() for v, _ in rows) / sum(n for _, n in rows),
        aggregation.sequence_mean: np.mean([v.mean() if n else 0.0 for v, n in rows]),
        aggregation.sequence_sum: np.mean([v.sum() for v, _ in rows]),
    }
    for function, value in expected.items():
        np.testing.assert_allclose(function(values, mask).mean(), value, rtol=1e-13)
    np.testing.assert_allclose(
        aggregation.constant_length(values, mask, length=7).mean(), np.mean([v.sum() for v, _ in rows]) / 7, rtol=1e-13
    )
    default = aggregation.constant_length(values, mask).mean()
    np.testing.assert_allclose(default, aggregation.constant_length(values, mask, length=3).mean(), rtol=1e-14)
    with pytest.raises(ValueError, match="length"):
        aggregation.constant_length(values, mask, length=0)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum", "constant_length"])
def test_sums_and_counts_add_over_shards(name):
    function = getattr(aggregation, name)
    _, values, _, mask = _case(6)
    parts = [function(values[:2], mask[:2]), function(values[2:], mask[2:])]
    combined = aggregation.MaskedSum(*(sum(x) for x in zip(*parts, strict=True)))
    np.testing.assert_allclose(combined.mean(), function(values, mask).mean(), rtol=1e-13)


def test_empty_masks_give_zero():
    nothing = np.zeros((2, 3), dtype=bool)
    assert masked.masked_mean(np.full((2, 3), np.nan), nothing) == 0
    assert aggregation.token_mean(np.full((2, 3), np.nan), nothing).mean() == 0
    np.testing.assert_array_equal(masked.masked_mean(np.ones((2, 3)), np.eye(2, 3), axis=-1), 1.0)
