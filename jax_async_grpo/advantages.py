"""Group-relative advantages A_i of the G rewards of one prompt; a group of equal rewards has advantage exactly 0.

Every function maps rewards[..., G] to advantages[..., G] and treats the members of a group alike. Formulas and the
conventions of other systems: docs/losses.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["group_centered", "group_normalized", "leave_one_out"]


def group_centered(rewards: jax.Array) -> jax.Array:
    """A_i = R_i − mean(R): the mean-centered advantage ("Dr. GRPO", arXiv 2503.20783).

    Args:
      rewards: [..., G].

    Returns:
      [..., G], zero in sum; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: rewards has no group axis.
    """
    rewards = _as_groups(rewards)
    centered = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    # The mean of G equal floats need not be that float: rounding must not turn into a learning signal.
    return jnp.where(_all_equal(rewards), jnp.zeros((), rewards.dtype), centered)


def group_normalized(rewards: jax.Array, *, ddof: int = 0, epsilon: float = 1e-6) -> jax.Array:
    """A_i = (R_i − mean(R)) / (std(R) + ε): the advantage of GRPO (arXiv 2402.03300).

    Args:
      rewards: [..., G].
      ddof: 0 for the population standard deviation, 1 for the sample one (TRL, verl and tunix use 1).
      epsilon: added to the standard deviation, in reward units; positive.

    Returns:
      [..., G], zero in sum; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: G < 2 (one reward has no spread), G ≤ ddof, or epsilon not positive.
    """
    rewards = _as_groups(rewards)
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; normalizing by the group's std needs group_size >= 2")
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; it must be 0 or 1")
    if not epsilon > 0:
        raise ValueError(f"epsilon of group_normalized is {epsilon}; it must be > 0")
    centered = group_centered(rewards)
    variance = jnp.sum(centered**2, axis=-1, keepdims=True) / (group_size - ddof)
    # sqrt has an infinite slope at 0: keep it away from there, the equal group is 0 through `centered` anyway.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return centered / (std + epsilon)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """A_i = R_i − mean of the other members' rewards = G/(G−1)·(R_i − mean(R)) (RLOO, arXiv 2402.14740).

    Args:
      rewards: [..., G].

    Returns:
      [..., G]; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: G < 2, where there are no others.
    """
    rewards = _as_groups(rewards)
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; leave_one_out needs group_size >= 2")
    return group_centered(rewards) * (group_size / (group_size - 1))


def _as_groups(rewards: jax.Array) -> jax.Array:
    rewards = jnp.asarray(rewards)
    if rewards.ndim < 1:
        raise ValueError("rewards is a scalar; it must be [..., G], one reward per member of a group")
    return rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))


def _all_equal(rewards: jax.Array) -> jax.Array:
    return jnp.all(rewards == rewards[..., :1], axis=-1, keepdims=True)
