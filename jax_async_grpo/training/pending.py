"""Rollouts generated ahead of the update that consumes them, packed into arrays of one shape for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.types import Rollouts

__all__ = ["FIELDS", "fields_of", "pack", "unpack"]

FIELDS = ("completions", "mask", "behavior_logprobs", "rewards", "policy_version")
"""Of `Rollouts`, what is kept: the task has the prompts."""


def pack(
    pending: Mapping[int, Mapping[str, np.ndarray]], capacity: int, shape: tuple[int, int, int], dtype=np.float32
) -> dict[str, jax.Array]:
    """{field: [K, B, G, ...]} and `batches` [K] int32, −1 where a slot is empty.

    Args:
      pending: {batch: {field: array}}, at most K.
      capacity: K.
      shape: (B, G, L).
      dtype: of log-probs.

    Raises:
      ValueError: more than K batches.
    """
    if len(pending) > capacity:
        raise ValueError(f"pending holds {len(pending)} batches and capacity is {capacity}")
    dtypes = dict(completions=np.int32, mask=bool, behavior_logprobs=dtype, rewards=np.float32, policy_version=np.int32)
    packed = {"batches": np.full(capacity, -1, np.int32)}
    for name in FIELDS:
        of_tokens = name not in ("rewards", "policy_version")
        packed[name] = np.zeros((capacity, *(shape if of_tokens else shape[:2])), dtypes[name])
    for slot, batch in enumerate(sorted(pending)):
        packed["batches"][slot] = batch
        for name in FIELDS:
            packed[name][slot] = pending[batch][name]
    return {name: jnp.asarray(array) for name, array in packed.items()}


def unpack(packed: Mapping[str, jax.Array]) -> dict[int, dict[str, np.ndarray]]:
    """What `pack` was given."""
    host = {name: np.asarray(array) for name, array in packed.items()}
    return {int(b): {name: host[name][slot] for name in FIELDS} for slot, b in enumerate(host["batches"]) if b >= 0}


def fields_of(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """Host copies of the fields that are kept."""
    return {name: np.asarray(getattr(rollouts, name)) for name in FIELDS}
