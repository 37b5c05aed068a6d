"""One process a workdir: an advisory lock that the kernel releases when its holder ends, by `kill -9` too.

The lock is `flock` on the file `.lock` of the folder, which stays there: removing it would let two processes hold two files of
one name. On NFS it excludes processes of other hosts only where the mount supports it (Linux ≥ 2.6.12, without `nolock` and
`local_lock`); elsewhere it excludes those of the same host. A child that is forked and not exec'd shares the lock, and keeps it
if it outlives its parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["workdir_lock"]


@contextlib.contextmanager
def workdir_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the folder for the length of the block; creates it.

    Raises:
      ValueError: another process, or another block of this one, holds it (the line names its pid and host), or the folder
        cannot be written or locked.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ValueError(f"workdir={folder} cannot be created or written: {error.strerror}; give another --workdir") from None
    try:
        _take(descriptor, folder)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(f"workdir={folder} is in use by {holder}; wait for it, end it, or give another --workdir") from None
    except OSError as error:
        raise ValueError(f"workdir={folder} cannot be locked: {error.strerror}; give a --workdir on another disk") from None
