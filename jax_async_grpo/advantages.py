"""Advantages from rewards: relative to a group of G, scaled by the batch, or whitened token by token.

Group-relative functions map rewards[..., G] to advantages[..., G] and treat the members of a group alike; the leading axes are
prompts. A group of equal rewards, a lone reward (G = 1) included, has advantage exactly 0: there is nothing to compare with.
Functions with an `axis_name` take a statistic over the whole batch: they couple prompts, so the exact oracle refuses them, and
a batch that is sharded over that mapped axis (whole groups on each shard) gives what the unsharded batch gives.
Rewards may be bfloat16, float32 or integers; at least float32 is computed and returned.

Formulas, conventions of other systems, what each is called there: docs/advantages.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.losses.arguments import check_positive, token_inputs, valid_only

__all__ = [
    "batch_scaled",
    "gpg",
    "group_centered",
    "group_normalized",
    "leave_one_out",
    "length_weighted",
    "masked_whiten",
    "maxrl",
    "overlong_penalty",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_to_go",
]


def group_centered(rewards: jax.Array) -> jax.Array:
    """A_i = R_i − mean(R): the mean-centered advantage ("Dr. GRPO", arXiv 2503.20783).

    Args:
      rewards: [..., G].

    Returns:
      [..., G], zero in sum; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: rewards has no group axis, or a group has no members.
    """
    rewards = _as_groups(rewards)
    centered = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    # The mean of G equal floats need not be that float: rounding must not turn into a learning signal.
    return jnp.where(_all_equal(rewards), jnp.zeros((), rewards.dtype), centered)


def group_normalized(rewards: jax.Array, *, ddof: int = 0, epsilon: float = 1e-6) -> jax.Array:
    """A_i = (R_i − mean(R)) / (std(R) + ε): the advantage of GRPO (arXiv 2402.03300).

    Args:
      rewards: [..., G].
      ddof: 0 for the population standard deviation, 1 for the sample one (TRL, verl and tunix use 1).
      epsilon: added to the standard deviation, in reward units; positive.

    Returns:
      [..., G], zero in sum; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: ddof neither 0 nor 1, or epsilon not positive.
    """
    _check_ddof(ddof)
    check_positive(epsilon=epsilon)
    centered = group_centered(rewards)
    return centered / (_group_std(centered, ddof) + epsilon)


def batch_scaled(rewards: jax.Array, *, ddof: int = 0, epsilon: float = 1e-6, axis_name: str | None = None) -> jax.Array:
    """A_i = (R_i − mean of the group) / (std of all rewards of the batch + ε) ("Lite PPO", arXiv 2508.08221).

    Args:
      rewards: [..., G]; the batch is all of it.
      ddof: 0 for the population standard deviation, 1 for the sample one (TRL).
      epsilon: added to the standard deviation, in reward units; positive (TRL 1e-4).
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.

    Returns:
      [..., G], zero in sum over each group; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: ddof neither 0 nor 1, or epsilon not positive.
    """
    _check_ddof(ddof)
    check_positive(epsilon=epsilon)
    rewards = _as_groups(rewards)
    _, variance = _batch_moments(rewards, jnp.ones(rewards.shape, bool), ddof, axis_name)
    return group_centered(rewards) / (_root(variance) + epsilon)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """A_i = R_i − mean of the other members' rewards = G/(G−1)·(R_i − mean(R)) (RLOO, arXiv 2402.14740).

    Args:
      rewards: [..., G].

    Returns:
      [..., G]; exactly 0 in a group of equal rewards.
    """
    centered = group_centered(rewards)
    group_size = centered.shape[-1]
    return centered * (group_size / max(group_size - 1, 1))


def length_weighted(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    """A_i = R_i − Σ_j L_j R_j / Σ_j L_j: the group's baseline weighted by length (OPO, arXiv 2505.23585).

    Args:
      rewards: [..., G].
      lengths: [..., G] tokens of each completion, not negative.

    Returns:
      [..., G], zero in the sum Σ L_i A_i; exactly 0 in a group of equal rewards and in one without a token.

    Raises:
      ValueError: lengths of another shape than rewards, or negative (checked where they are concrete).
    """
    rewards = _as_groups(rewards)
    if lengths is None:
        raise ValueError(f"lengths is None; pass an array of the shape of rewards, {rewards.shape}")
    lengths = jnp.asarray(lengths, rewards.dtype)
    if lengths.shape != rewards.shape:
        raise ValueError(f"lengths has shape {lengths.shape}; it must have the shape of rewards, {rewards.shape}")
    _check_not_negative(lengths=lengths)
    total = jnp.sum(lengths, axis=-1, keepdims=True)
    baseline = jnp.sum(lengths * rewards, axis=-1, keepdims=True) / jnp.where(total > 0, total, 1)
    return jnp.where(_all_equal(rewards) | (total == 0), jnp.zeros((), rewards.dtype), rewards - baseline)


def maxrl(rewards: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """A_i = (R_i − mean(R)) / (mean(R) + ε): the fewer succeed, the more a success weighs (MaxRL, arXiv 2602.02710).

    Args:
      rewards: [..., G], not negative: with rewards 0 and 1 the mean is the rate of success.
      epsilon: added to the mean, in reward units; positive.

    Returns:
      [..., G], zero in sum; exactly 0 in a group of equal rewards. A mean below 0, where rewards were traced, counts as 0.

    Raises:
      ValueError: epsilon not positive, or negative rewards (checked where they are concrete).
    """
    check_positive(epsilon=epsilon)
    rewards = _as_groups(rewards)
    _check_not_negative(rewards=rewards)
    mean = jnp.mean(rewards, axis=-1, keepdims=True)
    return group_centered(rewards) / (jnp.where(mean > 0, mean, 0.0) + epsilon)


def pass_at_k(rewards: jax.Array, *, normalize: bool = False, ddof: int = 0, epsilon: float = 1e-6) -> jax.Array:
    """A_i = max(R_i − max_{j≠i} R_j, 0): only the best of the group learns, by its lead (arXiv 2503.19595).

    Args:
      rewards: [..., G].
      normalize: also divide by std(R) + ε (verl's default).
      ddof: 0 for the population standard deviation, 1 for the sample one (verl).
      epsilon: added to the standard deviation, in reward units; positive.

    Returns:
      [..., G], not negative; exactly 0 where two members share the highest reward, and for G = 1.

    Raises:
      ValueError: ddof neither 0 nor 1, or epsilon not positive.
    """
    _check_ddof(ddof)
    check_positive(epsilon=epsilon)
    rewards = _as_groups(rewards)
    if rewards.shape[-1] == 1:
        return group_centered(rewards)
    first, second = jnp.split(jax.lax.top_k(rewards, 2)[0], 2, axis=-1)
    lead = jnp.where((rewards == first) & (first > second), rewards - second, jnp.zeros((), rewards.dtype))
    return lead / (_group_std(group_centered(rewards), ddof) + epsilon) if normalize else lead


def gpg(
    rewards: jax.Array, *, f_norm: float = 1.0, counted: str = "nonzero_rewards", axis_name: str | None = None
) -> jax.Array:
    """A_i = α·(R_i − mean(R)) / f_norm, α = completions of the batch / those that are counted (GPG, arXiv 2504.02546).

    Args:
      rewards: [..., G]; the batch is all of it.
      f_norm: constant divisor; positive.
      counted: "nonzero_rewards", completions whose reward is not 0 (verl), or "unequal_groups", those in groups whose rewards
        differ, which alone give a gradient (the paper).
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.

    Returns:
      [..., G], zero in sum over each group; exactly 0 in a group of equal rewards.

    Raises:
      ValueError: f_norm not positive, or counted is none of the two.
    """
    check_positive(f_norm=f_norm)
    rewards = _as_groups(rewards)
    chosen = {"nonzero_rewards": rewards != 0, "unequal_groups": ~_all_equal(rewards)}
    if counted not in chosen:
        raise ValueError(f"counted is {counted!r}; it must be one of {', '.join(chosen)}")
    ones = jnp.ones_like(rewards)
    alpha = _total(ones, axis_name) / jnp.maximum(_total(ones * chosen[counted], axis_name), 1)
    return alpha * group_centered(rewards) / f_norm


def reinforce_plus_plus(
    token_rewards: jax.Array,
    mask: jax.Array | None = None,
    *,
    gamma: float = 1.0,
    ddof: int = 0,
    epsilon: float = 1e-8,
    axis_name: str | None = None,
) -> jax.Array:
    """`masked_whiten` of `reward_to_go`: no group, the batch is the baseline (REINFORCE++, arXiv 2501.03262).

    Args:
      token_rewards: [..., L], what each token earned; an outcome reward stands on the last valid token.
      mask: [..., L] bool or 0/1, None = all valid.
      gamma: discount per valid token, in [0, 1].
      ddof, epsilon, axis_name: of `masked_whiten`.

    Returns:
      [..., L], one advantage a token; 0 outside the mask, and everywhere where all returns of the batch are equal.

    Raises:
      ValueError: an option outside its range, or shapes that do not match.
    """
    returns = reward_to_go(token_rewards, mask, gamma=gamma)
    return masked_whiten(returns, mask, ddof=ddof, epsilon=epsilon, axis_name=axis_name)


def reinforce_plus_plus_baseline(
    rewards: jax.Array, mask: jax.Array, *, ddof: int = 0, epsilon: float = 1e-8, axis_name: str | None = None
) -> jax.Array:
    """`masked_whiten` of R_i − mean(R) on every token of completion i (REINFORCE++-baseline, arXiv 2501.03262).

    The whitening subtracts the batch's mean over *tokens*, which is not 0 where lengths go with rewards: then a group of equal
    rewards gets that mean's negative, scaled, as everywhere in the field. It is 0 where every group of the batch is equal.

    Args:
      rewards: [..., G].
      mask: [..., G, L] bool or 0/1.
      ddof, epsilon, axis_name: of `masked_whiten`.

    Returns:
      [..., G, L], one advantage a token; 0 outside the mask.

    Raises:
      ValueError: an option outside its range, or a mask that is not [..., G, L] of the rewards' [..., G].
    """
    centered = group_centered(rewards)
    if mask is None or jnp.shape(mask)[:-1] != centered.shape:
        shape = None if mask is None else jnp.shape(mask)
        raise ValueError(f"mask has shape {shape}; it must be rewards' {centered.shape} and a token axis")
    tokens = jnp.broadcast_to(centered[..., None], jnp.shape(mask))
    return masked_whiten(tokens, mask, ddof=ddof, epsilon=epsilon, axis_name=axis_name)


def reward_to_go(token_rewards: jax.Array, mask: jax.Array | None = None, *, gamma: float = 1.0) -> jax.Array:
    """G_l = r_l + γ·G_{next valid token}: tokens outside the mask neither earn nor discount.

    Args:
      token_rewards: [..., L].
      mask: [..., L] bool or 0/1, None = all valid. Holes (tool output) are stepped over.
      gamma: discount per valid token, in [0, 1].

    Returns:
      [..., L], 0 outside the mask.

    Raises:
      ValueError: gamma outside [0, 1], or shapes that do not match.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must be in [0, 1]")
    token_rewards, valid = token_inputs(mask, token_rewards=token_rewards)
    by_token = jnp.moveaxis(token_rewards, -1, 0), jnp.moveaxis(valid, -1, 0)

    def step(after, token):
        reward, is_valid = token
        here = jnp.where(is_valid, reward + gamma * after, after)
        return here, here

    start = jnp.zeros_like(token_rewards[..., 0])
    _, returns = jax.lax.scan(step, start, by_token, reverse=True)
    return valid_only(jnp.moveaxis(returns, 0, -1), valid)


def masked_whiten(
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    ddof: int = 0,
    epsilon: float = 1e-8,
    axis_name: str | None = None,
) -> jax.Array:
    """(x − mean(x)) / √(var(x) + ε) over all valid positions of the batch.

    Args:
      values: [..., L].
      mask: [..., L] bool or 0/1, None = all valid.
      ddof: 0 for the population variance, 1 for the sample one (verl, TRL, tunix).
      epsilon: added to the *variance*, in squared units of the values; positive.
      axis_name: of a mapped axis over which the batch is sharded, None = this batch is all of it.

    Returns:
      [..., L], 0 outside the mask; exactly 0 everywhere where all valid values are equal.

    Raises:
      ValueError: ddof neither 0 nor 1, epsilon not positive, or shapes that do not match.
    """
    _check_ddof(ddof)
    check_positive(epsilon=epsilon)
    values, valid = token_inputs(mask, values=values)
    mean, variance = _batch_moments(values, valid, ddof, axis_name)
    # pmin and pmax have no derivative; a comparison needs none
    compared = jax.lax.stop_gradient(values)
    lowest = jnp.min(jnp.where(valid, compared, jnp.inf), initial=jnp.inf)
    highest = jnp.max(jnp.where(valid, compared, -jnp.inf), initial=-jnp.inf)
    if axis_name is not None:
        lowest, highest = jax.lax.pmin(lowest, axis_name), jax.lax.pmax(highest, axis_name)
    return valid_only((values - mean) / jnp.sqrt(variance + epsilon), valid & (lowest != highest))


def overlong_penalty(lengths: jax.Array, *, max_length: float, buffer: float, penalty: float = 1.0) -> jax.Array:
    """−penalty·clip((L − (max_length − buffer)) / buffer, 0, 1): the soft overlong punishment of DAPO (arXiv 2503.14476).

    Add it to the rewards, before an advantage is computed.

    Args:
      lengths: [...] tokens of each completion.
      max_length: tokens; the longest completion, where the whole penalty is due.
      buffer: tokens; the penalty grows over the last `buffer` tokens, in (0, max_length].
      penalty: reward units; positive.

    Returns:
      [...], in [−penalty, 0].

    Raises:
      ValueError: an option outside its range.
    """
    check_positive(max_length=max_length, buffer=buffer, penalty=penalty)
    if buffer > max_length:
        raise ValueError(f"buffer is {buffer}; it must be at most max_length, {max_length}")
    lengths = jnp.asarray(lengths)
    lengths = lengths.astype(jnp.promote_types(lengths.dtype, jnp.float32))
    return -penalty * jnp.clip((lengths - (max_length - buffer)) / buffer, 0.0, 1.0)


def _as_groups(rewards: jax.Array) -> jax.Array:
    if rewards is None:
        raise ValueError("rewards is None; pass an array [..., G]")
    rewards = jnp.asarray(rewards)
    if rewards.ndim < 1:
        raise ValueError("rewards is a scalar; it must be [..., G], one reward per member of a group")
    if rewards.shape[-1] < 1:
        raise ValueError(f"rewards has shape {rewards.shape}; a group needs at least one member")
    # promoting an integer with float32 would give float32 even where double precision is on
    floating = jnp.issubdtype(rewards.dtype, jnp.floating)
    return rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32) if floating else jnp.result_type(float))


def _all_equal(rewards: jax.Array) -> jax.Array:
    return jnp.all(rewards == rewards[..., :1], axis=-1, keepdims=True)


def _group_std(centered: jax.Array, ddof: int) -> jax.Array:
    # with one member the sum is 0: any divisor but 0 defines it
    return _root(jnp.sum(centered**2, axis=-1, keepdims=True) / max(centered.shape[-1] - ddof, 1))


def _root(variance: jax.Array) -> jax.Array:
    # sqrt has an infinite slope at 0
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


def _batch_moments(values, valid, ddof, axis_name) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the valid values of the batch, scalars; 0 where there is none."""
    count = _total(valid.astype(values.dtype), axis_name)
    mean = _total(valid_only(values, valid), axis_name) / jnp.maximum(count, 1)
    squares = _total(valid_only((values - mean) ** 2, valid), axis_name)
    return mean, squares / jnp.maximum(count - ddof, 1)


def _total(values, axis_name) -> jax.Array:
    summed = jnp.sum(values)
    return summed if axis_name is None else jax.lax.psum(summed, axis_name)


def _check_ddof(ddof):
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; it must be 0 or 1")


def _check_not_negative(**arrays):
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer) and (np.asarray(array) < 0).any():
            raise ValueError(f"{name} hold a negative number; they must be >= 0")
