"""Delay stability at θ_0 as a rule beside the planner: how large the first updates may be before lag alone makes them swing.

For every (world, loss): A = ∂_θH and B = ∂_φH of the exact surrogate gradient at the warm-started θ_0, by jvps in float64, then
`delay_stability` for every S of the truth. It sees no run, no anchor and no probe. What it leaves out, all of it approximation:

- θ_0 is no equilibrium. A + B has growing directions there, which is learning itself; they are taken out.
- Adam is its preconditioner 1/(√E g² + ε), frozen at θ_0, with E g² per parameter of the *sampled* gradient. Heavy-ball
  momentum μ is the learning rate η/(1 − μ). Both are right for swings much slower than the average the optimizer takes; the lag
  of that average is not counted.
- Of hundreds of directions at most 2·rank are kept. Thresholds of importance sampling at S = 16 with rank 24, 48 and all
  directions: 3.15, 4.26 and 4.6 (long3_mlp_sgd); with 24, 36 and all: .0160, .0164 and .0163 (sums4_small_mlp_adam).
- To first order at θ = φ clip and dual clip are importance sampling: equal Jacobians are found equal, not presumed so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.linalg import schur

from jax_async_grpo import sweep_run
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.config_checks import check_choice, check_integer, check_keys
from jax_async_grpo.delay_stability import delay_stability
from jax_async_grpo.experiment import Case
from jax_async_grpo.records import Workdir
from jax_async_grpo.studies.contract import run_pieces

__all__ = [
    "Linearization",
    "decaying_directions",
    "delay_pieces",
    "leading_directions",
    "linearization",
    "measure_delay",
    "optimizer_map",
    "run_delay",
    "seen_directions",
    "validate_delay",
]

_KEYS = ("worlds", "rank", "num_draws")
_OPTIMIZERS = {"optax.sgd": {"momentum"}, "optax.adam": {"eps"}}  # with the options that the linearization knows
_STILL = 1e-6  # of the largest singular value of (A, B): a direction of A + B that decays slower is not told from one at rest
_UNSEEN = 1e-14  # of the largest squared singular value of (A; B)
_SAME = 1e-9  # relative difference below which two losses have one linearization
_BATCH = 32  # directions, or draws, at once


class Linearization(NamedTuple):
    """Of the expected update per unit learning rate, in coordinates in which the optimizer is plain gradient ascent.

    Attributes:
      learner, behavior: A and B [n, n].
      factor: a threshold of plain ascent times this is one of the optimizer's learning rate.
    """

    learner: np.ndarray
    behavior: np.ndarray
    factor: float


def validate_delay(config: Mapping[str, Any], worlds: list[str]) -> None:
    """ValueError unless `config.delay`, which may be missing, names known worlds with known optimizers."""
    if "delay" not in config:
        return
    check_keys(config["delay"], _KEYS, "delay")
    check_choice(config["delay"], "worlds", tuple(worlds), "delay")
    check_integer(config["delay"]["rank"], "delay.rank", minimum=1)
    check_integer(config["delay"]["num_draws"], "delay.num_draws", minimum=2)
    for world in config["delay"]["worlds"]:
        part = config["sweep"]["cases"][f"{world}_truth"]
        known = _OPTIMIZERS.get(part["optimizer"])
        if known is None or not set(part["optimizer_options"]) <= known:
            raise ValueError(
                f"config.delay.worlds has {world!r}, whose optimizer is {part['optimizer']} with "
                f"{dict(part['optimizer_options'])}; it must be one of {', '.join(_OPTIMIZERS)}, with momentum or eps alone"
            )


def delay_pieces(config: Mapping[str, Any]) -> list[str]:
    """delay/<world>/<loss>, the losses of a world together; none where the config has no `delay`."""
    return [
        f"delay/{world}/{algorithm}"
        for world in config.get("delay", {}).get("worlds", ())
        for algorithm in config["sweep"]["cases"][f"{world}_truth"]["algorithms"]
    ]


def run_delay(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Measures the pieces that the workdir lacks; losses of a world with equal Jacobians share their thresholds."""
    found: list[tuple[str, np.ndarray, list]] = []  # (world, A and B, rows) measured here

    def measure(name: str) -> list[dict[str, Any]]:
        world, algorithm = name.split("/")[1:]
        case = sweep_run.build_case(config["sweep"], f"{world}_truth", algorithm)  # θ_0 in the precision of the runs
        at = linearization(case, num_draws=config["delay"]["num_draws"], seed=config["sweep"]["seed"])
        both = np.stack([at.learner, at.behavior])
        for other, jacobians, rows in found:
            if other == world and np.abs(both - jacobians).max() <= _SAME * np.abs(jacobians).max():
                return [{**row, "algorithm": algorithm} for row in rows]
        lags = config["sweep"]["cases"][f"{world}_truth"]["max_staleness"]
        rows = measure_delay(at, lags, config["delay"]["rank"])
        rows = [{"kind": "delay", "world": world, "algorithm": algorithm, **row} for row in rows]
        found.append((world, both, rows))
        return rows

    run_pieces(delay_pieces(config), workdir, on_piece, measure)


def measure_delay(at: Linearization, lags, rank: int) -> list[dict[str, Any]]:
    """A row for every S of `lags`: the threshold `learning_rate`, and how many directions were left on the way to it."""
    seen = seen_directions(at.learner, at.behavior)
    decaying = decaying_directions(*seen)
    kept = leading_directions(*decaying, rank)
    sizes = {
        "num_parameters": len(at.learner),
        "num_seen": len(seen[0]),
        "num_decaying": len(decaying[0]),
        "rank": len(kept[0]),
    }
    rows = []
    for lag in lags:
        found = delay_stability(*kept, int(lag))
        row = {"max_staleness": int(lag), "learning_rate": at.factor * found.max_learning_rate, "frequency": found.frequency}
        rows.append(row | sizes | {"learner_norm": found.learner_norm, "behavior_norm": found.behavior_norm})
    return rows


def linearization(case: Case, *, num_draws: int, seed: int) -> Linearization:
    """A and B of a case at its θ_0, in float64 whatever the precision of the process.

    Args:
      case: of `sweep_run.build_case`.
      num_draws: batches from which E g² of Adam is estimated.
      seed: of these draws.

    Returns:
      Linearization. With D Adam's preconditioner these are D^½·A·D^½ and D^½·B·D^½: D·A and D·B in other coordinates.
    """
    scale, factor = optimizer_map(case, num_draws=num_draws, seed=seed)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), case.params)
        point, unravel = ravel_pytree(params)

        def field(learner, behavior):
            return ravel_pytree(case.gradient(unravel(learner), unravel(behavior)))[0]

        @jit_once
        def products(point, directions):
            def of_direction(v):
                learner = jax.jvp(lambda x: field(x, point), (point,), (v,))[1]
                return learner, jax.jvp(lambda x: field(point, x), (point,), (v,))[1]

            return jax.vmap(of_direction)(directions)

        size = len(point)
        units = np.eye(size + -size % _BATCH, size)
        rows = [np.asarray(products(point, units[i : i + _BATCH])) for i in range(0, size, _BATCH)]
    learner, behavior = np.concatenate(rows, axis=1)[:, :size].swapaxes(1, 2)
    root = np.sqrt(scale)
    return Linearization(root[:, None] * learner * root, root[:, None] * behavior * root, factor)


def optimizer_map(case: Case, *, num_draws: int, seed: int) -> tuple[np.ndarray, float]:
    """(preconditioner [n], factor) of `optax.sgd` or `optax.adam` for slow swings; see the module's docstring."""
    options, size = case.config["optimizer_options"], ravel_pytree(case.params)[0].size
    if case.config["optimizer"] == "optax.sgd":
        return np.ones(size), 1.0 - (options.get("momentum") or 0.0)
    gradient = case.update_gradient("sampled")

    @jit_once
    def squares(keys):
        def draw(key):
            return ravel_pytree(gradient(key, case.params, case.params, 0, 0))[0] ** 2

        return jnp.mean(jax.lax.map(draw, keys, batch_size=_BATCH), axis=0)

    mean = np.asarray(squares(jax.random.split(jax.random.key(seed), num_draws)), np.float64)
    return 1 / (np.sqrt(mean) + options.get("eps", 1e-8)), 1.0


def seen_directions(learner: np.ndarray, behavior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B without the directions on which both vanish (features that no prompt has), as a quotient.

    With A R = B R = 0 and an orthonormal [Q, R] every A + zB has the eigenvalues of Qᵀ(A + zB)Q, and 0.
    """
    squares, vectors = np.linalg.eigh(learner.T @ learner + behavior.T @ behavior)
    kept = vectors[:, squares > _UNSEEN * squares[-1]]
    return kept.T @ learner @ kept, kept.T @ behavior @ kept


def decaying_directions(learner: np.ndarray, behavior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B on the invariant subspace of A + B whose eigenvalues have a negative real part, in an orthonormal basis.

    Only A + B leaves it invariant: what A alone carries out of it (and B back) is dropped.
    """
    floor = _STILL * np.linalg.norm(np.concatenate([learner, behavior]), 2)
    _, basis, number = schur(learner + behavior, output="real", sort=lambda real, imaginary: real < -floor)
    kept = basis[:, :number]
    return kept.T @ learner @ kept, kept.T @ behavior @ kept


def leading_directions(learner: np.ndarray, behavior: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B on at most 2·rank directions: the largest of (A; B), and those that grow fastest when the lag turns B's sign.

    The `rank` leading right singular vectors of (A; B) hold the threshold of small lags. At a large lag a slow swing of phase π
    sees A − B; where importance sampling makes its growing directions weak beside those that only decay, the first kind alone
    converges slowly. So the `rank` leading eigenvectors of the symmetric part of A − B join them.
    """
    _, _, rows = np.linalg.svd(np.concatenate([learner, behavior]), full_matrices=False)
    _, turned = np.linalg.eigh(learner - behavior + (learner - behavior).T)
    basis, singular, _ = np.linalg.svd(np.concatenate([rows[:rank].T, turned[:, ::-1][:, :rank]], axis=1), full_matrices=False)
    kept = basis[:, singular > 1e-6]  # a direction may be of both kinds
    return kept.T @ learner @ kept, kept.T @ behavior @ kept
