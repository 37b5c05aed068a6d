"""The landmark analysis: AUCs are Mann-Whitney's, planted warnings are found, and what η knows is not taken for a warning."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from configs import study_warnings
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies import warnings
from jax_async_grpo.studies.runs import run_table
from tests.planted_runs import sweep_rows

RATES = (1e-3, 2e-3)


def config(**changes) -> dict:
    return study_warnings.get_config().to_dict() | dict(cases=("adam",), num_bootstrap=200, confidence=0.999) | changes


def analyze(run, *, staleness=(0, 4, 8), seeds=range(16), changes=None, **options) -> dict:
    rows = sweep_rows(run, staleness=staleness, rates=RATES, seeds=tuple(seeds), **options)
    return warnings.summary([], config(**(changes or {})), {"collapse": rows})


def side(score) -> int:
    return int(score["interval"][0] > 0.5) - int(score["interval"][1] < 0.5)


def test_concordance_is_mann_whitney_within_strata_and_never_across():
    rng = np.random.default_rng(1)
    values, positive = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    strata, seeds = rng.integers(0, 3, 80), rng.integers(0, 7, 80)
    wins, pairs = warnings.concordance(values, positive, strata, seeds)
    expected = [mannwhitneyu(values[positive & (strata == s)], values[~positive & (strata == s)]).statistic for s in range(3)]
    assert wins.sum() == pytest.approx(sum(expected))
    assert pairs.sum() == sum(np.sum(positive & (strata == s)) * np.sum(~positive & (strata == s)) for s in range(3))
    # a shift common to a stratum changes nothing
    np.testing.assert_array_equal(warnings.concordance(values + 100.0 * strata, positive, strata, seeds)[0], wins)
    # a resample with multiplicities is the table with repeated runs
    counts = np.array([2, 0, 1, 1, 3, 0, 0])
    repeated = np.repeat(np.arange(80), counts[seeds])
    again = warnings.concordance(values[repeated], positive[repeated], strata[repeated], seeds[repeated])
    assert counts @ wins @ counts == pytest.approx(again[0].sum())
    assert counts @ pairs @ counts == again[1].sum()
    values[positive] = math.nan
    assert warnings.concordance(values, positive, strata, seeds)[1].sum() == 0


def noisy(rng, level=0.0):
    return (level + rng.normal(size=5)).tolist()


def test_what_eta_knows_is_no_warning_at_equal_eta():
    """Cosine and falls both grow with η and share nothing else: an AUC above ½ across η, ½ within it."""
    rng = np.random.default_rng(0)

    def run(name, s, rate, seed):
        falls = rng.random() < (0.2 if rate == RATES[0] else 0.8)
        return ("fall" if falls else "success"), 700.0, {"grad/cosine_prev": noisy(rng, 3 * (rate == RATES[1]))}

    (record,) = analyze(run, seeds=range(60))["cases"]
    assert side(record["fall"]["staleness"]["cosine"]) == 1 and record["fall"]["staleness"]["eta"]["auc"] > 0.7
    assert side(record["fall"]["cell"]["cosine"]) == 0 and side(record["lag"]["cosine"]) == 0
    assert record["fall"]["cell"]["eta"]["auc"] == 0.5
    page = warnings.page({**analyze(run), "cases": [record]})
    assert "It is larger before a fall only where η is larger too" in page


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_warning_is_found_with_its_sign_before_the_fall_alone(sign):
    """The cosine of the second window is ±4 in runs that fall at 400; in the third they have fallen and count no more."""

    def run(name, s, rate, seed):
        rng = np.random.default_rng([s, seed, int(1e4 * rate), 2])
        falls = seed % 2 == 0
        values = np.array(noisy(rng))
        values[1] += 4 * sign * falls
        values[2:] -= 50 * sign * falls  # after the fall, never to be looked at
        return ("fall" if falls else "success"), 400.0, {"grad/cosine_prev": values.tolist()}

    summary = analyze(run)
    (record,) = summary["cases"]
    first, second, third, _ = record["windows"]
    assert side(first["cosine"]) == 0 and side(second["cosine"]) == sign and abs(second["cosine"]["auc"] - 0.5) > 0.45
    assert third["cosine"]["auc"] is None
    assert record["next_window"]["cosine"]["auc"] == second["cosine"]["auc"]
    assert side(record["fall"]["cell"]["cosine"]) == sign and side(record["lag"]["cosine"]) == 0
    assert side(record["fall"]["cell"]["below_twin"]) == -sign and side(record["next_window_cell"]["cosine"]) == sign
    page = warnings.page(summary)
    assert "The cosine marks falls and not lag" in page
    expected = "also among runs of the same η" if sign > 0 else "Over all windows, a larger cosine does not go before a fall."
    assert expected in page


def test_lag_is_told_from_falls():
    """Cosine and twin both rise by 4 with lag, whatever becomes of the run."""

    def run(name, s, rate, seed):
        rng = np.random.default_rng([s, seed, int(1e4 * rate)])
        lifted = {key: noisy(rng, 4 * (s > 0)) for key in ("grad/cosine_prev", "grad/cosine_twin")}
        return ("fall" if rng.random() < 0.4 else "success"), 600.0, lifted

    summary = analyze(run, seeds=range(30))
    (record,) = summary["cases"]
    assert record["lag"]["cosine"]["auc"] > 0.95 and side(record["fall"]["cell"]["cosine"]) == 0
    assert side(record["lag"]["below_twin"]) == 0 and record["lag"]["staleness"]["auc"] == 1
    page = warnings.page(summary)
    assert "marks lag, not collapse: with lag it is higher" in page and "what is left does not" in page


def test_who_falls_who_is_sound_and_who_is_left_out():
    fates = {0: ("success", math.inf), 1: ("fall", 600.0), 2: ("frozen", 600.0), 3: ("never learned", math.inf)}
    (record,) = analyze(lambda name, s, rate, seed: (*fates[seed % 4], {}), seeds=range(8), staleness=(4,))["cases"]
    assert [record[f"num_{kind}"] for kind in ("runs", "falls", "sound", "left_out")] == [16, 4, 8, 4]
    # at each of 3 windows, in each of 2 rates: 2 falls against 4 sound runs
    assert record["fall"]["cell"]["cosine"]["num_pairs"] == 3 * 2 * 2 * 4
    assert record["any_failure"]["cosine"]["num_pairs"] == 3 * 8 * 8  # both rates together
    assert record["lag"]["cosine"] == {"auc": None, "interval": None, "num_pairs": 0}
    assert "There are no runs to compare lag with." in warnings.page({**SHOWN, "cases": [record]})


SHOWN = dict(labels={name: label for name, (label, _) in warnings.INDICATORS.items()}, source="collapse", confidence=0.9)
SHOWN |= dict(num_bootstrap=200, min_staleness=4, late_from=0.75)


def test_gamma_is_that_of_each_run_and_late_falls_alone_are_compared():
    """Sound runs drift with γ = 1, late falls with 2; early falls with 0 must not matter."""

    def run(name, s, rate, seed):
        gamma = (1.0, 2.0, 0.0)[seed % 3] + 0.001 * seed
        fate = (("success", math.inf), ("fall", 680.0), ("fall", 200.0))[seed % 3]
        return *fate, {"msd": {lag: 0.1 * lag**gamma for lag in (1, 2, 4, 8)}}

    summary = analyze(run, seeds=range(12))
    gamma = summary["cases"][0]["gamma"]
    assert gamma["num_late"] == 2 * 2 * 4 and gamma["num_without"] == 0
    assert gamma["staleness"]["auc"] == gamma["cell"]["auc"] == 1
    assert [(entry["sound"], entry["late"]) for entry in gamma["medians"]] == [pytest.approx((1.0045, 2.0055))] * 2
    page = warnings.page(summary)
    assert "It tells falls apart." in page and "not ballistic throughout" in page

    def flat(name, s, rate, seed):
        return ("fall" if seed % 2 else "success"), 700.0, {"msd": dict.fromkeys((1, 2, 4, 8), 0.0)}

    gamma = analyze(flat)["cases"][0]["gamma"]
    assert gamma["staleness"]["auc"] is None and gamma["num_without"] == 2 * 2 * 16


def test_losses_that_agree_without_lag_are_said_to():
    def run(name, s, rate, seed):
        return ("success" if s == 0 or name == "a" else "fall"), 600.0, {}

    both = analyze(run, algorithms=("a", "b"))
    assert both["cases"][0]["same_without_lag"] and "all losses follow the same runs" in warnings.page(both)
    one = analyze(lambda name, s, rate, seed: ("success", math.inf, {}))
    page = warnings.page(one)
    assert not one["cases"][0]["same_without_lag"] and "all losses follow" not in page
    assert "there is nothing to announce" in page and "of falls at equal η nothing can be said" in page


def test_figures_and_the_side_of_the_windows(tmp_path):
    def run(name, s, rate, seed):
        rng = np.random.default_rng([s, seed])
        falls = seed % 2 == 0
        values = np.array(noisy(rng))
        values[0] += 5 * falls
        values[1] -= 5 * falls
        return ("fall" if falls else "success"), 700.0, {"grad/cosine_prev": values.tolist()}

    summary = analyze(run)
    assert "changes sides along the run: lower before a fall at update 320" in warnings.page(summary)
    paths = warnings.figures([], summary, tmp_path)
    assert [path.name for path in paths][::2] == ["warnings_auc_adam.png", "warnings_cosine_adam.png"]
    aucs, cosines = (path.read_text() for path in paths[1::2])
    assert aucs.count("the same within a stratum") == 5  # η and S, where the question fixes them
    assert all(words in aucs for words in ("case adam", "other indicators")) and "case adam" in cosines


def test_first_window_means_are_of_the_runs_they_name():
    def run(name, s, rate, seed):
        falls = seed >= 12
        return ("fall" if falls else "success"), 600.0, {"grad/cosine_prev": [float(s + falls), 9, 9, 9, 9]}

    rows = sweep_rows(run, staleness=(0, 4), rates=RATES, seeds=tuple(range(16)))
    found = warnings._means(run_table(rows, "adam", CollapseRule()))
    assert [(e["max_staleness"], e["num_sound"], e["num_falls"], e["cosine_sound"], e["cosine_falls"]) for e in found] == [
        (s, 12, 4, float(s), float(s + 1)) for s in (0, 0, 4, 4)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shown=()), "config.shown is not a key"),
        (dict(cases=()), "config.cases is ()"),
        (dict(rule=dict(keep=0.0)), "config.rule: keep=0"),
        (dict(min_staleness=0), "config.min_staleness is 0"),
        (dict(late_from=1.5), "config.late_from is 1.5"),
        (dict(confidence=0), "config.confidence is 0"),
        (dict(num_bootstrap=1), "config.num_bootstrap is 1"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        warnings.validate(config(**change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_source_is_named():
    with pytest.raises(ValueError, match="config.source is 'other'"):
        warnings.summary([], config(source="other"), {"collapse": []})
