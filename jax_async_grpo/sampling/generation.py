"""Completions drawn token by token from any policy: each prompt read once, then a step a token until every row has ended."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.policies import logits_of
from jax_async_grpo.sampling.choice import choose, log_prob_of, most_probable, sampling_logits
from jax_async_grpo.sampling.noise import completion_keys, exponential_noise
from jax_async_grpo.sampling.readers import make_reader
from jax_async_grpo.types import Params, Policy

__all__ = ["Completions", "generate"]


class Completions(NamedTuple):
    """What was drawn, and with which probability.

    Attributes:
      completions: [B, G, L] int32 token ids, `pad_token` where the mask is False.
      mask: [B, G, L] bool, True up to and including the end token.
      logprobs: [B, G, L] log-probs of the distribution that was really sampled from, nats, 0 where the mask is False.
      policy_logprobs: [B, G, L] log π_φ, nats, 0 where the mask is False: at temperature 1 and without truncation, among the
        allowed tokens; what `policies.token_logprobs` recomputes, and the ratio's denominator.
    """

    completions: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    policy_logprobs: jax.Array


class _Carry(NamedTuple):
    """The loop's state: rows R = B·G; what is drawn is kept as [L, R], so that a step writes one line."""

    length: jax.Array
    tokens: jax.Array
    alive: jax.Array
    state: object
    drawn: Completions


def generate(
    policy: Policy,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array | None,
    key: jax.Array,
    *,
    group_size: int,
    max_length: int,
    end_token: int | None = None,
    pad_token: int = 0,
    prompt_ids: jax.Array | None = None,
    step: jax.Array | int = 0,
    stream: jax.Array | int = 0,
    temperature: jax.Array | float = 1.0,
    top_k: int | None = None,
    top_p: jax.Array | float | None = None,
    greedy: bool = False,
    allowed: jax.Array | None = None,
) -> Completions:
    """Draws G completions of every prompt by the Gumbel-max trick, y_l = argmax_v z_l[v] + g_l[v].

    The noise g of a token is a function of (key, stream, step, prompt id, member, position, vocabulary index) alone: a
    completion depends neither on the other prompts of the batch nor on their order, the padding, the group's size or the
    devices, up to rounding of the logits. Two policies that draw with the same key share their noise: they differ only where
    their logits do by more than the gap between the best two tokens (common random numbers; inverse-CDF sampling parts far
    sooner). Under `jit` the policy, the sizes, `top_k` and `greedy` are static; `temperature`, `top_p`, `step` and `stream` may
    be traced.

    A policy with `init_cache` reads each prompt once and then one token a step; one without reads all of every row at every
    step, which is right for each causal policy and suits small ones.

    Args:
      policy: the policy.
      params: φ.
      prompts: [B, P] int.
      prompt_mask: [B, P] bool or 0/1, False on padding, which may stand anywhere; None = all. Every prompt needs a token.
      key: the root key; it is folded, not consumed, so that a step can be drawn again.
      group_size: G.
      max_length: L; the loop ends sooner if every row has.
      end_token: the id that ends a completion, None = all have length L.
      pad_token: what stands behind an end.
      prompt_ids: [B] int, global ids of the prompts, default their rows. Equal ids draw equal noise.
      step: the learner update that consumes the completions.
      stream: tells independent draws with one key apart (training, evaluation, ...).
      temperature: τ > 0, of softmax(z/τ).
      top_k: draw among the k most probable tokens only; None = all.
      top_p: draw among the fewest tokens that carry probability p, after temperature and top_k; None = all, unsorted.
      greedy: take the most probable token instead. Nothing is random then: temperature, top_k and top_p have no effect and
        `logprobs` are 0.
      allowed: [L, V] bool or 0/1, the tokens that may stand at each position, as in `Task`; None = all.

    Returns:
      Completions. Where temperature, top_k and top_p are left alone, both log-probs are equal.

    Raises:
      ValueError: shapes or dtypes that do not match, a size or top_k below 1, a temperature or top_p out of range, a position
        where nothing is allowed (values are checked where they are concrete), a cache whose rows are no axis of their own.

    Example:
      >>> from jax_async_grpo import policies
      >>> policy = policies.tabular(vocab_size=4, context_length=2)
      >>> params = policy.init(jax.random.key(0))
      >>> prompts, sizes = jnp.array([[0, 1]]), dict(group_size=3, max_length=5)
      >>> drawn = generate(policy, params, prompts, None, jax.random.key(1), end_token=2, **sizes)
      >>> drawn.completions.shape, bool((drawn.logprobs == drawn.policy_logprobs).all())
      ((1, 3, 5), True)
    """
    prompts, prompt_mask, prompt_ids = _check_prompts(prompts, prompt_mask, prompt_ids)
    _check_options(group_size, max_length, temperature, top_k, top_p)
    allowed = _check_allowed(allowed, max_length)
    batch = prompts.shape[0]
    reader = make_reader(policy, params, prompts, prompt_mask, group_size, max_length)
    keys = completion_keys(key, stream, step, prompt_ids, group_size).reshape(batch * group_size, 2)
    unembed = policy.unembed(params)
    changed = top_k is not None or top_p is not None or not _is_one(temperature)
    changes = dict(temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(hidden: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = logits_of(hidden, unembed, vocabulary_first=True)  # [V, R]
        if allowed is not None:
            _check_vocabulary(allowed, logits)
            logits = jnp.where(allowed[length][:, None], logits, -jnp.inf)
        if greedy:
            tokens = most_probable(logits)
            return tokens, jnp.zeros(tokens.shape, logits.dtype), log_prob_of(tokens, logits)
        changed_logits = sampling_logits(logits.T, **changes).T if changed else logits
        tokens, logprobs = choose(changed_logits, exponential_noise(keys, length, logits.shape[0]))
        return tokens, logprobs, log_prob_of(tokens, logits) if changed else logprobs

    def body(carry: _Carry) -> _Carry:
        hidden, state = reader.read(carry.state, carry.tokens, reader.positions + carry.length, carry.alive)
        tokens, *logprobs = draw(hidden, carry.length)
        tokens = jnp.where(carry.alive, tokens, pad_token)
        logprobs = [jnp.where(carry.alive, values, 0) for values in logprobs]
        lines = Completions(tokens, carry.alive, *logprobs)
        drawn = jax.tree.map(lambda kept, line: kept.at[carry.length].set(line), carry.drawn, lines)
        alive = carry.alive if end_token is None else carry.alive & (tokens != end_token)
        return _Carry(carry.length + 1, tokens, alive, state, drawn)

    alive = jnp.ones(reader.tokens.shape, bool)
    dtype = jax.eval_shape(lambda: draw(reader.read(reader.state, reader.tokens, reader.positions, alive)[0], 0))[1].dtype
    shape = (max_length, batch * group_size)
    nothing = Completions(
        jnp.full(shape, pad_token, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    )
    carry = _Carry(jnp.zeros((), jnp.int32), reader.tokens, alive, reader.state, nothing)
    carry = jax.lax.while_loop(lambda c: (c.length < max_length) & jnp.any(c.alive), body, carry)
    return jax.tree.map(lambda lines: lines.T.reshape(batch, group_size, max_length), carry.drawn)


def _is_one(temperature) -> bool:
    return isinstance(temperature, numbers.Real) and temperature == 1


def _check_options(group_size, max_length, temperature, top_k, top_p) -> None:
    for name, value in (("group_size", group_size), ("max_length", max_length), ("top_k", 1 if top_k is None else top_k)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    if _is_concrete(temperature) and not 0 < float(temperature) < np.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive (for the most probable tokens say greedy=True)")
    if top_p is not None and _is_concrete(top_p) and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _check_prompts(prompts, prompt_mask, prompt_ids) -> tuple[jax.Array, jax.Array, jax.Array]:
    if jnp.ndim(prompts) != 2 or 0 in jnp.shape(prompts) or not jnp.issubdtype(jnp.result_type(prompts), jnp.integer):
        raise ValueError(f"prompts is {jnp.result_type(prompts)} of shape {jnp.shape(prompts)}; it must be integers [B, P]")
    shape = jnp.shape(prompts)
    prompt_mask = np.ones(shape, bool) if prompt_mask is None else prompt_mask
    if jnp.shape(prompt_mask) != shape:
        raise ValueError(f"prompt_mask has shape {jnp.shape(prompt_mask)}; it must be that of prompts, {shape}")
    if _is_concrete(prompt_mask) and not (np.asarray(prompt_mask) != 0).any(axis=1).all():
        raise ValueError("prompt_mask must be True somewhere in every prompt")
    prompt_ids = jnp.arange(shape[0], dtype=jnp.int32) if prompt_ids is None else jnp.asarray(prompt_ids)
    if prompt_ids.shape != shape[:1] or not jnp.issubdtype(prompt_ids.dtype, jnp.integer):
        raise ValueError(f"prompt_ids is {prompt_ids.dtype} of shape {prompt_ids.shape}; it must be integers [B] = {shape[:1]}")
    return jnp.asarray(prompts), jnp.asarray(prompt_mask) != 0, prompt_ids


def _check_allowed(allowed, max_length: int) -> jax.Array | None:
    if allowed is None:
        return None
    if jnp.ndim(allowed) != 2 or jnp.shape(allowed)[0] != max_length:
        raise ValueError(f"allowed has shape {jnp.shape(allowed)}; it must be [L, V] with L = max_length = {max_length}")
    if _is_concrete(allowed) and not (np.asarray(allowed) != 0).any(axis=1).all():
        position = int((np.asarray(allowed) != 0).any(axis=1).argmin())
        raise ValueError(f"allowed must allow a token at every position; it allows none at {position}")
    return jnp.asarray(allowed) != 0


def _check_vocabulary(allowed: jax.Array, logits: jax.Array) -> None:
    if allowed.shape[1] != logits.shape[0]:
        raise ValueError(f"allowed has {allowed.shape[1]} tokens (axis 1), the policy has V = {logits.shape[0]}")


def _is_concrete(value) -> bool:
    """Whether this process can read the value now."""
    return not isinstance(value, jax.core.Tracer) and (not isinstance(value, jax.Array) or value.is_fully_addressable)
