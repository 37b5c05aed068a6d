"""The staleness bias δ = H(θ,φ) − H(θ,θ) of any model, estimated from rollouts where nothing can be enumerated.

Stale and fresh groups of the same prompts are drawn with the same random numbers: most tokens agree, and most noise cancels in
their difference. ‖δ̂‖² is still too large by the variance of δ̂: the prompts are split into K independent blocks, and only
products of *different* blocks are averaged (U-statistics, jackknife errors; `gram_statistics`). What the design can tell
from 0 is said beside the estimate. arXiv 2607.01083 has δ; the estimator is this project's: docs/estimation.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import gram_statistics, metrics
from jax_async_grpo.masked import masked_sum
from jax_async_grpo.types import Params, Rollouts, check_params_alike

__all__ = [
    "BiasEstimate",
    "block_gradient",
    "estimate",
    "from_gram",
    "gram_matrices",
    "prompt_coupling",
    "reweighted_gradient",
]

MIN_BLOCKS = 8
COUPLING_TOLERANCE = 1e-3  # rounding of float32 is far below, what couples the prompts of a batch far above


class BiasEstimate(NamedTuple):
    """The staleness bias, estimated. Squared norms may be negative and are reported as they are: average these, not the norms.

    Attributes:
      norm_squared: estimate of ‖δ‖², unbiased.
      norm_squared_error: its jackknife standard error; up to 1.5 times too large where δ is far below the detection limit. See
        `interval`.
      norm: √norm_squared, 0 where that is not positive.
      norm_error: half the length of √(norm_squared ± norm_squared_error), negative ends at 0: finite everywhere.
      relative_norm: ‖δ‖/‖H(θ,θ)‖ in the same way; NaN where the squared fresh gradient is not estimated as positive.
      relative_norm_error: like `norm_error`, from the jackknife of the squared ratio.
      cosine: between H(θ,φ) and H(θ,θ), as a ratio of unbiased terms: may exceed 1; NaN where a squared norm is not positive.
      cosine_error: its jackknife standard error; NaN where the cosine without one of the blocks is.
      detected: whether norm_squared exceeds its critical value at the stated level under δ = 0.
      detection_limit: the ‖δ‖ that is detected with the stated power.
      relative_detection_limit: the same in units of ‖H(θ,θ)‖.
      noise_trace: tr Σ, Σ the covariance of δ̂ from one block.
      noise_dimensions: ν = (tr Σ)²/tr Σ², over how many directions the noise spreads.
      fresh_norm_squared: estimate of ‖H(θ,θ)‖², unbiased.
      stale_norm_squared: estimate of ‖H(θ,φ)‖², unbiased.
      inner_product: estimate of H(θ,φ)·H(θ,θ), unbiased.
      ess_ratio: (Σw)²/(BΣw²) of the stale groups' weights w = Π π_θ/π_φ; pass it as the next call's `previous_ess`.
      method: "sampled" or "reweighted", where the fresh gradient came from.
      num_blocks: K.
      coupled_fraction: share of token positions, of those valid in either, at which the stale and the fresh rollout have the
        same valid token; NaN where no fresh one was drawn.
    """

    norm_squared: float
    norm_squared_error: float
    norm: float
    norm_error: float
    relative_norm: float
    relative_norm_error: float
    cosine: float
    cosine_error: float
    detected: bool
    detection_limit: float
    relative_detection_limit: float
    noise_trace: float
    noise_dimensions: float
    fresh_norm_squared: float
    stale_norm_squared: float
    inner_product: float
    ess_ratio: float
    method: str
    num_blocks: int
    coupled_fraction: float

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """(low, high) of ‖δ‖ by inversion of the test behind `detected`: covers it with about probability `level`."""
        noise = self.noise_trace, self.noise_dimensions
        return gram_statistics.norm_interval(self.norm_squared, *noise, self.num_blocks, level)

    def metrics(self) -> dict[str, float]:
        """The scalars to log, by the names of docs/design.md; `bias/standard_error` is that of `bias/norm`."""
        return {
            "bias/norm": self.norm,
            "bias/norm_squared": self.norm_squared,
            "bias/relative_norm": self.relative_norm,
            "bias/cosine": self.cosine,
            "bias/standard_error": self.norm_error,
            "bias/detection_limit": self.detection_limit,
        }


def estimate(
    token_logprobs: Callable[[Params, Rollouts], jax.Array],
    sample: Callable[[Params, Any, jax.Array], Rollouts],
    loss: Callable[[jax.Array, Rollouts], jax.Array],
    params: Params,
    behavior_params: Params,
    prompts: Any,
    key: jax.Array,
    *,
    num_blocks: int = MIN_BLOCKS,
    previous_ess: float | None = None,
    ess_threshold: float = 0.8,
    kept_blocks: int | None = None,
    level: float = 0.05,
    power: float = 0.8,
) -> BiasEstimate:
    """Estimates ‖δ‖, δ = H(θ,φ) − H(θ,θ), its size beside the fresh gradient and their cosine (host-level, not for jit).

    H is what `loss` has as its expected gradient on batches of B/K prompts. The prompts must be independent draws in random
    order, or the same ones in every block (then δ is that of these prompts). The gradients of blocks are compiled once for each
    pair (token_logprobs, loss) and shape: pass the same function objects again.

    Args:
      token_logprobs: (params, rollouts) -> [B, G, L] log-probs of the rollouts' completions, nats, differentiable in params.
      sample: (params, prompts, key) -> `Rollouts` of these B prompts in their order, `behavior_logprobs` and `rewards` filled.
        It is called with the *same key* for φ and θ: Gumbel-max sampling with noise that depends on key, row, member and
        position alone couples the two. It may call a verifier on the host.
      loss: (logprobs[b, G, L], rollouts) -> scalar of a batch of any b prompts, e.g. `functools.partial` of
        `surrogate.sampled_objective`. Its sign does not matter here.
      params: θ.
      behavior_params: φ, a pytree like θ.
      prompts: any pytree of arrays with leading axis B, handed to `sample`.
      key: consumed.
      num_blocks: K ≥ 8, a divisor of B.
      previous_ess: `ess_ratio` of the previous measurement. Above `ess_threshold` no fresh rollouts are drawn: H(θ,θ) comes
        from the stale ones, each group weighted by Π π_θ/π_φ over all its completions, not self-normalized. Deciding by the
        weights that are then used would bias the estimate.
      ess_threshold: in [0, 1].
      kept_blocks: gradients kept at once, each twice (δ and fresh) the size of the parameters; default all K. With M < K, some
        are computed again: about K(1 + K/M)/2 pairs of them in place of K, in the memory of M + 1.
      level: chance that `detected` is True where δ = 0.
      power: chance that it is where ‖δ‖ is the detection limit.

    Returns:
      BiasEstimate.

    Raises:
      ValueError: fewer than 8 blocks or a B they do not divide, parameters that differ, an option outside its range, rollouts
        or log-probs of another shape, rewards that are not finite, or (reweighted) a loss that is no mean over the prompts.
    """
    check_params_alike(params=params, behavior_params=behavior_params)
    num_prompts = _check_prompts(prompts, num_blocks)
    kept_blocks = num_blocks if kept_blocks is None else kept_blocks
    _check_options(num_blocks, kept_blocks, previous_ess, ess_threshold, level, power)
    reweighted = previous_ess is not None and previous_ess > ess_threshold
    stale = _checked(sample(behavior_params, prompts, key), num_prompts)
    fresh = None if reweighted else _checked(sample(params, prompts, key), num_prompts)
    log_weights = {}

    def of_block(index):
        stale_gradient, log_weights[index] = block_gradient(token_logprobs, loss, params, _block(stale, index, num_blocks))
        if reweighted:
            fresh_gradient, coupling = reweighted_gradient(token_logprobs, loss, params, _block(stale, index, num_blocks))
            _check_separable(float(coupling))
        else:
            fresh_gradient, _ = block_gradient(token_logprobs, loss, params, _block(fresh, index, num_blocks))
        return _difference(stale_gradient, fresh_gradient)

    gram = gram_matrices(of_block, num_blocks, kept_blocks=kept_blocks)
    weights = np.concatenate([np.asarray(log_weights[k], np.float64) for k in range(num_blocks)])[:, None]
    return from_gram(
        gram,
        level=level,
        power=power,
        ess_ratio=float(metrics.off_policy(weights, np.zeros_like(weights))["off_policy/ess_ratio"]),
        method="reweighted" if reweighted else "sampled",
        coupled_fraction=float("nan") if reweighted else _coupled_fraction(stale, fresh),
    )


@functools.partial(jax.jit, static_argnames=("token_logprobs", "loss"))
def block_gradient(token_logprobs: Callable, loss: Callable, params: Params, rollouts: Rollouts) -> tuple[Params, jax.Array]:
    """∂_θ of the loss on one block, and the groups' log-weights.

    Args:
      token_logprobs, loss, params: of `estimate`.
      rollouts: of b prompts.

    Returns:
      (a pytree like θ, [b] Σ log π_θ − log π_φ over all tokens of a group, nats).
    """

    def objective(learner):
        logprobs = _logprobs_of(token_logprobs, learner, rollouts)
        return loss(logprobs, rollouts), logprobs

    gradient, logprobs = jax.grad(objective, has_aux=True)(params)
    return gradient, _group_log_weights(logprobs, rollouts)


@functools.partial(jax.jit, static_argnames=("token_logprobs", "loss"))
def reweighted_gradient(
    token_logprobs: Callable, loss: Callable, params: Params, rollouts: Rollouts
) -> tuple[Params, jax.Array]:
    """The fresh gradient from stale rollouts: mean over prompts of w·∂_θ(loss of the group as if drawn from θ), w = Π π_θ/π_φ.

    The product runs over the whole group, because the other members make the advantage; a weight of the own completion alone
    leaves them stale. Unbiased for H(θ,θ) where φ draws whatever θ can draw.

    Args:
      token_logprobs, loss, params: of `estimate`.
      rollouts: of b prompts, drawn from φ.

    Returns:
      (a pytree like θ, `prompt_coupling` of the loss here).
    """

    def objective(learner):
        logprobs = _logprobs_of(token_logprobs, learner, rollouts)
        detached = jax.lax.stop_gradient(logprobs)
        own = dataclasses.replace(rollouts, behavior_logprobs=jnp.where(rollouts.mask, detached, 0))
        weights = jnp.exp(_group_log_weights(detached, rollouts))
        return jnp.mean(weights * _of_prompts(loss, logprobs, own)), logprobs

    gradient, logprobs = jax.grad(objective, has_aux=True)(params)
    return gradient, prompt_coupling(loss, logprobs, rollouts)


def prompt_coupling(loss: Callable, logprobs: jax.Array, rollouts: Rollouts) -> jax.Array:
    """By how much a loss misses being the mean of its prompts': groups of one that does can be reweighted one by one.

    Args:
      loss: of `estimate`.
      logprobs: [b, G, L] log π_θ, nats.
      rollouts: of b prompts.

    Returns:
      scalar, the largest difference of the two derivatives in a log-prob, over the largest derivative; 0 is none.
    """
    whole = jax.grad(lambda rows: loss(rows, rollouts))(logprobs)
    apart = jax.grad(lambda rows: jnp.mean(_of_prompts(loss, rows, rollouts)))(logprobs)
    largest = jnp.max(jnp.abs(whole))
    return jnp.where(largest > 0, jnp.max(jnp.abs(whole - apart)) / largest, jnp.max(jnp.abs(apart)))


def _of_prompts(loss: Callable, logprobs: jax.Array, rollouts: Rollouts) -> jax.Array:
    """[b], the loss of every prompt's group alone."""
    return jax.vmap(lambda row, group: loss(row[None], jax.tree.map(lambda leaf: leaf[None], group)))(logprobs, rollouts)


def gram_matrices(of_block: Callable[[int], tuple[Params, ...]], num_blocks: int, *, kept_blocks: int) -> np.ndarray:
    """Inner products of the blocks' vectors, a few blocks in memory at a time.

    Args:
      of_block: k -> N pytrees (here δ_k and the fresh gradient), the same ones when called again.
      num_blocks: K.
      kept_blocks: M blocks are kept at once, and one more passes by.

    Returns:
      [N, N, K, K] float64, entry [a, b, j, k] = vector a of block j times vector b of block k.
    """
    products = {}

    def fill(j, k, first, second):
        between = np.asarray(_inner_products(first, second), np.float64)
        products[j, k], products[k, j] = between, between.T

    for start in range(0, num_blocks, kept_blocks):
        kept = {}
        for k in range(start, num_blocks):
            block = of_block(k)
            if k < start + kept_blocks:
                kept[k] = block
            for j, other in kept.items():
                fill(j, k, other, block)
    rows = [[products[j, k] for k in range(num_blocks)] for j in range(num_blocks)]
    return np.moveaxis(np.asarray(rows), (0, 1), (-2, -1))


def from_gram(
    gram: np.ndarray,
    *,
    level: float = 0.05,
    power: float = 0.8,
    ess_ratio: float = float("nan"),
    method: str = "sampled",
    coupled_fraction: float = float("nan"),
) -> BiasEstimate:
    """The estimate from inner products alone, for those who have gradients of blocks already.

    δ and the fresh gradient are taken, not the stale one: the difference of large inner products would lose a small bias.

    Args:
      gram: [2, 2, K, K] of `gram_matrices`, vector 0 δ_k and vector 1 the fresh gradient.
      level, power: of `estimate`.
      ess_ratio, method, coupled_fraction: handed on to the result.

    Returns:
      BiasEstimate.
    """
    num_blocks = gram.shape[-1]
    products, without = gram_statistics.u_statistic(gram), gram_statistics.leave_one_out(gram)
    ratio, ratios = _relative_squared(products), _relative_squared(without)
    error = float(gram_statistics.jackknife_error(without[0, 0]))
    trace, dimensions = gram_statistics.noise_spectrum(gram[0, 0])
    limit = gram_statistics.detectable_norm(trace, dimensions, num_blocks, level, power)
    squared, cross, fresh = float(products[0, 0]), float(products[0, 1]), float(products[1, 1])
    return BiasEstimate(
        norm_squared=squared,
        norm_squared_error=error,
        norm=_root(squared),
        norm_error=_root_error(squared, error),
        relative_norm=_root(float(ratio)),
        relative_norm_error=_root_error(float(ratio), float(gram_statistics.jackknife_error(ratios))),
        cosine=float(_cosine(products)),
        cosine_error=float(gram_statistics.jackknife_error(_cosine(without))),
        detected=squared > gram_statistics.critical_value(trace, dimensions, num_blocks, level),
        detection_limit=limit,
        relative_detection_limit=limit / fresh**0.5 if fresh > 0 else float("nan"),
        noise_trace=trace,
        noise_dimensions=dimensions,
        fresh_norm_squared=fresh,
        stale_norm_squared=fresh + 2 * cross + squared,
        inner_product=fresh + cross,
        ess_ratio=ess_ratio,
        method=method,
        num_blocks=num_blocks,
        coupled_fraction=coupled_fraction,
    )


def _relative_squared(products) -> np.ndarray:
    fresh = products[1, 1]
    return np.where(fresh > 0, products[0, 0] / np.where(fresh > 0, fresh, 1), np.nan)


def _cosine(products) -> np.ndarray:
    fresh = products[1, 1]
    stale = fresh + 2 * products[0, 1] + products[0, 0]
    positive = (fresh > 0) & (stale > 0)
    return np.where(positive, (fresh + products[0, 1]) / np.sqrt(np.where(positive, fresh * stale, 1)), np.nan)


def _root(squared: float) -> float:
    return float(np.sqrt(np.maximum(squared, 0)))  # NaN stays NaN


def _root_error(squared: float, error: float) -> float:
    return (_root(squared + error) - _root(squared - error)) / 2


def _group_log_weights(logprobs, rollouts) -> jax.Array:
    return masked_sum(logprobs - rollouts.behavior_logprobs, rollouts.mask, axis=(-2, -1))


def _logprobs_of(token_logprobs, params, rollouts) -> jax.Array:
    logprobs = token_logprobs(params, rollouts)
    if logprobs.shape != rollouts.mask.shape:
        raise ValueError(f"token_logprobs returned shape {logprobs.shape}; it must be that of the mask, {rollouts.mask.shape}")
    return logprobs


@jax.jit
def _difference(stale: Params, fresh: Params) -> tuple[Params, Params]:
    """(stale − fresh, fresh), in at least float32."""
    stale, fresh = (jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), g) for g in (stale, fresh))
    return optax.tree.sub(stale, fresh), fresh


@jax.jit
def _inner_products(first: tuple[Params, ...], second: tuple[Params, ...]) -> jax.Array:
    return jnp.stack([jnp.stack([optax.tree.vdot(a, b) for b in second]) for a in first])


def _block(rollouts: Rollouts, index: int, num_blocks: int) -> Rollouts:
    size = rollouts.mask.shape[0] // num_blocks
    return jax.tree.map(lambda leaf: leaf[index * size : (index + 1) * size], rollouts)


def _coupled_fraction(stale: Rollouts, fresh: Rollouts) -> float:
    if stale.mask.shape != fresh.mask.shape:
        raise ValueError(f"sample returned completions of shape {stale.mask.shape} for φ and {fresh.mask.shape} for θ")
    first, second = np.asarray(stale.mask, bool), np.asarray(fresh.mask, bool)
    same = first & second & (np.asarray(stale.completions) == np.asarray(fresh.completions))
    return float(same.sum() / max((first | second).sum(), 1))


def _check_prompts(prompts, num_blocks) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(prompts)]
    if not shapes or any(len(shape) < 1 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"prompts has leaves of shapes {shapes}; they must share one leading axis B")
    if num_blocks < MIN_BLOCKS:
        raise ValueError(f"num_blocks is {num_blocks}; it must be at least {MIN_BLOCKS}")
    if shapes[0][0] < num_blocks or shapes[0][0] % num_blocks:
        raise ValueError(f"prompts has B = {shapes[0][0]}; it must be a multiple of num_blocks, {num_blocks}")
    return shapes[0][0]


def _check_options(num_blocks, kept_blocks, previous_ess, ess_threshold, level, power):
    if not 1 <= kept_blocks <= num_blocks:
        raise ValueError(f"kept_blocks is {kept_blocks}; it must be in 1..{num_blocks}, the number of blocks")
    for name, value in (("previous_ess", previous_ess), ("ess_threshold", ess_threshold)):
        # rounding may take an ESS ratio just above 1
        if value is not None and not 0 <= value <= 1 + 1e-4:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")
    if not 0 < level < power < 1:
        raise ValueError(f"level is {level} and power is {power}; they must obey 0 < level < power < 1")


def _checked(rollouts: Rollouts, num_prompts: int) -> Rollouts:
    shape = np.shape(rollouts.mask)
    if len(shape) != 3 or shape[0] != num_prompts:
        raise ValueError(f"sample returned a mask of shape {shape}; it must be [B, G, L] with B = {num_prompts}, as in prompts")
    if not bool(jnp.isfinite(jnp.asarray(rollouts.rewards)).all()):
        raise ValueError("sample returned rewards that are not finite; give failed samples a number, and count them")
    return rollouts


def _check_separable(coupling: float):
    if coupling > COUPLING_TOLERANCE:
        raise ValueError(
            f"loss couples the prompts of a batch (derivatives differ by {coupling:.1e}), so groups cannot be reweighted one "
            "by one; use a mean over prompts or previous_ess=None"
        )
