"""Losses of one token: functions of its own ratio, a clip, a gate, a penalty.

Notation of all losses: r = π_θ/π_old = exp(logprobs − old_logprobs), A the advantage, ℓ the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_async_grpo.losses.arguments import check_number, check_positive, policy_inputs, token_inputs, valid_only

__all__ = [
    "check_clip",
    "clipped_surrogate",
    "clipped_tokens",
    "decoupled_ppo",
    "dro",
    "importance_sampling",
    "ppo_clip",
    "reinforce",
    "sapo",
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
    check_clip(epsilon_low, epsilon_high, dual_clip)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(logprobs - old_logprobs)
    capped = ratio if dual_clip is None else jnp.minimum(ratio, dual_clip)
    return valid_only(clipped_surrogate(ratio, advantages, 1 - epsilon_low, 1 + epsilon_high, capped), valid)


def clipped_surrogate(
    ratio: jax.Array, advantages: jax.Array, low: jax.Array | float, high: jax.Array | float, capped: jax.Array | None = None
) -> jax.Array:
    """−min(r·A, clip(r, low, high)·A) of any ratio, with `capped` for r in the first branch: the part all clips share."""
    unclipped = ratio if capped is None else capped
    return -jnp.minimum(unclipped * advantages, jnp.clip(ratio, low, high) * advantages)


def importance_sampling(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """ℓ = −r·A: the ratio without a clip; arguments, result and errors as in `ppo_clip`."""
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    return valid_only(-jnp.exp(logprobs - old_logprobs) * advantages, valid)


def reinforce(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """ℓ = −A·log π_θ: no importance sampling; `old_logprobs` is checked and not used. As in `ppo_clip` otherwise."""
    logprobs, _, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    return valid_only(-advantages * logprobs, valid)


def decoupled_ppo(
    logprobs: jax.Array,
    proximal_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    behavior_logprobs: jax.Array,
    cap: float | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """ℓ = min(π_prox/μ, C)·ppo_clip(π_θ/π_prox): the clip around a proximal policy apart from the behavior policy μ (AReaL).

    arXiv 2505.24298. The weight holds no learner, so nothing is detached: argument 0 alone is differentiated in an update.

    Args:
      logprobs: [..., L] log π_θ, nats.
      proximal_logprobs: [..., L] log π_prox, the policy the clip keeps the learner close to.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      behavior_logprobs: [..., L] log μ of the policy that drew the tokens.
      cap: C, the largest weight; None = no cap.
      epsilon_low, epsilon_high, dual_clip: of `ppo_clip`.

    Returns:
      [..., L] loss of every token.

    Raises:
      ValueError: as `ppo_clip`, or a cap that is not positive.
    """
    if cap is not None:
        check_positive(cap=cap)
    options = dict(epsilon_low=epsilon_low, epsilon_high=epsilon_high, dual_clip=dual_clip)
    policies = dict(logprobs=logprobs, proximal_logprobs=proximal_logprobs, behavior_logprobs=behavior_logprobs)
    _, proximal, behavior, valid = token_inputs(mask, **policies)
    values = ppo_clip(logprobs, proximal_logprobs, advantages, mask, **options)
    weight = jnp.exp(proximal - behavior)
    return valid_only(values * (weight if cap is None else jnp.minimum(weight, cap)), valid)


def sapo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> jax.Array:
    """ℓ = −(4/τ)·σ(τ·(r−1))·A: a soft gate in place of the clip, τ by the sign of A (SAPO, arXiv 2511.20347).

    At r = 1 the gradient is that of −A·log π_θ, the value −2A/τ. Arguments, result and errors as in `ppo_clip`.

    Args:
      temperature_positive: τ where A > 0, positive.
      temperature_negative: τ where A ≤ 0, positive; a larger one closes the gate sooner.
    """
    check_positive(temperature_positive=temperature_positive, temperature_negative=temperature_negative)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    temperature = jnp.where(advantages > 0, temperature_positive, temperature_negative).astype(logprobs.dtype)
    gate = jax.nn.sigmoid(temperature * (jnp.exp(logprobs - old_logprobs) - 1.0))
    return valid_only(-4.0 / temperature * gate * advantages, valid)


def dro(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array | None = None, *, beta: float
) -> jax.Array:
    """ℓ = −(A·log π_θ − ½β·(log r)²): a quadratic pull to π_old (DRO, arXiv 2405.19107). As in `ppo_clip` otherwise.

    Args:
      beta: β, advantage units per nat², positive.
    """
    check_positive(beta=beta)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    return valid_only(-(advantages * logprobs - 0.5 * beta * (logprobs - old_logprobs) ** 2), valid)


def clipped_tokens(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> jax.Array:
    """1 where `ppo_clip` takes the clipped branch, (A > 0 and r > 1+ε_high) or (A < 0 and r < 1−ε_low), else 0; NaN shows.

    Its mean over valid tokens is the field's `pg_clipfrac`. Arguments, shape and errors as in `ppo_clip`.
    """
    check_clip(epsilon_low, epsilon_high)
    logprobs, old_logprobs, advantages, valid = policy_inputs(logprobs, old_logprobs, advantages, mask)
    ratio = jnp.exp(logprobs - old_logprobs)
    high = (advantages > 0) & (ratio > 1 + epsilon_high)
    low = (advantages < 0) & (ratio < 1 - epsilon_low)
    undefined = jnp.isnan(ratio) | jnp.isnan(advantages)  # which no comparison would show
    return valid_only(jnp.where(undefined, jnp.nan, (high | low).astype(logprobs.dtype)), valid)


def check_clip(epsilon_low: float, epsilon_high: float, dual_clip: float | None = None) -> None:
    """Raises ValueError on a bound of `ppo_clip` outside its range; ε = 0 would put a kink on r = 1."""
    check_number("epsilon_low", epsilon_low)
    check_number("epsilon_high", epsilon_high)
    if not 0 < epsilon_low <= 1:
        raise ValueError(f"epsilon_low is {epsilon_low}; it must be in (0, 1]")
    if not epsilon_high > 0:
        raise ValueError(f"epsilon_high is {epsilon_high}; it must be > 0")
    if dual_clip is not None and not dual_clip >= 1 + epsilon_high:
        raise ValueError(f"dual_clip is {dual_clip}; it must be at least 1 + epsilon_high = {1 + epsilon_high}, or None")
