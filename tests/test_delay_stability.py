"""Thresholds of delayed linear systems: closed forms, companion and cycle matrices, simulation, and one exact bandit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, exact, losses, scaling
from jax_async_grpo.delay_stability import (
    companion_matrix,
    cycle_matrix,
    delay_stability,
    delay_stability_matrix_free,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "laws" / "delay_stability.md"


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


def stable_pair(seed, dimension, ratio=1.0):
    """Random A, B, unsymmetric, with A + B stable; `ratio` scales B."""
    rng = np.random.default_rng(seed)
    learner = rng.standard_normal((dimension, dimension))
    behavior = ratio * rng.standard_normal((dimension, dimension))
    shift = np.linalg.eigvals(learner + behavior).real.max() + rng.uniform(0.1, 2)
    return learner - shift * np.eye(dimension), behavior


def log_growth(learner, behavior, lags, rate, seed=0):
    """Log growth per update of x_{t+1} = x_t + η(A x_t + B x_{t−lags[t]}) over the second half, in plain NumPy."""
    versions = int(np.max(lags)) + 1
    past = list(np.random.default_rng(seed).standard_normal((versions, len(learner))))
    total = 0.0
    for step, lag in enumerate(lags):
        past = [past[0] + rate * (learner @ past[0] + behavior @ past[lag]), *past[:-1]]
        norm = np.linalg.norm(past)
        past = [x / norm for x in past]
        total += np.log(norm) * (step >= len(lags) // 2)
    return total / (len(lags) - len(lags) // 2)


@pytest.mark.parametrize("staleness", [0, 1, 2, 3, 8, 17, 64])
def test_one_parameter_without_importance_sampling_has_closed_forms(staleness):
    fixed = delay_stability([[0.0]], [[-1.7]], staleness)
    assert fixed.max_learning_rate == pytest.approx(2 / 1.7 * np.sin(np.pi / (2 * (2 * staleness + 1))), rel=1e-12)
    assert fixed.frequency == pytest.approx(np.pi / (2 * staleness + 1), rel=1e-10)
    periodic = delay_stability([[0.0]], [[-1.7]], staleness, schedule="periodic")
    assert periodic.max_learning_rate == pytest.approx(2 / (1.7 * (staleness + 1)), rel=1e-10)
    assert fixed.verified and fixed.must_fall_with_staleness and fixed.behavior_dominates


@pytest.mark.parametrize("schedule", ["fixed", "periodic", "random"])
def test_without_staleness_every_schedule_is_the_synchronous_one(schedule):
    root = np.random.default_rng(0).standard_normal((4, 4))
    symmetric = -root @ root.T - 0.1 * np.eye(4)
    result = delay_stability(0.3 * symmetric, 0.7 * symmetric, 0, schedule=schedule)
    assert result.max_learning_rate == pytest.approx(2 / np.abs(np.linalg.eigvalsh(symmetric)).max(), rel=1e-9)
    learner, behavior = stable_pair(1, 5)
    values = np.linalg.eigvals(learner + behavior)
    result = delay_stability(learner, behavior, 0, schedule=schedule)
    assert result.max_learning_rate == pytest.approx((-2 * values.real / np.abs(values) ** 2).min(), rel=1e-9)


@pytest.mark.parametrize("staleness", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_fixed_lag_is_the_first_crossing_of_the_companion_matrix(ratio, staleness):
    for dimension in (3, 4, 5, 6):
        learner, behavior = stable_pair(dimension, dimension, ratio)
        rate = delay_stability(learner, behavior, staleness).max_learning_rate
        below = [radius(companion_matrix(learner, behavior, staleness, rate * x)) for x in np.linspace(0.02, 0.9999, 25)]
        assert max(below) < 1
        assert radius(companion_matrix(learner, behavior, staleness, rate)) == pytest.approx(1, abs=1e-9)
        assert radius(companion_matrix(learner, behavior, staleness, rate * 1.001)) > 1


@pytest.mark.parametrize("sync_interval", [2, 3, 6, 9])
def test_periodic_is_the_first_crossing_of_the_cycle_matrix(sync_interval):
    for dimension, ratio in itertools.product((3, 6), (0.2, 3.0)):
        learner, behavior = stable_pair(dimension, dimension, ratio)
        rate = delay_stability(learner, behavior, sync_interval - 1, schedule="periodic").max_learning_rate
        below = [radius(cycle_matrix(learner, behavior, sync_interval, rate * x)) for x in np.linspace(0.005, 0.9999, 200)]
        assert max(below) < 1
        assert radius(cycle_matrix(learner, behavior, sync_interval, rate)) == pytest.approx(1, abs=1e-9)


def test_cycle_and_companion_matrices_are_the_recursion():
    learner, behavior = stable_pair(0, 3)
    rate, start = 0.1, np.array([1.0, -2.0, 0.5])
    x = start
    for _ in range(4):
        x = x + rate * (learner @ x + behavior @ start)
    np.testing.assert_allclose(cycle_matrix(learner, behavior, 4, [rate, 0.2])[0] @ start, x, rtol=1e-12)
    past = np.random.default_rng(0).standard_normal((3, 3))
    fresh = past[0] + rate * (learner @ past[0] + behavior @ past[2])
    stepped = companion_matrix(learner, behavior, 2, rate) @ past.ravel()
    np.testing.assert_allclose(stepped, np.concatenate([fresh, past[0], past[1]]), rtol=1e-12)


@pytest.mark.parametrize("schedule", ["fixed", "periodic"])
@pytest.mark.parametrize("staleness", [1, 4, 7])
def test_simulation_decays_one_percent_below_and_grows_one_percent_above(schedule, staleness):
    for ratio in (0.3, 2.0):
        learner, behavior = stable_pair(7, 3, ratio)
        rate = delay_stability(learner, behavior, staleness, schedule=schedule).max_learning_rate
        steps = np.arange(1500 * (staleness + 1) // 2)
        lags = np.minimum(staleness if schedule == "fixed" else steps % (staleness + 1), steps)
        assert log_growth(learner, behavior, lags, 0.99 * rate) < 0 < log_growth(learner, behavior, lags, 1.01 * rate)


def test_one_parameter_falls_with_staleness_only_where_the_behavior_derivative_is_larger():
    for learner, behavior in [(-1.0, -0.9), (-1.0, 0.9), (-2.0, -0.1)]:
        results = [delay_stability([[learner]], [[behavior]], staleness) for staleness in (1, 2, 5, 8, 21, 64)]
        assert all(r.max_learning_rate >= 2 / (abs(learner) + abs(behavior)) * (1 - 1e-12) for r in results)
        assert not any(r.must_fall_with_staleness or r.behavior_dominates for r in results)
    for learner, behavior in [(-0.9, -1.0), (0.0, -1.0), (0.3, -1.0)]:
        first, second = (delay_stability([[learner]], [[behavior]], staleness) for staleness in (300, 600))
        slope = np.log2(second.max_learning_rate / first.max_learning_rate)
        assert first.must_fall_with_staleness and slope == pytest.approx(-1, abs=0.01)


def test_stability_at_every_phase_bounds_the_threshold_from_below_for_every_staleness():
    for seed in range(6):
        learner, behavior = stable_pair(seed, 4, 0.5)
        learner = learner - 2.5 * np.eye(4)
        for staleness in (1, 4, 9, 30):
            result = delay_stability(learner, behavior, staleness)
            assert result.growth_bound < 0
            bound = 2 * -result.growth_bound / (result.learner_norm + result.behavior_norm) ** 2
            assert result.max_learning_rate >= bound


def test_a_slow_mode_can_force_the_fall_although_the_norm_of_a_is_larger():
    learner, behavior = np.diag([-10.0, -0.1]), -np.eye(2)
    first, second = (delay_stability(learner, behavior, staleness) for staleness in (100, 200))
    assert first.must_fall_with_staleness and not first.behavior_dominates
    assert np.log2(second.max_learning_rate / first.max_learning_rate) == pytest.approx(-1, abs=0.02)
    assert first.growth_bound == pytest.approx(0.9, rel=1e-9)


@pytest.mark.parametrize("schedule", ["fixed", "periodic"])
def test_thresholds_do_not_depend_on_the_basis_and_scale_inversely_with_the_field(schedule):
    learner, behavior = stable_pair(3, 4)
    basis = np.random.default_rng(1).standard_normal((4, 4))
    reference = delay_stability(learner, behavior, 3, schedule=schedule).max_learning_rate
    for change in (basis, 1e-6 * np.eye(4)):
        turned = (np.linalg.inv(change) @ matrix @ change for matrix in (learner, behavior))
        assert delay_stability(*turned, 3, schedule=schedule).max_learning_rate == pytest.approx(reference, rel=1e-8)
    small = delay_stability(1e-5 * learner, 1e-5 * behavior, 3, schedule=schedule).max_learning_rate
    assert small == pytest.approx(1e5 * reference, rel=1e-8)


def with_gauge(kind, matrix, rng):
    """[5, 5] with the dynamics of `matrix` [3, 3] and two gauge modes, seen from a skewed basis."""
    full = np.zeros((5, 5))
    full[:3, :3] = matrix
    if kind == "right":
        full[3:, :3] = rng.standard_normal((2, 3))  # the gauge coordinates are driven but drive nothing
    if kind == "left":
        full[:3, 3:] = rng.standard_normal((3, 2))  # they drive and never move
    basis = np.random.default_rng(5).standard_normal((5, 5))
    return basis @ full @ np.linalg.inv(basis)


@pytest.mark.parametrize("kind", ["both", "right", "left"])
@pytest.mark.parametrize("schedule", ["fixed", "periodic"])
def test_gauge_modes_do_not_change_the_threshold(kind, schedule):
    rng = np.random.default_rng(0)
    learner, behavior = stable_pair(2, 3)
    result = delay_stability(with_gauge(kind, learner, rng), with_gauge(kind, behavior, rng), 3, schedule=schedule)
    reference = delay_stability(learner, behavior, 3, schedule=schedule)
    assert (result.num_gauge_modes, reference.num_gauge_modes) == (2, 0)
    assert result.max_learning_rate == pytest.approx(reference.max_learning_rate, rel=1e-8)


@pytest.mark.parametrize(
    "learner, behavior, rate, reason",
    [
        (np.diag([-1.0, 0.5]), np.diag([0.0, -0.4]), 0.0, "real part 0.1 > 0"),
        (np.diag([-1.0, -1.0]), np.diag([0.0, 1.0]), 0.0, "marginal"),
        (np.array([[0.0, 1.0], [-1.0, 0.0]]), np.zeros((2, 2)), 0.0, "marginal"),
        (np.zeros((2, 2)), np.zeros((2, 2)), np.inf, "gauge"),
        (-np.eye(3) + np.eye(3, k=1), np.zeros((3, 3)), 2.0, "−1"),  # defective: rounding splits it off the real axis
        (-np.eye(3), 0.5 * np.eye(3), 4 / 3, "period"),
    ],
)
def test_the_reason_is_named(learner, behavior, rate, reason):
    result = delay_stability(learner, behavior, 1)
    if "period" not in reason:
        assert result.max_learning_rate == pytest.approx(rate, rel=1e-4)
        assert reason in result.reason
    else:
        alone = delay_stability(learner[:1, :1], behavior[:1, :1], 1)
        assert result.max_learning_rate == pytest.approx(alone.max_learning_rate, rel=1e-9)


def test_random_lag_changes_sign_in_an_independent_simulation_and_obeys_the_mean_square_bound():
    for learner, behavior, staleness in [(np.zeros((1, 1)), -np.eye(1), 4), (*stable_pair(4, 3, 1.5), 2)]:
        result = delay_stability(learner, behavior, staleness, schedule="random", num_steps=3000)
        rate = result.max_learning_rate
        assert 0 < result.standard_error < 0.01 * rate
        lags = np.random.default_rng(99).integers(0, staleness + 1, 16000)
        assert log_growth(learner, behavior, lags, 0.95 * rate) < 0 < log_growth(learner, behavior, lags, 1.05 * rate)
        assert result.mean_square_learning_rate <= rate + 3 * result.standard_error
        lifted = 0
        for lag in range(staleness + 1):
            step = companion_matrix(0 * learner, 0 * behavior, staleness, 0.0)
            n = len(learner)
            step[:n, :n] += result.mean_square_learning_rate * learner
            step[:n, n * lag : n * lag + n] += result.mean_square_learning_rate * behavior
            lifted = lifted + np.kron(step, step) / (staleness + 1)
        assert radius(lifted) == pytest.approx(1, abs=1e-6)


def test_random_lag_of_one_parameter_gives_the_known_numbers():
    result = delay_stability([[0.0]], [[-1.0]], 4, schedule="random", num_steps=2000)
    assert result.max_learning_rate == pytest.approx(1.05, abs=0.02)
    assert result.mean_square_learning_rate == pytest.approx(0.668, abs=0.001)


def test_random_lag_falls_with_staleness_only_where_the_averaged_delay_can_oscillate():
    """sin(u)/u = −a/b has a root for b > 4.60 a only; with a = 0 it is u = π and η_max ≈ π²/(2bS)."""

    def rate(learner, behavior, staleness):
        options = dict(schedule="random", num_chains=8, num_steps=2000)
        return delay_stability([[learner]], [[behavior]], staleness, **options).max_learning_rate

    assert rate(-1.0, -10.0, 100) / rate(-1.0, -10.0, 50) == pytest.approx(0.5, abs=0.03)
    assert rate(-1.0, -3.0, 100) / rate(-1.0, -3.0, 50) > 0.9
    assert rate(0.0, -1.0, 50) == pytest.approx(np.pi**2 / 100, rel=0.06)


@pytest.mark.parametrize("schedule", ["fixed", "periodic"])
def test_matrix_free_is_the_dense_answer(schedule):
    learner, behavior = stable_pair(11, 14, 0.5)
    # a gauge mode, left and right
    gauge = np.eye(14) - np.ones((14, 14)) / 14
    learner, behavior = gauge @ learner @ gauge, gauge @ behavior @ gauge
    learner -= 1.5 * gauge
    dense = delay_stability(learner, behavior, 2, schedule=schedule)
    calls = []

    def product(matrix):
        return lambda v: calls.append(v.dtype) or matrix @ v

    options = dict(schedule=schedule, num_eigenvalues=5, points_per_turn=16)
    free = delay_stability_matrix_free(product(learner), product(behavior), 14, 2, **options)
    assert dense.num_gauge_modes == 1 and 0 < dense.max_learning_rate < np.inf
    assert free.max_learning_rate == pytest.approx(dense.max_learning_rate, rel=1e-8)
    assert free.frequency == pytest.approx(dense.frequency, rel=1e-6)
    assert free.must_fall_with_staleness == dense.must_fall_with_staleness and free.behavior_dominates is None
    assert set(calls) == {np.dtype(np.float64)}
    small = delay_stability_matrix_free(product(learner), product(behavior), 14, 2, schedule=schedule, num_eigenvalues=6)
    assert small.max_learning_rate == pytest.approx(dense.max_learning_rate, rel=1e-12)


def equilibrium_jacobians(loss_fn, decay=0.04):
    """A and B of the softmax bandit with rewards 0, 0, 0, 1, G = 8 and L2 decay where Newton's method finds F(θ,θ) = 0."""
    rewards = jnp.array([[0.0, 0.0, 0.0, 1.0]])

    def logprobs(logits):
        return jax.nn.log_softmax(logits)[None, :, None]

    def field(learner, behavior):
        def objective(params):
            return exact.surrogate_objective(
                logprobs(params),
                logprobs(behavior),
                rewards,
                group_size=8,
                loss_fn=loss_fn,
                advantage_fn=advantages.group_normalized,
                reward_levels=(0.0, 1.0),
            )

        return jax.grad(objective)(learner) - decay * learner

    @jax.jit
    def at(params):
        return field(params, params), jax.jacfwd(field, 0)(params, params), jax.jacfwd(field, 1)(params, params)

    params = 2.0 * rewards[0]
    for _ in range(8):
        value, learner, behavior = at(params)
        params = params - jnp.linalg.solve(learner + behavior, value)
    assert np.abs(at(params)[0]).max() < 1e-12
    return tuple(np.asarray(matrix) for matrix in at(params)[1:])


def test_importance_sampling_removes_the_fall_with_staleness_of_an_exact_bandit():
    staleness = np.array([4, 5, 8, 9, 16, 17, 32, 33])
    slopes, thresholds = {}, {}
    for loss_fn in (losses.reinforce, losses.importance_sampling):
        jacobians = equilibrium_jacobians(loss_fn)
        results = [delay_stability(*jacobians, int(s)) for s in staleness]
        thresholds[loss_fn] = np.array([r.max_learning_rate for r in results])
        slopes[loss_fn] = np.polyfit(np.log(staleness), np.log(thresholds[loss_fn]), 1)[0]
        assert {r.must_fall_with_staleness for r in results} == {loss_fn is losses.reinforce}
        assert {r.behavior_dominates for r in results} == {loss_fn is losses.reinforce}
    assert slopes[losses.reinforce] == pytest.approx(-0.94, abs=0.03)
    assert slopes[losses.importance_sampling] == pytest.approx(-0.05, abs=0.03)
    # with importance sampling −1 is the critical multiplier at odd S: η_max is 2 over the largest eigenvalue of B − A
    assert thresholds[losses.importance_sampling][1::2] == pytest.approx(10.31, abs=0.01)


def test_scaling_hands_the_function_on():
    assert scaling.delay_stability is delay_stability
    assert scaling.delay_stability_matrix_free is delay_stability_matrix_free


def test_the_document_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), str(DOCUMENT), "exec"), {"__name__": "delay_stability_document"})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learner_jacobian=np.ones((2, 3))), r"learner_jacobian has shape \(2, 3\)"),
        (dict(behavior_jacobian=[1.0]), r"behavior_jacobian has shape \(1,\)"),
        (dict(behavior_jacobian=-np.eye(3)), r"\(2, 2\) and behavior_jacobian \(3, 3\)"),
        (dict(learner_jacobian=np.full((2, 2), np.nan)), "learner_jacobian must hold finite"),
        (dict(behavior_jacobian=1j * np.eye(2)), "behavior_jacobian must hold finite real"),
        (dict(learner_jacobian=np.zeros((0, 0))), "learner_jacobian has shape"),
        (dict(learner_jacobian=[["a", "b"], ["c", "d"]]), "learner_jacobian must hold finite real"),
        (dict(staleness=-1), "staleness=-1"),
        (dict(staleness=1.5), "staleness=1.5"),
        (dict(staleness=True), "staleness=True"),
        (dict(schedule="weekly"), "schedule='weekly' must be one of fixed, periodic, random"),
        (dict(gauge_tolerance=0.0), "gauge_tolerance=0.0"),
        (dict(num_chains=1), "num_chains=1"),
        (dict(num_steps=1), "num_steps=1"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_errors_name_the_argument_in_one_line(change, message):
    arguments = dict(learner_jacobian=-np.eye(2), behavior_jacobian=-np.eye(2), staleness=1) | change
    with pytest.raises(ValueError, match=message) as error:
        delay_stability(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(learner_jvp=lambda v: v[:-1]), "learner_jvp returned shape"),
        (dict(behavior_jvp=lambda v: v * np.nan), "behavior_jvp returned"),
        (dict(dimension=0), "dimension=0"),
        (dict(schedule="random"), "use delay_stability"),
        (dict(tolerance=0.0), "tolerance=0.0"),
        (dict(points_per_turn=2), "points_per_turn=2"),
    ],
)
def test_matrix_free_errors_name_the_argument_in_one_line(change, message):
    arguments = dict(learner_jvp=lambda v: -v, behavior_jvp=lambda v: -v, dimension=30, staleness=1) | change
    with pytest.raises(ValueError, match=message) as error:
        delay_stability_matrix_free(**arguments)
    assert "\n" not in str(error.value)
