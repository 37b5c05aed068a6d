"""What a training run shows while it runs, on terminals of every size and without one; what a signal asks of it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import termios
from types import SimpleNamespace

import pytest

from jax_async_grpo import records
from jax_async_grpo.training import monitor as monitor_lib

UPDATE = {"kind": "update", "reward": 0.5125, "staleness/mean": 2.0, "completion_length": 3.0}
BIAS = {"kind": "bias", "bias/norm": 0.25, "detected": 0, "bias/detection_limit": 1.5}


def shown(folder, rows=(), *, warm_rows=(), is_resumed=False, step=0, stderr=None, warm_updates=100) -> str:
    """Standard output of a monitor of 40 updates; `stderr` is its terminal, if there is one."""
    warm_start = {"num_updates": warm_updates, "target_reward": 0.3}
    job = SimpleNamespace(config={"num_prompts": 2, "group_size": 2, "num_updates": 40, "warm_start": warm_start})
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr or io.StringIO()):
        with monitor_lib.Monitor(job, records.Workdir(path=folder, resumed=False)) as monitor:
            for row in warm_rows:
                monitor.on_row(row)
            monitor.started_at(step, is_resumed=is_resumed)
            for row in rows:
                monitor.on_row(row)
    return out.getvalue()


@contextlib.contextmanager
def terminal(rows: int, columns: int):
    """A stream to a terminal of that size, and what it has shown, to be called."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(writing, "w") as stream:
        os.set_blocking(reading, False)

        def read() -> str:
            stream.flush()
            try:
                return os.read(reading, 65536).decode()
            except BlockingIOError:
                return ""

        yield stream, read
    os.close(reading)


def test_a_narrow_terminal_shows_the_reward_and_evaluations_stand_above_the_bar(tmp_path):
    rows = [{"kind": "evaluation", "step": 0, "heldout_reward": 0.25}, UPDATE | {"step": 0}, BIAS | {"step": 1}]
    with terminal(24, 40) as (stream, read):
        said, bar = shown(tmp_path, rows, stderr=stream), read()
    assert said.splitlines() == [
        "compiling the first update ...",
        "update      0 of 40: held-out reward 0.250",
        "update      1 of 40: bias not detected, detection limit 1.5",
    ]
    last = re.split(r"[\r\n]", bar.rstrip())[-1]
    assert last.startswith("reward 0.512:") and "1/40" in last and len(last) <= 40


@pytest.mark.parametrize("size", [(0, 0), (0, 80), (24, 0), None])
def test_without_room_for_a_bar_there_are_lines_now_and_then(tmp_path, monkeypatch, size):
    clock = [100.0]
    monkeypatch.setattr(monitor_lib, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def rows():
        for step, seconds in enumerate((30, 1, 1, 30)):
            clock[0] += seconds
            yield UPDATE | {"step": step}

    with terminal(*size) if size else contextlib.nullcontext((None, lambda: "")) as (stream, read):
        said, bar = shown(tmp_path, rows(), stderr=stream), read()
    lines = said.splitlines()[1:]
    assert [line.partition(":")[0].split() for line in lines] == [["update", n, "of", "40", "done"] for n in ("1", "4")]
    assert "reward 0.512, staleness 2, " in lines[0] and not bar


def test_a_run_that_goes_on_says_from_where(tmp_path):
    assert shown(tmp_path, is_resumed=True, step=10).startswith("going on from update 11 of 40\ncompiling the first update")
    assert "going on" not in shown(tmp_path)


def test_the_warm_start_shows_what_it_is_after_and_nothing_where_it_is_off(tmp_path):
    row = {"kind": "warm_start", "step": 10, "heldout_reward": 0.125}
    assert "warm start     10 of at most 100: held-out reward 0.125, target 0.3\n" in shown(tmp_path, warm_rows=[row])
    assert "warm start" not in shown(tmp_path, warm_rows=[row], warm_updates=0)


def test_a_measurement_that_had_nothing_to_measure_is_no_line(tmp_path):
    nothing = BIAS | {"step": 1, "bias/norm": 0.0, "bias/detection_limit": 0.0}
    seen = BIAS | {"step": 2, "detected": 1, "bias/norm": 2.5}
    said = shown(tmp_path, [nothing, seen])
    assert said.count("bias") == 1 and "update      2 of 40: bias norm 2.5, detection limit 1.5\n" in said


@pytest.mark.parametrize(
    ("number", "is_saving", "code", "words"),
    [
        (signal.SIGINT, False, 130, "stopping before the first update ..."),
        (signal.SIGTERM, False, 0, "stopping before the first update ..."),
        (signal.SIGINT, True, 130, "stopping after this update, saving ..."),
        (signal.SIGTERM, True, 0, "stopping after this update, saving ..."),
    ],
)
def test_a_signal_asks_for_the_end_and_a_second_ctrl_c_insists(capsys, number, is_saving, code, words):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monitor_lib.stop_signals() as stop:
        assert not stop.is_saving
        stop.is_saving = is_saving
        assert not stop and stop.code == 0
        os.kill(os.getpid(), number)
        assert stop and stop.code == code and words in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        assert stop.code == code
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
