"""What every launch script does with its flags and errors: one clear line and exit code 2 instead of a traceback."""

from __future__ import annotations

import contextlib
import io
import logging as std_logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import launch
from jax_async_grpo import config_checks, invariants, records

__all__ = [
    "CONFIG",
    "DRY_RUN",
    "OVERWRITE",
    "WORKDIR",
    "check_interrupt",
    "config_of_job",
    "open_workdir",
    "progress",
    "read_config",
    "run",
    "say_of_program",
    "told_where_it_stops",
]

# The flags of every job, defined once. Keys the config lacks pass here, so that the job's own check can name them and say which
# there are.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file: configs/ has one for every job.", lock_config=False, accept_new_attributes=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config.json, records, summary.json, tables and figures.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan, measure nothing.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh in a workdir that holds another run; other files stay.")

_interrupted = threading.Event()
_HELP = {"help", "helpshort", "helpfull", "helpxml", "?"}
# What an error about the type of a value says, and what it means; others are said as they are.
_TYPES = {
    "invalid literal for int()": "an integer",
    "to float": "a number",
    "Non-boolean": "true or false",
    "as a ConfigDict": "a dict, as \"{'key': value}\"",
}
_BROKEN_PIPE = 128 + signal.SIGPIPE  # as of a program that the signal ends: `| head` has seen enough


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits with what it returns.

    A ValueError is the user's to mend, and so is an OSError (a full disk), so its one line is the whole message, and
    `--verbosity=1` adds the traceback; anything else is ours and keeps it. A warning is one line too. Ctrl-C ends with code
    130, and where `main` is the program, at once. Where whoever reads the output has gone, it ends in silence with code 141.
    --help ends with 0.
    """

    def parse(arguments: list[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            _say(_refusal(_last_line(error)))
        except SystemExit as stop:
            asked = any(argument.lstrip("-").partition("=")[0] in _HELP for argument in arguments[1:])
            raise SystemExit(0 if asked else stop.code) from None
        except Exception as error:  # a config file is a program: anything can go wrong in it
            key = _text(error).split("\n")[0].strip("\"'")
            override = _override_with(key, arguments)
            if override and (there := _siblings(override, key, arguments)):
                _say(f"{override}: there is no {key}; there are {', '.join(there)}{_given_whole(override, key)}")
            else:
                _say(f"{override or 'the config file'}: {type(error).__name__}: {_last_line(error)}{_place(error)}")
        sys.exit(2)

    def call(arguments: list[str]) -> int | None:
        if len(arguments) > 1:
            _say(f"unexpected argument {arguments[1]!r}; options are given as --name=value, --help lists them")
            return 2
        try:
            code = main()
            sys.stdout.flush()  # here, where a reader that has gone is no error
            return code
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # a stream without a file has nothing to flush into it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        except (ValueError, OSError) as error:
            if logging.level_debug():
                raise
            _say(str(error))
            return 2
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            return 130

    def interrupt(number, frame):
        _interrupted.set()
        signal.default_int_handler(number, frame)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal of ASCII cannot show is no reason to stop
    _interrupted.clear()
    handler, formatter = signal.signal(signal.SIGINT, interrupt), warnings.formatwarning
    if signal.getsignal(signal.SIGTERM) is launch.leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, also in the midst of a compiled program
    warnings.formatwarning = _one_line
    try:
        app.run(call, flags_parser=parse)
    except SystemExit as stop:
        if stop.code == 130 and getattr(main, "__module__", None) == "__main__":
            _leave_at_once(130)
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
        warnings.formatwarning = formatter


def check_interrupt() -> None:
    """Raises the KeyboardInterrupt of a Ctrl-C that was lost; to be called between the pieces of long work.

    While jax traces and compiles, Python often runs jax's garbage collection callback, and what is raised there is ignored.
    """
    if _interrupted.is_set():
        _interrupted.clear()
        raise KeyboardInterrupt


def config_of_job(example: str, *, job: str = "", instead: str = "", spread: bool = False) -> dict[str, Any]:
    """The config of a job, and jax set up for it.

    A job is in float64 on the CPU, as accelerators lack float64 or emulate it slowly, unless its config says
    `precision="float32"`. With `spread` every core is a device of its own, over which sweeps spread their runs.

    Raises:
      ValueError: --config is missing, for which `example` is named, or --workdir without --dry_run; the workdir is a file; what
        `read_config` raises; the config is that of another launch script than `job`.
    """
    missing = [] if CONFIG.present else [f"--config={example}"]
    missing += [] if WORKDIR.value or DRY_RUN.value else ["--workdir=DIR (or --dry_run)"]
    if missing:
        raise ValueError(f"give {' and '.join(missing)}{'' if CONFIG.present else instead}")
    if WORKDIR.value and Path(WORKDIR.value).is_file():
        raise ValueError(f"--workdir={WORKDIR.value} is a file; give a folder")
    config = read_config(CONFIG)
    other = config_checks.job_of(config)
    if job and other not in (job, None):
        path = flags.FLAGS[CONFIG.name].config_filename
        raise ValueError(f"--config={path} looks like a config of another job: python -m launch.{other} takes it")
    is_theory = config.get("precision", "float64") != "float32"
    jax.config.update("jax_enable_x64", is_theory)
    std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)  # which backends there are not is no news
    if is_theory:
        jax.config.update("jax_platforms", "cpu")
    if spread and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # a backend that runs already keeps its devices
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return config


def open_workdir(config: Mapping[str, Any], figures: Sequence[str]) -> records.Workdir:
    """`records.open_workdir` as the flags --workdir and --overwrite say."""
    return records.open_workdir(WORKDIR.value, config, overwrite=OVERWRITE.value, figures=figures)


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[str, str], None]]:
    """A bar on a terminal, plain lines elsewhere: yields `report(name, line)`, to be called after each of `total` pieces."""
    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty()) as bar:

        def report(name: str, line: str) -> None:
            bar.set_description(name)
            bar.update()
            if bar.disable:
                print(line, flush=True)
            check_interrupt()

        yield report


def say_of_program(name: str) -> None:
    """A line on the piece whose warm start and compilation begin, where no bar shows that the job is alive."""
    if not sys.stderr.isatty():
        print(f"{name}: warm start and compilation first", flush=True)


@contextlib.contextmanager
def told_where_it_stops(workdir: os.PathLike) -> Iterator[None]:
    """Where a Ctrl-C or a violated invariant ends the block, one line says where its records are; exit code 130 or 1."""
    try:
        yield
    except (KeyboardInterrupt, invariants.InvariantViolation) as stop:
        said = f"error: {stop}" if str(stop) else "\nInterrupted"
        print(f"{said}: what was run is in {workdir}; the same command goes on from there.", file=sys.stderr)
        sys.exit(1 if str(stop) else 130)


def read_config(flag: flags.FlagHolder) -> dict[str, Any]:
    """The config file of a `DEFINE_config_file` flag with its overrides, as plain dicts.

    Raises:
      ValueError: no such file, or it gives no ConfigDict.
    """
    path = flags.FLAGS[flag.name].config_filename
    if not isinstance(flag.value, ConfigDict):
        try:
            flag.value.to_dict()  # what could not be read says so only when it is used
        except OSError as error:
            raise ValueError(f"--{flag.name}={path} cannot be read: {_last_line(error)}") from None
        except AttributeError:
            pass
        kind = type(flag.value).__name__
        raise ValueError(f"--{flag.name}={path}: get_config() returns {kind}; it must return an ml_collections.ConfigDict")
    return flag.value.to_dict()


def _leave_at_once(code: int) -> None:
    """Ends the process without tearing down the interpreter: a program jax still runs then would crash in it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that is gone, a closed file
            stream.flush()
    os._exit(code)


def _one_line(message, *_) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def _say(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _refusal(message: str) -> str:
    """Of a flag: what is wrong with it and how to mend it; an override of the config as the checks of a config say it."""
    override = re.match(r"flag (--\w+\..*?): ", message)
    if not override:
        return f"{message}; --help lists the flags"
    wanted = next((kind for sign, kind in _TYPES.items() if sign in message), None)
    return f"{override[1]} must be {wanted}" if wanted else f"{message}; the config file says what it may be"


def _text(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # str(KeyError) is a repr


def _last_line(error: BaseException) -> str:
    """Of a message that may hold a whole traceback."""
    return _text(error).strip().split("\n")[-1].strip()


def _override_with(key: str, arguments: list[str]) -> str | None:
    """The argument --config.a.b=v that a complaint about a missing key `a` or `b` is about."""
    return next((argument for argument in arguments if key in argument.partition("=")[0].split(".")[1:]), None)


def _siblings(override: str, key: str, arguments: list[str]) -> list[str]:
    """The keys that stand where the argument --config.a.b=v looks for the missing `key`; none where that cannot be told."""
    name, *path = override.lstrip("-").partition("=")[0].split(".")
    file = next((argument.partition("=")[2] for argument in arguments if argument.lstrip("-").startswith(f"{name}=")), None)
    part = flags.FLAGS[name].parser.parse(file) if file else None  # the flag keeps no config that an override failed on
    for parent in path[: path.index(key)]:
        part = part.get(parent) if isinstance(part, (Mapping, ConfigDict)) else None
    return list(part) if isinstance(part, (Mapping, ConfigDict)) else []


def _given_whole(override: str, key: str) -> str:
    """How to give --config.task_options.tokenizer.path=v where options hold no `tokenizer` yet; "" where keys are fixed."""
    before, found, rest = override.partition("=")[0].partition(f".{key}.")
    return f"; to give it whole: {before}.{key}=\"{{'{rest}': ...}}\"" if found and before.endswith("options") else ""


def _place(error: BaseException) -> str:
    """Where in the user's own files it was raised, if there."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    frames = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename != __file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
