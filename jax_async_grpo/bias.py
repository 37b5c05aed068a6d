"""The staleness bias δ = H(θ,φ) − H(θ,θ): its size, its first-order law, and its parts by role of the behavior policy.

Everything here takes the surrogate gradient as a function `gradient_fn(learner_params, behavior_params) -> pytree`, the H of
arXiv 2607.01083; `exact.surrogate_gradient` is one, a user's own is another. δ compares stale rollouts with the
fresh-rollout counterfactual, the gradient the same learner would have had from rollouts of its own parameters.
Where H cannot be computed, `estimate` (of `estimation`) measures δ from sampled rollouts of any model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo.estimation import BiasEstimate, estimate
from jax_async_grpo.types import Params, check_params_alike

__all__ = [
    "ROLES",
    "BiasEstimate",
    "BiasParts",
    "FirstOrderError",
    "SurrogateBias",
    "check_derivative",
    "check_first_order",
    "decompose",
    "estimate",
    "first_order_bias",
    "role_jvps",
    "shapley_share",
    "surrogate_bias",
]

ROLES = ("sampling", "denominator", "statistics")


class FirstOrderError(ValueError):
    """The surrogate gradient has no first-order law in the behavior policy, or hides it behind a stop_gradient."""


class SurrogateBias(NamedTuple):
    """δ and what it is measured against.

    Attributes:
      bias: δ = H(θ,φ) − H(θ,θ), a pytree like the parameters.
      stale_gradient: H(θ,φ), what the asynchronous learner uses.
      fresh_gradient: H(θ,θ), the counterfactual.
      norm: ‖δ‖, Euclidean over all parameters.
      relative_norm: ‖δ‖/‖H(θ,θ)‖; 0 where δ = 0, inf where only the fresh gradient vanishes.
      cosine: between H(θ,φ) and H(θ,θ); NaN where one of them vanishes.
    """

    bias: Params
    stale_gradient: Params
    fresh_gradient: Params
    norm: jax.Array
    relative_norm: jax.Array
    cosine: jax.Array


class BiasParts(NamedTuple):
    """δ split by the role of the behavior policy that went stale; `total = sampling + denominator + statistics + clip`.

    Attributes:
      sampling: pytree, the share of the stale policy having drawn the own completion.
      denominator: pytree, the share of the stale log-probs in the ratio.
      statistics: pytree, the share of the stale policy having drawn the other members (the advantage's mean and std).
      clip: pytree, δ of the loss minus δ of the unclipped loss.
      total: pytree, δ of the loss.
      order_spread: {role: scalar}, root mean square over the orders of a role's marginal share minus its Shapley value.
      interaction_norm: scalar, ‖δ_unclipped − Σ roles each made stale alone‖, O(‖θ−φ‖²) for a smooth loss.
    """

    sampling: Params
    denominator: Params
    statistics: Params
    clip: Params
    total: Params
    order_spread: dict[str, jax.Array]
    interaction_norm: jax.Array


def surrogate_bias(gradient_fn: Callable, learner_params: Params, behavior_params: Params) -> SurrogateBias:
    """δ = H(θ,φ) − H(θ,θ) with its norm, relative norm and cosine (arXiv 2607.01083).

    The two gradients are two turns of one loop body, so that equal parameters give a bias of exactly 0.

    Args:
      gradient_fn: H(learner_params, behavior_params).
      learner_params: θ.
      behavior_params: φ, a pytree like θ.

    Returns:
      SurrogateBias.

    Raises:
      ValueError: pytrees that differ in structure or shapes, or without leaves.
    """
    check_params_alike(learner_params=learner_params, behavior_params=behavior_params)
    behaviors = _stack([behavior_params, learner_params])
    gradients = jax.lax.map(lambda behavior: gradient_fn(learner_params, behavior), behaviors)
    stale, fresh = _row(gradients, 0), _row(gradients, 1)
    bias = optax.tree.sub(stale, fresh)
    norm, stale_norm, fresh_norm = optax.tree.norm(bias), optax.tree.norm(stale), optax.tree.norm(fresh)
    return SurrogateBias(
        bias=bias,
        stale_gradient=stale,
        fresh_gradient=fresh,
        norm=norm,
        relative_norm=jnp.where(norm == 0, 0.0, norm / fresh_norm),
        cosine=optax.tree.vdot(stale, fresh) / (stale_norm * fresh_norm),
    )


def first_order_bias(gradient_fn: Callable, learner_params: Params, behavior_params: Params, *, check: bool = True) -> Params:
    """D_φH(θ,φ)|_{φ=θ}[φ − θ], the bias to first order in the drift, by one jvp.

    Args:
      gradient_fn: H(learner_params, behavior_params), differentiable in its second argument.
      learner_params: θ.
      behavior_params: φ.
      check: run `check_first_order` along φ − θ first; only possible outside jit, so pass False there.

    Returns:
      A pytree like θ; δ = this + O(‖φ−θ‖²) where H is smooth in φ at φ = θ.

    Raises:
      ValueError: pytrees that differ in structure or shapes, or without leaves.
      FirstOrderError: see `check_first_order`.
    """
    check_params_alike(learner_params=learner_params, behavior_params=behavior_params)
    direction = optax.tree.sub(behavior_params, learner_params)
    if check and float(optax.tree.norm(direction)) > 0:
        check_first_order(gradient_fn, learner_params, direction)
    return _jvp(lambda behavior: gradient_fn(learner_params, behavior), learner_params, direction)


def check_first_order(
    gradient_fn: Callable, learner_params: Params, direction: Params, *, step: float | None = None, tolerance: float = 1e-3
) -> None:
    """Holds the jvp of H in φ at φ = θ against finite differences on both sides; a host-side check, not for jit.

    Two things break the first-order law silently: a kink of H at ratio 1 (a cap of exactly 1, |log r|), where the two one-sided
    differences part however small the step, and a `stop_gradient` on something that depends on φ or on the learner's own
    detached log-probs, where the jvp misses what the differences see.

    Args:
      gradient_fn: H(learner_params, behavior_params).
      learner_params: θ, float32 or float64 arrays.
      direction: a pytree like θ, not zero; its length does not matter.
      step: the parameter distance of the differences; default 1e-4 in float64, 1e-2 in float32, times max(1, ‖θ‖).
      tolerance: the relative difference that counts as parting.

    Raises:
      ValueError: a direction that is zero, not finite or unlike θ, a step that is not positive, or parameters that are no
        arrays or of lower precision than float32.
      FirstOrderError: naming the kink or the stop_gradient, or saying that H is not finite beside θ.
    """
    check_params_alike(learner_params=learner_params, direction=direction)
    _check_precision(learner_params)
    length = float(optax.tree.norm(direction))
    if not 0 < length < math.inf:
        raise ValueError(f"direction has length {length}; a derivative needs a direction that is finite and not zero")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step is {step}; a finite difference needs a distance that is positive and finite")
    unit = optax.tree.scale(1 / length, direction)
    if step is None:
        precise = all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(unit))
        step = (1e-4 if precise else 1e-2) * max(1.0, float(optax.tree.norm(learner_params)))
    at = jax.jit(lambda h: gradient_fn(learner_params, optax.tree.add_scale(learner_params, h, unit)))
    derivative = jax.jit(lambda v: _jvp(lambda behavior: gradient_fn(learner_params, behavior), learner_params, v))(unit)
    sides = [(at(h), at(-h)) for h in (step, step / 4)]
    check_derivative(derivative, at(0.0), sides, step=step, tolerance=tolerance)


def check_derivative(
    derivative: Params, center: Params, sides: Sequence[tuple[Params, Params]], *, step: float, tolerance: float = 1e-3
) -> None:
    """What `check_first_order` decides from gradients that are already there.

    Args:
      derivative: D_φH(θ,φ)|_{φ=θ}[u], the jvp along a direction u of length 1.
      center: H(θ,θ).
      sides: H(θ, θ ± h·u) for h = step and step/4.
      step: parameter distance.
      tolerance: the relative difference that counts as parting.

    Raises:
      FirstOrderError: naming the kink or the stop_gradient, or saying that H is not finite beside θ.
    """
    jumps, centrals = [], []
    for h, (ahead, behind) in zip((step, step / 4), sides, strict=True):
        forward = optax.tree.scale(1 / h, optax.tree.sub(ahead, center))
        backward = optax.tree.scale(1 / h, optax.tree.sub(center, behind))
        jumps.append(float(optax.tree.norm(optax.tree.sub(forward, backward))))
        centrals.append(optax.tree.scale(0.5, optax.tree.add(forward, backward)))
    central = centrals[-1]
    sizes = [float(optax.tree.norm(difference)) for difference in centrals]
    slope = float(optax.tree.norm(derivative))
    if not all(map(math.isfinite, (slope, *sizes, *jumps))):
        raise FirstOrderError(
            f"the surrogate gradient or its derivative is not finite within {step:.1e} of θ: there is no "
            "first-order law to hold; look for overflow in the loss or lower `step`"
        )
    scale = max(sizes[-1], slope, tolerance * float(optax.tree.norm(center)))
    # a smooth H makes the one-sided differences approach each other with the step; a kink keeps them apart
    kinked = jumps[1] > tolerance * scale and jumps[1] > 0.5 * jumps[0]
    # a loss with a kink of its own makes H jump: then the differences grow as the step shrinks
    jumped = sizes[1] > tolerance * scale and sizes[1] > 2 * sizes[0]
    if kinked or jumped:
        raise FirstOrderError(
            "the surrogate gradient has a kink in the behavior policy at ratio 1 (a cap of exactly 1, or |log ratio|): no "
            "first-order law holds there"
        )
    missed = float(optax.tree.norm(optax.tree.sub(derivative, central)))
    if missed > tolerance * scale:
        raise FirstOrderError(
            f"the derivative of the surrogate gradient in the behavior policy misses {missed / scale:.1%} of its finite "
            "difference: the loss hides a dependence behind stop_gradient; let it take what it detaches as an argument "
            "detached_logprobs instead"
        )


def role_jvps(role_gradient_fn: Callable, learner_params: Params, behavior_params: Params) -> dict[str, Params]:
    """The first-order bias by role: D_role H [φ − θ] with the other two roles at θ. The three sum to `first_order_bias`.

    Args:
      role_gradient_fn: H(learner_params, sampling_params, denominator_params, statistics_params).
      learner_params: θ.
      behavior_params: φ.

    Returns:
      {"sampling": pytree, "denominator": pytree, "statistics": pytree}.
    """
    check_params_alike(learner_params=learner_params, behavior_params=behavior_params)
    direction = optax.tree.sub(behavior_params, learner_params)

    def of_role(role):
        def gradient(params):
            return role_gradient_fn(learner_params, *(params if name == role else learner_params for name in ROLES))

        return _jvp(gradient, learner_params, direction)

    return {role: of_role(role) for role in ROLES}


def decompose(
    role_gradient_fn: Callable, unclipped_role_gradient_fn: Callable, learner_params: Params, behavior_params: Params
) -> BiasParts:
    """δ as Shapley shares of {sampling, denominator, statistics} of the unclipped loss, plus what the clip does to it.

    A role's share is the average, over the six orders in which the roles can go stale, of the change when it does.

    Args:
      role_gradient_fn: H(learner_params, sampling_params, denominator_params, statistics_params) of the loss.
      unclipped_role_gradient_fn: the same of the loss without its clip; the same function where there is no clip.
      learner_params: θ.
      behavior_params: φ.

    Returns:
      BiasParts.
    """
    check_params_alike(learner_params=learner_params, behavior_params=behavior_params)
    subsets = list(itertools.product((0, 1), repeat=len(ROLES)))  # 1 = this role is stale
    either = _stack([learner_params, behavior_params])
    stale = jnp.asarray(subsets)
    values = jax.lax.map(lambda which: unclipped_role_gradient_fn(learner_params, *(_row(either, w) for w in which)), stale)
    of_subset = {subset: _row(values, index) for index, subset in enumerate(subsets)}
    shares, spread = zip(*(shapley_share(of_subset, role) for role in range(len(ROLES))), strict=True)

    fresh, all_stale = subsets[0], subsets[-1]
    unclipped = optax.tree.sub(of_subset[all_stale], of_subset[fresh])
    both = jax.lax.map(lambda behavior: role_gradient_fn(learner_params, behavior, behavior, behavior), either)
    total = optax.tree.sub(_row(both, 1), _row(both, 0))
    alone = [optax.tree.sub(of_subset[tuple(int(i == role) for i in range(3))], of_subset[fresh]) for role in range(3)]
    interaction = jax.tree.map(lambda whole, *parts: whole - sum(parts), unclipped, *alone)
    return BiasParts(
        *shares,
        clip=optax.tree.sub(total, unclipped),
        total=total,
        order_spread=dict(zip(ROLES, spread, strict=True)),
        interaction_norm=optax.tree.norm(interaction),
    )


def shapley_share(of_subset: dict[tuple[int, ...], Params], role: int) -> tuple[Params, jax.Array]:
    """The Shapley value of a role, and the root mean square distance of its marginal shares from it.

    Args:
      of_subset: {(0 or 1 for each of `ROLES`): H with the roles at 1 stale}, all eight.
      role: index into `ROLES`.

    Returns:
      (pytree like H, scalar).
    """
    num_roles = len(ROLES)
    marginals, weights = [], []
    for subset in of_subset:
        if subset[role]:
            continue
        joined = subset[:role] + (1,) + subset[role + 1 :]
        marginals.append(optax.tree.sub(of_subset[joined], of_subset[subset]))
        before = sum(subset)
        weights.append(math.factorial(before) * math.factorial(num_roles - 1 - before) / math.factorial(num_roles))
    value = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *marginals)
    squared = [optax.tree.norm(optax.tree.sub(m, value), squared=True) for m in marginals]
    return value, jnp.sqrt(jnp.dot(np.asarray(weights), jnp.stack(squared)))


def _check_precision(params: Params) -> None:
    """Differences of a lower precision are rounding, which looks like a kink."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
            found = type(leaf).__name__ if dtype is None else dtype
            where = jax.tree_util.keystr(path)
            raise ValueError(f"learner_params{where} is {found}; a numerical derivative needs float32 or float64 arrays")


def _jvp(function: Callable, primal: Params, tangent: Params) -> Params:
    return jax.jvp(function, (primal,), (tangent,))[1]


def _stack(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _row(tree: Params, index) -> Params:
    return jax.tree.map(lambda leaf: leaf[index], tree)
