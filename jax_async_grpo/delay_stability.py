"""The largest learning rate at which an equilibrium survives stale rollouts, exactly, from two Jacobians. NumPy and SciPy only.

Let F(θ,φ) be the expected update per unit learning rate (the surrogate gradient of arXiv 2607.01083 plus regularizers), θ the
learner's parameters, φ those that drew the rollouts, and F(θ*,θ*) = 0. With A = ∂_θF and B = ∂_φF there, the distance x to the
equilibrium obeys a *delayed* system, to first order (the analysis is this project's; docs/laws/delay_stability.md):

    fixed     x_{t+1} = x_t + η(A x_t + B x_{t−S})
    periodic  x_{t+1} = x_t + η(A x_t + B x_{t−s}),  s = t mod (S+1)
    random    x_{t+1} = x_t + η(A x_t + B x_{t−s}),  s uniform on 0..S, drawn anew in every update

`max_learning_rate` is the end of the interval (0, η) on which the system is stable. Local stability is not collapse: beyond
the threshold the parameters oscillate or leave the equilibrium, which need not cost reward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq, linear_sum_assignment, minimize_scalar
from scipy.sparse import linalg as sparse

from jax_async_grpo.option_checks import as_integer

__all__ = ["DelayStability", "companion_matrix", "cycle_matrix", "delay_stability", "delay_stability_matrix_free"]

_SCHEDULES = ("fixed", "periodic", "random")
_MARGINAL = 1e-9  # of the norms: a growth rate closer to 0 is not told from 0
_REAL = 1e-6  # |Im|/|μ| below which an eigenvalue counts as real: rounding splits a defective one by about the root of epsilon
_VERIFY_SIZE = 500  # largest companion matrix whose eigenvalues check a threshold
_VERIFY_MARGIN = 1e-4  # how far below the threshold that check is made
_POINTS_PER_TURN = 200  # frequencies per turn of e^{−i(S+1)ω}
_CHUNK = 64  # frequencies whose eigenvalues are computed at once
_MAX_HALVINGS = 14  # of one step of the sweep
_SECOND_MOMENT_SIZE = 2500  # largest n²(S+1)² for the mean-square bound


@dataclasses.dataclass(frozen=True)
class DelayStability:
    """Stability of an equilibrium under stale rollouts; see `delay_stability`.

    Attributes:
      max_learning_rate: the equilibrium is stable for 0 < η < this. 0 if it is unstable, or marginal to first order, at every
        small η; inf where nothing can grow or the
        scan of a periodic schedule finds no threshold. For a random lag almost-sure stability, known to `standard_error`.
      frequency: argument of the multiplier that leaves the unit circle, in [0, π] radians: per update (fixed), per cycle of S+1
        updates (periodic); None where there is none.
      schedule: "fixed", "periodic" or "random".
      staleness: S, the largest staleness, updates.
      learner_norm: ‖A‖, the spectral norm without the gauge modes; None where it was not computed.
      behavior_norm: ‖B‖, likewise.
      growth_bound: max over phases ψ of the largest real part of an eigenvalue of A + e^{iψ}B, per update and unit η.
      num_gauge_modes: directions taken out because neither A nor B sees them; matrix-free, those it met.
      verified: the eigenvalues of the companion or cycle matrix lie inside the unit disc just below the threshold.
      reason: in words, what limits the learning rate.
      standard_error: of a random lag's threshold, from the spread between simulated chains.
      mean_square_learning_rate: random lag: the second moment decays below it, a lower bound; None where n(S+1) > 50.
    """

    max_learning_rate: float
    frequency: float | None
    schedule: str
    staleness: int
    learner_norm: float | None
    behavior_norm: float | None
    growth_bound: float
    num_gauge_modes: int
    verified: bool
    reason: str
    standard_error: float | None = None
    mean_square_learning_rate: float | None = None

    @property
    def behavior_dominates(self) -> bool | None:
        """‖B‖ > ‖A‖, the rule of thumb for the 1/S law; the same as `must_fall_with_staleness` for one parameter."""
        return None if self.learner_norm is None else self.behavior_norm > self.learner_norm

    @property
    def must_fall_with_staleness(self) -> bool:
        """Whether the threshold of a *fixed* lag tends to 0 as 1/S; if not, it stays above a number for every S.

        `growth_bound` > 0: some phase of the delay makes A + e^{iψ}B grow, and a delay η·S of that phase exists. Otherwise
        η_max ≥ 2·|growth_bound|/(‖A‖+‖B‖)² for every S.
        """
        return self.growth_bound > 0


def delay_stability(
    learner_jacobian,
    behavior_jacobian,
    staleness: int,
    *,
    schedule: str = "fixed",
    gauge_tolerance: float = 1e-9,
    num_steps: int = 4000,
    num_chains: int = 32,
    seed: int = 0,
) -> DelayStability:
    """The largest stable learning rate of x_{t+1} = x_t + η(A x_t + B x_{t−s}) for a schedule of the staleness s ≤ S.

    *fixed*: a multiplier e^{iω} on the unit circle needs an eigenvalue μ of A + e^{−iSω}B with (e^{iω} − 1)/μ = η > 0. The
    eigenvalues are followed over ω in [0, π]; a step is halved where one turns by more than 0.3 rad or two near the axis could
    be mistaken for each other; each crossing is bisected and the smallest η kept. *periodic*: the smallest η at which
    (I+ηA)^k + η Σ_{j<k} (I+ηA)^j B, k = S+1, has spectral radius 1: a scan in steps of at most 0.1/(k(‖A‖+‖B‖)) or 0.2 % of
    η, whichever is larger, local maxima near 1 maximized, the first crossing bisected; a peak narrower than a step can be
    missed. *random*: the zero of the largest Lyapunov exponent of a random matrix product, simulated with the same lags at
    every η and normalized as it goes, and the mean-square bound from the map of the second moments.

    Args:
      learner_jacobian: A = ∂_θF [n, n].
      behavior_jacobian: B = ∂_φF [n, n].
      staleness: S ≥ 0, updates; at S = 0 all schedules are the synchronous one.
      schedule: "fixed", "periodic" or "random".
      gauge_tolerance: directions (left or right) that A and B shrink by this factor of their largest singular value are gauge
        modes, such as the shift of a softmax, and leave the system. Raise it to 1e-5 for Jacobians computed in float32.
      num_steps: simulated updates of a random lag after a quarter as many of burn-in.
      num_chains: independent simulated lag sequences, at least 2.
      seed: of the simulated lags and initial states, a non-negative integer.

    Returns:
      A `DelayStability`.

    Raises:
      ValueError: an argument is out of range, or A and B are not finite square matrices of one size.
      ArithmeticError: the companion matrix contradicts the sweep even at its finest.
    """
    learner, behavior = _jacobians(learner_jacobian, behavior_jacobian)
    staleness = as_integer("staleness", staleness, minimum=0)
    _check_schedule(schedule)
    num_steps = as_integer("num_steps", num_steps, minimum=100)
    num_chains = as_integer("num_chains", num_chains, minimum=2)
    seed = as_integer("seed", seed, minimum=0)
    if not 0 < gauge_tolerance < 1:
        raise ValueError(f"gauge_tolerance={gauge_tolerance!r} must lie in (0, 1)")
    dimension = len(learner)
    learner, behavior = _without_gauge(learner, behavior, gauge_tolerance)
    common = dict(schedule=schedule, staleness=staleness, num_gauge_modes=dimension - len(learner))
    if not len(learner):
        return DelayStability(
            math.inf, None, learner_norm=0.0, behavior_norm=0.0, growth_bound=0.0, verified=True, reason=_ALL_GAUGE, **common
        )
    common |= dict(learner_norm=float(np.linalg.norm(learner, 2)), behavior_norm=float(np.linalg.norm(behavior, 2)))
    common |= dict(growth_bound=_growth_bound(learner, behavior))
    growth = float(np.linalg.eigvals(learner + behavior).real.max())
    scale = common["learner_norm"] + common["behavior_norm"]
    if growth >= -_MARGINAL * scale:
        return DelayStability(0.0, None, verified=True, reason=_unstable_reason(growth, scale), **common)
    if schedule == "fixed" or staleness == 0:
        rate, frequency, verified = _fixed_threshold(learner, behavior, staleness, scale)
    elif schedule == "periodic":
        rate, frequency = _periodic_threshold(learner, behavior, staleness + 1, scale)
        verified = math.isfinite(rate)
    else:
        start = _fixed_threshold(learner, behavior, staleness, scale)[0]
        bound = _mean_square_threshold(learner, behavior, staleness, start)
        rate, error = _random_threshold(learner, behavior, staleness, start, num_steps, num_chains, seed)
        common |= dict(standard_error=error, mean_square_learning_rate=bound)
        frequency, verified = None, False
    reason = _threshold_reason(rate, frequency, schedule if staleness else "fixed")
    return DelayStability(rate, frequency, verified=verified, reason=reason, **common)


def companion_matrix(learner_jacobian, behavior_jacobian, staleness: int, learning_rate: float) -> np.ndarray:
    """[n(S+1), n(S+1)] map of (x_t, ..., x_{t−S}) to (x_{t+1}, ..., x_{t−S+1}) for a fixed lag S; stable iff its radius < 1."""
    learner, behavior = _jacobians(learner_jacobian, behavior_jacobian)
    staleness = as_integer("staleness", staleness, minimum=0)
    n = len(learner)
    matrix = np.eye(n * (staleness + 1), k=-n)
    matrix[:n, :n] = np.eye(n) + learning_rate * learner
    matrix[:n, n * staleness :] += learning_rate * behavior
    return matrix


def cycle_matrix(learner_jacobian, behavior_jacobian, sync_interval: int, learning_rate) -> np.ndarray:
    """(I+ηA)^k + η Σ_{j<k} (I+ηA)^j B, k = sync_interval: k updates on the rollouts of the policy at the cycle's start.

    `learning_rate` [...] gives [..., n, n].
    """
    learner, behavior = _jacobians(learner_jacobian, behavior_jacobian)
    k = as_integer("sync_interval", sync_interval, minimum=1)
    n, rates = len(learner), np.asarray(learning_rate, np.float64)[..., None, None]
    # (x, φ) -> ((I+ηA)x + ηBφ, φ), k times, from x = φ
    joint = np.zeros((*rates.shape[:-2], 2 * n, 2 * n))
    joint[..., :n, :n] = np.eye(n) + rates * learner
    joint[..., :n, n:] = rates * behavior
    joint[..., n:, n:] = np.eye(n)
    joint = np.linalg.matrix_power(joint, k)
    return joint[..., :n, :n] + joint[..., :n, n:]


def delay_stability_matrix_free(
    learner_jvp: Callable[[np.ndarray], np.ndarray],
    behavior_jvp: Callable[[np.ndarray], np.ndarray],
    dimension: int,
    staleness: int,
    *,
    schedule: str = "fixed",
    num_eigenvalues: int = 8,
    points_per_turn: int = 32,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> DelayStability:
    """`delay_stability` from products v -> A v, v -> B v, for policies of more than a few thousand parameters.

    Of the eigenvalues μ of A + e^{−iSω}B the sweep knows the `num_eigenvalues` with the largest real part of μ·e^{−i(π+ω)/2},
    the direction in which a crossing is real and positive (ARPACK, complex; two real products with A and two with B an
    iteration). A crossing hidden behind as many eigenvalues that lie further out is missed: raise the number until the result
    stays. Gauge modes are recognized as vectors with A v = B v = 0. There are no norms without transposed products.

    Args:
      learner_jvp: A v [n] of a real v [n], e.g. `jax.jit(lambda v: jax.jvp(lambda p: F(p, phi), (theta,), (v,))[1])`.
      behavior_jvp: B v [n].
      dimension: n. Where n ≤ 2·num_eigenvalues + 2 the matrices are built and `delay_stability` answers.
      staleness: S, updates.
      schedule: "fixed" or "periodic".
      num_eigenvalues: eigenvalues computed at every frequency.
      points_per_turn: frequencies per turn of e^{−i(S+1)ω}.
      tolerance: relative, of the eigenvalues and of gauge modes.
      seed: of the start vector, a non-negative integer.

    Returns:
      A `DelayStability` whose norms are None (unless n is small), unverified.

    Raises:
      ValueError: an argument is out of range; a product has another shape or is not finite; schedule "random", whose simulated
        matrix product is only available with matrices; every eigenvalue found of A + B is a gauge mode.
      scipy.sparse.linalg.ArpackNoConvergence: the eigen-solver gave up; raise `tolerance` or `num_eigenvalues`.
    """
    dimension = as_integer("dimension", dimension, minimum=1)
    staleness = as_integer("staleness", staleness, minimum=0)
    _check_schedule(schedule)
    num_eigenvalues = as_integer("num_eigenvalues", num_eigenvalues, minimum=1)
    points_per_turn = as_integer("points_per_turn", points_per_turn, minimum=8)
    seed = as_integer("seed", seed, minimum=0)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must lie in (0, 1)")
    if schedule == "random":
        raise ValueError("schedule='random' needs the matrices: use delay_stability")
    learner, behavior = _checked_product("learner_jvp", learner_jvp), _checked_product("behavior_jvp", behavior_jvp)
    if dimension <= 2 * num_eigenvalues + 2:
        columns = [np.stack([product(v) for v in np.eye(dimension)], axis=1) for product in (learner, behavior)]
        return delay_stability(*columns, staleness, schedule=schedule, gauge_tolerance=tolerance, seed=seed)
    start = np.random.default_rng(seed).standard_normal(dimension)

    def spectrum(phase, rotation=1.0, which="LR", count=num_eigenvalues):
        def product(v):
            v = np.ravel(v)
            real, imaginary = np.ascontiguousarray(v.real), np.ascontiguousarray(v.imag)
            a, b = learner(real) + 1j * learner(imaginary), behavior(real) + 1j * behavior(imaginary)
            return rotation * (a + phase * b)

        operator_ = sparse.LinearOperator((dimension, dimension), matvec=product, dtype=np.complex128)
        return sparse.eigs(operator_, k=count, which=which, tol=tolerance, v0=start.astype(np.complex128))

    phases = np.exp(1j * np.linspace(0, np.pi, 9))
    scale = 1.2 * max(abs(spectrum(phase, which="LM", count=1)[0][0]) for phase in phases)

    def is_gauge(vector):
        parts = (np.ascontiguousarray(vector.real), np.ascontiguousarray(vector.imag))
        return all(
            np.linalg.norm(product(part)) <= 1e3 * tolerance * scale for product in (learner, behavior) for part in parts
        )

    def without_gauge(values, vectors, at):
        near = np.abs(values - at) <= 1e2 * tolerance * max(scale, 1.0)
        return np.array([v for v, close, x in zip(values, near, vectors.T, strict=True) if not (close and is_gauge(x))])

    at_rest = without_gauge(*spectrum(1.0), 0.0)
    if not len(at_rest):
        raise ValueError(f"num_eigenvalues={num_eigenvalues}: the leading eigenvalues of A + B are all gauge modes; raise it")
    bounds = [max(without_gauge(*spectrum(phase), 0.0).real, default=-math.inf) for phase in phases[1:]]
    common = dict(schedule=schedule, staleness=staleness, learner_norm=None, behavior_norm=None, verified=False)
    common |= dict(growth_bound=float(max(at_rest.real.max(), *bounds)))
    common |= dict(num_gauge_modes=num_eigenvalues - len(at_rest))
    growth = float(at_rest.real.max())
    if growth >= -1e2 * tolerance * scale:
        return DelayStability(0.0, None, reason=_unstable_reason(growth, scale), **common)
    if schedule == "fixed" or staleness == 0:

        def rotated(omegas):
            return np.stack([spectrum(np.exp(-1j * staleness * w), np.exp(-0.5j * (np.pi + w)))[0] for w in omegas])

        grid = math.ceil(points_per_turn * (staleness + 1) / 2)
        rate, frequency = _smallest_crossing(rotated, grid, scale, lipschitz=0.0, halvings=3)
    else:

        def multipliers(rates):
            return np.stack([_cycle_multipliers(rate) for rate in rates])

        def _cycle_multipliers(rate):
            def cycle(v):
                v = np.ravel(v)
                x, drive = v, behavior(v)
                for _ in range(staleness + 1):
                    x = x + rate * (learner(x) + drive)
                return x

            operator_ = sparse.LinearOperator((dimension, dimension), matvec=cycle, dtype=np.float64)
            found = without_gauge(*sparse.eigs(operator_, k=num_eigenvalues, which="LM", tol=tolerance, v0=start), 1.0)
            return np.pad(found, (0, num_eigenvalues - len(found)))

        rate, frequency = _first_unit_radius(multipliers, staleness + 1, scale, growth=1.15, resolution=1.0, chunk=1)
    return DelayStability(rate, frequency, reason=_threshold_reason(rate, frequency, schedule), **common)


_ALL_GAUGE = "A and B vanish: every direction is a gauge mode and nothing can grow"


def _unstable_reason(growth: float, scale: float) -> str:
    if growth > _MARGINAL * scale:
        return f"A + B has an eigenvalue with real part {growth:.3g} > 0: unstable at every small learning rate"
    return "A + B has an eigenvalue with real part 0 that is no gauge mode: marginal to first order in the learning rate"


def _threshold_reason(rate: float, frequency: float | None, schedule: str) -> str:
    if math.isinf(rate):
        return "no threshold found within the scanned learning rates"
    if schedule == "random":
        return "the Lyapunov exponent of the random matrix product becomes positive"
    unit = "update" if schedule == "fixed" else "cycle"
    if frequency >= np.pi * (1 - 1e-4):
        return f"a multiplier leaves the unit circle at −1: the sign alternates every {unit}"
    if frequency < 1e-6:
        return f"a multiplier leaves the unit circle at 1: growth without oscillation, {unit} by {unit}"
    return f"a multiplier leaves the unit circle at {frequency:.4g} rad: a period of {2 * np.pi / frequency:.4g} {unit}s"


def _fixed_threshold(learner, behavior, staleness: int, scale: float) -> tuple[float, float, bool]:
    """(η, ω, verified); a sweep that the companion matrix contradicts is repeated with finer steps."""

    def rotated(omegas):
        phases = np.exp(-1j * staleness * omegas)[:, None, None]
        return np.linalg.eigvals(learner + phases * behavior) * np.exp(-0.5j * (np.pi + omegas))[:, None]

    lipschitz = staleness * np.linalg.norm(behavior, 2) + scale / 2
    for refinement in (1, 4, 16):
        grid = math.ceil(refinement * _POINTS_PER_TURN * (staleness + 1) / 2 / np.pi)
        rate, frequency = _smallest_crossing(rotated, grid, scale, lipschitz, _MAX_HALVINGS)
        if len(learner) * (staleness + 1) > _VERIFY_SIZE:
            return rate, frequency, False
        below = companion_matrix(learner, behavior, staleness, rate * (1 - _VERIFY_MARGIN))
        if _radius(below) < 1:
            return rate, frequency, True
    raise ArithmeticError(f"the frequency sweep gave {rate:g}, where the companion matrix is unstable already; rescale A and B")


def _smallest_crossing(rotated, grid: int, scale: float, lipschitz: float, halvings: int) -> tuple[float, float]:
    """The smallest η = 2 sin(ω/2)/ν over ω in (0, π] and positive real ν among `rotated`(ω) [m] -> [m, n]; (η, ω).

    `rotated` are the eigenvalues μ·e^{−i(π+ω)/2}: e^{iω} − 1 = 2 sin(ω/2)·e^{i(π+ω)/2}, so that η = (e^{iω} − 1)/μ > 0 means
    a positive real ν. At ω = 0, where A + B is stable, Im ν = −Re μ > 0 for all of them.
    """
    omegas = np.linspace(0, np.pi, grid + 1)
    best = (math.inf, math.nan)
    for first in range(0, grid, _CHUNK):
        chunk = omegas[first : first + _CHUNK + 1]
        if 2 * math.sin(chunk[0] / 2) >= best[0] * scale:
            return best  # |ν| ≤ scale: nothing smaller beyond
        values = rotated(chunk)
        for i in range(len(chunk) - 1):
            best = _search(rotated, (chunk[i], values[i], chunk[i + 1], values[i + 1]), best, lipschitz, halvings)
    flips = values[-1][(values[-1].real > 0) & (np.abs(values[-1].imag) <= _REAL * np.abs(values[-1]))].real
    return min(best, (2 / float(flips.max()), math.pi)) if len(flips) else best


def _search(rotated, interval, best, lipschitz: float, halvings: int) -> tuple[float, float]:
    """The smaller of `best` and the smallest η in one step of the sweep, halved where it is too coarse to tell."""
    stack = [(*interval, halvings)]
    while stack:
        low, start, high, end, left = stack.pop()
        end = end[linear_sum_assignment(np.abs(start[:, None] - end))[1]]
        size, move = np.maximum(np.abs(start), np.abs(end)), np.abs(end - start)
        with np.errstate(divide="ignore"):
            relevant = 2 * math.sin(low / 2) / (1.5 * size) < best[0]
        traced = move <= 0.3 * size
        side = end.imag > 0
        crossing = relevant & traced & ((start.imag > 0) != side) & (np.maximum(start.real, end.real) > 0)
        touching = (
            ~crossing & (np.maximum(start.real, end.real) > 0) & (np.minimum(np.abs(start.imag), np.abs(end.imag)) < move / 2)
        )
        right = relevant & (end.real > 0)
        close = np.abs(end[:, None] - end) < 2 * lipschitz * (high - low)
        confusable = (close & (side[:, None] != side) & right[:, None] & right).any()
        if left and ((relevant & (~traced | touching)).any() or confusable):
            middle = (low + high) / 2
            values = rotated(np.array([middle]))[0]
            stack += [(middle, values, high, end, left - 1), (low, start, middle, values, left - 1)]
            continue
        for branch in np.flatnonzero(crossing):
            best = min(best, _bisect(rotated, low, start[branch], high, end[branch]))
    return best


def _bisect(rotated, low, start, high, end) -> tuple[float, float]:
    """(η, ω) where the branch from `start` at `low` to `end` at `high` crosses the real axis; η = inf left of the origin."""
    for _ in range(20):
        middle = (low + high) / 2
        values = rotated(np.array([middle]))[0]
        value = values[np.argmin(np.abs(values - (start + end) / 2))]
        if (value.imag > 0) == (start.imag > 0):
            low, start = middle, value
        else:
            high, end = middle, value
    share = start.imag / (start.imag - end.imag)
    omega, nu = float(low + share * (high - low)), float((start + share * (end - start)).real)
    return (2 * math.sin(omega / 2) / nu, omega) if nu > 0 else (math.inf, math.nan)


def _periodic_threshold(learner, behavior, interval: int, scale: float) -> tuple[float, float | None]:
    def multipliers(rates):
        with np.errstate(over="ignore", invalid="ignore"):
            cycles = cycle_matrix(learner, behavior, interval, rates)
        return np.linalg.eigvals(np.nan_to_num(cycles, nan=1e200, posinf=1e200, neginf=-1e200))

    return _first_unit_radius(multipliers, interval, scale, growth=1.05, resolution=0.1, chunk=_CHUNK)


def _first_unit_radius(multipliers, interval: int, scale: float, *, growth, resolution, chunk) -> tuple[float, float | None]:
    """(η, argument of the multiplier) at the smallest scanned η where max|`multipliers`(η [m]) [m, n]| reaches 1.

    Steps of a factor `growth` while they are shorter than resolution/(interval·scale), then of that length or 0.2 %. Near a
    local maximum of the radius below 1 that a neighbor's slope could lift above 1, the maximum itself is looked for.
    """

    def excess(rate):
        return float(np.abs(multipliers(np.array([rate]))[0]).max()) - 1

    step = resolution / (interval * scale)
    rate, rates, radii = 1e-8 / (interval * scale), [], []
    while rate < 1e6 / scale:
        batch = []
        for _ in range(chunk):
            batch.append(rate)
            rate += min((growth - 1) * rate, max(step, 2e-3 * rate))
        rates += batch
        radii += np.abs(multipliers(np.array(batch))).max(axis=1).tolist()
        for i in range(max(1, len(rates) - chunk - 1), len(rates)):
            low, high = rates[i - 1], rates[i]
            peak = i >= 2 and radii[i - 1] >= max(radii[i - 2], radii[i])
            if peak and 1 - radii[i - 1] < radii[i - 1] - min(radii[i - 2], radii[i]):
                top = minimize_scalar(lambda r: -excess(r), bounds=(rates[i - 2], high), method="bounded").x
                if excess(top) >= 0:
                    return _unit_radius_between(multipliers, excess, rates[i - 2], top)
            if radii[i] >= 1:
                return _unit_radius_between(multipliers, excess, low, high)
    return math.inf, None


def _unit_radius_between(multipliers, excess, low: float, high: float) -> tuple[float, float]:
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
    values = multipliers(np.array([high]))[0]
    return high, float(abs(np.angle(values[np.argmax(np.abs(values))])))


def _random_threshold(learner, behavior, staleness, start, num_steps, num_chains, seed) -> tuple[float, float]:
    """(η, standard error) at the first zero of the Lyapunov exponent: a scan by factors 2^(1/4), then three finer ones."""

    def exponents(rates):
        return _lyapunov_exponents(learner, behavior, staleness, rates, num_steps, num_chains, seed)

    rates = start * 2.0 ** np.arange(-4, 4.25, 0.25)
    mean = exponents(rates).mean(axis=1)
    while not (mean[0] < 0 < mean.max()):
        factor = 2.0**-8 if mean[0] >= 0 else 2.0**8
        rates = rates * factor
        mean = exponents(rates).mean(axis=1)
    for _ in range(3):
        last = int(np.argmax(mean > 0))
        rates = np.linspace(rates[last - 1], rates[last], 9)
        chains = exponents(rates)
        mean = chains.mean(axis=1)
    last = int(np.argmax(mean > 0))
    slope = np.polyfit(rates, mean, 1)[0]
    rate = rates[last - 1] + (rates[last] - rates[last - 1]) * mean[last - 1] / (mean[last - 1] - mean[last])
    return float(rate), float(chains[last].std(ddof=1) / math.sqrt(num_chains) / abs(slope))


def _lyapunov_exponents(learner, behavior, staleness, rates, num_steps, num_chains, seed) -> np.ndarray:
    """[num_rates, num_chains] log growth per update of a random vector under the product, the same lags for every rate."""
    rng = np.random.default_rng(seed)
    burn_in, versions, n = num_steps // 4, staleness + 1, len(learner)
    lags = rng.integers(0, versions, (burn_in + num_steps, num_chains))
    ring = np.repeat(rng.standard_normal((versions, num_chains, 1, n)), len(rates), axis=2)
    chains, step_sizes = np.arange(num_chains), np.asarray(rates)[:, None]
    total = np.zeros((num_chains, len(rates)))
    for step in range(burn_in + num_steps):
        if step == burn_in:
            total[:] = 0
        fresh, stale = ring[step % versions], ring[(step - lags[step]) % versions, chains]
        ring[(step + 1) % versions] = fresh + step_sizes * (fresh @ learner.T + stale @ behavior.T)
        if step % 4 == 3 or step + 1 in (burn_in, burn_in + num_steps):
            norm = np.sqrt(np.einsum("kcrn,kcrn->cr", ring, ring))
            ring /= norm[None, :, :, None]
            total += np.log(norm)
    return (total / num_steps).T


def _mean_square_threshold(learner, behavior, staleness: int, start: float) -> float | None:
    """The smallest η, on a scan by 15 % from 1/8 of `start`, at which the map of E[x_i x_jᵀ], 0 ≤ i, j ≤ S, has radius 1."""
    size = (len(learner) * (staleness + 1)) ** 2
    if size > _SECOND_MOMENT_SIZE:
        return None

    def excess(rate):
        return _second_moment_radius(learner, behavior, staleness, rate) - 1

    low = start / 8
    while excess(low) >= 0:
        low /= 8
    while excess(high := low * 1.15) < 0:
        low = high
    return float(brentq(excess, low, high, rtol=1e-9))


def _second_moment_radius(learner, behavior, staleness: int, rate: float) -> float:
    """Spectral radius of P -> (1/(S+1)) Σ_s M_s P M_sᵀ, P [S+1, S+1, n, n] blocks, M_s the companion matrix of lag s."""
    n, versions = len(learner), staleness + 1
    own, lagged = np.eye(n) + rate * learner, rate * behavior

    def moments(flat):
        p = flat.reshape(versions, versions, n, n)
        result = np.empty_like(p)
        result[1:, 1:] = p[:-1, :-1]
        cross = own @ p[0].mean(axis=0) @ lagged.T
        mean = own @ p[0] + lagged @ p.mean(axis=0)
        result[0, 1:] = mean[:-1]
        result[1:, 0] = np.swapaxes(mean[:-1], -1, -2)
        diagonal = np.einsum("ssij->ij", p) / versions
        result[0, 0] = own @ p[0, 0] @ own.T + cross + cross.T + lagged @ diagonal @ lagged.T
        return result.ravel()

    size = (n * versions) ** 2
    # Symmetric P only: the map keeps them, and its radius has a positive semidefinite eigenvector.
    start = np.swapaxes(np.eye(n * versions).reshape(versions, n, versions, n), 1, 2).ravel()
    if size <= 4:
        return _radius(np.stack([moments(column) for column in np.eye(size)], axis=1))
    operator_ = sparse.LinearOperator((size, size), matvec=lambda v: moments(np.ravel(v)), dtype=np.float64)
    return float(np.abs(sparse.eigs(operator_, k=1, which="LM", v0=start, tol=1e-10, return_eigenvectors=False)).max())


def _growth_bound(learner, behavior) -> float:
    """max over ψ in [0, π] of max Re eig(A + e^{iψ}B): the best of 129 phases, then maximized beside it."""

    def growth(phases):
        return np.linalg.eigvals(learner + np.exp(1j * phases)[:, None, None] * behavior).real.max(axis=1)

    phases = np.linspace(0, np.pi, 129)
    values = growth(phases)
    best = int(np.argmax(values))
    edges = (phases[max(best - 1, 0)], phases[min(best + 1, 128)])
    return float(max(values[best], -minimize_scalar(lambda phase: -growth(np.array([phase]))[0], bounds=edges).fun))


def _without_gauge(learner, behavior, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B on the space without their common null vectors, right ones as a quotient, left ones as a subspace.

    With A R = B R = 0 and an orthonormal [Q, R], A is [[QᵀAQ, 0], [RᵀAQ, 0]]: its other eigenvalues are those of QᵀAQ, and of
    every combination with B likewise. Transposed for left ones. Repeated, as taking one kind out can show more of the other.
    """
    scale = max(np.linalg.norm(learner, 2), np.linalg.norm(behavior, 2))
    while len(learner):
        before = len(learner)
        for stacked in (np.concatenate, lambda pair: np.concatenate([m.T for m in pair])):
            _, singular, rows = np.linalg.svd(stacked([learner, behavior]), full_matrices=False)
            kept = rows[singular > tolerance * scale]
            learner, behavior = kept @ learner @ kept.T, kept @ behavior @ kept.T
        if len(learner) == before:
            break
    return learner, behavior


def _radius(matrix: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def _jacobians(learner_jacobian, behavior_jacobian) -> tuple[np.ndarray, np.ndarray]:
    pair = {"learner_jacobian": learner_jacobian, "behavior_jacobian": behavior_jacobian}
    matrices = []
    for name, value in pair.items():
        matrix = np.asarray(value)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise ValueError(f"{name} has shape {matrix.shape}; it must be [n, n]")
        if matrix.dtype.kind not in "fiuV" or not np.isfinite(matrix := matrix.astype(np.float64)).all():
            raise ValueError(f"{name} must hold finite real numbers")
        matrices.append(matrix)
    if matrices[0].shape != matrices[1].shape:
        raise ValueError(f"learner_jacobian {matrices[0].shape} and behavior_jacobian {matrices[1].shape} must have one shape")
    return tuple(matrices)


def _checked_product(name: str, product):
    def checked(vector):
        result = np.asarray(product(vector), np.float64)
        if result.shape != vector.shape or not np.isfinite(result).all():
            raise ValueError(f"{name} returned shape {result.shape} for {vector.shape}; it must be the same, and finite")
        return result

    return checked


def _check_schedule(schedule) -> None:
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule={schedule!r} must be one of {', '.join(_SCHEDULES)}")
