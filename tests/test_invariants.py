"""Each invariant holds on good data and fires on data broken in the way it is there for, eagerly and inside jit."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, invariants, losses, staleness
from jax_async_grpo.invariants import InvariantViolation, check, default_tolerances

B, G, L, K = 2, 4, 3, 4
RNG = np.random.default_rng(0)
LOGPROBS = RNG.normal(-2, 1, size=(B, G, L))
MASK = RNG.random((B, G, L)) < 0.8
REWARDS = np.array([[0.0, 1.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]])


push = jax.jit(staleness.push)


def filled_history(num_pushes: int = 7) -> staleness.ParamHistory:
    history = staleness.create_history({"w": jnp.zeros(2)}, K)
    for t in range(num_pushes):
        history = push(history, {"w": jnp.full(2, float(t))})
    return history


HISTORY = filled_history()


def at(array: np.ndarray, index, value) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


VALID, FRESH = tuple(np.argwhere(MASK[0])[0]), np.array([0, 3])
HIDDEN = np.where(MASK, LOGPROBS, np.nan)
LIKE_BF16 = LOGPROBS.astype(jnp.bfloat16)

# name: arguments that keep the invariant
HOLDS = [
    ("ring_version", (HISTORY, 0)),
    ("ring_version", (HISTORY, K - 1)),
    ("ring_version", (filled_history(2), K - 1)),  # t = 1: min(s, t) is 1
    ("unit_ratio_at_zero_staleness", (LOGPROBS, LOGPROBS, None, np.array(0))),
    ("unit_ratio_at_zero_staleness", (LOGPROBS, HIDDEN, MASK, FRESH)),
    ("unit_ratio_at_zero_staleness", (LOGPROBS, at(LOGPROBS, 1, -9.0), MASK, FRESH)),  # a stale prompt may have any ratio
    ("unit_ratio_at_zero_staleness", (LOGPROBS, at(LOGPROBS, (0, 1), np.nan), None, at(np.zeros((B, G), int), (0, 1), 2))),
    ("zero_sum_advantages", (advantages.group_normalized(REWARDS),)),
    ("zero_sum_advantages", (advantages.leave_one_out(REWARDS.astype(np.float32)),)),
    ("zero_sum_advantages", (np.array([[1.0, -1.0], [1e-17, 1e-17]]),)),  # the rounding of a group of equal rewards
    ("zero_sum_advantages", (np.zeros((B, G)),)),
    ("recorded_behavior_logprobs", (LOGPROBS, LOGPROBS + 1e-13, None)),
    ("recorded_behavior_logprobs", (LOGPROBS.astype(np.float32), LOGPROBS, MASK)),
    ("recorded_behavior_logprobs", (LIKE_BF16, LOGPROBS.astype(np.float32), MASK)),
    ("recorded_behavior_logprobs", (HIDDEN, at(LOGPROBS, ~MASK, np.inf), MASK)),
    ("recorded_behavior_logprobs", (HIDDEN, LOGPROBS, np.zeros_like(MASK))),
    ("staleness_within_bound", (np.array([[0, 4], [2, 1]]), 4)),
    ("staleness_within_bound", (np.array([1, 0], np.uint32), 2)),
    ("finite_tree", ({"a": np.ones(3), "b": (np.arange(2), None)},)),
    ("finite_tree", ({},)),
]
# name, arguments that break it, the violation
FIRES = [
    ("ring_version", (HISTORY, K), K),  # a traced staleness outside the ring: the latest version comes back
    ("ring_version", (HISTORY, K + 1), K),
    ("ring_version", (HISTORY, -1), K),
    ("ring_version", (dataclasses.replace(HISTORY, step=HISTORY.step + 1), 0), K),  # the step ran ahead of the pushes
    ("ring_version", (dataclasses.replace(HISTORY, versions=jnp.roll(HISTORY.versions, 1)), 0), 1),
    ("ring_version", (filled_history(0), 0), 1),
    ("unit_ratio_at_zero_staleness", (LOGPROBS, at(LOGPROBS, (0, *VALID), LOGPROBS[(0, *VALID)] + 0.5), MASK, FRESH), 0.5),
    ("unit_ratio_at_zero_staleness", (LOGPROBS, LOGPROBS + 1e-9, None, np.zeros((B, G), int)), 1e-9),
    ("unit_ratio_at_zero_staleness", (LOGPROBS, at(LOGPROBS, (0, *VALID), np.nan), MASK, FRESH), np.nan),
    ("zero_sum_advantages", (np.array([[1.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),), 1 / 3),
    ("zero_sum_advantages", (1e-9 * REWARDS[:1],), 1.0),  # without a baseline, whatever the scale of the rewards
    ("zero_sum_advantages", (at(REWARDS, (0, 0), np.nan),), np.nan),
    ("recorded_behavior_logprobs", (LOGPROBS, LOGPROBS + 1e-6, None), 1e-6),
    ("recorded_behavior_logprobs", (LOGPROBS.astype(np.float32), (LOGPROBS - 1e-3).astype(np.float32), None), 1e-3),
    ("recorded_behavior_logprobs", (LIKE_BF16, (LIKE_BF16 + 0.25).astype(jnp.bfloat16), None), 0.25),
    ("recorded_behavior_logprobs", (LOGPROBS, at(LOGPROBS, (0, *VALID), -np.inf), MASK), np.inf),
    ("staleness_within_bound", (np.array([[0, 5], [2, 1]]), 4), 1),
    ("staleness_within_bound", (np.array([3, -2]), 4), 2),  # data from the future
    ("staleness_within_bound", (np.array([1, 5], np.uint32), np.uint32(4)), 1),
    ("finite_tree", ({"a": np.array([1.0, np.nan, np.inf]), "b": (np.array([-np.inf]), np.arange(2))},), 3),
]


def first_of_each(cases: list[tuple]) -> list[tuple]:
    return list({case[0]: case for case in reversed(cases)}.values())


@pytest.mark.parametrize(("name", "arguments"), HOLDS)
def test_holds(name, arguments):
    getattr(invariants, f"assert_{name}")(*arguments)
    assert getattr(invariants, f"{name}_violation")(*arguments) <= 0.05


@pytest.mark.parametrize(("name", "arguments", "value"), FIRES)
def test_fires_and_says_its_name(name, arguments, value):
    with pytest.raises(AssertionError, match=f"invariant {name} violated: .* > tolerance"):
        getattr(invariants, f"assert_{name}")(*arguments)
    violation = getattr(invariants, f"{name}_violation")(*arguments)
    assert violation.shape == () and jnp.issubdtype(violation.dtype, jnp.floating)
    np.testing.assert_allclose(violation, value, rtol=0.05)


@pytest.mark.parametrize(("name", "arguments"), first_of_each(HOLDS))
def test_holds_under_chexify(name, arguments):
    chex.chexify(jax.jit(getattr(invariants, f"assert_{name}")), async_check=False)(*arguments)


@pytest.mark.parametrize(("name", "arguments", "_"), first_of_each(FIRES))
def test_fires_under_chexify(name, arguments, _):
    in_jit = chex.chexify(jax.jit(getattr(invariants, f"assert_{name}")), async_check=False)
    with pytest.raises(AssertionError, match=f"invariant {name} violated: .* > tolerance"):
        in_jit(*arguments)


@pytest.mark.parametrize(("name", "arguments", "value"), first_of_each(FIRES))
def test_a_tolerance_above_the_violation_lets_it_pass(name, arguments, value):
    getattr(invariants, f"assert_{name}")(*arguments, atol=1.1 * value)
    with pytest.raises(AssertionError, match=name):
        getattr(invariants, f"assert_{name}")(*arguments, atol=0.9 * value)


def test_a_ring_that_reads_one_version_off_is_caught(monkeypatch):
    monkeypatch.setattr(invariants, "read", lambda history, s: staleness.read(history, s + 1))
    with pytest.raises(AssertionError, match="ring_version"):
        invariants.assert_ring_version(HISTORY, 2)


def test_ring_version_is_checked_inside_the_loop_that_reads():
    def run(schedule):
        def body(history, inputs):
            t, s = inputs
            history = staleness.push(history, {"w": jnp.full(2, t, float)})
            return history, invariants.ring_version_violation(history, s)

        return jax.lax.scan(body, staleness.create_history({"w": jnp.zeros(2)}, K), (jnp.arange(len(schedule)), schedule))[1]

    assert jax.jit(run)(staleness.fixed(K - 1, 9)).tolist() == [0] * 9
    violations = jax.jit(run)(staleness.fixed(K, 9))
    assert violations.tolist() == [0] * 4 + [K] * 5  # min(s, t) = K for the first time at t = 4
    with pytest.raises(InvariantViolation, match=r"^invariant ring_version violated at step 104: 4 > tolerance 0$"):
        check({"ring_version": violations}, 100, default_tolerances(jnp.float32))


def test_violations_vmap():
    on_host = staleness.push(staleness.create_history({"w": jnp.zeros(2)}, K, memory_kind="pinned_host"), {"w": jnp.zeros(2)})
    for history, want in ((HISTORY, [0, 0, 0, K]), (on_host, [0] * 4)):
        got = jax.jit(jax.vmap(invariants.ring_version_violation, (None, 0)))(history, jnp.array([0, 1, 3, K]))
        assert got.tolist() == want
    assert jax.vmap(invariants.zero_sum_advantages_violation)(REWARDS).tolist() == [1, 1]
    assert jax.vmap(invariants.staleness_within_bound_violation, (0, None))(np.array([[1], [3]]), 2).tolist() == [0, 1]
    assert jax.vmap(invariants.finite_tree_violation)(np.array([[1.0], [np.nan]])).tolist() == [0, 1]
    ratio = jax.vmap(invariants.unit_ratio_at_zero_staleness_violation)(LOGPROBS, LOGPROBS + 1, MASK, FRESH)
    np.testing.assert_allclose(ratio, [1, 0])


# A softmax policy over V tokens in C contexts. `surrogate` has the ratio's denominator at φ, as a trainer recomputes it.
C, V = 3, 5
TOKENS = RNG.integers(V, size=(40, L))
CONTEXTS = RNG.integers(C, size=(40, L))
SAMPLE_ADVANTAGES = RNG.normal(size=40)


def surrogate(learner_params, behavior_params):
    learner, behavior = (
        jax.nn.log_softmax(p["table"] + p["bias"])[CONTEXTS, TOKENS] for p in (learner_params, behavior_params)
    )
    return -jnp.mean(losses.ppo_clip(learner, behavior, SAMPLE_ADVANTAGES.astype(learner.dtype)))


def make_params(seed: int, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {"table": jnp.asarray(rng.normal(size=(C, V)), dtype), "bias": jnp.asarray(rng.normal(size=V), dtype)}


def nearby(params, distance=0.03):
    return jax.tree.map(lambda x, y: x + jnp.asarray(distance, x.dtype) * y, params, make_params(9, params["bias"].dtype))


held = jax.jit(jax.grad(surrogate))


@jax.jit
def leaked(params, behavior):
    return jax.tree.map(jnp.add, *jax.grad(surrogate, argnums=(0, 1))(params, behavior))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("fresh", [True, False])
def test_no_behavior_gradient_tells_the_partial_from_the_total_derivative(dtype, fresh):
    params = make_params(1, dtype)
    behavior = params if fresh else nearby(params)
    good, bad = held(params, behavior), leaked(params, behavior)

    @jax.jit
    def run(gradient, params, behavior):
        invariants.assert_no_behavior_gradient(surrogate, gradient, params, behavior)
        return invariants.no_behavior_gradient_violation(surrogate, gradient, params, behavior)

    run = chex.chexify(run, async_check=False)
    assert run(good, params, behavior) < (1e-8 if dtype == jnp.float64 else 2e-3)
    with pytest.raises(AssertionError, match="invariant no_behavior_gradient violated"):
        run(bad, params, behavior)
    if fresh:  # the ratio is 1 whatever θ: the leak leaves nothing of the gradient, not even a direction
        assert max(abs(x).max() for x in jax.tree.leaves(bad)) < 1e-6 < abs(good["table"]).max()


def test_no_behavior_gradient_eagerly():
    params = make_params(1)
    with pytest.raises(AssertionError, match="invariant no_behavior_gradient violated"):
        invariants.assert_no_behavior_gradient(surrogate, leaked(params, params), params, params)
    invariants.assert_no_behavior_gradient(surrogate, leaked(params, params), params, params, atol=1.1)


def test_no_behavior_gradient_sees_what_the_gradients_own_direction_hides():
    params = make_params(2)
    good = held(params, params)
    other = make_params(3)
    flatten, unflatten = jax.flatten_util.ravel_pytree(good)
    across = jax.flatten_util.ravel_pytree(other)[0]
    across -= flatten * (across @ flatten) / (flatten @ flatten)
    across *= jnp.linalg.norm(flatten) / jnp.linalg.norm(across)
    # ⟨h, h⟩ = ⟨g, h⟩ for h = (g + u)/2 with u ⟂ g and ‖u‖ = ‖g‖: along h itself, h is right.
    hidden = unflatten((flatten + across) / 2)
    violation = jax.jit(lambda h: invariants.no_behavior_gradient_violation(surrogate, h, params, params))
    assert violation(hidden) > 0.05
    for factor in (0.5, 0.999, -1.0, 0.0):
        scaled = jax.tree.map(lambda g, factor=factor: factor * g, good)
        np.testing.assert_allclose(violation(scaled), abs(1 - factor) / max(1, abs(factor)), rtol=1e-4)
    assert np.isnan(violation(jax.tree.map(lambda g: g * jnp.nan, good)))


def test_no_behavior_gradient_takes_no_rounding_for_a_slope():
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(make_params(seed, jnp.float32) for seed in range(20)))

    def constant(p, _):  # up to rounding, whatever θ
        return jnp.sum(jnp.exp(p["table"] - jax.nn.logsumexp(p["table"])))

    def violation(p):
        return invariants.no_behavior_gradient_violation(constant, jax.tree.map(jnp.zeros_like, p), p, p)

    assert len(set(jax.vmap(constant, (0, None))(params, None).tolist())) > 1
    assert jax.jit(jax.vmap(violation))(params).tolist() == [0.0] * 20


def test_no_behavior_gradient_refuses():
    params = make_params(1)
    function = invariants.no_behavior_gradient_violation
    with pytest.raises(ValueError, match="^gradient and learner_params differ in structure or shapes"):
        function(surrogate, {"table": params["table"]}, params, params)
    with pytest.raises(ValueError, match="^gradient and learner_params differ in structure or shapes"):
        function(surrogate, {**params, "bias": jnp.zeros(())}, params, params)
    with pytest.raises(ValueError, match=r"^objective returns shape \(5,\); it must return a scalar$"):
        function(lambda p, _: p["bias"], params, params, params)
    low = {**params, "bias": params["bias"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="^learner_params has bfloat16 leaves"):
        function(surrogate, low, low, low)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unit_ratio_at_zero_staleness", (LOGPROBS, LOGPROBS, None, np.zeros(G)), r"staleness has shape \(4,\)"),
        ("unit_ratio_at_zero_staleness", (LOGPROBS, LOGPROBS, None, np.zeros((B, G, L))), r"staleness has shape \(2, 4, 3\)"),
        ("unit_ratio_at_zero_staleness", (LOGPROBS, LOGPROBS[0], None, np.zeros(B)), r"old_logprobs has shape \(4, 3\)"),
        ("recorded_behavior_logprobs", (LOGPROBS, LOGPROBS[:1]), r"recomputed has shape \(1, 4, 3\); it must be \(2, 4, 3\)"),
        ("recorded_behavior_logprobs", (LOGPROBS, LOGPROBS, MASK[0]), r"mask has shape \(4, 3\)"),
        ("zero_sum_advantages", (np.array(1.0),), r"advantages is a scalar"),
    ],
)
def test_shapes_that_do_not_match_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(invariants, f"assert_{name}")(*arguments)


def test_default_tolerances_cover_every_invariant():
    names = {name.removesuffix("_violation") for name in invariants.__all__ if name.endswith("_violation")}
    assert names == {name.removeprefix("assert_") for name in invariants.__all__ if name.startswith("assert_")}
    by_dtype = [default_tolerances(dtype) for dtype in (jnp.float64, jnp.float32, jnp.bfloat16)]
    assert len(names) == 7 and all(set(tolerances) == names for tolerances in by_dtype)
    assert all(fine[n] <= coarse[n] for fine, coarse in zip(by_dtype, by_dtype[1:], strict=False) for n in names)
    with pytest.raises(ValueError, match="^dtype is int32; it must be a floating-point type$"):
        default_tolerances(jnp.int32)


TOLERANCES = {"first": 0.5, "second": 0.0, "third": 1.0}


def test_check_passes_what_is_within_tolerance():
    check({"first": np.array([0.5, 0.0]), "second": jnp.zeros(2), "third": 1.0}, 7, TOLERANCES)
    check({}, 0, TOLERANCES)
    check({"first": np.zeros(0)}, 3, TOLERANCES)


@pytest.mark.parametrize(
    ("violations", "step", "message"),
    [
        ({"first": 0.75}, 12, "invariant first violated at step 12: 0.75 > tolerance 0.5"),
        ({"second": jnp.asarray(2, jnp.bfloat16)}, 12, "invariant second violated at step 12: 2 > tolerance 0"),
        ({"third": np.nan}, 3, "invariant third violated at step 3: nan > tolerance 1"),
        ({"third": [0, np.nan, np.inf]}, 3, "invariant third violated at step 4: nan > tolerance 1"),
        ({"first": [0, 0, 0, 1], "second": [0, 0, 1, 9]}, 20, "invariant second violated at step 22: 1 > tolerance 0"),
        ({"second": [0, 1], "first": [0.5, 1]}, 0, "invariant second violated at step 1: 1 > tolerance 0"),
        ({"first": [0, 2, 3]}, np.array([10, 20, 30]), "invariant first violated at step 20: 2 > tolerance 0.5"),
        ({"first": [[0, 0], [0.5, np.nan]]}, jnp.asarray(5), "invariant first violated at step 6: nan > tolerance 0.5"),
        ({"first": [[0, 0], [0.75, 4]]}, 5, "invariant first violated at step 6: 4 > tolerance 0.5"),
    ],
)
def test_check_names_the_earliest_violation(violations, step, message):
    with pytest.raises(InvariantViolation) as error:
        check({name: np.asarray(value) for name, value in violations.items()}, step, TOLERANCES)
    assert str(error.value) == message and isinstance(error.value, RuntimeError)


def test_check_refuses():
    with pytest.raises(ValueError, match=r"^invariant frist has no tolerance; tolerances are given for \['first'"):
        check({"frist": 0.0}, 0, TOLERANCES)
    with pytest.raises(ValueError, match=r"^invariant first has 3 entries and step has shape \(2,\)$"):
        check({"first": np.zeros(3)}, np.arange(2), TOLERANCES)
