"""Log-probabilities of given completions under a policy: of sampled rows, and of enumerated completions that share prefixes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.policies.prefix_tree import PrefixTree, prefix_tree
from jax_async_grpo.policies.visibility import visibility
from jax_async_grpo.types import Params, Policy

__all__ = ["completion_hidden", "completion_logprobs", "logits_of", "token_logprobs"]


def token_logprobs(
    policy: Policy,
    params: Params,
    prompts: jax.Array,
    completions: jax.Array,
    mask: jax.Array | None = None,
    *,
    prompt_mask: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """log π_θ of every completion token, one row a completion (the log-probs of the ratios in arXiv 2607.01083).

    log π_θ(y_l | x, y_<l) = z_l[y_l] − log Σ_{v allowed at l} exp z_l[v],  z_l = logits after the prompt and y_<l

    Tokens whose mask is False are treated as absent: nothing sees them and positions do not count them.

    Args:
      policy: the policy.
      params: its parameters.
      prompts: [B, P] int.
      completions: [B, G, L] int.
      mask: [B, G, L] bool or 0/1, True on the completion's tokens, None = all.
      prompt_mask: [B, P] bool or 0/1, False on padding, None = all. Every prompt needs a valid token.
      allowed: [L, V] bool or 0/1, the tokens that may stand at each position, None = all.

    Returns:
      [B, G, L] nats, in the parameters' precision (at least float32); exactly 0 where the mask is False, −inf for a token that
      is not allowed.

    Raises:
      ValueError: shapes or dtypes that do not match, masks that are not 0/1, a valid completion token that is not allowed
        (values are checked where they are concrete).

    Example:
      >>> policy = tabular(vocab_size=4, context_length=2)
      >>> params = policy.init(jax.random.key(0))
      >>> prompts, completions = np.array([[0]]), np.array([[[1, 3]]])
      >>> logprobs = jax.jit(lambda p: token_logprobs(policy, p, prompts, completions))(params)  # uniform over 4 tokens
      >>> np.asarray(logprobs).round(3).tolist()
      [[[-1.386, -1.386]]]
    """
    hidden = completion_hidden(policy, params, prompts, completions, mask, prompt_mask=prompt_mask)
    valid = _as_mask("mask", mask, completions.shape)
    allowed = _check_allowed(allowed, completions.shape[-1])
    logits = _logits(policy, params, hidden, allowed)  # [B, G, L, V]
    _check_choices(completions, valid, allowed, logits.shape[-1])
    tokens = jnp.asarray(completions) if valid is None else jnp.where(valid, completions, 0)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    if allowed is None:
        logprobs = own - jax.nn.logsumexp(logits, axis=-1)
    else:
        allowed = jnp.asarray(allowed)
        logprobs = own - jax.nn.logsumexp(logits, axis=-1, where=allowed)
        logprobs = jnp.where(allowed[jnp.arange(tokens.shape[-1]), tokens], logprobs, -jnp.inf)
    return logprobs if valid is None else jnp.where(valid, logprobs, jnp.zeros((), logprobs.dtype))


def completion_hidden(
    policy: Policy,
    params: Params,
    prompts: jax.Array,
    completions: jax.Array,
    mask: jax.Array | None = None,
    *,
    prompt_mask: jax.Array | None = None,
) -> jax.Array:
    """The hidden states that predict every completion token, for a head that never forms all logits (`head.policy_loss`).

    Args:
      policy, params, prompts, completions, mask, prompt_mask: as in `token_logprobs`.

    Returns:
      [B, G, L, D]; `hidden[b, g, l] @ policy.unembed(params)` are the logits of token l. Where the mask is False, those of
      some other token.

    Raises:
      ValueError: shapes or dtypes that do not match, masks that are not 0/1.
    """
    prompt_valid = _check_prompts(prompts, prompt_mask)
    _check_tokens("completions", completions, 3)
    if completions.shape[0] != prompts.shape[0]:
        raise ValueError(f"completions has {completions.shape[0]} prompts (axis 0), prompts has {prompts.shape[0]}")
    valid = _as_mask("mask", mask, completions.shape)
    before = None if valid is None else valid[..., :-1]
    return _row_hidden(policy, params, prompts, prompt_valid, completions[..., :-1], before)


def completion_logprobs(
    policy: Policy,
    params: Params,
    prompts: jax.Array,
    completions: jax.Array,
    mask: jax.Array | None = None,
    *,
    prompt_mask: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """log π_θ of every token of every enumerated completion, for every prompt; the numbers of `token_logprobs`, sooner.

    The policy is applied once, to [B, P + M] tokens: each prompt followed by the M distinct prefixes of the completions, a
    prefix being one token that sees the prompt and its own ancestors. Prefixes that leave no choice cost nothing. A policy with
    `tree=False` is applied to plain rows instead, one for each prefix that no other continues.

    Args:
      policy: the policy.
      params: its parameters.
      prompts: [B, P] int, padded on the left.
      completions: [Y, L] int, distinct and concrete (under `jit`, close over them).
      mask: [Y, L] bool or 0/1, concrete, True up to the end token, None = all.
      prompt_mask: [B, P] bool or 0/1, False on padding, None = all. The last token of every prompt must be valid.
      allowed: [L, V] bool or 0/1, concrete, the tokens that may stand at each position, None = all.

    Returns:
      [B, Y, L] nats, in the parameters' precision (at least float32); exactly 0 where the mask is False
      or only one token is allowed.

    Raises:
      ValueError: shapes or dtypes that do not match, masks that are not 0/1, traced completions, a valid token that is not
        allowed, equal completions, a prompt that ends in padding (values are checked where they are concrete).

    Example:
      >>> policy = tabular(vocab_size=4, context_length=2)
      >>> params = policy.init(jax.random.key(0))
      >>> prompts, completions, mask = np.array([[0]]), np.array([[0, 3], [1, 3], [3, 0]]), np.array([[1, 1], [1, 1], [1, 0]])
      >>> jax.jit(lambda p: completion_logprobs(policy, p, prompts, completions, mask))(params).shape
      (1, 3, 2)
    """
    prompt_valid = _check_prompts(prompts, prompt_mask)
    if isinstance(prompt_valid, np.ndarray) and not prompt_valid[:, -1].all():
        raise ValueError("prompt_mask must be True on the last token of every prompt: prompts are padded on the left")
    _check_tokens("completions", completions, 2)
    valid = _as_mask("mask", mask, completions.shape)
    allowed = _check_allowed(allowed, completions.shape[-1])
    if isinstance(allowed, jax.core.Tracer):
        raise ValueError("allowed is traced, but completions and what is allowed must be concrete: close over allowed instead")
    tree = prefix_tree(completions, valid, None if allowed is None else allowed.sum(axis=1) > 1)

    node_hidden = _tree_hidden if policy.tree else _path_hidden
    at_node = None if allowed is None else allowed[np.concatenate([[0], tree.depth])]
    logits = _logits(policy, params, node_hidden(policy, params, prompts, prompt_valid, tree), at_node)  # [B, M+1, V]
    _check_choices(completions, valid, allowed, logits.shape[-1])
    if at_node is not None:
        logits = jnp.where(at_node, logits, -jnp.inf)
    of_node = jax.nn.log_softmax(logits, axis=-1)
    # Tokens without a choice read a finite number too, which the mask then drops.
    some_token = 0 if at_node is None else int(at_node[0].argmax())
    logprobs = of_node[:, tree.node, np.where(tree.chosen, completions, some_token)]
    return jnp.where(tree.chosen, logprobs, jnp.zeros((), logprobs.dtype))


def _row_hidden(policy: Policy, params: Params, prompts, prompt_valid, tokens, valid) -> jax.Array:
    """Hidden states that predict tokens[B, R, K] and the token after them: [B, R, K+1, D].

    Valid tokens are moved to the front of their row. Padding then only follows them, so that a causal policy never sees it and
    needs neither positions nor segments, which makes this right for every causal model.
    """
    num_prompt, leading = prompts.shape[-1], tokens.shape[:-1]
    prompt_valid = np.ones(prompts.shape, bool) if prompt_valid is None else prompt_valid
    valid = np.ones(tokens.shape, bool) if valid is None else valid
    host = isinstance(prompt_valid, np.ndarray) and isinstance(valid, np.ndarray)
    xp = np if host else jnp  # known masks are sorted here, or XLA would do it, slowly, while it compiles
    in_prompt = xp.broadcast_to(prompt_valid[:, None], (*leading, num_prompt))
    valid = xp.concatenate([in_prompt, xp.broadcast_to(valid, tokens.shape)], axis=-1)
    rows = jnp.concatenate([jnp.broadcast_to(jnp.asarray(prompts)[:, None], in_prompt.shape), tokens], axis=-1)
    rows = jnp.where(valid, rows, 0)
    if host and not (valid[..., 1:] & ~valid[..., :-1]).any():  # in order already
        return _apply_causal(policy, params, rows)[..., num_prompt - 1 :, :]
    order = xp.argsort(~valid, axis=-1, stable=True)
    last = xp.maximum(xp.cumsum(valid, axis=-1)[..., num_prompt - 1 :] - 1, 0)
    hidden = _apply_causal(policy, params, jnp.take_along_axis(rows, order, axis=-1))
    return jnp.take_along_axis(hidden, last[..., None], axis=-2)


def _apply_causal(policy: Policy, params: Params, rows: jax.Array) -> jax.Array:
    hidden, _ = policy.apply(params, rows.reshape(-1, rows.shape[-1]))
    return hidden.reshape(*rows.shape, hidden.shape[-1])


def _tree_hidden(policy: Policy, params: Params, prompts, prompt_valid, tree: PrefixTree) -> jax.Array:
    """Hidden states of the prompt and of every prefix, [B, M+1, D], from one row of P + M tokens a prompt."""
    batch, num_prompt = prompts.shape
    num_nodes = len(tree.tokens)
    prompt_valid = np.ones(prompts.shape, bool) if prompt_valid is None else prompt_valid
    xp = np if isinstance(prompt_valid, np.ndarray) else jnp  # positions and mask are constants where they can be
    in_prompt = visibility(prompts, segment_ids=jnp.asarray(prompt_valid, jnp.int32))
    node_to_prompt = xp.broadcast_to(prompt_valid[:, None, :], (batch, num_nodes, num_prompt))
    node_to_node = np.broadcast_to(tree.sees, (batch, num_nodes, num_nodes))
    sees = jnp.concatenate(
        [
            jnp.pad(in_prompt, ((0, 0), (0, 0), (0, num_nodes))),
            jnp.concatenate([node_to_prompt, node_to_node], axis=2),
        ],
        axis=1,
    )
    count = xp.cumsum(prompt_valid, axis=1)
    positions = jnp.concatenate([xp.maximum(count - 1, 0), count[:, -1:] + tree.depth - 1], axis=1).astype(jnp.int32)
    nodes = np.broadcast_to(tree.tokens, (batch, num_nodes))
    tokens = jnp.concatenate([jnp.where(prompt_valid, prompts, 0), nodes], axis=1)
    tail = {"tail": num_nodes + 1} if policy.tail else {}
    hidden, _ = policy.apply(params, tokens, positions=positions, attention_mask=sees, **tail)
    return hidden[:, -(num_nodes + 1) :]


def _path_hidden(policy: Policy, params: Params, prompts, prompt_valid, tree: PrefixTree) -> jax.Array:
    """The same [B, M+1, D] from R plain rows a prompt, for policies that take no attention mask."""
    paths = jnp.broadcast_to(tree.paths, (prompts.shape[0], *tree.paths.shape))
    valid = None if tree.path_mask.all() else tree.path_mask
    hidden = _row_hidden(policy, params, prompts, prompt_valid, paths, valid)
    return hidden[:, tree.row, np.concatenate([[0], tree.depth])]


def logits_of(hidden: jax.Array, unembed, *, vocabulary_first: bool = False) -> jax.Array:
    """hidden @ unembed in float32 or wider: a sum of bfloat16 products is not rounded before it is used.

    Args:
      hidden: [..., D]; [R, D] for vocabulary_first.
      unembed: of `Policy.unembed`, [D, V].
      vocabulary_first: multiply the other way round, which is faster on CPUs for few rows.

    Returns:
      [..., V], or [V, R].
    """
    if not isinstance(unembed, jax.Array):  # of a policy whose hidden states are logits
        logits = (hidden @ unembed).astype(jnp.promote_types(hidden.dtype, jnp.float32))
        return logits.T if vocabulary_first else logits
    left, right = (unembed.T, hidden.T) if vocabulary_first else (hidden, unembed)
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, unembed.dtype), jnp.float32)
    return jnp.matmul(left, right, preferred_element_type=wide)


def _logits(policy: Policy, params: Params, hidden: jax.Array, allowed) -> jax.Array:
    logits = logits_of(hidden, policy.unembed(params))
    if allowed is not None and allowed.shape[-1] != logits.shape[-1]:
        raise ValueError(f"allowed has {allowed.shape[-1]} tokens (axis 1), the policy has V = {logits.shape[-1]}")
    return logits


def _check_prompts(prompts, prompt_mask):
    _check_tokens("prompts", prompts, 2)
    if prompts.shape[1] == 0:
        raise ValueError("prompts has P = 0 tokens; the first completion token needs at least one to follow")
    valid = _as_mask("prompt_mask", prompt_mask, prompts.shape)
    if isinstance(valid, np.ndarray):
        if not valid.any(axis=1).all():
            raise ValueError("prompt_mask must be True somewhere in every prompt")
        if valid.all():
            return None
    return valid


def _check_tokens(name: str, tokens, rank: int) -> None:
    axes = {2: "[B, P]" if name == "prompts" else "[Y, L]", 3: "[B, G, L]"}[rank]
    if jnp.ndim(tokens) != rank:
        raise ValueError(f"{name} has shape {jnp.shape(tokens)}; it must be {axes}")
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(f"{name} has dtype {jnp.result_type(tokens)}; token ids must be integers")


def _as_mask(name: str, mask, shape: tuple[int, ...]):
    """None, a host array where the values are known (so that they can be checked and become constants), or a traced one."""
    if mask is None:
        return None
    if jnp.shape(mask) != tuple(shape):
        raise ValueError(f"{name} has shape {jnp.shape(mask)}; it must be {tuple(shape)}")
    if not _is_concrete(mask):
        return jnp.asarray(mask) != 0
    values = np.asarray(mask)
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must be bool or hold only 0 and 1")
    return values.astype(bool)


def _check_allowed(allowed, num_tokens: int):
    if allowed is None:
        return None
    if jnp.ndim(allowed) != 2 or jnp.shape(allowed)[0] != num_tokens:
        raise ValueError(f"allowed has shape {jnp.shape(allowed)}; it must be [L, V] with L = {num_tokens}")
    allowed = _as_mask("allowed", allowed, jnp.shape(allowed))
    if isinstance(allowed, np.ndarray) and not allowed.any(axis=1).all():
        raise ValueError(f"allowed must allow a token at every position; it allows none at {int(allowed.any(axis=1).argmin())}")
    return allowed


def _check_choices(completions, valid, allowed, vocab_size: int) -> None:
    """Refuse a concrete completion with a valid token that cannot stand there: its log-prob would be −inf or NaN."""
    if not all(x is None or _is_concrete(x) for x in (completions, valid, allowed)):
        return
    tokens = np.asarray(completions)
    fine = (tokens >= 0) & (tokens < vocab_size)
    if allowed is not None:
        fine &= allowed[np.arange(tokens.shape[-1]), np.where(fine, tokens, 0)]
    wrong = ~fine if valid is None else ~fine & valid
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"completions{list(where)} is {tokens[where]}, a token that is not allowed there (V = {vocab_size})")


def _is_concrete(array) -> bool:
    """Whether this process can read the values now."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable
