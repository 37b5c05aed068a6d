"""The staleness bias is 0 without lag, follows its first-order law, and falls apart by role as the mathematics says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import bias, exact, policies, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.losses import abs_kl, importance_sampling, ppo_clip, reinforce

# as a program is compiled outside the tests, where the compiler's optimizations are on
optimized_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
)
ALGORITHM = dict(group_size=4, advantage_fn=group_normalized)
ROLES = ("sampling", "denominator", "statistics")

# -- policies, tasks, and trees in NumPy: an eager JAX operation is compiled for every shape it meets -------------------------


def ragged_task():
    """Two prompts, the 7 strings over {0, 1, end} of one or two tokens, three reward levels."""
    allowed = np.tile(np.arange(4) < 3, (2, 1))
    completions, mask = tasks.enumerate_completions(allowed, end_token=2)
    rewards = np.random.default_rng(5).integers(0, 3, (2, len(completions))) / 2
    strings = dict(completions=completions, mask=mask, allowed=allowed, end_token=2)
    return tasks.make_task("ragged", prompts=np.array([[0, 3], [1, 3]]), rewards=rewards, **strings)


def sums_task():
    return tasks.digit_sum(3, 2, 3, partial_credit=True)


def bandit_task():
    return tasks.bandit([[0, 0.5, 1, 0.5], [1, 0, 0, 0.5], [0.5, 1, 0, 0]])


CASES = {
    "tabular": (policies.tabular(4, 2), ragged_task),
    "linear": (policies.linear(4, 3), sums_task),
    "decoder": (policies.decoder(4, num_layers=1, width=16, num_heads=2, dtype=jnp.float64), ragged_task),
    "bandit": (policies.tabular(7, 1), bandit_task),
}
EVERY_POLICY = ("tabular", "linear", "decoder")


@functools.cache
def case(name):
    """(policy, θ away from the uniform policy, a direction of length 1, task)"""
    policy, make_task = CASES[name]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    # vectors are the scales of norms, so near 1
    params = jax.tree.map(lambda leaf: rng.normal(leaf.ndim == 1, 0.5, leaf.shape), shapes)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    length = norm(direction)
    return policy, params, jax.tree.map(lambda leaf: leaf / length, direction), make_task()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def norm(tree):
    return np.linalg.norm(flat(tree))


def moved(params, distance, direction):
    return jax.tree.map(lambda leaf, d: np.asarray(leaf + distance * d), params, direction)


def total(trees):
    return sum(flat(tree) for tree in trees)


def relative_difference(a, b):
    return np.linalg.norm(flat(a) - flat(b)) / norm(b)


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


# -- the bias and its first-order law ------------------------------------------------------------------------------------------


@functools.cache
def measure(name):
    """(θ, φ) -> (SurrogateBias, first-order bias) of the clipped loss, compiled."""
    if name == "tabular":  # for which the parts by role are compiled anyway
        return lambda learner_params, behavior_params: compiled_parts(name)(
            learner_params, behavior_params, ONE_HOT["clip"], ONE_HOT["importance sampling"]
        )[2:]
    policy, _, _, task = case(name)

    def gradient(learner_params, behavior_params):
        return exact.surrogate_gradient(policy, learner_params, behavior_params, task, loss_fn=ppo_clip, **ALGORITHM)

    def both(learner_params, behavior_params):
        measured = bias.surrogate_bias(gradient, learner_params, behavior_params)
        return measured, bias.first_order_bias(gradient, learner_params, behavior_params, check=False)

    return (optimized_jit if name == "linear" else jax.jit)(both)


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_bias_is_exactly_zero_without_lag(name):
    _, params, direction, _ = case(name)
    fresh, first_order = measure(name)(params, jax.tree.map(np.copy, params))
    assert not flat(fresh.bias).any() and not flat(first_order).any()
    np.testing.assert_array_equal(flat(fresh.stale_gradient), flat(fresh.fresh_gradient))
    assert fresh.norm == fresh.relative_norm == 0
    assert abs(fresh.cosine - 1) < 1e-12
    # the same program sees the smallest lag
    stale, _ = measure(name)(params, moved(params, 1e-9, direction))
    assert stale.norm > 0 and norm(stale.fresh_gradient) > 0.01


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_first_order_law_has_slope_one(name):
    _, params, direction, _ = case(name)
    drifts, norms, errors = np.geomspace(1e-5, 1e-3, 5), [], []
    for drift in drifts:
        measured, first_order = measure(name)(params, moved(params, drift, direction))
        norms.append(measured.norm)
        errors.append(relative_difference(first_order, measured.bias))
    assert abs(slope(drifts, norms) - 1) < 0.005
    assert abs(slope(drifts, errors) - 1) < 0.05
    assert errors[0] < 1e-5


@pytest.mark.parametrize("name", ("tabular", "linear"))
def test_first_order_law_along_a_run_under_lag(name):
    _, params, _, _ = case(name)
    for _ in range(60):  # without lag to η·t = 6
        params = moved(params, 0.1, measure(name)(params, params)[0].stale_gradient)
    staleness, learning_rate, versions, errors = 5, 2e-4, [params], []
    for step in range(3 * staleness):
        measured, first_order = measure(name)(versions[-1], versions[max(step - staleness, 0)])
        versions.append(moved(versions[-1], learning_rate, measured.stale_gradient))
        if step >= staleness:
            errors.append(relative_difference(first_order, measured.bias))
    assert len(errors) == 10 and 0 < max(errors) < 1e-4


def test_numbers_beside_the_bias():
    _, params, direction, _ = case("tabular")
    measured, _ = measure("tabular")(params, moved(params, 3.0, direction))
    delta, stale, fresh = map(flat, (measured.bias, measured.stale_gradient, measured.fresh_gradient))
    np.testing.assert_array_equal(delta, stale - fresh)
    np.testing.assert_allclose(measured.norm, np.linalg.norm(delta), rtol=1e-13)
    np.testing.assert_allclose(measured.relative_norm, np.linalg.norm(delta) / np.linalg.norm(fresh), rtol=1e-13)
    cosine = stale @ fresh / np.linalg.norm(stale) / np.linalg.norm(fresh)
    np.testing.assert_allclose(measured.cosine, cosine, rtol=1e-13)
    assert cosine < 0.999


def test_relative_norm_and_cosine_where_a_gradient_vanishes():
    def gradient(learner, behavior):
        return behavior - 1.0 + 0 * learner

    measured = jax.jit(lambda behavior: bias.surrogate_bias(gradient, jnp.ones(2), behavior))
    only_stale = measured(np.array([1.0, 3.0]))
    assert only_stale.norm == 2 and np.isinf(only_stale.relative_norm) and np.isnan(only_stale.cosine)
    neither = measured(np.ones(2))
    assert neither.norm == neither.relative_norm == 0


# -- by role -------------------------------------------------------------------------------------------------------------------

LOSSES = {"clip": ppo_clip, "importance sampling": importance_sampling, "reinforce": reinforce}
ONE_HOT = dict(zip(LOSSES, np.eye(len(LOSSES)), strict=True))
UNCLIPPED = {"clip": "importance sampling", "importance sampling": "importance sampling", "reinforce": "reinforce"}


def chosen_loss(logprobs, old_logprobs, advantages, mask, **weights):
    """Weights that are 1 for one loss and 0 for the others choose it without another compilation."""
    return sum(weights[name] * loss_fn(logprobs, old_logprobs, advantages, mask) for name, loss_fn in LOSSES.items())


@functools.cache
def compiled_parts(name):
    policy, _, _, task = case(name)
    shape = (*task.rewards.shape, task.mask.shape[-1])

    def gradient_of_roles(weights):
        loss_inputs = {loss: jnp.full(shape, w) for loss, w in zip(LOSSES, weights, strict=True)}

        def gradient(learner, sampling, denominator, statistics):
            roles = dict(sampling_params=sampling, statistics_params=statistics)
            options = dict(loss_fn=chosen_loss, loss_inputs=loss_inputs, **roles, **ALGORITHM)
            return exact.surrogate_gradient(policy, learner, denominator, task, **options)

        return gradient

    def compute(learner_params, behavior_params, weights, unclipped_weights):
        of_roles, unclipped = gradient_of_roles(weights), gradient_of_roles(unclipped_weights)

        def gradient(learner, behavior):
            return of_roles(learner, behavior, behavior, behavior)

        return (
            bias.decompose(of_roles, unclipped, learner_params, behavior_params),
            bias.role_jvps(of_roles, learner_params, behavior_params),
            bias.surrogate_bias(gradient, learner_params, behavior_params),
            bias.first_order_bias(gradient, learner_params, behavior_params, check=False),
        )

    return jax.jit(compute)


@functools.cache
def parts_of(name, loss, drift):
    """(BiasParts, role jvps, SurrogateBias, first-order bias) at a drift along the case's direction."""
    _, params, direction, _ = case(name)
    behavior_params = moved(params, drift, direction)
    return compiled_parts(name)(params, behavior_params, ONE_HOT[loss], ONE_HOT[UNCLIPPED[loss]])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ("tabular", "bandit"))
def test_role_jvps_sum_to_the_first_order_law(name, loss):
    _, jvps, _, first_order = parts_of(name, loss, 0.05)
    assert set(jvps) == set(ROLES)
    assert relative_difference(total(jvps.values()), first_order) < 1e-10
    for role, jvp in jvps.items():
        if (role, loss) == ("denominator", "reinforce"):
            assert norm(jvp) == 0
        else:
            assert norm(jvp) > 0.1 * norm(first_order), role


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("drift", (0.05, 2.0))
def test_parts_sum_to_the_bias(loss, drift):
    parts, _, measured, _ = parts_of("tabular", loss, drift)
    delta = measured.bias
    assert norm(delta) > 1e-5
    assert relative_difference(parts.total, delta) < 1e-12
    assert relative_difference(total([parts.sampling, parts.denominator, parts.statistics, parts.clip]), delta) < 1e-12
    assert (norm(parts.denominator) == 0) == (loss == "reinforce")


def test_spread_and_interactions_are_second_order_and_shares_first():
    drifts = np.geomspace(1e-4, 1e-2, 5)
    measured = [parts_of("tabular", "clip", drift)[0] for drift in drifts]
    assert abs(slope(drifts, [parts.interaction_norm for parts in measured]) - 2) < 0.01
    for role in ROLES:
        assert abs(slope(drifts, [parts.order_spread[role] for parts in measured]) - 2) < 0.01, role
        assert abs(slope(drifts, [norm(getattr(parts, role)) for parts in measured]) - 1) < 0.01, role


@pytest.mark.parametrize("loss", LOSSES)
def test_each_share_is_its_role_jvp_to_first_order(loss):
    parts, jvps, _, _ = parts_of("tabular", loss, 1e-4)
    for role in set(ROLES) - ({"denominator"} if loss == "reinforce" else set()):
        assert relative_difference(getattr(parts, role), jvps[role]) < 1e-3, role


@pytest.mark.parametrize("drift, clipped", [(0.05, False), (2.0, True)])
def test_clip_part_is_zero_until_a_ratio_leaves_the_range(drift, clipped):
    policy, params, direction, task = case("tabular")
    logprobs = jax.jit(functools.partial(exact.task_logprobs, policy, task=task))
    log_ratio = logprobs(params) - logprobs(moved(params, drift, direction))
    assert (np.exp(np.abs(log_ratio)).max() > 1.2) == clipped  # ε = 0.2
    parts, _, measured, _ = parts_of("tabular", "clip", drift)
    assert norm(parts.clip) > 0.1 * measured.norm if clipped else norm(parts.clip) <= 1e-16
    for loss in ("importance sampling", "reinforce"):
        assert norm(parts_of("tabular", loss, drift)[0].clip) <= 1e-16


def test_sampling_and_denominator_cancel_for_one_token_without_clip():
    def sum_over_share(name, loss):
        _, jvps, _, _ = parts_of(name, loss, 0.05)
        return norm(total([jvps["sampling"], jvps["denominator"]])) / norm(jvps["sampling"])

    # L = 1: π_φ(y)·π_θ(y)/π_φ(y) does not depend on φ; with two tokens a ratio divides by its own token only
    assert sum_over_share("bandit", "importance sampling") < 1e-12
    assert sum_over_share("tabular", "importance sampling") > 0.1
    assert sum_over_share("bandit", "reinforce") == 1
    # the Shapley shares cancel in second order too, the pairs of roles being split evenly
    drifts = np.geomspace(1e-3, 1e-2, 3)
    shares = [parts_of("bandit", "importance sampling", drift)[0] for drift in drifts]
    assert abs(slope(drifts, [norm(total([parts.sampling, parts.denominator])) for parts in shares]) - 3) < 0.05


def test_shapley_shares_of_a_known_game():
    # H = a + 2b + 4c + 8ab + 16abc in the roles (a, b, c), all 1 when stale: a pair is split in halves, a triple in thirds
    def gradient(learner, a, b, c):
        return learner + a + 2 * b + 4 * c + 8 * a * b + 16 * a * b * c

    def clipped(learner, a, b, c):
        return 0.5 * gradient(learner, a, b, c)

    parts = jax.jit(functools.partial(bias.decompose, clipped, gradient))(np.zeros(1), np.ones(1))
    np.testing.assert_allclose([parts.sampling, parts.denominator, parts.statistics], np.c_[[1 + 4, 2 + 4, 4]] + 16 / 3)
    np.testing.assert_allclose([parts.total, parts.clip], [[31 / 2], [-31 / 2]])
    np.testing.assert_allclose(parts.interaction_norm, 8 + 16)
    # marginal shares of c are 4, 4, 4, 4 and twice 4 + 16 over the six orders
    np.testing.assert_allclose(parts.order_spread["statistics"], np.std([4, 4, 4, 4, 20, 20]))
    np.testing.assert_allclose(parts.order_spread["sampling"], np.std([1, 1, 9, 1, 25, 25]))


# -- the guard of the first-order law ------------------------------------------------------------------------------------------


def hidden_cispo(logprobs, old_logprobs, advantages, mask):
    return -jax.lax.stop_gradient(jnp.exp(logprobs - old_logprobs)) * advantages[..., None] * logprobs * mask


def detached_cispo(logprobs, old_logprobs, advantages, mask, *, detached_logprobs):
    return -jnp.exp(detached_logprobs - old_logprobs) * advantages[..., None] * logprobs * mask


def capped_at_one(logprobs, old_logprobs, advantages, mask, *, detached_logprobs):
    return -jnp.minimum(jnp.exp(detached_logprobs - old_logprobs), 1.0) * advantages[..., None] * logprobs * mask


def absolute_penalty(logprobs, old_logprobs, advantages, mask):
    return reinforce(logprobs, old_logprobs, advantages, mask) + 0.1 * abs_kl(logprobs, old_logprobs, mask)


def small_gradient(loss_fn):
    """H of one prompt, three actions and four logits."""
    task = tasks.bandit([[0, 0.5, 1.0]])
    policy = policies.from_logits(lambda logits, tokens: jnp.broadcast_to(logits, (*tokens.shape, 4)))

    def gradient(learner_params, behavior_params):
        return exact.surrogate_gradient(policy, learner_params, behavior_params, task, loss_fn=loss_fn, **ALGORITHM)

    return gradient


LOGITS, DIRECTION = jnp.array([0.3, -0.2, 0.5, 0.0]), jnp.array([1.0, -0.5, 0.2, 0.0])


@pytest.mark.parametrize("loss_fn", [ppo_clip, importance_sampling, reinforce, detached_cispo])
def test_guard_passes_losses_with_a_first_order_law(loss_fn):
    bias.check_first_order(small_gradient(loss_fn), LOGITS, DIRECTION)


@pytest.mark.parametrize(
    "loss_fn, reason",
    [(hidden_cispo, "stop_gradient.*detached_logprobs"), (capped_at_one, "kink"), (absolute_penalty, "kink")],
)
def test_guard_names_what_breaks_the_law(loss_fn, reason):
    with pytest.raises(bias.FirstOrderError, match=reason):
        bias.first_order_bias(small_gradient(loss_fn), LOGITS, LOGITS + 1e-3 * DIRECTION)


def test_detached_log_probs_change_no_gradient_and_make_it_differentiable_in_the_learner():
    def gradient_and_error(loss_fn):
        gradient = functools.partial(small_gradient(loss_fn), behavior_params=LOGITS + 0.3 * DIRECTION)

        @jax.jit
        def compute(learner):
            jvp = jax.jvp(gradient, (learner,), (DIRECTION,))[1]
            at, forward, backward = jax.lax.map(lambda h: gradient(learner + h * DIRECTION), jnp.array([0.0, 1e-5, -1e-5]))
            central = (forward - backward) / 2e-5
            return at, jnp.linalg.norm(jvp - central) / jnp.linalg.norm(central)

        return compute(LOGITS)

    hidden, hidden_error = gradient_and_error(hidden_cispo)
    detached, detached_error = gradient_and_error(detached_cispo)
    np.testing.assert_allclose(detached, hidden, rtol=1e-13, atol=1e-16)
    assert detached_error < 1e-8
    assert hidden_error > 0.1


def test_detached_part_stays_fixed_in_the_array_level_gradient_and_in_the_total_one():
    task = tasks.bandit([[0, 0.5, 1.0]])
    policy = policies.from_logits(lambda logits, tokens: jnp.broadcast_to(logits, (*tokens.shape, 4)))

    def fixed_total(logits, loss_fn):
        return exact.total_gradient(policy, logits, task, loss_fn=loss_fn, **ALGORITHM)

    def stops_the_learner(logprobs, old_logprobs, advantages, mask):
        return detached_cispo(logprobs, old_logprobs, advantages, mask, detached_logprobs=jax.lax.stop_gradient(logprobs))

    expected = fixed_total(LOGITS, stops_the_learner)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(fixed_total(LOGITS, detached_cispo), expected, rtol=1e-13, atol=1e-16)


def test_guard_is_the_default_and_can_be_left_out():
    def hides(learner, behavior):
        return learner + jax.lax.stop_gradient(behavior)

    at = jnp.array([3.0, 4.0])
    with pytest.raises(bias.FirstOrderError, match="stop_gradient"):
        bias.first_order_bias(hides, at, at + 1e-6)
    np.testing.assert_array_equal(bias.first_order_bias(hides, at, at + 1e-6, check=False), [0, 0])
    np.testing.assert_array_equal(bias.first_order_bias(hides, at, at), [0, 0])  # no direction to check along


def test_guard_takes_its_tolerance_and_step_and_any_length_of_the_direction():
    def hides_a_hundredth(learner, behavior):
        return behavior + 0.01 * jax.lax.stop_gradient(behavior)

    at, direction = jnp.array([3.0, 4.0]), jnp.array([1e-6, 0.0])
    with pytest.raises(bias.FirstOrderError, match="misses 1.0%"):
        bias.check_first_order(hides_a_hundredth, at, direction)
    bias.check_first_order(hides_a_hundredth, at, direction, tolerance=0.05)

    def bends_at_a_distance(learner, behavior):
        return jnp.clip(behavior - learner, -0.01, 0.01)

    bias.check_first_order(bends_at_a_distance, at, direction)
    with pytest.raises(bias.FirstOrderError):
        bias.check_first_order(bends_at_a_distance, at, direction, step=0.1)


def test_guard_refuses_a_direction_it_cannot_walk_and_a_gradient_that_is_not_finite():
    def smooth(learner, behavior):
        return jnp.exp(behavior) * learner

    at = jnp.array([3.0, 4.0])
    for direction in (jnp.zeros(2), jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0])):
        with pytest.raises(ValueError, match="direction has length"):
            bias.check_first_order(smooth, at, direction)
    with pytest.raises(bias.FirstOrderError, match="not finite"):
        bias.check_first_order(lambda learner, behavior: jnp.sqrt(learner - behavior), at, jnp.ones(2))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2, jnp.bfloat16)}, r"^learner_params\['w'\] is bfloat16; .* needs float32 or float64 arrays$"),
        ({"w": np.ones(2, np.float16)}, r"^learner_params\['w'\] is float16"),
        ({"w": np.ones(2), "n": np.arange(2)}, r"^learner_params\['n'\] is int64"),
        ({"w": 1.0}, r"^learner_params\['w'\] is float; "),
        ({}, "^learner_params has no leaves"),
    ],
)
def test_guard_refuses_parameters_it_cannot_difference(params, message):
    with pytest.raises(ValueError, match=message):
        bias.check_first_order(lambda learner, behavior: behavior, params, params)


@pytest.mark.parametrize("step", [0, 0.0, -1e-3, np.nan, np.inf])
def test_guard_refuses_a_step_that_is_no_distance(step):
    with pytest.raises(ValueError, match=f"^step is {step}; "):
        bias.check_first_order(lambda learner, behavior: behavior, np.ones(2), np.ones(2), step=step)


def test_params_that_do_not_match_are_named():
    def gradient(learner, behavior):
        return behavior

    theta = {"table": np.ones((2, 3))}
    for call in (bias.surrogate_bias, bias.first_order_bias, bias.role_jvps, functools.partial(bias.decompose, gradient)):
        with pytest.raises(ValueError, match=r"^behavior_params\['table'\] has shape \(3,\); learner_params\['table'\] has"):
            call(gradient, theta, {"table": np.ones(3)})
        with pytest.raises(ValueError, match="^behavior_params has the structure .*; that of learner_params is "):
            call(gradient, theta, {"tables": np.ones((2, 3))})
        with pytest.raises(ValueError, match="^learner_params has no leaves"):
            call(gradient, {}, {})


def test_guard_works_in_single_precision():
    def smooth(learner, behavior):
        return jnp.exp(behavior) * learner

    def bent(learner, behavior):
        return jnp.maximum(behavior, learner)

    at, direction = jnp.array([0.3, -0.4], jnp.float32), jnp.array([1.0, 2.0], jnp.float32)
    bias.check_first_order(smooth, at, direction)
    with pytest.raises(bias.FirstOrderError, match="kink"):
        bias.check_first_order(bent, at, direction)
