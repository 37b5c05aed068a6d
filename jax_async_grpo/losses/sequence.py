"""Losses of one ratio per completion: the geometric mean of its tokens' ratios, s_i = exp((1/L_i)·Σ_l m·log r_l)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import check_positive, detached, policy_inputs, valid_only
from jax_async_grpo.losses.ratio import check_clip, clipped_surrogate

__all__ = ["gmpo", "gspo", "gspo_token", "luspo"]


def gspo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> jax.Array:
    """ℓ = −min(s_i·A, clip(s_i, 1−ε_low, 1+ε_high)·A) on every token of the completion (GSPO, arXiv 2507.18071).

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      old_logprobs: [..., L] log π_old, nats.
      advantages: [...] as in the paper, or [..., L], then each token has its own beside the completion's ratio.
      mask: [..., L] bool or 0/1, None = all valid.
      epsilon_low: the ratio is clipped below at 1 − epsilon_low, 0 < epsilon_low ≤ 1; the default is the paper's.
      epsilon_high: the ratio is clipped above at 1 + epsilon_high, positive.

    Returns:
      [..., L] loss of every token, 0 in a completion without valid tokens.

    Raises:
      ValueError: a bound outside its range, or shapes that do not match.
    """
    check_clip(epsilon_low, epsilon_high)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(_row_mean(logprobs - old_logprobs, valid))
    return valid_only(clipped_surrogate(ratio, advantages, 1 - epsilon_low, 1 + epsilon_high), valid)


def gspo_token(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """The clip on s_il = sg(s_i)·π_θ,l/sg(π_θ,l): the completion's ratio, each token's own gradient (GSPO-token).

    arXiv 2507.18071. With one advantage per completion and a weight per row, value and gradient are those of `gspo`. Arguments,
    result and errors as there.

    Args:
      detached_logprobs: [..., L] log π_θ inside sg; default `logprobs` behind a stop_gradient.
    """
    check_clip(epsilon_low, epsilon_high)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    fixed = detached(detached_logprobs, logprobs, valid)
    ratio = jnp.exp(logprobs - fixed + _row_mean(fixed - old_logprobs, valid))
    return valid_only(clipped_surrogate(ratio, advantages, 1 - epsilon_low, 1 + epsilon_high), valid)


def luspo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> jax.Array:
    """ℓ = L_i·(the loss of `gspo`): with a sequence mean, completions weigh by their length (LUSPO). As in `gspo` otherwise."""
    values = gspo(logprobs, old_logprobs, advantages, mask, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    length = values.shape[-1] if mask is None else jnp.sum(jnp.asarray(mask) != 0, axis=-1, keepdims=True)
    return values * jnp.asarray(length, values.dtype)


def gmpo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    log_epsilon_low: float = 0.4,
    log_epsilon_high: float = 0.4,
) -> jax.Array:
    """ℓ = −A·exp((1/L_i)·Σ_l m·d'_l), d' the log-ratio clipped on the side where A pushes (GMPO, arXiv 2507.20673).

    With d = log r: d' = min(d, log_epsilon_high) where A > 0, max(d, −log_epsilon_low) where A < 0, 0 where A = 0. Arguments,
    result and errors as in `gspo`.

    Args:
      log_epsilon_low: bound below on the log-ratio, nats, positive.
      log_epsilon_high: bound above on the log-ratio, nats, positive.
    """
    check_positive(log_epsilon_low=log_epsilon_low, log_epsilon_high=log_epsilon_high)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    log_ratio = logprobs - old_logprobs
    bounded = jnp.where(advantages > 0, jnp.minimum(log_ratio, log_epsilon_high), jnp.maximum(log_ratio, -log_epsilon_low))
    bounded = jnp.where(advantages == 0, 0.0, bounded)
    return valid_only(-advantages * jnp.exp(_row_mean(bounded, valid)), valid)


def _row_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """[..., 1]: the mean over the valid tokens of a row, 0 where there are none; `values` are 0 elsewhere or masked here."""
    count = jnp.sum(valid, axis=-1, keepdims=True)
    return jnp.sum(valid_only(values, valid), axis=-1, keepdims=True) / jnp.maximum(count, 1)
