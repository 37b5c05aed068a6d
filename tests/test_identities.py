"""Identities of the surrogate gradient H, the total derivative and ∇J, which a wrong oracle, loss or weight would break."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import aggregation, exact, policies, tasks
from jax_async_grpo.advantages import group_centered, group_normalized, leave_one_out
from jax_async_grpo.aggregation import sequence_mean, sequence_sum, token_mean
from jax_async_grpo.losses import importance_sampling, ppo_clip, reinforce

TABULAR, LINEAR, DECODER = "tabular, unequal lengths", "linear, equal lengths", "decoder, unequal lengths"
# another number than the longest completion, so that the two cannot be confused
LENGTH = 5
fifth = functools.partial(aggregation.constant_length, length=LENGTH)


def raw_rewards(rewards):
    """An advantage without a baseline: not zero in sum."""
    return rewards


def ragged_task():
    """Two prompts, the 7 strings over {0, 1, end} of one or two tokens, three reward levels; prompt 0 is padded."""
    allowed = np.tile(np.arange(4) < 3, (2, 1))
    completions, mask = tasks.enumerate_completions(allowed, end_token=2)
    rewards = np.random.default_rng(5).integers(0, 3, (2, len(completions))) / 2
    prompts = np.array([[0, 3], [1, 3]])
    prompt_mask = np.array([[False, True], [True, True]])
    strings = dict(completions=completions, mask=mask, allowed=allowed, end_token=2)
    return tasks.make_task("ragged", prompts=prompts, prompt_mask=prompt_mask, rewards=rewards, **strings)


def random_params(policy, seed=0):
    """θ away from the uniform policy, of the size an initialization would have."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0 if leaf.ndim > 1 else 1, 0.5, leaf.shape)), shapes)


@functools.cache
def case(name):
    """(policy, θ, task)"""
    policy, task = {
        TABULAR: (policies.tabular(4, 2), ragged_task),
        DECODER: (policies.decoder(4, num_layers=1, width=16, num_heads=2, dtype=jnp.float64), ragged_task),
        LINEAR: (policies.linear(4, 3), functools.partial(tasks.digit_sum, 3, 2, 3, partial_credit=True)),
    }[name]
    return policy, random_params(policy), task()


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def difference(a, b):
    return largest(jax.tree.map(jnp.subtract, a, b)) / largest(b)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# the losses of a compilation; weights that are 1 for one of them and 0 for the others choose
LOSSES = {
    "clip": functools.partial(ppo_clip, epsilon_low=0.1, epsilon_high=0.3, dual_clip=2.0),
    "importance sampling": importance_sampling,
    "reinforce": reinforce,
}
RATIO_LOSSES = ("clip", "importance sampling")


def chosen_loss(logprobs, old_logprobs, advantages, mask, **weights):
    return sum(weights[name] * loss_fn(logprobs, old_logprobs, advantages, mask) for name, loss_fn in LOSSES.items())


# (aggregation, advantage, G) by case; H and the total derivative are spared the compiler where no test reads them
ALGORITHMS = {
    TABULAR: (
        (sequence_mean, group_normalized, 4),
        (sequence_mean, raw_rewards, 4),
        (sequence_sum, leave_one_out, 4),
        (fifth, leave_one_out, 4),
        (sequence_mean, leave_one_out, 4),
        (sequence_sum, group_normalized, 4),
        (sequence_sum, group_centered, 4),
    ),
    LINEAR: ((sequence_sum, leave_one_out, 2), (token_mean, group_normalized, 2)),
    DECODER: ((sequence_mean, group_normalized, 4),),
}
WITHOUT_TOTAL = {(TABULAR, *functions) for functions in ALGORITHMS[TABULAR][4:]}
WITHOUT_SURROGATE = {(DECODER, *functions) for functions in ALGORITHMS[DECODER]}


@functools.cache
def gradients(name):
    """{(loss, aggregation, advantage, G): (H(θ,θ), d/dθ L(θ,θ))} and ∇J of a case, in one compilation."""
    policy, params, task = case(name)
    shape = (*task.rewards.shape, task.mask.shape[-1])

    @jax.jit
    def compute(params, behavior_params):
        def of_loss(weights):
            def of(aggregation_fn, advantage_fn, group_size):
                algorithm = dict(loss_fn=chosen_loss, aggregation_fn=aggregation_fn, advantage_fn=advantage_fn)
                algorithm |= dict(group_size=group_size)
                algorithm |= dict(loss_inputs={loss: jnp.full(shape, w) for loss, w in zip(LOSSES, weights, strict=True)})
                which = (name, aggregation_fn, advantage_fn, group_size)
                surrogate = total = None
                if which not in WITHOUT_SURROGATE:
                    surrogate = exact.surrogate_gradient(policy, params, behavior_params, task, **algorithm)
                if which not in WITHOUT_TOTAL:
                    total = exact.total_gradient(policy, params, task, **algorithm)
                return surrogate, total

            return [of(*functions) for functions in ALGORITHMS[name]]

        reward_gradient = jax.grad(lambda params: exact.expected_reward(policy, params, task))(params)
        return jax.lax.map(of_loss, jnp.eye(len(LOSSES))), reward_gradient

    # φ is another array with the numbers of θ: H must hold it fixed even there
    stacked, reward_gradient = compute(params, jax.tree.map(jnp.copy, params))
    found = {
        (loss, *functions): jax.tree.map(lambda leaf, index=index: leaf[index], pair)
        for index, loss in enumerate(LOSSES)
        for functions, pair in zip(ALGORITHMS[name], stacked, strict=True)
    }
    return found, reward_gradient


def surrogate_and_total(which, loss):
    name, *functions = which
    return gradients(name)[0][loss, *functions]


@pytest.fixture(scope="module", params=[DECODER, LINEAR, TABULAR])
def name(request):
    return request.param


# zero-sum advantages and rows of equal total weight
VANISHING = {
    (DECODER, sequence_mean, group_normalized, 4),
    (LINEAR, sequence_sum, leave_one_out, 2),
    (LINEAR, token_mean, group_normalized, 2),
    (TABULAR, sequence_mean, group_normalized, 4),
}


def test_total_derivative_vanishes_where_every_row_weighs_the_same_and_not_for_reinforce(name):
    for which in {(name, *functions) for functions in ALGORITHMS[name]} & VANISHING:
        for loss in RATIO_LOSSES:
            surrogate, total = surrogate_and_total(which, loss)
            assert largest(total) <= 1e-14, (which, loss)
            assert which in WITHOUT_SURROGATE or largest(surrogate) > 0.01, (which, loss)
        assert largest(surrogate_and_total(which, "reinforce")[1]) > 0.01, which


def test_fresh_gradients_of_all_losses_agree(name):
    for functions in ALGORITHMS[name]:
        if (name, *functions) not in WITHOUT_SURROGATE:
            reference, _ = surrogate_and_total((name, *functions), "importance sampling")
            for loss in LOSSES:
                assert difference(surrogate_and_total((name, *functions), loss)[0], reference) < 1e-13, (loss, functions)


def test_leave_one_out_and_the_sequence_sum_give_the_policy_gradient(name):
    chosen = [functions for functions in ALGORITHMS[name] if functions[:2] == (sequence_sum, leave_one_out)]
    assert len(chosen) == (name != DECODER)
    for functions in chosen:
        for loss in LOSSES:
            surrogate, _ = surrogate_and_total((name, *functions), loss)
            assert difference(surrogate, gradients(name)[1]) < 1e-12, (loss, functions)


@pytest.mark.parametrize("loss", RATIO_LOSSES)
@pytest.mark.parametrize("aggregation_fn", [sequence_sum, fifth], ids=["sequence_sum", "constant_length"])
def test_total_derivative_does_not_vanish_where_rows_weigh_by_their_length(aggregation_fn, loss):
    surrogate, total = surrogate_and_total((TABULAR, aggregation_fn, leave_one_out, 4), loss)
    assert largest(total) > 0.1 * largest(surrogate)


def test_total_derivative_is_that_of_the_covariance_of_rewards_and_row_weights():
    # leave-one-out: E[w_i·(R_i − R̄_others)] = Cov(w, R), with w = L_y for the ratio losses and log π(y) for reinforce
    policy, params, task = case(TABULAR)

    def covariance(params, length_weight):
        logprobs = exact.task_logprobs(policy, params, task)
        p, lengths = jnp.exp(logprobs.sum(-1)), task.mask.sum(-1)
        weights = length_weight * lengths + (1 - length_weight) * logprobs.sum(-1)
        means = [jnp.sum(p * x, axis=-1) for x in (weights * task.rewards, weights, task.rewards)]
        return jnp.mean(means[0] - means[1] * means[2])

    gradient = jax.jit(jax.grad(covariance))
    which = (TABULAR, sequence_sum, leave_one_out, 4)
    for loss in RATIO_LOSSES:
        assert difference(surrogate_and_total(which, loss)[1], gradient(params, 1.0)) < 1e-12
    assert difference(surrogate_and_total(which, "reinforce")[1], gradient(params, 0.0)) < 1e-12


def test_total_derivative_without_a_baseline_is_the_policy_gradient():
    # L(θ,θ) = E[(1/G) Σ_i R_i] = J for the sequence mean, whatever the lengths
    for loss in RATIO_LOSSES:
        total = surrogate_and_total((TABULAR, sequence_mean, raw_rewards, 4), loss)[1]
        assert difference(total, gradients(TABULAR)[1]) < 1e-12


@pytest.mark.parametrize(
    "functions, factor",
    [
        ((sequence_sum, leave_one_out, 4), 1),
        ((fifth, leave_one_out, 4), 1 / LENGTH),
        ((sequence_sum, group_centered, 4), 3 / 4),
    ],
    ids=["sequence_sum", "constant_length", "centered"],
)
def test_fresh_gradient_is_the_policy_gradient_times(functions, factor):
    scaled = jax.tree.map(lambda leaf: factor * leaf, gradients(TABULAR)[1])
    assert largest(scaled) > 0.01
    for loss in LOSSES:
        assert difference(surrogate_and_total((TABULAR, *functions), loss)[0], scaled) < 1e-12, loss


@pytest.mark.parametrize(
    "functions", [(sequence_sum, group_normalized, 4), (sequence_mean, leave_one_out, 4)], ids=["divided by std", "by length"]
)
def test_other_row_weights_do_not_even_have_the_direction_of_the_policy_gradient(functions):
    surrogate, _ = surrogate_and_total((TABULAR, *functions), "clip")
    first, second = flat(surrogate), flat(gradients(TABULAR)[1])
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert 0.5 < cosine < 0.999
