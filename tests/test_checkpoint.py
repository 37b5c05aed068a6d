"""What is saved comes back to the bit, from the newest whole checkpoint, whatever was killed, damaged or full."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import checkpoint_files
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.workdir_lock import workdir_lock

ROOT = Path(__file__).resolve().parent.parent
HOST = {"position": 17, "ids": [4, 5], "x": 0.1 + 0.2, "y": -math.inf, "text": "NaN", "none": None, "deep": {"flag": True}}


class State(NamedTuple):
    params: dict
    count: jax.Array
    ring: list


def state(seed: int) -> State:
    """A tree with every kind of leaf: dtypes, ranks, host memory, no entries, weak types, a name with a slash."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (4, 2), dtype=np.uint32)
    host_memory = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return State(
        params={
            "a/b": jnp.asarray(bits.view(np.float32)),
            "a": {"b": jnp.asarray(rng.normal(size=3), jnp.bfloat16), "none": None, "void": jnp.zeros((0, 3))},
            "flags": jnp.asarray([True, False, bool(seed % 2)]),
            "keys": jnp.asarray(bits),
            "double": jnp.asarray(rng.normal(size=2)),
        },
        count=jnp.int32(seed),
        ring=[jax.device_put(jnp.asarray(bits.view(np.float32)[::-1]), host_memory), jnp.asarray(seed / 3), ()],
    )


def kinds(tree) -> list:
    return [(x.shape, x.dtype, x.weak_type, x.committed, x.sharding) for x in jax.tree.leaves(tree)]


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def tiny(value: float) -> dict:
    return {"x": jnp.full(3, value, jnp.float32)}


def save_tiny(folder: Path, steps, **options) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, tiny(step), {"step": step})


def data_file(folder: Path) -> Path:
    """The file that holds the numbers."""
    return next(path for path in sorted((folder / "arrays" / "state").rglob("d/*")) if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state(3), HOST)
    return folder


# What comes back.


def test_every_leaf_comes_back_to_the_bit_and_of_its_kind(saved):
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(state(0))
    assert restored.step == 3
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(state(3))
    assert bits(restored.arrays) == bits(state(3)) != bits(state(0))
    assert kinds(restored.arrays) == kinds(state(3))
    assert restored.host == HOST and type(restored.host["position"]) is int


def test_an_abstract_template_places_what_was_uncommitted(saved):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))
    with Checkpoints(saved) as checkpoints:
        arrays = checkpoints.restore(template).arrays
    assert bits(arrays) == bits(state(3))
    assert all(x.committed and x.sharding == device for x in jax.tree.leaves(arrays))


def test_donated_buffers_may_be_overwritten_while_the_save_is_written(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 7, tree), donate_argnums=0)
    big = {"x": jnp.arange(300_000, dtype=jnp.float32), "y": jnp.ones(200_000, jnp.bfloat16)}
    expected, host = bits(big), {"rows": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, big, host)
        host["rows"].append(2)
        for _ in range(5):
            big = overwrite(big)
        restored = checkpoints.restore(big)
    assert bits(restored.arrays) == expected != bits(big)
    assert restored.host == {"rows": [1]}


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore(tiny(0)) is None
        assert checkpoints.steps() == [] and checkpoints.best_step() is None
        with pytest.raises(ValueError, match=r"step=4 has no checkpoint in .*; there are \[\]"):
            checkpoints.restore(tiny(0), step=4)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_async_grpo.checkpoint import Checkpoints

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
place = lambda spec, kind: NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)
template = {
    "w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=place((("data", "fsdp"),), "device")),
    "h": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=place(("fsdp",), "pinned_host")),
    "n": jax.ShapeDtypeStruct((), jnp.int32),
}
with Checkpoints(sys.argv[1]) as checkpoints:
    arrays = checkpoints.restore(template).arrays
    assert [arrays[name].sharding == template[name].sharding for name in "wh"] == [True, True]
    assert not arrays["n"].committed
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + x.dtype.type(1), t), donate_argnums=0)
    checkpoints.save(1, arrays, {})
    step({"w": arrays["w"], "n": arrays["n"]})  # sharded and uncommitted leaves go together
"""


def test_device_counts_may_change_both_ways(tmp_path):
    arrays = {"w": jnp.arange(8.0, dtype=jnp.float32).reshape(4, 2), "h": jnp.arange(8, dtype=jnp.bfloat16), "n": jnp.int32(5)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, arrays, {})
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", SHARDED, tmp_path], check=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(arrays)
    assert restored.step == 1 and bits(restored.arrays) == bits(arrays) and kinds(restored.arrays) == kinds(arrays)


# What is kept.


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = [2.0, math.nan, 5.0, None, 5.0, -math.inf, math.nan]
    kept = {}
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, score in enumerate(scores):
            checkpoints.save(step, tiny(step), {}, score=score)
            checkpoints.wait()
            kept[step] = (checkpoints.steps(), checkpoints.best_step())
        assert checkpoints.restore(tiny(0), step=2).arrays["x"][0] == 2
    assert kept == {
        0: ([0], 0),
        1: ([0, 1], 0),
        2: ([1, 2], 2),
        3: ([2, 3], 2),
        4: ([2, 3, 4], 2),
        5: ([2, 4, 5], 2),
        6: ([2, 5, 6], 2),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000005", "step_00000006"]


def test_without_best_only_the_last_stay(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        for step, score in [(0, 9.0), (10, math.nan)]:
            checkpoints.save(step, tiny(step), {}, score=score)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [10] and checkpoints.best_step() is None


# Damage.


def truncate(folder: Path) -> None:
    os.truncate(data_file(folder), data_file(folder).stat().st_size // 2)


def flip(folder: Path) -> None:
    content = bytearray(data_file(folder).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(folder).write_bytes(content)


def change_host(folder: Path) -> None:
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(text.replace('"host": {"step": 2}', '"host": {"step": 3}'))


DAMAGES = {
    "truncated": (truncate, "bytes of"),
    "flipped": (flip, "was changed"),
    "missing": (lambda folder: data_file(folder).unlink(), "No such file"),
    "host": (change_host, "checkpoint.json was changed"),
    "garbage": (lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff{"), "is no manifest"),
    "list": (lambda folder: (folder / "checkpoint.json").write_text("[1]"), "is no manifest"),
    "bare": (lambda folder: (folder / "checkpoint.json").unlink(), "No such file"),
}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_tiny(folder, [1, 2])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_skipped_with_one_line_and_stays(damage, two_saved, tmp_path):
    subprocess.run(["cp", "-r", two_saved, tmp_path / "run"], check=True)
    newest = tmp_path / "run" / "step_00000002"
    act, reason = DAMAGES[damage]
    before = newest.joinpath("checkpoint.json").read_bytes()
    act(newest)
    assert damage != "host" or newest.joinpath("checkpoint.json").read_bytes() != before
    with Checkpoints(tmp_path / "run") as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = checkpoints.restore(tiny(0))
        assert (restored.step, restored.host, float(restored.arrays["x"][0])) == (1, {"step": 1}, 1.0)
        (line,) = [str(warning.message) for warning in caught]
        assert line.startswith(f"{newest} is damaged and was skipped: ") and reason in line and "\n" not in line
        assert checkpoints.steps() == [1]
        with pytest.raises(ValueError, match="step_00000002 is damaged: .*; take another step"):
            checkpoints.restore(tiny(0), step=2)
    assert newest.is_dir()


def test_damaged_checkpoints_do_not_count_and_are_moved_out_of_the_way_aloud(tmp_path):
    save_tiny(tmp_path, [1, 2, 3], keep_last=3)
    flip(tmp_path / "step_00000003")  # sizes agree: only a restore finds it
    truncate(tmp_path / "step_00000002")
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        with pytest.warns(UserWarning, match="damaged and was skipped"):
            assert checkpoints.restore(tiny(0)).step == 1
        with pytest.warns(UserWarning, match=r"step_00000002 is damaged and in the way.*it is damaged_step_00000002_1 now"):
            checkpoints.save(2, tiny(20), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]  # a damaged one among the last two would have cost step 1
        with pytest.warns(UserWarning, match="step_00000003 is damaged and in the way"):
            checkpoints.save(3, tiny(30), {})
        assert checkpoints.restore(tiny(0)).arrays["x"][0] == 30
        assert checkpoints.steps() == [2, 3]
    assert {path.name for path in tmp_path.iterdir()} >= {"damaged_step_00000002_1", "damaged_step_00000003_1"}


def test_all_damaged_is_nothing_to_restore(tmp_path):
    save_tiny(tmp_path, [4])
    truncate(tmp_path / "step_00000004")
    with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="step_00000004 is damaged"):
        assert checkpoints.restore(tiny(0)) is None


# Failing and dying saves.


def test_a_save_that_fails_in_the_background_says_so_once_and_costs_nothing(tmp_path):
    save_tiny(tmp_path, [1])
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what tensorstore writes is refused by the kernel
        try:
            checkpoints.save(2, large, {})
            with pytest.raises(OSError, match=r"checkpoint of step 2 in .* failed, older ones are untouched: .*") as error:
                checkpoints.save(3, tiny(3), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and "File too large" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        assert checkpoints.restore(tiny(0)).step == 1
        checkpoints.save(2, large, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("stage", ["mkdir", "manifest", "rename"])
def test_a_full_disk_at_any_stage_is_one_line(stage, tmp_path, monkeypatch):
    save_tiny(tmp_path, [1])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        places = {"mkdir": (Path, "mkdir"), "manifest": (checkpoint_files.records, "write_text"), "rename": (os, "rename")}
        patch.setattr(*places[stage], full)
        with pytest.raises(OSError, match=r"^checkpoint of step 2 in .* failed, .*No space left on device$"):
            checkpoints.save(2, tiny(2), {})
            checkpoints.wait()
        checkpoints.wait()  # said once
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        assert checkpoints.restore(tiny(0)).step == 1


def test_the_end_of_the_block_says_that_the_last_save_failed_and_hides_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint_files.records, "write_text", full)
    with pytest.raises(OSError, match="checkpoint of step 0"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tiny(0), {})
    with pytest.raises(KeyError, match="mine"), pytest.warns(UserWarning, match="checkpoint of step 0"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(0, tiny(0), {})
            raise KeyError("mine")


def test_litter_of_a_killed_save_is_removed_and_other_files_are_not(tmp_path):
    save_tiny(tmp_path, [1])
    os.rename(tmp_path / "step_00000001", tmp_path / ".unfinished_step_00000001")
    (tmp_path / "notes.txt").write_text("mine")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(tiny(0)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Imports once and forks before jax has started a backend, since an import takes seconds; each child is killed while it saves.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import jax.numpy as jnp
from jax_async_grpo.checkpoint import Checkpoints

random.seed(0)
for run in range(3):
    folder = Path(sys.argv[1]) / str(run)
    child = os.fork()
    if child == 0:
        with Checkpoints(folder, keep_last=2) as checkpoints:
            for step in range(10**6):
                checkpoints.save(step, {"x": jnp.full(50_000, step, jnp.float32)}, {"step": step})
    for sign in ("step_*1", ".unfinished_*"):
        while not list(folder.glob(sign)):
            time.sleep(0.01)
    time.sleep(0.3 * random.random() * run)  # the first is surely killed in the middle of a save
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(sorted(os.listdir(folder)), flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, tmp_path]
    listed = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=100).stdout
    assert ".unfinished_" in listed.splitlines()[0]
    for run in range(3):
        with Checkpoints(tmp_path / str(run)) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("error")  # killed is not damaged
            restored = checkpoints.restore({"x": jnp.zeros(50_000, jnp.float32)})
        assert restored.step >= 1 and restored.host == {"step": restored.step}
        assert (restored.arrays["x"] == restored.step).all()


# Refusals.


@pytest.mark.parametrize(
    "template, line",
    [
        (
            {"x": jax.ShapeDtypeStruct((4,), jnp.float32)},
            r"arrays\['x'\] is float32\[3\] in the .* and float32\[4\] here",
        ),
        (
            {"x": jax.ShapeDtypeStruct((3,), jnp.bfloat16)},
            r"arrays\['x'\] is float32\[3\] in the .* and bfloat16\[3\] here",
        ),
        ({"y": jax.ShapeDtypeStruct((3,), jnp.float32)}, r"arrays\['y'\] is in the template and not in the checkpoint"),
        ({}, r"arrays\['x'\] is in the checkpoint and not in the template"),
        ([jax.ShapeDtypeStruct((3,), jnp.float32)], r"arrays\[0\] is in the template and not"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_leaf(template, line, two_saved):
    with Checkpoints(two_saved) as checkpoints, pytest.raises(ValueError, match=line) as error:
        checkpoints.restore(template)
    assert str(two_saved / "step_00000002") in str(error.value) and "another workdir" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(step=2), "step=2 of a checkpoint is an int that grows; 2 is saved already in "),
        (dict(step=3.0), "step=3.0 of a checkpoint is an int"),
        (dict(step=True), "step=True of a checkpoint is an int"),
        (dict(arrays=lambda: {"k": jax.random.key(0)}), r"arrays\['k'\] is a PRNG key"),
        (dict(arrays=lambda: {"n": np.zeros(2)}), r"arrays\['n'\] is a ndarray; arrays holds jax arrays"),
        (dict(arrays=lambda: {"f": 1.0}), r"arrays\['f'\] is a float"),
        (dict(arrays=lambda: {"e": jnp.zeros(0)}), "arrays holds no numbers"),
        (dict(host={"a": [1, (2,)]}), r"host\.a\[1\] is a tuple"),
        (dict(host={"a": np.int64(1)}), r"host\.a is a int64"),
        (dict(host={3: 1}), "host has the key 3"),
        (dict(host=[1]), "host is a list"),
        (dict(host=None), "host is a NoneType"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(change, line, two_saved):
    with Checkpoints(two_saved) as checkpoints, pytest.raises(ValueError, match=line):
        values = dict(step=9, arrays=lambda: tiny(1), host={}) | change
        checkpoints.save(values["step"], values["arrays"](), values["host"])
    assert sorted(os.listdir(two_saved)) == ["step_00000001", "step_00000002"]


def test_an_array_that_was_donated_before_is_refused(tmp_path):
    gone = tiny(1)
    gone["x"].delete()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"arrays\['x'\] was deleted or donated"):
        checkpoints.save(0, gone, {})


@pytest.mark.parametrize("options", [dict(keep_last=0), dict(keep_best=-1)])
def test_keeping_nothing_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="at least 1 of the last"):
        Checkpoints(tmp_path, **options)


def test_a_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder=.*file/x cannot hold checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "x")


def test_orbax_is_quiet_while_checkpoints_are_open_and_heard_again_afterwards(tmp_path, monkeypatch):
    absl, heard = logging.getLogger("absl"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    absl.addHandler(handler)
    monkeypatch.setattr(absl, "level", logging.INFO)
    orbax = logging.LogRecord("absl", logging.INFO, f"{os.sep}x{os.sep}orbax{os.sep}y.py", 1, "chatter", None, None)
    own = logging.LogRecord("absl", logging.INFO, "/x/launch/train.py", 1, "mine", None, None)
    try:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(0, tiny(0), {})
            checkpoints.restore(tiny(0))
            absl.handle(orbax)
            absl.handle(own)
        assert heard == ["mine"]
        absl.handle(orbax)
        assert heard == ["mine", "chatter"]
    finally:
        absl.removeHandler(handler)


# One process a workdir.

HOLDER = """
import sys, time
from jax_async_grpo.workdir_lock import workdir_lock
with workdir_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        line = rf"workdir=.*run is in use by pid {holder.pid} on {re.escape(os.uname().nodename)}; .*another --workdir$"
        for _ in range(2):  # a refused one does not change whose it is
            with pytest.raises(ValueError, match=line), workdir_lock(tmp_path / "run"):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with workdir_lock(tmp_path / "run"):
        pass


def test_the_same_process_is_refused_too_until_the_block_ends(tmp_path):
    with workdir_lock(tmp_path):
        with pytest.raises(ValueError, match=f"in use by pid {os.getpid()} on "), workdir_lock(tmp_path):
            pass
        with pytest.raises(ValueError, match="in use"), workdir_lock(tmp_path):  # the refused one did not release it
            pass
    with pytest.raises(KeyError), workdir_lock(tmp_path):
        raise KeyError
    with workdir_lock(tmp_path):
        pass


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="workdir=.*cannot be created or written: Not a directory"):
        with workdir_lock(tmp_path / "file" / "x"):
            pass
