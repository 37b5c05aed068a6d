"""What a person sees of a training run while it runs: a progress bar or plain lines, TensorBoard, and how a signal stops it."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jax_async_grpo import records
from jax_async_grpo.training.setup import TrainJob

__all__ = ["Monitor", "Stop", "stop_signals"]

_MAX_QUEUE = 10_000  # numbers: so many may come before it is seen that the thread that writes them has died


class Stop:
    """True once SIGTERM or Ctrl-C asked the run to end after the update it is in; `code` is the exit code for that."""

    def __init__(self):
        self.code = 0
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def ask(self, number: int, frame) -> None:
        """The signal handler; a second Ctrl-C interrupts at once."""
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked, self.code = True, 130 if number == signal.SIGINT else 0
        print("\nstopping after this update, saving ...", file=sys.stderr, flush=True)


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
    """Shows the rows of a run.

    Args:
      job: sizes of the run.
      workdir: TensorBoard's files go to its folder `tensorboard`.
    """

    def __init__(self, job: TrainJob, workdir: records.Workdir):
        config = job.config
        self._tokens_a_row = config["num_prompts"] * config["group_size"]
        self._total, self._folder, self._writer = config["num_updates"], workdir.path / "tensorboard", None
        self._bar: Any = None
        self._last = time.monotonic()

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

    def started_at(self, step: int) -> None:
        """The run begins, or goes on, at this update; events from there on replace those of an interrupted attempt."""
        self._writer = SummaryWriter(str(self._folder), purge_step=step, max_queue=_MAX_QUEUE)
        self._bar = tqdm(total=self._total, initial=step, unit="update", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._last = time.monotonic()

    def on_row(self, row: dict[str, Any]) -> None:
        """To TensorBoard, to the bar, and where there is no terminal a line an evaluation."""
        kind, step = row["kind"], row.get("step", 0)
        if kind == "warm_start":
            print(f"warm start {step:>6}: held-out reward {row['heldout_reward']:.3f}", flush=True)
        if self._writer is None or kind not in ("update", "evaluation", "bias"):
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
                self._add(name if "/" in name else f"{kind}/{name}", value, step)
        if kind == "update":
            self._on_update(row, step)
        elif kind == "evaluation" and self._bar.disable:
            print(f"update {step:>6} of {self._total}: held-out reward {row['heldout_reward']:.3f}", flush=True)

    def _on_update(self, row: dict[str, Any], step: int) -> None:
        now = time.monotonic()
        rate, self._last = self._tokens_a_row * row["completion_length"] / max(now - self._last, 1e-9), now
        self._add("time/tokens_per_second", rate, step)
        self._bar.set_postfix_str(
            f"reward {row['reward']:.3f}, staleness {row['staleness/mean']:.3g}, {rate:,.0f} tokens/s", refresh=False
        )
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
