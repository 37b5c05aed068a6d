"""Drift is kept within its radius whatever updates and lags are, and is let go that far; VCPO's rule is what it says."""

from __future__ import annotations

import doctest
import functools
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_async_grpo import control, metrics, staleness
from jax_async_grpo.control import limit_staleness_drift, limit_staleness_path, scale_by_ess
from jax_async_grpo.update import create_state, update_step

LIMITS = {"drift": limit_staleness_drift, "path": limit_staleness_path}
S, NUM_UPDATES, DIMENSION = 5, 40, 6
RADIUS = 0.7
ROUNDING = 1 + 1e-12


def as_tree(vector):
    """[6] -> parameters of two leaves, one of them a matrix."""
    return {"w": vector[:4].reshape(2, 2), "b": vector[4:]}


def as_vectors(tree):
    """Positions [..., 6] of leaves [..., 2, 2] and [..., 2]."""
    w, b = np.asarray(tree["w"]), np.asarray(tree["b"])
    return np.concatenate([w.reshape(*b.shape[:-1], 4), b], axis=-1)


def run(optimizer, updates, windows, radius=RADIUS):
    """(θ_0..θ_T, factors) of a scan over given updates [T, 6]; `optimizer(radius)` alone decides what is applied."""
    transformation = optimizer(radius)
    start = as_tree(np.zeros(DIMENSION))

    def advance(carry, inputs):
        params, state = carry
        update, window = inputs
        scaled, state = transformation.update(as_tree(update), state, params, staleness=window)
        params = optax.apply_updates(params, scaled)
        return (params, state), (params, state[-1])

    _, (positions, scale) = jax.lax.scan(advance, (start, transformation.init(start)), (updates, windows))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, positions), scale


@functools.cache
def runner(name):
    """Many sequences side by side, with windows, radii and exponents of their own: one compilation a rule."""

    def run_one(updates, windows, radius, exponent):
        return run(functools.partial(LIMITS[name], max_staleness=S, exponent=exponent), updates, windows, radius)

    return jax.jit(jax.vmap(run_one))


def adversary(scale, window):
    """Huge updates along the oldest displacement the window still holds, so that every one of them adds to it."""
    rng = np.random.default_rng(7)
    direction = rng.normal(size=DIMENSION)
    wobble = 0.3 * rng.normal(size=(NUM_UPDATES, DIMENSION)) * (np.arange(NUM_UPDATES) % window == 0)[:, None]
    return scale * (direction + wobble)


RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(NUM_UPDATES, DIMENSION))
SEQUENCES = {
    "ballistic": np.tile(0.3 * np.eye(DIMENSION)[0], (NUM_UPDATES, 1)),
    "diffusive": 0.2 * NOISE,
    "heavy tails": 0.01 * NOISE / np.abs(RNG.normal(size=(NUM_UPDATES, 1))) ** 3,
    "one burst": NOISE * np.where(np.arange(NUM_UPDATES) == 17, 1e6, 1e-3)[:, None],
    "there and back": 0.5 * np.where(np.arange(NUM_UPDATES) % 8 < 4, 1, -1)[:, None] * np.eye(DIMENSION)[1],
    "adversary": adversary(10.0, S),
    "huge": 1e200 * NOISE,
    "tiny and zero": 1e-200 * NOISE * (np.arange(NUM_UPDATES) % 3 == 0)[:, None],
    "far inside": 1e-3 * NOISE,
}
UPDATES = np.stack(list(SEQUENCES.values()))
WINDOWS = np.arange(S + 1)


COUNT = len(UPDATES) * len(WINDOWS)  # rows of every call: one shape, one compilation


def run_many(rule, updates, windows, radius=RADIUS):
    """(positions [n, T+1, 6], factors [n, T]) of n sequences of updates [n, T, 6] and windows [n, T]."""
    rows = np.arange(COUNT) % len(updates)
    windows = np.asarray(windows, np.int32)[rows]
    name, exponent = rule
    options = np.full((2, COUNT), [[radius], [exponent]])
    positions, scale = runner(name)(np.asarray(updates)[rows], windows, *options)
    return as_vectors(positions)[: len(updates)], np.asarray(scale)[: len(updates)]


@functools.cache
def all_runs(*rule):
    """(positions [N, W, T+1, 6], factors [N, W, T]) of every sequence with every constant window."""
    pairs = [(u, np.full(NUM_UPDATES, w)) for u in UPDATES for w in WINDOWS]
    results = run_many(rule, *zip(*pairs, strict=True))
    return tuple(values.reshape(len(UPDATES), len(WINDOWS), *values.shape[1:]) for values in results)


def drift(positions, lag):
    """‖θ_t − θ_{t−lag}‖ for every t ≥ lag."""
    return np.linalg.norm(positions[lag:] - positions[: len(positions) - lag], axis=-1)


RULES = [("drift", 0.5), ("drift", 0.0), ("path", 1.0), ("path", 0.5)]


@pytest.mark.parametrize(("name", "exponent"), RULES)
def test_no_lag_of_the_window_exceeds_its_bound(name, exponent):
    positions, _ = all_runs(name, exponent)
    for sequence, of_sequence in zip(SEQUENCES, positions, strict=True):
        for window in WINDOWS[1:]:
            for lag in range(1, window + 1):
                largest = drift(of_sequence[window], lag).max()
                assert largest <= RADIUS * (lag / window) ** exponent * ROUNDING, (sequence, window, lag)
    for sequence, updates in SEQUENCES.items():  # else the bound would say nothing
        unlimited = np.cumsum(np.clip(updates, -1e9, 1e9), axis=0)
        assert (drift(unlimited, S).max() > RADIUS) == (sequence not in ("tiny and zero", "far inside")), sequence


@pytest.mark.parametrize(("name", "exponent"), RULES)
def test_a_ballistic_run_reaches_the_radius_and_keeps_moving(name, exponent):
    positions, scale = (values[0] for values in all_runs(name, exponent))
    for window in WINDOWS[3:]:  # 0.3·w > R, so that the limit is felt
        np.testing.assert_allclose(drift(positions[window], window), RADIUS, rtol=1e-12)
        if exponent:  # no update is thrown away: at least half of the even share
            assert 0.3 * scale[window].min() > 0.5 * RADIUS / window
    if exponent == 1:
        np.testing.assert_allclose(drift(positions[S], 1), RADIUS / S, rtol=1e-12)
    if exponent == 0:  # all or nothing, which is why it is not the default
        assert scale[S].min() < 1e-12


@pytest.mark.parametrize(("name", "exponent"), RULES)
def test_far_inside_and_without_a_window_nothing_is_touched(name, exponent):
    positions, scale = all_runs(name, exponent)
    inside = list(SEQUENCES).index("far inside")
    assert (scale[inside] == 1).all() and (scale[:, 0] == 1).all()
    expected = np.array(jax.lax.scan(lambda x, u: (x + u, x + u), np.zeros(DIMENSION), UPDATES[inside])[1])
    assert (positions[inside, :, 1:] == expected).all()  # bit for bit


def test_diffusive_runs_are_left_alone_where_the_path_rule_strangles_them():
    steps = np.random.default_rng(1).normal(size=(NUM_UPDATES, DIMENSION))
    steps *= 0.55 * RADIUS / np.sqrt(S) / np.linalg.norm(steps, axis=1, keepdims=True)  # rms drift over S: 0.55 R
    windows = np.full((1, NUM_UPDATES), S)
    mean_scale = {rule: run_many(rule, steps[None], windows)[1].mean() for rule in (RULES[0], RULES[2])}
    assert mean_scale["drift", 0.5] > 0.97
    np.testing.assert_allclose(mean_scale["path", 1.0], 1 / (0.55 * np.sqrt(S)), rtol=1e-6)  # R/w over ‖u‖


def test_the_factor_is_the_largest_one_by_brute_force():
    positions, scale = all_runs("drift", 0.5)
    candidates = np.linspace(0, 1, 20001)
    for sequence in ("diffusive", "there and back"):
        i = list(SEQUENCES).index(sequence)
        for t in (1, 6, 12, 23):
            tried = positions[i, S, t] + candidates[:, None] * SEQUENCES[sequence][t]
            lags = np.arange(1, min(S, t + 1) + 1)
            gaps = np.linalg.norm(tried[:, None] - positions[i, S, t + 1 - lags], axis=-1)
            allowed = (gaps <= RADIUS * np.sqrt(lags / S) * ROUNDING).all(axis=1)
            assert abs(scale[i, S, t] - candidates[allowed].max()) <= 5.1e-5, (sequence, t)
    assert 0 < scale[list(SEQUENCES).index("there and back"), S].min() < 0.5


# -- schedules -----------------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "fixed": staleness.fixed(S, NUM_UPDATES + 1),
    "periodic": staleness.periodic(S, NUM_UPDATES + 1),
    "random": staleness.random(3, S, NUM_UPDATES + 1),
}


def from_behavior(positions, schedule):
    """‖θ_t − φ_t‖ of every update of the schedule."""
    realised = staleness.realised(schedule)
    return np.array([np.linalg.norm(positions[t] - positions[t - s]) for t, s in enumerate(realised)])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rollouts_come_from_within_the_radius_when_the_maximum_is_passed(kind):
    positions, _ = all_runs("drift", 0.5)
    distances = np.stack([from_behavior(of_sequence[S], SCHEDULES[kind]) for of_sequence in positions])
    assert distances.max() <= RADIUS * ROUNDING
    assert distances.max() > 0.99 * RADIUS


def test_the_next_lag_is_enough_and_the_present_one_is_not():
    """Versions of a periodic schedule never go back: the lag that comes is at most the present one + 1."""
    schedule = staleness.realised(SCHEDULES["periodic"])
    updates = np.tile(10 * np.eye(DIMENSION)[0], (2, NUM_UPDATES, 1))
    positions, _ = run_many(RULES[0], updates, [schedule[1:], schedule[:-1]])
    by_next, by_present = (from_behavior(of_windows, schedule) for of_windows in positions)
    # an update before a synchronization has no window and may go anywhere, but nothing is read across it
    np.testing.assert_allclose(by_next[schedule == S], RADIUS, rtol=1e-11)
    assert by_next.max() <= RADIUS * (1 + 1e-11)
    assert by_present.max() > 5


def test_what_is_already_too_far_is_never_taken_farther_and_is_gone_after_a_window():
    windows = np.where(np.arange(NUM_UPDATES) < 20, 1, S)  # grows by 4 at once
    for sequence in ("ballistic", "adversary", "there and back", "heavy tails"):
        (positions,), _ = run_many(RULES[0], 5 * SEQUENCES[sequence][None], windows[None])
        assert np.linalg.norm(positions[20] - positions[20 - S + 1]) > RADIUS
        for t in range(20, NUM_UPDATES):
            for lag in range(1, S + 1):
                before = np.linalg.norm(positions[t] - positions[t + 1 - lag])
                after = np.linalg.norm(positions[t + 1] - positions[t + 1 - lag])
                assert after <= max(before, RADIUS * np.sqrt(lag / S)) * (1 + 1e-9)
                assert t < 20 + S - 1 or after <= RADIUS * ROUNDING


# -- special updates, dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_zero_and_non_finite_updates_pass_unchanged(name):
    optimizer = LIMITS[name](RADIUS, 2)
    params = as_tree(np.zeros(DIMENSION))
    update_fn = jax.jit(functools.partial(optimizer.update, staleness=2))
    for value in (0.0, np.nan, np.inf):
        updates = as_tree(np.r_[1.0, value, np.ones(4)] if value else np.zeros(DIMENSION))
        passed, state = update_fn(updates, optimizer.init(params), params)
        chex.assert_trees_all_equal(passed, updates)
        assert state[-1] == 1
        after, _ = update_fn(as_tree(np.ones(DIMENSION)), state, params)
        assert 0 < optax.tree.norm(after) <= RADIUS * ROUNDING  # and leave no trace


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("drift", jnp.float32, 1e-6), ("drift", jnp.bfloat16, 4e-3), ("path", jnp.bfloat16, 4e-3)]
)
def test_low_precision_parameters_keep_the_bound_up_to_one_rounding(name, dtype, tolerance):
    optimizer = LIMITS[name](RADIUS, 3)
    params = jnp.zeros(64, dtype)
    state, positions = optimizer.init(params), [np.zeros(64)]
    update_fn = jax.jit(optimizer.update)
    for step in np.random.default_rng(2).normal(size=(30, 64)) / 5 + 0.5:
        updates, state = update_fn(jnp.asarray(step, dtype), state, params, staleness=jnp.int32(3))
        assert updates.dtype == dtype
        params = optax.apply_updates(params, updates)
        positions.append(np.asarray(params, np.float64))
    positions = np.stack(positions)
    rounding = tolerance * np.linalg.norm(positions, axis=1).max() / 2  # of θ; the path rule sums those of a window
    assert drift(positions, 3).max() <= RADIUS * (1 + tolerance) + rounding * (3 if name == "path" else 1)
    assert drift(positions, 3).max() > 0.9 * RADIUS


def test_versions_may_be_kept_elsewhere_and_shorter():
    params = as_tree(np.zeros(DIMENSION, np.float32))
    optimizer = limit_staleness_drift(RADIUS, 2, dtype=jnp.bfloat16, memory_kind="pinned_host")
    state = optimizer.init(params)
    assert state.params["w"].dtype == jnp.bfloat16 and state.params["w"].sharding.memory_kind == "pinned_host"
    updates, state = jax.jit(optimizer.update)(as_tree(np.ones(DIMENSION, np.float32)), state, params, staleness=jnp.int32(2))
    assert state.params["w"].sharding.memory_kind == "pinned_host"
    np.testing.assert_allclose(optax.tree.norm(updates), RADIUS / np.sqrt(2), rtol=1e-6)


# -- in optax ------------------------------------------------------------------------------------------------------------------


def minimize(optimizer, *choices, num_updates=24):
    """Positions [T+1, 6] under a constant gradient, for each choice of extra arguments; one compilation."""
    update_fn = jax.jit(optimizer.update)
    gradient, trajectories = as_tree(np.array([1.0, -2.0, 3.0, 0.5, 1.0, 0.1])), []
    for extra_args in choices:
        params = as_tree(np.arange(6.0))
        state, positions = optimizer.init(params), [params]
        for _ in range(num_updates):
            updates, state = update_fn(gradient, state, params, **extra_args)
            params = optax.apply_updates(params, updates)
            positions.append(params)
        trajectories.append(as_vectors(jax.tree.map(lambda *leaves: np.stack(leaves), *positions)))
    return trajectories


def window(lag):
    return {"staleness": jnp.int32(lag)}


OPTIMIZERS = {
    "sgd": lambda last: optax.chain(optax.sgd(0.3), last),
    "adamw": lambda last: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.5, 0.1, 20)), last),
    "multi steps": lambda last: optax.MultiSteps(optax.chain(optax.sgd(0.3), last), 3).gradient_transformation(),
    "injected": lambda last: optax.apply_if_finite(
        optax.chain(optax.inject_hyperparams(optax.sgd)(lambda count: 0.3 / (1 + count)), last), 3
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_bound_holds_after_any_optimizer(kind):
    every = 3 if kind == "multi steps" else 1
    limited, free = minimize(OPTIMIZERS[kind](limit_staleness_drift(RADIUS, 4)), window(4), window(0))
    limited, free = limited[::every], free[::every]
    assert drift(free, 4).max() > RADIUS
    np.testing.assert_allclose(drift(limited, 4).max(), RADIUS, rtol=1e-12)
    np.testing.assert_allclose(np.cross(limited[-1, :3] - limited[0, :3], free[-1, :3] - free[0, :3]), 0, atol=1e-12)


def test_a_mask_limits_the_leaves_it_shows():
    masked = optax.masked(limit_staleness_drift(RADIUS, 4), {"w": True, "b": False})
    (positions,) = minimize(optax.chain(optax.sgd(0.3), masked), window(4))
    np.testing.assert_allclose(drift(positions[:, :4], 4).max(), RADIUS, rtol=1e-12)
    np.testing.assert_allclose(drift(positions[:, 4:], 1), 0.3 * np.hypot(1.0, 0.1))


@pytest.mark.parametrize("name", LIMITS)
def test_the_radius_may_be_scheduled(name):
    injected = optax.inject_hyperparams(LIMITS[name], static_args=("max_staleness",))
    limit = injected(radius=lambda count: jnp.where(count < 10, RADIUS, 2 * RADIUS), max_staleness=2)
    (positions,) = minimize(optax.chain(optax.sgd(0.5), limit), window(2))
    np.testing.assert_allclose(drift(positions, 2)[[5, 8, 15, 20]], RADIUS * np.array([1, 1, 2, 2]), rtol=1e-12)


@pytest.mark.parametrize("name", LIMITS)
def test_a_radius_that_reaches_zero_stops_the_run_and_a_nan_shows(name):
    """What a schedule may come to, which no check can see: to divide by it would give NaN, and by a negative one turn back."""
    updates, params = jnp.arange(1.0, 5.0), jnp.ones(4)

    @jax.jit
    def factor(radius, lag):
        limit = LIMITS[name](radius, 3)
        applied, _ = limit.update(updates, limit.init(params), params, staleness=lag)
        return applied / updates

    found = [factor(radius, lag) for radius, lag in ((0.0, 3), (-1.0, 3), (np.nan, 3), (0.0, 0), (-1.0, 0))]
    np.testing.assert_array_equal(found, np.array([[0, 0, np.nan, 1, 1]]).T * np.ones(4))


def test_lags_of_prompts_count_by_their_largest_and_none_above_the_maximum():
    optimizer = limit_staleness_path(RADIUS, 4)
    state = optimizer.init(np.ones(4))

    @jax.jit
    def norms(traced):
        every = ([0, 3, 1], np.array([3, 0]), traced, 3, traced[1], 3 * traced)
        return [jnp.linalg.norm(optimizer.update(np.ones(4), state, staleness=lags)[0]) for lags in every]

    np.testing.assert_allclose(norms(np.array([1, 3])), RADIUS / np.array([3, 3, 3, 3, 3, 4]), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_an_infinite_radius_limits_nothing(rule):
    _, scale = run_many(rule, UPDATES, np.full(UPDATES.shape[:2], S), radius=np.inf)
    assert (scale == 1).all()
    for limit in LIMITS.values():
        limit(np.inf, S)  # is no error


@pytest.mark.parametrize("name", LIMITS)
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name, tmp_path):
    import orbax.checkpoint as ocp

    optimizer = OPTIMIZERS["sgd"](LIMITS[name](RADIUS, 3, exponent=0.5))
    params = as_tree(np.zeros(DIMENSION))
    state = optimizer.init(params)
    update_fn = jax.jit(optimizer.update)
    for _ in range(5):  # the middle of a window
        updates, state = update_fn(as_tree(np.ones(DIMENSION)), state, params, staleness=jnp.int32(3))
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(restored, state)
    states = (state, restored, optimizer.init(params))
    expected, after, fresh = (update_fn(as_tree(np.ones(DIMENSION)), s, params, staleness=jnp.int32(3))[0] for s in states)
    chex.assert_trees_all_equal(after, expected)
    assert optax.tree.norm(fresh) > 1.2 * optax.tree.norm(expected)  # the state matters


# -- VCPO ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "reference"), [(0.5, 1.0), (1.0, 1.0), (0.5, 0.4), (2.0, 0.8)])
def test_the_learning_rate_follows_a_power_of_the_effective_sample_size(exponent, reference):
    ratio = 0.3
    optimizer = optax.chain(optax.adamw(0.2), scale_by_ess(exponent, reference=reference))
    params = as_tree(np.arange(6.0))
    for ess, factor in [(ratio, (ratio / reference) ** exponent), (1.0, 1.0)]:
        updates, _ = optimizer.update(params, optimizer.init(params), params, ess=ess)
        expected, _ = optax.adamw(0.2 * factor).update(params, optimizer.init(params)[0], params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-12)


def test_the_ratio_is_the_one_metrics_report():
    logprobs = np.log(np.array([[0.9], [0.1], [0.1], [0.1]]))
    ratio = jax.jit(metrics.off_policy)(logprobs, np.full((4, 1), np.log(0.3)))["off_policy/ess_ratio"]
    weights = np.exp(logprobs[:, 0])
    scaled, _ = scale_by_ess().update(jnp.ones(3), optax.EmptyState(), ess=ratio)
    np.testing.assert_allclose(scaled, np.sqrt(weights.sum() ** 2 / (4 * np.sum(weights**2))), rtol=1e-12)
    broken, _ = scale_by_ess().update(jnp.ones(3), optax.EmptyState(), ess=jnp.nan * jnp.ones(()))
    assert np.isnan(broken).all()


# -- in this project's loop ----------------------------------------------------------------------------------------------------


def test_an_update_step_passes_what_the_optimizer_asks_for():
    optimizer = optax.chain(optax.sgd(1.0), scale_by_ess(), limit_staleness_path(RADIUS, 4))

    def ess_fn(learner, behavior, step, version):
        assert learner.shape == behavior.shape == (3,)
        return {"ess": 0.25 * (step + 1) / (version + 1)}

    for max_staleness, expected in [(None, RADIUS / 4), (2, RADIUS / 2), (0, np.sqrt(3 * 0.25 * 2))]:
        state = create_state(jnp.zeros(3), optimizer, 5)
        options = dict(max_staleness=max_staleness, extra_args_fn=ess_fn)
        for _ in range(2):  # at step 1 the version is 0
            before = state.params
            state, info = update_step(state, 1, lambda *_: jnp.ones(3), optimizer, **options)
        assert info.staleness == 1
        np.testing.assert_allclose(np.linalg.norm(state.params - before), expected, rtol=1e-12)


# -- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, r"radius=0 must be > 0"),
        ({"radius": np.nan}, r"radius=nan must be > 0"),
        ({"max_staleness": -1}, r"max_staleness=-1 must be an integer >= 0"),
        ({"max_staleness": 2.5}, r"max_staleness=2.5 must be an integer >= 0"),
        ({"exponent": 1.5}, r"exponent=1.5 must lie in \[0, 1\]"),
        ({"radius": None}, r"radius=None must be one number and be > 0"),
        ({"radius": [1.0]}, r"radius=\[1.0\] must be one number"),
        ({"radius": "a"}, r"radius='a' must be one number"),
        ({"radius": True}, r"radius=True must be one number"),
        ({"radius": 10**400}, r"radius=10+ must be one number"),
        ({"exponent": None}, r"exponent=None must be one number and lie in \[0, 1\]"),
        ({"radius": jnp.ones(2)}, r"radius has shape \(2,\); it must be one number"),
        ({"exponent": jnp.ones((1, 1))}, r"exponent has shape \(1, 1\); it must be one number"),
    ],
)
def test_options_out_of_range_are_named(limit, options, message):
    with pytest.raises(ValueError, match=message):
        limit(**{"radius": 1.0, "max_staleness": 2, **options})


@pytest.mark.parametrize("limit", LIMITS.values())
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "staleness is missing"),
        (3, r"staleness=3 must lie in 0..max_staleness=2"),
        ([0, -1], r"staleness=\[0, -1\] must lie in 0..max_staleness=2"),
        (1.0, r"staleness is float64\[\]; it must be one integer or integers of shape \[B\]"),
        (jnp.ones((2, 2), jnp.int32), r"staleness is int32\[2, 2\]"),
        (True, "staleness is bool"),
        (np.zeros(0, int), r"staleness is int64\[0\]"),
    ],
)
def test_a_window_that_is_none_is_refused(limit, value, message):
    optimizer = optax.chain(optax.sgd(1.0), limit(1.0, 2))
    with pytest.raises(ValueError, match=message):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2), staleness=value)


@pytest.mark.parametrize("limit", LIMITS.values())
def test_complex_updates_are_not_measured_by_their_real_part(limit):
    params, updates = {"w": np.zeros(1, complex)}, {"w": np.array([4j])}
    with pytest.raises(ValueError, match="updates are complex; real and imaginary parts must be leaves"):
        limit(1.0, 2).update(updates, limit(1.0, 2).init(params), params, staleness=1)


def test_other_missing_things_are_named():
    optimizer = limit_staleness_drift(1.0, 2)
    with pytest.raises(ValueError, match="params is None"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), staleness=1)
    for ess, message in [(None, "ess is missing"), (0.0, r"ess=0 must lie in \(0, 1\]"), (np.ones(2), r"ess has shape \(2,\)")]:
        with pytest.raises(ValueError, match=message):
            scale_by_ess().update(jnp.ones(2), optax.EmptyState(), ess=ess)
    wrong = [({"exponent": 0.0}, "exponent=0 must be > 0"), ({"reference": 1.5}, "reference=1.5 must lie in")]
    for options, message in [*wrong, ({"reference": "1"}, "reference='1' must be one number and lie in")]:
        with pytest.raises(ValueError, match=message):
            scale_by_ess(**options)


def test_examples_run():
    result = doctest.testmod(control, extraglobs={"jax": jax, "jnp": jnp, "optax": optax})
    assert result.attempted > 0 and result.failed == 0


def test_the_document_runs():
    text = (Path(__file__).resolve().parent.parent / "docs" / "control.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    names = {"__name__": "document"}
    exec(compile(block, "docs/control.md", "exec"), names)
    assert 0 < optax.tree.norm(names["params"]) <= 0.05
