"""Scores of free text on the host: threads with a time limit for each sample, and nothing a verifier does ends the run."""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_async_grpo.tasks.text import TextTask

__all__ = ["FAILURES", "HangingVerifiers", "Scores", "Verifiers"]

FAILURES = ("raised", "timed out", "not finite")
"""Why a sample has no score: the keys of `Scores.reasons`."""


class HangingVerifiers(RuntimeError):
    """More verifications hang than may be left behind."""


class Scores(NamedTuple):
    """Rewards of sampled completions.

    Attributes:
      rewards: [B, G] float32, 0 where the verifier failed.
      failed: [B, G] bool.
      reasons: how many samples failed, by each of `FAILURES`.
      first_failure: the first failed sample in one line, "" where there is none.
    """

    rewards: np.ndarray
    failed: np.ndarray
    reasons: dict[str, int]
    first_failure: str


@dataclasses.dataclass
class _Sample:
    """One call of the verifier; `decided` closes it, so that a late result changes nothing."""

    row: int
    text: str
    reward: float = 0.0
    failure: str = ""
    message: str = ""
    deadline: float = math.inf
    decided: bool = False


class Verifiers:
    """Calls verifiers on threads, each sample for at most `time_limit` seconds.

    A thread in Python cannot be stopped. One that overruns its sample is left behind: another takes its place at once, its late
    result is dropped, and it ends when the verifier returns. Threads are daemons, so none keeps the process from exiting.
    At most `max_hanging` of them may hang at a time; one more is an error, since each takes a share of the interpreter.

    The limit is wall time and needs the interpreter: a verifier inside one long call of C code (`9**9**9`, a regular expression
    that backtracks) stops everything, and must be kept from that by what it lets in.

    Args:
      num_threads: samples verified at the same time. Threads help verifiers that wait; Python code takes turns.
      time_limit: seconds a sample.
      max_hanging: threads left behind that are still running.

    Raises:
      ValueError: an argument out of its range.
    """

    def __init__(self, num_threads: int = 4, time_limit: float = 5.0, *, max_hanging: int = 16):
        for name, value, least in (("num_threads", num_threads, 1), ("max_hanging", max_hanging, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if not (isinstance(time_limit, numbers.Real) and 0 < time_limit < threading.TIMEOUT_MAX):
            raise ValueError(f"time_limit={time_limit!r} must be a positive number of seconds")
        self._num_threads, self._time_limit, self._max_hanging = num_threads, float(time_limit), max_hanging
        self._hanging: list[threading.Thread] = []

    @property
    def num_hanging(self) -> int:
        """Threads that were left behind and still run."""
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        return len(self._hanging)

    def score(self, task: TextTask, prompt_indices: np.ndarray, completions: np.ndarray, mask: np.ndarray) -> Scores:
        """Rewards of completions of a task's prompts.

        Results depend on the samples alone, not on threads or order, for verifiers that are functions and stay well within the
        time limit.

        Args:
          task: its tokenizer reads the completions and its `verify` scores the texts.
          prompt_indices: [B] int, rows of the task.
          completions: [B, G, L] int token ids.
          mask: [B, G, L] bool, True on a completion's own tokens.

        Returns:
          `Scores`. A verifier that raises, overruns the time limit or returns no finite real number leaves reward 0.

        Raises:
          ValueError: shapes that do not fit, or a row that the task does not have.
          HangingVerifiers: more than `max_hanging` threads hang.
        """
        rows, completions, mask = np.asarray(prompt_indices), np.asarray(completions), np.asarray(mask, bool)
        if completions.ndim != 3 or mask.shape != completions.shape or rows.shape != completions.shape[:1]:
            raise ValueError(
                f"completions and mask must be [B, G, L] and prompt_indices [B], got {completions.shape}, {mask.shape} and "
                f"{rows.shape}"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(task.questions):
            raise ValueError(f"prompt_indices must be in 0..{len(task.questions) - 1}, got {rows.min()}..{rows.max()}")
        samples = [
            _Sample(row, task.tokenizer.decode(tokens[valid]))
            for row, group, valid_group in zip(rows.tolist(), completions, mask, strict=True)
            for tokens, valid in zip(group, valid_group, strict=True)
        ]
        self._run(task, samples)
        shape = completions.shape[:2]
        failures = [sample.failure for sample in samples]
        counts = collections.Counter(failures)
        failed = np.array([failure != "" for failure in failures], bool).reshape(shape)
        rewards = np.array([sample.reward for sample in samples], np.float32).reshape(shape)
        return Scores(rewards, failed, {reason: counts[reason] for reason in FAILURES}, _first_failure(samples))

    def _run(self, task: TextTask, samples: Sequence[_Sample]) -> None:
        waiting, running = collections.deque(samples), {}
        changed = threading.Condition()

        def work() -> None:
            me = threading.current_thread()
            while True:
                with changed:
                    if not waiting or me not in running:
                        running.pop(me, None)
                        changed.notify()
                        return
                    running[me] = sample = waiting.popleft()
                    sample.deadline = time.monotonic() + self._time_limit
                outcome = _verify(task.verify, sample.row, sample.text)
                with changed:
                    if not sample.decided:
                        sample.reward, sample.failure, sample.message = outcome
                        sample.decided = True

        def start() -> None:
            thread = threading.Thread(target=work, name="verifier", daemon=True)
            running[thread] = None
            thread.start()

        with changed:
            for _ in range(min(self._num_threads, len(samples))):
                start()
            try:
                while running:
                    open_samples = [sample for sample in running.values() if sample is not None and not sample.decided]
                    # A sample that starts meanwhile has a later deadline than this.
                    deadline = min((s.deadline for s in open_samples), default=time.monotonic() + self._time_limit)
                    changed.wait(max(0.0, deadline - time.monotonic()))
                    self._leave_behind(task, running, waiting, start)
            finally:
                waiting.clear()

    def _leave_behind(self, task: TextTask, running: dict, waiting: collections.deque, start: Callable[[], None]) -> None:
        now = time.monotonic()
        for thread, sample in list(running.items()):
            if sample is None or sample.decided or sample.deadline > now:
                continue
            sample.decided, sample.failure = True, "timed out"
            sample.message = f"no score within time_limit={self._time_limit:g} s"
            del running[thread]
            self._hanging.append(thread)
            if self.num_hanging > self._max_hanging:
                raise HangingVerifiers(
                    f"{self.num_hanging} verifications of {task.name} hang past time_limit={self._time_limit:g} s, more than "
                    f"max_hanging={self._max_hanging}: mend the verifier or raise the limit; the last text was "
                    f"{sample.text[:80]!r}"
                )
            if waiting:
                start()


def _verify(verify: Callable[[int, str], Any], row: int, text: str) -> tuple[float, str, str]:
    """(reward, failure, message) of one call, whatever it does."""
    try:
        value = verify(row, text)
        if not isinstance(value, (numbers.Real, np.bool_)):
            return 0.0, "not finite", f"returned a {type(value).__name__}"
        with np.errstate(over="ignore"):
            reward = float(np.float32(float(value)))
        if not math.isfinite(reward):
            return 0.0, "not finite", f"returned {reward}"
        return reward, "", ""
    except BaseException as error:  # even SystemExit: a verifier must not end a run
        return 0.0, "raised", "raised " + " ".join(traceback.format_exception_only(error)[-1].split())[:200]


def _first_failure(samples: Sequence[_Sample]) -> str:
    return next((f"row {s.row}, text {s.text[:80]!r}: {s.message}" for s in samples if s.failure), "")
