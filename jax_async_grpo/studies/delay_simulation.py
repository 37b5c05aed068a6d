"""The nonlinear delayed learner θ_{t+1} = θ_t + η F(θ_t, θ_{t−s_t}), near an equilibrium and far from it.

What delay stability says of the linear system is tested here without linearizing anything: a small deviation runs through the
full update field, its growth rate is measured, and the smallest learning rate at which it grows is bracketed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo.compiling import jit_repeated

__all__ = ["Threshold", "lag_table", "make_growth_rates", "make_trajectories", "simulated_thresholds"]

_CHUNK = 16  # updates between two measurements of the deviation
_GONE = 1e-6  # of its size: a deviation that shrank to this within a chunk starts anew


class Threshold(NamedTuple):
    """Where a simulated learner loses stability.

    Attributes:
      learning_rate: η at which the growth rate is 0, interpolated between the bracket's ends; inf where nothing grew.
      low, high: neighbors of the last grid: the deviation shrinks at the first and grows at the second.
    """

    learning_rate: float
    low: float
    high: float


def lag_table(schedules: list[tuple[str, int]], num_updates: int, seed: int) -> np.ndarray:
    """[num_updates, C] realised lags of (schedule, S) pairs; "random" ones differ between columns.

    All versions exist before the first update, so that the lag is S from the start.
    """
    columns = []
    for index, (schedule, largest) in enumerate(schedules):
        key = jax.random.fold_in(jax.random.key(seed), index)
        made = {
            "fixed": lambda s=largest: np.full(num_updates, s),
            "periodic": lambda s=largest: np.arange(num_updates) % (s + 1),
            "random": lambda s=largest, k=key: jax.random.randint(k, (num_updates,), 0, s + 1),
        }[schedule]()
        columns.append(np.asarray(made, np.int32))
    return np.stack(columns, axis=1)


def make_growth_rates(field: Callable) -> Callable:
    """A compiled `growth(theta, decay, learning_rates[C, E], lags[T, C], start[K, n], size) -> [T/16, C, E]`.

    `field(learner[n], behavior[n], decay) -> [n]` is F. C·E delayed learners start at theta + size·start (all K versions) and
    follow lags with their learning rates. After every 16 updates the logarithm of the norm of all K deviations is added up and
    they are scaled back to `size`, so that the learner stays near the equilibrium however it grows. A deviation that shrank by
    a million in 16 updates starts anew: what is left of it is rounding.
    """
    fields = jax.vmap(jax.vmap(field, in_axes=(0, 0, None)), in_axes=(0, 0, None))  # [C, E, n]

    def growth(theta, decay, learning_rates, lags, start, size):
        versions, (cells, rates) = len(start), learning_rates.shape
        fresh_start = theta + size * jnp.broadcast_to(start[:, None, None], (versions, cells, rates, theta.size))

        def update(state, lag):
            ring, step = state
            fresh, stale = ring[step % versions], ring[(step - lag) % versions, jnp.arange(cells)]
            new = fresh + learning_rates[..., None] * fields(fresh, stale, decay)
            return (ring.at[(step + 1) % versions].set(new), step + 1), None

        def measure(state, lags):
            ring, step = jax.lax.scan(update, state, lags)[0]
            norm = jnp.sqrt(jnp.sum((ring - theta) ** 2, axis=(0, 3))) / size
            gone = norm < _GONE
            ring = jnp.where(gone[..., None], fresh_start, theta + (ring - theta) / norm[..., None])
            return (ring, step), jnp.log(jnp.maximum(norm, _GONE))

        chunks = lags[: len(lags) // _CHUNK * _CHUNK].reshape(-1, _CHUNK, cells)
        return jnp.cumsum(jax.lax.scan(measure, (fresh_start, versions - 1), chunks)[1], axis=0)

    return jit_repeated(growth)


def simulated_thresholds(
    growth: Callable,
    theta: np.ndarray,
    decay: float,
    lags: np.ndarray,
    *,
    versions: int,
    window: tuple[float, float],
    ratio: float,
    grid: int,
    num_refinements: int,
    size: float,
    seed: int,
    cells_per_answer: int = 1,
) -> list[Threshold]:
    """The smallest learning rate at which each delayed learner's small deviation grows, found without the theory.

    The rule: learning rates of a geometric grid over `window`, upwards; the first that grows and the one below it are the
    bracket; `num_refinements` times it is divided geometrically into grid + 1 parts, of which the first that ends in growth is
    kept; between its ends the growth rate is interpolated linearly. A learning rate grows where the slope of the logarithm of
    the deviation over the second half of the updates is positive.

    Args:
      growth: of `make_growth_rates`.
      theta: [n], the equilibrium.
      decay: of the field.
      lags: [T, C·cells_per_answer], those of one answer side by side.
      versions: K, more than the largest lag.
      window: (low, high), learning rates.
      ratio: of neighbors in the coarse grid, at most.
      grid: learning rates simulated at once.
      num_refinements: of the bracket.
      size: norm of the deviation, in units of θ; small, so that the field is linear there.
      seed: of its direction.
      cells_per_answer: lag sequences over which the growth rate of one answer is averaged.

    Returns:
      C thresholds.

    Raises:
      ValueError: the lowest learning rate of the window grows already.
    """
    start = np.random.default_rng(seed).standard_normal((versions, len(theta)))
    start /= np.linalg.norm(start)
    num_answers = lags.shape[1] // cells_per_answer

    def slopes(rates):  # [A, grid] -> [A, grid]
        of_cells = _slopes(np.asarray(growth(theta, decay, np.repeat(rates, cells_per_answer, axis=0), lags, start, size)))
        return of_cells.reshape(num_answers, cells_per_answer, grid).mean(axis=1)

    count = grid * math.ceil((1 + math.ceil(math.log(window[1] / window[0]) / math.log(ratio))) / grid)
    rates = np.tile(np.geomspace(*window, count), (num_answers, 1))
    growths = np.concatenate([slopes(part) for part in np.split(rates, count // grid, axis=1)], axis=1)
    if (growths[:, 0] > 0).any():
        raise ValueError(f"window={window} starts where a deviation grows already; lower it")
    for _ in range(num_refinements):
        rates, growths = _bracket(rates, growths)
        inner = np.geomspace(rates[:, 0], np.where(np.isinf(rates[:, 1]), rates[:, 0], rates[:, 1]), grid + 2, axis=1)[:, 1:-1]
        rates = np.insert(rates, [1], inner, axis=1)
        growths = np.insert(growths, [1], slopes(inner), axis=1)
    return [_interpolated(*ends) for ends in zip(*_bracket(rates, growths), strict=True)]


def _slopes(logs: np.ndarray) -> np.ndarray:
    """Growth per update by least squares over the second half of cumulative logs [N, ...]; inf where it left all bounds."""
    logs = logs[len(logs) // 2 :]
    times = _CHUNK * (np.arange(len(logs)) - (len(logs) - 1) / 2)
    finite = np.isfinite(logs).all(axis=0)
    return np.where(finite, np.tensordot(times, np.where(finite, logs, 0), axes=1) / np.sum(times**2), np.inf)


def _bracket(rates: np.ndarray, growths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[A, 2] the first learning rate that grows and the one below, and their growth; infinite where none grows."""
    rates, growths = (np.pad(values, ((0, 0), (0, 1)), constant_values=np.inf) for values in (rates, growths))
    first = np.argmax(growths > 0, axis=1)[:, None]
    ends = np.concatenate([first - 1, first], axis=1)
    return np.take_along_axis(rates, ends, axis=1), np.take_along_axis(growths, ends, axis=1)


def _interpolated(rates: np.ndarray, growths: np.ndarray) -> Threshold:
    (low, high), (below, above) = rates.tolist(), growths.tolist()
    if math.isinf(high):
        return Threshold(math.inf, low, high)
    share = 0.5 if math.isinf(above) else below / (below - above)
    return Threshold(low + (high - low) * share, low, high)


def make_trajectories(field: Callable, reward: Callable) -> Callable:
    """A compiled `run(theta, decay, learning_rates[C], lags[T, C], start[K, C, n]) -> (distance[T, C], reward[T, C])`.

    The same learners, left alone: the distance from theta in units of θ, and `reward(params[n])`, after every update.
    """
    fields, rewards = jax.vmap(field, in_axes=(0, 0, None)), jax.vmap(reward)

    def run(theta, decay, learning_rates, lags, start):
        versions = len(start)

        def update(state, lag):
            ring, step = state
            fresh, stale = ring[step % versions], ring[(step - lag) % versions, jnp.arange(len(learning_rates))]
            new = fresh + learning_rates[:, None] * fields(fresh, stale, decay)
            return (ring.at[(step + 1) % versions].set(new), step + 1), (jnp.linalg.norm(new - theta, axis=1), rewards(new))

        return jax.lax.scan(update, (theta + start, versions - 1), lags)[1]

    return jit_repeated(run)
