"""The study of delay stability in miniature, what it simulates, and that its page counts instead of presuming."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from configs import study_delay as study_config
from jax_async_grpo import records
from jax_async_grpo.delay_stability import delay_stability
from jax_async_grpo.studies import delay, delay_page, delay_simulation, finished_pieces

CENTER = np.array([1.0, -2.0])


def linear_field(learner, behavior, decay):
    """A = −decay, B = −1 in the first of two coordinates; the second only decays. The equilibrium is CENTER."""
    return -decay * (learner - CENTER) - jnp.array([1.0, 0.0]) * (behavior - CENTER)


SEARCH = dict(window=(0.05, 50.0), ratio=1.5, grid=8, num_refinements=2, size=1e-6, seed=0)


@pytest.fixture(scope="module")
def growth():
    return delay_simulation.make_growth_rates(linear_field)


def test_the_search_finds_the_thresholds_of_a_linear_learner(growth):
    answers = [("fixed", 0), ("fixed", 3), ("fixed", 4), ("periodic", 3), ("periodic", 4)]
    lags = delay_simulation.lag_table(answers, 2048, 0)
    decay = 0.3
    found = delay_simulation.simulated_thresholds(growth, CENTER, decay, lags, versions=5, **SEARCH)
    jacobians = -decay * np.eye(2), np.diag([-1.0, 0.0])
    for (schedule, s), threshold in zip(answers, found, strict=True):
        theory = delay_stability(*jacobians, s, schedule=schedule).max_learning_rate
        assert threshold.learning_rate == pytest.approx(theory, rel=1e-3), (schedule, s)
        assert threshold.low <= theory <= threshold.high <= 1.006 * threshold.low


def test_growth_is_the_rate_of_the_linear_system_and_a_vanished_deviation_is_no_growth(growth):
    """A deviation that shrinks below rounding would divide 0 by 0; without lag its factor is 1 − η(1 + decay)."""
    rates = np.array([[0.5, 0.999, 1.5, 2.5, 3.0, 0.1, 0.2, 0.3]])
    lags = np.zeros((512, 1), np.int32)
    logs = np.asarray(growth(CENTER, 0.0, rates, lags, np.ones((1, 2)), 1e-6))
    first = np.abs(1 - rates[0])
    expected = np.log(np.maximum(first, 1.0))  # without decay the second coordinate stays, growth is never negative
    np.testing.assert_allclose(delay_simulation._slopes(logs)[0], expected, atol=1e-9)
    logs = np.asarray(growth(CENTER, 1.0, 0.5 + 0 * rates, lags, np.ones((1, 2)), 1e-6))
    assert (delay_simulation._slopes(logs) < -0.5).all()


def test_a_window_that_misses_the_threshold_is_said_so(growth):
    lags = np.zeros((256, 1), np.int32)
    with pytest.raises(ValueError, match=r"window=\(3.0, 50.0\) starts where a deviation grows already"):
        search = SEARCH | dict(window=(3.0, 50.0))
        delay_simulation.simulated_thresholds(growth, CENTER, 0.1, lags, versions=1, **search)
    search = SEARCH | dict(window=(0.05, 1.0))
    (none,) = delay_simulation.simulated_thresholds(growth, CENTER, 0.1, lags, versions=1, **search)
    assert none.learning_rate == np.inf and none.low == 1.0


def test_lags_are_those_of_the_schedules():
    lags = delay_simulation.lag_table([("fixed", 2), ("periodic", 2), ("random", 2), ("random", 2)], 300, 5)
    assert set(lags[:, 0]) == {2}
    np.testing.assert_array_equal(lags[:, 1], np.arange(300) % 3)
    assert set(lags[:, 2]) == set(lags[:, 3]) == {0, 1, 2} and (lags[:, 2] != lags[:, 3]).any()


@pytest.mark.parametrize(
    ("distance", "fate"),
    [
        (np.exp(-np.arange(400) / 50), "decays"),
        (np.exp(np.arange(400) / 50), "grows"),
        (2 + np.sin(np.arange(400.0)), "oscillates"),
        (np.full(400, 3.0), "rests elsewhere"),
        (np.full(400, np.nan), "not finite"),
    ],
)
def test_fates(distance, fate):
    reward = np.where(np.arange(400) < 300, 0.0, np.linspace(0, 1, 400))
    result = delay.late_behavior(distance, reward)
    assert result["fate"] == fate
    if fate == "rests elsewhere":
        assert (result["amplitude"], result["reward"], result["lowest_reward"]) == pytest.approx((3, 0.8759, 0.7519), abs=1e-4)


def miniature() -> dict:
    config = study_config.get_config().to_dict()
    config |= dict(losses={"reinforce": config["losses"]["reinforce"]}, decays=(0.1,), max_staleness=((1, 4),))
    config |= dict(updates_per_version=60, min_updates=320, group_size=4, slope_from=1, ratio=2.0, grid=6)
    config["random"] |= dict(decay=0.1, max_staleness=(1,), num_updates=1024, num_chains=4)
    config["beyond"] |= dict(decay=0.1, max_staleness=(4,), shown_staleness=4, factors=(0.8, 1.5), num_updates=4000)
    small = dict(num_prompts=2, num_digits=1, base=3, seed=0)
    config["matrix_free"] |= dict(losses=("reinforce",), decay=0.1, max_staleness=(1,), task_options=small, num_features=20)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = miniature()
    delay.validate(config)
    workdir = records.open_workdir(tmp_path_factory.mktemp("delay") / "run", config)
    delay.run(config, workdir, lambda name, seconds: None)
    return config, workdir.read_metrics()


def test_the_miniature_agrees_with_the_theory(finished, tmp_path):
    config, rows = finished
    assert list(finished_pieces(rows)) == delay.pieces(config)
    summary = delay.summary(rows, config, {})
    assert {check["what"]: check["holds"] for check in summary["checks"]}.keys() == set(delay_page._CHECKS.values()) - {
        delay_page._CHECKS["flat_slope"]
    }
    assert all(check["holds"] for check in summary["checks"] if "slope" not in check["what"]), summary["checks"]
    (equilibrium,) = summary["equilibria"]
    assert equilibrium["growth_bound"] > 0 and equilibrium["residual"] < 1e-12
    below, above = summary["beyond"]
    assert (below["fate"], above["fate"]) == ("decays", "oscillates")
    assert below["amplitude"] < 1e-6 < 0.1 < above["amplitude"]
    assert [path.name for path in delay.figures(rows, summary, tmp_path)] == [
        f"delay_{name}.{kind}" for name in ("thresholds", "beyond") for kind in ("png", "svg")
    ]


def test_the_page_says_what_the_rows_say_and_a_failure_too(finished):
    config, rows = finished
    summary = delay.summary(rows, config, {})
    assert all(f"{row['theory']:.3f} / {row['simulated']:.3f}" in delay.page(summary) for row in summary["table"])
    wrong = copy.deepcopy(rows)
    row = next(row for row in wrong if row["kind"] == "threshold" and row["schedule"] == "fixed")
    row["simulated"] *= 1.5
    page = delay.page(delay.summary(wrong, config, {}))
    assert "Not held: fixed lag: simulation against theory" in page and "**fails**" in page and "All of them" not in page
    row["simulated"] = float("inf")
    assert "**fails**" in delay.page(delay.summary(wrong, config, {}))
    for row in wrong:
        if row["kind"] == "beyond":
            row |= {"reward": row["equilibrium_reward"] - 0.5, "lowest_reward": 0.0}
    assert "in 1 and more than 0.01 above it in 0; in 1 it falls below half" in delay.page(delay.summary(wrong, config, {}))


def test_companion_thresholds():
    s = 3
    pair = np.zeros((1, 1)), -np.eye(1)
    exact = 2 * np.sin(np.pi / (2 * (2 * s + 1)))
    assert delay.companion_threshold(*pair, s, low=1e-3, high=5.0, ratio=1.3) == pytest.approx(exact, rel=1e-9)
    assert delay.companion_threshold(*pair, s, low=1e-3, high=0.9 * exact, ratio=1.3) == np.inf
    assert delay.companion_threshold(*pair, s, low=2 * exact, high=5.0, ratio=1.3) == 2 * exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=1), "config.seeds is not a key"),
        (dict(decays=()), "config.decays is ()"),
        (dict(decays=(0.1, "x")), "config.decays is 'x'"),
        (dict(max_staleness=(1, 2)), "config.max_staleness is (1, 2)"),
        (dict(max_staleness=((1, -2),)), "config.max_staleness is -2"),
        (dict(group_size=1), "config.group_size is 1"),
        (dict(window=(0.0, 1.0)), "config.window is 0.0"),
        (dict(window=(2.0, 1.0)), "config.window is (2.0, 1.0)"),
        (dict(ratio=1.0), "config.ratio is 1.0"),
        (dict(grid=0), "config.grid is 0"),
        (dict(deviation=0), "config.deviation is 0"),
        (dict(losses={"a": "no.such"}), "config.losses.a is 'no.such'"),
        (dict(random={}), "config.random.decay is missing"),
        (dict(decays=(0.3,)), "config.random.decay is 0.04"),
        (dict(losses={"ppo_clip": "jax_async_grpo.losses.ppo_clip"}), "config.matrix_free.losses has 'reinforce'"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        delay.validate(study_config.get_config().to_dict() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_shown_staleness_that_is_not_simulated_is_refused():
    config = study_config.get_config().to_dict()
    config["beyond"]["shown_staleness"] = 3
    with pytest.raises(ValueError, match="config.beyond.shown_staleness is 3"):
        delay.validate(config)
