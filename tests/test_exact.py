"""The closed form equals the sum over all Y^G groups, equals Monte Carlo, and refuses what it could only approximate."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, aggregation, compositions, exact, losses, policies, tasks

# (Y, G, L, number of reward levels): the static shapes, Y^G up to 2.6e5
_SHAPES = [(4, 6, 2, 2), (8, 3, 3, 3), (3, 8, 1, 2), (16, 3, 2, 5), (5, 5, 3, 3), (6, 4, 2, 5), (64, 3, 1, 3), (2, 9, 2, 2)]
_CASES_PER_SHAPE = 8
_ROLES = ("learner", "denominator", "sampling", "statistics")


def _tempered(logprobs, old_logprobs, advantages, mask):
    """A loss of this test's own: smooth, nonlinear in the ratio and in the advantage, coupled along the tokens of a row."""
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    row = jnp.sum(log_ratio, axis=-1, keepdims=True)
    return -jnp.tanh(advantages[..., None]) * jnp.exp(0.5 * log_ratio + 0.1 * row) * mask


def _kl_penalized(logprobs, old_logprobs, advantages, mask):
    return losses.ppo_clip(logprobs, old_logprobs, advantages, mask) + 0.1 * losses.k3(logprobs, old_logprobs, mask)


_LOSSES = {
    "clip": losses.ppo_clip,
    "clip_higher_dual": functools.partial(losses.ppo_clip, epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.6),
    "importance_sampling": losses.importance_sampling,
    "reinforce": losses.reinforce,
    "kl_penalized": _kl_penalized,
    "own": _tempered,
}
_ADVANTAGES = [advantages.group_normalized, advantages.group_centered, advantages.leave_one_out]
_AGGREGATIONS = [aggregation.sequence_mean, aggregation.sequence_sum, functools.partial(aggregation.constant_length, length=5)]


def _random_case(rng, num_completions, length, num_levels):
    """Log-probs of four roles (normalized over completions of unequal length), rewards that use every level, a mask."""
    lengths = rng.integers(1, length + 1, size=(1, num_completions, 1))
    mask = np.arange(length) < lengths

    def logprobs():
        total = np.log(rng.dirichlet(np.full(num_completions, 2.0)))[None, :, None]
        share = rng.uniform(0.5, 1.5, size=mask.shape) * mask
        return total * share / share.sum(-1, keepdims=True)

    rewards = rng.integers(num_levels, size=(1, num_completions))
    rewards[0, :num_levels] = np.arange(num_levels)[:num_completions]
    return [logprobs() for _ in _ROLES], rewards / max(num_levels - 1, 1), mask


def _random_cases(shape, seed=0):
    num_completions, _, length, num_levels = shape
    rng = np.random.default_rng(seed)
    cases = [_random_case(rng, num_completions, length, num_levels) for _ in range(_CASES_PER_SHAPE)]
    roles = [np.stack([case[0][i] for case in cases]) for i in range(len(_ROLES))]
    return roles, np.stack([case[1] for case in cases]), np.stack([case[2] for case in cases])


@pytest.mark.parametrize("shape_index", range(len(_SHAPES)))
def test_closed_form_is_the_sum_over_all_groups(shape_index):
    shape = _SHAPES[shape_index]
    _, group_size, _, num_levels = shape
    levels = np.arange(num_levels) / max(num_levels - 1, 1)
    roles, rewards, mask = _random_cases(shape)
    # advantages and aggregations rotate over the shapes, so that every pair of them meets some shape
    advantage_fn = _ADVANTAGES[shape_index % 3]
    aggregation_fn = _AGGREGATIONS[(shape_index + shape_index // 3) % 3]

    def chosen_loss(logprobs, old_logprobs, advantages, mask, **weights):
        # weights are one-hot: one compilation serves every loss, and the sum still is each loss exactly
        return sum(weights[name] * loss_fn(logprobs, old_logprobs, advantages, mask) for name, loss_fn in _LOSSES.items())

    def run(oracle, **options):
        def value(roles, rewards, mask, weights):
            learner, denominator, sampling, statistics = roles
            return oracle(
                learner,
                denominator,
                rewards,
                mask,
                group_size=group_size,
                loss_fn=chosen_loss,
                advantage_fn=advantage_fn,
                aggregation_fn=aggregation_fn,
                sampling_logprobs=sampling,
                statistics_logprobs=statistics,
                loss_inputs={name: jnp.full(learner.shape, w) for name, w in zip(_LOSSES, weights, strict=True)},
                **options,
            )

        return jax.jit(lambda cases: jax.lax.map(lambda case: jax.value_and_grad(value)(*case), cases))(cases)

    chosen = (np.arange(_CASES_PER_SHAPE) + shape_index) % len(_LOSSES)
    cases = (roles, rewards, mask, np.eye(len(_LOSSES))[chosen])
    values, gradients = run(exact.surrogate_objective, reward_levels=levels)
    brute_values, brute_gradients = run(exact.brute_force_objective)
    for case, loss in enumerate(np.array(list(_LOSSES))[chosen]):
        per_role = [np.asarray(g[case]) for g in brute_gradients]
        scale = max(np.abs(g).max() for g in per_role)
        assert scale > 1e-6, (loss, case)
        np.testing.assert_allclose(values[case], brute_values[case], rtol=0, atol=1e-12 * scale, err_msg=loss)
        for role, expected, actual in zip(_ROLES, per_role, gradients, strict=True):
            error = np.abs(np.asarray(actual[case]) - expected).max()
            assert error <= 1e-12 * scale, (loss, role, case, error / scale)


def _two_prompts(seed=0, num_completions=5, length=2):
    rng = np.random.default_rng(seed)
    (learner, behavior, *others), rewards, mask = _random_case(rng, num_completions, length, 3)
    _, other_rewards, _ = _random_case(rng, num_completions, length, 3)
    return (
        np.concatenate([learner, others[0]]),
        np.concatenate([behavior, others[1]]),
        np.concatenate([rewards, other_rewards]),
        mask[0],
    )


_BRUTE_FORCE = jax.jit(exact.brute_force_objective, static_argnames=("group_size", "loss_fn", "advantage_fn"))
_GRPO = dict(group_size=4, loss_fn=losses.ppo_clip, advantage_fn=advantages.group_normalized)


def test_roles_default_to_the_behavior_policy_and_prompts_are_averaged():
    learner, behavior, rewards, mask = _two_prompts()
    whole = exact.surrogate_objective(learner, behavior, rewards, mask, **_GRPO)
    apart = [
        exact.surrogate_objective(learner[i : i + 1], behavior[i : i + 1], rewards[i : i + 1], mask, **_GRPO) for i in range(2)
    ]
    np.testing.assert_allclose(whole, np.mean(apart), rtol=1e-13)
    explicit = exact.surrogate_objective(
        learner, behavior, rewards, mask, sampling_logprobs=behavior, statistics_logprobs=behavior, **_GRPO
    )
    np.testing.assert_array_equal(whole, explicit)
    np.testing.assert_allclose(whole, _BRUTE_FORCE(learner, behavior, rewards, mask, **_GRPO), rtol=1e-12)


def test_closed_form_is_the_mean_of_sampled_groups():
    learner, behavior, rewards, mask = _two_prompts()
    rng = np.random.default_rng(7)
    num_groups, group_size = 40_000, _GRPO["group_size"]
    estimates = []
    for prompt in range(2):
        p = np.exp(behavior[prompt].sum(-1))
        groups = rng.choice(len(p), size=(num_groups, group_size), p=p / p.sum())
        a = advantages.group_normalized(rewards[prompt][groups])
        values = losses.ppo_clip(learner[prompt][groups], behavior[prompt][groups], a, mask[groups])
        estimates.append(-(np.asarray(values).sum(-1) / mask[groups].sum(-1)).mean(-1))
    mean, error = np.mean(estimates), np.std(estimates, axis=1).mean() / np.sqrt(2 * num_groups)
    value = exact.surrogate_objective(learner, behavior, rewards, mask, **_GRPO)
    assert abs(mean - value) < 4 * error
    assert abs(value) > 10 * error  # the interval is narrow enough to notice a wrong oracle


def test_proximal_and_behavior_log_probs_reach_the_loss():
    learner, behavior, rewards, mask = _two_prompts()
    proximal = 0.5 * (learner + behavior)

    def decoupled(logprobs, old_logprobs, advantages, mask, *, behavior_logprobs):
        return jnp.exp(old_logprobs - behavior_logprobs) * losses.ppo_clip(logprobs, old_logprobs, advantages, mask)

    options = {**_GRPO, "loss_fn": decoupled, "proximal_logprobs": proximal}
    value = exact.surrogate_objective(learner, behavior, rewards, mask, **options)
    np.testing.assert_allclose(value, _BRUTE_FORCE(learner, behavior, rewards, mask, **options), rtol=1e-12)
    plain = exact.surrogate_objective(learner, behavior, rewards, mask, **_GRPO)
    assert abs(value - plain) > 1e-3 * abs(plain)


def test_loss_inputs_reach_the_loss_by_name():
    learner, behavior, rewards, mask = _two_prompts()

    def penalized(logprobs, old_logprobs, advantages, mask, *, reference_logprobs):
        return 0.3 * losses.k3(logprobs, reference_logprobs, mask)

    value = exact.surrogate_objective(
        learner, behavior, rewards, mask, **{**_GRPO, "loss_fn": penalized}, loss_inputs={"reference_logprobs": behavior}
    )
    k3 = np.asarray(losses.k3(learner, behavior, np.broadcast_to(mask, learner.shape)))
    expected = -0.3 * np.mean(np.sum(np.exp(behavior.sum(-1)) * k3.sum(-1) / mask.sum(-1), axis=-1))
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_token_mean_is_exact_for_equal_lengths_and_refused_for_unequal_ones():
    learner, behavior, rewards, _ = _two_prompts()
    full = np.ones(learner.shape[1:], dtype=bool)
    equal = dict(_GRPO, aggregation_fn=aggregation.token_mean)

    def value(mask):
        return exact.surrogate_objective(learner, behavior, rewards, mask, **equal)

    reference = exact.surrogate_objective(learner, behavior, rewards, full, **_GRPO)
    np.testing.assert_allclose(value(full), reference, rtol=1e-13)
    unequal = full.copy()
    unequal[0, 1] = False
    learner[:, 0, 1] = 0
    behavior[:, 0, 1] = 0
    with pytest.raises(ValueError, match="token_mean couples rows"):
        value(unequal)
    with pytest.raises(ValueError, match="token_mean couples rows"):  # a traced mask may hold any lengths
        jax.jit(value)(full)


def test_functions_that_couple_rows_are_refused():
    arrays = _two_prompts()

    def batch_normalized(rewards):
        return (rewards - jnp.mean(rewards)) / (jnp.std(rewards) + 1e-6)

    def first_member_is_baseline(rewards):
        return rewards - rewards[..., :1]

    def batch_centered_loss(logprobs, old_logprobs, advantages, mask):
        values = losses.importance_sampling(logprobs, old_logprobs, advantages, mask)
        return values - jnp.mean(values)

    def adaptive_above_threshold(logprobs, old_logprobs, advantages, mask):
        drift = jnp.mean((logprobs - old_logprobs) ** 2)  # changes nothing until the batch has drifted
        return jnp.where(drift > 0.1, 0.5, 1.0) * losses.importance_sampling(logprobs, old_logprobs, advantages, mask)

    for change, message in (
        (dict(advantage_fn=batch_normalized), "batch_normalized couples groups"),
        (dict(advantage_fn=first_member_is_baseline), "does not treat the members of a group alike"),
        (dict(loss_fn=batch_centered_loss), "batch_centered_loss couples rows"),
        (dict(loss_fn=adaptive_above_threshold), "adaptive_above_threshold couples rows"),
        (dict(aggregation_fn=lambda v, m: aggregation.MaskedSum(aggregation.sequence_sum(v, m).sum, 1.0)), "couples rows"),
    ):
        with pytest.raises(ValueError, match=message):
            exact.surrogate_objective(*arrays, **{**_GRPO, **change})


def test_refusals_name_the_field():
    learner, behavior, rewards, mask = _two_prompts()

    def call(learner=learner, behavior=behavior, rewards=rewards, mask=mask, **change):
        return exact.surrogate_objective(learner, behavior, rewards, mask, **{**_GRPO, **change})

    with pytest.raises(ValueError, match="must sum to 1"):
        call(behavior=behavior + 0.01)
    with pytest.raises(ValueError, match="rewards hold NaN"):
        call(rewards=np.where(rewards == 0, np.nan, rewards))
    with pytest.raises(ValueError, match="rewards has shape"):
        call(rewards=rewards[:1])
    with pytest.raises(ValueError, match="behavior_logprobs has shape"):
        call(behavior=behavior[:, :3])
    with pytest.raises(ValueError, match="statistics_logprobs has shape"):
        call(statistics_logprobs=behavior[:1])
    with pytest.raises(ValueError, match=r"must be \[B, Y, L\]"):
        call(learner=learner[0])
    with pytest.raises(ValueError, match="give 20 compositions, above max_compositions = 10"):
        call(rewards=np.tile([0.0, 1.0, 2.0, 3.0, 3.0], (2, 1)), max_compositions=10)
    with pytest.raises(ValueError, match="group_size is 0"):
        call(group_size=0)
    with pytest.raises(ValueError, match="pass reward_levels"):
        jax.jit(lambda r: call(rewards=r))(rewards)
    with pytest.raises(ValueError, match="not among reward_levels"):
        call(reward_levels=[0.0, 1.0])
    with pytest.raises(ValueError, match="max_groups"):
        exact.brute_force_objective(learner, behavior, rewards, mask, **_GRPO, max_groups=100)


def _row_sums(logprobs, old_logprobs, advantages, mask):
    return -jnp.sum(logprobs, axis=-1) * advantages


def _one_number(logprobs, old_logprobs, advantages, mask):
    return jnp.sum(logprobs)


def _with_a_reference(logprobs, old_logprobs, advantages, mask, *, reference_logprobs, coefficient=0.1):
    return coefficient * losses.k3(logprobs, reference_logprobs, mask)


_EMPTY = [np.zeros(shape) for shape in ((0, 5, 2), (2, 0, 2), (2, 5, 0))]


@pytest.mark.parametrize("oracle", [exact.surrogate_objective, exact.brute_force_objective])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: dict(rewards=a["rewards"][:1]), r"^rewards has shape \(1, 5\); it must be \[B, Y\] = \(2, 5\)$"),
        (lambda a: dict(rewards=a["rewards"] * np.nan), "^rewards hold NaN or inf"),
        (lambda a: dict(behavior_logprobs=a["behavior_logprobs"] + 0.01), "^the completions of prompt . .* must sum to 1"),
        (lambda a: dict(learner_logprobs=a["learner_logprobs"] - 0.01), "^the completions of prompt . .* must sum to 1"),
        (lambda a: dict(statistics_logprobs=a["behavior_logprobs"] + 0.01), "^the completions of prompt . .* must sum to 1"),
        *(
            (lambda a, x=x: dict(learner_logprobs=x), r"^learner_logprobs has shape .* \[B, Y, L\], none of them 0$")
            for x in _EMPTY
        ),
        (lambda a: dict(learner_logprobs=a["learner_logprobs"].tolist()), "^learner_logprobs is a list; it must be an array$"),
        (lambda a: dict(behavior_logprobs=a["behavior_logprobs"].tolist()), "^behavior_logprobs is a list"),
        (lambda a: dict(behavior_logprobs=None), "^behavior_logprobs is None"),
        (lambda a: dict(mask=a["mask"].tolist()), "^mask is a list"),
        *((lambda a, g=g: dict(group_size=g), f"^group_size is {g!r}; it must be an integer and >= 1$") for g in (0, 2.0, "4")),
        (lambda a: dict(loss_fn=_row_sums), r"^loss_fn.* returns shape \(.*\); it must be per token"),
        (lambda a: dict(loss_fn=_one_number), r"^loss_fn.* returns shape \(\); it must be per token"),
        (lambda a: dict(loss_fn=_with_a_reference), "^loss_fn _with_a_reference needs reference_logprobs: .* loss_inputs"),
        (lambda a: dict(loss_fn=losses.dro), "^loss_fn dro needs beta: .* functools.partial"),
        (
            lambda a: dict(loss_inputs={"refrence": a["behavior_logprobs"]}),
            "^loss_inputs holds refrence, which loss_fn ppo_clip does not take$",
        ),
    ],
)
def test_both_oracles_refuse_at_the_door_in_one_line(oracle, change, message):
    arguments = dict(zip(("learner_logprobs", "behavior_logprobs", "rewards", "mask"), _two_prompts(), strict=True))
    with pytest.raises(ValueError, match=message) as error:
        oracle(**{**arguments, **_GRPO, **change(arguments)})
    assert "\n" not in str(error.value)


def test_parameters_that_do_not_match_are_named():
    policy, task = policies.tabular(4, 1), tasks.bandit([[0.0, 0.5, 1.0]])
    params = {"table": np.zeros((5, 4))}

    def refused(message, learner=params, behavior=params, **roles):
        for function in (exact.surrogate_gradient, exact.surrogate_objective_of_params):
            with pytest.raises(ValueError, match=message):
                function(policy, learner, behavior, task, **_GRPO, **roles)

    refused("^behavior_params has the structure .*; that of learner_params is", behavior={"tables": params["table"]})
    refused(r"^statistics_params\['table'\] has shape \(5, 3\)", statistics_params={"table": np.zeros((5, 3))})
    refused("^learner_params has no leaves", learner={})


def test_a_traced_group_size_is_refused():
    with pytest.raises(ValueError, match="^group_size is traced"):
        jax.jit(lambda g: exact.surrogate_objective(*_two_prompts(), **{**_GRPO, "group_size": g}))(4)


@pytest.mark.parametrize("levels", [[0.0, 0.5, np.nan], [0.0, np.inf], []])
def test_reward_levels_must_be_finite_numbers(levels):
    with pytest.raises(ValueError, match="^reward_levels is .* all finite"):
        exact.surrogate_objective(*_two_prompts(), **_GRPO, reward_levels=levels)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int32, np.int64, np.uint8, np.float16, np.float32, jnp.bfloat16])
def test_the_type_of_the_rewards_costs_no_digits(dtype):
    """A standard deviation of whole rewards is no float32: √(2/9) of [0, 0, 1]."""
    learner, behavior, rewards, mask = _two_prompts()
    rewards = np.sign(rewards)
    of = dict(_GRPO, group_size=3)
    expected = exact.surrogate_objective(learner, behavior, rewards, mask, **of)
    assert abs(expected - float(np.float32(expected))) > 1e-12 * abs(expected)
    np.testing.assert_allclose(
        exact.surrogate_objective(learner, behavior, rewards.astype(dtype), mask, **of), expected, rtol=1e-14
    )
    levels = dict(of, reward_levels=np.array([0, 1], dtype))
    np.testing.assert_allclose(exact.surrogate_objective(learner, behavior, rewards, mask, **levels), expected, rtol=1e-14)
    np.testing.assert_allclose(_BRUTE_FORCE(learner, behavior, rewards.astype(dtype), mask, **of), expected, rtol=1e-13)


def test_a_traced_reward_without_a_level_spoils_the_result():
    learner, behavior, rewards, mask = _two_prompts()
    traced = jax.jit(lambda r: exact.surrogate_objective(learner, behavior, r, mask, **_GRPO, reward_levels=[0.0, 0.5, 1.0]))
    np.testing.assert_allclose(
        traced(rewards), exact.surrogate_objective(learner, behavior, rewards, mask, **_GRPO), rtol=1e-14
    )
    assert np.isnan(traced(np.where(rewards == 0.5, 0.25, rewards)))


def test_number_of_compositions():
    assert [compositions.num_compositions(n, 8) for n in (2, 3, 5)] == [8, 36, 330]
    for num_levels, group_size in ((1, 4), (2, 8), (5, 3)):
        counts = compositions.enumerate_compositions(num_levels, group_size, 5000)
        assert len(np.unique(counts, axis=0)) == compositions.num_compositions(num_levels, group_size)
        assert (counts.sum(-1) == group_size - 1).all() and (counts >= 0).all()


def test_composition_probabilities_keep_their_gradient_at_zero():
    counts = compositions.enumerate_compositions(2, 3, 100)

    def both_others_at_the_first_level(p):
        return compositions.composition_probabilities(p[None], counts)[0, np.argmax(counts[:, 0])]

    gradient = jax.grad(both_others_at_the_first_level)(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(gradient, [0.0, 0.0])  # d p² at p = 0, and no NaN
    mixed = jax.grad(lambda p: compositions.composition_probabilities(p[None], counts)[0, np.argmax(counts[:, 0] == 1)])
    np.testing.assert_array_equal(mixed(jnp.array([0.0, 1.0])), [2.0, 0.0])  # d 2·p·q


def test_composition_probabilities_are_the_polynomials_off_the_simplex_too():
    group_size = 12
    counts = compositions.enumerate_compositions(3, group_size, 100)
    coefficients = [math.factorial(group_size - 1) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    p = np.array([[0.3, 0.0, 0.9], [0.2, 0.5, 0.3]])
    powers = p[:, None] ** counts
    value, tangents = jax.jit(
        lambda p: (
            compositions.composition_probabilities(p, counts),
            jax.jacfwd(compositions.composition_probabilities)(p, counts),
        )
    )(p)
    np.testing.assert_allclose(value, coefficients * powers.prod(-1), rtol=1e-13)
    for level in range(3):
        others = np.delete(powers, level, axis=-1).prod(-1)
        slope = counts[:, level] * p[:, None, level] ** np.maximum(counts[:, level] - 1, 0)
        for prompt in range(2):
            got = tangents[prompt, :, prompt, level]
            np.testing.assert_allclose(got, (coefficients * others * slope)[prompt], rtol=1e-13, atol=0)


def test_the_program_of_a_large_group_is_hardly_longer():
    def length(group_size):
        counts = compositions.enumerate_compositions(2, group_size, 5000)
        return len(jax.make_jaxpr(lambda p: compositions.composition_probabilities(p, counts))(np.full((1, 2), 0.5)).eqns)

    assert length(512) <= length(8) + 40


def test_multinomials_beyond_the_floats_are_refused():
    counts = compositions.enumerate_compositions(2, 2000, 5000)
    with pytest.raises(ValueError, match="^group_size is 2000; its multinomial coefficients overflow float64"):
        compositions.composition_probabilities(jnp.full((1, 2), 0.5), counts)
