"""The checked way to build a `Task`: shapes, finite rewards, and completions that carry all the probability."""

from __future__ import annotations

import numpy as np

from jax_async_grpo.types import Task

__all__ = ["make_task"]

_KRAFT_TOLERANCE = 1e-9


def make_task(
    name: str,
    *,
    prompts: np.ndarray,
    completions: np.ndarray,
    mask: np.ndarray,
    allowed: np.ndarray,
    rewards: np.ndarray,
    prompt_mask: np.ndarray | None = None,
    gold_rewards: np.ndarray | None = None,
    end_token: int | None = None,
) -> Task:
    """A `Task` from arrays, checked at the door.

    Completions are complete when the uniform policy gives them all its probability, Σ_y Π_l 1/|allowed_l| = 1 (Kraft's
    equality); being distinct and ended by the end token alone, none is then a prefix of another.

    Args:
      name: what records and tables call it.
      prompts: [B, P] int token ids, padded on the left.
      completions: [Y, L] int, as `enumerate_completions` gives them.
      mask: [Y, L] bool, True up to and including the end token.
      allowed: [L, V] bool, the tokens that may stand at each completion position.
      rewards: [B, Y], what the learner is trained on.
      prompt_mask: [B, P] bool, False on padding; None where nothing is padded.
      gold_rewards: [B, Y], what the learner is judged on; None for the same `rewards`.
      end_token: the id that ends a completion early, None where all have length L.

    Returns:
      The task, arrays as int32, bool and float64 copies that cannot be written to.

    Raises:
      ValueError: a shape, token, mask or reward that does not fit, named with its row.

    Example:
      >>> from jax_async_grpo.tasks import enumerate_completions
      >>> allowed = np.ones((2, 3), bool)
      >>> completions, mask = enumerate_completions(allowed, end_token=2)
      >>> rewards = [[float(2 in row) for row in completions.tolist()]]  # likes completions that end by themselves
      >>> strings = {"completions": completions, "mask": mask, "allowed": allowed, "end_token": 2}
      >>> make_task("ends", prompts=[[0]], rewards=rewards, **strings).rewards
      array([[1., 0., 0., 1., 0., 0., 1.]])
    """
    prompts, completions = np.array(prompts), np.array(completions)
    mask, allowed = np.array(mask), np.array(allowed)
    prompt_mask = np.ones(prompts.shape, bool) if prompt_mask is None else np.array(prompt_mask)
    _check_shapes(prompts, prompt_mask, completions, mask, allowed)
    _check_prompts(prompts, prompt_mask, allowed.shape[1])
    _check_completions(completions, mask, allowed, end_token)
    shape = (len(prompts), len(completions))
    rewards = _checked_rewards("rewards", rewards, shape)
    gold_rewards = rewards if gold_rewards is None else _checked_rewards("gold_rewards", gold_rewards, shape)
    prompts, completions = prompts.astype(np.int32), completions.astype(np.int32)
    for array in (prompts, prompt_mask, completions, mask, allowed, rewards, gold_rewards):
        array.flags.writeable = False
    return Task(name, prompts, prompt_mask, completions, mask, allowed, rewards, gold_rewards, end_token)


def _check_shapes(
    prompts: np.ndarray, prompt_mask: np.ndarray, completions: np.ndarray, mask: np.ndarray, allowed: np.ndarray
) -> None:
    for name, array in (("prompts", prompts), ("completions", completions)):
        if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be non-empty integers of rank 2, got {array.dtype} of shape {array.shape}")
    expected = {"prompt_mask": (prompt_mask, prompts.shape), "mask": (mask, completions.shape)}
    expected["allowed"] = (allowed, (completions.shape[1], *allowed.shape[1:2]))
    for name, (array, shape) in expected.items():
        if array.dtype != bool or array.ndim != 2 or array.shape != shape:
            raise ValueError(f"{name} must be bool of shape {shape}, got {array.dtype} of shape {array.shape}")


def _check_prompts(prompts: np.ndarray, prompt_mask: np.ndarray, vocab_size: int) -> None:
    if prompts.min() < 0 or prompts.max() >= vocab_size:
        raise ValueError(f"prompts must hold token ids in 0..{vocab_size - 1}, got {prompts.min()}..{prompts.max()}")
    # Left padding: the mask never falls along a row, and its last token is always there to predict the first completion token.
    right_padded = ~prompt_mask[:, -1] | (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any(axis=1)
    if right_padded.any():
        raise ValueError(
            f"prompt_mask must pad on the left and keep the last token, prompt {int(right_padded.argmax())} does not"
        )


def _check_completions(completions: np.ndarray, mask: np.ndarray, allowed: np.ndarray, end_token: int | None) -> None:
    length, vocab_size = allowed.shape
    if end_token is not None and not 0 <= end_token < vocab_size:
        raise ValueError(f"end_token={end_token} must be None or a token id in 0..{vocab_size - 1}")
    legal = (completions >= 0) & (completions < vocab_size)
    legal &= allowed[np.arange(length), np.clip(completions, 0, vocab_size - 1)]
    if (~legal & mask).any():
        raise ValueError(f"completion {int((~legal & mask).any(axis=1).argmax())} holds a token that allowed forbids there")
    is_end = np.zeros(mask.shape, bool) if end_token is None else completions == end_token
    ended_before = np.cumsum(is_end, axis=1) - is_end > 0
    wrong = (mask == ended_before).any(axis=1)
    if wrong.any():
        raise ValueError(
            f"mask must be True up to and including end_token={end_token}, completion {int(wrong.argmax())} is not"
        )
    _, first = np.unique(np.where(mask, completions, -1), axis=0, return_index=True)
    if len(first) < len(completions):
        twice = int(np.setdiff1d(np.arange(len(completions)), first)[0])
        raise ValueError(f"completions must be distinct, completion {twice} stands there twice")
    probability = np.where(mask, 1 / allowed.sum(axis=1), 1.0).prod(axis=1).sum()
    if abs(probability - 1) > _KRAFT_TOLERANCE:
        raise ValueError(
            f"completions carry {probability:.6g} of the uniform policy's probability instead of 1: some are missing"
        )


def _checked_rewards(name: str, rewards: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rewards = np.array(rewards, np.float64)
    if rewards.shape != shape:
        raise ValueError(f"{name} must have shape [B, Y] = {shape}, got {rewards.shape}")
    if not np.isfinite(rewards).all():
        prompt, completion = map(int, np.argwhere(~np.isfinite(rewards))[0])
        raise ValueError(f"{name} of prompt {prompt}, completion {completion} is {rewards[prompt, completion]}: must be finite")
    return rewards
