"""Rows of a sweep whose runs were not trained but planted, with known answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

STEPS = (np.arange(20) + 1) * 40
WINDOW_ENDS = (160, 320, 480, 640, 800)
RATES = tuple(1e-4 * 2**k for k in range(8))
QUIET = {  # first-window values of a run nobody looks at
    "drift/from_behavior": 1.0,
    "off_policy/ess_ratio": 0.5,
    "off_policy/second_moment": 1.0,
    "off_policy/kl": 1.0,
    "off_policy/tv": 1.0,
    "grad/cosine_prev": 0.1,
    "grad/cosine_twin": 0.2,
    "grad/norm": 1.0,
    "entropy": 1.0,
}


def curve(outcome: str, step: float = np.inf) -> np.ndarray:
    """[20] rewards from 0.3 of a ceiling of 1 that end as told, from `step` on."""
    rise = 0.3 + 0.6 * STEPS / 800
    wiggle = 0.02 * (-1.0) ** np.arange(20)
    if outcome == "success":
        return rise
    if outcome == "never learned":
        return 0.3 + 0.05 * STEPS / 800
    if outcome == "frozen":
        return np.where(STEPS >= step, 0.45, 0.45 + wiggle)
    assert outcome == "fall", outcome
    return np.where(STEPS >= step, 0.05, 0.5 + wiggle)


def sweep_rows(
    run: Callable[..., tuple[str, float, dict]],
    *,
    case: str = "adam",
    algorithms: Sequence[str] = ("no_is",),
    staleness: Sequence[int] = (4, 8, 16, 32),
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = tuple(range(10)),
    schedule: str = "fixed",
) -> list[dict]:
    """Rows with `run(algorithm, S, η, seed)` -> (outcome, failure step, {name: value or 5 of them, "msd": {lag: value}})."""
    rows: list[dict] = [
        {"kind": "start", "piece": case, "case": case, "reward": 0.3, "gold_reward": 0.3, "ceiling": 1.0, "gold_ceiling": 1.0}
    ]
    for algorithm, s, rate in itertools.product(algorithms, staleness, rates):
        found = [run(algorithm, s, rate, seed) for seed in seeds]
        lags = sorted({1, *(2**k for k in range(6) if 2**k < s), max(s, 1)})
        windows = {
            name: [np.broadcast_to(values.get(name, quiet), 5).tolist() for _, _, values in found]
            for name, quiet in QUIET.items()
        }
        msd = [[values.get("msd", dict.fromkeys(lags, 1.0))[lag] for lag in lags] for _, _, values in found]
        rows.append(
            {
                "kind": "cell",
                "piece": f"{case}/{algorithm}/{rate:g}",
                "case": case,
                "algorithm": algorithm,
                "schedule": schedule,
                "max_staleness": s,
                "learning_rate": rate,
                "steps": STEPS.tolist(),
                "reward": [curve(outcome, step).tolist() for outcome, step, _ in found],
                "window_ends": list(WINDOW_ENDS),
                "windows": windows,
                "msd_lags": lags,
                "msd": msd,
                "seeds": list(seeds),
            }
        )
    return rows
