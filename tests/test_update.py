"""Updates under lag read the version they should, grids repeat plain loops, and exact updates obey the law of the bias."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_async_grpo import bias, exact, policies, scaling, staleness, surrogate, sweeps, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.losses import ppo_clip
from jax_async_grpo.sampling import sample_enumerated
from jax_async_grpo.update import create_state, update_step

# compiled once and run a few times: the time is the compiler's
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
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


# -- one update ----------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(optimizer):
    optimizer = OPTIMIZERS[optimizer](0.1)
    return optimizer, jax.jit(functools.partial(update_step, gradient_fn=toy_update_gradient, optimizer=optimizer))


def replay(optimizer, schedule, behavior_of):
    """(θ_0..θ_T, gradients) of a plain loop with its versions in a Python list."""
    optimizer = OPTIMIZERS[optimizer](0.1)

    @jax.jit
    def step_of(params, opt_state, behavior, step, version):
        gradient = toy_update_gradient(params, behavior, step, version)
        updates, opt_state = optimizer.update(jax.tree.map(jnp.negative, gradient), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, gradient

    versions, opt_state, gradients = [START], optimizer.init(START), []
    for step, lag in enumerate(schedule):
        version = behavior_of(step, lag)
        params, opt_state, gradient = step_of(versions[-1], opt_state, versions[version], step, version)
        versions.append(params)
        gradients.append(gradient)
    return versions, gradients


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_staleness", (0, 3))
def test_without_lag_an_update_is_plain_synchronous_training(optimizer, max_staleness):
    transformation, step_fn = compiled(optimizer)
    state = create_state(START, transformation, max_staleness + 1)
    expected, _ = replay(optimizer, [0] * 8, lambda step, lag: step)
    for params in expected[1:]:
        state, info = step_fn(state, jnp.int32(0))
        assert info.staleness == 0
        assert_trees_close(state.params, params)
    assert norm(difference(expected[-1], START)) > 0.1
    assert state.step == 8


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [staleness.fixed(3, 12), staleness.periodic(3, 12), staleness.random(1, 3, 12)])
def test_an_update_reads_the_version_of_its_lag(optimizer, schedule):
    transformation, step_fn = compiled(optimizer)
    state = create_state(START, transformation, 4)
    versions, gradients = replay(optimizer, schedule, lambda step, lag: max(step - lag, 0))
    fresh, _ = replay(optimizer, schedule, lambda step, lag: step)
    for step, lag in enumerate(schedule):
        assert_trees_close(state.params, versions[step])
        state, info = step_fn(state, lag)
        assert info.staleness == min(lag, step)
        assert_trees_close(info.behavior_params, versions[max(step - lag, 0)])
        assert_trees_close(info.gradient, gradients[step])
    assert_trees_close(state.params, versions[-1])
    assert norm(difference(versions[-1], fresh[-1])) > 1e-3  # the lag matters here


def test_state_passes_history_options_on():
    transformation, step_fn = compiled("sgd")
    state, _ = step_fn(create_state(START, transformation, 2, dtype=jnp.bfloat16), jnp.int32(0))
    assert state.history.params["w"].dtype == jnp.bfloat16 and state.params["w"].dtype == jnp.float64
    with pytest.raises(ValueError, match="capacity"):
        create_state(START, transformation, 0)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


# -- grids ---------------------------------------------------------------------------------------------------------------------


def noisy_update_gradient(key, learner, behavior, step, policy_version):
    noise = 0.1 * jax.random.normal(jax.random.fold_in(key, step), ())
    return jax.tree.map(lambda leaf: leaf + noise, toy_update_gradient(learner, behavior, step, policy_version))


@functools.cache
def toy_grid(vectorize):
    return sweeps.bias_grid(
        toy_gradient, noisy_update_gradient, toy_reward, optax.adam, capacity=4, vectorize=vectorize
    )


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
    optimizer = optax.adam(LEARNING_RATE)
    measure = jax.jit(functools.partial(bias.surrogate_bias, toy_gradient))
    step_fn = jax.jit(
        lambda params, opt_state, *rest: (
            lambda updates, opt_state: (optax.apply_updates(params, updates), opt_state)
        )(*optimizer.update(jax.tree.map(jnp.negative, noisy_update_gradient(rest[0], params, *rest[1:])), opt_state, params))
    )
    for cell, schedule in enumerate(SCHEDULES):
        versions, opt_state, row = [START], optimizer.init(START), 0
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
            params, opt_state = step_fn(params, opt_state, KEYS[cell], behavior, step, max(step - lag, 0))
            versions.append(params)
        assert row == len(MEASURE_STEPS)
        assert_trees_close(jax.tree.map(lambda x, i=cell: x[i], cells.learner_params), versions[-2], 1e-12)
        assert_trees_close(jax.tree.map(lambda x, i=cell: x[i], cells.behavior_params), versions[14 - min(schedule[14], 14)], 1e-12)


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


class Experiment:
    """Exact updates of one policy and optimizer over all schedules; everything about it is fixed beforehand."""

    def __init__(self, policy, params, task, optimizer_fn, learning_rates, window):
        self.policy, self.params, self.task, self.optimizer_fn = policy, params, task, optimizer_fn
        self.learning_rates, self.window = learning_rates, window

    def gradient(self, learner, behavior):
        return exact.surrogate_gradient(self.policy, learner, behavior, self.task, group_size=8, **ALGORITHM)

    def measure_steps(self, learning_rate, num_steps=64):
        """One step in each stratum of the window of η·t, at the same fraction of it for every η."""
        edges = np.linspace(*self.window, num_steps + 1)
        fractions = np.random.default_rng(0).random(num_steps)
        return np.round((edges[:-1] + fractions * np.diff(edges)) / learning_rate).astype(int)

    @functools.cache
    def cells(self):
        """[(kind, S, η, CellMeasurements of the cell)], from one compilation."""
        grid = sweeps.bias_grid(
            self.gradient,
            lambda key, learner, behavior, step, version: self.gradient(learner, behavior),
            lambda params: {"J": exact.expected_reward(self.policy, params, self.task)},
            self.optimizer_fn,
            capacity=max(MAX_STALENESS) + 1,
        )
        num_updates = int(np.ceil(self.window[1] / min(self.learning_rates))) + 1
        grid_of = [(kind, s) for kind in KINDS for s in (0, *MAX_STALENESS) if s or kind == "fixed"]
        schedules = np.stack([KINDS[kind](s, num_updates) for kind, s in grid_of])
        keys = jax.random.split(jax.random.key(0), len(grid_of))
        found = []
        for learning_rate in self.learning_rates:
            cells = grid(self.params, learning_rate, schedules, keys, self.measure_steps(learning_rate))
            cells = jax.tree.map(np.asarray, cells)
            for i, (kind, s) in enumerate(grid_of):
                found.append((kind, s, learning_rate, jax.tree.map(lambda x, i=i: x[i], cells)))
        return found

    def fit(self, kind, largest):
        """The power law of rms ‖δ‖ in the rms of the realised staleness and η, over cells with S_rms·η up to `largest`."""
        points = []
        for cell_kind, s, learning_rate, cell in self.cells():
            if cell_kind == kind and s:
                rms = staleness.rms(cell.values["staleness/realised"])
                points.append((rms, learning_rate, np.sqrt(np.mean(cell.values["bias/norm"] ** 2))))
        points = np.array(points)
        return scaling.fit_power_law(points[:, :2], points[:, 2], window=(0, largest), num_bootstrap=100)


@functools.cache
def experiment(name):
    bandit, tabular = tasks.bandit(REWARDS), policies.tabular(10, 1)
    start = {"table": np.random.default_rng(1).normal(size=(11, 10))}
    linear = policies.linear(4, 3)
    sums = tasks.digit_sum(3, 2, 3, partial_credit=True)
    uniform = {"table": np.zeros(jax.eval_shape(linear.init, jax.random.key(0))["table"].shape)}
    return {
        "tabular, sgd": Experiment(tabular, start, bandit, optax.sgd, (0.01, 0.02, 0.04), (6, 12)),
        "linear, sgd": Experiment(linear, uniform, sums, optax.sgd, (0.01, 0.02, 0.04), (8, 16)),
        "tabular, adam": Experiment(tabular, start, bandit, optax.adam, (2.5e-4, 5e-4, 1e-3), (0.2, 0.4)),
    }[name]


@pytest.mark.parametrize("name", ("tabular, sgd", "linear, sgd"))
def test_bias_is_proportional_to_staleness_and_to_the_learning_rate(name):
    for kind in KINDS:
        fit = experiment(name).fit(kind, 0.2)
        print(name, kind, fit.num_points, fit.exponents, fit.r_squared)
        assert fit.num_points >= 12
        assert np.abs(fit.exponents - 1).max() < 0.02 and fit.r_squared > 0.995, kind


def test_bias_is_proportional_to_staleness_and_to_the_learning_rate_of_adam():
    for kind in KINDS:
        fit = experiment("tabular, adam").fit(kind, 0.006)
        print(kind, fit.num_points, fit.exponents, fit.r_squared)
        assert fit.num_points >= 12
        assert (fit.exponents > 0.94).all() and (fit.exponents < 1.02).all() and fit.r_squared > 0.995, kind


@pytest.mark.parametrize("name", ("tabular, sgd", "linear, sgd"))
def test_exact_updates_have_no_bias_without_lag_and_raise_the_reward(name):
    this = experiment(name)
    measured_at = jax.jit(functools.partial(bias.surrogate_bias, this.gradient))
    start = exact.expected_reward(this.policy, this.params, this.task)
    for kind, s, _, cell in this.cells():
        norms = cell.values["bias/norm"]
        fresh = cell.values["staleness/realised"] == 0
        assert (norms[fresh] == 0).all() and (norms[~fresh] > 0).all()
        assert fresh.all() == (s == 0) and fresh.any() == (s == 0 or kind != "fixed")
        assert not any(violation.any() for violation in cell.violations.values())
        assert cell.reward["J"][-1] > start + 0.1
        if kind == "fixed" and s in (0, 4):
            measured = measured_at(cell.learner_params, cell.behavior_params)
            np.testing.assert_allclose(norms[-1], measured.norm, rtol=1e-9)
            np.testing.assert_allclose(cell.values["bias/cosine"][-1], measured.cosine, rtol=1e-12)


def test_sampled_ratios_are_one_without_lag_only():
    task, policy, key = tasks.bandit(REWARDS), policies.tabular(10, 1), jax.random.key(5)
    optimizer = optax.sgd(0.5)

    def rollouts_of(behavior, step, version):
        logprobs = exact.task_logprobs(policy, behavior, task)
        return sample_enumerated(key, task, logprobs, 8, step=step, policy_version=version)

    def gradient(learner, behavior, step, version):
        return surrogate.enumerated_gradient(policy, learner, rollouts_of(behavior, step, version), task, **ALGORITHM)

    @quick_jit
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
