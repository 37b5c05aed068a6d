"""Planted curves get their outcome, collapse steps agree with a loop over all suffixes, a horizon is a cut of the same run."""

import numpy as np
import pytest

from jax_async_grpo import scaling

STEPS = np.arange(10, 401, 10)


def classify(reward, **changes):
    arguments = {"steps": STEPS, "start_reward": 0.2, "ceiling": 1.0} | changes
    return scaling.classify_run(reward=reward, **arguments)


def rise(top: float, rate: float = 0.02) -> np.ndarray:
    return 0.2 + (top - 0.2) * (1 - np.exp(-rate * STEPS))


def fallen(step: int, bottom: float = 0.05) -> np.ndarray:
    return np.where(STEPS < step, rise(0.9), bottom)


@pytest.mark.parametrize(
    "reward, outcome",
    [
        (rise(0.95), "success"),
        (np.full(40, 0.6), "success"),  # exactly r_0 + (ceiling - r_0)/2: the edge belongs to success
        (rise(0.599, 1.0), "frozen"),
        (rise(0.4, 1.0), "frozen"),
        (np.full(40, 0.2), "never learned"),  # it stands still, but never moved
        (rise(0.4, 0.003), "never learned"),
        (fallen(200), "fall"),
        (np.full(40, 0.1), "fall"),  # it lost what it started with
        (np.where(STEPS < 200, 0.95, 0.64), "fall"),  # above one half, below 0.7 of the peak
        (np.where(STEPS < 200, 0.95, 0.67), "success"),
        (np.where(STEPS == 200, np.nan, rise(0.9)), "non-finite"),
        (np.where(STEPS == 400, np.inf, rise(0.9)), "non-finite"),
        (np.where(STEPS > 200, np.nan, fallen(100)), "non-finite"),
    ],
)
def test_planted_outcomes(reward, outcome):
    result = classify(reward)
    assert result.outcome == outcome and outcome in scaling.OUTCOMES
    assert (result.end is None) == (outcome == "non-finite") and np.isfinite(result.peak)


def brute(steps, reward, threshold):
    """First index all of whose suffix lies below, by trying every one."""
    for i in range(len(steps)):
        if all(r < threshold for r in reward[i:]):
            return steps[i], steps[i] - (steps[i - 1] if i else 0)
    return None, None


@pytest.mark.parametrize("seed", range(20))
def test_collapse_steps_agree_with_all_suffixes_tried(seed):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 9, size=30))
    reward = np.clip(0.5 + np.cumsum(rng.normal(size=30)) * 0.15, 0, 1)
    rule = scaling.CollapseRule(keep=0.8, give_back=0.4, end_window=0.3)
    result = classify(reward, steps=steps, rule=rule)
    peak = max(reward.max(), 0.2)
    assert result.peak == peak
    assert (result.collapse_step, result.resolution) == brute(steps, reward, 0.8 * peak)
    second = (result.collapse_step_second_rule, result.resolution_second_rule)
    assert second == brute(steps, reward, 0.2 + 0.4 * (peak - 0.2))
    assert result.end == pytest.approx(reward[steps > 0.7 * steps[-1]].mean())


def test_one_measurement_shows_no_standing_still():
    rising = dict(steps=[40, 80, 120], reward=[0.3, 0.33, 0.37], start_reward=0.2, ceiling=1.0)
    assert scaling.classify_run(**rising).outcome == "never learned"  # the last quarter holds the last measurement alone


def test_the_two_rules_part():
    """0.9 -> 0.6: 0.67 of the peak, and 0.57 of the gain: the first rule fires and the drawdown does not."""
    result = classify(np.where(STEPS < 200, 0.9, 0.6))
    assert (result.collapse_step, result.resolution) == (200, 10)
    assert result.collapse_step_second_rule is None and result.resolution_second_rule is None
    high_start = classify(np.where(STEPS < 200, 0.9, 0.7), start_reward=0.6)
    assert high_start.collapse_step is None and high_start.collapse_step_second_rule == 200


def test_a_run_that_comes_back_did_not_collapse():
    reward = rise(0.9)
    reward[10:20] = 0.0
    assert classify(reward).collapse_step is None and classify(reward).outcome == "success"
    reward[30:] = 0.0
    assert classify(reward).collapse_step == STEPS[30]  # and the first dip does not count


def test_a_horizon_is_read_off_the_same_run():
    run = fallen(200)
    run[-1] = np.nan  # far beyond the shorter horizons
    expected = {150: ("success", None), 190: ("success", None), 300: ("fall", 200.0), 400: ("non-finite", 200.0)}
    for horizon, (outcome, step) in expected.items():
        result = classify(run, horizon=horizon)
        assert (result.outcome, result.collapse_step) == (outcome, step)
        cut = STEPS <= horizon
        assert result == classify(run[cut], steps=STEPS[cut], horizon=horizon)
    assert classify(run, horizon=155) == classify(run[:15], steps=STEPS[:15], horizon=155)


def test_rewards_scale_and_only_the_drawdown_may_be_shifted():
    rng = np.random.default_rng(0)
    for _ in range(20):
        reward = np.abs(0.5 + np.cumsum(rng.normal(size=40)) * 0.1)
        one = classify(reward, ceiling=2.0)
        four = classify(4 * reward, start_reward=0.8, ceiling=8.0)
        assert one[:5] == four[:5]
        shifted = classify(reward + 5, start_reward=5.2, ceiling=7.0)
        assert shifted[3:5] == one[3:5]


def test_every_threshold_is_used():
    for reward, change, before, after in [
        (np.full(40, 0.55), {"gain": 0.4}, "frozen", "success"),
        (np.where(STEPS < 200, 0.95, 0.64), {"keep": 0.6}, "fall", "success"),
        (rise(0.4, 0.01), {"frozen_tolerance": 1e-3}, "frozen", "never learned"),
        (rise(0.4, 0.03), {"frozen_window": 1.0}, "frozen", "never learned"),
        (np.where(STEPS < 370, 0.9, 0.1), {"end_window": 0.5}, "fall", "success"),
    ]:
        assert classify(reward).outcome == before
        assert classify(reward, rule=scaling.CollapseRule(**change)).outcome == after
    drop = np.where(STEPS < 200, 1.0, 0.5)
    assert classify(drop).collapse_step_second_rule == 200
    assert classify(drop, rule=scaling.CollapseRule(give_back=0.3)).collapse_step_second_rule is None


def test_many_runs_are_the_runs_one_by_one():
    rng = np.random.default_rng(1)
    rewards = np.abs(0.5 + np.cumsum(rng.normal(size=(30, 40)), axis=1) * 0.1)
    rewards[3, 20], rewards[4, 39] = np.nan, np.inf
    start, ceiling = rng.uniform(0.1, 0.3, size=30), rng.uniform(0.8, 1.5, size=30)
    together = scaling.classify_runs(STEPS, rewards, start_reward=start, ceiling=ceiling, horizon=400)
    alone = [classify(r, start_reward=s, ceiling=c) for r, s, c in zip(rewards, start, ceiling, strict=True)]
    assert together == alone and len({r.outcome for r in alone}) >= 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": [], "reward": []}, "neither empty"),
        ({"steps": STEPS[:3]}, r"steps \(3,\) and reward \(1, 40\)"),
        ({"reward": np.ones((2, 40))}, r"one run needs \[M\]"),
        ({"steps": STEPS[::-1]}, "strictly increasing"),
        ({"steps": np.where(STEPS == 20, np.nan, STEPS)}, "must be finite"),
        ({"reward": -np.ones(40)}, "reward holds -1; a share of the peak needs rewards >= 0"),
        ({"horizon": 500}, "horizon=500 has no step in its last 0.1 share; the last one up to it is 400"),
        ({"horizon": 5}, "horizon=5 has no step in its last 0.1 share; the first one is 10"),
        ({"horizon": np.nan}, "horizon=nan must be > 0"),
        ({"ceiling": 0.2}, "ceiling=0.2 must be greater than start_reward=0.2"),
        ({"start_reward": np.nan}, "start_reward=nan must be finite"),
        ({"start_reward": [0.1, 0.2]}, r"start_reward has shape \(2,\)"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        classify(**{"reward": rise(0.9)} | arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gain", "keep", "give_back", "frozen_tolerance", "frozen_window", "end_window"])
def test_rule_refuses(name):
    for value in (0, 1.1, np.nan):
        with pytest.raises(ValueError, match=f"{name}="):
            scaling.CollapseRule(**{name: value})
