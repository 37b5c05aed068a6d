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
    radius = diagnostics.batch_clip_radius(case, *drifted, level=level, epsilons=(0.2, 0.3))
    radii = np.linspace(0, 4, 8001)
    fractions = np.asarray(_clip_fractions(case, drifted)(radii))
    assert fractions[0] == 0 and fractions.max() > level
    first = radii[np.argmax(fractions >= level)]
    assert first - (radii[1] - radii[0]) <= radius <= first * (1 + 1e-4)


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


def test_invariants_hold_along_the_way(case, drifted):
    violations = diagnostics.invariant_violations(case, drifted[0])
    assert set(violations) == {
        "recorded_behavior_logprobs",
        "unit_ratio_at_zero_staleness",
        "zero_sum_advantages",
        "no_behavior_gradient",
    }
    assert max(violations.values()) < 1e-5


def test_a_leaked_gradient_is_seen_by_the_job(case, drifted, monkeypatch):
    def leaking(policy, learner_params, behavior_params, task, **algorithm):
        del behavior_params
        return exact.total_gradient(policy, learner_params, task, **algorithm)

    monkeypatch.setattr(exact, "surrogate_gradient", leaking)
    assert diagnostics.invariant_violations(case, drifted[0])["no_behavior_gradient"] > 0.1


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
    assert unmeasured["largest_drift"] is None


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
