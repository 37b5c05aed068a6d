"""Tasks whose completions are free text: questions as tokens, reference answers to start from, and a function that scores."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from jax_async_grpo.tasks.tokenizers import Tokenizer

__all__ = ["TextTask", "make_text_task"]


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask:
    """M questions and how a completion of each is scored; `make_text_task` builds it, arrays cannot be written to.

    Attributes:
      name: what records and tables call it.
      tokenizer: of prompts, targets and completions.
      questions: M texts, whole.
      answers: M reference completions, for a supervised warm start.
      prompts: [M, P] int32, the questions' last P tokens, padded on the left.
      prompt_mask: [M, P] bool, False on padding.
      targets: [M, L] int32, the answers' first L tokens and the end token where it still fits, padded on the right.
      target_mask: [M, L] bool, True up to and including the end token.
      verify: (row, text) -> reward of that text as a completion of question `row`; it may raise, hang or return nonsense, which
        `verification.Verifiers` turns into failed samples.
    """

    name: str
    tokenizer: Tokenizer
    questions: list[str]
    answers: list[str]
    prompts: np.ndarray
    prompt_mask: np.ndarray
    targets: np.ndarray
    target_mask: np.ndarray
    verify: Callable[[int, str], float]

    @property
    def max_length(self) -> int:
        """L, the tokens a completion may have, the end token included."""
        return self.targets.shape[1]

    def take(self, rows: Sequence[int], name: str | None = None) -> TextTask:
        """The task of these rows alone, in this order.

        Raises:
          ValueError: no rows, or one that is not in 0..M-1.
        """
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= len(self.questions):
            raise ValueError(f"rows={rows.tolist()} must be one or more of 0..{len(self.questions) - 1}")
        verify, kept = self.verify, rows.tolist()
        return TextTask(
            self.name if name is None else name,
            self.tokenizer,
            [self.questions[row] for row in kept],
            [self.answers[row] for row in kept],
            *map(_frozen, (self.prompts[rows], self.prompt_mask[rows], self.targets[rows], self.target_mask[rows])),
            lambda row, text: verify(kept[row], text),
        )

    def split(self, num_heldout: int, seed: int) -> tuple[TextTask, TextTask]:
        """Two tasks without a question in common: rows whose prompts read the same to a policy go to the same side.

        Args:
          num_heldout: different prompts that are held out; all rows that repeat one of them go with it.
          seed: of the choice. Both sides keep the rows' order.

        Returns:
          (train, heldout), the latter named with "_heldout".

        Raises:
          ValueError: `num_heldout` is no integer between 1 and one less than the number of different prompts.
        """
        visible = np.where(self.prompt_mask, self.prompts, -1)
        _, group = np.unique(visible, axis=0, return_inverse=True)
        group = group.reshape(-1)
        # In the order of first appearance, so that the choice does not depend on what the token ids are.
        firsts = list(dict.fromkeys(group.tolist()))
        if isinstance(num_heldout, bool) or not isinstance(num_heldout, int) or not 1 <= num_heldout < len(firsts):
            raise ValueError(
                f"num_heldout={num_heldout!r} must be an integer in 1..{len(firsts) - 1}: the {len(group)} questions have "
                f"{len(firsts)} different prompts, those that read the same count once"
            )
        chosen = np.random.default_rng(seed).choice(len(firsts), num_heldout, replace=False)
        heldout = np.isin(group, np.array(firsts)[chosen])
        return self.take(np.flatnonzero(~heldout)), self.take(np.flatnonzero(heldout), f"{self.name}_heldout")


def make_text_task(
    name: str,
    *,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    answers: Sequence[str],
    verify: Callable[[int, str], float],
    prompt_length: int,
    max_length: int,
) -> TextTask:
    """A `TextTask` from texts, checked at the door.

    A prompt keeps the *last* `prompt_length` tokens of its question (what is asked tends to stand at the end); an answer of
    more than `max_length` tokens keeps the first ones and has no end token. Each is counted in one warning.

    Args:
      name: what records and tables call it.
      tokenizer: of both.
      questions: M texts.
      answers: M reference completions.
      verify: (row, text) -> reward.
      prompt_length: P.
      max_length: L, the end token included; a completion of L tokens is whole without one. Whole answers count, with all that
        stands in them beside the result.

    Returns:
      The task.

    Raises:
      ValueError: no question, an unequal number of answers, a length below 1, a question without a token.

    Example:
      >>> from jax_async_grpo.tasks import character_tokenizer
      >>> texts = {"questions": ["1+1="], "answers": ["2"], "verify": lambda row, text: float(text == "2")}
      >>> task = make_text_task("one", tokenizer=character_tokenizer(), **texts, prompt_length=6, max_length=3)
      >>> task.prompt_mask.astype(int).tolist(), task.target_mask.astype(int).tolist()
      ([[0, 0, 1, 1, 1, 1]], [[1, 1, 0]])
    """
    for argument, value in (("prompt_length", prompt_length), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{argument}={value!r} must be an integer of at least 1")
    questions, answers = list(questions), list(answers)
    if not questions or len(questions) != len(answers):
        raise ValueError(f"questions and answers must be as many and at least 1, got {len(questions)} and {len(answers)}")
    encoded = [tokenizer.encode(question) for question in questions]
    empty = [row for row, tokens in enumerate(encoded) if not len(tokens)]
    if empty:
        raise ValueError(f"questions[{empty[0]}]={questions[empty[0]]!r} has no token")
    replies = [tokenizer.encode(answer) for answer in answers]
    _warn_of_cuts(name, "prompts", "prompt_length", prompt_length, encoded, "their last ones are kept")
    # Fine for a policy that may answer more briefly; learnt from, such answers never end.
    cut = "a warm start sees their first ones and no end"
    _warn_of_cuts(name, "answers", "max_length", max_length, replies, cut)
    prompts, prompt_mask = _pad([tokens[-prompt_length:][::-1] for tokens in encoded], prompt_length, tokenizer.pad_token)
    ended = [np.append(tokens, tokenizer.end_token)[:max_length] for tokens in replies]
    targets, target_mask = _pad(ended, max_length, tokenizer.pad_token)
    arrays = map(_frozen, (prompts[:, ::-1], prompt_mask[:, ::-1], targets, target_mask))
    return TextTask(name, tokenizer, questions, answers, *arrays, verify)


def _warn_of_cuts(name: str, what: str, argument: str, length: int, rows: Sequence[np.ndarray], effect: str) -> None:
    lengths = [len(tokens) for tokens in rows]
    longer = sum(count > length for count in lengths)
    if longer:
        have = f"{min(lengths)} to {max(lengths)}"
        warnings.warn(
            f"{name}: {longer} of {len(rows)} {what} have more than {argument}={length} tokens ({have}): {effect}", stacklevel=3
        )


def _pad(rows: Sequence[np.ndarray], length: int, pad_token: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), length), pad_token, np.int32)
    mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array
