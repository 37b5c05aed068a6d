"""Any reasoning-gym dataset as free text with its own verifier, but for those whose verifier would run what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_async_grpo.tasks.reasoning import ENTRIES_PER_PROMPT, check_arguments, create_dataset, options_by_dataset
from jax_async_grpo.tasks.text import TextTask, make_text_task
from jax_async_grpo.tasks.tokenizers import Tokenizer, character_tokenizer

__all__ = ["REFUSED", "reasoning_text"]

_EVAL = "its verifier hands the completion to eval"
_PARSE = "its verifier hands the completion to sympy.parse_expr, which evals it"
REFUSED = {
    "binary_matrix": _EVAL,
    "n_queens": _EVAL,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
    "countdown": _PARSE,
    "intermediate_integration": _PARSE,
    "polynomial_multiplication": _PARSE,
    "puzzle24": _PARSE,
    "simple_integration": _PARSE,
    "coin_flip": "its verifier builds the integer that a completion like 1e999999999 writes, which stops the process",
    "rubiks_cube": "its verifier repeats a move as often as the completion says, without bound on memory",
    "composite": "it mixes other datasets, these among them: give their names as a list",
}
"""Datasets that are not offered, and why; read from the source of reasoning-gym 0.1.25."""


def reasoning_text(
    dataset: str | Sequence[str],
    *,
    num_prompts: int,
    seed: int = 0,
    prompt_length: int = 256,
    max_length: int = 32,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> TextTask:
    """Questions of reasoning-gym datasets, scored by `score_answer` of the dataset on the completion, stripped of spaces.

    The entries are taken in the dataset's order and kept when the question is new and the reference answer has at most
    `max_length` tokens.

    Args:
      dataset: a dataset's name, or several: the prompts are split evenly in this order, the first ones getting one more.
      num_prompts: M.
      seed: of the dataset(s).
      prompt_length: P, in tokens; of longer questions the last tokens are kept.
      max_length: L, in tokens.
      tokenizer: None for `character_tokenizer()`.
      **options: fields of the dataset's config, say `max_digits=1`. With several datasets each option is named after one of
        them and maps its fields, say `products={"max_digits": 1}`.

    Returns:
      The task, named after the dataset(s).

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: a dataset in `REFUSED`, an unknown dataset or option, too few entries that fit.

    Example:
      >>> task = reasoning_text("chain_sum", num_prompts=2, max_digits=1, min_digits=1)
      >>> [task.verify(row, answer) for row, answer in enumerate(task.answers)]
      [1.0, 1.0]
    """
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    check_arguments(names, num_prompts, prompt_length)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length={max_length!r} must be an integer of at least 1")
    for name in names:
        if name in REFUSED:
            raise ValueError(f"dataset={name!r} is refused for free text: {REFUSED[name]}")
    by_name = {dataset: options} if isinstance(dataset, str) else options_by_dataset(names, options)
    tokenizer = character_tokenizer() if tokenizer is None else tokenizer
    share, left_over = divmod(num_prompts, len(names))
    chosen: list[tuple[Any, dict[str, Any]]] = []
    for index, name in enumerate(names):
        count = share + (index < left_over)
        data = create_dataset(name, by_name[name], count, seed)
        chosen += [(data, entry) for entry in _entries_that_fit(data, name, count, tokenizer, max_length)]

    def verify(row: int, text: str) -> float:
        data, entry = chosen[row]
        return data.score_answer(text.strip(), entry)

    return make_text_task(
        "+".join(names),
        tokenizer=tokenizer,
        questions=[entry["question"] for _, entry in chosen],
        answers=[str(entry["answer"]) for _, entry in chosen],
        verify=verify,
        prompt_length=prompt_length,
        max_length=max_length,
    )


def _entries_that_fit(data: Any, name: str, num_prompts: int, tokenizer: Tokenizer, max_length: int) -> list[dict[str, Any]]:
    """The first entries with a question of their own and an answer that a completion can hold."""
    kept: dict[str, dict[str, Any]] = {}
    longest = index = 0
    while len(kept) < num_prompts:
        if index >= ENTRIES_PER_PROMPT * (len(kept) + 1):
            raise ValueError(
                f"dataset={name!r} has {len(kept)} different questions with answers of up to max_length={max_length} tokens in "
                f"the first {index} (answers have up to {longest}), num_prompts={num_prompts} are needed: raise "
                f"max_length, lower num_prompts or change its options"
            )
        entry = data[index]
        length = len(tokenizer.encode(str(entry["answer"])))
        longest = max(longest, length)
        if 0 < length <= max_length:
            kept.setdefault(entry["question"], entry)
        index += 1
    return list(kept.values())
