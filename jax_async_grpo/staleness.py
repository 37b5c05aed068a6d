"""The last K parameter versions a stale rollout may come from, and the schedules s_t that say which one it does.

Staleness is counted in learner updates everywhere. `ParamHistory` is a ring: push θ_t at step t, then `read` gives
φ_t = θ_{t−s_t}. A schedule is a plain integer array `staleness[T]`, drawn on the host and traced: kinds of schedule exist
nowhere else in the code. S = 0 is synchronous training for all of them.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_async_grpo.types import Params

__all__ = ["ParamHistory", "create_history", "fixed", "nbytes", "periodic", "push", "random", "read", "realised", "rms"]

_MAX_STALENESS = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParamHistory:
    """The last K versions θ_t, θ_{t−1}, ... of the parameters; version v lies in slot v mod K.

    Attributes:
      params: pytree of [K, ...], the stored versions.
      versions: [K] int32, the learner update whose parameters a slot holds; −1 where it is empty.
      step: [] int32, t of the latest push; −1 before the first.
      dtypes: dtype of every leaf of the parameters as `read` returns them (static).
    """

    params: Params
    versions: jax.Array
    step: jax.Array
    dtypes: tuple[np.dtype, ...] = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """K: the maximum staleness it can serve is K − 1."""
        return self.versions.shape[-1]


def create_history(params: Params, capacity: int, *, dtype=None, memory_kind: str | None = None) -> ParamHistory:
    """An empty history with room for `capacity` versions of `params`; nothing is pushed yet.

    Every slot is sharded as the parameters are (the ring axis is never split), so a version costs each device what the
    parameters cost it. With `memory_kind="pinned_host"` the versions lie in host memory in that same sharding: `push` and
    `read` move one version, also inside `jit` and `scan`. `vmap` of `read` needs device memory; use `jax.lax.map` there.

    >>> history = create_history({"w": jnp.zeros(2)}, capacity=3)
    >>> for t in range(5):
    ...     history = push(history, {"w": jnp.full(2, float(t))})
    >>> params, realised_staleness = read(history, 2)
    >>> print(params["w"], realised_staleness)
    [2. 2.] 2

    Args:
      params: pytree of arrays; shapes, dtypes and shardings are taken, values are not.
      capacity: K = S + 1 versions, at least 1.
      dtype: store floating-point leaves in this dtype (bfloat16 halves float32); None = as they are. `read` casts back.
      memory_kind: kind of memory that holds the versions, such as "device" or "pinned_host"; None = where the parameters are.

    Returns:
      ParamHistory with step −1.

    Raises:
      ValueError: capacity < 1, a dtype that is not floating, a memory kind the devices do not have, or one asked for
        inside a transformation.
    """
    capacity = _integer("capacity", capacity, minimum=1)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype of the history is {np.dtype(dtype).name}; it must be a floating-point type, or None")
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(_sharding(x), NamedSharding)), None)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return ParamHistory(
        params=jax.tree.map(lambda leaf: _empty_slots(leaf, capacity, dtype, memory_kind), params),
        versions=jnp.full((capacity,), -1, jnp.int32, device=everywhere),
        step=jnp.full((), -1, jnp.int32, device=everywhere),
        dtypes=tuple(np.dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)),
    )


def push(history: ParamHistory, params: Params) -> ParamHistory:
    """Store θ_t, t = number of pushes before this one; it replaces θ_{t−K}.

    Donate the history (`jax.jit(push, donate_argnums=0)`, or as the carry of a donated `scan`) and it is updated in place.

    Args:
      history: as `create_history` made it.
      params: θ_t, with the structure and shapes of the template.

    Returns:
      The history at step t.

    Raises:
      ValueError: parameters of another structure or shape than the template's.
    """
    _check_template(history, params)
    step = history.step + 1
    slot = step % history.capacity
    return dataclasses.replace(
        history,
        params=jax.tree.map(lambda slots, leaf: _store(slots, leaf, slot), history.params, params),
        versions=jax.lax.dynamic_update_index_in_dim(history.versions, step, slot, 0),
        step=step,
    )


def read(history: ParamHistory, staleness: int | jax.Array) -> tuple[Params, jax.Array]:
    """The behavior parameters φ_t = θ_{t−min(s,t)} at the step t of the latest push (arXiv 2607.01083).

    Args:
      history: with at least one push.
      staleness: s, one integer in 0..K−1, learner updates. A traced one cannot be refused: outside 0..K−1 another version
        comes back, the realised staleness says which, and `invariants.ring_version` reports it.

    Returns:
      (params, realised_staleness): the version, in the template's dtypes and in device memory, and [] int32 = t − its
      version, which is min(s, t) for every s in range.

    Raises:
      ValueError: an s that is not one integer, or a Python or NumPy one outside 0..K−1.
    """
    if isinstance(staleness, jax.Array):
        if staleness.shape or not jnp.issubdtype(staleness.dtype, jnp.integer):
            raise ValueError(f"staleness is {staleness.dtype}{list(staleness.shape)}; it must be one integer")
    else:
        staleness = _integer("staleness", staleness, minimum=0)
        if staleness >= history.capacity:
            raise ValueError(
                f"staleness is {staleness}; a history of capacity {history.capacity} serves 0..{history.capacity - 1}"
            )
    age = jnp.minimum(jnp.asarray(staleness, jnp.int32), history.step)
    slot = (history.step - age) % history.capacity
    slots, treedef = jax.tree.flatten(history.params)
    leaves = [_load(leaf, slot, dtype) for leaf, dtype in zip(slots, history.dtypes, strict=True)]
    version = jax.lax.dynamic_index_in_dim(history.versions, slot, 0, keepdims=False)
    return jax.tree.unflatten(treedef, leaves), history.step - version


def nbytes(history: ParamHistory) -> int:
    """Bytes of all stored versions, over all devices; of `jax.eval_shape`'s result too, before anything is allocated."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(history.params))


def fixed(max_staleness: int, num_updates: int) -> np.ndarray:
    """s_t = S for every t (arXiv 2607.01083): a constant lag.

    Args:
      max_staleness: S ≥ 0, learner updates.
      num_updates: T ≥ 1.

    Returns:
      [T] int32, configured staleness; `realised` gives what it becomes in the first S updates.

    Raises:
      ValueError: an argument that is not an integer in its range.
    """
    max_staleness, num_updates = _schedule_arguments(max_staleness, num_updates)
    return np.full(num_updates, max_staleness, np.int32)


def periodic(max_staleness: int, num_updates: int) -> np.ndarray:
    """s_t = t mod (S+1): weights synchronised every S+1 updates, the paper's cycle (arXiv 2607.01083).

    Arguments, shape and errors as in `fixed`. Over whole cycles the rms is √(S(2S+1)/6).

    >>> print(periodic(2, 7))
    [0 1 2 0 1 2 0]
    """
    max_staleness, num_updates = _schedule_arguments(max_staleness, num_updates)
    return (np.arange(num_updates) % (max_staleness + 1)).astype(np.int32)


def random(seed: int | jax.Array, max_staleness: int, num_updates: int) -> np.ndarray:
    """s_t uniform on 0..S, independent over t (arXiv 2607.01083), drawn on the host with NumPy.

    A longer schedule of the same seed begins with the shorter one. The expected s² is S(2S+1)/6, as for `periodic`.

    Args:
      seed: an integer ≥ 0, or a typed JAX key (it is consumed).
      max_staleness: S ≥ 0, learner updates.
      num_updates: T ≥ 1.

    Returns:
      [T] int32.

    Raises:
      ValueError: an argument that is not an integer in its range.
    """
    max_staleness, num_updates = _schedule_arguments(max_staleness, num_updates)
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    entropy = np.asarray(jax.random.key_data(seed)) if is_key else _integer("seed", seed, minimum=0)
    return np.random.default_rng(entropy).integers(0, max_staleness, size=num_updates, endpoint=True).astype(np.int32)


def realised(staleness: np.ndarray) -> np.ndarray:
    """min(s_t, t): the staleness a run that starts at t = 0 really has, as no version is older than θ_0.

    Args:
      staleness: [T] or [T, B] configured staleness, learner updates.

    Returns:
      int32 of the same shape.

    Raises:
      ValueError: an array that is not a schedule: no axis, empty, not integers, or negative.
    """
    staleness = _schedule(staleness)
    steps = np.arange(staleness.shape[0]).reshape(-1, *(1,) * (staleness.ndim - 1))
    return np.minimum(staleness, steps).astype(np.int32)


def rms(staleness: np.ndarray) -> float:
    """√(mean s_t²), learner updates: what a ballistic drift makes the rms distance ‖θ_t − φ_t‖ proportional to.

    Args:
      staleness: [T] or [T, B], configured or realised.

    Returns:
      float.

    Raises:
      ValueError: as in `realised`.
    """
    return math.sqrt(np.mean(_schedule(staleness).astype(np.float64) ** 2))


def _empty_slots(leaf: jax.Array, capacity: int, dtype, memory_kind: str | None) -> jax.Array:
    """Zeros of [K, ...] in the sharding of one version, the ring axis unsplit."""
    leaf = jnp.asarray(leaf)
    shape = (capacity, *leaf.shape)
    dtype = dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    sharding = _sharding(leaf)
    if sharding is None:
        if memory_kind is not None:
            raise ValueError(f"memory_kind {memory_kind!r} needs concrete parameters; create the history outside jit and vmap")
        return jnp.zeros(shape, dtype)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)
    if memory_kind is None and jax.typeof(leaf).memory_space == jax.memory.Space.Device:
        # Zeros of an uncommitted array stay uncommitted, free to follow what they are computed with.
        return jnp.zeros(shape, dtype, device=sharding if leaf.committed else None)

    sharding = sharding if memory_kind is None else sharding.with_memory_kind(memory_kind)
    # From the host to where they will live: K versions need not fit into the memory they are kept out of.
    zeros = np.broadcast_to(np.zeros((), dtype), shape)
    if isinstance(sharding, NamedSharding):  # perhaps over devices of other processes, where device_put would compare values
        return jax.make_array_from_callback(shape, sharding, lambda index: zeros[index])
    return jax.device_put(zeros, sharding)


def _sharding(leaf: jax.Array) -> Sharding | None:
    """Sharding of a concrete array; None inside a transformation, where the compiler decides."""
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def _store(slots: jax.Array, leaf: jax.Array, slot: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf).astype(slots.dtype)
    space = jax.typeof(slots).memory_space
    if space != jax.typeof(leaf).memory_space:
        leaf = jax.device_put(leaf, space)
    return jax.lax.dynamic_update_index_in_dim(slots, leaf, slot, 0)


def _load(slots: jax.Array, slot: jax.Array, dtype: np.dtype) -> jax.Array:
    leaf = jax.lax.dynamic_index_in_dim(slots, slot, 0, keepdims=False)
    if jax.typeof(slots).memory_space != jax.memory.Space.Device:
        leaf = jax.device_put(leaf, jax.memory.Space.Device)
    return leaf.astype(dtype)


def _check_template(history: ParamHistory, params: Params) -> None:
    given, stored = jax.tree.structure(params), jax.tree.structure(history.params)
    if given != stored:
        raise ValueError(f"params has the structure {given}; the history stores {stored}")
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(history.params), strict=True)
    for (path, leaf), slots in pairs:
        if jnp.shape(leaf) != slots.shape[1:]:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name} has shape {jnp.shape(leaf)}; the history stores {slots.shape[1:]}")


def _schedule_arguments(max_staleness: int, num_updates: int) -> tuple[int, int]:
    max_staleness = _integer("max_staleness", max_staleness, minimum=0)
    if max_staleness > _MAX_STALENESS:
        raise ValueError(f"max_staleness is {max_staleness}; schedules are int32, so it must be at most {_MAX_STALENESS}")
    return max_staleness, _integer("num_updates", num_updates, minimum=1)


def _integer(name: str, value, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, np.bool_)) or number < minimum:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {minimum}")
    return number


def _schedule(staleness: np.ndarray) -> np.ndarray:
    staleness = np.asarray(staleness)
    if not staleness.ndim or not staleness.size or not np.issubdtype(staleness.dtype, np.integer) or (staleness < 0).any():
        raise ValueError(f"staleness must be integers >= 0 of shape [T] or [T, B]; got {staleness.dtype}{staleness.shape}")
    return staleness
