"""From logits to a token: temperature, truncation, and the Gumbel-max choice with the log-prob of what it chose.

What runs at every token has the vocabulary as the first axis, [V, R]: a CPU then works on R rows at a time, and the product
that makes the logits reads an output matrix stored as [V, D] as it stands.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["choose", "log_prob_of", "most_probable", "sampling_logits"]

_BLOCK = 128  # tokens


def sampling_logits(
    logits: jax.Array, *, temperature: float | jax.Array = 1.0, top_k: int | None = None, top_p: float | jax.Array | None = None
) -> jax.Array:
    """Logits of the distribution that is sampled from: z/τ, then its top k, then the nucleus of what is left.

    The nucleus is the smallest set of the most probable tokens that carries at least p (Holtzman et al., arXiv 1904.09751). A
    token that ties with the last one kept is kept too. Without top_p the vocabulary is not sorted.

    Args:
      logits: [..., V], −inf where a token is not allowed.
      temperature: τ > 0.
      top_k: how many tokens may be drawn; None = all.
      top_p: p in 0..1, exclusive of 0; None = 1.

    Returns:
      [..., V], −inf outside; not normalized.

    Example:
      >>> jax.nn.softmax(sampling_logits(jnp.log(jnp.array([0.2, 0.5, 0.3])), top_p=0.7)).round(3).tolist()
      [0.0, 0.625, 0.375]
    """
    logits = logits / jnp.asarray(temperature, logits.dtype)
    if top_k is None and top_p is None:
        return logits
    vocab_size = logits.shape[-1]
    if top_k is None:
        best = jnp.sort(logits, axis=-1, descending=True)
    else:
        best = jax.lax.top_k(logits, min(top_k, vocab_size))[0]
    threshold = best[..., -1:] if top_p is None else _nucleus_threshold(best, jnp.asarray(top_p, logits.dtype))
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def choose(logits: jax.Array, exponentials: jax.Array) -> tuple[jax.Array, jax.Array]:
    """argmax_v z_v + g_v, with g = −log E; so a draw from softmax(z), and the log-prob of the drawn token.

    Written as argmax_v exp(z_v − max z)/E_v: the same order without a second logarithm, and without the rounding of a sum.

    Args:
      logits: [V, R], −inf where a token cannot be drawn.
      exponentials: [V, R], standard exponential (`noise.exponential_noise`).

    Returns:
      (tokens [R] int32, log-probs [R] nats).
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=0))
    tokens = most_probable(weights / exponentials)
    return tokens, log_prob_of(tokens, logits)


def log_prob_of(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """log softmax(logits)[V, R] of tokens[R]."""
    largest = jnp.max(logits, axis=0)
    own = jnp.take_along_axis(logits, tokens[None], axis=0)[0]
    return own - largest - jnp.log(jnp.sum(jnp.exp(logits - largest), axis=0))


def most_probable(scores: jax.Array) -> jax.Array:
    """The first index of the largest of scores[V, R], or of a NaN: the largest of each block, then a look into one block.

    XLA's argmax over all of V does not vectorize on a CPU.
    """
    vocab_size, num_rows = scores.shape
    whole = vocab_size // _BLOCK * _BLOCK
    best = jnp.max(scores[:whole].reshape(-1, _BLOCK, num_rows), axis=1)
    if whole < vocab_size:
        best = jnp.concatenate([best, jnp.max(scores[whole:], axis=0, keepdims=True)])
    first = jnp.argmax(best, axis=0).astype(jnp.int32) * _BLOCK
    index = jnp.minimum(first + jnp.arange(_BLOCK, dtype=jnp.int32)[:, None], vocab_size - 1)
    inside = jnp.argmax(jnp.take_along_axis(scores, index, axis=0), axis=0).astype(jnp.int32)
    return first + inside


def _nucleus_threshold(best: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit in the nucleus of best[..., K], which are sorted, largest first."""
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < top_p) | (top_p >= 1)  # the sum may round to 1 before the last token
    return jnp.min(jnp.where(inside, best, jnp.inf), axis=-1, keepdims=True)
