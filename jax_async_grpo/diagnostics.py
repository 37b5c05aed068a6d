"""What is measured once per case, at a stale pair (θ, φ) of a trajectory: first-order law, parts by role, R_batch, R_crit."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import bias, exact, invariants, policies, scaling, sweeps
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.experiment import Case
from jax_async_grpo.types import Params

__all__ = ["batch_clip_radius", "collapse_radius", "decomposition", "invariant_violations", "linear_response"]

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
) -> float:
    """R_batch along the realised drift of this pair: how far θ may be from φ before `level` of the tokens are clipped, exactly.

    Rollouts stay those of φ; the learner moves on along θ − φ.

    Returns:
      Parameter distance; inf where the level is not reached within 1000 times the drift.
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

    return scaling.batch_clip_radius(
        lambda radii: np.clip(fractions(radii), 0.0, 1.0),  # rounding may leave [0, 1] by an ulp
        level=level,
        max_radius=1e3 * drift,
        min_radius=1e-3 * drift,
        num_scan=96,
        relative_tolerance=1e-4,
    )


def collapse_radius(case: Case, *, fraction: float) -> dict[str, Any]:
    """R_crit: ‖θ − θ_0‖ where a synchronous run's gold reward first falls below `fraction` of its peak so far.

    The run (S = 0, exact updates) has the case's `horizon_learning_rate` and `horizon_updates`. The rule needs a peak above the
    start, so that a run that never improved does not count as collapsed.

    Returns:
      {"critical_drift_radius": inf if the rule does not fire, "collapse_step": None then, "largest_drift": ‖θ_T − θ_0‖}.
    """
    num_updates = case.config["horizon_updates"]
    if not num_updates:
        return {"critical_drift_radius": math.inf, "collapse_step": None, "largest_drift": None}
    run = sweeps.bias_grid(case.gradient, case.update_gradient("exact"), case.rewards, case.optimizer_fn, capacity=2)
    steps = np.unique(np.linspace(0, num_updates, 513).astype(np.int32))
    schedule = np.zeros((1, num_updates + 1), np.int32)
    keys = jax.random.split(jax.random.key(0), 1)  # exact updates draw nothing
    measured = run(case.params, case.config["horizon_learning_rate"], schedule, keys, steps)
    gold = np.asarray(measured.reward["gold_reward"])[0]
    drift = np.asarray(measured.values["drift/cumulative"])[0]
    peak = np.maximum.accumulate(gold)
    fallen = (gold < fraction * peak) & (peak > gold[0])
    first = int(np.argmax(fallen)) if fallen.any() else None
    return {
        "critical_drift_radius": math.inf if first is None else float(drift[first]),
        "collapse_step": None if first is None else int(steps[first]),
        "largest_drift": float(drift.max()),
    }


def invariant_violations(case: Case, params: Params) -> dict[str, float]:
    """The invariants that need rollouts or the objective, at one θ without lag, where a leak is easiest to see.

    Recorded log-probs against rows recomputed one by one, ratio 1 of fresh rollouts, zero-sum advantages, and that the update
    follows the objective in θ alone.
    """

    def objective(learner_params, behavior_params):
        return exact.surrogate_objective_of_params(
            case.policy, learner_params, behavior_params, case.task, **case.algorithm.arguments()
        )

    @jit_once
    def check(params):
        rollouts = case.rollouts(jax.random.key(0), params, 0, 0)
        recomputed = policies.token_logprobs(
            case.policy,
            params,
            rollouts.prompts,
            rollouts.completions,
            rollouts.mask,
            prompt_mask=rollouts.prompt_mask,
            allowed=case.task.allowed,
        )
        recorded, mask = rollouts.behavior_logprobs, rollouts.mask
        no_lag = jnp.zeros(rollouts.rewards.shape, jnp.int32)
        return {
            "recorded_behavior_logprobs": invariants.recorded_behavior_logprobs_violation(recorded, recomputed, mask),
            "unit_ratio_at_zero_staleness": invariants.unit_ratio_at_zero_staleness_violation(
                recomputed, recorded, mask, no_lag
            ),
            "zero_sum_advantages": invariants.zero_sum_advantages_violation(case.algorithm.advantage_fn(rollouts.rewards)),
            "no_behavior_gradient": invariants.no_behavior_gradient_violation(
                objective, case.gradient(params, params), params, params
            ),
        }

    return {name: float(value) for name, value in check(params).items()}
