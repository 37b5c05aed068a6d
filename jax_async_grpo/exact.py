"""The exact oracle: surrogate objective, its gradients and J by enumerating the completions of every prompt.

For an aggregation that weights each row by its own mask alone and an advantage that treats the other members of a group
alike, the other G−1 members matter only through the *counts* of their rewards. With the reward levels ρ_1..ρ_n and
p_k(x) = Σ_y π(y|x)·1[R(x,y) = ρ_k] (arXiv 2607.01083, surrogate L(θ,φ); the closed form is this project's):

    L(θ,φ) = −E_x Σ_y π_φ(y|x) Σ_c Multinomial(c; G−1, p(·|x)) · agg_l ℓ( log π_θ(y_l), log π_φ(y_l), A(R(y), c) )

for any per-token loss ℓ, at a cost of Y·C instead of Y^G, where C = (G−1+n−1 choose n−1). What cannot be separated this way
(a token mean over rows of unequal length, an advantage normalized over the batch, ...) is found by probing the functions
and refused; `brute_force_objective` sums over all Y^G groups and takes those too.

The behavior policy enters in three *roles*, which may be given apart: it draws the own completion (`sampling`), it is the
ratio's denominator (`behavior_logprobs`), and it draws the other members of the group, hence the advantage's statistics
(`statistics`). All results are exact up to rounding: use float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import closed_form, compositions, losses
from jax_async_grpo.aggregation import sequence_mean, sequence_sum
from jax_async_grpo.policies import completion_logprobs
from jax_async_grpo.separability import named_parameters
from jax_async_grpo.types import Params, Policy, Task, check_params_alike

__all__ = [
    "brute_force_objective",
    "clip_fraction",
    "expected_reward",
    "off_policy",
    "surrogate_gradient",
    "surrogate_objective",
    "surrogate_objective_of_params",
    "task_logprobs",
    "total_gradient",
]


def surrogate_objective(
    learner_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    rewards: jax.Array,
    mask: jax.Array | None = None,
    *,
    group_size: int,
    loss_fn: Callable,
    advantage_fn: Callable,
    aggregation_fn: Callable = sequence_mean,
    reward_levels=None,
    proximal_logprobs: jax.Array | None = None,
    sampling_logprobs: jax.Array | None = None,
    statistics_logprobs: jax.Array | None = None,
    detached_logprobs: jax.Array | None = None,
    loss_inputs: Mapping[str, jax.Array] | None = None,
    max_compositions: int = 5000,
) -> jax.Array:
    """L(θ,φ) of the module's docstring, exactly; differentiable in every log-prob argument, each on its own.

    Args:
      learner_logprobs: [B, Y, L] log π_θ of every token of every completion, nats.
      behavior_logprobs: [B, Y, L] log π_φ; the ratio's denominator, and the default of the other two roles.
      rewards: [B, Y], concrete unless `reward_levels` is given.
      mask: [B, Y, L] or [Y, L] bool or 0/1, None = all valid.
      group_size: G.
      loss_fn: `loss_fn(logprobs[N, L], old_logprobs[N, L], advantages[N], mask[N, L], **loss_inputs) -> [N, L]`, minimized.
        If it has a parameter named `behavior_logprobs` or `detached_logprobs` it gets that array too.
      advantage_fn: rewards[..., G] -> advantages[..., G].
      aggregation_fn: (values[N, L], mask[N, L]) -> `MaskedSum`.
      reward_levels: the distinct rewards, where `rewards` is traced. A reward that is none of them makes the result NaN.
      proximal_logprobs: [B, Y, L], replaces the ratio's denominator (decoupled PPO).
      sampling_logprobs: [B, Y, L], draws the own completion.
      statistics_logprobs: [B, Y, L], draws the other G−1 members.
      detached_logprobs: [B, Y, L], what a loss that detaches the learner uses; default `learner_logprobs` behind a
        stop_gradient. Pass them to differentiate H in θ, detached part included.
      loss_inputs: further [B, Y, L] arrays, handed to `loss_fn` by name (a reference policy's log-probs, say).
      max_compositions: the largest C allowed.

    Returns:
      Scalar, in the units of advantage; to be *ascended*: minus the expected aggregated loss.

    Raises:
      ValueError: shapes that do not match, NaN rewards, concrete log-probs whose completions do not sum to 1 (1e-8 in float64),
        too many compositions, or a function that couples rows.
    """
    groups = closed_form.enumerate_groups(
        learner_logprobs,
        behavior_logprobs,
        rewards,
        mask,
        group_size=group_size,
        loss_fn=loss_fn,
        advantage_fn=advantage_fn,
        aggregation_fn=aggregation_fn,
        reward_levels=reward_levels,
        proximal_logprobs=proximal_logprobs,
        sampling_logprobs=sampling_logprobs,
        statistics_logprobs=statistics_logprobs,
        detached_logprobs=detached_logprobs,
        loss_inputs=loss_inputs,
        max_compositions=max_compositions,
    )
    terms = closed_form.row_terms(groups, loss_fn, aggregation_fn)
    return -jnp.mean(jnp.einsum("by,bc,byc->b", groups.own, groups.others, terms))


def brute_force_objective(
    learner_logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    rewards: jax.Array,
    mask: jax.Array | None = None,
    *,
    group_size: int,
    loss_fn: Callable,
    advantage_fn: Callable,
    aggregation_fn: Callable = sequence_mean,
    proximal_logprobs: jax.Array | None = None,
    sampling_logprobs: jax.Array | None = None,
    statistics_logprobs: jax.Array | None = None,
    detached_logprobs: jax.Array | None = None,
    loss_inputs: Mapping[str, jax.Array] | None = None,
    max_groups: int = 1_000_000,
) -> jax.Array:
    """The same L(θ,φ) as a sum over all Y^G groups: the check of `surrogate_objective`, and the oracle of coupled functions.

    Without separate roles the rows of a group are aggregated together, so functions that couple the rows *of a group* are
    right here; one that couples groups (a batch statistic) sees one group at a time and is not. With
    `sampling_logprobs` or `statistics_logprobs` each member in turn is the own completion:
    (1/G) Σ_i π_samp(y_i) Π_{j≠i} π_stat(y_j) · agg(row i). Arguments and result as in `surrogate_objective`.

    Raises:
      ValueError: what `surrogate_objective` refuses, but for functions that couple rows and levels; or more than `max_groups`
        groups.
    """
    sampling, denominator, statistics, inputs = closed_form.assign_roles(
        learner_logprobs,
        behavior_logprobs,
        proximal_logprobs,
        sampling_logprobs,
        statistics_logprobs,
        detached_logprobs,
        loss_fn,
        loss_inputs,
    )
    mask = closed_form.full_mask(mask, jnp.shape(learner_logprobs))
    compositions.check_rewards(rewards, jnp.shape(learner_logprobs)[:2])
    compositions.check_group_size(group_size)
    closed_form.completion_probabilities(learner_logprobs, mask)
    own, others = (closed_form.completion_probabilities(role, mask) for role in (sampling, statistics))
    num_completions = jnp.shape(learner_logprobs)[1]
    if num_completions**group_size > max_groups:
        raise ValueError(f"Y^G = {num_completions}^{group_size} groups exceed max_groups = {max_groups}; lower Y or group_size")
    groups = np.indices((num_completions,) * group_size).reshape(group_size, -1).T  # [Y^G, G]
    split_roles = sampling_logprobs is not None or statistics_logprobs is not None

    def of_prompt(learner, old, own, other, reward, valid, extra):
        def of_group(index):
            values = loss_fn(
                learner[index], old[index], advantage_fn(reward[index]), valid[index], **{k: v[index] for k, v in extra.items()}
            )
            if jnp.shape(values) != valid[index].shape:
                raise ValueError(f"loss_fn returns shape {jnp.shape(values)}; it must be per token, {valid[index].shape}")
            if not split_roles:
                return jnp.prod(own[index]) * aggregation_fn(values, valid[index]).mean()
            # row i: its own role for member i, the statistics role for the others
            members = jnp.where(jnp.eye(group_size, dtype=bool), own[index][:, None], other[index][None, :])
            rows = jax.vmap(lambda value, row_mask: aggregation_fn(value[None], row_mask[None]).mean())(values, valid[index])
            return jnp.dot(jnp.prod(members, axis=-1), rows) / group_size

        return jnp.sum(jax.vmap(of_group)(groups))

    rewards = jnp.asarray(rewards, jnp.result_type(float))  # integers would cost the advantage digits
    per_prompt = jax.vmap(of_prompt)(learner_logprobs, denominator, own, others, rewards, mask, inputs)
    return -jnp.mean(per_prompt)


def task_logprobs(policy: Policy, params: Params, task: Task) -> jax.Array:
    """log π(y_l | x, y_<l) of every completion of the task: [B, Y, L] nats, 0 where the task's mask is False."""
    return completion_logprobs(
        policy, params, task.prompts, task.completions, task.mask, prompt_mask=task.prompt_mask, allowed=task.allowed
    )


def surrogate_objective_of_params(
    policy: Policy,
    learner_params: Params,
    behavior_params: Params,
    task: Task,
    *,
    sampling_params: Params | None = None,
    statistics_params: Params | None = None,
    detached_params: Params | None = None,
    **algorithm,
) -> jax.Array:
    """L(θ,φ) of a policy on a task; differentiable in every parameter argument on its own.

    Args:
      policy: the policy.
      learner_params: θ.
      behavior_params: φ, the ratio's denominator and the default of the other two roles.
      task: its Y completions carry all the probability.
      sampling_params: draw the own completion.
      statistics_params: draw the other members of the group.
      detached_params: θ for the detached part of losses that have one; default `learner_params`.
      **algorithm: `group_size`, `loss_fn`, `advantage_fn`, `aggregation_fn`, ... of `surrogate_objective`.

    Returns:
      Scalar, to be ascended.

    Raises:
      ValueError: parameters that differ in structure or shapes, or without leaves; what `surrogate_objective` refuses.
    """
    given = dict(learner_params=learner_params, behavior_params=behavior_params, sampling_params=sampling_params)
    given |= dict(statistics_params=statistics_params, detached_params=detached_params)
    check_params_alike(**{name: params for name, params in given.items() if params is not None})

    def logprobs(params):
        return None if params is None else task_logprobs(policy, params, task)

    return surrogate_objective(
        logprobs(learner_params),
        logprobs(behavior_params),
        task.rewards,
        task.mask,
        sampling_logprobs=logprobs(sampling_params),
        statistics_logprobs=logprobs(statistics_params),
        detached_logprobs=logprobs(detached_params),
        **algorithm,
    )


def surrogate_gradient(
    policy: Policy,
    learner_params: Params,
    behavior_params: Params,
    task: Task,
    *,
    loss_fn: Callable,
    sampling_params: Params | None = None,
    statistics_params: Params | None = None,
    **algorithm,
) -> Params:
    """H(θ,φ) = ∂_θ L(θ,φ) with φ held fixed, exactly: what an asynchronous learner uses (arXiv 2607.01083).

    Differentiable again in θ and in φ, which is how `bias` predicts δ to first order. Arguments as in
    `surrogate_objective_of_params`.

    Returns:
      A pytree like `learner_params`, in the ascent direction.
    """

    def objective(params):
        return surrogate_objective_of_params(
            policy,
            params,
            behavior_params,
            task,
            sampling_params=sampling_params,
            statistics_params=statistics_params,
            detached_params=learner_params if "detached_logprobs" in named_parameters(loss_fn) else None,
            loss_fn=loss_fn,
            **algorithm,
        )

    return jax.grad(objective)(learner_params)


def total_gradient(policy: Policy, params: Params, task: Task, **algorithm) -> Params:
    """d/dθ L(θ,θ) = H(θ,θ) + ∂_φ L(θ,φ)|_{φ=θ}: a different object from H (arXiv 2607.01083), kept to show the difference.

    It vanishes where the loss is −c·A at ratio 1, advantages sum to zero in every group and every row has the same total
    weight. A loss that detaches the learner keeps its detached part fixed here too. Arguments as in `surrogate_gradient`.
    """
    return jax.grad(lambda both: surrogate_objective_of_params(policy, both, both, task, **algorithm))(params)


def expected_reward(policy: Policy, params: Params, task: Task, *, rewards: jax.Array | None = None) -> jax.Array:
    """J(θ) = E_x Σ_y π_θ(y|x)·R(x,y), exactly.

    Args:
      policy: the policy.
      params: θ.
      task: prompts and completions.
      rewards: [B, Y], default `task.rewards`; pass `task.gold_rewards` for what the policy is judged on.

    Returns:
      Scalar in reward units.
    """
    probabilities = jnp.exp(jnp.sum(task_logprobs(policy, params, task), axis=-1))
    return jnp.mean(jnp.sum(probabilities * jnp.asarray(task.rewards if rewards is None else rewards), axis=-1))


def off_policy(policy: Policy, learner_params: Params, behavior_params: Params, task: Task) -> dict[str, jax.Array]:
    """How far π_θ is from π_φ on a task, exactly. KL, TV of completions (`metrics` has tokens).

    With w = π_θ(y|x)/π_φ(y|x) of whole completions and r of tokens, means over prompts:
    * `off_policy/kl`: E_φ[−log w] = KL(π_φ‖π_θ), nats a completion; the mean of k3 too, as E_φ[w] = 1
    * `off_policy/ess_ratio`: 1 / E_φ[w²], the limit of ESS/N for many completions
    * `off_policy/second_moment`: E_φ[Σ_l (log r_l)²] / E_φ[L], nats² (M2PO)
    * `off_policy/tv`: ½ Σ_y |π_θ − π_φ|
    * `entropy`: E_θ[−log π_θ], nats a completion

    Args:
      policy: the policy.
      learner_params: θ.
      behavior_params: φ.
      task: its Y completions carry all the probability.

    Returns:
      dict of scalars.
    """
    learner, behavior = (task_logprobs(policy, params, task) for params in (learner_params, behavior_params))
    own, drawn = jnp.sum(learner, axis=-1), jnp.sum(behavior, axis=-1)
    probability = jnp.exp(drawn)

    def expected(values):
        return jnp.mean(jnp.sum(probability * values, axis=-1))

    return {
        "off_policy/kl": expected(drawn - own),
        "off_policy/ess_ratio": 1 / jnp.mean(jnp.sum(jnp.exp(2 * own - drawn), axis=-1)),  # φ's weight inside: never 0·inf
        "off_policy/second_moment": expected(jnp.sum((learner - behavior) ** 2, axis=-1))
        / expected(jnp.sum(task.mask, axis=-1)),
        "off_policy/tv": 0.5 * jnp.mean(jnp.sum(jnp.abs(jnp.exp(own) - probability), axis=-1)),
        "entropy": -jnp.mean(jnp.sum(jnp.exp(own) * own, axis=-1)),
    }


def clip_fraction(
    policy: Policy,
    learner_params: Params,
    behavior_params: Params,
    task: Task,
    *,
    group_size: int,
    advantage_fn: Callable,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> jax.Array:
    """Expected clipped tokens over expected tokens of a group drawn from φ: the exact `pg_clipfrac` of PPO-clip.

    The R_batch of arXiv 2607.01083 is read off this number. Arguments as in `surrogate_gradient`; the epsilons are the clip's.

    Returns:
      Scalar in [0, 1].
    """

    def clipped(logprobs, old_logprobs, advantages, mask):
        return losses.clipped_tokens(
            logprobs, old_logprobs, advantages, mask, epsilon_low=epsilon_low, epsilon_high=epsilon_high
        )

    num_clipped = -surrogate_objective_of_params(
        policy,
        learner_params,
        behavior_params,
        task,
        group_size=group_size,
        loss_fn=clipped,
        advantage_fn=advantage_fn,
        aggregation_fn=sequence_sum,
    )
    own = jnp.exp(jnp.sum(task_logprobs(policy, behavior_params, task), axis=-1))
    return num_clipped / jnp.mean(jnp.sum(own * jnp.sum(task.mask, axis=-1), axis=-1))
