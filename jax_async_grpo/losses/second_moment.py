"""M2PO: a clip as wide as a budget for the batch's second moment of the log-ratio allows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import check_positive, detached, policy_inputs, valid_only
from jax_async_grpo.losses.ratio import clipped_surrogate

__all__ = ["M2Bounds", "m2_bounds", "m2po"]


class M2Bounds(NamedTuple):
    """The clip M2PO chose for a batch.

    Attributes:
      epsilon_low: scalar, the ratio is clipped below at 1 − epsilon_low; 1 where the budget is kept without a clip.
      epsilon_high: scalar, the ratio is clipped above at 1 + epsilon_high; inf where the budget is kept without a clip.
      second_moment: scalar, mean (log r)² of the harmful tokens before the clip.
    """

    epsilon_low: jax.Array
    epsilon_high: jax.Array
    second_moment: jax.Array


def m2po(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    budget: float = 0.04,
    min_epsilon_low: float = 0.3,
    min_epsilon_high: float = 0.5,
    axis_name: str | None = None,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """The loss of `ppo_clip` with the bounds of `m2_bounds`, which hold the batch as a whole (M2PO, arXiv 2510.01161).

    It couples all rows of the batch: `exact` refuses it, `exact.brute_force_objective` takes one group at a time.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      old_logprobs: [..., L] log π_old, nats.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      budget: the mean of (log r)² over harmful tokens that is left, nats², positive.
      min_epsilon_low: epsilon_low is at least this, in (0, 1].
      min_epsilon_high: epsilon_high is at least this, positive.
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.
      detached_logprobs: [..., L] log π_θ the bounds are computed from; default `logprobs` behind a stop_gradient.

    Returns:
      [..., L] loss of every token.

    Raises:
      ValueError: an option outside its range, or shapes that do not match.
    """
    check_positive(budget=budget, min_epsilon_low=min_epsilon_low, min_epsilon_high=min_epsilon_high)
    if min_epsilon_low > 1:
        raise ValueError(f"min_epsilon_low is {min_epsilon_low}; it must be in (0, 1]")
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    fixed = detached(detached_logprobs, logprobs, valid)
    bounds = m2_bounds(fixed, old_logprobs, advantages, valid, budget=budget, axis_name=axis_name)
    low = 1 - jnp.maximum(bounds.epsilon_low, min_epsilon_low)
    high = 1 + jnp.maximum(bounds.epsilon_high, min_epsilon_high)
    ratio = jnp.exp(logprobs - old_logprobs)
    return valid_only(clipped_surrogate(ratio, advantages, low, high), valid)


def m2_bounds(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    budget: float,
    axis_name: str | None = None,
) -> M2Bounds:
    """ε_low = 1 − e^{−τ}, ε_high = e^τ − 1 with the largest τ for which mean min((log r)², τ²) ≤ budget, solved exactly.

    The mean runs over the harmful tokens, those the advantage pushes further away: A > 0 and r > 1, or A < 0 and r < 1. The sum
    of minima is concave and piecewise linear in τ², so Newton's method from 0 ends at the solution after finitely many steps.
    (The authors' code returns the data point just below.)

    Args:
      logprobs, old_logprobs, advantages, mask, budget, axis_name: of `m2po`.

    Returns:
      M2Bounds.

    Raises:
      ValueError: a budget that is not positive, or shapes that do not match.
    """
    check_positive(budget=budget)
    inputs = policy_inputs(logprobs, old_logprobs, advantages, mask)
    log_ratio = inputs.logprobs - inputs.old_logprobs
    harmful = log_ratio * inputs.advantages > 0
    squares = jnp.where(harmful, log_ratio**2, 0.0)

    def total(values):
        summed = jnp.sum(values, dtype=squares.dtype)
        return summed if axis_name is None else jax.lax.psum(summed, axis_name)

    count, moment = total(harmful), total(squares)
    allowed = budget * count
    within = moment <= allowed

    def bound(active):
        """τ² if exactly the `active` tokens lie above it."""
        return (allowed - total(jnp.where(active, 0.0, squares))) / jnp.maximum(total(active), 1)

    def shrinks(carry):
        _, number, previous = carry
        return (number < previous) & ~within

    def newton(carry):
        active, number, _ = carry
        # the set alone is carried, so both modes of differentiation pass: τ is its closed form
        active = active & jax.lax.stop_gradient(squares > bound(active))
        return active, total(active), number

    active, number, _ = jax.lax.while_loop(shrinks, newton, (harmful, count, count + 1))
    within |= number == 0  # a moment above the budget by rounding alone leaves no token above τ
    radius = jnp.sqrt(jnp.where(within, 1.0, bound(active)))
    return M2Bounds(
        epsilon_low=jnp.where(within, 1.0, -jnp.expm1(-radius)),
        epsilon_high=jnp.where(within, jnp.inf, jnp.expm1(radius)),
        second_moment=moment / jnp.maximum(count, 1),
    )
