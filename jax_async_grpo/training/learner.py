"""One learner update on rollouts that are already there, as a pure function: gradient, optimizer, ring, and what to log.

The gradient is ∂_θ L̂(θ, φ) of arXiv 2607.01083 for the groups of a batch; φ enters through the rollouts alone. A loss or
gradient that is not finite leaves parameters and optimizer as they were; the update counts, and its version in the ring is θ_t.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo import metrics, surrogate
from jax_async_grpo.head import policy_loss, token_logprobs
from jax_async_grpo.masked import masked_mean
from jax_async_grpo.policies import completion_hidden
from jax_async_grpo.separability import named_parameters
from jax_async_grpo.types import Params, Policy, Rollouts
from jax_async_grpo.update import TrainState, create_state, update_step

__all__ = ["Batch", "Learner", "LearnerState", "SkipState", "init_state", "lean_logprobs", "learner_step", "skip_non_finite"]


@dataclasses.dataclass(frozen=True)
class Learner:
    """What an update computes; hashable, so that a compiled step belongs to it.

    Attributes:
      policy: with its hidden states and output matrix.
      loss_fn: per-token policy loss, corrections included, options bound.
      advantage_fn: rewards[B, G] -> advantages[B, G].
      aggregation_fn: (values, mask) -> `MaskedSum`.
      optimizer: optax transformation with its learning rate, descending.
      coupling: of the loss, as in `head.policy_loss`.
      accumulation_steps: parts into which the batch's prompts are cut; a divisor of B.
      chunk_size: tokens whose logits exist at a time, None = as `head.policy_loss` chooses.
      epsilons: (low, high) of the loss, for the logged share of tokens outside them; None = it has none.
      max_staleness: the largest lag of the run, which control transformations get.
    """

    policy: Policy
    loss_fn: Callable
    advantage_fn: Callable
    aggregation_fn: Callable
    optimizer: optax.GradientTransformation
    coupling: str = "row"
    accumulation_steps: int = 1
    chunk_size: int | None = None
    epsilons: tuple[float, float] | None = None
    max_staleness: int = 0

    def objective(self) -> Callable[[jax.Array, Rollouts], jax.Array]:
        """(log π_θ, rollouts) -> L̂ with the recorded log-probs as the denominator; a new function object each time."""
        return functools.partial(
            surrogate.sampled_objective,
            loss_fn=self.loss_fn,
            advantage_fn=self.advantage_fn,
            aggregation_fn=self.aggregation_fn,
        )


class LearnerState(NamedTuple):
    """Everything an update changes.

    Attributes:
      train: parameters, optimizer state and the ring of versions.
      previous_gradient: the last gradient, for its cosine with the next one; None = not kept.
      start_params: θ_0, for the cumulative drift; None = not kept.
    """

    train: TrainState
    previous_gradient: Params | None
    start_params: Params | None


class Batch(NamedTuple):
    """What an update consumes.

    Attributes:
      rollouts: groups drawn from φ.
      old_logprobs: [B, G, L] denominator of the ratio, nats.
    """

    rollouts: Rollouts
    old_logprobs: jax.Array


def init_state(
    learner: Learner,
    params: Params,
    capacity: int,
    *,
    gradient_cosine: bool = True,
    cumulative_drift: bool = True,
    **history_options,
) -> LearnerState:
    """The state at step 0.

    Args:
      learner: its optimizer is used.
      params: θ_0.
      capacity: versions kept, K.
      gradient_cosine, cumulative_drift: keep a gradient, θ_0: a copy of the parameters each.
      **history_options: of `staleness.create_history`.
    """
    return LearnerState(
        create_state(params, skip_non_finite(learner.optimizer), capacity, **history_options),
        jax.tree.map(jnp.zeros_like, params) if gradient_cosine else None,
        jax.tree.map(jnp.copy, params) if cumulative_drift else None,
    )


def learner_step(learner: Learner, state: LearnerState, batch: Batch) -> tuple[LearnerState, dict[str, jax.Array]]:
    """θ_{t+1} and what to log of the update, by the names of docs/design.md.

    Args:
      learner: static.
      state: at step t.
      batch: B prompts; `rollouts.policy_version` says how old they are.

    Returns:
      (state at t + 1, {name: scalar}); `update/is_finite` is 0 where the update was skipped.
    """
    train = state.train
    loss, gradient, logprobs = _loss_and_gradient(learner, train.params, batch)
    ascent = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(loss), -leaf, jnp.nan), gradient)
    logged = _of_batch(learner, batch, logprobs, train.step)
    new, _ = update_step(
        train,
        jnp.zeros((), jnp.int32),
        lambda *_: ascent,
        skip_non_finite(learner.optimizer),
        max_staleness=learner.max_staleness,
        extra_args_fn=lambda *_: {"ess": logged["off_policy/ess_ratio"]},
    )
    is_finite = new.opt_state.is_finite
    logged |= {
        "loss": loss,
        "update/is_finite": is_finite.astype(loss.dtype),
        "grad/norm": optax.tree.norm(gradient),
        "update/norm": optax.tree.norm(optax.tree.sub(new.params, train.params)),
        "drift/param_norm": optax.tree.norm(new.params),
    }
    kept = state.previous_gradient
    if kept is not None:
        logged["grad/cosine_prev"] = metrics.gradient_cosine(gradient, kept)
        kept = jax.tree.map(lambda old, leaf: jnp.where(is_finite, leaf, old), kept, gradient)
    if state.start_params is not None:
        logged["drift/cumulative"] = optax.tree.norm(optax.tree.sub(new.params, state.start_params))
    return LearnerState(new, kept, state.start_params), logged


class SkipState(NamedTuple):
    """Attributes: inner, the optimizer's state; is_finite, [] bool of the last update."""

    inner: optax.OptState
    is_finite: jax.Array


def lean_logprobs(
    policy: Policy, params: Params, prompts: jax.Array, completions: jax.Array, mask: jax.Array, prompt_mask: jax.Array
) -> jax.Array:
    """`policies.token_logprobs` without the logits of all tokens: [B, G, L] nats, 0 where the mask is False."""
    hidden = completion_hidden(policy, params, prompts, completions, mask, prompt_mask=prompt_mask)
    return token_logprobs(hidden, policy.unembed(params), completions, mask)


def skip_non_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, except that updates that are not finite leave parameters and its own state as they are.

    `optax.apply_if_finite` counts and gives in after some; here the job counts, and stops.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return SkipState(optimizer.init(params), jnp.ones((), bool))

    def update(gradients, state, params=None, **extra_args):
        updates, inner = optimizer.update(gradients, state.inner, params, **extra_args)
        is_finite = jnp.isfinite(optax.tree.norm(gradients)) & jnp.isfinite(optax.tree.norm(updates))
        updates = jax.tree.map(lambda leaf: jnp.where(is_finite, leaf, 0), updates)
        return updates, SkipState(jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), inner, state.inner), is_finite)

    return optax.GradientTransformationExtraArgs(init, update)


def _loss_and_gradient(learner: Learner, params: Params, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
    """(loss, its gradient, [B, G, L] log π_θ) over the parts of a batch: as if it were one.

    Advantages are those of the whole batch. An aggregation divides by a count of the mask; a part counts by its share of it.
    """
    advantages = learner.advantage_fn(batch.rollouts.rewards)
    steps = learner.accumulation_steps
    if steps == 1:
        (loss, logprobs), gradient = _part(learner, params, batch, advantages)
        return loss, gradient, logprobs
    total = _count(learner, batch.rollouts.mask)

    def accumulate(sums, part):
        batch, advantages = part
        (loss, logprobs), gradient = _part(learner, params, batch, advantages)
        # A sum, with a count of 0, adds up.
        share = jnp.where(total == 0, 1.0, _count(learner, batch.rollouts.mask) / jnp.where(total == 0, 1.0, total))
        return jax.tree.map(lambda kept, leaf: kept + (share * leaf).astype(leaf.dtype), sums, (loss, gradient)), logprobs

    def cut(leaf):
        # every part takes every steps-th prompt, so that each stays spread over the devices as the batch is
        return jnp.swapaxes(leaf.reshape(-1, steps, *leaf.shape[1:]), 0, 1)

    parts = jax.tree.map(cut, (batch, advantages))
    (loss, _), gradient = jax.eval_shape(
        lambda *part: _part(learner, params, *part), *jax.tree.map(lambda leaf: leaf[0], parts)
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, gradient))
    (loss, gradient), logprobs = jax.lax.scan(accumulate, zeros, parts)
    return loss, gradient, jnp.swapaxes(logprobs, 0, 1).reshape(batch.old_logprobs.shape)


def _part(learner: Learner, params: Params, batch: Batch, advantages: jax.Array):
    rollouts = batch.rollouts
    inputs = {"behavior_logprobs": rollouts.behavior_logprobs}
    wanted = named_parameters(learner.loss_fn)

    def objective(params):
        hidden = completion_hidden(
            learner.policy, params, rollouts.prompts, rollouts.completions, rollouts.mask, prompt_mask=rollouts.prompt_mask
        )
        return policy_loss(
            hidden,
            learner.policy.unembed(params),
            rollouts.completions,
            batch.old_logprobs,
            advantages,
            rollouts.mask,
            loss_fn=learner.loss_fn,
            aggregation_fn=learner.aggregation_fn,
            coupling=learner.coupling,
            chunk_size=learner.chunk_size,
            loss_inputs={name: array for name, array in inputs.items() if name in wanted},
            return_logprobs=True,
        )

    return jax.value_and_grad(objective, has_aux=True)(params)


def _count(learner: Learner, mask: jax.Array) -> jax.Array:
    return learner.aggregation_fn(jnp.zeros(mask.shape, jnp.float32), mask).count


def _of_batch(learner: Learner, batch: Batch, logprobs: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Scalars of the rollouts and of how far they are from the learner."""
    rollouts = batch.rollouts
    advantages = learner.advantage_fn(rollouts.rewards)
    clipped = {}
    if learner.epsilons is not None:
        low, high = learner.epsilons
        clipped = metrics.clip_fraction(
            logprobs, batch.old_logprobs, advantages, rollouts.mask, epsilon_low=low, epsilon_high=high
        )
    spread = jnp.max(rollouts.rewards, axis=-1) - jnp.min(rollouts.rewards, axis=-1)
    return {
        "reward": jnp.mean(rollouts.rewards),
        "frac_reward_zero_std": jnp.mean((spread == 0).astype(jnp.float32)),
        "entropy": masked_mean(-rollouts.behavior_logprobs, rollouts.mask),
        "completion_length": jnp.mean(jnp.sum(rollouts.mask, axis=-1).astype(jnp.float32)),
        **metrics.off_policy(logprobs, rollouts.behavior_logprobs, rollouts.mask, rollouts.policy_version, step),
        **clipped,
    }
