"""Delay stability, theory against simulation: thresholds of whole policies under fixed, periodic and random lag.

The theory is `delay_stability` of the exact Jacobians of F(θ,φ) = H(θ,φ) − β·θ at its equilibrium; the simulation runs F itself
(`delay_simulation`). Pieces: every loss at every decay, random lag and what happens past the threshold for every loss, the
matrix-free thresholds of a larger policy, and the closed forms of one parameter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import brentq

from jax_async_grpo import exact, policies, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.aggregation import sequence_mean
from jax_async_grpo.compiling import jit_once
from jax_async_grpo.config_checks import check_integer, check_keys, check_mapping, check_number, check_window, resolve
from jax_async_grpo.delay_stability import companion_matrix, delay_stability, delay_stability_matrix_free
from jax_async_grpo.records import Workdir
from jax_async_grpo.studies.contract import run_pieces
from jax_async_grpo.studies.delay_page import figures, page, summary
from jax_async_grpo.studies.delay_simulation import lag_table, make_growth_rates, make_trajectories, simulated_thresholds

__all__ = [
    "Case",
    "Equilibrium",
    "bandit_case",
    "companion_threshold",
    "digits_case",
    "figures",
    "late_behavior",
    "make_equilibrium",
    "page",
    "pieces",
    "run",
    "summary",
    "validate",
]

_TOP_KEYS = (
    "study",
    "sources",
    "seed",
    "rewards",
    "group_size",
    "losses",
    "decays",
    "max_staleness",
    "updates_per_version",
    "min_updates",
    "window",
    "ratio",
    "grid",
    "num_refinements",
    "deviation",
    "slope_from",
    "random",
    "beyond",
    "matrix_free",
    "tolerance",
)
_RANDOM_KEYS = ("decay", "max_staleness", "num_updates", "num_chains")
_BEYOND_KEYS = (
    "decay",
    "max_staleness",
    "factors",
    "num_updates",
    "deviation",
    "shown_staleness",
    "shown_updates",
)
_MATRIX_FREE_KEYS = ("losses", "decay", "max_staleness", "task_options", "num_features", "num_eigenvalues", "ratio")
_TOLERANCE_KEYS = ("fixed", "periodic", "random", "companion", "matrix_free", "scalar", "falling_slope", "flat_slope")
_AT_REST = 1e-6  # logits

Row = dict[str, Any]


class Case(NamedTuple):
    """A policy on a task under one loss.

    Attributes:
      field: F(learner[n], behavior[n], decay) -> [n].
      reward: expected reward of params [n].
      start: [n], where the way to the equilibrium begins.
    """

    field: Callable
    reward: Callable
    start: np.ndarray


class Equilibrium(NamedTuple):
    """F(params, params) = 0 and A = ∂_θF, B = ∂_φF there; `residual` is the largest |F| left."""

    params: np.ndarray
    learner: np.ndarray
    behavior: np.ndarray
    residual: float


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, on what cannot be run."""
    check_keys(config, _TOP_KEYS, "")
    for key in ("decays", "rewards"):
        _check_numbers(config[key], key)
    for name, keys in (("random", _RANDOM_KEYS), ("beyond", _BEYOND_KEYS), ("matrix_free", _MATRIX_FREE_KEYS)):
        check_keys(config[name], keys, name)
        _check_numbers(config[name]["max_staleness"], f"{name}.max_staleness", integers=True)
        if config[name]["decay"] not in config["decays"]:
            raise ValueError(f"config.{name}.decay is {config[name]['decay']!r}; it must be one of config.decays")
    check_keys(config["tolerance"], _TOLERANCE_KEYS, "tolerance")
    check_mapping(config["losses"], "losses")
    for name, dotted in config["losses"].items():
        resolve(dotted, f"losses.{name}")
    unknown = [name for name in config["matrix_free"]["losses"] if name not in config["losses"]]
    if unknown:
        raise ValueError(f"config.matrix_free.losses has {unknown[0]!r}; it must be of config.losses")
    for key, minimum in dict(seed=0, group_size=2, updates_per_version=1, min_updates=64, grid=1, num_refinements=1).items():
        check_integer(config[key], key, minimum=minimum)
    check_integer(config["slope_from"], "slope_from", minimum=0)
    check_integer(config["random"]["num_updates"], "random.num_updates", minimum=64)
    check_integer(config["random"]["num_chains"], "random.num_chains", minimum=1)
    check_integer(config["beyond"]["num_updates"], "beyond.num_updates", minimum=64)
    check_integer(config["beyond"]["shown_updates"], "beyond.shown_updates", minimum=1)
    check_window(config["window"], "window")
    for part, name in ((config, "deviation"), (config["beyond"], "deviation")):
        check_number(part[name], name, lambda x: x > 0, "> 0")
    check_number(config["window"][0], "window", lambda x: x > 0, "> 0")
    check_number(config["ratio"], "ratio", lambda x: x > 1, "> 1")
    _check_numbers(config["beyond"]["factors"], "beyond.factors")
    if not config["max_staleness"] or not all(isinstance(group, Sequence) for group in config["max_staleness"]):
        raise ValueError(f"config.max_staleness is {config['max_staleness']!r}; it must be a tuple of tuples of integers")
    for group in config["max_staleness"]:
        _check_numbers(group, "max_staleness", integers=True)
    if config["beyond"]["shown_staleness"] not in config["beyond"]["max_staleness"]:
        shown = config["beyond"]["shown_staleness"]
        raise ValueError(f"config.beyond.shown_staleness is {shown!r}; it must be one of config.beyond.max_staleness")


def _check_numbers(values: Any, field: str, *, integers: bool = False) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"config.{field} is {values!r}; it must be a tuple of numbers, not empty")
    for value in values:
        if integers:
            check_integer(value, field, minimum=0)
        else:
            check_number(value, field, lambda x: x >= 0, ">= 0")


def pieces(config: Mapping[str, Any]) -> list[str]:
    """Names of the pieces of work, in order; those of one loss stand together and share its compiled programs."""
    names = ["scalar"]
    for loss in config["losses"]:
        names += [f"thresholds/{loss}/{decay:g}" for decay in config["decays"]]
        names += [f"random/{loss}", f"beyond/{loss}"]
    return names + [f"matrix_free/{loss}" for loss in config["matrix_free"]["losses"]]


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Runs the pieces that the workdir lacks; `on_piece(name, seconds)` after each."""

    @functools.lru_cache(maxsize=1)
    def programs(loss: str):
        case = bandit_case(config, loss)
        return case, make_equilibrium(case), make_growth_rates(case.field)

    def measure(name: str) -> list[Row]:
        kind, _, rest = name.partition("/")
        loss, _, decay = rest.partition("/")
        if kind == "scalar":
            return _scalar_rows(config)
        if kind == "matrix_free":
            return _matrix_free_rows(config, loss)
        case, find, growth = programs(loss)
        if kind == "random":
            return _random_rows(config, find(config["random"]["decay"]), growth, loss)
        if kind == "beyond":
            return _beyond_rows(config, case, find(config["beyond"]["decay"]), loss)
        decay = next(value for value in config["decays"] if f"{value:g}" == decay)
        return _threshold_rows(config, case, find(decay), growth, loss, decay)

    run_pieces(pieces(config), workdir, on_piece, measure)


def bandit_case(config: Mapping[str, Any], loss: str) -> Case:
    """The softmax bandit with one free logit an action."""
    num_actions = len(config["rewards"])
    prompt_logit = jnp.zeros(1)  # the prompt is a token too; no completion may hold it

    def logits(params, tokens):
        return jnp.broadcast_to(jnp.concatenate([params, prompt_logit]), (*tokens.shape, num_actions + 1))

    policy = policies.from_logits(logits, init=lambda key: jnp.zeros(num_actions))
    return _case(config, loss, policy, tasks.bandit([config["rewards"]]), 2.0 * np.asarray(config["rewards"]))


def digits_case(config: Mapping[str, Any], loss: str) -> Case:
    """Digit sums under a policy linear in features of the context, products included, from the uniform policy."""
    part = config["matrix_free"]
    task = tasks.digit_sum(**part["task_options"])
    context_length = task.prompts.shape[1] + task.completions.shape[1] - 1
    policy = policies.linear(task.allowed.shape[1], context_length, part["num_features"], seed=config["seed"])
    return _case(config, loss, policy, task, policy.init(jax.random.key(config["seed"])))


def _case(config, loss: str, policy, task, params) -> Case:
    start, unravel = ravel_pytree(params)
    algorithm = dict(group_size=config["group_size"], loss_fn=resolve(config["losses"][loss], f"losses.{loss}"))
    algorithm |= dict(advantage_fn=group_normalized, aggregation_fn=sequence_mean)

    def field(learner, behavior, decay):
        gradient = exact.surrogate_gradient(policy, unravel(learner), unravel(behavior), task, **algorithm)
        return ravel_pytree(gradient)[0] - decay * learner

    return Case(field, lambda params: exact.expected_reward(policy, unravel(params), task), np.asarray(start))


def make_equilibrium(case: Case, *, learning_rate: float = 0.5, num_updates: int = 500) -> Callable[[float], Equilibrium]:
    """decay -> where synchronous updates with `learning_rate` lead, then Newton's method; compiled once for all decays.

    Raises:
      ArithmeticError: (the function) Newton's method does not reach |F| ≤ 1e-12.
    """

    @jit_once
    def follow(params, decay):
        return jax.lax.fori_loop(0, num_updates, lambda _, x: x + learning_rate * case.field(x, x, decay), params)

    @jit_once
    def at(params, decay):
        def field(both):
            value = case.field(*both, decay)
            return value, value

        both, value = jax.jacfwd(field, has_aux=True)(jnp.stack([params, params]))
        return value, both[:, 0], both[:, 1]

    def find(decay: float) -> Equilibrium:
        params = np.asarray(follow(case.start, decay))
        for _ in range(20):
            value, learner, behavior = map(np.asarray, at(params, decay))
            residual = float(np.abs(value).max())
            if residual <= 1e-15:
                break
            params = params - np.linalg.solve(learner + behavior, value)
        if not residual <= 1e-12:
            raise ArithmeticError(f"no equilibrium found at decay {decay:g}: |F| is {residual:.2e} after Newton's method")
        return Equilibrium(params, learner, behavior, residual)

    return find


def _threshold_rows(config, case: Case, at: Equilibrium, growth: Callable, loss: str, decay: float) -> list[Row]:
    """The equilibrium, and theory and simulation of every S under fixed and periodic lag."""
    identity = {"loss": loss, "decay": decay}
    reward = float(case.reward(at.params))
    rows = [{"kind": "equilibrium", **identity, "params": at.params, "residual": at.residual, "reward": reward}]
    for group in config["max_staleness"]:
        answers = [(schedule, s) for s in group for schedule in ("fixed", "periodic")]
        num_updates = max(config["min_updates"], config["updates_per_version"] * (max(group) + 1))
        lags = lag_table(answers, num_updates, config["seed"])
        simulated = simulated_thresholds(growth, at.params, decay, lags, versions=max(group) + 1, **_search(config))
        for (schedule, s), threshold in zip(answers, simulated, strict=True):
            theory = delay_stability(at.learner, at.behavior, s, schedule=schedule)
            row = {"kind": "threshold", **identity, "schedule": schedule, "max_staleness": s}
            row |= {"theory": theory.max_learning_rate, "frequency": theory.frequency, "simulated": threshold.learning_rate}
            row |= {"bracket": [threshold.low, threshold.high]}
            if schedule == "fixed":
                near = theory.max_learning_rate
                row["companion"] = companion_threshold(
                    at.learner, at.behavior, s, low=0.99 * near, high=1.01 * near, ratio=1.0201
                )
            rows.append(row)
    norms = {"learner_norm": theory.learner_norm, "behavior_norm": theory.behavior_norm, "growth_bound": theory.growth_bound}
    rows[0] |= norms | {"num_gauge_modes": theory.num_gauge_modes}
    return rows


def _search(config) -> dict[str, Any]:
    keys = ("window", "ratio", "grid", "num_refinements", "seed")
    return {key: config[key] for key in keys} | {"size": config["deviation"]}


def companion_threshold(learner, behavior, staleness: int, *, low: float, high: float, ratio: float) -> float:
    """The first learning rate of (low, high] at which the companion matrix has radius 1; inf where it has none.

    Upwards from `low` in factors of `ratio`, then between the first unstable one and the one below it; `low` itself if it is
    unstable.
    """

    def excess(rate):
        return np.abs(np.linalg.eigvals(companion_matrix(learner, behavior, staleness, rate))).max() - 1

    if excess(low) >= 0:
        return low
    while low < high:
        above = min(low * ratio, high)
        if excess(above) >= 0:
            return float(brentq(excess, low, above, rtol=1e-10))
        low = above
    return math.inf


def _random_rows(config, at: Equilibrium, growth: Callable, loss: str) -> list[Row]:
    part, rows = config["random"], []
    for index, s in enumerate(part["max_staleness"]):
        lags = lag_table([("random", s)] * part["num_chains"], part["num_updates"], config["seed"] + 1000 + index)
        (simulated,) = simulated_thresholds(
            growth, at.params, part["decay"], lags, versions=s + 1, cells_per_answer=part["num_chains"], **_search(config)
        )
        theory = delay_stability(at.learner, at.behavior, s, schedule="random", seed=config["seed"])
        row = {"kind": "random", "loss": loss, "decay": part["decay"], "max_staleness": s, "theory": theory.max_learning_rate}
        row |= {"standard_error": theory.standard_error, "mean_square": theory.mean_square_learning_rate}
        rows.append(row | {"simulated": simulated.learning_rate})
    return rows


def _beyond_rows(config, case: Case, at: Equilibrium, loss: str) -> list[Row]:
    """What a learner does past its threshold: how far it goes, whether it stays bounded, what it earns."""
    part = config["beyond"]
    cells = [(s, factor) for s in part["max_staleness"] for factor in part["factors"]]
    thresholds = {s: delay_stability(at.learner, at.behavior, s).max_learning_rate for s in part["max_staleness"]}
    rates = np.array([factor * thresholds[s] for s, factor in cells])
    versions, n = max(part["max_staleness"]) + 1, len(at.params)
    start = np.random.default_rng(config["seed"]).standard_normal((versions, 1, n))
    start = part["deviation"] * start / np.linalg.norm(start, axis=-1, keepdims=True)
    lags = lag_table([("fixed", s) for s, _ in cells], part["num_updates"], config["seed"])
    run_all = make_trajectories(case.field, case.reward)
    distances, rewards = map(np.asarray, run_all(at.params, part["decay"], rates, lags, np.repeat(start, len(cells), axis=1)))
    rows, reward_at_rest = [], float(case.reward(at.params))
    for i, (s, factor) in enumerate(cells):
        row = {"kind": "beyond", "loss": loss, "decay": part["decay"], "max_staleness": s, "factor": factor}
        row |= {"learning_rate": rates[i], "equilibrium_reward": reward_at_rest} | late_behavior(distances[:, i], rewards[:, i])
        if s == part["shown_staleness"]:
            row["shown_rewards"] = np.round(rewards[-part["shown_updates"] :, i], 5)
        rows.append(row)
    return rows


def late_behavior(distance: np.ndarray, reward: np.ndarray) -> Row:
    """Amplitude, reward and fate of a trajectory [T], over its last quarter.

    The fate, by the first that applies: "not finite"; "decays" where the root mean square distance is below 1e-6; "grows"
    where it is 1.1 times that of the quarter before; "decays" where it is less than 1/1.1 of that; "rests elsewhere" where
    the distance varies by less than 1e-6; "oscillates".
    """
    before, last = np.array_split(distance, 4)[2:]
    reward = np.array_split(reward, 4)[3]
    if not np.isfinite(distance).all():
        return {"fate": "not finite", "amplitude": math.nan, "reward": math.nan, "lowest_reward": math.nan}
    amplitude, earlier = (float(np.sqrt(np.mean(part**2))) for part in (last, before))
    if amplitude > max(1.1 * earlier, _AT_REST):
        fate = "grows"
    elif amplitude < max(earlier / 1.1, _AT_REST):
        fate = "decays"
    else:
        fate = "rests elsewhere" if np.ptp(last) < _AT_REST else "oscillates"
    return {"fate": fate, "amplitude": amplitude, "reward": float(reward.mean()), "lowest_reward": float(reward.min())}


def _matrix_free_rows(config, loss: str) -> list[Row]:
    """Thresholds from Jacobian-vector products of a larger policy beside those of the companion matrix."""
    part = config["matrix_free"]
    case = digits_case(config, loss)
    at = make_equilibrium(case)(part["decay"])
    params, zero, n = jnp.asarray(at.params), jnp.zeros(len(at.params)), len(at.params)

    @jax.jit
    def product(learner, behavior):
        field = functools.partial(case.field, decay=part["decay"])
        return jax.jvp(field, (params, params), (learner, behavior))[1]

    learner, behavior = (lambda v: product(v, zero)), (lambda v: product(zero, v))
    matrices = _without_decay_alone(at, part["decay"])
    alone = 2 / part["decay"]  # the threshold of the directions in which only the decay acts
    rows = []
    for s in part["max_staleness"]:
        dense = companion_threshold(*matrices, s, low=1e-3 * alone, high=alone, ratio=part["ratio"])
        free = delay_stability_matrix_free(learner, behavior, n, s, num_eigenvalues=part["num_eigenvalues"]).max_learning_rate
        row = {"kind": "matrix_free", "loss": loss, "decay": part["decay"], "max_staleness": s, "num_params": n}
        rows.append(row | {"num_active": len(matrices[0]), "dense": min(dense, alone), "matrix_free": free})
    return rows


def _without_decay_alone(at: Equilibrium, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B on the directions that the task sees; elsewhere A = −decay, B = 0, stable below 2/decay.

    The null space of (A + decay, B) is taken out as a quotient, which leaves the other eigenvalues as they are.
    """
    seen = at.learner + decay * np.eye(len(at.learner))
    _, singular, rows = np.linalg.svd(np.concatenate([seen, at.behavior]), full_matrices=False)
    kept = rows[singular > 1e-10 * singular[0]]
    return kept @ seen @ kept.T - decay * np.eye(len(kept)), kept @ at.behavior @ kept.T


def _scalar_rows(config) -> list[Row]:
    """One parameter, A = 0, B = −b: the closed forms (2/b)·sin(π/(2(2S+1))) and 2/((S+1)·b)."""
    rows, b = [], 1.7
    for s in (s for group in config["max_staleness"] for s in group):
        for schedule, closed_form in (
            ("fixed", 2 / b * math.sin(math.pi / (2 * (2 * s + 1)))),
            ("periodic", 2 / ((s + 1) * b)),
        ):
            theory = delay_stability([[0.0]], [[-b]], s, schedule=schedule).max_learning_rate
            row = {"kind": "scalar", "schedule": schedule, "max_staleness": s, "theory": theory, "closed_form": closed_form}
            rows.append(row)
    return rows
