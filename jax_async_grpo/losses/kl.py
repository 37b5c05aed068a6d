"""KL terms to a reference policy, per token, with d = log π_ref − log π_θ."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import detached, token_inputs, valid_only

__all__ = ["abs_kl", "k1", "k2", "k3", "ratio_weighted_k3", "straight_through_kl"]


def k1(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """log π_θ − log π_ref, per token: unbiased for KL(π_θ‖π_ref) on-policy; as a *loss* its mean gradient is zero.

    Args:
      logprobs: [..., L] log π_θ, nats.
      reference_logprobs: [..., L] log π_ref, nats.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      [..., L] nats.

    Raises:
      ValueError: shapes that do not match.
    """
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return valid_only(-log_ratio, valid)


def k2(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """½·(log π_ref − log π_θ)²: biased, but its gradient is that of the KL on-policy. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return valid_only(0.5 * log_ratio**2, valid)


def k3(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """e^d − d − 1 with d = log π_ref − log π_θ: unbiased on-policy and never negative. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return valid_only(jnp.expm1(log_ratio) - log_ratio, valid)


def abs_kl(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """|log π_ref − log π_θ|; has a kink where the two agree. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return valid_only(jnp.abs(log_ratio), valid)


def straight_through_kl(
    logprobs: jax.Array,
    reference_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    value_fn: Callable = k3,
    gradient_fn: Callable = k2,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """The value of one term with the gradient of another, g(π_θ) − g(sg π_θ) + v(sg π_θ) (verl's `k1+`, `k3+`).

    Args:
      logprobs, reference_logprobs, mask: as in `k1`.
      value_fn: v, a term of this module.
      gradient_fn: g; `k2` has the gradient of the KL on-policy.
      detached_logprobs: [..., L] log π_θ of the detached part; default `logprobs` behind a stop_gradient.

    Returns:
      [..., L] nats.

    Raises:
      ValueError: shapes that do not match.
    """
    learner, reference, valid = token_inputs(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    fixed = detached(detached_logprobs, learner, valid)
    return gradient_fn(learner, reference, valid) - gradient_fn(fixed, reference, valid) + value_fn(fixed, reference, valid)


def ratio_weighted_k3(
    logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None, *, old_logprobs: jax.Array
) -> jax.Array:
    """r·(e^d − d − 1) with r = π_θ/π_old differentiated: unbiased for KL(π_θ‖π_ref) on tokens drawn from π_old.

    TRL's `use_bias_correction_kl`, after DeepSeek-V3.2. Arguments as in `k1`.

    Args:
      old_logprobs: [..., L] log π_old of the policy that drew the tokens, nats.
    """
    learner, old, valid = token_inputs(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    return valid_only(jnp.exp(learner - old) * k3(logprobs, reference_logprobs, mask), valid)


def _log_ratio(logprobs, reference_logprobs, mask):
    learner, reference, valid = token_inputs(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
    return reference - learner, valid
