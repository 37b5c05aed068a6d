"""Checkpoints of any state: arrays through Orbax, plain host data and the mark of wholeness in one JSON file beside them.

A checkpoint is the folder `step_00000010` with `arrays/` (an Orbax checkpoint, one entry a leaf, named by its path in the tree)
and `checkpoint.json` (step, score, host data, the leaves' shapes and dtypes, and by what `checkpoint_files` knows it whole).
It is written under a temporary name and renamed when all of it is on disk, so that a process killed while saving leaves the
older checkpoints and some litter, which the next start removes.

One process at a time: hold `workdir_lock` around it. Runs of several processes (`jax.process_count() > 1`) are refused.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.checkpoint_files import DamagedError, check_files, read_manifest, sync_folder, write_manifest

try:
    from orbax.checkpoint import v1 as ocp  # where the API is going
except ImportError:
    import orbax.checkpoint.experimental.v1 as ocp

__all__ = ["Checkpoints", "Restored"]

_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".unfinished_"
_ARRAYS = "arrays"


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns.

    Attributes:
      step: the step it was saved under.
      arrays: the tree of jax arrays, as saved to the bit, placed like the template.
      host: the dict of plain data, as saved.
    """

    step: int
    arrays: Any
    host: dict[str, Any]


class Checkpoints:
    """Saves states to a folder in the background, keeps some of them, and restores the newest whole one.

    Use it as a context manager; its end waits for the last save. While it is open, Orbax's log is quiet below WARNING.

        with Checkpoints(workdir / "checkpoints") as checkpoints:
            restored = checkpoints.restore(state)
            ...
            checkpoints.save(step, state, {"position": position}, score=reward)

    Args:
      folder: is created; other things in it are left alone, litter of interrupted saves is removed.
      keep_last: how many of the newest checkpoints are kept, ≥ 1.
      keep_best: how many of those with the highest score are kept besides, ≥ 0; of equal scores the earlier, never a NaN.

    Raises:
      ValueError: a number out of range, more than one process, or a folder that cannot be created.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_last: int = 3, keep_best: int = 1):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last}, keep_best={keep_best}; at least 1 of the last and 0 of the best are kept")
        if jax.process_count() > 1:
            raise ValueError(f"Checkpoints saves from one process, not from {jax.process_count()}")
        self.folder = Path(os.path.abspath(folder))
        self._keep_last, self._keep_best = keep_last, keep_best
        self._damaged: set[int] = set()  # found by checksum; the cheap check of `steps` would let them pass
        self._pending: concurrent.futures.Future[None] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for litter in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(litter)
        except OSError as error:
            raise ValueError(f"folder={self.folder} cannot hold checkpoints: {error.strerror}; give another") from None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        logging.getLogger("absl").addFilter(_no_chatter)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            warnings.warn(str(error), stacklevel=2)  # the block's own exception goes on
        finally:
            self._thread.shutdown()
            logging.getLogger("absl").removeFilter(_no_chatter)

    def save(self, step: int, arrays: Any, host: dict[str, Any], *, score: float | None = None) -> None:
        """Saves a state; returns when it is off the devices, and goes on writing in the background.

        The caller may donate the arrays at once. A save still being written is awaited first.

        Args:
          step: ≥ 0 and above every whole checkpoint of the folder.
          arrays: any pytree of jax arrays, of any sharding, memory kind and numeric or bool dtype; no PRNG keys.
          host: dicts with string keys, lists, strings, ints, bools, None and floats (NaN and ±inf too); comes back equal.
          score: the higher the better, for `keep_best`; None and NaN never count.

        Raises:
          ValueError: an argument is none of these; nothing is written.
          OSError: this or the previous save failed (disk full, ...). Older checkpoints are whole, what was written is removed.
        """
        self.wait()
        leaves = _named_leaves(arrays)
        for name, leaf in leaves.items():
            _check_leaf(name, leaf)
        if not any(leaf.size for leaf in leaves.values()):
            raise ValueError("arrays holds no numbers; there is nothing to save")
        if not isinstance(host, dict):
            raise ValueError(f"host is a {type(host).__name__}; give a dict")
        _check_plain(host, "host")
        newest = max(self.steps(), default=-1)
        if isinstance(step, bool) or not isinstance(step, int) or step <= newest:
            after = f"; {newest} is saved already" if newest >= 0 else ""
            raise ValueError(f"step={step!r} of a checkpoint is an int that grows{after} in {self.folder}")
        score = None if score is None or math.isnan(score) else float(score)
        content = {
            "step": step,
            "score": score,
            "host": host,
            "leaves": {name: _described(leaf) for name, leaf in leaves.items()},
        }
        manifest = json.dumps(content)  # now: the caller may change host while the arrays are written
        temporary = self.folder / f"{_TEMPORARY}{_name(step)}"
        with self._failing_whole(step, temporary):
            self._set_aside(step)
            shutil.rmtree(temporary, ignore_errors=True)  # what a failed save could not remove
            temporary.mkdir()
            with _orbax_context():  # Orbax takes no arrays without entries
                writing = ocp.save_async(temporary / _ARRAYS, {name: leaf for name, leaf in leaves.items() if leaf.size})
        self._pending = self._thread.submit(self._finish, step, temporary, manifest, writing)

    def wait(self) -> None:
        """Returns when nothing is being written; OSError, once, if the last save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, template_arrays: Any, step: int | None = None) -> Restored | None:
        """The newest whole checkpoint, or that of `step`; None if there is none.

        Damaged ones are skipped with a warning each, and stay where they are.

        Args:
          template_arrays: the same tree with the same shapes and dtypes, as arrays or `jax.ShapeDtypeStruct`; their shardings
            (any devices, any memory kind) are those of the result. Leaves not committed to a device come back uncommitted.
          step: a step of `steps()`.

        Raises:
          ValueError: the template does not fit the checkpoint, or there is no whole checkpoint of that step.
        """
        self.wait()
        template = _named_leaves(template_arrays)
        found = sorted(self._step_folders(), reverse=True)
        if step is not None and step not in found:
            raise ValueError(f"step={step} has no checkpoint in {self.folder}; there are {found[::-1]}")
        for candidate in found if step is None else [step]:
            path = self.folder / _name(candidate)
            try:
                content = read_manifest(path)
                check_files(path, content["files"], checksums=True)
            except DamagedError as error:
                self._damaged.add(candidate)
                if step is not None:
                    raise ValueError(f"{path} is damaged: {error}; take another step") from None
                warnings.warn(f"{path} is damaged and was skipped: {error}", stacklevel=2)
                continue
            _check_fit(path, content["leaves"], template)
            loaded = _load(path / _ARRAYS, content["leaves"], template)
            arrays = jax.tree.unflatten(jax.tree.structure(template_arrays), [loaded[name] for name in template])
            return Restored(candidate, arrays, content["host"])
        return None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending, by the sizes of their files; `restore` also looks at the checksums."""
        return sorted(self._scores())

    def best_step(self) -> int | None:
        """The step with the highest score, the earlier of equals; None if no whole checkpoint has a score."""
        return next(iter(self._best()), None)

    def _best(self) -> list[int]:
        scored = {step: score for step, score in self._scores().items() if score is not None}
        return sorted(scored, key=lambda step: (-scored[step], step))

    def _scores(self) -> dict[int, float | None]:
        scores = {}
        for step in self._step_folders() - self._damaged:
            path = self.folder / _name(step)
            with contextlib.suppress(DamagedError):
                content = read_manifest(path)
                check_files(path, content["files"], checksums=False)
                scores[step] = content["score"]
        return scores

    def _step_folders(self) -> set[int]:
        return {int(match[1]) for entry in self.folder.iterdir() if (match := _STEP.fullmatch(entry.name))}

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint that stands where one is to be written."""
        path = self.folder / _name(step)
        if not path.exists():
            return
        names = (path.with_name(f"damaged_{path.name}_{number}") for number in range(1, 1000))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        self._damaged.discard(step)
        warnings.warn(f"{path} is damaged and in the way of a new one; it is {aside.name} now", stacklevel=3)

    def _finish(self, step: int, temporary: Path, manifest: str, writing: Any) -> None:
        """In the background: waits for the arrays, writes the manifest, gives the checkpoint its name, deletes old ones."""
        with self._failing_whole(step, temporary):
            writing.result()
            write_manifest(temporary, json.loads(manifest))
            os.rename(temporary, self.folder / _name(step))
            sync_folder(self.folder)
        kept = {*self.steps()[-self._keep_last :], *self._best()[: self._keep_best]}
        for old in set(self.steps()) - kept:
            doomed = self.folder / f"{_TEMPORARY}{_name(old)}"  # litter if killed here, not a torn checkpoint
            os.rename(self.folder / _name(old), doomed)
            shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _failing_whole(self, step: int, temporary: Path) -> Iterator[None]:
        """Turns whatever ends a save into one line, and frees the space that it took."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = " ".join(str(error).split())[:300]
            raise OSError(f"checkpoint of step {step} in {self.folder} failed, older ones are untouched: {reason}") from error


def _no_chatter(record: logging.LogRecord) -> bool:
    """Drops Orbax's progress, and the tracebacks of errors that `save` and `wait` raise."""
    inside = f"{os.sep}orbax{os.sep}" in record.pathname
    return not inside or (record.levelno >= logging.WARNING and not record.exc_info)


@contextlib.contextmanager
def _orbax_context() -> Iterator[None]:
    context = ocp.Context()
    context.array.saving.use_replica_parallel = False  # one process writes all; every slice of a replica would be compiled
    context.array.saving.use_compression = False  # floats shrink by 8 % and take 8 times as long
    context.asynchronous.create_directories_asynchronously = False  # a folder that cannot be made fails now
    with context:
        yield


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} in the order of the tree, the paths as Python would write them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {"arrays" + jax.tree_util.keystr(path): leaf for path, leaf in flat}
    if len(leaves) < len(flat):
        raise ValueError("arrays has two leaves of the same path; give the nodes of the tree distinct keys")
    return leaves


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array):
        raise ValueError(f"{name} is a {type(leaf).__name__}; arrays holds jax arrays, host holds numbers and text")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name} is a PRNG key; fold keys from the config's seed, or save jax.random.key_data of it")
    if leaf.is_deleted():
        raise ValueError(f"{name} was deleted or donated before the save")


def _check_plain(value: Any, name: str) -> None:
    """ValueError unless JSON gives back an equal value."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}; keys of host are strings")
            _check_plain(item, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{name} is a {type(value).__name__}; host is a dict of lists, strings, ints, floats, bools and None")


def _described(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "weak_type": bool(getattr(leaf, "weak_type", False))}


def _check_fit(path: Path, saved: dict[str, Any], template: dict[str, Any]) -> None:
    """ValueError that names the first leaf in which the template differs from what was saved."""
    advice = "restore with the config that saved it, or take another workdir"
    for name in [*template, *saved]:
        if name not in saved or name not in template:
            where = (
                "in the template and not in the checkpoint" if name in template else "in the checkpoint and not in the template"
            )
            raise ValueError(f"{path} does not fit the template: {name} is {where}; {advice}")
        there, here = (f"{side['dtype']}{side['shape']}" for side in (saved[name], _described(template[name])))
        if there != here:
            raise ValueError(f"{path} does not fit the template: {name} is {there} in the checkpoint and {here} here; {advice}")


def _load(path: Path, saved: dict[str, Any], template: dict[str, Any]) -> dict[str, jax.Array]:
    shardings = {name: leaf.sharding if getattr(leaf, "committed", True) else None for name, leaf in template.items()}
    wanted = {
        name: np.empty(leaf.shape, leaf.dtype)  # Orbax commits jax arrays to devices: these come as NumPy arrays
        if shardings[name] is None
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in template.items()
        if math.prod(leaf.shape)
    }
    with _orbax_context():
        loaded = ocp.load(path, wanted)
    empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in template.items() if name not in wanted}
    return {name: _placed((loaded | empty)[name], shardings[name], saved[name]["weak_type"]) for name in template}


def _placed(value: Any, sharding: jax.sharding.Sharding | None, weak_type: bool) -> jax.Array:
    """The array on its devices; weakly typed if it was, because promotion, and so the bits of the next steps, hang on it."""
    if weak_type:
        zeros = jnp.full(value.shape, np.zeros((), value.dtype).item())
        value = zeros.at[...].set(np.asarray(value)) if zeros.dtype == value.dtype else value
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)
