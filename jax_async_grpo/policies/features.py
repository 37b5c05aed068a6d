"""Policies without attention: a free logit for every (context, token), a linear map of features of it, a hidden layer.

The context of a token is its last `context_length` *visible* tokens, itself included: the k-th last token of n is the visible
token whose position is positions[n] − k + 1. Read this way it is right under padding, packing and a tree of prefixes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.policies.adapters import from_logits
from jax_async_grpo.policies.sizes import check_dtype, check_sizes
from jax_async_grpo.policies.visibility import visibility
from jax_async_grpo.types import Policy

__all__ = ["linear", "mlp", "tabular"]


def tabular(vocab_size: int, context_length: int, *, init_scale: float = 0.0, initial_logits=None, dtype=None) -> Policy:
    """A softmax policy with a free logit for every context and token: z[n, v] = table[context(n), v].

    Args:
      vocab_size: V.
      context_length: tokens of context, c; a missing token is a token of its own, so D = (V+1)^c contexts.
      init_scale: standard deviation of the initial logits; 0 is the uniform policy.
      initial_logits: [V], added to the initial logits of every context; None = zeros.
      dtype: of the table; None is JAX's default float (float64 under `jax_enable_x64`).

    Returns:
      Policy with params {"table": [D, V]}; hidden states are the logits, which are looked up, not multiplied out.

    Raises:
      ValueError: sizes that are no integers of at least 1, D above 2^31 - 1, init_scale negative, initial_logits that are not
        [V], another dtype than a floating one.

    Example:
      >>> tabular(vocab_size=4, context_length=2).init(jax.random.key(0))["table"].shape
      (25, 4)
    """
    _check_sizes(vocab_size, context_length, init_scale, dtype)
    num_contexts = (vocab_size + 1) ** context_length
    if num_contexts >= 2**31:
        raise ValueError(
            f"context_length = {context_length} gives (V+1)^c = {num_contexts} contexts; at most 2^31 - 1 are allowed"
        )

    base = (vocab_size + 1) ** np.arange(context_length, dtype=np.int32)

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None):
        sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
        context = _last_tokens(tokens, positions, sees, context_length, vocab_size)
        return jnp.asarray(params["table"])[jnp.sum(context * base, axis=-1)]

    return from_logits(apply, _table_init(num_contexts, vocab_size, init_scale, dtype, initial_logits))


def linear(
    vocab_size: int,
    context_length: int,
    num_features: int | None = None,
    *,
    seed: int = 0,
    init_scale: float = 0.0,
    dtype=None,
) -> Policy:
    """A softmax policy linear in fixed features of the context, shared by all prompts: z[n, v] = Σ_d f[n, d] table[d, v].

    The features f are a constant 1, the one-hots of each of the last c tokens (a missing token has a code of its own), and
    products of two such one-hots of different tokens, drawn once without replacement.

    Args:
      vocab_size: V.
      context_length: tokens of context, c.
      num_features: D; what exceeds 1 + c·(V+1) is the number of products. None = no products.
      seed: chooses the products; another seed is another policy.
      init_scale: standard deviation of the initial table; 0 is the uniform policy.
      dtype: of the table; None is JAX's default float (float64 under `jax_enable_x64`).

    Returns:
      Policy with params {"table": [D, V]}.

    Raises:
      ValueError: sizes that are no integers of at least 1, num_features smaller than the one-hots or larger than all products
        allow, init_scale negative, another dtype than a floating one.

    Example:
      >>> linear(vocab_size=4, context_length=2, num_features=20).init(jax.random.key(0))["table"].shape
      (20, 4)
    """
    _check_sizes(vocab_size, context_length, init_scale, dtype)
    num_codes = vocab_size + 1
    base = 1 + context_length * num_codes
    num_features = base if num_features is None else num_features
    check_sizes(num_features=num_features)
    most = base + context_length * (context_length - 1) // 2 * num_codes**2
    if not base <= num_features <= most:
        raise ValueError(f"num_features is {num_features}; it must be between {base} (1 + c·(V+1)) and {most} (all products)")
    left, right = _draw_products(num_features - base, context_length, num_codes, seed)

    def features(context: jax.Array, dtype) -> jax.Array:
        one_hots = jax.nn.one_hot(context, num_codes, dtype=dtype).reshape(*context.shape[:-1], -1)
        bias = jnp.ones((*context.shape[:-1], 1), dtype)
        return jnp.concatenate([bias, one_hots, one_hots[..., left] * one_hots[..., right]], axis=-1)

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None):
        if cache is not None:
            raise ValueError("cache must be None: a linear policy keeps no cache")
        sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
        context = _last_tokens(tokens, positions, sees, context_length, vocab_size)
        return features(context, params["table"].dtype), None

    return Policy(_table_init(num_features, vocab_size, init_scale, dtype), apply, lambda params: params["table"])


def mlp(vocab_size: int, context_length: int, *, width: int = 32, dtype=None) -> Policy:
    """A softmax policy with one hidden layer over the one-hots of the context: h = tanh(f W + b), z = h U.

    The smallest policy here that is nonlinear in its parameters: like a transformer, and unlike `linear`, it can be driven to
    where its hidden units saturate and learning ends.

    Args:
      vocab_size: V.
      context_length: tokens of context, c; f are the c·(V+1) one-hots of `linear`.
      width: D, hidden units.
      dtype: of the parameters; None is JAX's default float.

    Returns:
      Policy with params {"hidden": [c·(V+1), D], "bias": [D], "unembedding": [D, V]}: normal with standard deviation
      1/√c (c of the inputs are 1) and 1/√D, the bias 0.

    Raises:
      ValueError: sizes that are no integers of at least 1, another dtype than a floating one, (when applied) a cache.

    Example:
      >>> mlp(vocab_size=4, context_length=2, width=8).init(jax.random.key(0))["hidden"].shape
      (10, 8)
    """
    _check_sizes(vocab_size, context_length, 0.0, dtype)
    check_sizes(width=width)
    num_codes = vocab_size + 1

    def init(key: jax.Array) -> dict[str, jax.Array]:
        chosen = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
        hidden_key, output_key = jax.random.split(key)
        return {
            "hidden": context_length**-0.5 * jax.random.normal(hidden_key, (context_length * num_codes, width), chosen),
            "bias": jnp.zeros(width, chosen),
            "unembedding": width**-0.5 * jax.random.normal(output_key, (width, vocab_size), chosen),
        }

    def apply(params, tokens, *, positions=None, segment_ids=None, attention_mask=None, cache=None):
        if cache is not None:
            raise ValueError("cache must be None: an mlp policy keeps no cache")
        sees = visibility(tokens, segment_ids=segment_ids, attention_mask=attention_mask)
        context = _last_tokens(tokens, positions, sees, context_length, vocab_size)
        rows = jnp.asarray(params["hidden"])[context + num_codes * jnp.arange(context_length)]  # f W, looked up
        return jnp.tanh(rows.sum(axis=-2) + params["bias"]), None

    return Policy(init, apply, lambda params: params["unembedding"])


def _table_init(num_rows: int, vocab_size: int, init_scale: float, dtype, initial_logits=None) -> Callable:
    if initial_logits is not None and np.shape(initial_logits) != (vocab_size,):
        raise ValueError(f"initial_logits has shape {np.shape(initial_logits)}; it must be [V] = ({vocab_size},)")

    def init(key: jax.Array) -> dict[str, jax.Array]:
        shape = (num_rows, vocab_size)
        chosen = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
        table = init_scale * jax.random.normal(key, shape, chosen) if init_scale else jnp.zeros(shape, chosen)
        return {"table": table if initial_logits is None else table + jnp.asarray(initial_logits, chosen)}

    return init


def _last_tokens(tokens, positions, sees, context_length: int, vocab_size: int) -> jax.Array:
    """[..., N, c] codes of the last c visible tokens, the newest first: token + 1, and 0 for a missing one."""
    positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    codes = jnp.clip(tokens.astype(jnp.int32), -1, vocab_size - 1) + 1
    behind = positions[..., :, None] - positions[..., None, :]  # how many tokens the column lies behind the row
    wanted = (behind[..., None, :] == jnp.arange(context_length)[:, None]) & sees[..., None, :]  # [..., N, c, N]
    return jnp.sum(jnp.where(wanted, codes[..., None, None, :], 0), axis=-1).astype(jnp.int32)


def _draw_products(count: int, context_length: int, num_codes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the [c·(V+1)] one-hots of the two factors of each product."""
    first, second = np.triu_indices(context_length, k=1)
    draws = np.random.default_rng(seed).choice(len(first) * num_codes**2, size=count, replace=False)
    pair, codes = np.divmod(draws, num_codes**2)
    left, right = np.divmod(codes, num_codes)
    return first[pair] * num_codes + left, second[pair] * num_codes + right


def _check_sizes(vocab_size: int, context_length: int, init_scale: float, dtype) -> None:
    check_sizes(vocab_size=vocab_size, context_length=context_length)
    if dtype is not None:
        check_dtype(dtype)
    if not init_scale >= 0:
        raise ValueError(f"init_scale is {init_scale}; it must be >= 0")
