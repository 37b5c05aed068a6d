"""Losses −sg(w)·A·log π_θ: every token keeps its gradient, a weight that holds the learner but is not differentiated scales it.

The detached learner is an argument of its own, `detached_logprobs`, so that whoever differentiates the *gradient* (the
first-order law of the staleness bias does) gets it right; an update leaves it out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import check_positive, detached, policy_inputs, token_inputs, valid_only
from jax_async_grpo.losses.ratio import check_clip

__all__ = ["cispo", "rollout_is", "topr", "vespo"]

_MAX_LOG_RATIO = 20.0  # nats, of a token and of a completion in vespo
_MIN_WEIGHT = 1e-8


def cispo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    ratio_high: float,
    ratio_low: float | None = None,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """ℓ = −sg(clip(r, ratio_low, ratio_high))·A·log π_θ: the ratio is clipped, never the gradient (CISPO, arXiv 2506.13585).

    The bounds are absolute ratios. Systems that call the same number ε mean 1 + ε: docs/losses.md has the table.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      old_logprobs: [..., L] log π_old, nats.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      ratio_high: the largest weight; at most 1 puts a kink or a constant on r = 1, so > 1.
      ratio_low: the smallest weight, in [0, 1); None = none.
      detached_logprobs: [..., L] log π_θ inside sg; default `logprobs` behind a stop_gradient.

    Returns:
      [..., L] loss of every token.

    Raises:
      ValueError: a bound outside its range, or shapes that do not match.
    """
    if not ratio_high > 1:
        raise ValueError(f"ratio_high is {ratio_high}; it is an absolute ratio and must be > 1 (1 + epsilon)")
    if ratio_low is not None and not 0 <= ratio_low < 1:
        raise ValueError(f"ratio_low is {ratio_low}; it is an absolute ratio and must be in [0, 1), or None")
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(detached(detached_logprobs, logprobs, valid) - old_logprobs)
    return valid_only(-jnp.clip(ratio, ratio_low, ratio_high) * advantages * logprobs, valid)


def rollout_is(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    behavior_logprobs: jax.Array,
    epsilon_low: float,
    epsilon_high: float,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """ℓ = −sg(w)·A·log π_θ, w = π_θ/μ where 1−ε_low < π_θ/μ < 1+ε_high, else 0 (SkyRL's `rollout_is`).

    `old_logprobs` is checked and not used: the ratio is to the behavior policy μ. Arguments and result as in `cispo`.

    Args:
      behavior_logprobs: [..., L] log μ of the policy that drew the tokens, nats.
      epsilon_low: in (0, 1].
      epsilon_high: positive.
    """
    check_clip(epsilon_low, epsilon_high)
    logprobs, _, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    _, behavior, _ = token_inputs(valid, logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    ratio = jnp.exp(detached(detached_logprobs, logprobs, valid) - behavior)
    weight = jnp.where((ratio > 1 - epsilon_low) & (ratio < 1 + epsilon_high), ratio, 0.0)
    return valid_only(-weight * advantages * logprobs, valid)


def topr(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    ratio_high: float = 1.0,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """ℓ = −A·log π_θ where A ≥ 0, −sg(min(Π_l r_l, ratio_high))·A·log π_θ where A < 0 (TOPR, arXiv 2503.14286).

    Good completions are imitated as they are; bad ones weigh by the *completion's* ratio to the behavior policy, given as
    `old_logprobs`. The default cap of 1 is a kink at π_θ = μ: the staleness bias has no first-order law there. Arguments and
    result as in `cispo`.

    Args:
      ratio_high: the largest weight of a completion with A < 0, positive.
    """
    check_positive(ratio_high=ratio_high)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    log_ratio = jnp.sum(detached(detached_logprobs, logprobs, valid) - old_logprobs, axis=-1, keepdims=True)
    weight = jnp.exp(jnp.minimum(log_ratio, jnp.log(jnp.asarray(ratio_high, log_ratio.dtype))))
    return valid_only(-jnp.where(advantages < 0, weight, 1.0) * advantages * logprobs, valid)


def vespo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    behavior_logprobs: jax.Array | None = None,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """ℓ = −sg(φ(w))·A·log π_θ, φ(w) = w^k·e^{λ(1−w)}, w = Π_l r_l of the completion (VESPO, as TRL has it).

    log r is held within ±20 per token, log w within [log 1e-8, 20]; φ(1) = 1 and φ falls to both sides of w = k/λ. (k, λ) go by
    the sign of A. Arguments and result as in `cispo`.

    Args:
      k_positive, lambda_positive: where A ≥ 0, positive.
      k_negative, lambda_negative: where A < 0, positive.
      behavior_logprobs: [..., L] log μ; if given, w also holds Π_l π_old/μ.
    """
    check_positive(k_positive=k_positive, lambda_positive=lambda_positive)
    check_positive(k_negative=k_negative, lambda_negative=lambda_negative)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    log_ratio = jnp.clip(detached(detached_logprobs, logprobs, valid) - old_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if behavior_logprobs is not None:
        _, behavior, _ = token_inputs(valid, logprobs=logprobs, behavior_logprobs=behavior_logprobs)
        log_ratio += old_logprobs - behavior
    log_weight = jnp.clip(jnp.sum(log_ratio, axis=-1, keepdims=True), jnp.log(_MIN_WEIGHT), _MAX_LOG_RATIO)
    k = jnp.where(advantages >= 0, k_positive, k_negative).astype(logprobs.dtype)
    rate = jnp.where(advantages >= 0, lambda_positive, lambda_negative).astype(logprobs.dtype)
    gate = jnp.exp(k * log_weight - rate * jnp.expm1(log_weight))
    return valid_only(-gate * advantages * logprobs, valid)
