"""Fixed updates against fixed cycles: does η_max fall with S at the same T, or only because T = M·(S+1) grows with S?

The pieces, one a loss, are exact: the largest learning rate of the over-optimized bandit of `studies.horizon` that has not
collapsed by T, for T fixed and for T = M·(S+1). The rest is read off the runs of the study of collapse by `cycles_page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_async_grpo.compiling import jit_repeated
from jax_async_grpo.config_checks import check_integer, check_keys, check_mapping, check_number, check_rule, check_window
from jax_async_grpo.records import Workdir
from jax_async_grpo.scaling import CollapseRule, classify_runs
from jax_async_grpo.studies.contract import run_pieces
from jax_async_grpo.studies.cycles_page import figures, page, summary
from jax_async_grpo.studies.horizon import ProxyCase, check_grid, check_losses, proxy_case
from jax_async_grpo.update import create_state, update_step

__all__ = ["figures", "largest_rates", "make_ends", "page", "pieces", "run", "summary", "validate"]

_TOP_KEYS = (
    "study",
    "sources",
    "seed",
    "num_bootstrap",
    "confidence",
    "exponent_min_staleness",
    "rule",
    "paper",
    "group_size",
    "losses",
    "max_staleness",
    "updates",
    "cycles",
    "window",
    "grid",
    "case",
    "algorithms",
    "num_updates",
    "num_cycles",
    "other_updates",
    "rounding",
    "levels",
)
_PAPER_KEYS = ("collapse", "boundary", "max_staleness")

Row = dict[str, Any]


def validate(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, on what cannot be run."""
    check_keys(config, _TOP_KEYS, "")
    check_losses(config)
    check_rule(config["rule"])
    check_keys(config["paper"], _PAPER_KEYS, "paper")
    check_mapping(config["losses"], "losses")
    check_grid(config["paper"]["max_staleness"], "paper.max_staleness", integers=True)
    for key in ("collapse", "boundary"):
        check_number(config["paper"][key], f"paper.{key}", lambda x: x > 0, "> 0")
    for key in ("max_staleness", "updates", "cycles", "other_updates"):
        check_grid(config[key], key, integers=True)
    for key in ("updates", "cycles", "other_updates"):
        check_integer(min(config[key]), key, minimum=4)
    if len(config["updates"]) != len(config["cycles"]):
        raise ValueError(f"config.cycles is {tuple(config['cycles'])}; it must hold as many numbers as config.updates")
    check_window(config["window"], "window")
    check_number(config["window"][0], "window", lambda x: x > 0, "> 0")
    minima = dict(seed=0, num_bootstrap=100, exponent_min_staleness=1, grid=4, num_updates=4, num_cycles=1)
    for key, minimum in minima.items():
        check_integer(config[key], key, minimum=minimum)
    for key in ("confidence", "rounding"):
        check_number(config[key], key, lambda x: 0 < x < 1, "between 0 and 1")
    check_grid(config["levels"], "levels")
    check_number(max(config["levels"]), "levels", lambda x: x < 1, "between 0 and 1")
    if isinstance(config["algorithms"], str) or not config["algorithms"]:
        raise ValueError(f"config.algorithms is {config['algorithms']!r}; it must be a tuple of names, not empty")


def pieces(config: Mapping[str, Any]) -> list[str]:
    """Names of the pieces of work: the losses."""
    return list(config["losses"])


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Runs the pieces that the workdir lacks; `on_piece(name, seconds)` after each."""
    run_pieces(pieces(config), workdir, on_piece, lambda name: _measure(config, name))


def _measure(config: Mapping[str, Any], loss: str) -> list[Row]:
    ends = make_ends(proxy_case(config, loss), capacity=max(config["max_staleness"]) + 1)
    search = dict(window=config["window"], grid=config["grid"], rule=CollapseRule(**config["rule"]))
    rows, found = [], {}
    for design in ("updates", "cycles"):
        for value in config[design]:
            for s in config["max_staleness"]:
                horizon = value if design == "updates" else value * (s + 1)
                if (s, horizon) not in found:
                    found[s, horizon] = largest_rates(ends, s, horizon, **search)
                row = {"kind": "limit", "loss": loss, "design": design, "value": value, "max_staleness": s, "horizon": horizon}
                rows.append(row | dict(zip(("first", "second"), found[s, horizon], strict=True)))
    return rows


def make_ends(case: ProxyCase, *, capacity: int) -> Callable:
    """Compiles what a run under a fixed lag has reached by its horizon.

    Args:
      case: of `studies.horizon.proxy_case`.
      capacity: K, the largest staleness + 1.

    Returns:
      A jitted function (learning_rates [N], staleness [], horizon []) -> (highest gold reward of steps 0..T [N], that after T
      updates [N], before the first []).
    """

    @jit_repeated
    def ends(learning_rates, staleness, horizon):
        def cell(learning_rate):
            optimizer = optax.sgd(learning_rate)

            def advance(_, carry):
                state, peak = carry
                state = update_step(state, staleness, case.field, optimizer)[0]
                return state, jnp.maximum(peak, case.gold(state.params))

            start = create_state(case.params, optimizer, capacity), case.gold(case.params)
            state, peak = jax.lax.fori_loop(0, horizon, advance, start)
            return peak, case.gold(state.params)

        return *jax.vmap(cell)(learning_rates), case.gold(case.params)

    return ends


def largest_rates(
    ends: Callable, staleness: int, horizon: int, *, window: Sequence[float], grid: int, rule: CollapseRule
) -> list[list[float] | None]:
    """[low, high] around the largest learning rate below the first that has collapsed by T, for both rules of collapse.

    Args:
      ends: of `make_ends`.
      staleness: S, updates.
      horizon: T, updates.
      window: (low, high) of η·T.
      grid: learning rates at once; the bracket they leave is divided by as many.
      rule: of collapse.

    Returns:
      For each rule two neighboring learning rates, the first one not collapsed; None where none in the window has collapsed.

    Raises:
      ArithmeticError: the smallest learning rate of the window has collapsed already.
    """

    def collapsed(rates):
        peak, end, start = map(np.asarray, ends(jnp.asarray(rates), jnp.asarray(staleness), jnp.asarray(horizon)))
        # a rule has fired by T iff the last reward lies below its threshold, which the peak so far decides
        runs = classify_runs(
            [horizon / 2, horizon], np.stack([peak, end], axis=1), start_reward=float(start), ceiling=1.0, rule=rule
        )
        return [[run.collapse_step is not None for run in runs], [run.collapse_step_second_rule is not None for run in runs]]

    rates = np.geomspace(*window, grid) / horizon
    brackets = []
    for index, fired in enumerate(collapsed(rates)):
        if not any(fired):
            brackets.append(None)
            continue
        first = fired.index(True)
        if first == 0:
            raise ArithmeticError(f"window={tuple(window)} starts where S = {staleness}, T = {horizon} has collapsed already")
        finer = np.geomspace(rates[first - 1], rates[first], grid)
        at = collapsed(finer)[index].index(True)
        brackets.append([_short(finer[max(at, 1) - 1]), _short(finer[max(at, 1)])])
    return brackets


def _short(value: float) -> float:
    digits = 6 - math.ceil(math.log10(value))
    return round(float(value), digits)
