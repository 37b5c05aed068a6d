"""The surrogate objective and its gradient from sampled rollouts: estimates of what `exact` computes by enumeration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from jax_async_grpo.aggregation import sequence_mean
from jax_async_grpo.exact import task_logprobs
from jax_async_grpo.policies import token_logprobs
from jax_async_grpo.separability import named_parameters
from jax_async_grpo.types import Params, Policy, Rollouts, Task

__all__ = ["enumerated_gradient", "sampled_gradient", "sampled_objective"]


def sampled_objective(
    learner_logprobs: jax.Array,
    rollouts: Rollouts,
    *,
    loss_fn: Callable,
    advantage_fn: Callable,
    aggregation_fn: Callable = sequence_mean,
    loss_inputs: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    """L̂(θ,φ) = −agg ℓ(log π_θ, recorded log π_φ, Â) over the groups of a batch (arXiv 2607.01083's L, estimated).

    Args:
      learner_logprobs: [B, G, L] log π_θ of the rollouts' tokens, nats.
      rollouts: groups drawn from φ; their recorded log-probs are the ratio's denominator.
      loss_fn: per-token loss, as in `exact.surrogate_objective`, here on [B, G, L]. A parameter named `behavior_logprobs` gets
        the recorded ones, `detached_logprobs` the learner's behind a stop_gradient, unless `loss_inputs` has them.
      advantage_fn: rewards[..., G] -> advantages[..., G].
      aggregation_fn: (values, mask) -> `MaskedSum`.
      loss_inputs: further [B, G, L] arrays, handed to `loss_fn` by name.

    Returns:
      Scalar, to be ascended.
    """
    offered = {
        "behavior_logprobs": rollouts.behavior_logprobs,
        "detached_logprobs": jax.lax.stop_gradient(learner_logprobs),
    }
    wanted = named_parameters(loss_fn)
    inputs = {name: array for name, array in offered.items() if name in wanted} | dict(loss_inputs or {})
    advantages = advantage_fn(rollouts.rewards)
    values = loss_fn(learner_logprobs, rollouts.behavior_logprobs, advantages, rollouts.mask, **inputs)
    return -aggregation_fn(values, rollouts.mask).mean()


def sampled_gradient(
    policy: Policy, learner_params: Params, rollouts: Rollouts, *, allowed: jax.Array | None = None, **algorithm
) -> Params:
    """∂_θ L̂(θ,φ): what the learner computes from one batch; no gradient reaches the recorded behavior log-probs.

    Args:
      policy: the policy.
      learner_params: θ.
      rollouts: groups drawn from φ.
      allowed: [L, V] bool, the tokens the policy is normalized over, None = all.
      **algorithm: `loss_fn`, `advantage_fn`, `aggregation_fn` of `sampled_objective`.

    Returns:
      A pytree like θ, in the ascent direction.
    """

    def objective(params):
        logprobs = token_logprobs(
            policy,
            params,
            rollouts.prompts,
            rollouts.completions,
            rollouts.mask,
            prompt_mask=rollouts.prompt_mask,
            allowed=allowed,
        )
        return sampled_objective(logprobs, rollouts, **algorithm)

    return jax.grad(objective)(learner_params)


def enumerated_gradient(policy: Policy, learner_params: Params, rollouts: Rollouts, task: Task, **algorithm) -> Params:
    """The same ∂_θ L̂(θ,φ) for rollouts of an enumerable task, from log-probs that share the prompts' and prefixes' work.

    Cheaper than `sampled_gradient` where Y distinct prefixes are fewer than G rows. Arguments as there.
    """

    def objective(params):
        enumerated = task_logprobs(policy, params, task)
        logprobs = jax.vmap(lambda rows, chosen: rows[chosen])(enumerated, rollouts.completion_index)
        return sampled_objective(logprobs, rollouts, **algorithm)

    return jax.grad(objective)(learner_params)
