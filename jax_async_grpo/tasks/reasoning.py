"""reasoning-gym questions with short numeric answers: every answer a policy can give, scored by the dataset's own verifier."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_async_grpo.tasks import characters
from jax_async_grpo.tasks.base import make_task
from jax_async_grpo.tasks.enumeration import enumerate_completions
from jax_async_grpo.tasks.score_cache import cache_path, default_cache_dir, read_scores, write_scores
from jax_async_grpo.types import Task

__all__ = ["ANSWERS", "ENTRIES_PER_PROMPT", "check_arguments", "create_dataset", "options_by_dataset", "reasoning_gym"]

ANSWERS = ("", *map(str, range(10)), *(f"{number:02d}" for number in range(100)))
"""The 111 strings of up to two digits, in the order of the task's completions."""

ENTRIES_PER_PROMPT = 100
"""A dataset of which fewer entries than one in so many fit is refused."""
_FORMAT = 1  # of the cached scores; raise it when their meaning changes
_INSTALL = 'reasoning-gym is needed for these questions: pip install "jax-async-grpo[tasks]", or make demo in a clone'


def reasoning_gym(
    dataset: str | Sequence[str],
    *,
    num_prompts: int = 8,
    seed: int = 0,
    prompt_length: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    **dataset_options: Any,
) -> Task:
    """Questions of a reasoning-gym dataset, with the reward of each of the 111 answers of up to two digits.

    R(x, y) = `score_answer(y, x)` of the dataset for every string y, partial credit included. The entries are taken in the
    dataset's order and kept when the right answer is among the strings (the best scores 1) and no earlier question has the
    same tokens. A prompt is the *last* `prompt_length` characters of a question (numbers tend to stand near the end), padded
    on the left. An exception of the verifier on a malformed answer gives that answer no credit, as trainers do.

    Completions are up to two digits and the end token: L = 3, the third position allows the end token alone, Y = 111.
    Scores are cached on disk, keyed by everything that determines them; a damaged file is made again.

    Args:
      dataset: a dataset's name, or several names: the prompts are split evenly in this order, the first ones getting one more.
      num_prompts: B.
      seed: of the dataset(s).
      prompt_length: P, in characters.
      cache_dir: folder of the cached scores; None for `$XDG_CACHE_HOME/jax_async_grpo`, by default `~/.cache/jax_async_grpo`.
      **dataset_options: fields of the dataset's config, say `max_digits=1`. With several datasets each option is named after
        one of them and maps its fields, say `products={"max_digits": 1}`.

    Returns:
      The task, named after the dataset(s).

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: an unknown dataset or option, too few entries whose answer fits, or a score that is not finite.

    Example:
      >>> task = reasoning_gym("gcd", num_prompts=4, max_value=20)
      >>> task.rewards.shape, np.unique(task.rewards).tolist()
      ((4, 111), [0.0, 0.5, 1.0])
    """
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    check_arguments(names, num_prompts, prompt_length)
    options = {dataset: dataset_options} if isinstance(dataset, str) else options_by_dataset(names, dataset_options)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    share, left_over = divmod(num_prompts, len(names))
    scored = []
    for index, name in enumerate(names):
        scored += _scored_questions(name, options[name], share + (index < left_over), seed, prompt_length, folder)
    completions, mask, allowed = _answer_tokens()
    prompts = np.stack([_prompt(question, prompt_length) for question, _ in scored])
    return make_task(
        "+".join(names),
        prompts=prompts,
        prompt_mask=prompts != characters.PAD_TOKEN,
        completions=completions,
        mask=mask,
        allowed=allowed,
        rewards=np.array([rewards for _, rewards in scored]),
        end_token=characters.END_TOKEN,
    )


def check_arguments(names: tuple[str, ...], num_prompts: int, prompt_length: int) -> None:
    """Raises ValueError on names that are none or repeat, and on numbers that are no integers or too small."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"dataset={names} must be a name or several different ones")
    for name, value in (("num_prompts", num_prompts), ("prompt_length", prompt_length)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name}={value!r} must be an integer")
    if num_prompts < len(names):
        raise ValueError(f"num_prompts={num_prompts} must be at least {len(names)}, one for each dataset")
    if prompt_length < 1:
        raise ValueError(f"prompt_length={prompt_length} must be at least 1")


def options_by_dataset(names: tuple[str, ...], dataset_options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each of several datasets, given as mappings named after them; ValueError on any other."""
    for name, options in dataset_options.items():
        if name not in names or not isinstance(options, Mapping):
            raise ValueError(
                f"{name}={options!r} must be a mapping of options named after one of the datasets {', '.join(names)}"
            )
    return {name: dict(dataset_options.get(name, {})) for name in names}


def _answer_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    digits = characters.encode("0123456789")
    allowed = np.zeros((3, characters.VOCAB_SIZE), bool)
    allowed[:2, digits] = True
    allowed[:, characters.END_TOKEN] = True
    completions, mask = enumerate_completions(allowed, characters.END_TOKEN)
    return completions, mask, allowed


def _prompt(question: str, prompt_length: int) -> np.ndarray:
    tokens = characters.encode(question[-prompt_length:])
    return np.pad(tokens, (prompt_length - len(tokens), 0), constant_values=characters.PAD_TOKEN)


def _scored_questions(
    name: str, options: Mapping[str, Any], num_prompts: int, seed: int, prompt_length: int, folder: Path
) -> list[tuple[str, list[float]]]:
    """Kept questions and the rewards of `ANSWERS`; on a cache hit nothing is generated, scored or even imported."""
    try:
        version = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(_INSTALL) from error
    key = {
        "format": _FORMAT,
        "reasoning_gym": version,
        "dataset": name,
        "options": {option: repr(value) for option, value in options.items()},
        "num_prompts": int(num_prompts),
        "seed": int(seed),
        "prompt_length": int(prompt_length),
        "answers": list(ANSWERS),
    }
    path = cache_path(folder, name, key)
    cached = read_scores(path)
    if cached is not None:
        return cached
    scored = _score_entries(create_dataset(name, options, num_prompts, seed), name, num_prompts, prompt_length)
    write_scores(path, scored)
    return scored


def create_dataset(name: str, options: Mapping[str, Any], num_prompts: int, seed: int) -> Any:
    """The dataset, with entries enough to choose `num_prompts` from; ImportError or ValueError in one line."""
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error
    if name not in gym.factory.DATASETS:
        close = difflib.get_close_matches(name, gym.factory.DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "reasoning_gym.factory.DATASETS holds the names"
        raise ValueError(f"dataset={name!r} is unknown to reasoning-gym: {hint}")
    allowed = _option_names(gym.factory.DATASETS[name][1])
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"{option}={options[option]!r} is not an option of dataset {name!r}: allowed are {', '.join(allowed)}"
            )
    try:
        return gym.create_dataset(name, seed=seed, size=ENTRIES_PER_PROMPT * (num_prompts + 1), **options)
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"dataset {name!r} refuses its options {dict(options)}: {reason}") from error


def _option_names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class) if field.init and field.name not in ("seed", "size")]


def _score_entries(data: Any, name: str, num_prompts: int, prompt_length: int) -> list[tuple[str, list[float]]]:
    """The first entries with a right answer among `ANSWERS` and a prompt of their own."""
    kept: dict[bytes, tuple[str, list[float]]] = {}
    failures: list[Exception] = []
    index = 0
    while len(kept) < num_prompts:
        if index >= ENTRIES_PER_PROMPT * (len(kept) + 1):
            options = ", ".join(_option_names(type(data.config)))
            cause = f" (score_answer raised {failures[-1]!r})" if failures else ""
            raise ValueError(
                f"dataset={name!r} has {len(kept)} different questions with answers of up to two digits in the first {index}, "
                f"num_prompts={num_prompts} are needed: lower num_prompts, raise prompt_length={prompt_length} or narrow its "
                f"options {options}{cause}"
            )
        entry = data[index]
        prompt = _prompt(entry["question"], prompt_length).tobytes()
        if prompt not in kept:
            rewards = _score_answers(data, entry, f"dataset {name!r}, entry {index}", failures)
            if max(rewards) >= 1:
                kept[prompt] = (entry["question"], rewards)
        index += 1
    return list(kept.values())


def _score_answers(data: Any, entry: Mapping[str, Any], where: str, failures: list[Exception]) -> list[float]:
    rewards = []
    for answer in ANSWERS:
        try:
            reward = float(data.score_answer(answer, entry))
        except Exception as error:  # verifiers choke on malformed answers in any way they like: no credit, but remembered
            failures.append(error)
            reward = 0.0
        if not math.isfinite(reward):
            raise ValueError(f"{where}: score_answer({answer!r}) is {reward}, must be finite")
        rewards.append(reward)
    return rewards
