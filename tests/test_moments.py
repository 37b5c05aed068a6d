"""The closed forms of mean and variance of a sampled gradient = enumeration of all groups = Monte Carlo."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jax_async_grpo import advantages, aggregation, closed_form, exact, losses, moments, policies, sampling, surrogate, tasks

ALLOWED = np.tile(np.arange(4) < 3, (2, 1))
COMPLETIONS, MASK = tasks.enumerate_completions(ALLOWED, end_token=2)  # the 7 strings over {0, 1, end} of one or two tokens
REWARDS = np.random.default_rng(5).integers(0, 3, (2, len(COMPLETIONS))) / 2
TASK = tasks.make_task(
    "ragged",
    prompts=np.array([[0, 3], [1, 3]]),
    completions=COMPLETIONS,
    mask=MASK,
    allowed=ALLOWED,
    end_token=2,
    rewards=REWARDS,
)
POLICY = policies.linear(4, 3)
RNG = np.random.default_rng(0)
SHAPE = jax.eval_shape(POLICY.init, jax.random.key(0))["table"].shape
LEARNER = {"table": RNG.normal(0, 0.5, SHAPE)}
BEHAVIOR = {"table": LEARNER["table"] + RNG.normal(0, 0.3, SHAPE)}
GROUP_SIZE = 3
CASES = {
    "clip": (losses.ppo_clip, advantages.group_normalized, aggregation.sequence_mean),
    "cispo": (functools.partial(losses.cispo, ratio_high=1.2), advantages.group_centered, aggregation.sequence_sum),
    "gspo": (
        functools.partial(losses.gspo, epsilon_low=0.05, epsilon_high=0.05),
        advantages.leave_one_out,
        aggregation.constant_length,
    ),
}


def arrays(params):
    return exact.task_logprobs(POLICY, params, TASK)


def enumerated(case, group_size=GROUP_SIZE):
    loss_fn, advantage_fn, aggregation_fn = CASES[case]
    return closed_form.enumerate_groups(
        arrays(LEARNER),
        arrays(BEHAVIOR),
        TASK.rewards,
        TASK.mask,
        group_size=group_size,
        loss_fn=loss_fn,
        advantage_fn=advantage_fn,
        aggregation_fn=aggregation_fn,
    )


@functools.cache
def computed(case, group_size=GROUP_SIZE):
    """(mean, variance, cut fraction, mean by `exact`) of a case."""
    loss_fn, advantage_fn, aggregation_fn = CASES[case]

    @jax.jit
    def compute():
        groups = enumerated(case, group_size)
        gradients = closed_form.row_gradients(groups, loss_fn, aggregation_fn)
        jacobian = moments.logprob_jacobian(POLICY, LEARNER, TASK)
        of_batch = moments.gradient_moments(groups, jacobian, gradients)
        algorithm = dict(loss_fn=loss_fn, advantage_fn=advantage_fn, aggregation_fn=aggregation_fn, group_size=group_size)
        expected = exact.surrogate_gradient(POLICY, LEARNER, BEHAVIOR, TASK, **algorithm)
        doubled = closed_form.row_gradients(groups._replace(advantages=2 * groups.advantages), loss_fn, aggregation_fn)
        return *of_batch, moments.cut_fraction(groups, gradients, doubled), ravel_pytree(expected)[0]

    return tuple(map(np.asarray, compute()))


@functools.cache
def over_all_groups(case):
    """(probabilities [B, Y^G], the gradient of every group of every prompt [B, Y^G, D]) by going through them."""
    loss_fn, advantage_fn, aggregation_fn = CASES[case]
    num_completions = len(COMPLETIONS)
    index = np.indices((num_completions,) * GROUP_SIZE).reshape(GROUP_SIZE, -1).T

    @jax.jit
    def compute():
        learner, behavior, jacobian = arrays(LEARNER), arrays(BEHAVIOR), moments.logprob_jacobian(POLICY, LEARNER, TASK)

        def of_group(prompt, members):
            advantage = advantage_fn(jnp.asarray(REWARDS)[prompt, members])
            old, mask = behavior[prompt, members], jnp.asarray(MASK)[members]

            def objective(own):
                return -aggregation_fn(loss_fn(own, old, advantage, mask), mask).mean()

            slope = jax.grad(objective)(learner[prompt, members])
            return jnp.exp(jnp.sum(old * mask)), jnp.einsum("gl,gld->d", slope, jacobian[prompt, members])

        return jax.vmap(lambda prompt: jax.vmap(lambda members: of_group(prompt, members))(index))(jnp.arange(2))

    return tuple(map(np.asarray, compute()))


@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_are_those_over_all_groups(case):
    mean, variance, _, by_exact = computed(case)
    probabilities, gradients = over_all_groups(case)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    expected = np.einsum("bg,bgd->bd", probabilities, gradients)
    scatter = np.einsum("bg,bgd->b", probabilities, (gradients - expected[:, None]) ** 2)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(mean, by_exact, rtol=0, atol=1e-14)
    np.testing.assert_allclose(variance, scatter.sum() / 4, rtol=1e-12)
    assert variance > 0.1 * (mean**2).sum()


def test_variance_agrees_with_sampled_batches():
    group_size, num_batches = 6, 4000
    loss_fn, advantage_fn, aggregation_fn = CASES["clip"]
    algorithm = dict(loss_fn=loss_fn, advantage_fn=advantage_fn, aggregation_fn=aggregation_fn)

    @jax.jit
    def compute():
        behavior = arrays(BEHAVIOR)

        def of_step(step):
            rollouts = sampling.sample_enumerated(jax.random.key(1), TASK, behavior, group_size, step=step)
            return ravel_pytree(surrogate.enumerated_gradient(POLICY, LEARNER, rollouts, TASK, **algorithm))[0]

        return jax.lax.map(of_step, jnp.arange(num_batches), batch_size=500)

    gradients = np.asarray(compute())
    mean, variance, _, _ = computed("clip", group_size)
    squares = ((gradients - mean) ** 2).sum(1)
    error = squares.std() / num_batches**0.5
    assert abs(squares.mean() - variance) < 4 * error
    assert error < 0.05 * variance  # narrow enough to notice a missing cross term
    naive = variance * group_size / (group_size - 1)
    assert abs(squares.mean() - naive) > 3 * error


def test_share_of_tokens_cut_off_is_the_clip_fraction_among_those_with_an_advantage():
    loss_fn, advantage_fn, _ = CASES["clip"]
    *_, fraction, _ = computed("clip")

    @jax.jit
    def expected():
        groups = enumerated("clip")
        weights = groups.own[:, :, None] * groups.others[:, None, :]
        rows = lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape[:2], len(groups.counts), x.shape[-1]))  # noqa: E731
        clipped = losses.clipped_tokens(rows(groups.learner), rows(groups.denominator), groups.advantages, rows(groups.mask))
        counted = rows(groups.mask) * (groups.advantages != 0)[..., None]
        return jnp.sum(weights[..., None] * clipped) / jnp.sum(weights[..., None] * counted)

    np.testing.assert_allclose(fraction, expected(), rtol=1e-12)
    assert 0.05 < fraction < 0.95


def test_one_member_has_no_partner():
    loss_fn, aggregation_fn = losses.reinforce, aggregation.sequence_mean

    @jax.jit
    def compute():
        groups = closed_form.enumerate_groups(
            arrays(LEARNER),
            arrays(BEHAVIOR),
            TASK.rewards,
            TASK.mask,
            group_size=1,
            loss_fn=loss_fn,
            advantage_fn=lambda rewards: rewards,
            aggregation_fn=aggregation_fn,
        )
        jacobian = moments.logprob_jacobian(POLICY, LEARNER, TASK)
        gradients = closed_form.row_gradients(groups, loss_fn, aggregation_fn)
        rows = jnp.einsum("bycl,byld->byd", gradients, jacobian)
        return moments.gradient_moments(groups, jacobian, gradients), groups.own, rows

    (mean, variance), own, rows = jax.device_get(compute())
    of_prompt = np.einsum("by,byd->bd", own, rows)
    np.testing.assert_allclose(mean, of_prompt.mean(0), rtol=1e-13)
    np.testing.assert_allclose(variance, np.einsum("by,byd->", own, (rows - of_prompt[:, None]) ** 2) / 4, rtol=1e-12)
