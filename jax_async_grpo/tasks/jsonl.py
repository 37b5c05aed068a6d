"""Questions with answers in a JSONL file of GSM8K's format, scored by number or by math-verify."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax_async_grpo.tasks.math_answers import math_verifier
from jax_async_grpo.tasks.text import TextTask, make_text_task
from jax_async_grpo.tasks.tokenizers import Tokenizer, character_tokenizer

__all__ = ["jsonl_task"]


class _Row(NamedTuple):
    question: str
    answer: str
    verify: Callable[[str], float]


def jsonl_task(
    path: str | os.PathLike[str],
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    bad_rows: str = "skip",
    num_prompts: int | None = None,
    prompt_length: int = 512,
    max_length: int = 256,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
) -> TextTask:
    r"""A line is a JSON object with a question and an answer whose reference stands after its last "####".

    The whole answer is the reference completion. A completion is scored by what stands after its own last "####", else in its
    last \boxed{}, else by all of it: `math_answers.math_verifier`.

    Args:
      path: the file, UTF-8; empty lines are left out.
      question_key: of the question in a row.
      answer_key: of the answer.
      bad_rows: "skip" leaves out rows that are no JSON object, lack a text or "####", or whose reference cannot be compared,
        with one warning that counts them and names the first; "fatal" raises at the first.
      num_prompts: M, the first good rows; None for all.
      prompt_length: P, in tokens; of longer questions the last tokens are kept.
      max_length: L, in tokens; longer answers are cut for the warm start.
      tokenizer: None for `character_tokenizer()`.
      name: None for the file's name.

    Returns:
      The task.

    Raises:
      ImportError: a reference is no plain number and math-verify is not installed.
      OSError: the file cannot be read.
      ValueError: an argument that is not allowed, a bad row where these are fatal, or too few good rows.
    """
    if bad_rows not in ("skip", "fatal"):
        raise ValueError(f"bad_rows={bad_rows!r} must be 'skip' or 'fatal'")
    if num_prompts is not None and (isinstance(num_prompts, bool) or not isinstance(num_prompts, int) or num_prompts < 1):
        raise ValueError(f"num_prompts={num_prompts!r} must be None or an integer of at least 1")
    path = Path(path).expanduser()
    rows: list[_Row] = []
    complaints: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if num_prompts is not None and len(rows) == num_prompts:
                break
            if not line.strip():
                continue
            try:
                rows.append(_read_row(line, question_key, answer_key))
            except ValueError as error:
                complaints.append(f"{path}:{number}: {error}")
                if bad_rows == "fatal":
                    raise ValueError(f"{complaints[0]}; bad_rows='skip' leaves such rows out") from error
    if complaints:
        warnings.warn(f"{len(complaints)} bad rows are skipped, the first is {complaints[0]}", stacklevel=2)
    if not rows or (num_prompts is not None and len(rows) < num_prompts):
        raise ValueError(
            f"{path} has {len(rows)} good rows, num_prompts={num_prompts} needs more" if rows else f"{path} has no good row"
        )
    return make_text_task(
        path.stem if name is None else name,
        tokenizer=character_tokenizer() if tokenizer is None else tokenizer,
        questions=[row.question for row in rows],
        answers=[row.answer for row in rows],
        verify=lambda row, text: rows[row].verify(text),
        prompt_length=prompt_length,
        max_length=max_length,
    )


def _read_row(line: bytes, question_key: str, answer_key: str) -> _Row:
    """ValueError says what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("no JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, is a {type(row).__name__}")
    for key in (question_key, answer_key):
        if key not in row:
            raise ValueError(f"has no {key!r}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty, is {str(row[key])[:40]!r}")
        row[key].encode()  # half of a surrogate pair, on which tokenizers raise, is a ValueError here
    _, mark, reference = row[answer_key].rpartition("####")
    if not mark or not reference.strip():
        raise ValueError(f"{answer_key!r} has no reference after '####'")
    return _Row(row[question_key], row[answer_key], math_verifier(reference.strip()))
