"""What is measured once per case, at a stale pair (θ, φ) of a trajectory: first-order law, parts by role, R_batch, R_crit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import bias, exact, invariants, policies, scaling, sweeps
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.experiment import Case
from jax_async_grpo.separability import named_parameters
from jax_async_grpo.types import Params, Rollouts

__all__ = [
    "NOT_APPLICABLE",
    "batch_clip_radius",
    "collapse_radius",
    "decomposition",
    "invariant_violations",
    "linear_response",
    "rollout_violations",
    "tolerances",
]

NOT_APPLICABLE = "n/a"
_SEARCH = 1e3  # times the drift: how far R_batch is looked for
_SCALES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)  # of the realised drift: small enough for the leading term of the error


def linear_response(
    case: Case, learner_params: Params, behavior_params: Params, staleness_x_learning_rate: float
) -> dict[str, Any]:
    """How well one jvp predicts δ along the realised drift: relative errors at several drifts, and their slope.

    The drift direction is the realised one, its length is scaled; the guard of `bias.check_first_order` runs first.

    Args:
      case: what to measure on.
      learner_params, behavior_params: θ, φ of a trajectory.
      staleness_x_learning_rate: S·η of that pair, so that the length belonging to S·η = 1e-3 is known.

    Returns:
      {"drift": [...], "relative_error": [...], "slope": their log-log slope, "relative_error_at_realised_drift": ...,
      "relative_error_at_1e-3": at S·η = 1e-3}.

    Raises:
      bias.FirstOrderError: the case's loss has no first-order law.
    """
    direction = optax.tree.sub(behavior_params, learner_params)
    bias.check_first_order(case.gradient, learner_params, direction)
    at_one_thousandth = 1e-3 / staleness_x_learning_rate
    scales = jnp.asarray([*_SCALES, 1.0, at_one_thousandth])

    @jit_once
    def relative_errors(learner_params, direction):
        slope = jax.jvp(lambda behavior: case.gradient(learner_params, behavior), (learner_params,), (direction,))[1]

        def error(scale):
            measured = bias.surrogate_bias(
                case.gradient, learner_params, optax.tree.add_scale(learner_params, scale, direction)
            )
            return optax.tree.norm(optax.tree.add_scale(measured.bias, -scale, slope)) / measured.norm

        return jax.lax.map(error, scales)

    errors = np.asarray(relative_errors(learner_params, direction))
    drift = float(optax.tree.norm(direction)) * np.asarray(_SCALES)
    slope = float(scaling.fit_power_law(drift, errors[:-2], num_bootstrap=100).exponents[0])
    return {
        "drift": drift.tolist(),
        "relative_error": errors[:-2].tolist(),
        "slope": slope,
        "relative_error_at_realised_drift": float(errors[-2]),
        "relative_error_at_1e-3": float(errors[-1]),
    }


def decomposition(case: Case, learner_params: Params, behavior_params: Params) -> dict[str, Any]:
    """δ by role of the behavior policy and by clip: norms, and shares ⟨part, δ⟩/‖δ‖², which add up to 1."""
    unclipped = functools.partial(case.role_gradient, clipped=False)
    decompose = functools.partial(bias.decompose, case.role_gradient, unclipped)
    parts = jit_once(decompose)(learner_params, behavior_params)
    total = optax.tree.norm(parts.total)
    named = {name: getattr(parts, name) for name in ("sampling", "denominator", "statistics", "clip")}
    return {
        "norm": {name: float(optax.tree.norm(part)) for name, part in named.items()} | {"total": float(total)},
        "share": {name: float(optax.tree.vdot(part, parts.total) / total**2) for name, part in named.items()},
        "order_spread": {name: float(spread) for name, spread in parts.order_spread.items()},
        "interaction_norm": float(parts.interaction_norm),
    }


def batch_clip_radius(
    case: Case, learner_params: Params, behavior_params: Params, *, level: float, epsilons: tuple[float, float]
) -> dict[str, float]:
    """R_batch along the realised drift of this pair: how far θ may be from φ before `level` of the tokens are clipped, exactly.

    Rollouts stay those of φ; the learner moves on along θ − φ.

    Returns:
      {"batch_clip_radius": parameter distance, inf where the level is not reached, "largest_searched": 1000 times the drift,
      where the search ends}.
    """
    drift = float(optax.tree.norm(optax.tree.sub(learner_params, behavior_params)))
    unit = optax.tree.scale(1 / drift, optax.tree.sub(learner_params, behavior_params))

    @jax.jit
    def fractions(radii):
        def fraction(radius):
            return exact.clip_fraction(
                case.policy,
                optax.tree.add_scale(behavior_params, radius, unit),
                behavior_params,
                case.task,
                group_size=case.algorithm.group_size,
                advantage_fn=case.algorithm.advantage_fn,
                epsilon_low=epsilons[0],
                epsilon_high=epsilons[1],
            )

        return jax.lax.map(fraction, radii)

    radius = scaling.batch_clip_radius(
        lambda radii: np.clip(fractions(radii), 0.0, 1.0),  # rounding may leave [0, 1] by an ulp
        level=level,
        max_radius=_SEARCH * drift,
        min_radius=1e-3 * drift,
        num_scan=96,
        relative_tolerance=1e-4,
    )
    return {"batch_clip_radius": radius, "largest_searched": _SEARCH * drift}


def collapse_radius(case: Case, *, fraction: float) -> dict[str, Any]:
    """R_crit: ‖θ − θ_0‖ where a synchronous run's gold reward first falls below `fraction` of its peak so far.

    The run (S = 0, exact updates) has the case's `horizon_learning_rate` and `horizon_updates`. The rule needs a peak above the
    start, so that a run that never improved does not count as collapsed. A reward or drift that is not finite is a collapse
    too, at the last finite drift before it.

    Returns:
      {"critical_drift_radius": None where it was not measured, inf where nothing collapsed, "collapse_step": None in both,
      "largest_drift": max ‖θ_t − θ_0‖ that was finite, None where it was not measured, "finite": whether all of the run was}.
    """
    num_updates = case.config["horizon_updates"]
    if not num_updates:
        return {"critical_drift_radius": None, "collapse_step": None, "largest_drift": None, "finite": None}
    run = sweeps.bias_grid(case.gradient, case.update_gradient("exact"), case.rewards, case.optimizer_fn, capacity=2)
    steps = np.unique(np.linspace(0, num_updates, 513).astype(np.int32))
    schedule = np.zeros((1, num_updates + 1), np.int32)
    keys = jax.random.split(jax.random.key(0), 1)  # exact updates draw nothing
    measured = run(case.params, case.config["horizon_learning_rate"], schedule, keys, steps)
    gold = np.asarray(measured.reward["gold_reward"])[0]
    drift = np.asarray(measured.values["drift/cumulative"])[0]
    finite = np.isfinite(gold) & np.isfinite(drift)
    peak = np.maximum.accumulate(np.where(finite, gold, -np.inf))
    failed = ~finite | (gold < fraction * peak) & (peak > gold[0])
    first = int(np.argmax(failed)) if failed.any() else None
    largest = float(np.max(drift, where=finite, initial=0.0))
    if first is None:
        radius = math.inf
    else:
        before = drift[: first + 1][finite[: first + 1]]
        radius = float(before[-1]) if before.size and before[-1] > 0 else None  # None: lost before it moved
    return {
        "critical_drift_radius": radius,
        "collapse_step": None if first is None else int(steps[first]),
        "largest_drift": largest,
        "finite": bool(finite.all()),
    }


def tolerances(params: Params) -> dict[str, float]:
    """What every invariant of a case may be violated by from rounding, by the coarsest dtype of its parameters."""
    coarsest = max((leaf.dtype for leaf in jax.tree.leaves(params)), key=lambda dtype: jnp.finfo(dtype).eps)
    return invariants.default_tolerances(coarsest) | {"zero_bias_at_zero_staleness": 0.0}


def rollout_violations(case: Case) -> Callable:
    """Compiles what must hold for the rollouts of an update: (key, θ_t, φ_t, t, s) -> {invariant: scalar}.

    The groups are those that the update at step t draws with this key from φ_t = θ_{t−s}: recorded log-probs against rows of
    φ_t recomputed one by one, ratio 1 against θ_t where s = 0, the version they carry, and advantages that sum to zero,
    `NOT_APPLICABLE` where the case's advantage does not on a group made up for the purpose.
    """
    zero_sum = _is_zero_sum(case)

    @jit_once
    def check(key, learner_params, behavior_params, step, lag):
        rollouts = case.rollouts(key, behavior_params, step, step - lag)
        age = step - rollouts.policy_version
        recorded, mask = rollouts.behavior_logprobs, rollouts.mask
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), learner_params, behavior_params)
        learner, recomputed = jax.lax.map(lambda params: _rollout_logprobs(case, params, rollouts), both)  # one body to compile
        violations = {
            "recorded_behavior_logprobs": invariants.recorded_behavior_logprobs_violation(recorded, recomputed, mask),
            "unit_ratio_at_zero_staleness": invariants.unit_ratio_at_zero_staleness_violation(learner, recorded, mask, age),
            "staleness_within_bound": invariants.staleness_within_bound_violation(age, lag),
        }
        if zero_sum:
            advantages = case.algorithm.advantage_fn(rollouts.rewards)
            violations["zero_sum_advantages"] = invariants.zero_sum_advantages_violation(advantages)
        return violations

    def violations(key, learner_params, behavior_params, step, lag) -> dict[str, float | str]:
        found = check(key, learner_params, behavior_params, jnp.asarray(step), jnp.asarray(lag))
        return {"zero_sum_advantages": NOT_APPLICABLE} | {name: float(value) for name, value in found.items()}

    return violations


def invariant_violations(case: Case, params: Params, of_rollouts: Callable) -> dict[str, float | str]:
    """The invariants that need rollouts or the objective, at one θ without lag, where a leak is easiest to see.

    Those of `of_rollouts`, which `rollout_violations` made, and that the update follows the objective in θ alone.
    """

    @jit_once
    def leak(params):
        # what a loss detaches of the learner is no part of any slope
        detached = params if "detached_logprobs" in named_parameters(case.algorithm.loss_fn) else None

        def objective(learner_params, behavior_params):
            return exact.surrogate_objective_of_params(
                case.policy, learner_params, behavior_params, case.task, detached_params=detached, **case.algorithm.arguments()
            )

        return invariants.no_behavior_gradient_violation(objective, case.gradient(params, params), params, params)

    return of_rollouts(jax.random.key(0), params, params, 0, 0) | {"no_behavior_gradient": float(leak(params))}


def _rollout_logprobs(case: Case, params: Params, rollouts: Rollouts) -> jax.Array:
    """[B, G, L], every row on its own."""
    return policies.token_logprobs(
        case.policy,
        params,
        rollouts.prompts,
        rollouts.completions,
        rollouts.mask,
        prompt_mask=rollouts.prompt_mask,
        allowed=case.task.allowed,
    )


def _is_zero_sum(case: Case) -> bool:
    """Whether the advantages of a group with one good completion, and of one with graded ones, sum to zero."""
    members = np.arange(case.algorithm.group_size)
    rewards = jnp.asarray(np.stack([members == 0, members / len(members)]), float)
    violation = invariants.zero_sum_advantages_violation(case.algorithm.advantage_fn(rewards))
    return float(violation) <= invariants.default_tolerances(rewards.dtype)["zero_sum_advantages"]
