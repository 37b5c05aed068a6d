"""Mean and variance of the *sampled* surrogate gradient, exactly: what one batch scatters by, without drawing one.

A batch is one group of G completions for each of B prompts, ĝ = (1/BG) Σ_b Σ_i J_i^T g(y_i, c_i), with g the derivative of the
aggregated loss in the completion's log-probs, J_i their derivative in θ and c_i the counts of the other members' rewards.
Prompts are independent; two members i ≠ j of a group see each other in their counts, and given their two reward levels k, l and
the counts c of the other G−2 they are independent:

    E‖ĝ_b‖² = (1/G)·E‖J^T g(y, c)‖² + (1 − 1/G)·Σ_{k,l} Σ_c Multinomial(c; G−2, p)·⟨V_k(c + e_l), V_l(c + e_k)⟩,
    V_k(c) = Σ_{y: R(y) = ρ_k} π_φ(y)·J_y^T g(y, c).

That is a sum over Y·C + n²·C terms in place of Y^G. Everything is checked against enumeration of the groups and Monte Carlo.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jax_async_grpo import compositions
from jax_async_grpo.closed_form import Groups
from jax_async_grpo.exact import task_logprobs
from jax_async_grpo.types import Params, Policy, Task

__all__ = ["GradientMoments", "gradient_moments", "logprob_jacobian", "cut_fraction"]


class GradientMoments(NamedTuple):
    """Of the gradient of one batch, over the draw of its groups.

    Attributes:
      mean: [D], the surrogate gradient H(θ,φ), ascent direction.
      variance: scalar, E‖ĝ − H‖², the trace of the covariance.
    """

    mean: jax.Array
    variance: jax.Array


def logprob_jacobian(policy: Policy, params: Params, task: Task) -> jax.Array:
    """[B, Y, L, D]: ∂ log π_θ(y_l) in every parameter, in the order of `jax.flatten_util.ravel_pytree`; for small policies."""
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda x: task_logprobs(policy, unravel(x), task))(flat)


def gradient_moments(groups: Groups, jacobian: jax.Array, gradients: jax.Array) -> GradientMoments:
    """The exact mean and variance of ĝ.

    Args:
      groups: `closed_form.enumerate_groups` of the arguments of `exact.surrogate_objective`. One policy draws all members of a
        group, so the own probabilities and the statistics must be of the same role.
      jacobian: [B, Y, L, D], `logprob_jacobian` at θ.
      gradients: [B, Y, C, L], `closed_form.row_gradients`.

    Returns:
      GradientMoments.
    """
    rows = jnp.einsum("bycl,byld->bycd", gradients, jacobian)
    group_size = int(groups.counts[0].sum()) + 1
    mean = jnp.einsum("by,bc,bycd->bd", groups.own, groups.others, rows)
    square = jnp.einsum("by,bc,byc->b", groups.own, groups.others, jnp.sum(rows**2, axis=-1)) / group_size
    if group_size > 1:
        square += (1 - 1 / group_size) * _cross_moment(groups, rows)
    num_prompts = rows.shape[0]
    variance = jnp.sum(square - jnp.sum(mean**2, axis=-1)) / num_prompts**2
    return GradientMoments(jnp.mean(mean, axis=0), jnp.maximum(variance, 0.0))


def cut_fraction(groups: Groups, gradients: jax.Array, doubled: jax.Array) -> jax.Array:
    """Expected share of the tokens with A ≠ 0 that the advantage does not reach: what a clip, a mask or a band has cut off.

    Their gradient is the same whatever the size of the advantage: 0, or that of a penalty.

    Args:
      groups: as in `gradient_moments`.
      gradients: [B, Y, C, L], `closed_form.row_gradients`.
      doubled: the same with every advantage doubled.

    Returns:
      Scalar in [0, 1]; for `losses.ppo_clip` this is the expected `pg_clipfrac` among tokens with an advantage.
    """
    counted = groups.mask[:, :, None, :] & (groups.advantages != 0)[..., None]
    weights = groups.own[:, :, None, None] * groups.others[:, None, :, None] * counted
    total = jnp.sum(weights)
    return jnp.sum(weights * (gradients == doubled)) / jnp.where(total > 0, total, 1.0)


def _cross_moment(groups: Groups, rows: jax.Array) -> jax.Array:
    """[B]: E⟨J_i^T g_i, J_j^T g_j⟩ of two different members of a group."""
    counts = groups.counts
    num_levels = counts.shape[1]
    index_of = {tuple(row): index for index, row in enumerate(counts.tolist())}
    rest = compositions.enumerate_compositions(num_levels, int(counts[0].sum()), len(counts))
    # plus_one[c, l]: where the counts of the other G−2 and one more member at level l stand among those of G−1
    plus_one = np.array([[index_of[tuple(row + unit)] for unit in np.eye(num_levels, dtype=int)] for row in rest])
    member = jax.nn.one_hot(groups.level_index, num_levels, dtype=rows.dtype)
    by_level = jnp.einsum("by,byn,bycd->bncd", groups.own, member, rows)  # V_k(c)
    seen = by_level[:, :, plus_one]  # [B, k, C', l, D]: V_k(c + e_l)
    products = jnp.einsum("bkcld,blckd->bc", seen, seen)
    return jnp.sum(compositions.composition_probabilities(groups.level_probabilities, rest) * products, axis=-1)
