"""Per-token policy losses (to be minimized) and KL terms as pure functions of arrays; nothing is reduced.

The positional order of every policy loss is `(logprobs, old_logprobs, advantages, mask)`; all but the advantages have the
shape [..., L] of completion tokens. Advantages may lack the token axis: [...] is one advantage per completion. No function
stops a gradient: differentiate with respect to the argument you mean (the learner's log-probs are argument 0). Positions
outside the mask give exactly 0 and pass no gradient, whatever stands there.

Notation in the docstrings: r = π_θ/π_old = exp(logprobs − old_logprobs), A the advantage, ℓ the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.masked import as_mask

__all__ = [
    "abs_kl",
    "clipped_tokens",
    "entropy",
    "importance_sampling",
    "k1",
    "k2",
    "k3",
    "ppo_clip",
    "reinforce",
]


def ppo_clip(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """ℓ = −min(r·A, clip(r, 1−ε_low, 1+ε_high)·A): the loss of PPO and GRPO (arXiv 1707.06347, 2402.03300).

    With `dual_clip` c the loss of a token with A < 0 is at most −c·A (arXiv 1912.09729), which is the same function as
    capping r at c in the unclipped branch. `epsilon_high > epsilon_low` is the "clip-higher" of DAPO.

    Args:
      logprobs: [..., L] log π_θ of the tokens, nats.
      old_logprobs: [..., L] log π of the ratio's denominator, nats: the behavior policy, or a proximal one.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      epsilon_low: the ratio is clipped below at 1 − epsilon_low, 0 < epsilon_low ≤ 1.
      epsilon_high: the ratio is clipped above at 1 + epsilon_high, positive.
      dual_clip: the cap c on the ratio of tokens with negative advantage, at least 1 + epsilon_high; None = no cap.

    Returns:
      [..., L] loss of every token.

    Raises:
      ValueError: a bound outside its range (ε = 0 puts a kink on r = 1), or shapes that do not match.
    """
    _check_clip(epsilon_low, epsilon_high, dual_clip)
    logprobs, old_logprobs, advantages, valid = _inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(logprobs - old_logprobs)
    capped = ratio if dual_clip is None else jnp.minimum(ratio, dual_clip)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    return _valid(-jnp.minimum(capped * advantages, clipped * advantages), valid)


def importance_sampling(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """ℓ = −r·A: the ratio without a clip; arguments, result and errors as in `ppo_clip`."""
    logprobs, old_logprobs, advantages, valid = _inputs(logprobs, old_logprobs, advantages, mask)
    return _valid(-jnp.exp(logprobs - old_logprobs) * advantages, valid)


def reinforce(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """ℓ = −A·log π_θ: no importance sampling; `old_logprobs` is checked and not used. As in `ppo_clip` otherwise."""
    logprobs, _, advantages, valid = _inputs(logprobs, old_logprobs, advantages, mask)
    return _valid(-advantages * logprobs, valid)


def clipped_tokens(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> jax.Array:
    """1 where `ppo_clip` takes the clipped branch, (A > 0 and r > 1+ε_high) or (A < 0 and r < 1−ε_low), else 0.

    Its mean over valid tokens is the field's `pg_clipfrac`. Arguments, shape and errors as in `ppo_clip`.
    """
    _check_clip(epsilon_low, epsilon_high, None)
    logprobs, old_logprobs, advantages, valid = _inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(logprobs - old_logprobs)
    high = (advantages > 0) & (ratio > 1 + epsilon_high)
    low = (advantages < 0) & (ratio < 1 - epsilon_low)
    return _valid((high | low).astype(logprobs.dtype), valid)


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
    return _valid(-log_ratio, valid)


def k2(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """½·(log π_ref − log π_θ)²: biased, but its gradient is that of the KL on-policy. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return _valid(0.5 * log_ratio**2, valid)


def k3(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """e^d − d − 1 with d = log π_ref − log π_θ: unbiased on-policy and never negative. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return _valid(jnp.expm1(log_ratio) - log_ratio, valid)


def abs_kl(logprobs: jax.Array, reference_logprobs: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """|log π_ref − log π_θ|; has a kink where the two agree. Arguments as in `k1`."""
    log_ratio, valid = _log_ratio(logprobs, reference_logprobs, mask)
    return _valid(jnp.abs(log_ratio), valid)


def entropy(logits: jax.Array) -> jax.Array:
    """−Σ_v π_v·log π_v of softmax(logits): the exact entropy of the next token.

    Args:
      logits: [..., V]; −inf marks a token that cannot be drawn.

    Returns:
      [...] nats.

    Raises:
      ValueError: logits is a scalar.
    """
    if jnp.ndim(logits) < 1:
        raise ValueError("logits is a scalar; it must be [..., V]")
    logprobs = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    possible = jnp.isfinite(logprobs)
    finite = jnp.where(possible, logprobs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(finite) * finite, 0.0), axis=-1)


def _inputs(logprobs, old_logprobs, advantages, mask):
    """The arrays a policy loss works on: equal shapes, at least float32, 0 under the mask."""
    if old_logprobs is None:
        raise ValueError("old_logprobs is None; the ratio needs its denominator (pass the recorded behavior log-probs)")
    shape = jnp.shape(logprobs)
    valid = _check_tokens("old_logprobs", old_logprobs, shape, mask)
    rank = jnp.ndim(advantages)
    expected = shape if rank == len(shape) else shape[:-1]
    if jnp.shape(advantages) != expected:
        raise ValueError(f"advantages has shape {jnp.shape(advantages)}; it must be {shape} (per token) or {shape[:-1]}")
    dtype = jnp.promote_types(jnp.result_type(logprobs), jnp.float32)
    advantages = jnp.asarray(advantages, dtype)
    advantages = advantages if rank == len(shape) else advantages[..., None]
    tokens = (_valid(jnp.asarray(x, dtype), valid) for x in (logprobs, old_logprobs))
    return *tokens, _valid(jnp.broadcast_to(advantages, shape), valid), valid


def _log_ratio(logprobs, reference_logprobs, mask):
    valid = _check_tokens("reference_logprobs", reference_logprobs, jnp.shape(logprobs), mask)
    dtype = jnp.promote_types(jnp.result_type(logprobs), jnp.float32)
    learner, reference = (_valid(jnp.asarray(x, dtype), valid) for x in (logprobs, reference_logprobs))
    return reference - learner, valid


def _check_tokens(name, other, shape, mask) -> jax.Array:
    if len(shape) < 1:
        raise ValueError("logprobs is a scalar; it must be [..., L], one log-prob per completion token")
    if jnp.shape(other) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(other)}; it must have the shape of logprobs, {shape}")
    return as_mask(mask, shape)


def _valid(values, valid):
    return jnp.where(valid, values, jnp.zeros((), values.dtype))


def _check_clip(epsilon_low, epsilon_high, dual_clip):
    if not 0 < epsilon_low <= 1:
        raise ValueError(f"epsilon_low is {epsilon_low}; it must be in (0, 1]")
    if not epsilon_high > 0:
        raise ValueError(f"epsilon_high is {epsilon_high}; it must be > 0")
    if dual_clip is not None and not dual_clip >= 1 + epsilon_high:
        raise ValueError(f"dual_clip is {dual_clip}; it must be at least 1 + epsilon_high = {1 + epsilon_high}, or None")
