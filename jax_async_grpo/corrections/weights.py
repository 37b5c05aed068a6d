"""Importance weights ρ = π_old/μ of a token or a whole completion, truncated (TIS) or dropped (MIS) at a bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.corrections.bounds import check_band, inside, log_bound
from jax_async_grpo.losses.arguments import token_inputs, valid_only
from jax_async_grpo.masked import masked_mean

__all__ = ["icepop", "sequence_mask_tis", "sequence_mis", "sequence_tis", "token_mis", "token_tis"]


def token_tis(
    old_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    cap: float,
    low: float | None = None,
) -> jax.Array:
    """w = min(ρ, cap), with `low` at least low: truncated importance sampling, token by token.

    >>> old, behavior = jnp.log(jnp.array([[0.2, 0.9], [0.4, 0.1]]))
    >>> print(token_tis(old, behavior, cap=2.0).round(3))
    [0.5 2. ]

    Args:
      old_logprobs: [..., L] log π_old of the tokens, nats: the denominator of the loss's ratio.
      behavior_logprobs: [..., L] log μ of the policy that drew them, nats.
      mask: [..., L] bool or 0/1, None = all valid.
      cap: the largest weight, ≥ 1; inf = none. Exactly 1 is a kink at π_old = μ.
      low: the smallest weight, in [0, 1]; None = none.

    Returns:
      [..., L] weights.

    Raises:
      ValueError: a bound outside its range, or shapes that do not match.
    """
    _check_truncation(cap)
    if low is not None and not 0 <= low <= 1:
        raise ValueError(f"low is {low}; it is a ratio and must be in [0, 1], or None")
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    bounded = jnp.clip(log_ratio, None if low is None else log_bound(low), log_bound(cap))
    return valid_only(jnp.exp(bounded), valid)


def token_mis(old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, cap: float) -> jax.Array:
    """w = ρ where ρ ≤ cap, else 0: masked importance sampling, token by token. As `token_tis` otherwise.

    Args:
      cap: the largest ratio that is kept, > 1.
    """
    _check_rejection(cap)
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    return _kept(log_ratio, inside(log_ratio, 0.0, cap), valid)


def icepop(
    old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, low: float, high: float
) -> jax.Array:
    """w = ρ where low ≤ ρ ≤ high, else 0: IcePop, a two-sided `token_mis`. As `token_tis` otherwise.

    Args:
      low: the smallest ratio that is kept, in [0, 1).
      high: the largest ratio that is kept, > 1.
    """
    check_band(low, high)
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    return _kept(log_ratio, inside(log_ratio, low, high), valid)


def sequence_tis(
    old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, cap: float
) -> jax.Array:
    """w = min(Π_l ρ_l, cap), one weight a completion on each of its tokens. As `token_tis` otherwise.

    Args:
      cap: the largest weight of a completion, ≥ 1; inf = none.
    """
    _check_truncation(cap)
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    log_weight = jnp.sum(log_ratio, axis=-1, keepdims=True)
    return valid_only(jnp.exp(jnp.minimum(log_weight, log_bound(cap))), valid)


def sequence_mis(
    old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, cap: float
) -> jax.Array:
    """w = Π_l ρ_l where that is ≤ cap, else 0, one weight a completion on each of its tokens. As `token_tis` otherwise.

    Args:
      cap: the largest ratio of a completion that is kept, > 1.
    """
    _check_rejection(cap)
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    log_weight = jnp.sum(log_ratio, axis=-1, keepdims=True)
    return _kept(log_weight, inside(log_weight, 0.0, cap), valid)


def sequence_mask_tis(
    old_logprobs: jax.Array, behavior_logprobs: jax.Array, mask: jax.Array | None = None, *, low: float, high: float
) -> jax.Array:
    """w = ρ, *unclamped*, on the tokens of completions with low ≤ (Π_l ρ_l)^{1/L_i} ≤ high, else 0 (NeMo-RL's `seq-mask-tis`).

    A single token's weight has no bound: one far above and one far below 1 may average to a kept completion. Combine it with
    `veto` where that matters. As `token_tis` otherwise.

    Args:
      low: the smallest geometric mean that is kept, in [0, 1).
      high: the largest geometric mean that is kept, > 1.
    """
    check_band(low, high)
    log_ratio, valid = _log_ratio(old_logprobs, behavior_logprobs, mask)
    geometric = masked_mean(log_ratio, valid, axis=-1)[..., None]
    return _kept(log_ratio, inside(geometric, low, high), valid)


def _log_ratio(old_logprobs, behavior_logprobs, mask):
    old, behavior, valid = token_inputs(mask, old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs)
    return old - behavior, valid


def _kept(log_weight, keep, valid):
    # the inner where: a dropped weight may overflow, and inf times the cotangent 0 is NaN
    weight = jnp.exp(jnp.where(keep, log_weight, 0.0))
    return valid_only(jnp.where(keep, weight, 0.0), valid)


def _check_truncation(cap):
    if not cap >= 1:
        raise ValueError(f"cap is {cap}; it is a ratio and must be >= 1")


def _check_rejection(cap):
    if not cap > 1:
        raise ValueError(f"cap is {cap}; it is a ratio and must be > 1")
