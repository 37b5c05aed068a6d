"""optax transformations for stale rollouts: drift kept within a radius, by theorem, and VCPO's learning rate as the baseline.

They stand last in a chain, because they bound or scale the update that is really applied, and take what the optimizer cannot
know as optax's extra arguments: `optimizer.update(gradients, state, params, staleness=S, ess=ratio)`. Transformations that do
not ask for an extra argument never see it. docs/control.md has the theorem with its proof.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo import staleness as staleness_lib
from jax_async_grpo.option_checks import as_fraction, as_integer, as_number, as_positive
from jax_async_grpo.staleness import ParamHistory
from jax_async_grpo.types import Params

__all__ = ["DriftState", "PathState", "limit_staleness_drift", "limit_staleness_path", "scale_by_ess"]


class DriftState(NamedTuple):
    """State of `limit_staleness_drift`, arrays only. K = max(S, 1).

    Attributes:
      params: pytree of [K, ...], the last K parameters updates were asked for.
      versions: [K] int32, the update a slot belongs to; −1 where it is empty.
      step: [] int32, the latest of them; −1 before the first.
      drift_scale: [] float32 in [0, 1], the factor of the latest update.
    """

    params: Params
    versions: jax.Array
    step: jax.Array
    drift_scale: jax.Array


class PathState(NamedTuple):
    """State of `limit_staleness_path`.

    Attributes:
      norms: [max(S, 1)], norms of the updates let through, the latest first.
      path_scale: [] float32 in [0, 1], the factor of the latest update.
    """

    norms: jax.Array
    path_scale: jax.Array


def limit_staleness_drift(
    radius: float | jax.Array, max_staleness: int, *, exponent: float = 0.5, dtype=None, memory_kind: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales an update u_t so that no rollout of the window is drawn farther than `radius` from the learner that reads it.

    Of θ_{t+1} = θ_t + c u_t, c in [0, 1] is the largest factor with

        ‖θ_{t+1} − θ_{t+1−j}‖ ≤ R (j/w)^α    for every lag j = 1..w,    w = `staleness`

    so that ‖θ − φ‖ ≤ R at the next update for whatever version of the window draws its rollouts. The drift is measured between
    parameters, not summed over updates: with α = ½, the growth of a random walk, a diffusive run is hardly touched while
    √MSD(w) < R, and a ballistic one is slowed to R/w an update on average, spread over the window. α = 0 keeps only the radius
    (a few updates take it all, the others nothing); α = 1 shares it evenly. The bound and the two limits: docs/control.md.

    **Pass the largest staleness that rollouts yet to be read can have**, such as the maximum a system is configured with; the
    realised staleness of the current batch says nothing about the next one, whose drift this update makes. What is not
    guaranteed: where w grows by more than 1, the radius shrinks, or something else moves the parameters, versions may lie too
    far away already. Then c is the largest that takes none of these farther away, and after w updates all is within R again.
    θ_{t+1} may be off by its own rounding, which does not add up. With staleness 0 there is no window and nothing is scaled.
    Updates of 0 and those that are not finite pass unchanged, so that whatever watches for these finds them.

    It keeps max(S, 1) versions of the parameters and reads each once an update; `limit_staleness_path` keeps none.

    >>> optimizer = optax.chain(optax.sgd(1.0), limit_staleness_drift(1.0, max_staleness=4))
    >>> params, positions = jnp.zeros(2), []
    >>> state, update = optimizer.init(params), jax.jit(optimizer.update)
    >>> for _ in range(8):  # a gradient that always points the same way
    ...     updates, state = update(jnp.array([-3.0, -4.0]), state, params, staleness=jnp.int32(4))
    ...     params = optax.apply_updates(params, updates)
    ...     positions.append(float(jnp.linalg.norm(params)))
    >>> print(" ".join(f"{x:.2f}" for x in positions))
    0.50 0.71 0.87 1.00 1.50 1.71 1.87 2.00

    Args:
      radius: R > 0, distance between parameters; inf = no limit. An array [] where `optax.inject_hyperparams` schedules it: one
        that reaches 0 or less stops the run (c = 0), and a NaN shows as NaN.
      max_staleness: S ≥ 0, learner updates: the largest `staleness` that will be passed.
      exponent: α in [0, 1].
      dtype: of the kept versions, as in `staleness.create_history`; a lower precision costs that precision in the bound.
      memory_kind: where they are kept, as there.

    Returns:
      A transformation whose `update` needs `params` and `staleness=`: [] or [B] int (its maximum counts), learner updates. A
      traced one above S counts as S, a negative one as 0. Its state is a `DriftState`.

    Raises:
      ValueError: an option out of its range; in `update`, params or staleness missing or no integer within 0..S, or complex
        updates (real and imaginary parts must be leaves of their own).
    """
    radius, exponent, max_staleness = _limit_options(radius, exponent, max_staleness)

    def init(params):
        history = staleness_lib.create_history(params, max(max_staleness, 1), dtype=dtype, memory_kind=memory_kind)
        return DriftState(history.params, history.versions, history.step, jnp.ones((), jnp.float32))

    def update(updates, state, params=None, *, staleness=None, **extra_args):
        del extra_args
        window = _as_window(staleness, max_staleness)
        if params is None:
            raise ValueError("params is None; limit_staleness_drift needs the parameters: update(updates, state, params, ...)")
        dtypes = tuple(np.dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params))
        history = staleness_lib.push(ParamHistory(state.params, state.versions, state.step, dtypes), params)
        scale = _drift_scale(updates, params, history, radius, window, exponent)
        state = DriftState(history.params, history.versions, history.step, scale.astype(jnp.float32))
        return _scaled(scale, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def limit_staleness_path(
    radius: float | jax.Array, max_staleness: int, *, exponent: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """`limit_staleness_drift` without stored parameters: bounds the length of the path instead of the distance.

        Σ_{i<j} ‖u_{t−i}‖ ≤ R (j/w)^α    for every j = 1..w

    By the triangle inequality the drift obeys the same bound, and a ballistic run reaches it. A diffusive one is held √w times
    as short as it need be. With α = 1 and a constant window this is ‖u_t‖ ≤ R/w. What to pass and what becomes of updates of 0
    and of non-finite ones is as in `limit_staleness_drift`. Where the window grows by more than 1 or the radius shrinks, c is 0
    until the path fits again. The rounding of the parameters is not seen.

    Args:
      radius: R > 0; inf = no limit. An array [] as in `limit_staleness_drift`.
      max_staleness: S ≥ 0, learner updates: the largest `staleness` that will be passed.
      exponent: α in [0, 1].

    Returns:
      A transformation whose `update` needs `staleness=`, with a `PathState` of max(S, 1) + 1 numbers.

    Raises:
      ValueError: an option out of its range; in `update`, staleness missing or no integer within 0..S, or complex updates.
    """
    radius, exponent, max_staleness = _limit_options(radius, exponent, max_staleness)

    def init(params):
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        return PathState(jnp.zeros((max(max_staleness, 1),), dtype), jnp.ones((), jnp.float32))

    def update(updates, state, params=None, *, staleness=None, **extra_args):
        del params, extra_args
        window = _as_window(staleness, max_staleness)
        peak, direction = _peak_and_direction(updates)
        norm = jnp.where(_can_scale(peak), peak * jnp.sqrt(_inner(direction, direction)), 0)
        lags = jnp.arange(1, state.norms.size + 1)
        walked = jnp.cumsum(jnp.roll(state.norms, 1).at[0].set(0))  # [K], by the last 0..K−1 updates
        room = jnp.where(lags <= window, radius * _envelope(lags, window, exponent) - walked, jnp.inf)
        room = jnp.maximum(jnp.min(room), 0)
        taken = jnp.minimum(norm, room)
        # Not norm/norm: compiled, that may be a norm times a reciprocal, which is not 1.
        scale = jnp.where((norm <= room) | (norm == 0), 1, room / jnp.where(norm > 0, norm, 1))
        norms = jnp.roll(state.norms, 1).at[0].set(taken.astype(state.norms.dtype))
        return _scaled(scale, updates), PathState(norms, scale.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_ess(
    exponent: float | jax.Array = 0.5, *, reference: float | jax.Array = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Scales the update, hence the learning rate, by min(1, (ESS/B)/reference)^exponent: the step of VCPO (arXiv 2602.17616).

    ESS/B = (Σw)²/(B Σw²) of the batch's completion weights w = π_θ/π_φ, unclipped: `off_policy/ess_ratio` of
    `metrics.off_policy`. The exponent ½ is VCPO's rule for AdamW-like optimizers, 1 its `linear` one; `reference` is its
    `base_ess_ratio`. Last in a chain it also scales decoupled weight decay, as a learning rate does. VCPO's baseline for the
    advantages is not part of it.

    >>> optimizer = optax.chain(optax.sgd(1.0), scale_by_ess())
    >>> updates, _ = optimizer.update(jnp.array([1.0, 2.0]), optimizer.init(jnp.zeros(2)), ess=0.25)
    >>> print(updates)
    [-0.5 -1. ]

    Args:
      exponent: > 0.
      reference: in (0, 1], the ratio from which on the learning rate is left as it is.

    Returns:
      A stateless transformation whose `update` needs `ess=`: [] float in (0, 1], ESS/B. A traced one is not checked: above the
      reference it counts as the reference, and a NaN makes the update NaN.

    Raises:
      ValueError: an option out of its range; in `update`, ess missing, not one number, or outside (0, 1].
    """
    exponent = exponent if isinstance(exponent, jax.Array) else as_positive("exponent", exponent)
    reference = reference if isinstance(reference, jax.Array) else as_fraction("reference", reference, closed=True)

    def update(updates, state, params=None, *, ess=None, **extra_args):
        del params, extra_args
        return _scaled(jnp.minimum(_as_ess(ess) / reference, 1) ** exponent, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _drift_scale(updates, params, history: ParamHistory, radius, window, exponent: float) -> jax.Array:
    """The largest c in [0, 1] whose θ + c u keeps every lag's bound, or takes it no farther away where it is broken."""
    peak, direction = _peak_and_direction(updates)
    square, unit = _inner(direction, direction), jnp.where(radius <= 0, 1, radius)  # of length

    def length(age):
        version, _ = staleness_lib.read(history, age)  # older than the first there is only the first, which counts as older
        # In units of the radius, so that nothing overflows and an infinite radius needs no case of its own.
        gap = jax.tree.map(lambda a, b: (_wide(a) - _wide(b)) / unit, params, version)
        room = _envelope(age + 1, window, exponent) ** 2 - _inner(gap, gap)
        return jnp.where(age < window, _step_length(square, _inner(gap, direction), jnp.maximum(room, 0)), jnp.inf)

    lengths = jax.lax.map(length, jnp.arange(history.capacity))  # one version at a time: they may lie in host memory
    can_scale = _can_scale(peak)
    scale = jnp.minimum(jnp.min(lengths) * unit / jnp.where(can_scale, peak, 1), 1)
    scale = jnp.where((radius <= 0) & (window > 0), 0, scale)  # lag 1 leaves no room
    return jnp.where(can_scale, scale, 1)


def _step_length(square, along, room) -> jax.Array:
    """The largest τ with square·τ² + 2·along·τ ≤ room (≥ 0), written without the difference that would cancel."""
    root = jnp.sqrt(along**2 + square * room)
    outward = along > 0
    return jnp.where(outward, room / jnp.where(outward, along + root, 1), (root - along) / square)


def _envelope(lag, window, exponent: float) -> jax.Array:
    """(j/w)^α, the share of the radius that lag j ≤ w may use; what it says of an empty window is not used."""
    return (lag / jnp.maximum(window, 1)) ** exponent


def _peak_and_direction(updates) -> tuple[jax.Array, Params]:
    """(m = max |u|, u/m): the square of the direction lies in 1..number of parameters, whatever the scale of u."""
    if any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(updates)):
        raise ValueError("updates are complex; real and imaginary parts must be leaves of their own")
    peaks = [jnp.max(jnp.abs(_wide(leaf)), initial=0) for leaf in jax.tree.leaves(updates)]
    peak = functools.reduce(jnp.maximum, peaks, jnp.zeros((), jnp.float32))
    divisor = jnp.where(_can_scale(peak), peak, 1)
    return peak, jax.tree.map(lambda leaf: _wide(leaf) / divisor, updates)


def _can_scale(peak) -> jax.Array:
    return (peak > 0) & jnp.isfinite(peak)


def _inner(a: Params, b: Params) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products, jnp.zeros((), jnp.float32))


def _wide(leaf) -> jax.Array:
    """At least float32: a sum of bfloat16 squares would stop growing."""
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))


def _scaled(scale, updates):
    """Every leaf times the factor, in its own dtype; a factor of 1 changes no bit."""
    return jax.tree.map(lambda leaf: (scale * _wide(leaf)).astype(jnp.result_type(leaf)), updates)


def _limit_options(radius, exponent, max_staleness) -> tuple:
    """R, α, S, checked; arrays of one number are what `optax.inject_hyperparams` makes of numbers, and pass."""
    for name, value in (("radius", radius), ("exponent", exponent)):
        if isinstance(value, jax.Array) and value.ndim:
            raise ValueError(f"{name} has shape {value.shape}; it must be one number")
    if not isinstance(radius, jax.Array):
        radius = as_positive("radius", radius, infinite=True)
    if not isinstance(exponent, jax.Array):
        exponent = as_number("exponent", exponent, lambda x: 0 <= x <= 1, "lie in [0, 1]")
    return radius, exponent, as_integer("max_staleness", max_staleness, minimum=0)


def _as_window(staleness, max_staleness: int) -> jax.Array:
    """w: the largest of the given lags, at most S."""
    if staleness is None:
        raise ValueError("staleness is missing; pass update(updates, state, params, staleness=the largest lag yet to be read)")
    array = staleness if isinstance(staleness, jax.Array) else np.asarray(staleness)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim > 1 or not array.size:
        raise ValueError(f"staleness is {array.dtype}{list(array.shape)}; it must be one integer or integers of shape [B]")
    if isinstance(array, np.ndarray) and not (0 <= array.min() and array.max() <= max_staleness):
        raise ValueError(f"staleness={staleness} must lie in 0..max_staleness={max_staleness}")
    return jnp.clip(jnp.max(array), 0, max_staleness)


def _as_ess(ess):
    if ess is None:
        raise ValueError("ess is missing; pass update(updates, state, params, ess=the batch's ESS/B)")
    if jnp.ndim(ess):
        raise ValueError(f"ess has shape {jnp.shape(ess)}; it must be one number")
    return ess if isinstance(ess, jax.Array) else as_fraction("ess", ess, closed=True)
