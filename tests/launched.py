"""Launch scripts run in the process of a test."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable

from absl.testing import flagsaver

from launch import command_line


def job_of(main: Callable[[], int | None], name: str) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `python -m launch.NAME ARGUMENTS` here: (exit code, output, errors)."""
    return functools.partial(_run, main, name)


def _run(main, name, *arguments) -> tuple[int, str, str]:
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"launch/{name}.py", *map(str, arguments)]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line.run(main)
    except SystemExit as stop:
        return stop.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
    raise AssertionError("the job did not exit")
