"""What to watch in an asynchronous run: how far off-policy the data are, how often the clip acts, how far parameters move.

`off_policy` and `clip_fraction` work on anyone's logged log-probs. Data were drawn from the behavior policy μ = π_φ, π = π_θ
is the learner, r = π/μ the token ratio. Keys follow the names in use in the field; every value is a scalar of at least
float32. A position outside the mask counts nowhere, whatever stands there; a NaN inside the mask shows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo.losses import clipped_tokens
from jax_async_grpo.losses.arguments import shape_of
from jax_async_grpo.masked import as_mask, masked_mean, masked_values
from jax_async_grpo.staleness import ParamHistory, read
from jax_async_grpo.types import Params, check_params_alike

__all__ = ["clip_fraction", "drift", "gradient_cosine", "logprob_mismatch", "logprob_tolerance", "msd", "off_policy"]

# exp(±20) and its square are finite in float32; TRL, verl and others clamp log-ratios at the same value.
LOG_RATIO_LIMIT = 20.0
# Spacing of the numbers that a product of matrices multiplies: 10 bits behind the point in TF32, 7 in bfloat16.
_MATMUL_EPS = {"highest": 0.0, "float32": 0.0, "tensorfloat32": 2.0**-10, "bfloat16": 2.0**-7}


def off_policy(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    mask: jax.Array | None = None,
    policy_version: jax.Array | None = None,
    step: int | jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Distance of the learner from the policy that generated the data, estimated on that data.

    With d = log r = log π − log μ per token and w = Π_l r per completion:

    * `off_policy/kl`: mean of −d, unbiased for the per-token KL(μ‖π) (k1; can be negative)
    * `off_policy/k3_kl`: mean of e^d − d − 1, the same expectation, never negative
    * `off_policy/chi2_token`: mean of r² − 1, per-token χ²(π‖μ)
    * `off_policy/chi2_seq`: mean over completions of w² − 1, χ² of whole completions
    * `off_policy/ess_ratio`: (Σw)² / (N Σw²) in 1/N..1, effective over actual completions
    * `is_ratio/mean`, `is_ratio/min`, `is_ratio/max`: of r over tokens
    * `staleness/mean`, `staleness/min`, `staleness/max`: of step − policy_version, learner updates, over completions (over
      tokens if `policy_version` has the token axis); only when both are given

    d and log w are clamped to ±20 before they are exponentiated, except in the ESS, which is computed exactly; above 20, where
    e^d of k3 stops, its −d stops too. A completion without a valid token is left out. An empty mask gives the values of
    on-policy data: ratios and ESS 1, the others 0.

    >>> logs = off_policy(jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.2]])))
    >>> print(f"{logs['is_ratio/max']:.2f} {logs['off_policy/chi2_token']:.2f}")
    2.00 1.50

    Args:
      logprobs: [..., L] log π of the drawn tokens, nats.
      behavior_logprobs: [..., L] log μ of the same tokens as recorded when they were drawn, nats.
      mask: [..., L] bool or 0/1, None = all valid.
      policy_version: [...] or [..., L] int, the learner update whose parameters drew the completion or token.
      step: the learner update the data are consumed at.

    Returns:
      dict of scalars.

    Raises:
      ValueError: shapes that do not match, or only one of policy_version and step.
    """
    if (policy_version is None) != (step is None):
        given, missing = ("policy_version", "step") if step is None else ("step", "policy_version")
        raise ValueError(f"{given} is given and {missing} is None; staleness needs both, or neither")
    log_ratio, valid = _log_ratio(logprobs, behavior_logprobs, mask)
    clamped = _clamp(log_ratio)
    row_valid = jnp.any(valid, axis=-1)
    staleness = {} if step is None else _staleness(policy_version, step, valid, row_valid)
    log_weight = jnp.sum(log_ratio, axis=-1)  # 0 in a row without valid tokens
    ratio = jnp.exp(clamped)
    return {
        "off_policy/kl": masked_mean(-log_ratio, valid),
        "off_policy/k3_kl": masked_mean(jnp.expm1(clamped) - jnp.minimum(log_ratio, LOG_RATIO_LIMIT), valid),
        # expm1: near the behavior policy r² − 1 would be lost in the rounding of r².
        "off_policy/chi2_token": masked_mean(jnp.expm1(2 * clamped), valid),
        "off_policy/chi2_seq": masked_mean(jnp.expm1(2 * _clamp(log_weight)), row_valid),
        "off_policy/ess_ratio": _ess_ratio(log_weight, row_valid),
        "is_ratio/mean": 1 + masked_mean(jnp.expm1(clamped), valid),
        "is_ratio/min": _masked_extreme(jnp.min, ratio, valid, 1.0),
        "is_ratio/max": _masked_extreme(jnp.max, ratio, valid, 1.0),
        **staleness,
    }


def clip_fraction(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> dict[str, jax.Array]:
    """Shares of valid tokens on which the PPO clip acts, i.e. whose gradient it removes.

    * `pg_clipfrac`: mean of [ℓ_clipped > ℓ_unclipped], as in verl and tunix; the sum of the next two
    * `clip_ratio/low_mean`: mean of [r < 1 − ε_low and A < 0], as in TRL
    * `clip_ratio/high_mean`: mean of [r > 1 + ε_high and A > 0], as in TRL

    Args:
      logprobs: [..., L] log π of the drawn tokens, nats.
      old_logprobs: [..., L] log-probs of the ratio's denominator, nats.
      advantages: [..., L] or [...].
      mask: [..., L] bool or 0/1, None = all valid.
      epsilon_low: as in `losses.ppo_clip`.
      epsilon_high: as in `losses.ppo_clip`.

    Returns:
      dict of scalars in 0..1; 0 for an empty mask.

    Raises:
      ValueError: as in `losses.ppo_clip`.
    """
    bounds = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    clipped = clipped_tokens(logprobs, old_logprobs, advantages, mask, **bounds)
    advantages = jnp.asarray(advantages)
    negative = jnp.broadcast_to(advantages if advantages.ndim == clipped.ndim else advantages[..., None], clipped.shape) < 0
    return {
        "pg_clipfrac": masked_mean(clipped, mask),
        "clip_ratio/low_mean": masked_mean(jnp.where(negative, clipped, 0), mask),
        "clip_ratio/high_mean": masked_mean(jnp.where(negative, 0, clipped), mask),
    }


def logprob_mismatch(recorded: jax.Array, recomputed: jax.Array, mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """How far the log-probs recorded at sampling are from those the learner recomputes with the same parameters.

    * `logprob_mismatch/mean_abs`: mean of |log μ − log μ'| over tokens
    * `logprob_mismatch/max_abs`: its maximum, to be held against `logprob_tolerance`

    With equal parameters this is rounding, or a fault: other weights, another mask, position or temperature.

    >>> mismatch = logprob_mismatch(jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -2.0]]))
    >>> [f"{value:.2f}" for value in mismatch.values()]
    ['0.25', '0.50']

    Args:
      recorded: [..., L] as recorded when the tokens were drawn, nats.
      recomputed: [..., L] of the same tokens by the same parameters, nats.
      mask: [..., L] bool or 0/1, None = all valid.

    Returns:
      dict of scalars; 0 for an empty mask.

    Raises:
      ValueError: shapes that do not match.
    """
    difference, valid = _log_ratio(recorded, recomputed, mask, ("recorded", "recomputed"))
    return {
        "logprob_mismatch/mean_abs": masked_mean(jnp.abs(difference), valid),
        "logprob_mismatch/max_abs": _masked_extreme(jnp.max, jnp.abs(difference), valid, 0.0),
    }


def logprob_tolerance(dtype=jnp.float32, matmul_precision: str = "highest") -> float:
    """The largest `logprob_mismatch/max_abs` that rounding explains: 80 ε, nats.

    ε is the spacing at 1 of the coarser of two types: the one in which the policy computes, and the one to which its matrix
    products round what they multiply. Two orders of the same sums, cached and not, leave a logit of size |z| with a relative
    difference of a few ε: c ε |z|, c ≈ 4, as roundings partly cancel. A log-prob is the difference of a logit and a
    log-sum-exp, which can both be off, in opposite directions: 2 c ε |z|, 80 ε for logits of up to 10. In float32 that is
    1e-5, in TF32 0.08, in bfloat16 0.6; the mean over many tokens should lie an order of magnitude below.

    >>> f"{logprob_tolerance():.0e}, {logprob_tolerance(jnp.bfloat16):.1f}"
    '1e-05, 0.6'

    Args:
      dtype: in which hidden states and logits are computed.
      matmul_precision: of matrix products: "highest" (or "float32": that of the dtype), "tensorfloat32" (what JAX does with
        float32 on recent NVIDIA GPUs unless told otherwise), "bfloat16" (on TPUs).

    Returns:
      nats.

    Raises:
      ValueError: an unknown precision.
    """
    if matmul_precision not in _MATMUL_EPS:
        raise ValueError(f"matmul_precision is {matmul_precision!r}; it must be one of {', '.join(_MATMUL_EPS)}")
    return 80 * max(float(jnp.finfo(dtype).eps), _MATMUL_EPS[matmul_precision])


def drift(learner_params: Params, behavior_params: Params) -> dict[str, jax.Array]:
    """How far the learner is from the behavior parameters, beside its own size (arXiv 2607.01083, the bound of section 1).

    * `drift/from_behavior`: ‖θ − φ‖
    * `drift/param_norm`: ‖θ‖

    Args:
      learner_params: θ, pytree of arrays.
      behavior_params: φ, of the same structure; any other version does, θ_0 for the cumulative drift.

    Returns:
      dict of scalars, Euclidean norms over all parameters.

    Raises:
      ValueError: pytrees that differ in structure or shapes, or without leaves.
    """
    check_params_alike(learner_params=learner_params, behavior_params=behavior_params)
    learner_params = _widen(learner_params)
    return {
        "drift/from_behavior": optax.tree.norm(optax.tree.sub(learner_params, _widen(behavior_params))),
        "drift/param_norm": optax.tree.norm(learner_params),
    }


def gradient_cosine(gradient: Params, other: Params) -> jax.Array:
    """⟨g, h⟩ / (‖g‖·‖h‖) over all parameters, 0 if one of them is 0.

    Between consecutive updates this is `grad/cosine_prev`: persistently positive under a lag, near 0 in diffusion. Judge it
    against the cosine of two halves of one batch.

    Args:
      gradient: pytree of arrays.
      other: of the same structure.

    Returns:
      scalar in −1..1.

    Raises:
      ValueError: pytrees that differ in structure or shapes, or without leaves.
    """
    check_params_alike(gradient=gradient, other=other)
    gradient, other = _scaled(_widen(gradient)), _scaled(_widen(other))
    norms = optax.tree.norm(gradient) * optax.tree.norm(other)
    return optax.tree.vdot(gradient, other) / jnp.where(norms == 0, 1, norms)


def msd(history: ParamHistory) -> jax.Array:
    """‖θ_t − θ_{t−s}‖² for s = 0..K−1: one sample, at this t, of MSD(s) = E‖θ_t − θ_{t−s}‖².

    Average it over t and fit MSD(s) ∝ s^γ: γ = 2 is ballistic drift, γ = 1 diffusive.

    Args:
      history: with at least one push; of lower precision than the parameters, it adds its rounding to the differences.

    Returns:
      [K], entry 0 is 0; NaN where s > t, as no such version exists.
    """
    latest = _widen(read(history, 0)[0])

    def at(lag: jax.Array) -> jax.Array:
        params, realised_staleness = read(history, lag)
        squared = optax.tree.norm(optax.tree.sub(latest, _widen(params)), squared=True)
        return jnp.where(realised_staleness == lag, squared, jnp.nan)

    # One version at a time: vmap would copy the ring, and cannot read one that lies on the host.
    return jax.lax.map(at, jnp.arange(history.capacity, dtype=jnp.int32))


def _log_ratio(logprobs, behavior_logprobs, mask, names=("logprobs", "behavior_logprobs")) -> tuple[jax.Array, jax.Array]:
    """log π − log μ in at least float32, 0 outside the mask, and the mask; the names are for errors."""
    shape = shape_of(names[0], logprobs)
    if not shape:
        raise ValueError(f"{names[0]} is a scalar; it must be [..., L], one log-prob per completion token")
    if shape_of(names[1], behavior_logprobs) != shape:
        raise ValueError(f"{names[1]} has shape {jnp.shape(behavior_logprobs)}; it must be that of {names[0]}, {shape}")
    valid = as_mask(mask, shape)
    dtype = jnp.promote_types(jnp.result_type(logprobs, behavior_logprobs), jnp.float32)
    learner, behavior = (masked_values(jnp.asarray(x, dtype), valid) for x in (logprobs, behavior_logprobs))
    return learner - behavior, valid


def _clamp(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _ess_ratio(log_weight: jax.Array, row_valid: jax.Array) -> jax.Array:
    """(Σw)² / (N Σw²); it does not change when all weights are scaled, so the largest is made 1."""
    largest = _masked_extreme(jnp.max, log_weight, row_valid, 0.0)
    weight = jnp.where(row_valid, jnp.exp(log_weight - largest), 0)
    count = jnp.sum(row_valid)
    squares = jnp.where(count == 0, 1, count * jnp.sum(weight**2))
    return jnp.where(count == 0, 1, jnp.sum(weight) ** 2 / squares)


def _masked_extreme(extreme, values: jax.Array, valid: jax.Array, empty: float) -> jax.Array:
    """`jnp.min` or `jnp.max` of the valid values; `empty` where none is valid."""
    bound = jnp.inf if extreme is jnp.min else -jnp.inf
    found = extreme(values, initial=bound, where=valid)
    return jnp.where(jnp.any(valid), found, jnp.asarray(empty, values.dtype))


def _staleness(policy_version, step, valid: jax.Array, row_valid: jax.Array) -> dict[str, jax.Array]:
    shape = jnp.shape(policy_version)
    if shape not in (valid.shape, row_valid.shape):
        raise ValueError(
            f"policy_version has shape {shape}; it must be {row_valid.shape} (per row) or {valid.shape} (per token)"
        )
    counted = valid if shape == valid.shape else row_valid
    staleness = (_signed(step) - _signed(policy_version)).astype(jnp.result_type(float))
    return {
        "staleness/mean": masked_mean(staleness, counted),
        "staleness/min": _masked_extreme(jnp.min, staleness, counted, 0.0),
        "staleness/max": _masked_extreme(jnp.max, staleness, counted, 0.0),
    }


def _signed(values) -> jax.Array:
    """Integers as int32: the difference of unsigned ones wraps around."""
    values = jnp.asarray(values)
    return values.astype(jnp.int32) if jnp.issubdtype(values.dtype, jnp.integer) else values


def _scaled(tree: Params) -> Params:
    """The tree over its largest |entry|, so that squares neither overflow nor vanish; zeros stay."""
    largest = jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]).max()
    return jax.tree.map(lambda leaf: leaf / jnp.where(largest == 0, 1, largest).astype(leaf.dtype), tree)


def _widen(tree: Params) -> Params:
    """Leaves in at least float32: sums of squares of bfloat16 values keep two digits otherwise."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), tree)
