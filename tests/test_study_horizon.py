"""The study of the horizon law in miniature, its runs against a plain loop, and its summary on planted laws."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from configs import study_horizon as study_config
from jax_async_grpo import records
from jax_async_grpo.scaling import CollapseRule, classify_run
from jax_async_grpo.studies import finished_pieces, horizon, horizon_page


def miniature() -> dict:
    config = study_config.get_config().to_dict()
    config |= dict(losses={"reinforce": config["losses"]["reinforce"]}, max_staleness=(0, 1, 4), time=40.0, spacing=0.4)
    config |= dict(learning_rates=(0.1, 0.2, 0.35), shown_learning_rate=0.2, shown_points=20, num_bootstrap=100)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = miniature()
    horizon.validate(config)
    workdir = records.open_workdir(tmp_path_factory.mktemp("horizon") / "run", config)
    horizon.run(config, workdir, lambda name, seconds: None)
    return config, workdir.read_metrics()


def test_the_miniature_is_what_a_plain_loop_gives(finished):
    """Another lag, another schedule, or a reward measured an update late, and t_c is another."""
    config, rows = finished
    assert list(finished_pieces(rows)) == horizon.pieces(config)
    rate, num_updates = 0.35, 114
    case = horizon.proxy_case(config, "reinforce")
    gradient, gold, rule = jax.jit(case.field), jax.jit(case.gold), CollapseRule(**config["rule"])
    for schedule, lag_at in (("fixed", lambda t: 4), ("periodic", lambda t: t % 5)):
        versions, curve = [case.params], []
        for t in range(num_updates + 1):
            curve.append(float(gold(versions[t])))
            stale = versions[t - min(lag_at(t), t)]
            versions.append(jax.tree.map(lambda p, g: p + rate * g, versions[t], gradient(versions[t], stale)))
        row = next(
            row for row in rows if row["kind"] == "cells" and (row["schedule"], row["learning_rate"]) == (schedule, rate)
        )
        steps = horizon.measured_steps(rate, time=config["time"], spacing=config["spacing"])
        assert row["horizon"] == steps[-1] == num_updates
        measured = np.array(curve)[np.unique(steps)]
        run = classify_run(np.unique(steps), measured, start_reward=curve[0], ceiling=1.0, rule=rule)
        at = row["max_staleness"].index(4)
        assert (row["step"][at], row["outcome"][at]) == (run.collapse_step, "fall")
        assert row["peak"][at] == pytest.approx(run.peak, rel=1e-5) and row["start_reward"] == pytest.approx(curve[0], rel=1e-5)
        assert row["t_c"][at] == pytest.approx(horizon.crossings(np.unique(steps), measured, run, rule)[0], rel=1e-5)
    starts = {row["schedule"]: (row["t_c"][0], row["mean_staleness"][0]) for row in rows if row.get("learning_rate") == rate}
    assert len(set(starts.values())) == 1 and starts["fixed"][1] == 0  # S = 0 is one run whatever the schedule


def test_the_miniature_says_what_its_rows_say(finished, tmp_path):
    config, rows = finished
    summary = horizon.summary(rows, config, {})
    inside = {(fit["schedule"], fit["rule"]): fit for fit in summary["fits"]}
    # S·η ≤ 0.5 at η = 0.1, 0.2, 0.35: S up to 4, 1, 1
    assert {fit["num_cells"] for fit in inside.values()} == {7}
    assert all(20 < fit["smallest"] <= fit["mean"] <= fit["largest"] < 26 for fit in inside.values())
    fixed, periodic = inside["fixed", "first"], inside["periodic", "first"]
    assert fixed["per_mean_staleness"] == pytest.approx(0.187, abs=0.01)
    assert periodic["per_mean_staleness"] == pytest.approx(fixed["per_mean_staleness"], rel=0.05)
    assert fixed["constant"] == pytest.approx(horizon_page.synchronous_constants(rows)["reinforce"] / (1 + 0.009), rel=2e-3)
    page = horizon.page(summary)
    assert f"| {fixed['mean']:.2f} | {fixed['smallest']:.2f} | {fixed['largest']:.2f} |" in page
    assert "what delays collapse is the mean staleness, whatever the schedule" in page
    assert [path.name for path in horizon.figures(rows, summary, tmp_path)] == [
        f"horizon_{name}.{kind}" for name in ("constant", "curves") for kind in ("png", "svg")
    ]
    shown = f"η = {summary['shown_learning_rate']:g}, {summary['schedules'][0]} lag of S updates"
    assert shown in (tmp_path / "horizon_curves.svg").read_text()


def planted(product) -> tuple[dict, list[dict]]:
    """Rows of a system with t_c·η = product(S, η), None where it does not collapse."""
    config = miniature() | dict(schedules=("fixed",), max_staleness=(0, 1, 2, 4, 8, 16, 32, 64))
    config |= dict(learning_rates=(0.01, 0.02, 0.05, 0.1, 0.2, 0.35), shown_learning_rate=0.1)
    rows = []
    for rate in config["learning_rates"]:
        times = [product(s, rate) for s in config["max_staleness"]]
        times = [None if t is None else t / rate for t in times]
        size = len(times)
        row = {"kind": "cells", "loss": "reinforce", "schedule": "fixed", "learning_rate": rate, "start_reward": 0.3}
        row |= {
            "horizon": 1000,
            "max_staleness": list(config["max_staleness"]),
            "mean_staleness": list(config["max_staleness"]),
        }
        row |= {"outcome": ["success" if t is None else "fall" for t in times], "peak": [0.9] * size, "end": [0.1] * size}
        row |= {
            "resolution": [None if t is None else 2.0 for t in times],
            "step": times,
            "t_c": times,
            "t_c_second_rule": times,
        }
        rows.append(row)
    return config, [*rows, {"kind": "piece", "piece": "x", "seconds": 1.0}]


def test_a_planted_exponent_is_found_and_breaks_the_law():
    config, rows = planted(lambda s, rate: 20 * max(s, 0.5) ** 0.1)
    summary = horizon.summary(rows, config, {})
    fit = next(fit for fit in summary["fits"] if fit["rule"] == "first")
    assert fit["staleness_exponent"] == pytest.approx(0.1) and fit["learning_rate_exponent"] == pytest.approx(0, abs=1e-9)
    failed = {check["what"] for check in summary["checks"] if not check["holds"]}
    assert any("exponent" in what for what in failed) and any("variation" in what for what in failed)
    assert "Not held: coefficient of variation" in horizon.page(summary) and "All of them hold" not in horizon.page(summary)


def test_a_planted_correction_and_end_are_found():
    def product(s, rate):
        return 20 * (1 + 0.05 * s * rate + 0.02 * rate) if s * rate < 1 else 6.0 * s * rate

    config, rows = planted(product)
    summary = horizon.summary(rows, config, {})
    fit = next(fit for fit in summary["fits"] if fit["rule"] == "first")
    assert [fit[key] for key in ("constant", "per_mean_staleness", "per_learning_rate")] == pytest.approx([20, 0.05, 0.02])
    assert fit["correction_error"] < 1e-12 and fit["num_cells"] == 27
    (end,) = summary["ends"]
    # 0.8 is the largest S·η below 1; off by 4 % there, by 70 % at 1.28
    assert (end["last_on"], end["first_off"]) == (pytest.approx(0.8), pytest.approx(1.28))
    (beyond,) = summary["beyond"]
    assert (beyond["staleness_exponent"], beyond["learning_rate_exponent"]) == pytest.approx((1, 1))
    assert "close to a fixed number of *cycles* whatever η" in horizon.page(summary)
    assert all(check["holds"] for check in summary["checks"] if "distance" not in check["what"])


def test_runs_that_do_not_collapse_are_counted_and_never_a_number():
    config, rows = planted(lambda s, rate: None if s * rate > 0.3 else 20.0)
    summary = horizon.summary(rows, config, {})
    assert all(fit["num_not_collapsed"] == 6 and "mean" not in fit for fit in summary["fits"])
    assert not any(check["holds"] for check in summary["checks"] if "variation" in check["what"])
    (end,) = summary["ends"]
    assert end["first_off"] == pytest.approx(0.32) and end["ratio"] == np.inf
    assert summary["beyond"][0]["num_collapsed"] == 0
    page = horizon.page(summary)
    assert "6 cells did not collapse" in page and "never" in page and "nan" not in page


def test_crossings_lie_on_the_line_between_two_rewards():
    steps, rule = np.array([0, 10, 20, 30, 50]), CollapseRule(keep=0.5, give_back=0.25)
    reward = np.array([0.2, 1.0, 0.8, 0.4, 0.1])
    run = classify_run(steps, reward, start_reward=0.2, ceiling=1.0, rule=rule)
    # thresholds 0.5 and 0.2 + 0.25·0.8 = 0.4: the second is reached at step 30 itself, and passed from there on
    assert horizon.crossings(steps, reward, run, rule) == (pytest.approx(27.5), pytest.approx(30.0))
    level = np.full(5, 0.5)
    run = classify_run(steps, level, start_reward=0.5, ceiling=1.0, rule=rule)
    assert horizon.crossings(steps, level, run, rule) == (None, None)


def test_measured_steps_are_every_update_where_updates_are_long():
    steps = horizon.measured_steps(0.05, time=10.0, spacing=0.5)
    np.testing.assert_array_equal(steps, np.arange(0, 201, 10))
    steps = horizon.measured_steps(1.0, time=10.0, spacing=0.25)
    np.testing.assert_array_equal(np.unique(steps), np.arange(11))
    assert len(steps) == 41 and (np.diff(steps) >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=1), "config.seeds is not a key"),
        (dict(group_size=1), "config.group_size is 1"),
        (dict(losses={}), "config.losses is empty"),
        (dict(losses={"a": "no.such"}), "config.losses.a is 'no.such'"),
        (dict(schedules=("fixed", "often")), "config.schedules is ('fixed', 'often')"),
        (dict(max_staleness=(1, 2)), "config.max_staleness is (1, 2); it must hold 0"),
        (dict(max_staleness=(0, 2, 2)), "a value stands there twice"),
        (dict(learning_rates=(0.1, 0.0)), "config.learning_rates is 0.0"),
        (dict(time=2.0), "config.time is 2.0"),
        (dict(spacing=0), "config.spacing is 0"),
        (dict(rule={"keep": 2.0}), "config.rule: keep=2"),
        (dict(window={}), "config.window.staleness_x_learning_rate is missing"),
        (dict(tolerance={"variation": 0.1}), "config.tolerance.staleness_exponent is missing"),
        (dict(beyond=(3.0, 1.0)), "config.beyond is (3.0, 1.0)"),
        (dict(shown_learning_rate=0.3), "config.shown_learning_rate is 0.3"),
        (dict(num_bootstrap=10), "config.num_bootstrap is 10"),
        (dict(confidence=1.0), "config.confidence is 1.0"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        horizon.validate(study_config.get_config().to_dict() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_does_not_hide_a_failed_check(finished):
    config, rows = finished
    wrong = copy.deepcopy(rows)
    row = next(row for row in wrong if row["kind"] == "cells" and row["learning_rate"] == 0.1)
    row["t_c"][0] *= 1.3
    assert "**fails**" in horizon.page(horizon.summary(wrong, config, {}))
