"""What became of a run, read off its reward curve: success, or how it failed, and the step at which it collapsed. No jax.

Every threshold stands in a `CollapseRule`, declared before the runs. Two rules of collapse are always applied beside each
other: a finding that holds under one of them only is a finding about the rule.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jax_async_grpo.option_checks import as_fraction, as_positive

__all__ = ["OUTCOMES", "CollapseRule", "RunOutcome", "classify_run", "classify_runs"]

_EDGE_TOLERANCE = 1e-9  # of the ceiling; a mean of rewards at a threshold may lie below it by rounding

OUTCOMES = ("success", "fall", "frozen", "never learned", "non-finite")


@dataclasses.dataclass(frozen=True)
class CollapseRule:
    """The thresholds of `classify_run`; r_0 is the reward before the first update, the peak the highest reward so far.

    Attributes:
      gain: success needs an end of at least r_0 + gain·(ceiling − r_0); in (0, 1].
      keep: first rule, a share of the peak: success needs end ≥ keep·peak, and the run has collapsed where reward < keep·peak.
      give_back: second rule, a drawdown: collapsed where reward < r_0 + give_back·(peak − r_0). Unlike the first it does not
        change when a constant is added to all rewards.
      frozen_tolerance: a curve whose largest and smallest rewards differ by less than frozen_tolerance·(ceiling − r_0) stands
        still.
      frozen_window: share of the horizon, its end, over which a frozen run stands still; in (0, 1].
      end_window: share of the horizon, its end, over which rewards are averaged to the end reward; in (0, 1].
    """

    gain: float = 0.5
    keep: float = 0.7
    give_back: float = 0.5
    frozen_tolerance: float = 0.01
    frozen_window: float = 0.25
    end_window: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            closed = field.name in ("gain", "frozen_window", "end_window")
            as_fraction(field.name, getattr(self, field.name), closed=closed)


class RunOutcome(NamedTuple):
    """What `classify_run` says of one run.

    Attributes:
      outcome: one of `OUTCOMES`.
      collapse_step: first recorded step from which reward < keep·peak at every later one up to the horizon; None where the
        rule does not hold at the last recorded step (it did not fire, or the run came back).
      resolution: updates between that step and the recorded one before it (step 0 before the first): the fall lies in
        (collapse_step − resolution, collapse_step]. Nothing is interpolated.
      collapse_step_second_rule, resolution_second_rule: the same for reward < r_0 + give_back·(peak − r_0).
      peak: the highest finite reward within the horizon, r_0 included.
      end: mean reward over the end window; None for a non-finite run.
    """

    outcome: str
    collapse_step: float | None
    resolution: float | None
    collapse_step_second_rule: float | None
    resolution_second_rule: float | None
    peak: float
    end: float | None


def classify_run(
    steps, reward, *, start_reward: float, ceiling: float, horizon: float | None = None, rule: CollapseRule | None = None
) -> RunOutcome:
    """Success or kind of failure of one run, and its collapse step under both rules.

    In this order, with end and peak within the horizon:

      non-finite     a recorded reward is NaN or infinite
      success        end ≥ r_0 + gain·(ceiling − r_0) and end ≥ keep·peak
      fall           end < keep·peak: it lost what it had, were it only r_0
      frozen         it moved once, but not over the frozen window, and stands below success
      never learned  the rest

    The outcome compares the *averaged* end, the collapse steps single rewards: a noisy curve may have one without the other.
    Smooth noisy rewards first; the peak of a noisy curve lies too high. Non-finite rewards count as below every threshold. A
    shorter horizon is read off the same run: steps beyond it are not looked at.

    Args:
      steps: [M] learner updates before each reward was measured, ≥ 0, strictly increasing.
      reward: [M] mean reward ≥ 0 (shift rewards that can be negative: a share of the peak means nothing below 0).
      start_reward: r_0 ≥ 0, before the first update.
      ceiling: the highest reward that can be reached, > r_0.
      horizon: T, updates; default the last step. The last reward up to T must lie in T's end window, or the run was cut short.
      rule: default `CollapseRule()`.

    Returns:
      A `RunOutcome`.

    Raises:
      ValueError: shapes differ or are empty; steps are not increasing; a finite reward is negative; no step within the horizon
        lies in its end window; ceiling ≤ r_0.
    """
    reward = np.asarray(reward, np.float64)
    if reward.ndim != 1:
        raise ValueError(f"reward has shape {reward.shape}; one run needs [M]")
    return classify_runs(steps, reward[None], start_reward=start_reward, ceiling=ceiling, horizon=horizon, rule=rule)[0]


def classify_runs(
    steps, reward, *, start_reward, ceiling, horizon: float | None = None, rule: CollapseRule | None = None
) -> list[RunOutcome]:
    """`classify_run` of n runs with the same steps.

    Args:
      steps: [M], as in `classify_run`.
      reward: [n, M].
      start_reward: number or [n].
      ceiling: number or [n].
      horizon, rule: as in `classify_run`.

    Returns:
      n `RunOutcome`s.

    Raises:
      ValueError: as `classify_run`.
    """
    rule = CollapseRule() if rule is None else rule
    steps, reward, horizon = _within_horizon(steps, reward, horizon, rule)
    start, ceiling = _starts_and_ceilings(start_reward, ceiling, len(reward))
    finite = np.isfinite(reward)
    curve = np.where(finite, reward, -np.inf)
    peak = np.maximum(curve.max(axis=1), start)
    ends = np.where(finite, reward, np.nan)[:, steps > (1 - rule.end_window) * horizon].mean(axis=1)
    edge = _EDGE_TOLERANCE * ceiling
    keep, learn = rule.keep * peak - edge, start + rule.gain * (ceiling - start) - edge
    give_back = start + rule.give_back * (peak - start) - edge
    tolerance = rule.frozen_tolerance * (ceiling - start)
    late = reward[:, steps > (1 - rule.frozen_window) * horizon]
    with np.errstate(invalid="ignore"):  # non-finite runs are told apart first
        standing = (np.ptp(late, axis=1) < tolerance) & (late.shape[1] > 1)  # one measurement shows no standing still
        moved = np.maximum(peak - start, start - curve.min(axis=1)) >= tolerance
        kept, learned = ends >= keep, ends >= learn
    outcomes = np.select(
        [~finite.all(axis=1), learned & kept, ~kept, standing & moved], [OUTCOMES[4], *OUTCOMES[:3]], OUTCOMES[3]
    )
    first = _collapse_steps(steps, curve < keep[:, None])
    second = _collapse_steps(steps, curve < give_back[:, None])
    return [
        RunOutcome(str(outcomes[i]), *first[i], *second[i], float(peak[i]), float(ends[i]) if finite[i].all() else None)
        for i in range(len(reward))
    ]


def _collapse_steps(steps: np.ndarray, below: np.ndarray) -> list[tuple[float | None, float | None]]:
    """(step, resolution) from which below [n, M] holds until the last step; (None, None) where it does not hold there."""
    until_end = np.logical_and.accumulate(below[:, ::-1], axis=1)[:, ::-1]
    first = until_end.argmax(axis=1)
    gaps = np.diff(steps, prepend=0.0)
    return [(float(steps[i]), float(gaps[i])) if fired else (None, None) for i, fired in zip(first, below[:, -1], strict=True)]


def _within_horizon(steps, reward, horizon, rule: CollapseRule) -> tuple[np.ndarray, np.ndarray, float]:
    """steps [m], reward [n, m] up to the horizon, and the horizon; checked."""
    steps, reward = np.asarray(steps, np.float64), np.asarray(reward, np.float64)
    if steps.ndim != 1 or reward.ndim != 2 or reward.shape[1] != len(steps) or reward.size == 0:
        raise ValueError(f"steps {steps.shape} and reward {reward.shape} must be [M] and [n, M], neither empty")
    if not (np.isfinite(steps).all() and steps[0] >= 0 and (np.diff(steps) > 0).all()):
        raise ValueError("steps must be finite, >= 0 and strictly increasing")
    horizon = as_positive("horizon", steps[-1] if horizon is None else horizon)
    inside = steps <= horizon
    if not (inside & (steps > (1 - rule.end_window) * horizon)).any():
        last = f"the last one up to it is {steps[inside][-1]:g}" if inside.any() else f"the first one is {steps[0]:g}"
        raise ValueError(f"horizon={horizon:g} has no step in its last {rule.end_window:g} share; {last}")
    steps, reward = steps[inside], reward[:, inside]
    negative = np.isfinite(reward) & (reward < 0)
    if negative.any():
        raise ValueError(f"reward holds {reward[negative][0]:g}; a share of the peak needs rewards >= 0, shift them")
    return steps, reward, horizon


def _starts_and_ceilings(start_reward, ceiling, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as [n], checked."""
    given = {"start_reward": start_reward, "ceiling": ceiling}
    for name, value in given.items():
        value = np.asarray(value, np.float64)
        if value.shape not in ((), (num_runs,)):
            raise ValueError(f"{name} has shape {value.shape}; allowed: a number or [{num_runs}]")
        if not np.isfinite(value).all() or (value < 0).any():
            raise ValueError(f"{name}={value.tolist()} must be finite and >= 0")
        given[name] = np.broadcast_to(value, num_runs)
    start, ceiling = given.values()
    if (ceiling <= start).any():
        index = int(np.argmax(ceiling <= start))
        raise ValueError(f"ceiling={ceiling[index]:g} must be greater than start_reward={start[index]:g}")
    return start, ceiling
