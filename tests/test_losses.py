"""Losses, KL terms, advantages and aggregations against references written out in NumPy, and what they refuse."""

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


def _ppo_reference(learner, old, advantage, *, low, high, cap=np.inf):
    """Value and derivative in the learner's log-prob, token by token, from the clip's definition as cases."""
    value, slope = np.zeros(_SHAPE), np.zeros(_SHAPE)
    for index in np.ndindex(*_SHAPE):
        r, a = np.exp(learner[index] - old[index]), advantage[index[:-1]]
        if a >= 0:
            active = min(r, 1 + high)
            value[index], slope[index] = -a * active, -a * r * (r < 1 + high)
        else:
            active = min(max(r, 1 - low), cap)
            value[index], slope[index] = -a * active, -a * r * (1 - low < r < cap)
    return value, slope


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("ppo_clip", {}, dict(low=0.2, high=0.2)),
        ("ppo_clip", dict(epsilon_low=0.3, epsilon_high=0.5), dict(low=0.3, high=0.5)),
        ("ppo_clip", dict(epsilon_low=1.0, epsilon_high=0.28, dual_clip=1.5), dict(low=1.0, high=0.28, cap=1.5)),
        ("importance_sampling", {}, dict(low=np.inf, high=np.inf)),
    ],
)
def test_ratio_losses_match_their_definition(name, options, reference):
    function = jax.jit(lambda *arrays: getattr(losses, name)(*arrays, **options))
    gradient = jax.jit(jax.grad(lambda *arrays: getattr(losses, name)(*arrays, **options).sum()))
    for seed in range(20):
        learner, old, advantage, mask = _case(seed)
        value, slope = _ppo_reference(learner, old, advantage, **reference)
        np.testing.assert_allclose(function(learner, old, advantage, mask), value * mask, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(gradient(learner, old, advantage, mask), slope * mask, rtol=1e-12, atol=1e-13)


def test_reinforce_ignores_the_denominator_but_not_its_shape():
    learner, old, advantage, mask = _case(0)
    expected = -advantage[..., None] * learner * mask
    np.testing.assert_allclose(losses.reinforce(learner, old, advantage, mask), expected, rtol=1e-14)
    np.testing.assert_array_equal(
        losses.reinforce(learner, old + 3, advantage, mask), losses.reinforce(learner, old, advantage, mask)
    )
    with pytest.raises(ValueError, match="old_logprobs"):
        losses.reinforce(learner, old[..., :2], advantage, mask)


def test_per_token_advantages_are_taken_by_rank():
    learner, old, advantage, mask = _case(1)
    per_token = np.broadcast_to(advantage[..., None], _SHAPE)
    np.testing.assert_array_equal(
        losses.ppo_clip(learner, old, per_token, mask), losses.ppo_clip(learner, old, advantage, mask)
    )


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


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300])
def test_what_stands_under_the_mask_touches_neither_value_nor_gradient(garbage):
    learner, old, advantage, mask = _case(3)
    dirty = [np.where(mask, x, garbage) for x in (learner, old)]

    def run(function, first, second):
        return jax.value_and_grad(lambda x, y: function(x, y).sum(), argnums=(0, 1))(jnp.asarray(first), jnp.asarray(second))

    for function in (
        lambda x, y: losses.ppo_clip(x, y, advantage, mask, dual_clip=2.0),
        lambda x, y: losses.reinforce(x, y, advantage, mask),
        lambda x, y: losses.k3(x, y, mask),
        lambda x, y: aggregation.sequence_mean(losses.k2(x, y, mask), mask).mean(),
    ):
        clean, spoiled = run(function, learner, old), run(function, *dirty)
        jax.tree.map(np.testing.assert_array_equal, clean, spoiled)


def test_low_precision_comes_in_and_float32_goes_out():
    learner, old, advantage, mask = (jnp.asarray(x) for x in _case(4))
    low = losses.ppo_clip(learner.astype(jnp.bfloat16), old.astype(jnp.bfloat16), advantage.astype(jnp.float32), mask)
    assert low.dtype == jnp.float32


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(epsilon_low=0.0), "epsilon_low is 0.0"),
        (dict(epsilon_low=1.5), "epsilon_low is 1.5"),
        (dict(epsilon_high=-0.1), "epsilon_high is -0.1"),
        (dict(epsilon_high=float("nan")), "epsilon_high is nan"),
        (dict(dual_clip=1.1), "dual_clip is 1.1"),
    ],
)
def test_clip_bounds_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.ppo_clip(*_case(0), **arguments)


def test_missing_or_misshapen_arrays_are_named():
    learner, old, advantage, mask = _case(0)
    with pytest.raises(ValueError, match="old_logprobs is None"):
        losses.ppo_clip(learner, None, advantage, mask)
    with pytest.raises(ValueError, match="advantages has shape"):
        losses.ppo_clip(learner, old, advantage[:2], mask)
    with pytest.raises(ValueError, match="mask has shape"):
        losses.ppo_clip(learner, old, advantage, mask[0])
    with pytest.raises(ValueError, match="mask must be bool"):
        losses.ppo_clip(learner, old, advantage, mask * 0.5)
    with pytest.raises(ValueError, match="reference_logprobs"):
        losses.k3(learner, old[0])


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


def test_advantages_refuse_groups_without_spread():
    for call in (lambda: advantages.group_normalized([1.0]), lambda: advantages.leave_one_out([1.0])):
        with pytest.raises(ValueError, match="group_size is 1"):
            call()
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
