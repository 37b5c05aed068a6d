"""What the job measures once per case: R_batch against a dense scan, R_crit by the horizon law, response of H to drift."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.measure_bias import get_config
from jax_async_grpo import bias, diagnostics, exact, experiment, losses, sweeps
from jax_async_grpo.aggregation import sequence_sum


@pytest.fixture(scope="module")
def case():
    """The tabular case of the default config."""
    return experiment.build_case(get_config().to_dict(), "tabular")


@pytest.fixture(scope="module")
def drifted(case):
    """(θ, φ) after some updates: a realised drift."""

    @jax.jit
    def climb(params, num_updates):
        step = lambda _, p: optax.tree.add_scale(p, 0.1, case.gradient(p, p))  # noqa: E731
        return jax.lax.fori_loop(0, num_updates, step, params)

    return climb(case.params, 28), climb(case.params, 20)


def _clip_fractions(case, drifted):
    learner, behavior = drifted
    drift = optax.tree.sub(learner, behavior)
    unit = optax.tree.scale(1 / optax.tree.norm(drift), drift)

    @jax.jit
    def fractions(radii):
        return jax.lax.map(
            lambda radius: exact.clip_fraction(
                case.policy,
                optax.tree.add_scale(behavior, radius, unit),
                behavior,
                case.task,
                group_size=case.algorithm.group_size,
                advantage_fn=case.algorithm.advantage_fn,
                epsilon_low=0.2,
                epsilon_high=0.3,
            ),
            radii,
        )

    return fractions


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_batch_clip_radius_is_the_first_crossing_of_a_dense_scan(case, drifted, level):
    radius = diagnostics.batch_clip_radius(case, *drifted, level=level, epsilons=(0.2, 0.3))["batch_clip_radius"]
    radii = np.linspace(0, 4, 8001)
    fractions = np.asarray(_clip_fractions(case, drifted)(radii))
    assert fractions[0] == 0 and fractions.max() > level
    first = radii[np.argmax(fractions >= level)]
    assert first - (radii[1] - radii[0]) <= radius <= first * (1 + 1e-4)


def test_a_level_that_is_not_reached_says_how_far_it_was_looked_for(case, drifted):
    search = diagnostics.batch_clip_radius(case, *drifted, level=0.999999, epsilons=(0.2, 0.3))
    drift = optax.tree.norm(optax.tree.sub(*drifted))
    assert search == {"batch_clip_radius": np.inf, "largest_searched": pytest.approx(1000 * drift)}


def test_clip_fraction_is_the_mean_over_all_groups(case, drifted):
    learner, behavior = drifted
    small = dataclasses.replace(case.algorithm, group_size=3)
    far = optax.tree.add_scale(learner, 8.0, optax.tree.sub(learner, behavior))
    epsilons = dict(epsilon_low=0.1, epsilon_high=0.2)
    fraction = exact.clip_fraction(
        case.policy, far, behavior, case.task, group_size=3, advantage_fn=small.advantage_fn, **epsilons
    )
    brute = -jax.jit(
        lambda far, behavior: exact.brute_force_objective(
            exact.task_logprobs(case.policy, far, case.task),
            exact.task_logprobs(case.policy, behavior, case.task),
            case.task.rewards,
            case.task.mask,
            group_size=3,
            loss_fn=functools.partial(losses.clipped_tokens, **epsilons),
            advantage_fn=small.advantage_fn,
            aggregation_fn=sequence_sum,
        )
    )(far, behavior)
    np.testing.assert_allclose(fraction, brute, rtol=1e-10)  # one token a completion
    assert 0.01 < fraction < 1


def test_linear_response_and_parts_of_the_bias(case, drifted):
    response = diagnostics.linear_response(case, *drifted, staleness_x_learning_rate=0.8)
    assert abs(response["slope"] - 1) < 0.05
    assert response["relative_error_at_1e-3"] < 2e-4 < response["relative_error_at_realised_drift"]
    parts = diagnostics.decomposition(case, *drifted)
    assert abs(sum(parts["share"].values()) - 1) < 1e-9
    measured = jax.jit(functools.partial(bias.surrogate_bias, case.gradient))(*drifted)
    np.testing.assert_allclose(parts["norm"]["total"], measured.norm, rtol=1e-9)


def violated(case, violations) -> set[str]:
    """Names above the tolerance of the case."""
    allowed = diagnostics.tolerances(case.params)
    return {name for name, value in violations.items() if value != diagnostics.NOT_APPLICABLE and not value <= allowed[name]}


def test_invariants_hold_along_the_way(case, drifted):
    of_rollouts = diagnostics.rollout_violations(case)
    violations = diagnostics.invariant_violations(case, drifted[0], of_rollouts)
    assert set(violations) == {
        "recorded_behavior_logprobs",
        "unit_ratio_at_zero_staleness",
        "staleness_within_bound",
        "zero_sum_advantages",
        "no_behavior_gradient",
    }
    assert not violated(case, violations) and diagnostics.NOT_APPLICABLE not in violations.values()
    stale = of_rollouts(jax.random.key(1), *drifted, 28, 8)
    assert set(stale) == set(violations) - {"no_behavior_gradient"} and not violated(case, stale)
    # θ and φ mixed up: log-probs of the learner recorded for tokens of the behavior policy, or a fresh batch that is not
    assert violated(case, of_rollouts(jax.random.key(1), *drifted, 28, 0)) == {"unit_ratio_at_zero_staleness"}


class RecordsTheLearner(experiment.Case):
    """Draws from φ and records the log-probs of other parameters, as of the wrong version."""

    def rollouts(self, key, behavior_params, step, policy_version):
        rollouts = super().rollouts(key, behavior_params, step, policy_version - 1)
        return dataclasses.replace(rollouts, behavior_logprobs=rollouts.behavior_logprobs + 1e-9)


def test_wrong_records_of_stale_rollouts_are_seen(case, drifted):
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    wrong = RecordsTheLearner(**fields)
    violations = diagnostics.rollout_violations(wrong)(jax.random.key(1), *drifted, 28, 8)
    assert violated(case, violations) == {"recorded_behavior_logprobs", "staleness_within_bound"}


def test_float32_and_advantages_with_a_mean_are_no_violation(case, drifted):
    plain = dataclasses.replace(case.algorithm, advantage_fn=lambda rewards: rewards)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), drifted)
    other = dataclasses.replace(case, algorithm=plain, params=low[0])
    violations = diagnostics.rollout_violations(other)(jax.random.key(1), *low, 28, 8)
    assert violations["zero_sum_advantages"] == diagnostics.NOT_APPLICABLE and not violated(other, violations)
    assert violations["recorded_behavior_logprobs"] > 0  # float32 rounding, which float64 tolerances would not allow
    assert violated(case, violations) == {"recorded_behavior_logprobs"}


def test_a_leaked_gradient_is_seen_by_the_job(case, drifted, monkeypatch):
    def leaking(policy, learner_params, behavior_params, task, **algorithm):
        del behavior_params
        return exact.total_gradient(policy, learner_params, task, **algorithm)

    monkeypatch.setattr(exact, "surrogate_gradient", leaking)
    of_rollouts = diagnostics.rollout_violations(case)
    assert diagnostics.invariant_violations(case, drifted[0], of_rollouts)["no_behavior_gradient"] > 0.1


def test_collapse_comes_at_a_constant_product_of_step_and_learning_rate():
    config = get_config().to_dict()
    times, radii = [], []
    for learning_rate, updates in ((0.05, 800), (0.2, 200)):
        config["cases"]["proxy_gold"] |= dict(horizon_learning_rate=learning_rate, horizon_updates=updates)
        collapse = diagnostics.collapse_radius(experiment.build_case(config, "proxy_gold"), fraction=0.7)
        times.append(collapse["collapse_step"] * learning_rate)
        radii.append(collapse["critical_drift_radius"])
    assert abs(times[0] / times[1] - 1) < 0.03
    assert abs(radii[0] / radii[1] - 1) < 0.03


def test_without_a_proxy_nothing_collapses(case):
    config = dict(case.config) | dict(horizon_learning_rate=0.2, horizon_updates=200)
    collapse = diagnostics.collapse_radius(dataclasses.replace(case, config=config), fraction=0.7)
    assert collapse["critical_drift_radius"] == np.inf and collapse["collapse_step"] is None
    assert collapse["largest_drift"] > 1
    unmeasured = diagnostics.collapse_radius(case, fraction=0.7)
    assert set(unmeasured.values()) == {None}


@pytest.mark.parametrize("lost_at", [0, 50])
def test_a_run_that_stops_being_finite_has_collapsed(case, lost_at):
    config = dict(case.config) | dict(horizon_learning_rate=0.2, horizon_updates=200)

    def exploding(learning_rate):
        return optax.sgd(lambda count: jnp.where(count < lost_at, learning_rate, jnp.nan))

    broken = dataclasses.replace(case, config=config, optimizer_fn=exploding)
    collapse = diagnostics.collapse_radius(broken, fraction=0.7)
    assert collapse["finite"] is False and collapse["collapse_step"] == lost_at + 1
    if lost_at:  # at the last drift that was a number
        assert collapse["critical_drift_radius"] == collapse["largest_drift"] > 0.5
    else:  # before anything had moved
        assert collapse["critical_drift_radius"] is None


def test_response_of_the_gradient_to_drift_without_lag(case):
    capacity, learning_rate, steps = 4, 0.1, np.array([3, 7], np.int32)
    run = sweeps.response_msd(case.gradient, case.update_gradient("exact"), case.optimizer_fn, capacity=capacity)
    measured = run(case.params, learning_rate, jax.random.split(jax.random.key(0), 1), steps)
    assert measured.shape == (1, 2, capacity)

    @jax.jit
    def respond(params, version):
        direction = optax.tree.sub(version, params)
        return optax.tree.norm(bias.first_order_bias(case.gradient, params, optax.tree.add(params, direction), check=False))

    advance = jax.jit(lambda p: optax.tree.add_scale(p, learning_rate, case.gradient(p, p)))
    versions = [case.params]
    for _ in range(int(steps[-1])):
        versions.append(advance(versions[-1]))
    expected = [[respond(versions[t], versions[t - s]) ** 2 for s in range(capacity)] for t in steps]
    np.testing.assert_allclose(measured[0], jnp.array(expected), rtol=1e-8, atol=1e-20)
    assert measured[0, 0, 0] == 0
