"""The sum over groups, ordered: own completions, the other members by the counts of their rewards, the loss of every pair.

What `exact` (expectations) and `moments` (variances) share. The mathematics stands in `exact`'s docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import compositions
from jax_async_grpo.losses.arguments import shape_of
from jax_async_grpo.masked import as_mask, masked_sum
from jax_async_grpo.separability import check_loss_inputs, check_separable, named_parameters

__all__ = ["Groups", "assign_roles", "completion_probabilities", "enumerate_groups", "full_mask", "row_gradients", "row_terms"]


class Groups(NamedTuple):
    """Everything a sum over groups needs; B prompts, Y completions, C compositions of the other G−1 members, n reward levels.

    Attributes:
      learner: [B, Y, L] log π_θ.
      denominator: [B, Y, L] log-probs of the ratio's denominator.
      inputs: {name: [B, Y, L]} what the loss takes by name.
      mask: [B, Y, L] bool.
      advantages: [B, Y, C] of the own completion.
      own: [B, Y] probability of the own completion.
      others: [B, C] probability of each composition.
      level_probabilities: [B, n] of the statistics role.
      level_index: [B, Y] int, the reward level of each completion.
      counts: [C, n] int.
    """

    learner: jax.Array
    denominator: jax.Array
    inputs: dict[str, jax.Array]
    mask: jax.Array
    advantages: jax.Array
    own: jax.Array
    others: jax.Array
    level_probabilities: jax.Array
    level_index: jax.Array
    counts: np.ndarray


def enumerate_groups(
    learner_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    rewards: jax.Array,
    mask: jax.Array | None,
    *,
    group_size: int,
    loss_fn: Callable,
    advantage_fn: Callable,
    aggregation_fn: Callable,
    reward_levels=None,
    proximal_logprobs: jax.Array | None = None,
    sampling_logprobs: jax.Array | None = None,
    statistics_logprobs: jax.Array | None = None,
    detached_logprobs: jax.Array | None = None,
    loss_inputs: Mapping[str, jax.Array] | None = None,
    max_compositions: int = 5000,
) -> Groups:
    """Checks the arguments of `exact.surrogate_objective` and enumerates; arguments and errors as there."""
    sampling, denominator, statistics, inputs = assign_roles(
        learner_logprobs,
        behavior_logprobs,
        proximal_logprobs,
        sampling_logprobs,
        statistics_logprobs,
        detached_logprobs,
        loss_fn,
        loss_inputs,
    )
    mask = full_mask(mask, jnp.shape(learner_logprobs))
    level_index, levels = compositions.reward_level_index(rewards, reward_levels, jnp.shape(learner_logprobs)[:2])
    counts = compositions.enumerate_compositions(len(levels), group_size, max_compositions)
    check_separable(loss_fn, advantage_fn, aggregation_fn, mask, levels, group_size, tuple(inputs))
    completion_probabilities(learner_logprobs, mask)
    p = compositions.level_probabilities(completion_probabilities(statistics, mask), level_index, len(levels))
    return Groups(
        learner=learner_logprobs,
        denominator=denominator,
        inputs=inputs,
        mask=mask,
        advantages=compositions.advantage_table(advantage_fn, levels, counts)[level_index],
        own=completion_probabilities(sampling, mask),
        others=compositions.composition_probabilities(p, counts),
        level_probabilities=p,
        level_index=level_index,
        counts=counts,
    )


def row_terms(groups: Groups, loss_fn: Callable, aggregation_fn: Callable) -> jax.Array:
    """[B, Y, C]: the aggregated loss of every completion beside every composition of the other members."""
    terms = _over_compositions(groups, lambda *row: _row_values(loss_fn, aggregation_fn, *row))
    return jnp.reshape(terms, (*groups.mask.shape[:2], -1))


def row_gradients(groups: Groups, loss_fn: Callable, aggregation_fn: Callable) -> jax.Array:
    """[B, Y, C, L]: minus the derivative of `row_terms` in the completion's own log π_θ, what ascent follows."""

    def gradient(*row):
        learner, *rest = row
        return jax.grad(lambda x: -jnp.sum(_row_values(loss_fn, aggregation_fn, x, *rest)))(learner)

    return jnp.reshape(_over_compositions(groups, gradient), (*groups.mask.shape[:2], -1, groups.mask.shape[2]))


def _over_compositions(groups: Groups, function: Callable) -> jax.Array:
    """`function(learner, denominator, mask, inputs, advantages)` on all rows [B·Y, ...], compositions stacked at axis 1."""
    length = groups.mask.shape[-1]

    def as_rows(array):
        return jnp.reshape(array, (-1, length))

    learner, denominator, mask = as_rows(groups.learner), as_rows(groups.denominator), as_rows(groups.mask)
    inputs = {name: as_rows(array) for name, array in groups.inputs.items()}
    advantages = jnp.reshape(groups.advantages, (-1, groups.advantages.shape[-1]))
    return jax.vmap(lambda a: function(learner, denominator, mask, inputs, a), in_axes=1, out_axes=1)(advantages)


def _row_values(loss_fn, aggregation_fn, learner, denominator, mask, inputs, advantages) -> jax.Array:
    """[N]: the aggregate of each row alone."""
    values = loss_fn(learner, denominator, advantages, mask, **inputs)
    if jnp.shape(values) != jnp.shape(learner):
        raise ValueError(f"loss_fn returns shape {jnp.shape(values)}; it must be per token, {jnp.shape(learner)}")
    return jax.vmap(lambda value, valid: aggregation_fn(value[None], valid[None]).mean())(values, mask)


def assign_roles(learner, behavior, proximal, sampling, statistics, detached, loss_fn, loss_inputs):
    """The arrays by role, all of the learner's shape, and what goes to the loss by name."""
    shape = shape_of("learner_logprobs", learner)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"learner_logprobs has shape {shape}; it must be [B, Y, L], none of them 0")
    inputs = dict(loss_inputs or {})
    wanted = named_parameters(loss_fn)
    if "behavior_logprobs" in wanted:
        inputs.setdefault("behavior_logprobs", behavior)
    if "detached_logprobs" in wanted:
        inputs.setdefault("detached_logprobs", jax.lax.stop_gradient(learner) if detached is None else detached)
    sampling = behavior if sampling is None else sampling
    statistics = behavior if statistics is None else statistics
    denominator = behavior if proximal is None else proximal
    named = dict(behavior_logprobs=behavior, proximal_logprobs=denominator, sampling_logprobs=sampling)
    named |= dict(statistics_logprobs=statistics) | inputs
    for name, array in named.items():
        if shape_of(name, array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}; it must have the shape of learner_logprobs, {shape}")
    check_loss_inputs(loss_fn, tuple(inputs))
    return sampling, denominator, statistics, inputs


def full_mask(mask, shape: tuple[int, ...]):
    """The mask as [B, Y, L], still NumPy where it was concrete: the probes want its values."""
    if mask is not None and shape_of("mask", mask) == shape[1:]:
        mask = jnp.broadcast_to(mask, shape) if isinstance(mask, jax.core.Tracer) else np.broadcast_to(mask, shape)
    if mask is None:
        return np.ones(shape, dtype=bool)
    checked = as_mask(mask, shape)
    return checked if isinstance(mask, jax.core.Tracer) else np.asarray(mask, dtype=bool)


def completion_probabilities(logprobs, mask) -> jax.Array:
    """[B, Y]: π(y|x) = exp Σ_l log π(y_l); raises ValueError where concrete ones do not sum to 1."""
    probabilities = jnp.exp(masked_sum(logprobs, mask, axis=-1))
    _check_normalized(probabilities)
    return probabilities


def _check_normalized(probabilities):
    """Concrete probabilities must sum to 1 per prompt: else some completion is missing or counted twice."""
    if isinstance(probabilities, jax.core.Tracer):
        return
    total = np.asarray(jnp.sum(probabilities, axis=-1), dtype=np.float64)
    tolerance = 1e-8 if probabilities.dtype == jnp.float64 else 1e-4
    worst = int(np.argmax(np.abs(total - 1)))
    if not np.abs(total - 1).max() <= tolerance:
        raise ValueError(
            f"the completions of prompt {worst} have total probability {total[worst]:.9g}; they must sum to 1 within "
            f"{tolerance:g} (a completion is missing, or its end token)"
        )
