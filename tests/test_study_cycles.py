"""The study of cycles: its exact limits against the curves of the horizon study, its sampled part on planted laws."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from configs import study_cycles as study_config
from jax_async_grpo import records
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies import cycles, cycles_page, finished_pieces, horizon

LAGS = (0, 4, 8, 16, 32)
STEPS = list(range(40, 801, 40))


def miniature() -> dict:
    config = study_config.get_config().to_dict()
    config |= dict(losses={"reinforce": config["losses"]["reinforce"]}, max_staleness=(0, 4, 7, 11), num_bootstrap=100)
    return config | dict(updates=(600,), cycles=(50,), window=(8.0, 40.0), grid=8, exponent_min_staleness=4)


def sweep_rows(fall_step, algorithms=("clip",), num_seeds=20) -> list[dict]:
    """Runs that succeed until the step fall_step(S, η, luck) and then lie at the bottom."""
    luck = np.exp(0.5 * np.random.default_rng(3).standard_normal(num_seeds))
    rows = [{"kind": "start", "case": "adam", "reward": 0.3, "gold_reward": 0.3, "ceiling": 1.0, "gold_ceiling": 1.0}]
    for algorithm in algorithms:
        for s in LAGS:
            for rate in 1e-4 * 2.0 ** np.arange(9):
                falls = [fall_step(s, rate, z) for z in luck]
                reward = [[0.9 if step < fall else 0.1 for step in STEPS] for fall in falls]
                row = {"kind": "cell", "case": "adam", "algorithm": algorithm, "schedule": "fixed", "max_staleness": s}
                rows.append(row | {"learning_rate": rate, "steps": STEPS, "reward": reward, "seeds": list(range(num_seeds))})
    return rows


HORIZON = [
    {"kind": "cells", "loss": "reinforce", "schedule": "fixed", "learning_rate": 0.01, "start_reward": 0.3, "horizon": 1}
    | {"max_staleness": [0], "t_c": [2119.0], "t_c_second_rule": [2119.0]}
    | {key: [0] for key in ("mean_staleness", "outcome", "resolution", "peak", "end", "step")}
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = miniature()
    cycles.validate(config)
    workdir = records.open_workdir(tmp_path_factory.mktemp("cycles") / "run", config)
    cycles.run(config, workdir, lambda name, seconds: None)
    return config, workdir.read_metrics()


def test_fixed_cycles_make_the_law_out_of_nothing_and_limits_are_those_of_the_curves(finished):
    config, rows = finished
    assert list(finished_pieces(rows)) == cycles.pieces(config) == ["reinforce"]
    summary = cycles.summary(rows, config, {"horizon": HORIZON, "collapse": []})
    found = {line["design"]: line for line in summary["exact"]}
    assert found["cycles"]["first_exponent"] == pytest.approx(-1, abs=0.05)
    assert 0 < found["updates"]["first_exponent"] < 0.1
    assert 1 < found["cycles"]["against_constant"][0] <= found["cycles"]["against_constant"][1] < 1.1
    page = cycles.page(summary)
    assert "to the eye perfect" in page and "`clip` has not been run" in page
    # the same answer from the reward curves of the horizon study, between whose steps the limit must lie
    limit = next(row for row in rows if row["kind"] == "limit" and (row["design"], row["max_staleness"]) == ("updates", 4))
    curves = horizon.make_curves(horizon.proxy_case(config, "reinforce"), capacity=12)
    rule = CollapseRule(**config["rule"])
    for rate, collapses in zip(limit["first"], (False, True), strict=True):
        reward = np.asarray(curves(rate, np.full((1, 601), 4, np.int32), np.arange(601, dtype=np.int32)))[0]
        assert (reward[-1] < rule.keep * reward.max()) == collapses


def fake_ends(first, second, calls):
    """A run whose reward at T is below both, one or none of the thresholds, by its learning rate."""

    def ends(rates, staleness, horizon):
        calls.append(int(horizon))
        rates = np.asarray(rates)
        end = np.where(rates * horizon >= second, 0.1, np.where(rates * horizon >= first, 0.68, 0.9))
        return np.ones_like(rates), end, 0.5

    return ends


def test_the_search_brackets_the_first_learning_rate_that_has_collapsed():
    """keep·peak is 0.7 here and r_0 + give_back·(peak − r_0) is 0.6: the rules have limits of their own."""
    rule, calls = CollapseRule(keep=0.7, give_back=0.2), []
    search = dict(window=(1.0, 100.0), grid=20, rule=rule)
    first, second = cycles.largest_rates(fake_ends(7.0, 30.0, calls), 3, 200, **search)
    for (low, high), planted in ((first, 7.0), (second, 30.0)):
        assert low < planted / 200 <= high and high / low < 1.02
    assert calls == [200] * 3
    first, second = cycles.largest_rates(fake_ends(7.0, 300.0, calls), 3, 200, **search)
    assert first is not None and second is None
    with pytest.raises(ArithmeticError, match="starts where S = 3, T = 200 has collapsed already"):
        cycles.largest_rates(fake_ends(0.5, 30.0, calls), 3, 200, **search)


def summarize(fall_step, algorithms=("clip",)) -> dict:
    config = study_config.get_config().to_dict() | dict(algorithms=algorithms, num_bootstrap=100)
    row = {"kind": "limit", "loss": "reinforce", "design": "updates", "value": 800, "max_staleness": 4, "horizon": 800}
    rows = [row | {"first": [0.02, 0.021], "second": None}, {"kind": "piece", "piece": "reinforce", "seconds": 1.0}]
    return cycles.summary(rows, config, {"horizon": HORIZON, "collapse": sweep_rows(fall_step, algorithms)})


PLANTED = {  # name: (fall step, exponent in S+1 at fixed updates, in T, verdict)
    "horizon": (lambda s, rate, z: 0.5 * z / rate, 0.0, -1.0, "horizon"),
    "staleness": (lambda s, rate, z: 40 if rate * (s + 1) > 0.03 * z else np.inf, -1.0, 0.0, "staleness"),
    "both": (lambda s, rate, z: (0.03 * z / rate) ** 2 / (s + 1), -0.5, -0.5, "both"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_laws_are_told_apart(name, tmp_path):
    """Fixed cycles show the sum of both exponents, and the difference of the designs is that of T alone."""
    fall_step, in_staleness, in_horizon, word = PLANTED[name]
    summary = summarize(fall_step)
    for part in summary["sampled"]:
        for found, horizon_found in zip(part["exponents"], part["horizon_exponents"], strict=True):
            assert found["updates"]["exponent"] == pytest.approx(in_staleness, abs=0.08)
            assert horizon_found["lagged"]["exponent"] == pytest.approx(in_horizon, abs=0.12)
            assert found["cycles"]["exponent"] == pytest.approx(in_staleness + in_horizon, abs=0.12)
            assert found["difference"]["exponent"] == pytest.approx(in_horizon, abs=0.12)
            if in_staleness:
                low, high = found["updates"]["interval"]
                assert low - 0.05 < in_staleness < high + 0.05
            assert cycles_page.verdict(found["updates"], horizon_found["lagged"]) == word
    assert [part["criterion"] for part in summary["sampled"]] == ["success", "no fall"]
    page = cycles.page(summary)
    assert cycles_page._SAID[word] in page and "likewise" in page
    assert ("between −1 and 0" in page) == (name == "both")
    if name == "horizon":
        assert "c/Y for `clip`" in page
    assert [path.name for path in cycles.figures([], summary, tmp_path)] == ["cycles.png", "cycles.svg"]


def test_horizons_are_measured_steps_or_nothing():
    summary = summarize(PLANTED["staleness"][0])
    (lines,) = [part["boundaries"]["cycles"] for part in summary["sampled"] if part["criterion"] == "success"]
    assert [line["horizon"] for line in lines] == [None, 120, 200, 400, 800]
    assert [line["wanted"] for line in lines] == [24, 120, 216, 408, 792]
    assert lines[0]["status"] == "not measured"
    assert "S = 0: 24 has none; S = 4: 120 measured; S = 8: 216 → 200" in cycles.page(summary)
    assert cycles_page.measured_horizon([40, 80], 60, rounding=0.4) == 40  # the shorter one of two as near
    assert cycles_page.measured_horizon([40, 80], 60, rounding=0.3) is None


def test_runs_that_never_fall_or_always_do_have_no_exponent():
    for fall_step, status in ((lambda s, rate, z: np.inf, "censored"), (lambda s, rate, z: 0, "none")):
        summary = summarize(fall_step)
        for part in summary["sampled"]:
            assert {line["status"] for line in part["boundaries"]["updates"]} == {status}
            assert all(found[key]["exponent"] is None for found in part["exponents"] for key in ("updates", "cycles"))
        page = cycles.page(summary)
        assert cycles_page._SAID["undetermined"] in page and "nan" not in page and "not identifiable" in page


@pytest.mark.parametrize(
    ("fixed", "in_horizon", "word"),
    [
        ((-0.9, -0.5), (-0.1, 0.1), "staleness"),
        ((-0.9, -0.5), (-0.5, -0.1), "both"),
        ((-0.2, 0.1), (-1.2, -0.8), "horizon"),
        ((-0.2, 0.1), (-0.2, 0.1), "neither"),
        ((-0.9, -0.5), None, "staleness at least"),
        ((-0.2, 0.1), None, "undetermined"),
        (None, (-1.2, -0.8), "undetermined"),
        ((-0.6, -0.05), (-1.3, 0.02), "staleness at least"),  # −1 in T is not ruled out
        ((-0.7, 0.1), (-1.2, -0.8), "horizon at least"),
        ((-0.8, 0.1), (-0.2, 0.1), "undetermined"),
    ],
)
def test_verdicts(fixed, in_horizon, word):
    assert cycles_page.verdict({"interval": fixed}, {"interval": in_horizon}) == word


def test_ends_are_those_of_the_curve(finished):
    """The peak counts the start and every update; the horizon is the number of updates."""
    config, _ = finished
    case = horizon.proxy_case(config, "reinforce")
    ends, curves = cycles.make_ends(case, capacity=12), horizon.make_curves(case, capacity=12)
    peak, end, start = ends(jnp.array([0.3, 0.2]), jnp.array(7), jnp.array(90))
    reward = np.asarray(curves(0.3, np.full((1, 601), 7, np.int32), np.minimum(np.arange(601), 90).astype(np.int32)))[0]
    assert (peak[0], end[0], start) == pytest.approx((reward.max(), reward[-1], reward[0]), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=1), "config.seeds is not a key"),
        (dict(losses={}), "config.losses is empty"),
        (dict(rule={"gain": 0.0}), "config.rule: gain=0"),
        (dict(paper={}), "config.paper.collapse is missing"),
        (dict(updates=(800,)), "config.cycles is (24, 100); it must hold as many numbers as config.updates"),
        (dict(updates=(800, 2)), "config.updates is 2"),
        (dict(max_staleness=(1, -1)), "config.max_staleness is -1"),
        (dict(window=(0.0, 1.0)), "config.window is 0.0"),
        (dict(grid=2), "config.grid is 2"),
        (dict(rounding=1.0), "config.rounding is 1.0"),
        (dict(levels=(0.8, 1.5)), "config.levels is 1.5"),
        (dict(algorithms=()), "config.algorithms is ()"),
        (dict(exponent_min_staleness=0), "config.exponent_min_staleness is 0"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        cycles.validate(study_config.get_config().to_dict() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
