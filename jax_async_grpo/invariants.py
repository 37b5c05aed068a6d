"""What must hold in every asynchronous run, as numbers to check and as assertions to call in tests.

Every invariant comes twice. `<name>_violation(...)` is a pure scalar, 0 where the invariant holds, that can be computed
inside `jit`, `scan` and `vmap` and kept per step; a job hands its chunk of them to `check`. `assert_<name>(..., atol=None)`
raises an AssertionError that names the invariant, eagerly or, under `chex.chexify`, from inside `jit`; `atol=None` is the
tolerance of `default_tolerances` for the lowest precision among the arguments. A NaN violates every invariant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo.masked import as_mask, masked_values
from jax_async_grpo.staleness import ParamHistory, read
from jax_async_grpo.types import Params

__all__ = [
    "InvariantViolation",
    "assert_finite_tree",
    "assert_no_behavior_gradient",
    "assert_recorded_behavior_logprobs",
    "assert_ring_version",
    "assert_staleness_within_bound",
    "assert_unit_ratio_at_zero_staleness",
    "assert_zero_sum_advantages",
    "check",
    "default_tolerances",
    "finite_tree_violation",
    "no_behavior_gradient_violation",
    "recorded_behavior_logprobs_violation",
    "ring_version_violation",
    "staleness_within_bound_violation",
    "unit_ratio_at_zero_staleness_violation",
    "zero_sum_advantages_violation",
]


class InvariantViolation(RuntimeError):
    """An invariant does not hold; the message names it, the learner update, the value and the tolerance."""


def default_tolerances(dtype) -> dict[str, float]:
    """What each violation may be from rounding alone; those that count or compare integers must be 0.

    Log-probs of a few nats that are computed twice in a different order differ by less than 1e-12 in float64, 1e-5 in
    float32 and 5e-2 in 16 bits (bfloat16 rounds 10 nats by up to 0.03), and so does a scaled sum of advantages. The
    numerical derivative of `no_behavior_gradient` is good to 1e-5 in float64 and 1e-2 in float32.

    Args:
      dtype: floating-point type the quantities were computed in.

    Returns:
      dict from the names of the invariants to tolerances.

    Raises:
      ValueError: dtype is not floating-point.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {np.dtype(dtype).name}; it must be a floating-point type")
    bits = jnp.finfo(dtype).bits
    rounding = 1e-12 if bits >= 64 else 1e-5 if bits >= 32 else 5e-2
    return {
        "ring_version": 0.0,
        "unit_ratio_at_zero_staleness": rounding,
        "zero_sum_advantages": rounding,
        "recorded_behavior_logprobs": rounding,
        "staleness_within_bound": 0.0,
        "no_behavior_gradient": 1e-5 if bits >= 64 else 1e-2,
        "finite_tree": 0.0,
    }


def ring_version_violation(history: ParamHistory, staleness: int | jax.Array) -> jax.Array:
    """|version in the slot that `staleness.read` takes − (t − min(s, t))|: the ring serves φ_t = θ_{t−min(s,t)}.

    It catches a traced s outside 0..K−1, a step counter out of step with the versions, and reading before the first push. It
    goes by the recorded versions: parameters stored under a wrong number are not seen.

    Args:
      history: the ring as it is read.
      staleness: s, scalar integer, learner updates.

    Returns:
      scalar, learner updates.
    """
    staleness = jnp.asarray(staleness, jnp.int32)
    # The versions tell; a history without parameters spares the read, which may be one from host memory.
    _, realised_staleness = read(dataclasses.replace(history, params=(), dtypes=()), staleness)
    return jnp.abs(realised_staleness - jnp.minimum(staleness, history.step)).astype(_float())


def assert_ring_version(history: ParamHistory, staleness: int | jax.Array, *, atol: float | None = None) -> None:
    """Raise AssertionError unless `ring_version_violation` ≤ atol (0 by default)."""
    _assert_holds("ring_version", ring_version_violation(history, staleness), _float(), atol)


def unit_ratio_at_zero_staleness_violation(
    logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array | None, staleness: jax.Array
) -> jax.Array:
    """max |log π_θ − log π_old| over the valid tokens of rows with staleness 0: fresh rollouts have ratio 1.

    Args:
      logprobs: [..., L] log π_θ, nats.
      old_logprobs: [..., L] log-probs of the ratio's denominator, nats.
      mask: [..., L] bool or 0/1, None = all valid.
      staleness: integers whose axes are the first axes of the log-probs: one for all rows [], per prompt [B], per row [B, G].

    Returns:
      scalar, nats; 0 where no row is fresh.

    Raises:
      ValueError: shapes that do not match.
    """
    shape = jnp.shape(logprobs)
    staleness = jnp.asarray(staleness)
    if staleness.ndim >= max(len(shape), 1) or staleness.shape != shape[: staleness.ndim]:
        raise ValueError(f"staleness has shape {staleness.shape}; it must be one of the leading shapes of logprobs, {shape}")
    fresh = jnp.broadcast_to(staleness.reshape(staleness.shape + (1,) * (len(shape) - staleness.ndim)) == 0, shape)
    return _largest_difference("old_logprobs", logprobs, old_logprobs, as_mask(mask, shape) & fresh)


def assert_unit_ratio_at_zero_staleness(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    mask: jax.Array | None,
    staleness: jax.Array,
    *,
    atol: float | None = None,
) -> None:
    """Raise AssertionError unless `unit_ratio_at_zero_staleness_violation` ≤ atol nats."""
    violation = unit_ratio_at_zero_staleness_violation(logprobs, old_logprobs, mask, staleness)
    _assert_holds("unit_ratio_at_zero_staleness", violation, _coarsest(logprobs, old_logprobs), atol)


def zero_sum_advantages_violation(advantages: jax.Array) -> jax.Array:
    """max over groups of |Σ_G A|, divided by the largest Σ_G |A| of them: a common reward cancels from every group.

    The scale is that of all groups together: in a group of equal rewards rounding alone makes |Σ A| as large as Σ |A|.

    Args:
      advantages: [..., G].

    Returns:
      scalar in 0..1, 0 where all advantages are 0.

    Raises:
      ValueError: advantages has no group axis.
    """
    if jnp.ndim(advantages) < 1:
        raise ValueError("advantages is a scalar; it must be [..., G]")
    advantages = _at_least_float32(advantages)
    scale = jnp.max(jnp.sum(jnp.abs(advantages), axis=-1), initial=0)
    return jnp.max(jnp.abs(jnp.sum(advantages, axis=-1)), initial=0) / jnp.where(scale == 0, 1, scale)


def assert_zero_sum_advantages(advantages: jax.Array, *, atol: float | None = None) -> None:
    """Raise AssertionError unless `zero_sum_advantages_violation` ≤ atol."""
    _assert_holds("zero_sum_advantages", zero_sum_advantages_violation(advantages), _coarsest(advantages), atol)


def recorded_behavior_logprobs_violation(
    recorded: jax.Array, recomputed: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """max |recorded − recomputed| over valid tokens: the log-probs that came with the data are those of φ.

    A mismatch at staleness 0 is numerical (another kernel, dtype or sampling temperature) and would pass for staleness.

    Args:
      recorded: [..., L] log-probs recorded when the tokens were drawn, nats.
      recomputed: [..., L] log π_φ of the same tokens, nats.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      scalar, nats; 0 for an empty mask.

    Raises:
      ValueError: shapes that do not match.
    """
    return _largest_difference("recomputed", recorded, recomputed, as_mask(mask, jnp.shape(recorded)))


def assert_recorded_behavior_logprobs(
    recorded: jax.Array, recomputed: jax.Array, mask: jax.Array | None = None, *, atol: float | None = None
) -> None:
    """Raise AssertionError unless `recorded_behavior_logprobs_violation` ≤ atol nats."""
    violation = recorded_behavior_logprobs_violation(recorded, recomputed, mask)
    _assert_holds("recorded_behavior_logprobs", violation, _coarsest(recorded, recomputed), atol)


def staleness_within_bound_violation(staleness: jax.Array, max_staleness: int | jax.Array) -> jax.Array:
    """How far the realised staleness leaves 0..S: max(s − S, −s, 0) over all entries.

    Args:
      staleness: [...] integers, step − policy_version, learner updates.
      max_staleness: S, scalar.

    Returns:
      scalar, learner updates.
    """
    staleness, bound = (jnp.asarray(x).astype(_float()) for x in (staleness, max_staleness))  # unsigned integers would wrap
    return jnp.max(jnp.maximum(staleness - bound, -staleness), initial=0)


def assert_staleness_within_bound(staleness: jax.Array, max_staleness: int | jax.Array, *, atol: float | None = None) -> None:
    """Raise AssertionError unless `staleness_within_bound_violation` ≤ atol (0 by default)."""
    _assert_holds("staleness_within_bound", staleness_within_bound_violation(staleness, max_staleness), _float(), atol)


def no_behavior_gradient_violation(
    objective: Callable[[Params, Params], jax.Array], gradient: Params, learner_params: Params, behavior_params: Params
) -> jax.Array:
    """Largest relative difference between ⟨gradient, v⟩ and the slope of `objective` in θ alone, along two directions v.

    The update is H(θ,φ) = ∂_θ L(θ,φ) with φ held (arXiv 2607.01083). Where the behavior log-probs are recomputed at φ = θ and
    a stop_gradient is missing, automatic differentiation gives dL(θ,θ)/dθ instead, which for zero-sum advantages is 0. The
    slope here is a central difference in argument 0, which no gradient can leak into. The directions are gradient/‖gradient‖
    and a fixed pseudo-random one, which also sees a gradient that the leak made 0 or moved at right angles to itself.
    Differences within ten times the rounding error of the central difference count as 0.

    Args:
      objective: `objective(learner_params, behavior_params) -> scalar`, the function the update ascends (or descends: then
        with its sign), with everything that depends on φ taken from argument 1. It must not stop gradients of the learner:
        a detached factor is no part of any slope.
      gradient: what the update uses, a pytree like learner_params.
      learner_params: θ, float32 or float64.
      behavior_params: φ, may equal θ (where a leak is easiest to see) or not.

    Returns:
      scalar; about 1 for a gradient of the wrong function, 0 where gradient and slopes vanish.

    Raises:
      ValueError: gradient of another structure or shape, an objective that is no scalar, parameters of lower precision than
        float32.
    """
    dtype = _coarsest(*jax.tree.leaves(learner_params))
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(f"learner_params has {dtype} leaves; a numerical derivative needs float32 or float64")
    if jax.tree.map(jnp.shape, gradient) != jax.tree.map(jnp.shape, learner_params):
        raise ValueError("gradient and learner_params differ in structure or shapes; they must be alike")
    epsilon = float(jnp.finfo(dtype).eps)
    step = epsilon ** (1 / 3)  # balances rounding, ε/step, and the next term of the series, step²
    gradient = jax.tree.map(lambda g, p: jnp.asarray(g, jnp.result_type(p)), gradient, learner_params)
    directions = [_unit(gradient), _unit(optax.tree.random_like(jax.random.key(0), learner_params))]
    offsets = [optax.tree.scale(sign * step, v) for v in directions for sign in (1, -1)]
    # A map compiles the objective once for the four points.
    values = jax.lax.map(
        lambda offset: objective(optax.tree.add(learner_params, offset), behavior_params),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *offsets),
    )
    if values.shape != (4,):
        raise ValueError(f"objective returns shape {values.shape[1:]}; it must return a scalar")
    slopes = (values[0::2] - values[1::2]) / (2 * step)
    claimed = jnp.stack([optax.tree.vdot(gradient, v) for v in directions])
    rounding = 10 * epsilon / step * (jnp.max(jnp.abs(values)) + optax.tree.norm(gradient))
    size = jnp.maximum(jnp.abs(slopes), jnp.abs(claimed))
    excess = jnp.maximum(jnp.abs(slopes - claimed) - rounding, 0)
    return jnp.max(excess / jnp.where(size == 0, 1, size))


def assert_no_behavior_gradient(
    objective: Callable[[Params, Params], jax.Array],
    gradient: Params,
    learner_params: Params,
    behavior_params: Params,
    *,
    atol: float | None = None,
) -> None:
    """Raise AssertionError unless `no_behavior_gradient_violation` ≤ atol."""
    violation = no_behavior_gradient_violation(objective, gradient, learner_params, behavior_params)
    _assert_holds("no_behavior_gradient", violation, _coarsest(*jax.tree.leaves(learner_params)), atol)


def finite_tree_violation(tree: Params) -> jax.Array:
    """Number of entries of a pytree that are NaN or infinite; integer leaves have none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return sum((jnp.sum(~jnp.isfinite(leaf), dtype=_float()) for leaf in leaves), start=jnp.zeros((), _float()))


def assert_finite_tree(tree: Params, *, atol: float | None = None) -> None:
    """Raise AssertionError unless `finite_tree_violation` ≤ atol (0 by default)."""
    _assert_holds("finite_tree", finite_tree_violation(tree), _float(), atol)


def check(violations: Mapping[str, jax.Array], step: int | np.ndarray, tolerances: Mapping[str, float]) -> None:
    """Raise on the earliest violation in a chunk of updates; on the host, once per chunk.

    >>> check({"ring_version": np.zeros(4), "finite_tree": np.array([0, 0, 3, 1])}, 100, default_tolerances(np.float32))
    Traceback (most recent call last):
    jax_async_grpo.invariants.InvariantViolation: invariant finite_tree violated at step 102: 3 > tolerance 0

    Args:
      violations: invariant name to its violation: a scalar, or [chunk, ...] with learner updates on the first axis.
      step: learner update of the first entry, the following ones belonging to consecutive updates; or [chunk], the update of
        each entry.
      tolerances: largest violation allowed, by name; names without a violation are ignored.

    Raises:
      InvariantViolation: a violation above its tolerance, or NaN.
      ValueError: a violation without a tolerance, or another number of steps than of its entries.
    """
    found = []
    for name, violation in violations.items():
        if name not in tolerances:
            raise ValueError(f"invariant {name} has no tolerance; tolerances are given for {sorted(tolerances)}")
        values = np.atleast_1d(np.asarray(violation, np.float64))
        values = values.max(axis=tuple(range(1, values.ndim)), initial=0)
        steps = np.asarray(step) if np.ndim(step) else step + np.arange(len(values))
        if steps.shape != values.shape:
            raise ValueError(f"invariant {name} has {len(values)} entries and step has shape {steps.shape}")
        violated = ~(values <= tolerances[name])  # so that NaN is violated
        if violated.any():
            first = int(np.argmax(violated))
            found.append((int(steps[first]), name, values[first]))
    if found:
        at, name, value = min(found, key=lambda entry: entry[0])
        raise InvariantViolation(f"invariant {name} violated at step {at}: {value:.6g} > tolerance {tolerances[name]:.6g}")


def _assert_holds(name: str, violation: jax.Array, dtype, atol: float | None) -> None:
    atol = default_tolerances(dtype)[name] if atol is None else atol
    chex.assert_trees_all_close(
        violation,
        jnp.zeros_like(violation),
        rtol=0,
        atol=atol,
        custom_message=f"invariant {name} violated: {{}} > tolerance {atol:.6g}",
        custom_message_format_vars=[violation],
    )


def _largest_difference(name: str, values: jax.Array, other: jax.Array, valid: jax.Array) -> jax.Array:
    if jnp.shape(other) != jnp.shape(values):
        raise ValueError(f"{name} has shape {jnp.shape(other)}; it must be {jnp.shape(values)}")
    values, other = (masked_values(_at_least_float32(x), valid) for x in (values, other))
    return jnp.max(jnp.abs(values - other), initial=0)


def _unit(tree: Params) -> Params:
    norm = optax.tree.norm(tree)
    return optax.tree.scale(1 / jnp.where(norm == 0, 1, norm), tree)


def _coarsest(*arrays: jax.Array):
    """The dtype of lowest precision among the floating-point arrays; the default one if there is none."""
    dtypes = [jnp.result_type(x) for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps, default=_float())


def _at_least_float32(values: jax.Array) -> jax.Array:
    return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))


def _float():
    return jnp.result_type(float)
