"""What a person sees of a training run while it runs: a progress bar or plain lines, TensorBoard, and how a signal stops it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jax_async_grpo import records
from jax_async_grpo.training.setup import TrainJob

__all__ = ["Monitor", "Stop", "stop_signals"]

_MAX_QUEUE = 10_000  # numbers: so many may come before it is seen that the thread that writes them has died
_SECONDS_BETWEEN_LINES = 20.0  # of updates, where there is no bar


class Stop:
    """True once SIGTERM or Ctrl-C asked the run to end, which it does after the update it is in.

    Attributes:
      is_saving: there are updates, and what is done by then is saved; whoever runs them sets it.
    """

    def __init__(self):
        self.is_saving = False
        self._number: int | None = None

    def __bool__(self) -> bool:
        return self._number is not None

    @property
    def code(self) -> int:
        """The exit code for it: 130 after Ctrl-C, 0 after SIGTERM."""
        return 130 if self._number == signal.SIGINT else 0

    def ask(self, number: int, frame) -> None:
        """The signal handler; a second Ctrl-C interrupts at once, a second SIGTERM asks for nothing new."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self:
            return
        self._number = number
        what = "after this update, saving" if self.is_saving else "before the first update"
        with contextlib.suppress(RuntimeError):  # it came while a line was being written
            print(f"\nstopping {what} ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C ask the run to end, for the length of the block."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Monitor:
    """Shows the rows of a run: lines of what is rare, and of the updates a bar on a terminal, elsewhere a line now and then.

    Args:
      job: sizes of the run.
      workdir: TensorBoard's files go to its folder `tensorboard`.
    """

    def __init__(self, job: TrainJob, workdir: records.Workdir):
        config = job.config
        self._tokens_a_row, self._warm_start = config["num_prompts"] * config["group_size"], config["warm_start"]
        self._total, self._folder, self._writer = config["num_updates"], workdir.path / "tensorboard", None
        self._bar: Any = None
        self._has_bar = _has_room_for_a_bar(sys.stderr)
        self._last, self._next_line = time.monotonic(), -math.inf

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is None:
            return
        if self._is_writing():
            self._writer.close()
        else:  # what nobody takes from its queue must not keep the process from ending
            self._writer.file_writer.event_writer._event_queue.cancel_join_thread()

    def started_at(self, step: int, *, is_resumed: bool = False) -> None:
        """The run begins, or goes on, at this update; events from there on replace those of an interrupted attempt."""
        self._writer = SummaryWriter(str(self._folder), purge_step=step, max_queue=_MAX_QUEUE)
        if is_resumed:
            _say(f"going on from update {step + 1} of {self._total}")
        _say("compiling the first update ...")
        self._last = time.monotonic()

    def on_row(self, row: dict[str, Any]) -> None:
        """To TensorBoard and to the terminal."""
        kind, step = row["kind"], row.get("step", 0)
        if kind == "warm_start" and self._warm_start["num_updates"]:
            most, target = self._warm_start["num_updates"], self._warm_start["target_reward"]
            _say(f"warm start {step:>6} of at most {most}: held-out reward {row['heldout_reward']:.3f}, target {target:g}")
        if self._writer is None or kind not in ("update", "evaluation", "bias"):
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
                self._add(name if "/" in name else f"{kind}/{name}", value, step)
        if kind == "update":
            self._on_update(row, step)
        elif kind == "evaluation":
            _say(f"update {step:>6} of {self._total}: held-out reward {row['heldout_reward']:.3f}")
        elif row["bias/detection_limit"] > 0:  # else there was nothing to measure: no gradient, or no lag
            found = f"norm {row['bias/norm']:.3g}" if row["detected"] else "not detected"
            _say(f"update {step:>6} of {self._total}: bias {found}, detection limit {row['bias/detection_limit']:.3g}")

    def _on_update(self, row: dict[str, Any], step: int) -> None:
        now = time.monotonic()
        rate, self._last = self._tokens_a_row * row["completion_length"] / max(now - self._last, 1e-9), now
        self._add("time/tokens_per_second", rate, step)
        reward, rest = f"reward {row['reward']:.3f}", f"staleness {row['staleness/mean']:.3g}, {rate:,.0f} tokens/s"
        if not self._has_bar:
            if now >= self._next_line:
                _say(f"update {step + 1:>6} of {self._total} done: {reward}, {rest}")
                self._next_line = now + _SECONDS_BETWEEN_LINES
            return
        if self._bar is None:  # only now, so that the time left is told without that of compiling
            self._bar = tqdm(desc=reward, total=self._total, initial=step, unit="update", dynamic_ncols=True)
        self._bar.set_description(reward, refresh=False)  # in front, where a narrow terminal shows it
        self._bar.set_postfix_str(rest, refresh=False)
        self._bar.update()

    def _add(self, name: str, value: float, step: int) -> None:
        """To TensorBoard; OSError where its thread has died: its queue would fill, and then wait for ever."""
        if not self._is_writing():
            raise OSError(
                f"{self._folder} cannot be written, is the disk full? What was saved is whole; the same command goes on"
            )
        self._writer.add_scalar(name, value, step)

    def _is_writing(self) -> bool:
        return self._writer.file_writer.event_writer._worker.is_alive()


def _say(line: str) -> None:
    """On standard output, above a bar."""
    tqdm.write(line)
    sys.stdout.flush()


def _has_room_for_a_bar(stream: TextIO) -> bool:
    """It is a terminal, and not one that says it has no rows or columns, where tqdm would show nothing."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:  # a terminal that does not tell its size
        return stream.isatty()
