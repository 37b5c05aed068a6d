"""Sampled groups come from π_φ with its log-probs, and their gradient is the exact one on average."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jax_async_grpo import aggregation, exact, policies, surrogate, tasks
from jax_async_grpo.advantages import group_centered, group_normalized
from jax_async_grpo.losses import importance_sampling, k3, ppo_clip
from jax_async_grpo.sampling import sample_enumerated

GROUP_SIZE = 4
KEY = jax.random.key(7)


def ragged_task(num_prompts=2):
    """The 7 strings over {0, 1, end} of one or two tokens, three reward levels; prompt 0 is padded."""
    allowed = np.tile(np.arange(4) < 3, (2, 1))
    completions, mask = tasks.enumerate_completions(allowed, end_token=2)
    rewards = np.random.default_rng(5).integers(0, 3, (num_prompts, len(completions))) / 2
    prompts, prompt_mask = np.array([[0, 3], [1, 3], [2, 3]]), np.array([[False, True], [True, True], [True, True]])
    strings = dict(completions=completions, mask=mask, allowed=allowed, end_token=2)
    return tasks.make_task(
        "ragged", prompts=prompts[:num_prompts], prompt_mask=prompt_mask[:num_prompts], rewards=rewards, **strings
    )


TASK, POLICY = ragged_task(), policies.tabular(4, 2)
RNG = np.random.default_rng(0)
SHAPE = jax.eval_shape(POLICY.init, KEY)["table"].shape
BEHAVIOR = {"table": RNG.normal(0, 0.7, SHAPE)}
LEARNER = {"table": BEHAVIOR["table"] + RNG.normal(0, 0.2, SHAPE)}
LOGPROBS = np.array(jax.jit(functools.partial(exact.task_logprobs, POLICY, task=TASK))(BEHAVIOR))


NUM_STEPS = 10_000


@functools.cache
def compiled_draw(group_size, num_prompts):
    task = ragged_task(num_prompts)
    logprobs = np.concatenate([LOGPROBS, LOGPROBS[:1]])[:num_prompts]

    @jax.jit
    def draw(key, steps, policy_version):
        return jax.vmap(
            lambda step: sample_enumerated(key, task, logprobs, group_size, step=step, policy_version=policy_version)
        )(steps)

    return draw


def draw(key=KEY, *, first_step=0, policy_version=0, group_size=GROUP_SIZE, num_prompts=2):
    """Rollouts at NUM_STEPS successive steps, [NUM_STEPS, B, ...] in every field."""
    return compiled_draw(group_size, num_prompts)(key, first_step + np.arange(NUM_STEPS), policy_version)


def at_step(rollouts, step):
    return jax.tree.map(lambda x: np.asarray(x[step]), rollouts)


# -- sampling ------------------------------------------------------------------------------------------------------------------


def test_completions_are_drawn_from_the_behavior_policy():
    index = np.asarray(draw().completion_index)
    p = np.exp(LOGPROBS.sum(-1))
    for prompt in range(2):
        for member in range(GROUP_SIZE):  # each member of each prompt on its own
            counts = np.bincount(index[:, prompt, member], minlength=p.shape[1])
            assert stats.chisquare(counts, NUM_STEPS * p[prompt]).pvalue > 1e-3
            assert stats.chisquare(counts, NUM_STEPS * p[1 - prompt]).pvalue < 1e-6  # it can tell the prompts apart
    # members, prompts and successive steps are independent of each other
    for first, second in [
        (index[:, 0, 0], index[:, 0, 1]),
        (index[:, 0, 0], index[:, 1, 0]),
        (index[1:, 0, 0], index[:-1, 0, 0]),
    ]:
        assert stats.chi2_contingency(stats.contingency.crosstab(first, second).count).pvalue > 1e-3


def test_a_completion_depends_on_key_step_prompt_and_member_alone():
    index = np.asarray(draw().completion_index)
    wider = np.asarray(draw(group_size=GROUP_SIZE + 2, num_prompts=3).completion_index)
    np.testing.assert_array_equal(wider[:, :2, :GROUP_SIZE], index)
    np.testing.assert_array_equal(draw(policy_version=9).completion_index, index)
    np.testing.assert_array_equal(draw(first_step=2).completion_index[:-2], index[2:])
    other = np.asarray(draw(jax.random.key(8)).completion_index)
    p = np.exp(LOGPROBS.sum(-1))
    matches = (p**2).sum(-1)  # of independent draws
    np.testing.assert_allclose((other == index).mean((0, 2)), matches, atol=0.02)
    np.testing.assert_allclose((wider[:, 2, 0] == wider[:, 0, 0]).mean(), matches[0], atol=0.02)  # equal policies, own draws


def test_shuffled_prompts_keep_their_draws_by_their_ids():
    order = np.array([2, 0, 1])
    task = ragged_task(3)
    shuffled = dataclasses.replace(
        task, **{f: getattr(task, f)[order] for f in ("prompts", "prompt_mask", "rewards", "gold_rewards")}
    )
    logprobs = np.concatenate([LOGPROBS, LOGPROBS[:1]])
    index = sample_enumerated(KEY, task, logprobs, 6, step=3).completion_index
    other = sample_enumerated(KEY, shuffled, logprobs[order], 6, step=3, prompt_ids=order).completion_index
    np.testing.assert_array_equal(other, np.asarray(index)[order])
    assert (np.asarray(sample_enumerated(KEY, shuffled, logprobs[order], 6, step=3).completion_index) != other).any()


def test_rollouts_record_what_was_drawn():
    rollouts = at_step(draw(first_step=40, policy_version=38), 3)
    index = rollouts.completion_index
    np.testing.assert_array_equal(rollouts.completions, TASK.completions[index])
    np.testing.assert_array_equal(rollouts.mask, TASK.mask[index])
    np.testing.assert_array_equal(rollouts.rewards, np.stack([TASK.rewards[b][index[b]] for b in range(2)]))
    np.testing.assert_array_equal(rollouts.policy_version, np.full((2, GROUP_SIZE), 38))
    np.testing.assert_array_equal(rollouts.prompts, TASK.prompts)
    np.testing.assert_array_equal(rollouts.prompt_mask, TASK.prompt_mask)
    assert not rollouts.mask.all()  # both lengths occur

    @jax.jit
    def recomputed(r):
        options = dict(prompt_mask=r.prompt_mask, allowed=TASK.allowed)
        return policies.token_logprobs(POLICY, BEHAVIOR, r.prompts, r.completions, r.mask, **options)

    np.testing.assert_allclose(rollouts.behavior_logprobs, recomputed(rollouts), rtol=0, atol=1e-12)


# -- objective and gradient ----------------------------------------------------------------------------------------------------


def penalized(logprobs, old_logprobs, advantages, mask, *, reference_logprobs):
    return ppo_clip(logprobs, old_logprobs, advantages, mask) + 0.1 * k3(logprobs, reference_logprobs, mask)


def test_sampled_objective_is_the_aggregated_loss_of_the_batch():
    rollouts = at_step(draw(), 0)
    rewards, mask, old = rollouts.rewards, rollouts.mask, rollouts.behavior_logprobs
    learner = np.where(mask, old + np.array([-0.4, 0.3])[:, None, None], 0.0)
    advantages = (rewards - rewards.mean(-1, keepdims=True))[..., None]
    ratio = np.exp(learner - old)
    token_loss = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    token_loss = mask * (token_loss + 0.1 * (np.exp(-1 - learner) + learner))
    expected = [
        token_loss.sum() / mask.sum(),
        (token_loss.sum(-1) / mask.sum(-1)).mean(),
        token_loss.sum(-1).mean(),
    ]

    @jax.jit
    def objectives(learner, rollouts):
        inputs = dict(loss_inputs={"reference_logprobs": jnp.full(learner.shape, -1.0)})
        return [
            surrogate.sampled_objective(
                learner, rollouts, loss_fn=penalized, advantage_fn=group_centered, aggregation_fn=aggregation_fn, **inputs
            )
            for aggregation_fn in (aggregation.token_mean, aggregation.sequence_mean, aggregation.sequence_sum)
        ]

    assert len({round(loss, 6) for loss in expected}) == 3
    np.testing.assert_allclose(objectives(learner, rollouts), np.negative(expected), rtol=1e-13)


def test_losses_get_the_arrays_they_ask_for_by_name():
    seen = {}

    def asks(logprobs, old_logprobs, advantages, mask, *, behavior_logprobs, detached_logprobs):
        seen["behavior_is_recorded"] = behavior_logprobs is rollouts.behavior_logprobs
        return -jnp.exp(detached_logprobs - behavior_logprobs) * advantages[..., None] * logprobs * mask

    rollouts = at_step(draw(), 0)
    learner = np.where(rollouts.mask, rollouts.behavior_logprobs - 0.3, 0.0)
    algorithm = dict(advantage_fn=group_centered)
    gradient = jax.grad(lambda x: surrogate.sampled_objective(x, rollouts, loss_fn=asks, **algorithm))(learner)
    expected = jax.grad(lambda x: surrogate.sampled_objective(x, rollouts, loss_fn=importance_sampling, **algorithm))(learner)
    assert seen["behavior_is_recorded"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)  # the detached ratio times ∇log π is ∇ratio


def test_gradients_from_rows_and_from_the_enumeration_agree():
    algorithm = dict(loss_fn=ppo_clip, advantage_fn=group_normalized, aggregation_fn=aggregation.token_mean)

    @jax.jit
    def both(params, rollouts):
        of_rows = surrogate.sampled_gradient(POLICY, params, rollouts, allowed=TASK.allowed, **algorithm)
        return of_rows, surrogate.enumerated_gradient(POLICY, params, rollouts, TASK, **algorithm)

    for step in range(5):
        of_rows, enumerated = (g["table"] for g in both(LEARNER, at_step(draw(), step)))
        scale = np.abs(of_rows).max()
        assert scale > 0.01
        np.testing.assert_allclose(enumerated, of_rows, rtol=0, atol=1e-12 * scale)


def test_sampled_gradient_is_exact_on_average():
    algorithm = dict(loss_fn=ppo_clip, advantage_fn=group_normalized)

    @jax.jit
    def compute(learner, behavior, rollouts):
        def of_batch(batch):
            return surrogate.enumerated_gradient(POLICY, learner, batch, TASK, **algorithm)["table"]

        def of_policy(params):
            return exact.surrogate_gradient(POLICY, learner, params, TASK, group_size=GROUP_SIZE, **algorithm)

        gradients = jax.vmap(of_batch)(rollouts)
        stale, fresh = jax.lax.map(of_policy, jax.tree.map(lambda *x: jnp.stack(x), behavior, learner))["table"]
        return jnp.mean(gradients, axis=0), jnp.std(gradients, axis=0) / NUM_STEPS**0.5, stale, fresh

    mean, error, stale, fresh = map(np.asarray, compute(LEARNER, BEHAVIOR, draw()))
    # a table has contexts that no prompt reaches, and their gradient is 0
    reached = error > 1e-12
    assert reached.sum() == 12 and np.abs(stale[~reached]).max() < 1e-15
    z = ((mean - stale) / np.where(reached, error, 1))[reached]
    assert np.abs(z).max() < 4 and 0.4 < np.sqrt(np.mean(z**2)) < 1.8
    # the interval is narrow enough to notice an error of a few per cent, and the fresh gradient in place of the stale one
    assert error.max() < 0.03 * np.abs(stale).max()
    assert np.abs((mean - fresh)[reached] / error[reached]).max() > 10
