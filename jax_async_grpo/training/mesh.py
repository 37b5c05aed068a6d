"""Where arrays live: parameters split over `fsdp`, batches over `data` × `fsdp`; the compiler writes the communication."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_async_grpo.staleness import ParamHistory

__all__ = ["batch_sharding", "history_shardings", "make_mesh", "replicated", "tree_shardings"]

AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of all devices of all processes, `data` × `fsdp`, axes of type Auto.

    Args:
      data: copies of the parameters; −1 = as many as the devices allow.
      fsdp: shards of the parameters.

    Raises:
      ValueError: sizes that the number of devices does not allow, with sizes that it does.
    """
    count = jax.device_count()
    if fsdp < 1 or (data < 1 and data != -1):
        raise ValueError(f"config.mesh is data={data}, fsdp={fsdp}; fsdp must be >= 1 and data >= 1 or -1 for all that is left")
    size = count // fsdp if data == -1 else data
    if size * fsdp != count:
        raise ValueError(
            f"config.mesh is data={data}, fsdp={fsdp}, which needs {max(size, 1) * fsdp} devices; there are {count}: take "
            f"data=-1 and an fsdp that divides {count}"
        )
    return jax.make_mesh((size, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf, from its shape alone: the largest axis that `fsdp` divides is split, ties go to the first.

    Optimizer states get the sharding of the parameters that they mirror, and scalars are replicated.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: of `make_mesh`.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(np.shape(leaf), mesh.shape["fsdp"])), tree)


def history_shardings(history: ParamHistory, mesh: Mesh, memory_kind: str | None) -> ParamHistory:
    """Those of a ring: every version as the parameters are, the ring axis whole, in that kind of memory (None = devices')."""

    def of_slots(leaf):
        return NamedSharding(mesh, PartitionSpec(None, *_spec(leaf.shape[1:], mesh.shape["fsdp"])), memory_kind=memory_kind)

    return dataclasses.replace(
        history, params=jax.tree.map(of_slots, history.params), versions=replicated(mesh), step=replicated(mesh)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % shards == 0 and size >= shards]
    if shards == 1 or not divisible:
        return PartitionSpec()
    split = max(divisible, key=lambda axis: (shape[axis], -axis))
    return PartitionSpec(*("fsdp" if axis == split else None for axis in range(len(shape))))
