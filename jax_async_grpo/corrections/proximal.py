"""Proximal policies that are interpolated instead of evaluated (A-3PO), and how far they are from the real one.

The proximal policy is an earlier version of the learner, between the behavior policy μ and the learner π_θ; a trainer that kept
no such version takes a point between their log-probs. Here the versions are kept (`staleness.ParamHistory`), so that
the approximations have a measurable error.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.losses.arguments import detached, token_inputs, valid_only
from jax_async_grpo.losses.kl import k3
from jax_async_grpo.masked import masked_mean

__all__ = ["linear_proximal", "log_linear_proximal", "proximal_error", "proximal_fraction"]


def log_linear_proximal(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    alpha: jax.Array | float,
    mask: jax.Array | None = None,
    *,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """log μ + α·(log π_θ − log μ): A-3PO's proximal log-probs, a geometric mean of the two policies without its normalizer.

    It therefore sums to less than 1 over the vocabulary. Where the logits move on a straight line its error against the true
    policy is the same for every token of a context and never positive: −½α(1−α)·Var(log π_θ − log μ) to second order.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      behavior_logprobs: [..., L] log μ, nats.
      alpha: α in [0, 1], a scalar, [...] per completion or [..., L] per token; of `proximal_fraction`.
      mask: [..., L] bool or 0/1, None = all valid.
      detached_logprobs: [..., L] log π_θ that is interpolated; default `logprobs` behind a stop_gradient, because a proximal
        policy is a constant of the update.

    Returns:
      [..., L] nats, 0 where the mask is False.

    Raises:
      ValueError: alpha outside [0, 1] (checked where it is concrete), or shapes that do not match.
    """
    learner, behavior, alpha, valid = _interpolation_inputs(logprobs, behavior_logprobs, alpha, mask, detached_logprobs)
    return valid_only((1 - alpha) * behavior + alpha * learner, valid)


def linear_proximal(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    alpha: jax.Array | float,
    mask: jax.Array | None = None,
    *,
    detached_logprobs: jax.Array | None = None,
) -> jax.Array:
    """log((1−α)·μ + α·π_θ): a mixture of the two policies, normalized. Arguments and result as in `log_linear_proximal`.

    For logits on a straight line its error is ½α(1−α)·(d² − Var d) to second order, d = log π_θ − log μ: of either sign.
    """
    learner, behavior, alpha, valid = _interpolation_inputs(logprobs, behavior_logprobs, alpha, mask, detached_logprobs)
    return valid_only(jnp.logaddexp(jnp.log1p(-alpha) + behavior, jnp.log(alpha) + learner), valid)


def proximal_fraction(
    proximal_version: jax.Array | int, behavior_version: jax.Array | int, learner_version: jax.Array | int
) -> jax.Array:
    """α = (v_prox − v_μ)/(v_θ − v_μ); 1 where v_θ = v_μ, as the three policies are then one.

    AReaL takes v_prox = v_θ − 1, which for a completion without lag is older than what drew it: also then 1.

    >>> print(proximal_fraction(4, jnp.array([1, 3, 5]), 5))
    [0.75 0.5  1.  ]

    Args:
      proximal_version: int, any shape that broadcasts, learner updates.
      behavior_version: int, learner updates; of `Rollouts.policy_version`.
      learner_version: int, learner updates.

    Returns:
      Float array of the broadcast shape.

    Raises:
      ValueError: behavior ≤ proximal ≤ learner does not hold where there is a lag (checked where all are concrete).
    """
    versions = (proximal_version, behavior_version, learner_version)
    if not any(isinstance(version, jax.core.Tracer) for version in versions):
        proximal, behavior, learner = (np.asarray(version) for version in versions)
        if (behavior > learner).any():
            raise ValueError("behavior_version is above learner_version: no rollout comes from a later learner")
        if ((behavior < learner) & ((proximal < behavior) | (proximal > learner))).any():
            raise ValueError("proximal_version must lie between behavior_version and learner_version")
    proximal, behavior, learner = (jnp.asarray(version) for version in versions)
    lag = learner - behavior
    return jnp.where(lag == 0, 1.0, (proximal - behavior) / jnp.where(lag == 0, 1, lag))


def proximal_error(
    approximate_logprobs: jax.Array, exact_logprobs: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
    """How far approximate proximal log-probs are from those of the version itself, over the valid tokens.

    Args:
      approximate_logprobs: [..., L] nats, of `log_linear_proximal` or `linear_proximal`.
      exact_logprobs: [..., L] nats, of the parameters that `staleness.read` gives.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      Scalars with d = approximate − exact: `proximal/mean_abs` mean |d| and `proximal/max_abs` max |d| in nats,
      `proximal/k3_kl` mean e^d − d − 1. All 0 without a valid token.

    Raises:
      ValueError: shapes that do not match.
    """
    approximate, true, valid = token_inputs(mask, approximate_logprobs=approximate_logprobs, exact_logprobs=exact_logprobs)
    distance = jnp.abs(approximate - true)
    return {
        "proximal/mean_abs": masked_mean(distance, valid),
        "proximal/max_abs": jnp.max(distance, initial=0.0),
        "proximal/k3_kl": masked_mean(k3(true, approximate, valid), valid),
    }


def _interpolation_inputs(logprobs, behavior_logprobs, alpha, mask, detached_logprobs):
    learner, behavior, valid = token_inputs(mask, logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    shape = learner.shape
    if jnp.shape(alpha) not in ((), shape[:-1], shape):
        raise ValueError(f"alpha has shape {jnp.shape(alpha)}; it must be a scalar, {shape[:-1]} or {shape}")
    if not isinstance(alpha, jax.core.Tracer) and not ((np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)).all():
        raise ValueError("alpha must be in [0, 1]; it is the fraction of the way from the behavior policy to the learner")
    alpha = jnp.asarray(alpha, learner.dtype)
    alpha = alpha[..., None] if 0 < alpha.ndim < len(shape) else alpha
    return detached(detached_logprobs, learner, valid), behavior, alpha, valid
