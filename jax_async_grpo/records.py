"""Plain records of a run: config.json, metrics.jsonl, summary.json and figures, whole on disk at every moment.

*Whole files* are written to a temporary neighbor, synced and renamed over the old one, so that a reader sees the old file or
the new one. *metrics.jsonl* grows by appending: rows that are there are never written again and so cannot be lost, a write
that fails is taken back, and the torn last line that a power cut can leave is skipped by the reader, with a warning, and
removed by the next append. `truncate_jsonl` cuts it back to a checkpoint.

The JSON is strict: no NaN token. Floats that are not finite become the strings "NaN", "Infinity" and "-Infinity", as in the
JSON mapping of protocol buffers, because null would not tell an infinite limit from a failed measurement; the readers here turn
them back into floats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib.metadata
import json
import math
import os
import platform
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_async_grpo import __version__
from jax_async_grpo.config_checks import job_of

__all__ = [
    "Workdir",
    "append_jsonl",
    "atomic_path",
    "compress_jsonl",
    "open_workdir",
    "read_json",
    "read_jsonl",
    "to_plain",
    "truncate_jsonl",
    "versions",
    "write_json",
    "write_text",
]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ABSENT = "absent"


def to_plain(value: Any, name: str = "record") -> Any:
    """A copy of `value` in dicts, lists, strings, ints, finite floats, bools and None.

    NumPy and JAX arrays and scalars become (nested lists of) numbers, tuples lists, paths strings, functions their dotted name,
    and floats that are not finite strings (see the module). Dict keys must be strings or ints.

    Raises:
      ValueError: something else is in there; the message names the place, e.g. `record.fits[3].policy`.
    """
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        value = _array_to_plain(value)
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_key(key, name): to_plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):  # <lambda> and <locals> cannot be found again
        return f"{value.__module__}.{value.__qualname__}"
    shown = " ".join(repr(value).split())[:60]
    raise ValueError(f"{name} is {shown} ({type(value).__name__}); a record holds numbers, strings, lists and dicts")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` when the block ends well.

    The file is synced and renamed in one step. When the block raises, the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces `path` by `text` in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Replaces `path` by `obj` as strict, indented JSON, atomically; `to_plain` says what may be in it."""
    write_text(path, json.dumps(to_plain(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What `write_json` wrote, the strings of non-finite floats as floats again."""
    return _restored(json.loads(Path(path).read_text(encoding="utf-8")))


def append_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one strict JSON object a line, all of them or none, synced to disk; creates the file.

    A torn last line, left by a crash in the middle of a write, is removed first, with a warning.

    Raises:
      ValueError: a row is not a mapping or holds what `to_plain` refuses; nothing is written then.
      OSError: the disk is full or the file not writable; the file is as it was.
    """
    lines = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"rows[{index}] is a {type(row).__name__}; a row is a dict")
        lines.append(json.dumps(to_plain(row, f"rows[{index}]"), allow_nan=False, ensure_ascii=False) + "\n")
    if not lines:
        return
    with open(path, "ab+", buffering=0) as file:
        size, tail = _end_of_rows(file)
        data = "".join(lines).encode()
        if tail and _is_json(tail):  # a whole row, only its line end is missing
            size, data = size + len(tail), b"\n" + data
        elif tail:
            warnings.warn(f"{path}: the last line is cut off ({len(tail)} bytes) and was removed", stacklevel=2)
            file.truncate(size)
        try:
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
        except BaseException:
            if file.seek(0, os.SEEK_END) < size + len(data):  # an interrupt after the last byte loses nothing
                file.truncate(size)
            raise


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `path` in order, non-finite floats restored; [] if there is no file.

    Rows that were put away in `path` + ".gz" (`compress_jsonl`) come first. A last line that a crash cut off is skipped with a
    warning.

    Raises:
      ValueError: a line before the last is not JSON, or the compressed file is no gzip file: it was damaged by something else.
    """
    packed = Path(f"{path}.gz")
    try:
        before = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{packed} is no whole gzip file ({error})") from None
    if not os.path.exists(path) and not packed.exists():
        return []
    *lines, tail = (before + (Path(path).read_bytes() if os.path.exists(path) else b"")).split(b"\n")
    if tail and _is_json(tail):
        lines.append(tail)
    elif tail:
        warnings.warn(f"{path}: the last line is cut off ({len(tail)} bytes) and was skipped", stacklevel=2)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_restored(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error})") from None
    return rows


def compress_jsonl(path: str | os.PathLike) -> Path:
    """Puts the rows of a finished run away in `path` + ".gz", a fifth of the size, and removes `path`; returns the new file.

    Rows that are compressed already stay in front. `read_jsonl` reads both, `append_jsonl` begins a new file.

    Raises:
      ValueError: as `read_jsonl`.
    """
    rows = read_jsonl(path)
    packed = Path(f"{path}.gz")
    text = "".join(json.dumps(to_plain(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    with atomic_path(packed) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same rows, the same bytes
    Path(path).unlink(missing_ok=True)
    return packed


def truncate_jsonl(path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Cuts `path` before the first row that `keep` refuses, and returns how many rows went; 0 if there is no file.

    For a run that goes on from a checkpoint: rows written after it was taken come again. The file is shortened in one step, the
    rows that stay are not touched. A torn last line goes too, with a warning, and does not count.

    Args:
      path: what `append_jsonl` wrote.
      keep: is called with one row after the other, as `read_jsonl` returns them, until it returns False.

    Raises:
      ValueError: a line before the cut is not JSON; the file is as it was.
    """
    if not os.path.exists(path):
        return 0
    with open(path, "rb+", buffering=0) as file:
        lines = file.readall().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n") and not _is_json(lines[-1]):
            warnings.warn(f"{path}: the last line is cut off ({len(lines.pop())} bytes) and was removed", stacklevel=2)
        kept = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = _restored(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error})") from None
            if not keep(row):
                break
            kept = number
        file.truncate(sum(map(len, lines[:kept])))
        os.fsync(file.fileno())
    return len(lines) - kept


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of one run, opened by `open_workdir`.

    Attributes:
      path: the folder; a figure goes to `workdir.path / "bias.png"`.
      resumed: True if it held the same config already; `read_metrics` then returns the earlier rows.
    """

    path: Path
    resumed: bool

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to metrics.jsonl."""
        self.append_rows("metrics.jsonl", rows)

    def append_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to a JSONL file of the folder."""
        append_jsonl(self.path / name, rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl so far."""
        return self.read_rows("metrics.jsonl")

    def read_rows(self, name: str, *, otherwise: str = "pass --overwrite or another --workdir") -> list[dict[str, Any]]:
        """The rows of a JSONL file of the folder so far; ValueError on a line that is no record: delete it, or `otherwise`."""
        try:
            rows = read_jsonl(self.path / name)
        except ValueError as error:
            raise ValueError(f"{error}; delete the line, or {otherwise}") from None
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError(f"{self.path / name}: line {number} is no record of a job; delete it, or {otherwise}")
        return rows

    def truncate_rows(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Cuts a JSONL file of the folder before the first row that `keep` refuses; returns how many rows went."""
        return truncate_jsonl(self.path / name, keep)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces summary.json."""
        write_json(self.path / "summary.json", summary)


def open_workdir(
    path: str | os.PathLike, config: Mapping[str, Any], *, overwrite: bool = False, figures: Sequence[str] = ()
) -> Workdir:
    """Creates or reopens the folder of a run and writes its config.json.

    The same config again resumes: metrics.jsonl stays. Another config is refused unless `overwrite`, which removes the files
    of the job (metrics.jsonl, summary.json, report.html and `figures`) and no others, whatever else lies in the folder.

    Args:
      path: the folder; parents are created.
      config: what `to_plain` accepts; compared as JSON, so tuples equal lists.
      overwrite: start afresh in a folder that holds a run, of this or another config.
      figures: names of what else the job writes there, e.g. ("bias.png",); an `.jsonl` among them holds records.

    Returns:
      A `Workdir`.

    Raises:
      ValueError: `path` is or lies under a file, cannot be created or written, or holds another or an unreadable run.
    """
    path = Path(path)
    text = json.dumps(to_plain(config, "config"), allow_nan=False)
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"workdir={path} is a file; give a folder")
        path.mkdir(parents=True, exist_ok=True)
        resumed = not overwrite and _holds_same_run(path, json.loads(text), figures)
        if overwrite:
            for name in ("metrics.jsonl", "metrics.jsonl.gz", "summary.json", "report.html", *figures):
                (path / name).unlink(missing_ok=True)
        write_json(path / "config.json", config)  # on resuming too: it proves that the folder can be written
    except OSError as error:
        raise ValueError(f"workdir={path} cannot be created or written: {error.strerror}; give another --workdir") from None
    return Workdir(path=path, resumed=resumed)


def versions() -> dict[str, Any]:
    """What the numbers depend on: versions of python, the libraries and this package; platform, device kind and count."""
    names = ("jax", "jaxlib", "optax", "flax", "chex", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "jax_async_grpo": __version__,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _array_to_plain(value: Any) -> Any:
    """Numbers, strings or nested lists; what has no such form (PRNG keys, complex numbers, objects) comes back as it is."""
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    array = np.asarray(value)
    if jax.dtypes.issubdtype(array.dtype, np.floating) and array.dtype.kind == "V":  # bfloat16, float8
        array = array.astype(np.float64)
    return array.tolist() if array.dtype.kind in "biufU" else value


def _key(key: Any, name: str) -> str:
    if isinstance(key, (str, int)):
        return str(key)
    raise ValueError(f"{name} has the key {key!r} of type {type(key).__name__}; a record's keys are strings or ints")


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _end_of_rows(file) -> tuple[int, bytes]:
    """Bytes of the file up to its last line end, and what lies behind; reads from the end, since the file may be long."""
    position, tail = file.seek(0, os.SEEK_END), b""
    while position > 0 and b"\n" not in tail:
        start = max(0, position - 65536)
        file.seek(start)
        tail = file.read(position - start) + tail
        position = start
    before = tail.rfind(b"\n") + 1
    return position + before, tail[before:]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _write_all(descriptor: int, data: bytes) -> None:
    while data:  # a full disk may take a part of it before it raises
        data = data[os.write(descriptor, data) :]


def _holds_same_run(path: Path, config: dict[str, Any], files: Sequence[str]) -> bool:
    """True if the folder holds this config, False if it holds no run; another run raises."""
    advice = "pass --overwrite or another --workdir"
    if not (path / "config.json").exists():
        records = ["metrics.jsonl", *(name for name in files if name.endswith(".jsonl"))]
        orphan = next((name for name in records if (path / name).exists()), None)
        if orphan is not None:
            raise ValueError(f"workdir={path} holds a {orphan} without config.json; {advice}")
        return False
    try:
        existing = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"workdir={path} holds a config.json that is not JSON; {advice}") from None
    job = job_of(existing)
    if job and job_of(config) not in (job, None):
        raise ValueError(f"workdir={path} holds a run of launch.{job}; give another --workdir")
    there, here = _flat(existing), _flat(config)
    keys = [key for key in [*here, *(there.keys() - here.keys())] if there.get(key, _ABSENT) != here.get(key, _ABSENT)]
    if not keys:
        return True
    named = ", ".join(f"{key} is {there.get(key, _ABSENT):.60} there and {here.get(key, _ABSENT):.60} here" for key in keys[:3])
    more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
    raise ValueError(f"workdir={path} holds another config: {named}{more}; {advice}")


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys to JSON text, e.g. optimizer.learning_rate -> 0.1; lists are values, empty dicts too."""
    if not isinstance(config, dict) or (prefix and not config):
        return {prefix or "config": json.dumps(config, sort_keys=True)}
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
