"""Whether a folder of files is as it was written: a manifest with the size and CRC-32 of every file, and its own CRC-32.

What damages a finished folder (a truncated, missing or changed file, a changed manifest) is found before any of it is used.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from jax_async_grpo import records

__all__ = ["DamagedError", "check_files", "read_manifest", "sync_folder", "write_manifest"]

_MANIFEST = "checkpoint.json"


class DamagedError(Exception):
    """Why a folder is not whole."""


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `content` (JSON) and the files under the folder, to be called when these are complete; OSError as usual."""
    content = content | {"files": _files(folder)}
    records.write_text(folder / _MANIFEST, json.dumps({"crc32": _crc_of(content), "content": content}) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote, with `files`; DamagedError if it is not there or not as it was."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        content, crc = manifest["content"], manifest["crc32"]
    except OSError as error:
        raise DamagedError(f"{_MANIFEST}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise DamagedError(f"{_MANIFEST} is no manifest") from None
    if crc != _crc_of(content):
        raise DamagedError(f"{_MANIFEST} was changed")
    return content


def check_files(folder: Path, files: dict[str, list[int]], *, checksums: bool) -> None:
    """DamagedError for the first of the manifest's `files` that is missing, of another size or, with `checksums`, changed."""
    for name, (size, crc) in files.items():
        try:
            there = (folder / name).stat().st_size
            if there != size:
                raise DamagedError(f"{name} has {there} bytes of {size}")
            if checksums and _crc_of_file(folder / name) != crc:
                raise DamagedError(f"{name} was changed")
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> dict[str, list[int]]:
    """{path relative to the folder: [bytes, CRC-32]} of all files under it but the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _crc_of_file(path)] for path in paths}


def _crc_of_file(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _crc_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())  # json gives floats back exactly, so reading and dumping repeats the text
