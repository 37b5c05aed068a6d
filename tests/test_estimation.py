"""The estimated staleness bias against the exact one of an enumerable task: unbiased, with honest errors and limits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import bias, estimation, exact, gram_statistics, surrogate, tasks
from jax_async_grpo.advantages import batch_scaled, group_normalized
from jax_async_grpo.losses import ppo_clip
from jax_async_grpo.types import Rollouts

GROUP_SIZE, NUM_BLOCKS, NUM_PROMPTS, REPETITIONS = 4, 16, 32, 1000
ALGORITHM = dict(loss_fn=ppo_clip, advantage_fn=group_normalized)
LOSS = functools.partial(surrogate.sampled_objective, **ALGORITHM)


def ragged_task():
    """The 7 strings over {0, 1, end} of one or two tokens, three reward levels, two prompts."""
    allowed = np.tile(np.arange(4) < 3, (2, 1))
    completions, mask = tasks.enumerate_completions(allowed, end_token=2)
    rewards = np.random.default_rng(5).integers(0, 3, (2, len(completions))) / 2
    prompts, prompt_mask = np.array([[0, 3], [1, 3]]), np.array([[False, True], [True, True]])
    strings = dict(completions=completions, mask=mask, allowed=allowed, end_token=2)
    return tasks.make_task("ragged", prompts=prompts, prompt_mask=prompt_mask, rewards=rewards, **strings)


TASK = ragged_task()
TOKENS = np.minimum(TASK.completions, 2)
CONTEXTS = np.stack([np.full(len(TOKENS), 3), TOKENS[:, 0]], axis=-1)  # 3 is the start
RNG = np.random.default_rng(0)
BEHAVIOR = RNG.normal(0, 0.7, (2, 4, 3))  # logits by prompt, context and token
LEARNER = BEHAVIOR + RNG.normal(0, 0.5, BEHAVIOR.shape)


def task_logprobs(params):
    """[2, Y, L] of every completion."""
    return jnp.where(TASK.mask, jax.nn.log_softmax(params)[:, CONTEXTS, TOKENS], 0)


def token_logprobs(params, rollouts):
    return task_logprobs(params)[rollouts.prompts, rollouts.completion_index]


def sample(params, prompts, key):
    """Prompts are rows of the task; noise depends on the key, the row of the batch and the member alone."""
    rows = task_logprobs(params)[prompts]
    noise = jax.random.gumbel(key, (len(prompts), GROUP_SIZE, rows.shape[1]))
    index = jnp.argmax(jnp.sum(rows, axis=-1)[:, None] + noise, axis=-1)
    return Rollouts(
        prompts=prompts[:, None],
        prompt_mask=jnp.ones_like(prompts[:, None], bool),
        completions=jnp.asarray(TASK.completions)[index],
        mask=jnp.asarray(TASK.mask)[index],
        behavior_logprobs=jax.vmap(lambda of_prompt, chosen: of_prompt[chosen])(rows, index),
        rewards=jnp.take_along_axis(jnp.asarray(TASK.rewards)[prompts], index, axis=1),
        policy_version=jnp.zeros_like(index),
        completion_index=index,
    )


def own_weighted_gradient(rollouts):
    """The wrong fresh gradient: each completion weighted by its own ratio, the others of its group left stale."""

    def objective(params):
        logprobs = token_logprobs(params, rollouts)
        detached = jax.lax.stop_gradient(logprobs)
        weights = jnp.exp(jnp.sum(detached - rollouts.behavior_logprobs, axis=-1, keepdims=True))
        own = dataclasses.replace(rollouts, behavior_logprobs=detached)
        loss = lambda *arrays: weights * ppo_clip(*arrays)  # noqa: E731
        return surrogate.sampled_objective(logprobs, own, loss_fn=loss, advantage_fn=group_normalized)

    return jax.grad(objective)(LEARNER)


def blocks(rollouts):
    return jax.tree.map(lambda leaf: leaf.reshape(NUM_BLOCKS, -1, *leaf.shape[1:]), rollouts)


def gram_of(bias_of_blocks, fresh):
    vectors = jnp.stack([bias_of_blocks, fresh]).reshape(2, NUM_BLOCKS, -1)
    return jnp.einsum("ajp,bkp->abjk", vectors, vectors)


@pytest.fixture(scope="module")
def measured():
    """Many measurements of one bias, by every method, with the exact answer."""

    def repetition(key):
        prompt_key, key, other = jax.random.split(key, 3)
        prompts = jax.random.randint(prompt_key, (NUM_PROMPTS,), 0, 2)
        gradient = jax.vmap(lambda r: estimation.block_gradient(token_logprobs, LOSS, LEARNER, r)[0])
        reweighted = jax.vmap(lambda r: estimation.reweighted_gradient(token_logprobs, LOSS, LEARNER, r)[0])
        stale = blocks(sample(BEHAVIOR, prompts, key))
        stale_gradient = gradient(stale)
        fresh = {
            "sampled": gradient(blocks(sample(LEARNER, prompts, key))),
            "independent": gradient(blocks(sample(LEARNER, prompts, other))),
            "reweighted": reweighted(stale),
        }
        null = fresh["sampled"] - fresh["independent"]
        own = jax.vmap(own_weighted_gradient)(stale).mean(0)
        means = {name: value.mean(0) for name, value in fresh.items()} | {"own": own}
        grams = {name: gram_of(stale_gradient - value, value) for name, value in fresh.items()}
        return grams | {"null": gram_of(null, fresh["sampled"])}, means

    @jax.jit
    def compute(keys):
        def of_policy(behavior):
            inputs = task_logprobs(behavior), TASK.rewards, jnp.broadcast_to(TASK.mask, (2, *TASK.mask.shape))
            options = dict(group_size=GROUP_SIZE, **ALGORITHM)
            return jax.grad(lambda p: exact.surrogate_objective(task_logprobs(p), *inputs, **options))(LEARNER)

        stale, fresh = of_policy(BEHAVIOR), of_policy(LEARNER)
        return *jax.vmap(repetition)(keys), stale, fresh

    return jax.tree.map(np.asarray, compute(jax.random.split(jax.random.key(1), REPETITIONS)))


def z_scores(samples, truth):
    """By how many standard errors the mean of independent samples misses; entries that never vary must be right."""
    error = samples.std(0) / len(samples) ** 0.5
    varies = error > 1e-12
    np.testing.assert_allclose(np.broadcast_to(truth, error.shape)[~varies], samples.mean(0)[~varies], rtol=0, atol=1e-12)
    return (samples.mean(0) - truth)[varies] / error[varies]


# -- unbiased ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sampled", "independent", "reweighted"])
def test_squared_norms_and_products_are_unbiased(measured, method):
    grams, _, stale, fresh = measured
    delta = stale - fresh
    truth = np.array([[np.vdot(a, b) for b in (delta, fresh)] for a in (delta, fresh)])
    estimates = gram_statistics.u_statistic(grams[method])
    # |z| < 4 is missed once in 4,000 runs by a right estimator with these four (three different) numbers
    assert np.abs(z_scores(estimates, truth)).max() < 4
    # and the interval is narrow enough to see the variance that a plain squared norm adds
    plain = grams[method][:, 0, 0].mean((-2, -1))
    assert z_scores(plain[:, None], truth[0, 0])[0] > 10


def test_the_weights_of_the_group_are_right_and_those_of_the_own_completion_are_not(measured):
    _, means, _, fresh = measured
    assert np.abs(z_scores(means["sampled"], fresh)).max() < 4
    assert np.abs(z_scores(means["reweighted"], fresh)).max() < 4
    assert np.abs(z_scores(means["own"], fresh)).max() > 5


def test_coupling_takes_noise_away(measured):
    grams = measured[0]
    noise = {name: np.mean([gram_statistics.noise_spectrum(g[0, 0])[0] for g in gram[:100]]) for name, gram in grams.items()}
    assert noise["independent"] > 2 * noise["sampled"]


# -- errors, intervals, limits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimates(measured):
    return {name: [estimation.from_gram(gram) for gram in grams[:200]] for name, grams in measured[0].items()}


@pytest.mark.parametrize("method", ["sampled", "reweighted"])
def test_intervals_cover_at_their_rate(measured, estimates, method):
    norm = np.linalg.norm(measured[2] - measured[3])
    low, high = np.transpose([e.interval(0.9) for e in estimates[method]])
    assert 0.84 <= np.mean((low <= norm) & (norm <= high)) <= 0.96
    narrower = np.transpose([e.interval(0.5) for e in estimates[method][:5]])
    assert np.all((low[:5] <= narrower[0]) & (narrower[0] < narrower[1]) & (narrower[1] < high[:5]))


def test_jackknife_errors_are_those_of_repetition(estimates):
    def ratio(value, error):
        values, errors = (np.array([getattr(e, name) for e in estimates["sampled"]]) for name in (value, error))
        return np.sqrt(np.mean(errors**2)) / np.std(values)

    for name in ("norm_squared", "relative_norm", "cosine"):
        assert 0.75 < ratio(name, f"{name}_error") < 1.35, name


def test_nothing_is_detected_at_the_stated_level(measured):
    # uncoupled rollouts of the same policy: noise without a bias
    grams = measured[0]["null"][:, 0, 0]
    noise = [gram_statistics.noise_spectrum(gram) for gram in grams]
    critical = [gram_statistics.critical_value(*spectrum, NUM_BLOCKS, 0.05) for spectrum in noise]
    assert 0.03 < np.mean(gram_statistics.u_statistic(grams) > critical) < 0.08


@pytest.mark.parametrize("scales", [np.ones(30), 1 / np.sqrt(1 + np.arange(30))], ids=["isotropic", "decaying"])
def test_the_detection_limit_has_its_power(scales):
    rng, num_blocks = np.random.default_rng(0), 8
    trace, dimensions = np.sum(scales**2), np.sum(scales**2) ** 2 / np.sum(scales**4)
    options = dict(level=0.1, power=0.7)
    limit = gram_statistics.detectable_norm(trace, dimensions, num_blocks, **options)

    def found(norm):
        direction = rng.normal(size=len(scales)) * scales  # spread like the noise
        vectors = norm * direction / np.linalg.norm(direction) + rng.normal(size=(num_blocks, len(scales))) * scales
        delta = vectors @ vectors.T
        gram = np.stack([np.stack([delta, delta]), np.stack([delta, delta])])
        estimate = estimation.from_gram(gram, **options)
        return estimate.detected, estimate.detection_limit

    detected, limits = np.transpose([found(limit) for _ in range(400)])
    assert abs(np.mean(detected) - 0.7) < 0.08
    np.testing.assert_allclose(np.mean(limits), limit, rtol=0.1)  # also with a bias in the data
    np.testing.assert_allclose(np.mean([found(0.0)[0] for _ in range(400)]), 0.1, atol=0.05)


def test_the_spectrum_of_planted_noise_is_found_whatever_the_mean():
    rng, scales = np.random.default_rng(1), np.array([2.0, 1.0, 1.0, 0.5])
    found = []
    for _ in range(300):
        vectors = 50.0 + rng.normal(size=(40, 4)) * scales
        found.append(gram_statistics.noise_spectrum(vectors @ vectors.T))
    truth = np.sum(scales**2), np.sum(scales**2) ** 2 / np.sum(scales**4)
    np.testing.assert_allclose(np.mean(found, axis=0), truth, rtol=0.05)
    line = np.outer(rng.normal(size=8), [3.0, 4.0])
    np.testing.assert_allclose(gram_statistics.noise_spectrum(line @ line.T)[1], 1, rtol=1e-9)


def test_statistics_are_those_of_the_vectors_themselves():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 9, 5))
    pairs = [x[j] @ y[k] for j in range(9) for k in range(9) if j != k]
    np.testing.assert_allclose(gram_statistics.u_statistic(x @ y.T), np.mean(pairs), rtol=1e-12)
    kept = [np.delete(np.arange(9), k) for k in range(9)]
    expected = [gram_statistics.u_statistic(x[i] @ y[i].T) for i in kept]
    np.testing.assert_allclose(gram_statistics.leave_one_out(x @ y.T), expected, rtol=1e-12)
    np.testing.assert_allclose(gram_statistics.jackknife_error(x[:, 0]), x[:, 0].std() * 8**0.5, rtol=1e-12)


# -- the whole measurement -----------------------------------------------------------------------------------------------------


PROMPTS, KEY = np.arange(16) % 2, jax.random.key(3)


compiled_sample, compiled_logprobs = jax.jit(sample), jax.jit(token_logprobs)


def measure(
    params=LEARNER, behavior_params=BEHAVIOR, prompts=PROMPTS, key=KEY, *, sample=compiled_sample, loss=LOSS, **options
):
    return bias.estimate(token_logprobs, sample, loss, params, behavior_params, prompts, key, **options)


@pytest.fixture(scope="module")
def gradients():
    """[8, P] stale, fresh and reweighted gradients of the blocks of one measurement, each from its rollouts alone."""
    stale, fresh = (compiled_sample(params, PROMPTS, KEY) for params in (BEHAVIOR, LEARNER))
    rows = [jax.tree.map(lambda leaf, k=k: leaf[2 * k : 2 * k + 2], (stale, fresh)) for k in range(8)]
    gradient = jax.jit(jax.grad(lambda params, rollouts: LOSS(token_logprobs(params, rollouts), rollouts)))
    of_blocks = [[np.ravel(gradient(LEARNER, rollouts)) for rollouts in pair] for pair in rows]
    return *np.moveaxis(np.array(of_blocks), 1, 0), stale, fresh


def test_estimate_is_the_statistics_of_its_blocks(gradients):
    stale, fresh, stale_rollouts, fresh_rollouts = gradients
    found = measure()
    pairs = ~np.eye(8, dtype=bool)
    delta = stale - fresh
    expected = [np.mean((a @ b.T)[pairs]) for a, b in ((delta, delta), (fresh, fresh), (stale, stale), (stale, fresh))]
    values = found.norm_squared, found.fresh_norm_squared, found.stale_norm_squared, found.inner_product
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    np.testing.assert_allclose(found.cosine, expected[3] / np.sqrt(expected[1] * expected[2]), rtol=1e-9)
    np.testing.assert_allclose(found.relative_norm, np.sqrt(max(expected[0], 0) / expected[1]), rtol=1e-9)
    np.testing.assert_allclose(found.relative_detection_limit, found.detection_limit / np.sqrt(expected[1]), rtol=1e-9)
    np.testing.assert_allclose(found.noise_trace, np.trace(np.cov(delta.T)), rtol=1e-9)
    log_weights = np.sum(compiled_logprobs(LEARNER, stale_rollouts) - stale_rollouts.behavior_logprobs, axis=(1, 2))
    weights = np.exp(log_weights)
    np.testing.assert_allclose(found.ess_ratio, weights.sum() ** 2 / (16 * np.sum(weights**2)), rtol=1e-9)
    both, either = stale_rollouts.mask & fresh_rollouts.mask, stale_rollouts.mask | fresh_rollouts.mask
    same = (stale_rollouts.completions == fresh_rollouts.completions)[both].sum() / either.sum()
    assert 0.3 < same < 1 and found.coupled_fraction == same
    assert found.method == "sampled" and found.num_blocks == 8


def test_fewer_kept_gradients_give_the_same_numbers():
    whole = measure()
    for kept_blocks in (1, 3):
        np.testing.assert_array_equal([*measure(kept_blocks=kept_blocks)[:15]], [*whole[:15]])
    assert whole != measure(key=jax.random.key(4))


def test_equal_parameters_have_no_bias_at_all():
    found = measure(behavior_params=LEARNER)
    assert found[:6] == (0.0,) * 6 and found.detection_limit == 0 and not found.detected
    assert found.ess_ratio == pytest.approx(1, rel=1e-12) and found.coupled_fraction == 1
    assert found.cosine == 1 and found.fresh_norm_squared != 0 and found.interval() == (0, 0)


def test_a_negative_square_is_reported_and_its_norm_is_zero():
    vectors = np.eye(8) - 0.2
    delta = vectors @ vectors.T
    found = estimation.from_gram(np.stack([np.stack([delta, 0 * delta]), np.stack([0 * delta, np.ones((8, 8))])]))
    assert found.norm_squared == pytest.approx(-0.08) and found.norm == found.relative_norm == 0 and not found.detected
    assert found.metrics() == {
        "bias/norm": 0,
        "bias/norm_squared": found.norm_squared,
        "bias/relative_norm": 0,
        "bias/cosine": found.cosine,
        "bias/standard_error": found.norm_error,
        "bias/detection_limit": found.detection_limit,
    }


def test_the_previous_ess_decides_where_the_fresh_gradient_comes_from(gradients):
    calls = []

    def counted(params, prompts, key):
        calls.append(params)
        return compiled_sample(params, prompts, key)

    methods = [measure(sample=counted, previous_ess=ess).method for ess in (None, 0.8, 0.81)]
    assert methods == ["sampled", "sampled", "reweighted"] and len(calls) == 5
    assert measure(previous_ess=0.5, ess_threshold=0.4).method == "reweighted"
    found = measure(previous_ess=1.0)
    assert np.isnan(found.coupled_fraction) and found.stale_norm_squared == pytest.approx(
        measure().stale_norm_squared, rel=1e-9
    )

    stale = gradients[2]
    weights = np.exp(np.sum(compiled_logprobs(LEARNER, stale) - stale.behavior_logprobs, axis=(1, 2)))
    own = dataclasses.replace(stale, behavior_logprobs=compiled_logprobs(LEARNER, stale))

    def of_group(params, row):
        group = jax.tree.map(lambda leaf: leaf[None], row)
        return LOSS(token_logprobs(params, group), group)

    fresh = weights[:, None] * jax.jit(jax.vmap(jax.grad(of_group), in_axes=(None, 0)))(LEARNER, own).reshape(16, -1)
    fresh = fresh.reshape(8, 2, -1).mean(1)
    expected = np.mean((fresh @ fresh.T)[~np.eye(8, dtype=bool)])
    np.testing.assert_allclose(found.fresh_norm_squared, expected, rtol=1e-9)


def test_a_loss_that_couples_prompts_is_not_reweighted():
    coupled = functools.partial(surrogate.sampled_objective, loss_fn=ppo_clip, advantage_fn=batch_scaled)
    assert measure(loss=coupled).method == "sampled"
    with pytest.raises(ValueError, match="loss couples the prompts of a batch .* previous_ess=None"):
        measure(loss=coupled, previous_ess=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_blocks=7), "num_blocks is 7; it must be at least 8"),
        (dict(num_blocks=9), "B = 16; it must be a multiple of num_blocks, 9"),
        (dict(prompts={}), "one leading axis B"),
        (dict(prompts=(PROMPTS, PROMPTS[:8])), "one leading axis B"),
        (dict(kept_blocks=9), "kept_blocks is 9; it must be in 1..8"),
        (dict(previous_ess=1.5), "previous_ess is 1.5"),
        (dict(ess_threshold=-1.0), "ess_threshold is -1.0"),
        (dict(level=0.5, power=0.4), "0 < level < power < 1"),
        (dict(behavior_params=BEHAVIOR[:1]), "behavior_params has shape"),
        (dict(sample=lambda params, prompts, key: compiled_sample(params, prompts[:8], key)), "with B = 16"),
        (dict(sample=lambda *given: dataclasses.replace(compiled_sample(*given), rewards=jnp.array([jnp.nan]))), "not finite"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        measure(**change)


def test_logprobs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="token_logprobs returned shape"):
        bias.estimate(lambda p, r: token_logprobs(p, r)[..., :1], compiled_sample, LOSS, LEARNER, BEHAVIOR, PROMPTS, KEY)
