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

_SHOWN = 3  # bad rows said in full
_LISTED = 20  # further ones of which the line is said


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
        with one warning that counts them and says their lines; "fatal" raises the same.
      num_prompts: M, the first good rows; None for all.
      prompt_length: P, in tokens; of longer questions the last tokens are kept.
      max_length: L, in tokens, of completions and of whole answers, "####" included; longer answers are cut for the warm start.
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
    complaints: dict[int, str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if num_prompts is not None and len(rows) == num_prompts:
                break
            if not line.strip():
                continue
            try:
                rows.append(_read_row(line, question_key, answer_key))
            except ValueError as error:
                complaints[number] = str(error)
    if complaints and bad_rows == "fatal":
        raise ValueError(f"{_said_of_bad_rows(path, complaints)}; bad_rows='skip' leaves such rows out")
    if complaints:
        warnings.warn(f"skipped {_said_of_bad_rows(path, complaints)}", stacklevel=2)
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


def _said_of_bad_rows(path: Path, complaints: dict[int, str]) -> str:
    """How many there are, what is wrong with the first ones, and the lines of the others."""
    lines = list(complaints)
    said = f"{path}:" + "; line ".join(f"{number}: {complaints[number]}" for number in lines[:_SHOWN])
    others, count = lines[_SHOWN : _SHOWN + _LISTED], len(lines)
    more = f"; also {', '.join(map(str, others))}" if others else ""
    unsaid = f" and {count - _SHOWN - _LISTED} more" if count > _SHOWN + _LISTED else ""
    return f"{count} bad row{'s' * (count > 1)}: {said}{more}{unsaid}"


def _read_row(line: bytes, question_key: str, answer_key: str) -> _Row:
    """ValueError says what is wrong with the line."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except RecursionError as error:
        raise ValueError("no JSON: nested too deeply") from error
    except json.JSONDecodeError as error:  # its own text counts lines within this one
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
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
