"""Digit sums: two numbers to add, a sum of fixed length to say. A small base keeps the completions few."""

from __future__ import annotations

import numpy as np

from jax_async_grpo.tasks.base import make_task
from jax_async_grpo.tasks.enumeration import enumerate_completions
from jax_async_grpo.tasks.text import TextTask, make_text_task
from jax_async_grpo.tasks.tokenizers import Tokenizer
from jax_async_grpo.types import Task

__all__ = ["digit_sum", "digit_text", "digit_tokenizer"]

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_SUMS = 2**24  # up to here the triangle's roots in `_draw_operands` are exact


def digit_sum(
    num_prompts: int = 8,
    num_digits: int = 2,
    base: int = 10,
    *,
    partial_credit: bool = False,
    variable_length: bool = False,
    seed: int = 0,
) -> Task:
    """Sums a + b < base^num_digits, every number written with `num_digits` digits, the most significant first.

    Tokens 0..base-1 are the digits and `base` is the plus sign, so V = base + 1, P = 2·num_digits + 1, L = num_digits and
    Y = base^num_digits. The operands are distinct ordered pairs, drawn uniformly among those whose sum fits.

    Args:
      num_prompts: B.
      num_digits: digits of each operand and of the sum.
      base: number of digits of the number system.
      partial_credit: False gives reward 1 to the right sum and 0 to all others; True gives k/num_digits for k right digits, or,
        where the length varies, 1/2 for a right last digit.
      variable_length: sums are said without leading zeros in 1 to num_digits digits and closed by an end token, base + 1,
        unless they have num_digits of them; V = base + 2 and Y = Σ_k base^k.
      seed: of the operands.

    Returns:
      The task; without `variable_length` all completions have the same length, so there is no end token.

    Raises:
      ValueError: an argument that is no integer or below its minimum, more prompts than pairs that fit, too many completions.

    Example:
      >>> task = digit_sum(num_prompts=4, num_digits=2, base=3)
      >>> task.prompts.shape, task.completions.shape, task.rewards.sum(axis=1).tolist()
      ((4, 5), (9, 2), [1.0, 1.0, 1.0, 1.0])
    """
    num_pairs = _check_arguments(num_prompts, num_digits, base, variable_length)
    if variable_length:
        return _of_variable_length(num_prompts, num_digits, base, num_pairs, partial_credit, seed)
    allowed = np.tile(np.arange(base + 1) < base, (num_digits, 1))
    completions, mask = enumerate_completions(allowed)
    prompts, first, second = _draw_prompts(num_prompts, num_pairs, num_digits, base, seed)
    right = completions[None] == _to_digits(first + second, num_digits, base)[:, None]
    rewards = right.mean(axis=-1) if partial_credit else right.all(axis=-1)
    return make_task("digit_sum", prompts=prompts, completions=completions, mask=mask, allowed=allowed, rewards=rewards)


def digit_tokenizer(base: int = 10) -> Tokenizer:
    """The tokens of `digit_sum`: digits 0..base-1 (letters from 10), the plus sign `base`, and `base` + 1, which ends and pads.

    `encode` raises ValueError on any other character; `decode` turns tokens beyond these into U+FFFD.

    Raises:
      ValueError: `base` is no integer in 2..36.

    Example:
      >>> digit_tokenizer(3).encode("12+01").tolist()
      [1, 2, 3, 0, 1]
    """
    if isinstance(base, bool) or not isinstance(base, (int, np.integer)) or not 2 <= base <= len(_DIGITS):
        raise ValueError(f"base={base!r} must be an integer in 2..{len(_DIGITS)}")
    alphabet = _DIGITS[:base] + "+"

    def encode(text: str) -> np.ndarray:
        if not set(text) <= set(alphabet):
            raise ValueError(f"text={text[:40]!r} must consist of {alphabet}")
        return np.array([alphabet.index(character) for character in text], np.int32)

    def decode(tokens: np.ndarray) -> str:
        inside = (
            alphabet[token] if 0 <= token <= base else "\ufffd" for token in np.asarray(tokens).tolist() if token != base + 1
        )
        return "".join(inside)

    return Tokenizer(encode, decode, base + 2, base + 1, base + 1, f"digits{base}")


def digit_text(
    num_prompts: int = 8,
    num_digits: int = 2,
    base: int = 10,
    *,
    partial_credit: bool = False,
    variable_length: bool = False,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> TextTask:
    """The sums of `digit_sum` as free text: the same prompts, and the same reward for every completion that it has.

    With its own tokenizer the token ids are `digit_sum`'s as well, P = 2·num_digits + 1 and L = num_digits. A text that is none
    of its completions (too short, too long, no digits) has reward 0. Nothing is enumerated, so the numbers may be long.

    Args:
      num_prompts: M.
      num_digits: digits of each operand and of the sum.
      base: number of digits of the number system.
      partial_credit: as in `digit_sum`.
      variable_length: as in `digit_sum`.
      seed: of the operands; the same seed gives the operands of `digit_sum`.
      tokenizer: None for `digit_tokenizer(base)`; another one must give a token to each character.

    Returns:
      The task, "digit_text".

    Raises:
      ValueError: what `digit_sum` raises but for the number of completions, base^num_digits above 2^24, or a base above 36.

    Example:
      >>> task = digit_text(num_prompts=2, num_digits=2, base=3)
      >>> task.questions, task.answers, task.verify(0, task.answers[0])
      (['01+21', '00+21'], ['22', '21'], 1.0)
    """
    num_pairs = _check_arguments(num_prompts, num_digits, base, variable_length)
    if base**num_digits > _MAX_SUMS:
        raise ValueError(f"num_digits={num_digits} must keep {base}^num_digits within {_MAX_SUMS}")
    tokenizer = digit_tokenizer(base) if tokenizer is None else tokenizer
    prompts, first, second = _draw_prompts(num_prompts, num_pairs, num_digits, base, seed)
    digits = _DIGITS[:base]
    if variable_length:
        answers = [np.base_repr(total, base) for total in first + second]
    else:
        answers = ["".join(digits[digit] for digit in row) for row in _to_digits(first + second, num_digits, base)]

    def verify(row: int, text: str) -> float:
        if not set(text) <= set(digits) or not 1 <= len(text) <= num_digits:
            return 0.0
        if variable_length:
            return _reward_of_variable_length(text, answers[row], partial_credit)
        right = [said == wanted for said, wanted in zip(text, answers[row], strict=False)]
        return float(len(text) == num_digits and (sum(right) / num_digits if partial_credit else all(right)))

    return make_text_task(
        "digit_text",
        tokenizer=tokenizer,
        questions=["".join((digits + "+")[token] for token in prompt) for prompt in prompts],
        answers=answers,
        verify=verify,
        prompt_length=2 * num_digits + 1,
        max_length=num_digits,
    )


def _check_arguments(num_prompts: int, num_digits: int, base: int, variable_length: bool) -> int:
    """The number of pairs whose sum fits."""
    for name, value, least in (("num_prompts", num_prompts, 1), ("num_digits", num_digits, 1), ("base", base, 2)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if variable_length and base > 10:
        raise ValueError(f"base={base} must be at most 10 where the length varies")
    num_pairs = base**num_digits * (base**num_digits + 1) // 2
    if num_prompts > num_pairs:
        raise ValueError(f"num_prompts={num_prompts} must be at most {num_pairs}, the sums of {num_digits} base-{base} digits")
    return num_pairs


def _reward_of_variable_length(text: str, answer: str, partial_credit: bool) -> float:
    return 1.0 if text == answer else 0.5 * (partial_credit and text[-1] == answer[-1])


def _of_variable_length(num_prompts, num_digits, base, num_pairs, partial_credit, seed) -> Task:
    plus, end = base, base + 1
    allowed = np.tile(np.arange(base + 2) != plus, (num_digits, 1))
    allowed[0, end] = False
    completions, mask = enumerate_completions(allowed, end_token=end)
    prompts, first, second = _draw_prompts(num_prompts, num_pairs, num_digits, base, seed)
    said = ["".join(map(str, row[row < base])) for row in completions]
    answers = [np.base_repr(total, base) for total in first + second]
    rewards = [[_reward_of_variable_length(text, answer, partial_credit) for text in said] for answer in answers]
    return make_task(
        "digit_sum",
        prompts=prompts,
        completions=completions,
        mask=mask,
        allowed=allowed,
        rewards=np.array(rewards),
        end_token=end,
    )


def _draw_prompts(num_prompts, num_pairs, num_digits, base, seed):
    """[B, P] tokens "a + b", and the operands."""
    first, second = _draw_operands(num_prompts, num_pairs, seed)
    plus = np.full((num_prompts, 1), base)
    prompts = np.concatenate([_to_digits(first, num_digits, base), plus, _to_digits(second, num_digits, base)], axis=1)
    return prompts, first, second


def _draw_operands(num_prompts: int, num_pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs: index n(n+1)/2 + a of the triangle is the sum n split into a and n - a."""
    index = np.random.default_rng(seed).choice(num_pairs, num_prompts, replace=False)
    total = ((np.sqrt(8.0 * index + 1) - 1) // 2).astype(np.int64)
    first = index - total * (total + 1) // 2
    return first, total - first


def _to_digits(numbers: np.ndarray, num_digits: int, base: int) -> np.ndarray:
    return numbers[:, None] // base ** np.arange(num_digits - 1, -1, -1) % base
