"""Counts of the other members of a group over the reward levels: what makes the exact oracle cost Y·C instead of Y^G.

The other G−1 members of a group enter an advantage only through how many of them got each of the n distinct rewards, so a
sum over C = (G−1+n−1 choose n−1) *compositions*, weighted by a multinomial, replaces the sum over Y^(G−1) groups.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "advantage_table",
    "check_group_size",
    "check_rewards",
    "composition_probabilities",
    "enumerate_compositions",
    "level_probabilities",
    "num_compositions",
    "reward_level_index",
]


def num_compositions(num_levels: int, group_size: int) -> int:
    """C, the ways G−1 other members can fall on `num_levels` reward levels: (G−1+n−1 choose n−1)."""
    return math.comb(group_size - 1 + num_levels - 1, num_levels - 1)


def check_group_size(group_size) -> None:
    """Raises ValueError unless G is a concrete integer of at least 1."""
    try:
        valid = not isinstance(group_size, bool) and operator.index(group_size) >= 1
    except TypeError:  # a float, a string, a traced number
        valid = False
    if not valid:
        traced = isinstance(group_size, jax.core.Tracer)
        raise ValueError(f"group_size is {'traced' if traced else repr(group_size)}; it must be an integer and >= 1")


def check_rewards(rewards, shape: tuple[int, int]) -> None:
    """Raises ValueError on rewards that are not [B, Y], or, where they are concrete, not all finite."""
    if np.shape(rewards) != shape:
        raise ValueError(f"rewards has shape {np.shape(rewards)}; it must be [B, Y] = {shape}")
    if not isinstance(rewards, jax.core.Tracer) and not np.isfinite(np.asarray(rewards, np.float64)).all():
        raise ValueError("rewards hold NaN or inf; every reward must be finite")


def reward_level_index(rewards, reward_levels, shape: tuple[int, int]):
    """The index of each reward among the distinct rewards, and those.

    Args:
      rewards: [B, Y], concrete unless `reward_levels` is given.
      reward_levels: the distinct rewards, or None to read them off.
      shape: (B, Y).

    Returns:
      index [B, Y] int (n where a traced reward is none of the levels), levels [n] ascending.

    Raises:
      ValueError: wrong shape, NaN or inf, traced without levels, or concrete rewards that are none of the levels.
    """
    check_rewards(rewards, shape)
    traced = isinstance(rewards, jax.core.Tracer)
    if traced and reward_levels is None:
        raise ValueError("rewards is traced; close over concrete rewards or pass reward_levels, the distinct rewards")
    if reward_levels is None:
        levels, index = np.unique(np.asarray(rewards), return_inverse=True)
        return index.reshape(shape), levels
    levels = np.unique(np.asarray(reward_levels))
    if not levels.size or not np.isfinite(levels).all():
        raise ValueError(f"reward_levels is {levels.tolist()}; it must hold the distinct rewards, all finite")
    if not traced and not np.isin(np.asarray(rewards), levels).all():
        raise ValueError(f"rewards hold values that are not among reward_levels = {levels.tolist()}")
    match = jnp.asarray(rewards)[..., None] == levels
    return jnp.where(jnp.any(match, axis=-1), jnp.argmax(match, axis=-1), len(levels)), levels


def enumerate_compositions(num_levels: int, group_size: int, max_compositions: int) -> np.ndarray:
    """[C, n]: every way to put G−1 members on n levels, each row summing to G−1.

    Raises:
      ValueError: a group_size that is no integer of at least 1, or C above `max_compositions`.
    """
    check_group_size(group_size)
    total = num_compositions(num_levels, group_size)
    if total > max_compositions:
        raise ValueError(
            f"{num_levels} reward levels and group_size {group_size} give {total} compositions, above max_compositions = "
            f"{max_compositions}; lower group_size or the number of distinct rewards, or raise max_compositions"
        )
    bars = itertools.combinations(range(group_size - 1 + num_levels - 1), num_levels - 1)
    edges = np.array([(-1, *bar, group_size - 1 + num_levels - 1) for bar in bars], dtype=np.int64)
    return np.diff(edges, axis=1) - 1


def advantage_table(advantage_fn: Callable, levels: np.ndarray, compositions: np.ndarray) -> jax.Array:
    """[n + 1, C]: the advantage of an own reward at each level, whatever the others got; the last row is NaN.

    A level index of n, which no level has, reads that last row: an unknown reward spoils the result instead of bending it.
    """
    # integers, which an advantage may turn into float32, and low precision must not cost the oracle digits
    levels = np.asarray(levels, jnp.result_type(float))
    others = np.stack([np.repeat(levels, counts) for counts in compositions])  # [C, G-1]
    own = np.broadcast_to(levels[:, None, None], (len(levels), len(compositions), 1))
    groups = np.concatenate([own, np.broadcast_to(others, (len(levels), *others.shape))], axis=-1)
    with jax.ensure_compile_time_eval():
        advantages = jnp.asarray(advantage_fn(jnp.asarray(groups)))
        if advantages.shape != groups.shape:
            raise ValueError(f"advantage_fn maps rewards of shape {groups.shape} to {advantages.shape}; the shapes must agree")
        return jnp.pad(advantages[..., 0], ((0, 1), (0, 0)), constant_values=jnp.nan)


def level_probabilities(probabilities: jax.Array, level_index, num_levels: int) -> jax.Array:
    """[B, n]: p_k = Σ_y π(y)·1[R(y) = ρ_k] from probabilities[B, Y]; every p_k a sum of its own, no 1 − p.

    That keeps the gradient right when one completion's probability is moved off the simplex.
    """
    member = jax.nn.one_hot(level_index, num_levels, dtype=probabilities.dtype)
    return jnp.einsum("by,byn->bn", probabilities, member)


def composition_probabilities(p: jax.Array, compositions: np.ndarray) -> jax.Array:
    """[B, C]: Multinomial(c; G−1, p[B, n]) as coefficient · Π_k p_k^{c_k} with integer powers, right at p = 0 too.

    Raises:
      ValueError: coefficients beyond the floats of p.
    """
    others = int(compositions[0].sum())
    coefficients = [math.factorial(others) // math.prod(map(math.factorial, map(int, c))) for c in compositions]
    if max(coefficients) > float(jnp.finfo(p.dtype).max):
        raise ValueError(f"group_size is {others + 1}; its multinomial coefficients overflow {p.dtype}, so lower it")
    powers, next_power = jnp.ones_like(p)[..., None], p[..., None]  # [B, n, K]: p^0..p^{K-1}, and p^K
    while powers.shape[-1] <= others:  # doubling K keeps the program of a large group small
        powers = jnp.concatenate([powers, powers * next_power], axis=-1)
        next_power *= next_power
    chosen = powers[:, np.arange(compositions.shape[1]), compositions]  # [B, C, n]
    return jnp.asarray(coefficients, powers.dtype) * jnp.prod(chosen, axis=-1)
