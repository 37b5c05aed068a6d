"""Training over eight simulated devices is training on one: parameters, ring, records; a checkpoint goes from one to the other.

The devices are simulated in a process of their own, since their number is fixed when JAX starts. In float64: a completion is
drawn by comparing numbers, and where rounding decides one, runs part.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_async_grpo import records, training
from jax_async_grpo.checkpoint import Checkpoints
from tests import tiny_training

NUM_DEVICES, NUM_UPDATES, SAVED_AT = 8, 20, 10
MESHES = {"data": (8, 1), "fsdp": (2, 4)}  # data, fsdp
RTOL, ATOL = 1e-5, 1e-12
ROOT = Path(__file__).resolve().parent.parent


def config_of(data: int, fsdp: int) -> dict:
    """A small decoder; where parameters are split, the ring lies in host memory. The bias, dear to compile, is left out."""
    config = tiny_training.get_config()
    config.num_updates, config.num_heldout = NUM_UPDATES, 6  # what eight devices do not divide
    config.warm_start.num_prompts = 16
    config.evaluation.every = config.checkpoint.every = config.bias.every = SAVED_AT
    config.checkpoint.keep_last, config.checkpoint.keep_best = 3, 0
    config.policy = "jax_async_grpo.policies.decoder"
    config.policy_options = dict(num_layers=1, width=16, num_heads=2, dtype="float64")
    config.bias.every = 0
    if fsdp > 1:
        config.ring.memory_kind = "pinned_host"
    config.mesh.data, config.mesh.fsdp = data, fsdp
    return config.to_dict()


def trained(folder: Path, config: dict) -> training.Trainer:
    """A run to its end, from whatever checkpoint the folder holds."""
    workdir = records.Workdir(folder, resumed=True) if folder.exists() else records.open_workdir(folder, config)
    with Checkpoints(folder / "checkpoints", keep_last=3, keep_best=0) as checkpoints:
        trainer = training.Trainer(training.build(config), workdir, checkpoints)
        assert trainer.run()
    return trainer


def arrays_of(trainer: training.Trainer) -> dict[str, np.ndarray]:
    """Parameters, optimizer state and ring by their paths."""
    flat = jax.tree_util.tree_flatten_with_path(trainer.state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def placed(trainer: training.Trainer) -> list[tuple]:
    """(path, shape, shape on a device, kind of memory) of every parameter, moment and version."""
    flat = jax.tree_util.tree_flatten_with_path(trainer.state.train)[0]
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.addressable_shards[0].data.shape, leaf.sharding.memory_kind)
        for path, leaf in flat
    ]


def on_all_devices(folder: str) -> None:
    """Runs both meshes in this process; what they came to goes to files of the folder."""
    for name, (data, fsdp) in MESHES.items():
        trainer = trained(Path(folder) / name, config_of(data, fsdp))
        np.savez(Path(folder) / f"{name}.npz", **arrays_of(trainer))
        (Path(folder) / f"{name}.json").write_text(json.dumps({"placed": placed(trainer), "devices": jax.device_count()}))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, trainer) of the run on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, trained(folder, config_of(1, 1))


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Folder of the runs on eight devices."""
    folder = tmp_path_factory.mktemp("spread")
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={NUM_DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    run = [sys.executable, "-c", f"from tests import test_training_sharded as t; t.on_all_devices({str(folder)!r})"]
    result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return folder


def rows_of(folder: Path) -> list[dict]:
    return records.read_jsonl(folder / "metrics.jsonl")


def assert_alike(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=RTOL, atol=ATOL, err_msg=name)


def assert_rows_alike(rows: list[dict], others: list[dict]) -> None:
    """The same kinds, names and words, numbers within the tolerance; a bias may be the root of mere rounding."""
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            tolerance = dict(rtol=RTOL, atol=1e-7 if name.startswith(("bias/", "logprob_mismatch/")) else 1e-10)
            if isinstance(value, float):
                np.testing.assert_allclose(other[name], value, **tolerance, err_msg=f"{row['kind']} {row.get('step')} {name}")
            else:
                assert other[name] == value, (row["kind"], row.get("step"), name)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_train_as_one_does(alone, spread, name):
    folder, trainer = alone
    assert_alike(arrays_of(trainer), dict(np.load(spread / f"{name}.npz")))
    rows = rows_of(folder)
    assert_rows_alike(rows, rows_of(spread / name))
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == NUM_UPDATES and updates[-1]["drift/cumulative"] > 0.1  # what did not learn would agree as well


@pytest.mark.parametrize("name", MESHES)
def test_arrays_lie_where_the_mesh_says(spread, name):
    """Every leaf with an axis that fsdp divides has a quarter of it on a device; each version of the ring as θ, on the host."""
    found = json.loads((spread / f"{name}.json").read_text())
    assert found["devices"] == NUM_DEVICES
    shards = MESHES[name][1]
    split = 0
    for path, shape, local, kind in found["placed"]:
        in_ring = ".history.params" in path
        can_split = shards > 1 and any(size % shards == 0 for size in shape[1 if in_ring else 0 :])
        assert np.prod(local) == np.prod(shape) // (shards if can_split else 1), (path, shape, local)
        assert not in_ring or local[0] == shape[0] == 3, (path, local)
        assert (kind == "pinned_host") == (in_ring and name == "fsdp"), (path, kind)
        split += can_split
    assert split >= (20 if shards > 1 else 0)


def test_a_checkpoint_goes_on_over_another_number_of_devices(alone, spread, tmp_path):
    """Saved by eight half way, parameters split and the ring on the host; the rest done by one: the run of one."""
    shutil.copytree(spread / "fsdp", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{NUM_UPDATES:08d}")
    config = config_of(1, 1)
    config["bias"]["every"] = 0
    trainer = trained(tmp_path / "run", config)
    assert_alike(arrays_of(alone[1]), arrays_of(trainer))
    rows, before = rows_of(tmp_path / "run"), rows_of(spread / "fsdp")
    assert_rows_alike([row for row in rows_of(alone[0]) if row["kind"] != "bias"], rows)
    saved = [row for row in before if row.get("step", 0) < SAVED_AT]
    assert rows[: len(saved)] == saved and rows[len(saved) :] != before[len(saved) :]  # the rest was done here, not copied
    assert trainer.state.train.step.devices() == {jax.devices()[0]}
