"""The tree of the distinct prefixes of enumerated completions, built once on the host.

Y completions of L tokens have few distinct prefixes (111 strings of up to two digits have 11), and the policy's distribution
after a prefix does not depend on which completion it is read for. One row per prompt that holds every prefix's last token
once, each token seeing its own ancestors only, therefore gives all Y·L log-probs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np

__all__ = ["PrefixTree", "prefix_tree"]


class PrefixTree(NamedTuple):
    """The prefixes after which the policy chooses, and where each completion token reads its log-prob. Host arrays.

    Node 0 is the empty prefix (the prompt), node m+1 the prefix that ends with token m; parents come before children.

    Attributes:
      tokens: [M] int32, last token of each non-empty prefix.
      depth: [M] int32, its length in tokens, 1..L-1.
      sees: [M, M] bool, True where the column's prefix is the row's or a prefix of it.
      node: [Y, L] int32, the node a completion token is drawn at; 0 where `chosen` is False.
      chosen: [Y, L] bool, the valid tokens that had an alternative; the others have log-prob 0.
      paths: [R, K] int32, the prefixes that are no other's prefix, 0 after their end: R plain rows that cover the tree.
      path_mask: [R, K] bool, True on the tokens of a path.
      row: [M+1] int32, a path that holds the node.
    """

    tokens: np.ndarray
    depth: np.ndarray
    sees: np.ndarray
    node: np.ndarray
    chosen: np.ndarray
    paths: np.ndarray
    path_mask: np.ndarray
    row: np.ndarray


def prefix_tree(completions, mask=None, has_choice=None) -> PrefixTree:
    """The tree of [Y, L] completions; equal arguments give the cached tree.

    Args:
      completions: [Y, L] int, concrete.
      mask: [Y, L] bool, concrete, True up to the end of each completion; None = all valid.
      has_choice: [L] bool, concrete, False where only one token may stand; None = True everywhere.

    Returns:
      The tree. Prefixes that leave no choice are left out, unless a longer one needs them.

    Raises:
      ValueError: an argument is traced, the mask has gaps, or two completions are equal.

    Example:
      >>> prefix_tree([[1, 0, 2], [1, 1, 2]]).tokens.tolist()  # 1, 10, 11
      [1, 0, 1]
    """
    completions = _host("completions", completions, np.int64)
    mask = np.ones(completions.shape, bool) if mask is None else _host("mask", mask, bool)
    has_choice = np.ones(completions.shape[1], bool) if has_choice is None else _host("has_choice", has_choice, bool)
    return _cached_tree(completions.tobytes(), mask.tobytes(), has_choice.tobytes(), completions.shape)


def _host(name: str, value, dtype) -> np.ndarray:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced, but completions must be concrete to share their prefixes: close over {name} instead"
        )
    return np.ascontiguousarray(value, dtype=dtype)


@functools.lru_cache(maxsize=64)
def _cached_tree(completions: bytes, mask: bytes, has_choice: bytes, shape: tuple[int, int]) -> PrefixTree:
    valid = np.frombuffer(mask, bool).reshape(shape)
    tokens = np.where(valid, np.frombuffer(completions, np.int64).reshape(shape), 0)
    _check_rows(tokens, valid)
    prefix, parent, last, depth = _all_prefixes(tokens, valid)
    chosen = valid & np.frombuffer(has_choice, bool)
    kept, number = _keep_ancestors(prefix[chosen], parent)
    return _assemble(kept, number, parent, last, depth, np.where(chosen, number[prefix], 0), chosen)


def _check_rows(tokens: np.ndarray, valid: np.ndarray) -> None:
    gaps = (valid[:, 1:] & ~valid[:, :-1]).any(axis=1)
    if gaps.any():
        row = int(gaps.argmax())
        raise ValueError(f"mask must be True up to the end of a completion and False after it; row {row} has a gap")
    distinct, first = np.unique(np.concatenate([tokens, valid], axis=1), axis=0, return_index=True)
    if len(distinct) < len(tokens):
        row = int(np.setdiff1d(np.arange(len(tokens)), first)[0])
        raise ValueError(f"completions must be distinct; row {row} equals an earlier one")


def _all_prefixes(tokens: np.ndarray, valid: np.ndarray):
    """Numbers the distinct prefixes, the empty one 0: [Y, L] prefix before each token; parent, last token, depth of each."""
    prefix = np.zeros(tokens.shape, np.int64)
    parent, last, depth = [np.array([-1])], [np.array([-1])], [np.array([0])]
    count = 1
    for position in range(1, tokens.shape[1]):
        rows = valid[:, position]
        pairs = np.stack([prefix[rows, position - 1], tokens[rows, position - 1]], axis=1)
        distinct, index = np.unique(pairs, axis=0, return_inverse=True)
        prefix[rows, position] = count + index.reshape(-1)
        parent.append(distinct[:, 0])
        last.append(distinct[:, 1])
        depth.append(np.full(len(distinct), position))
        count += len(distinct)
    return prefix, np.concatenate(parent), np.concatenate(last), np.concatenate(depth)


def _keep_ancestors(wanted: np.ndarray, parent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The wanted prefixes, their ancestors and the empty one, in order; and the new number of each old one."""
    keep = np.zeros(len(parent), bool)
    keep[0] = True
    keep[wanted] = True
    for node in range(len(parent) - 1, 0, -1):  # children come after parents
        keep[parent[node]] |= keep[node]
    return np.flatnonzero(keep), np.cumsum(keep) - 1


def _assemble(kept, number, parent, last, depth, node, chosen) -> PrefixTree:
    count = len(kept)
    above = np.concatenate([[0], number[parent[kept[1:]]]])  # the parent of each node, by its new number
    sees = np.eye(count, dtype=bool)
    for child in range(1, count):
        sees[child] |= sees[above[child]]
    leaves = np.setdiff1d(np.arange(count), above[1:])
    depth = depth[kept]
    paths = np.zeros((len(leaves), depth.max(initial=0)), np.int32)
    path_mask = np.arange(paths.shape[1]) < depth[leaves][:, None]
    row = np.zeros(count, np.int32)
    for index, leaf in enumerate(leaves):
        line = np.flatnonzero(sees[leaf])
        row[line] = index
        paths[index, : len(line) - 1] = last[kept[line[1:]]]
    tree = PrefixTree(
        tokens=last[kept[1:]].astype(np.int32),
        depth=depth[1:].astype(np.int32),
        sees=sees[1:, 1:],
        node=node.astype(np.int32),
        chosen=chosen,
        paths=paths,
        path_mask=path_mask,
        row=row,
    )
    for array in tree:
        array.flags.writeable = False  # the cache hands out the same arrays again
    return tree
