"""The staleness bias of losses of your own: measured exactly, predicted to first order, and split by what was stale.

    python -m examples.own_loss

takes half a minute, nearly all of it compilation. Expect a bias that grows as S^1.0, a first-order law that misses 5 % of it at
S = 8, and the refusal of a loss that has no such law.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import bias, exact, policies, scaling, staleness, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.update import create_state, update_step

NUM_UPDATES = 60
LEARNING_RATE = 0.005
MAX_STALENESS = (1, 2, 4, 8)


def saturating_ratio(logprobs, old_logprobs, advantages, mask, *, width=1.0):
    """ℓ = −A·(1 + w·tanh((r − 1)/w)): a clip without an edge, with the slope of GRPO at ratio 1."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return -advantages[..., None] * (1 + width * jnp.tanh((ratio - 1) / width)) * mask


def truncated_weight(logprobs, old_logprobs, advantages, mask, *, cap, detached_logprobs=None):
    """ℓ = −min(r, cap)·A·log π_θ with the weight detached; cap = 1 puts its kink at ratio 1.

    What is detached is an argument, so that the oracle can pass θ there and H stays differentiable.
    """
    detached = jax.lax.stop_gradient(logprobs) if detached_logprobs is None else detached_logprobs
    weight = jnp.minimum(jnp.exp(detached - old_logprobs), cap)
    return -weight * advantages[..., None] * logprobs * mask


def role_gradient(loss_fn, policy, task):
    """H(θ,φ) of GRPO with this loss in place of the clip, φ given apart for the three things it does."""

    def gradient(learner_params, sampling_params, denominator_params, statistics_params):
        algorithm = dict(group_size=8, loss_fn=loss_fn, advantage_fn=group_normalized)
        roles = dict(sampling_params=sampling_params, statistics_params=statistics_params)
        return exact.surrogate_gradient(policy, learner_params, denominator_params, task, **algorithm, **roles)

    return gradient


def run_under_lag(gradient_fn, params, schedule):
    """(θ_T, φ_T) after T updates, each on rollouts that are schedule[t] updates old."""
    optimizer = optax.sgd(LEARNING_RATE)

    def advance(step, state):
        return update_step(state, schedule[step], lambda learner, behavior, *_: gradient_fn(learner, behavior), optimizer)[0]

    state = create_state(params, optimizer, capacity=max(MAX_STALENESS) + 1)
    state = jax.lax.fori_loop(0, NUM_UPDATES, advance, state)
    behavior_params, _ = staleness.read(state.history, schedule[-1])
    return state.params, behavior_params


def measure(role_gradient_fn, params):
    """For every S: δ after a run with that lag, its first-order parts, and the share of it they miss together."""

    def gradient_fn(learner, behavior):
        return role_gradient_fn(learner, behavior, behavior, behavior)

    def of_schedule(schedule):
        learner, behavior = run_under_lag(gradient_fn, params, schedule)
        measured = bias.surrogate_bias(gradient_fn, learner, behavior)
        parts = bias.role_jvps(role_gradient_fn, learner, behavior)
        missed = jax.tree.map(lambda whole, *of_roles: whole - sum(of_roles), measured.bias, *parts.values())
        norms = {name: optax.tree.norm(part) for name, part in parts.items()}
        return measured.norm, measured.relative_norm, optax.tree.norm(missed) / measured.norm, norms

    schedules = np.stack([staleness.fixed(lag, NUM_UPDATES) for lag in MAX_STALENESS])
    return jax.jit(lambda schedules: jax.lax.map(of_schedule, schedules))(schedules)


def main():
    jax.config.update("jax_enable_x64", True)  # a small bias drowns in float32
    task = tasks.digit_sum(num_prompts=4, num_digits=2, base=4, partial_credit=True)
    policy = policies.linear(task.vocab_size, context_length=6, init_scale=0.5)
    params = policy.init(jax.random.key(0))

    norms, relative_norms, missed, parts = measure(role_gradient(saturating_ratio, policy, task), params)
    print(" S   bias norm   relative   missed to first order   parts: " + ", ".join(parts))
    for row in zip(MAX_STALENESS, norms, relative_norms, missed, *parts.values(), strict=True):
        print("{:2}   {:9.2e}   {:8.2%}   {:21.1%}          {:.1e}, {:.1e}, {:.1e}".format(*row))
    print(f"bias ~ S^{scaling.fit_power_law(MAX_STALENESS, norms).exponents[0]:.2f}")

    truncated = role_gradient(functools.partial(truncated_weight, cap=1.0), policy, task)
    try:
        bias.check_first_order(lambda learner, behavior: truncated(learner, *3 * [behavior]), params, direction=params)
    except bias.FirstOrderError as error:
        print(f"truncated_weight: {error}")


if __name__ == "__main__":
    main()
