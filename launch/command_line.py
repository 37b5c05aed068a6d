"""What every launch script does with its flags and errors: one clear line and exit code 2 instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, logging

__all__ = ["run"]


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits with what it returns.

    A ValueError is the user's to mend, so its one line is the whole message, and `--verbosity=1` adds the traceback; anything
    else is ours and keeps it.
    """

    def parse(arguments: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(arguments)
        except (AttributeError, ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
            _say(f"{type(error).__name__}: {error}")
            sys.exit(2)

    def call(arguments: list[str]) -> int | None:
        if len(arguments) > 1:
            _say(f"unexpected argument {arguments[1]!r}; options are given as --name=value, --help lists them")
            return 2
        try:
            return main()
        except ValueError as error:
            if logging.level_debug():
                raise
            _say(str(error))
            return 2

    app.run(call, flags_parser=parse)


def _say(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
