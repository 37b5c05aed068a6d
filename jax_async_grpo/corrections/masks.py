"""Masks, weights of 0 or 1, that drop tokens or completions whose ratio has gone too far."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_async_grpo.corrections.bounds import check_band, inside
from jax_async_grpo.losses.arguments import check_positive, detached, policy_inputs, token_inputs
from jax_async_grpo.masked import as_mask, masked_mean

__all__ = ["geometric_mask", "k_rejection", "masked_max", "opsm", "veto"]


def geometric_mask(
    old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, low: float, high: float
) -> jax.Array:
    """1 on completions with low ≤ (Π_l ρ_l)^{1/L_i} ≤ high, else 0.

    Args:
      old_logprobs: [..., L] log π_old of the tokens, nats.
      behavior_logprobs: [..., L] log μ of the policy that drew them, nats.
      mask: [..., L] bool or 0/1, None = all valid.
      low: the smallest geometric mean that is kept, in [0, 1).
      high: the largest geometric mean that is kept, > 1.

    Returns:
      [..., L] 0 or 1, float; constant over the valid tokens of a completion.

    Raises:
      ValueError: a bound outside its range, or shapes that do not match.
    """
    check_band(low, high)
    old, behavior, valid = token_inputs(mask, old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs)
    geometric = masked_mean(old - behavior, valid, axis=-1)[..., None]
    return _as_weights(inside(geometric, low, high), valid, old.dtype)


def veto(
    old_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    low: float = 1e-4,
    high: float = 100.0,
) -> jax.Array:
    """0 on completions with a token outside low ≤ ρ ≤ high, else 1: one outlier drops the row. As `geometric_mask` otherwise.

    Args:
      low: the smallest ratio a token may have, in [0, 1).
      high: the largest ratio a token may have, > 1.
    """
    check_band(low, high)
    old, behavior, valid = token_inputs(mask, old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs)
    keep = jnp.all(inside(old - behavior, low, high) | ~valid, axis=-1, keepdims=True)
    return _as_weights(keep, valid, old.dtype)


def k_rejection(
    old_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    estimator: Callable,
    level: Callable | None = None,
    threshold: float,
    threshold_low: float | None = None,
) -> jax.Array:
    """1 where threshold_low ≤ level(k_j(μ, π_old)) ≤ threshold, else 0: rejection by a KL term of token or completion.

    With log ρ = log π_old − log μ the terms are k1 = −log ρ, k2 = ½(log ρ)², k3 = ρ − 1 − log ρ, estimates of KL(μ‖π_old) from
    tokens of μ. Mind the sign of k1: an upper threshold drops *small* ratios. As `geometric_mask` otherwise.

    Args:
      estimator: `losses.k1`, `losses.k2`, `losses.k3` or another (logprobs, reference_logprobs, mask) -> [..., L]; it gets μ as
        the policy and π_old as the reference.
      level: what of a completion is compared, (values[..., L], mask, axis) -> [...]: `masked.masked_sum`, `masked.masked_mean`,
        `masked_max`. None = each token by itself.
      threshold: the largest value that is kept, nats (nats² for k2), positive.
      threshold_low: the smallest value that is kept, negative; None = none. Only k1 can fall below 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be > 0, the value at equal policies is 0")
    if threshold_low is not None and not threshold_low < 0:
        raise ValueError(f"threshold_low is {threshold_low}; it must be < 0, or None")
    old, behavior, valid = token_inputs(mask, old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs)
    values = estimator(behavior, old, valid)
    if level is not None:
        values = level(values, valid, axis=-1)[..., None]
    keep = values <= threshold
    if threshold_low is not None:
        keep &= values >= threshold_low
    return _as_weights(keep, valid, old.dtype)


def masked_max(values: jax.Array, mask: jax.Array | None = None, axis=None) -> jax.Array:
    """The largest valid value over `axis` (all axes by default); −inf where none is valid. A `level` of `k_rejection`."""
    values = jnp.asarray(values)
    return jnp.max(values, axis=axis, where=as_mask(mask, values.shape), initial=-jnp.inf)


def opsm(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    threshold: float,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """0 where A < 0 and the completion's mean log μ − log π_θ > threshold, else 1: off-policy sequence masking (DeepSeek-V3.2).

    A bad completion that the learner has already moved away from teaches nothing more; good ones always stay. As
    `geometric_mask` otherwise.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      advantages: [..., L] or [...]; per token, each token goes by its own sign.
      threshold: nats a token, positive.
      detached_logprobs: [..., L] log π_θ that is compared; default `logprobs` behind a stop_gradient.
    """
    check_positive(threshold=threshold)
    learner, behavior, valid = token_inputs(mask, logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    advantages = policy_inputs(learner, behavior, advantages, valid).advantages
    moved = masked_mean(behavior - detached(detached_logprobs, learner, valid), valid, axis=-1)[..., None]
    return _as_weights(~((advantages < 0) & (moved > threshold)), valid, learner.dtype)


def _as_weights(keep, valid, dtype):
    return (keep & valid).astype(dtype)
