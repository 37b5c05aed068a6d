"""Updates under lag read the version they should, grids repeat plain loops, and exact updates obey the law of the bias."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_async_grpo import bias, exact, policies, scaling, staleness, surrogate, sweeps, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.losses import ppo_clip
from jax_async_grpo.sampling import sample_enumerated
from jax_async_grpo.types import Policy, Task
from jax_async_grpo.update import create_state, update_step

START = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.3)}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


def toy_gradient(learner, behavior):
    """Nonlinear in both arguments, which it treats differently."""
    return {
        "w": jnp.sin(behavior["w"]) - 0.4 * learner["w"] * learner["b"],
        "b": jnp.sum(jnp.cos(behavior["w"]) * learner["w"]) - behavior["b"] ** 3,
    }


def toy_update_gradient(learner, behavior, step, policy_version):
    """Also of the step and of the version, as sampled gradients are."""
    return jax.tree.map(lambda leaf: leaf + 0.01 * step - 0.003 * policy_version, toy_gradient(learner, behavior))


def toy_reward(params):
    return {"J": -jnp.sum(params["w"] ** 2)}


def assert_trees_close(a, b, tolerance=1e-15):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


# -- one update ----------------------------------------------------------------------------------------------------------------

LAGS = {
    "none": np.zeros(12, np.int32),
    "fixed": staleness.fixed(3, 12),
    "periodic": staleness.periodic(3, 12),
    "random": staleness.random(1, 3, 12),
}


@functools.cache
def compiled(name):
    """An optimizer, `update_step` with it, and the same update by hand."""
    optimizer = OPTIMIZERS[name](0.1)

    def by_hand(params, opt_state, behavior, step, version):
        gradient = toy_update_gradient(params, behavior, step, version)
        updates, opt_state = optimizer.update(jax.tree.map(jnp.negative, gradient), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, gradient

    step_fn = functools.partial(update_step, gradient_fn=toy_update_gradient, optimizer=optimizer)
    return optimizer, jax.jit(step_fn), jax.jit(by_hand)


@functools.cache
def replay(name, kind):
    """(θ_0..θ_T, gradients) of a plain loop with its versions in a Python list."""
    optimizer, _, by_hand = compiled(name)
    versions, gradients, opt_state = [jax.tree.map(jnp.asarray, START)], [], optimizer.init(START)
    for step, lag in enumerate(LAGS[kind]):
        version = max(step - lag, 0)
        params, opt_state, gradient = by_hand(versions[-1], opt_state, versions[version], np.int32(step), np.int32(version))
        versions.append(params)
        gradients.append(gradient)
    return versions, gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", LAGS)
def test_an_update_reads_the_version_of_its_lag(optimizer, kind):
    transformation, step_fn, _ = compiled(optimizer)
    state = create_state(jax.tree.map(jnp.asarray, START), transformation, 4)
    versions, gradients = replay(optimizer, kind)
    for step, lag in enumerate(LAGS[kind]):
        assert state.step == step
        assert_trees_close(state.params, versions[step])
        state, info = step_fn(state, lag)
        assert info.staleness == min(lag, step)
        assert_trees_close(info.behavior_params, versions[max(step - lag, 0)])
        assert_trees_close(info.gradient, gradients[step])
    assert_trees_close(state.params, versions[-1])
    assert norm(difference(versions[-1], START)) > 0.1
    if kind != "none":  # the lag matters here
        assert norm(difference(versions[-1], replay(optimizer, "none")[0][-1])) > 1e-3


def test_without_lag_the_size_of_the_ring_does_not_matter():
    transformation, step_fn, _ = compiled("sgd")
    state = create_state(jax.tree.map(jnp.asarray, START), transformation, 1)
    for params in replay("sgd", "none")[0][1:]:
        state, _ = step_fn(state, np.int32(0))
        assert_trees_close(state.params, params)


def test_state_passes_history_options_on():
    transformation, _, _ = compiled("sgd")
    state = create_state(START, transformation, 2, dtype=jnp.bfloat16)
    assert state.history.params["w"].dtype == jnp.bfloat16 and state.params["w"].dtype == np.float64
    with pytest.raises(ValueError, match="capacity"):
        create_state(START, transformation, 0)


# -- grids ---------------------------------------------------------------------------------------------------------------------


def noisy_update_gradient(key, learner, behavior, step, policy_version):
    noise = 0.1 * jax.random.normal(jax.random.fold_in(key, step), ())
    return jax.tree.map(lambda leaf: leaf + noise, toy_update_gradient(learner, behavior, step, policy_version))


@functools.cache
def toy_grid(vectorize):
    return sweeps.bias_grid(toy_gradient, noisy_update_gradient, toy_reward, optax.sgd, capacity=4, vectorize=vectorize)


NUM_UPDATES, MEASURE_STEPS, LEARNING_RATE = 15, np.array([0, 2, 7, 8, 14]), 0.05
SCHEDULES = np.stack(
    [staleness.fixed(0, NUM_UPDATES), staleness.fixed(3, NUM_UPDATES), staleness.random(4, 3, NUM_UPDATES)]
    + [staleness.fixed(3, NUM_UPDATES)]
)
KEYS = jax.random.split(jax.random.key(3), 3)[np.array([0, 1, 2, 2])]


@functools.cache
def toy_cells(vectorize):
    cells = toy_grid(vectorize)(START, LEARNING_RATE, SCHEDULES, KEYS, MEASURE_STEPS)
    return jax.tree.map(np.asarray, cells)


def test_cells_side_by_side_or_in_turn_are_the_same():
    side_by_side, in_turn = toy_cells(True), toy_cells(False)
    assert_trees_close(side_by_side, in_turn, tolerance=1e-12)


def test_a_grid_measures_what_a_plain_loop_does():
    cells = toy_cells(True)
    measure = jax.jit(functools.partial(bias.surrogate_bias, toy_gradient))
    gradient_fn = jax.jit(noisy_update_gradient)
    for cell, schedule in enumerate(SCHEDULES):
        versions, row = [START], 0
        for step, lag in enumerate(schedule):
            params, behavior = versions[-1], versions[max(step - lag, 0)]
            if step in MEASURE_STEPS:
                expected = measure(params, behavior)
                values = {
                    "bias/norm": expected.norm,
                    "bias/relative_norm": expected.relative_norm,
                    "bias/cosine": expected.cosine,
                    "grad/norm": norm(expected.stale_gradient),
                    "drift/from_behavior": norm(difference(params, behavior)),
                    "drift/cumulative": norm(difference(params, START)),
                    "staleness/configured": lag,
                    "staleness/realised": min(step, lag),
                }
                assert set(values) == set(cells.values)
                for name, value in values.items():
                    np.testing.assert_allclose(cells.values[name][cell, row], value, rtol=1e-11, atol=1e-14, err_msg=name)
                np.testing.assert_allclose(cells.reward["J"][cell, row], toy_reward(params)["J"], rtol=1e-12)
                msd = [norm(difference(params, versions[step - s])) ** 2 if s <= step else np.nan for s in range(4)]
                np.testing.assert_allclose(cells.msd[cell, row], msd, rtol=1e-11)
                row += 1
            gradient = gradient_fn(KEYS[cell], params, behavior, np.int32(step), np.int32(max(step - lag, 0)))
            versions.append(jax.tree.map(lambda leaf, g: np.asarray(leaf + LEARNING_RATE * g), params, gradient))
        assert row == len(MEASURE_STEPS)
        # θ of the last measured step, which here is the last step, and the oldest version the schedule asks for there
        last = jax.tree.map(lambda x, i=cell: x[i], (cells.learner_params, cells.behavior_params))
        assert_trees_close(last, (versions[-2], versions[-2 - schedule.max()]), tolerance=1e-12)
        assert cells.pair_staleness[cell] == schedule.max()
    assert SCHEDULES[2, -1] < SCHEDULES[2].max()  # else nothing would tell the two apart


def test_a_grid_has_no_bias_without_lag_and_no_violations():
    cells = toy_cells(True)
    fresh = cells.values["staleness/realised"] == 0
    assert fresh[0].all() and fresh[:, 0].all() and not fresh[1, 1:].any()
    for name in ("bias/norm", "bias/relative_norm", "drift/from_behavior"):
        assert (cells.values[name][fresh] == 0).all() and (cells.values[name][~fresh] > 0).all()
    assert set(cells.violations) >= {"ring_version", "staleness_within_bound", "finite_tree"}
    for name, violation in cells.violations.items():
        assert violation.shape == fresh.shape and not violation.any(), name


# -- exact and sampled GRPO ----------------------------------------------------------------------------------------------------

ALGORITHM = dict(loss_fn=ppo_clip, advantage_fn=group_normalized)
REWARDS = np.random.default_rng(3).integers(0, 3, (4, 6)) / 2
MAX_STALENESS = (1, 2, 4, 8, 16)
KINDS = {
    "fixed": staleness.fixed,
    "periodic": staleness.periodic,
    "random": lambda max_staleness, num_updates: staleness.random(max_staleness, max_staleness, num_updates),
}


class Experiment(NamedTuple):
    """Exact updates of one policy and optimizer under all schedules; windows are fixed beforehand."""

    policy: Policy
    params: dict
    task: Task
    optimizer_fn: Callable
    learning_rates: tuple[float, ...]
    window: tuple[float, float]  # of η·t
    largest: float  # S_rms·η that enters a fit

    def gradient(self, learner, behavior):
        return exact.surrogate_gradient(self.policy, learner, behavior, self.task, group_size=8, **ALGORITHM)

    def measure_steps(self, learning_rate, num_steps=64):
        """One step in each stratum of the window, at the same fraction of it for every η."""
        edges = np.linspace(*self.window, num_steps + 1)
        fractions = np.random.default_rng(0).random(num_steps)
        return np.round((edges[:-1] + fractions * np.diff(edges)) / learning_rate).astype(int)


_SUMS, _LINEAR = tasks.digit_sum(3, 2, 3, partial_credit=True), policies.linear(4, 3)
_BANDIT, _TABULAR = tasks.bandit(REWARDS), policies.tabular(10, 1)
_RANDOM = {"table": np.random.default_rng(1).normal(size=(11, 10))}
_UNIFORM = {"table": np.zeros((16, 4))}
EXPERIMENTS = {
    "tabular, sgd": Experiment(_TABULAR, _RANDOM, _BANDIT, optax.sgd, (0.02, 0.04, 0.08), (6, 12), 0.2),
    "tabular, adam": Experiment(_TABULAR, _RANDOM, _BANDIT, optax.adam, (5e-4, 1e-3, 2e-3), (0.2, 0.4), 0.006),
    "linear, sgd": Experiment(_LINEAR, _UNIFORM, _SUMS, optax.sgd, (0.01, 0.02, 0.04), (8, 16), 0.2),
    "linear, adam": Experiment(_LINEAR, _UNIFORM, _SUMS, optax.adam, (2.5e-4, 5e-4, 1e-3), (0.2, 0.4), 0.005),
}


@pytest.fixture(scope="module", params=EXPERIMENTS)
def name(request):
    return request.param


@functools.cache
def exact_cells(name):
    """[(kind, S, η, CellMeasurements of the cell)] of an experiment, from one compilation."""
    this = EXPERIMENTS[name]
    grid = sweeps.bias_grid(
        this.gradient,
        lambda key, learner, behavior, step, version: this.gradient(learner, behavior),
        lambda params: {"J": exact.expected_reward(this.policy, params, this.task)},
        this.optimizer_fn,
        capacity=max(MAX_STALENESS) + 1,
    )
    num_updates = int(np.ceil(this.window[1] / min(this.learning_rates))) + 1
    cells = [("fixed", 0)] + [(kind, s) for kind in KINDS for s in MAX_STALENESS]
    schedules = np.stack([KINDS[kind](s, num_updates) for kind, s in cells])
    keys = jax.random.split(jax.random.key(0), len(cells))
    found = []
    for learning_rate in this.learning_rates:
        measured = grid(this.params, learning_rate, schedules, keys, this.measure_steps(learning_rate))
        measured = jax.tree.map(np.asarray, measured)
        for i, (kind, s) in enumerate(cells):
            found.append((kind, s, learning_rate, jax.tree.map(lambda x, i=i: x[i], measured)))
    return found


def fit(name, kind):
    """The power law of rms ‖δ‖ in the rms of the realised staleness and in η."""
    points = np.array(
        [
            (staleness.rms(cell.values["staleness/realised"]), learning_rate, np.sqrt(np.mean(cell.values["bias/norm"] ** 2)))
            for cell_kind, s, learning_rate, cell in exact_cells(name)
            if cell_kind == kind and s > 0
        ]
    )
    return scaling.fit_power_law(points[:, :2], points[:, 2], window=(0, EXPERIMENTS[name].largest), num_bootstrap=100)


def test_bias_is_proportional_to_staleness_and_to_the_learning_rate(name):
    low, high = (0.94, 1.02) if "adam" in name else (0.98, 1.02)
    for kind in KINDS:
        law = fit(name, kind)
        assert law.num_points >= 9
        assert low < law.exponents.min() and law.exponents.max() < high, kind
        assert law.r_squared > 0.995, kind


def test_exact_updates_have_no_bias_without_lag_and_raise_the_reward(name):
    for kind, s, _, cell in exact_cells(name):
        norms = cell.values["bias/norm"]
        fresh = cell.values["staleness/realised"] == 0
        assert (norms[fresh] == 0).all() and (norms[~fresh] > 0).all()
        assert fresh.all() == (s == 0) and fresh.any() == (s == 0 or kind != "fixed")
        assert not any(violation.any() for violation in cell.violations.values())
        assert cell.reward["J"][-1] > cell.reward["J"][0] > 0


def test_a_grid_measures_the_bias_of_the_parameters_it_returns():
    this = EXPERIMENTS["tabular, sgd"]
    measure = jax.jit(functools.partial(bias.surrogate_bias, this.gradient))
    for _, s, _, cell in exact_cells("tabular, sgd")[:4]:
        measured = measure(cell.learner_params, cell.behavior_params)
        assert (measured.norm > 1e-6) == (s > 0)
        np.testing.assert_allclose(cell.values["bias/norm"][-1], measured.norm, rtol=1e-9)
        np.testing.assert_allclose(cell.values["bias/relative_norm"][-1], measured.relative_norm, rtol=1e-9)


def test_sampled_ratios_are_one_without_lag_only():
    task, policy, key = tasks.bandit(REWARDS), policies.tabular(10, 1), jax.random.key(5)
    optimizer = optax.sgd(0.5)

    def rollouts_of(behavior, step, version):
        logprobs = exact.task_logprobs(policy, behavior, task)
        return sample_enumerated(key, task, logprobs, 8, step=step, policy_version=version)

    def gradient(learner, behavior, step, version):
        return surrogate.enumerated_gradient(policy, learner, rollouts_of(behavior, step, version), task, **ALGORITHM)

    @jax.jit
    def advance(state, lag):
        new_state, info = update_step(state, lag, gradient, optimizer)
        rollouts = rollouts_of(info.behavior_params, state.step, state.step - info.staleness)
        learner = policies.token_logprobs(policy, state.params, rollouts.prompts, rollouts.completions, allowed=task.allowed)
        return new_state, jnp.exp(learner - rollouts.behavior_logprobs)

    for lag in (0, 3):
        state = create_state({"table": np.zeros((11, 10))}, optimizer, 4)
        for step in range(6):
            state, ratios = advance(state, jnp.int32(lag))
            if lag == 0 or step == 0:
                assert np.abs(ratios - 1).max() < 1e-14
            else:
                assert np.std(ratios) > 0.01
