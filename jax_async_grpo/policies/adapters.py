"""Other people's models as a `Policy`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
from flax import nnx

from jax_async_grpo.policies.visibility import visibility
from jax_async_grpo.types import Params, Policy

__all__ = ["from_logits", "from_nnx"]


class _Identity:
    """The output matrix of a policy whose hidden states are its logits: `hidden @ _Identity()` is `hidden`, at no cost."""

    def __rmatmul__(self, hidden: jax.Array) -> jax.Array:
        return hidden


def from_logits(apply_fn: Callable, init: Callable[..., Params] | None = None, *, tree: bool | None = None) -> Policy:
    """A policy from a function that returns logits.

    The function must be causal. Those of the keywords `positions`, `segment_ids` and `attention_mask` that its signature names
    are passed on, with the meaning they have in `Policy.apply`. The log-prob functions of this package need none of them: rows
    are handed over with their valid tokens first, so padding is right without a mask. With both `positions` and
    `attention_mask` enumerated completions share prefixes in a tree, which is faster.

    Args:
      apply_fn: `apply_fn(params, tokens[R, N], **keywords) -> logits[R, N, V]`; logits[:, n] predict token n+1.
      init: `init(key) -> params`; None if the parameters come from elsewhere.
      tree: whether `apply_fn` takes `positions` and `attention_mask`; None = both are named in its signature. Say True for a
        function that forwards them as `**keywords`.

    Returns:
      Policy with D = V: hidden states are logits, and `hidden @ unembed(params)` is `hidden` without a product.

    Raises:
      ValueError: (when applied) a cache, or padding, packing or positions that `apply_fn` has no keyword for.

    Example:
      >>> policy = from_logits(lambda table, tokens: table[tokens], init=lambda key: jnp.zeros((4, 4)))
      >>> prompts, completions = jnp.array([[0]]), jnp.array([[[1, 3]]])
      >>> jax.jit(lambda table: token_logprobs(policy, table, prompts, completions))(jnp.zeros((4, 4))).shape
      (1, 1, 2)
    """
    takes = _keywords(apply_fn)
    tree = {"positions", "attention_mask"} <= takes if tree is None else tree
    if tree:
        takes |= {"positions", "attention_mask"}

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None):
        if cache is not None:
            raise ValueError("cache must be None: a policy made by from_logits keeps no cache")
        if segment_ids is not None and "segment_ids" not in takes and "attention_mask" in takes:
            attention_mask = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
            segment_ids = None
        given = {"positions": positions, "segment_ids": segment_ids, "attention_mask": attention_mask}
        given = {name: value for name, value in given.items() if value is not None}
        if not given.keys() <= takes:
            missing = ", ".join(sorted(given.keys() - takes))
            raise ValueError(f"apply_fn of from_logits takes no {missing}; apply it to rows without padding or packing")
        return apply_fn(params, tokens, **given), None

    return Policy(_no_init if init is None else init, apply, lambda params: _Identity(), tree)


def from_nnx(module: nnx.Module) -> Policy:
    """A policy from a flax nnx module called as `module(tokens[R, N]) -> logits[R, N, V]`.

    Args:
      module: causal; as in `from_logits`, `positions`, `segment_ids` and `attention_mask` are passed if `__call__` names them.
        Call `module.eval()` first if it has dropout: its random state is frozen here.

    Returns:
      Policy whose parameters are the module's `nnx.Param` state; `init` ignores its key and returns the state of now.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def apply_fn(params, tokens, **keywords):
        return nnx.merge(graph, params, rest)(tokens, **keywords)

    apply_fn.__signature__ = inspect.signature(type(module).__call__)
    return from_logits(apply_fn, lambda key: params)


def _keywords(apply_fn: Callable) -> set[str]:
    """Those of the optional arguments of `Policy.apply` that the function names."""
    try:
        named = set(inspect.signature(apply_fn).parameters)
    except (TypeError, ValueError):  # some builtins and compiled functions have no signature
        return set()
    return named & {"positions", "segment_ids", "attention_mask"}


def _no_init(key: jax.Array) -> Params:
    raise ValueError("from_logits was given no init, so it cannot make parameters; pass init=, or use your own parameters")
