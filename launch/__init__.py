"""The jobs, run as `python -m launch.NAME`. A signal while one of them still imports its libraries ends it with one line."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["leave"]


def leave(number: int, frame) -> None:
    """The handler of SIGINT and SIGTERM until `command_line.run` has its own: nothing has begun, so nothing is to be saved."""
    os.write(2, b"\nInterrupted.\n" if number == signal.SIGINT else b"\nTerminated.\n")
    os._exit(128 + number)  # an exception would be caught, or shown as a traceback, by whichever library is being imported


if sys.argv[:1] == ["-m"]:  # Python's placeholder while it looks for the module to run: nobody else imports the jobs then
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:  # as nohup and background jobs of a shell have it
            signal.signal(_number, leave)
