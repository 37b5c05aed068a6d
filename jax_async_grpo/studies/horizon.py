"""The horizon law: t_c·η of an over-optimized bandit, over staleness, learning rate, schedule and loss, with exact updates.

The learner follows the proxy reward of `tasks.proxy_gold_bandit` and is judged by the gold one, which rises and then falls for
good. t_c is the update at which a declared rule of collapse fires on the gold reward. A piece is one loss at one learning rate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jax_async_grpo import exact, policies, staleness, tasks
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.aggregation import sequence_mean
from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.config_checks import (
    check_integer,
    check_keys,
    check_mapping,
    check_number,
    check_rule,
    check_window,
    resolve,
)
from jax_async_grpo.records import Workdir
from jax_async_grpo.scaling import CollapseRule, RunOutcome, classify_runs
from jax_async_grpo.studies.contract import run_pieces
from jax_async_grpo.studies.horizon_page import figures, page, summary
from jax_async_grpo.types import Params
from jax_async_grpo.update import create_state, update_step

__all__ = [
    "ProxyCase",
    "check_grid",
    "check_losses",
    "crossings",
    "figures",
    "make_curves",
    "measured_steps",
    "page",
    "pieces",
    "proxy_case",
    "run",
    "summary",
    "validate",
]

_TOP_KEYS = (
    "study",
    "sources",
    "seed",
    "group_size",
    "losses",
    "schedules",
    "max_staleness",
    "learning_rates",
    "time",
    "spacing",
    "rule",
    "window",
    "tolerance",
    "end_deviation",
    "beyond",
    "shown_learning_rate",
    "shown_points",
    "num_bootstrap",
    "confidence",
)
_WINDOW_KEYS = ("staleness_x_learning_rate", "learning_rate")
_TOLERANCE_KEYS = ("variation", "staleness_exponent", "resolution")
_SCHEDULES = ("fixed", "periodic", "random")

Row = dict[str, Any]


class ProxyCase(NamedTuple):
    """The bandit under one loss: θ_0, `field(learner, behavior, *_)` = H of the proxy, `gold(params)` the judge's reward."""

    params: Params
    field: Callable
    gold: Callable


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, on what cannot be run."""
    check_keys(config, _TOP_KEYS, "")
    check_losses(config)
    check_rule(config["rule"])
    unknown = [name for name in config["schedules"] if name not in _SCHEDULES]
    if unknown or not config["schedules"]:
        raise ValueError(f"config.schedules is {tuple(config['schedules'])}; it must name some of {_SCHEDULES}")
    check_grid(config["max_staleness"], "max_staleness", integers=True)
    if 0 not in config["max_staleness"]:
        raise ValueError(f"config.max_staleness is {tuple(config['max_staleness'])}; it must hold 0, the control")
    check_grid(config["learning_rates"], "learning_rates")
    for key, minimum in dict(seed=0, shown_points=2, num_bootstrap=100).items():
        check_integer(config[key], key, minimum=minimum)
    for part, keys in (("window", _WINDOW_KEYS), ("tolerance", _TOLERANCE_KEYS)):
        check_keys(config[part], keys, part)
        for key, value in config[part].items():
            check_number(value, f"{part}.{key}", lambda x: x > 0, "> 0")
    check_window(config["beyond"], "beyond")
    for key in ("time", "spacing", "end_deviation"):
        check_number(config[key], key, lambda x: x > 0, "> 0")
    check_number(config["confidence"], "confidence", lambda x: 0 < x < 1, "between 0 and 1")
    if config["time"] < 10 * max(config["spacing"], *config["learning_rates"]):
        raise ValueError(f"config.time is {config['time']!r}; it must be at least 10 times the spacing and every learning rate")
    if config["shown_learning_rate"] not in config["learning_rates"]:
        shown = config["shown_learning_rate"]
        raise ValueError(f"config.shown_learning_rate is {shown!r}; it must be one of config.learning_rates")


def check_losses(config: Mapping[str, Any]) -> None:
    """ValueError unless `losses` maps names to functions and `group_size` is at least 2."""
    check_integer(config["group_size"], "group_size", minimum=2)
    check_mapping(config["losses"], "losses")
    if not config["losses"]:
        raise ValueError("config.losses is empty; there is nothing to run")
    for name, dotted in config["losses"].items():
        resolve(dotted, f"losses.{name}")


def check_grid(values: Any, field: str, *, integers: bool = False) -> None:
    """ValueError unless `values` are distinct numbers > 0, or integers >= 0, at least one."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"config.{field} is {values!r}; it must be a tuple of numbers, not empty")
    for value in values:
        if integers:
            check_integer(value, field, minimum=0)
        else:
            check_number(value, field, lambda x: x > 0, "> 0")
    if len(set(values)) < len(values):
        raise ValueError(f"config.{field} is {tuple(values)}; a value stands there twice")


def pieces(config: Mapping[str, Any]) -> list[str]:
    """Names of the pieces of work, in order; those of one loss share its compiled program."""
    return [f"{loss}/{rate:g}" for loss in config["losses"] for rate in config["learning_rates"]]


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Runs the pieces that the workdir lacks; `on_piece(name, seconds)` after each."""

    @functools.lru_cache(maxsize=1)
    def program(loss: str):
        return make_curves(proxy_case(config, loss), capacity=max(config["max_staleness"]) + 1)

    def measure(name: str) -> list[Row]:
        loss, _, rate = name.partition("/")
        index = [f"{value:g}" for value in config["learning_rates"]].index(rate)
        return _measure(config, program(loss), loss, config["learning_rates"][index], config["seed"] + index)

    run_pieces(pieces(config), workdir, on_piece, measure)


def proxy_case(config: Mapping[str, Any], loss: str) -> ProxyCase:
    """`tasks.proxy_gold_bandit` with one free logit an action and group-normalized advantages.

    Args:
      config: with `losses` {name: dotted name} and `group_size`.
      loss: a key of `losses`.

    Returns:
      `ProxyCase`.
    """
    task = tasks.proxy_gold_bandit()
    prompt_logit = (0.0,)  # the prompt is a token too; no completion may hold it
    policy = policies.tabular(task.vocab_size, context_length=1, initial_logits=(*tasks.PROXY_GOLD_LOGITS, *prompt_logit))
    judged = dataclasses.replace(task, rewards=task.gold_rewards)
    algorithm = dict(group_size=config["group_size"], loss_fn=resolve(config["losses"][loss], f"losses.{loss}"))
    algorithm |= dict(advantage_fn=group_normalized, aggregation_fn=sequence_mean)

    def field(learner, behavior, *_):
        return exact.surrogate_gradient(policy, learner, behavior, task, **algorithm)

    return ProxyCase(policy.init(jax.random.key(0)), field, lambda params: exact.expected_reward(policy, params, judged))


def make_curves(case: ProxyCase, *, capacity: int) -> Callable:
    """Compiles gold reward curves of plain gradient ascent under lag.

    Args:
      case: of `proxy_case`.
      capacity: K, the largest staleness + 1.

    Returns:
      A jitted function (learning_rate [], schedules [N, T], steps [M] non-decreasing, ≤ T) -> gold reward [N, M] before the
      updates number `steps`.
    """

    @jit_repeated
    def curves(learning_rate, schedules, steps):
        optimizer = optax.sgd(learning_rate)

        def cell(schedule):
            def advance(t, state):
                return update_step(state, schedule[t], case.field, optimizer)[0]

            def visit(state, target):
                state = jax.lax.fori_loop(state.step, target.astype(state.step.dtype), advance, state)
                return state, case.gold(state.params)

            return jax.lax.scan(visit, create_state(case.params, optimizer, capacity), steps)[1]

        return jax.vmap(cell)(schedules)

    return curves


def measured_steps(learning_rate: float, *, time: float, spacing: float) -> np.ndarray:
    """[M] updates nearest to η·t = 0, spacing, 2·spacing, ..., time; non-decreasing, repeated where η > spacing."""
    grid = np.arange(round(time / spacing) + 1) * spacing
    return np.round(grid / learning_rate).astype(np.int32)


def _measure(config, curves: Callable, loss: str, rate: float, seed: int) -> list[Row]:
    """A row for every schedule, with a list over S of everything, and a row of the shown curves."""
    rule = CollapseRule(**config["rule"])
    steps = measured_steps(rate, time=config["time"], spacing=config["spacing"])
    num_updates = max(1, round(config["time"] / min(config["learning_rates"])))  # of all rates: one shape
    lags = [(name, s) for name in config["schedules"] for s in config["max_staleness"]]
    schedules = np.stack([_schedule(name, s, num_updates, seed) for name, s in lags])
    rewards = np.asarray(curves(rate, schedules, steps))
    steps, kept = np.unique(steps, return_index=True)
    rewards = rewards[:, kept]
    rows = []
    for number, name in enumerate(config["schedules"]):
        size = len(config["max_staleness"])
        part = slice(number * size, (number + 1) * size)
        found = classify_runs(steps, rewards[part], start_reward=rewards[0, 0], ceiling=1.0, rule=rule)
        row = {"kind": "cells", "loss": loss, "schedule": name, "learning_rate": rate}
        row |= {"start_reward": _short(rewards[0, 0]), "horizon": int(steps[-1])}
        row |= {"max_staleness": list(config["max_staleness"])}
        row |= {"mean_staleness": [_short(schedule[: steps[-1]].mean()) for schedule in schedules[part]]}
        row |= {"outcome": [run.outcome for run in found], "resolution": [run.resolution for run in found]}
        row |= {key: [_short(getattr(run, key)) for run in found] for key in ("peak", "end")}
        both = [crossings(steps, curve, run, rule) for curve, run in zip(rewards[part], found, strict=True)]
        row |= {"t_c": [_short(pair[0]) for pair in both], "t_c_second_rule": [_short(pair[1]) for pair in both]}
        row |= {"step": [run.collapse_step for run in found]}
        rows.append(row)
    if rate == config["shown_learning_rate"]:
        at = np.unique(np.linspace(0, len(steps) - 1, config["shown_points"]).astype(int))
        shown = rewards[: len(config["max_staleness"]), at]
        rows.append({"kind": "curves", "loss": loss, "schedule": config["schedules"][0], "learning_rate": rate})
        rows[-1] |= {"max_staleness": list(config["max_staleness"]), "steps": steps[at], "gold": np.round(shown, 4)}
    return rows


def _schedule(name: str, max_staleness: int, num_updates: int, seed: int) -> np.ndarray:
    if name == "random":
        return staleness.random(seed, max_staleness, num_updates)
    return getattr(staleness, name)(max_staleness, num_updates)


def crossings(steps: np.ndarray, reward: np.ndarray, run: RunOutcome, rule: CollapseRule) -> tuple[float | None, float | None]:
    """t_c under both rules to a fraction of an update, or None where a rule did not fire.

    `run` says between which two measured rewards the curve fell below the threshold for good; t_c is where the straight line
    between them does.

    Args:
      steps: [M] of the curve.
      reward: [M].
      run: what `classify_runs` says of the curve, its first reward being r_0.
      rule: of the run.

    Returns:
      (t_c of the first rule, t_c of the second).
    """
    thresholds = rule.keep * run.peak, reward[0] + rule.give_back * (run.peak - reward[0])
    fired = run.collapse_step, run.collapse_step_second_rule
    return tuple(None if t is None else _crossing(steps, reward, t, level) for t, level in zip(fired, thresholds, strict=True))


def _crossing(steps, reward, step: float, level: float) -> float:
    after = int(np.searchsorted(steps, step))
    if after == 0:
        return float(step)
    share = (reward[after - 1] - level) / (reward[after - 1] - reward[after])
    return float(steps[after - 1] + share * (steps[after] - steps[after - 1]))


def _short(value: float | None) -> float | None:
    """Six digits: records are kept, and a tenth of a per mille is asked for."""
    return None if value is None else float(f"{value:.6g}")
