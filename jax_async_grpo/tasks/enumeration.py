"""All the completions a policy can emit, when the tokens allowed at each position are few."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["count_completions", "enumerate_completions"]


def count_completions(allowed: np.ndarray, end_token: int | None = None) -> int:
    """Number Y of the completions that `enumerate_completions` would build, from the counts alone.

    Y = Σ_{l<L} e_l·Π_{k<l} n_k + Π_{l<L} n_l, with n_l the tokens allowed at position l besides the end token and e_l = 1 where
    the end token is allowed.

    Args:
      allowed: [L, V] bool, the tokens that may stand at each position.
      end_token: the id that ends a completion, or None where all have length L.

    Returns:
      Y, an exact Python integer.

    Raises:
      ValueError: `allowed` is not a bool [L, V] array, forbids every token of a position, or `end_token` is not in 0..V-1.

    Example:
      >>> count_completions(np.ones((2, 3), bool), end_token=2)  # "end", 2 tokens and 3 seconds each
      7
    """
    allowed = np.asarray(allowed)
    _check_allowed(allowed, end_token)
    total, open_prefixes = 0, 1
    for row in allowed:
        ends = 0 if end_token is None else int(row[end_token])
        total += ends * open_prefixes
        open_prefixes *= int(row.sum()) - ends
    return total + open_prefixes


def enumerate_completions(
    allowed: np.ndarray, end_token: int | None = None, *, max_completions: int = 100_000
) -> tuple[np.ndarray, np.ndarray]:
    """Every string over the allowed tokens, each ended by the end token or by the last position, exactly once.

    No completion is a prefix of another and together they carry all the probability of a policy normalized over `allowed`:
    Σ_y π(y|x) = 1. Shorter completions come first (the end token counts), equal lengths in lexicographic order of token ids.

    Args:
      allowed: [L, V] bool, the tokens that may stand at each position. A position may allow a single token, say a forced end.
      end_token: the id that ends a completion, or None where all have length L.
      max_completions: the largest Y that is built.

    Returns:
      completions: [Y, L] int32, padded with `end_token` after the end.
      mask: [Y, L] bool, True up to and including the end token.

    Raises:
      ValueError: what `count_completions` raises, or Y above `max_completions`.

    Example:
      >>> completions, mask = enumerate_completions(np.ones((2, 2), bool), end_token=1)
      >>> completions.tolist(), mask.tolist()
      ([[1, 1], [0, 0], [0, 1]], [[True, False], [True, True], [True, True]])
    """
    allowed = np.asarray(allowed)
    count = count_completions(allowed, end_token)
    if count > max_completions:
        raise ValueError(
            f"allowed gives {_readable(count)} completions, more than max_completions={max_completions}: "
            f"lower the length L={allowed.shape[0]} or the tokens allowed at a position (up to {allowed.sum(axis=1).max()})"
        )
    length, end = allowed.shape[0], -1 if end_token is None else end_token
    completions = np.full((count, length), max(end, 0), np.int32)
    mask = np.zeros((count, length), bool)
    prefixes, row = np.zeros((1, 0), np.int32), 0
    for position in range(length):
        tokens = np.flatnonzero(allowed[position]).astype(np.int32)
        strings = np.column_stack([np.repeat(prefixes, len(tokens), axis=0), np.tile(tokens, len(prefixes))])
        ended = (strings[:, -1] == end) | (position == length - 1)
        rows = slice(row, row + int(ended.sum()))
        completions[rows, : position + 1], mask[rows, : position + 1] = strings[ended], True
        prefixes, row = strings[~ended], rows.stop
    return completions, mask


def _check_allowed(allowed: np.ndarray, end_token: int | None) -> None:
    if allowed.ndim != 2 or allowed.dtype != bool or 0 in allowed.shape:
        raise ValueError(f"allowed must be a non-empty bool [L, V] array, got {allowed.dtype} of shape {allowed.shape}")
    if not allowed.any(axis=1).all():
        raise ValueError(f"allowed forbids every token at position {int(np.argmin(allowed.any(axis=1)))}: allow at least one")
    if end_token is not None and not 0 <= end_token < allowed.shape[1]:
        raise ValueError(f"end_token={end_token} must be None or a token id in 0..{allowed.shape[1] - 1}")


def _readable(count: int) -> str:
    """Digits as they are while they can be read, a power of ten beyond."""
    return f"{count:,}" if count < 10**15 else f"about 10^{math.log10(count):.0f}"
