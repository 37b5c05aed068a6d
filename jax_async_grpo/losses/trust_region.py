"""Losses that drop tokens whose *probability* has moved too far in the direction the advantage pushes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import check_positive, detached, policy_inputs, valid_only

__all__ = ["dppo_kl", "dppo_tv", "ipo", "prime"]


def dppo_tv(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold_low: float,
    threshold_high: float,
    ratio_cap: float = 20.0,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """ℓ = −keep·sg(min(r, cap))·A·log π_θ, keep = (π_θ−π_old ≤ threshold_high) if A > 0, (≥ −threshold_low) if A ≤ 0.

    Divergence PPO with the binary total variation, as verl has it.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      old_logprobs: [..., L] log π_old, nats.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      threshold_low: the probability a token may lose, positive.
      threshold_high: the probability a token may gain, positive.
      ratio_cap: the largest weight, > 1.
      detached_logprobs: [..., L] log π_θ inside sg; default `logprobs` behind a stop_gradient.

    Returns:
      [..., L] loss of every token; dropped ones are 0.

    Raises:
      ValueError: a bound outside its range, or shapes that do not match.
    """
    check_positive(threshold_low=threshold_low, threshold_high=threshold_high)
    inputs = policy_inputs(logprobs, old_logprobs, advantages, mask)
    fixed = detached(detached_logprobs, inputs.logprobs, inputs.valid)
    gained = jnp.exp(fixed) - jnp.exp(inputs.old_logprobs)
    keep = jnp.where(inputs.advantages > 0, gained <= threshold_high, gained >= -threshold_low)
    return _weighted(inputs, fixed, keep, ratio_cap)


def dppo_kl(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold_low: float,
    threshold_high: float,
    ratio_cap: float = 20.0,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """As `dppo_tv` with the binary KL(π_old‖π_θ) of "this token or another": a token that moved towards A beyond it is dropped.

    keep = (KL ≤ threshold_high or π_θ ≤ π_old) if A > 0, (KL ≤ threshold_low or π_θ ≥ π_old) if A ≤ 0.

    Args:
      threshold_low: nats, positive.
      threshold_high: nats, positive.
    """
    check_positive(threshold_low=threshold_low, threshold_high=threshold_high)
    inputs = policy_inputs(logprobs, old_logprobs, advantages, mask)
    fixed = detached(detached_logprobs, inputs.logprobs, inputs.valid)
    p, q = jnp.exp(fixed), jnp.exp(inputs.old_logprobs)
    # 1e-8 as in verl: a token of probability 1 has no others
    divergence = q * (inputs.old_logprobs - fixed) + (1 - q) * jnp.log((1 - q + 1e-8) / (1 - p + 1e-8))
    gains = (divergence <= threshold_high) | (p <= q)
    losses = (divergence <= threshold_low) | (p >= q)
    return _weighted(inputs, fixed, jnp.where(inputs.advantages > 0, gains, losses), ratio_cap)


def prime(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold_low: float = 0.2,
    threshold_high: float = 0.2,
    kl_coefficient: float = 1e-3,
) -> jax.Array:
    """ℓ = −keep·A·r + c·(log r)²: unclipped importance sampling inside a probability band (prime-rl's default loss).

    keep = π_θ−π_old ≤ threshold_high if A > 0, ≥ −threshold_low if A ≤ 0; the quadratic stays on dropped tokens. prime-rl sums
    it over the tokens of the global batch. Arguments, result and errors as in `dppo_tv`.

    Args:
      threshold_low: the probability a token may lose, positive.
      threshold_high: the probability a token may gain, positive.
      kl_coefficient: c, advantage units per nat², ≥ 0.
    """
    check_positive(threshold_low=threshold_low, threshold_high=threshold_high)
    inputs = policy_inputs(logprobs, old_logprobs, advantages, mask)
    gained, ratio = _gained(inputs)
    keep = jnp.where(inputs.advantages > 0, gained <= threshold_high, gained >= -threshold_low)
    return _band(inputs, keep, ratio, kl_coefficient)


def ipo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold: float = 0.1,
    kl_coefficient: float = 1e-3,
) -> jax.Array:
    """As `prime` with a band for both signs of A: a token with |π_θ−π_old| > threshold is dropped (prime-rl's `ipo`)."""
    check_positive(threshold=threshold)
    inputs = policy_inputs(logprobs, old_logprobs, advantages, mask)
    gained, ratio = _gained(inputs)
    return _band(inputs, jnp.abs(gained) <= threshold, ratio, kl_coefficient)


def _weighted(inputs, fixed, keep, ratio_cap):
    if not ratio_cap > 1:
        raise ValueError(f"ratio_cap is {ratio_cap}; it must be > 1")
    weight = jnp.minimum(jnp.exp(fixed - inputs.old_logprobs), ratio_cap)
    return valid_only(jnp.where(keep, -weight * inputs.advantages * inputs.logprobs, 0.0), inputs.valid)


def _gained(inputs):
    """π_θ − π_old and r from two exponentials, π_old·(r − 1): a third would be a third of the loss's time."""
    ratio = jnp.exp(inputs.logprobs - inputs.old_logprobs)
    return jnp.exp(inputs.old_logprobs) * (ratio - 1.0), ratio


def _band(inputs, keep, ratio, kl_coefficient):
    if not 0 <= kl_coefficient < math.inf:
        raise ValueError(f"kl_coefficient is {kl_coefficient}; it must be >= 0 and finite")
    log_ratio = inputs.logprobs - inputs.old_logprobs
    surrogate = jnp.where(keep, -inputs.advantages * ratio, 0.0)
    return valid_only(surrogate + kl_coefficient * log_ratio**2, inputs.valid)
