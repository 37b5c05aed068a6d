"""The objects that travel through the library, with the shape of every field.

Axes (capital letters, everywhere): `B` prompts · `G` completions a prompt (the group) · `P` prompt tokens · `L` completion
tokens · `N` tokens of a row (`P + L`) · `V` vocabulary · `D` features · `Y` enumerated completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["Params", "Policy", "Rollouts", "Task", "check_params_alike"]

Params = Any  # any pytree of arrays


def check_params_alike(**trees: Params) -> None:
    """Raises ValueError, by argument name, unless the pytrees have leaves, and all the structure and shapes of the first."""
    (first, template), *others = trees.items()
    leaves = jax.tree_util.tree_leaves_with_path(template)
    if not leaves:
        raise ValueError(f"{first} has no leaves; it must be a pytree of arrays")
    for name, tree in others:
        structure = jax.tree.structure(tree)
        if structure != jax.tree.structure(template):
            raise ValueError(f"{name} has the structure {structure}; that of {first} is {jax.tree.structure(template)}")
        for (path, leaf), other in zip(leaves, jax.tree.leaves(tree), strict=True):
            if np.shape(leaf) != np.shape(other):
                where = jax.tree_util.keystr(path)
                raise ValueError(f"{name}{where} has shape {np.shape(other)}; {first}{where} has {np.shape(leaf)}")


class Policy(NamedTuple):
    """An autoregressive policy π_θ as three pure functions; logits are `hidden @ unembed(params)`.

    Attributes:
      init: `init(key) -> params`. The key is consumed.
      apply: `apply(params, tokens[..., N], *, positions=None, segment_ids=None, attention_mask=None, cache=None) ->
        (hidden[..., N, D], cache)`; `hidden[..., n, :] @ unembed(params)` are the logits of token n+1.
        `positions[..., N]` int, default 0..N-1. `segment_ids[..., N]` int, 0 = padding: a token sees itself and the earlier
        tokens of its own segment. `attention_mask[..., N, N]` bool, True where the row's token sees the column's token,
        replaces the causal and segment rule (this is how completions share a prefix in a tree).
      unembed: `unembed(params) -> [D, V]`, for use as `hidden @ unembed(params)` only: where hidden states are logits already
        it is an identity that stores nothing.
      tree: True if `apply` takes `positions` and `attention_mask`, so that enumerated completions may share prefixes. A policy
        with False is only ever applied to plain causal rows: `apply(params, tokens)`.
      tail: True if `apply` takes `tail=K` and then computes and returns the hidden states of the last K tokens only,
        [..., K, D]; saves a transformer most of its last layer where a long prompt is only read.
      init_cache: `init_cache(params, num_rows, capacity) -> cache`, an empty cache for rows of up to `capacity` tokens, in the
        dtype in which `apply` computes. `apply(params, tokens[R, N], positions=, segment_ids=, cache=cache)` writes the N
        tokens behind those already there, padding (segment 0) included, lets them see the valid ones before them, and returns
        the filled cache beside their hidden states. The rows of an array are its axis that is num_rows long whatever num_rows
        is: `sampling` finds it by that, to hand the rows of a prompt to its group; what has no such axis is shared by all rows.
        None where `apply` takes no cache.
    """

    init: Callable[..., Params]
    apply: Callable[..., tuple[jax.Array, Any]]
    unembed: Callable[[Params], jax.Array]
    tree: bool = True
    tail: bool = False
    init_cache: Callable[..., Any] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Groups of completions and the log-probs they were really drawn from.

    Attributes:
      prompts: [B, P] int token ids, padded on the left.
      prompt_mask: [B, P] bool, False on padding.
      completions: [B, G, L] int token ids.
      mask: [B, G, L] bool, True on the tokens the policy chose (the end token included).
      behavior_logprobs: [B, G, L] log π_φ of every token, nats, 0 where the mask is False.
      rewards: [B, G].
      policy_version: [B, G] int, the learner update whose parameters generated the completion.
      completion_index: [B, G] int, index into the task's enumerated completions; None where nothing is enumerated.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    completions: jax.Array
    mask: jax.Array
    behavior_logprobs: jax.Array
    rewards: jax.Array
    policy_version: jax.Array
    completion_index: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Prompts whose completions can all be enumerated and scored. Host (NumPy) data: close over it, don't trace it.

    Attributes:
      name: what records and tables call it.
      prompts: [B, P] int32 token ids, padded on the left.
      prompt_mask: [B, P] bool, False on padding.
      completions: [Y, L] int32, every completion once.
      mask: [Y, L] bool, True up to and including the end token.
      allowed: [L, V] bool, the tokens that may stand at each completion position; the policy is normalized over them, so that
        the Y completions carry all the probability.
      rewards: [B, Y] float64, what the learner is trained on.
      gold_rewards: [B, Y] float64, what it is judged on; the same array as `rewards` unless the task has a proxy.
      end_token: the id that ends a completion early, None where all have length L.
    """

    name: str
    prompts: np.ndarray
    prompt_mask: np.ndarray
    completions: np.ndarray
    mask: np.ndarray
    allowed: np.ndarray
    rewards: np.ndarray
    gold_rewards: np.ndarray
    end_token: int | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.allowed.shape[1]
