"""Planted exponents, falls and controls come out of the study of collapse; its page counts instead of presuming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from configs import study_collapse as study_config
from jax_async_grpo.scaling import stable_learning_rate
from jax_async_grpo.studies import collapse, collapse_page
from jax_async_grpo.studies import collapse_statistics as statistics

RATES = 1e-3 * 2.0 ** np.arange(8)
STEPS = list(range(10, 201, 10))
START, CURVES = 0.3, {"success": (0.9, 0.9), "fall": (0.6, 0.05), "frozen": (0.5, 0.4), "never learned": (0.3, 0.35)}


def planted_outcomes(staleness, exponent, num_seeds, *, half=0.0, noise=0.3, seed_noise=0.0, seed=0):
    """[m, n, seeds]: success where ln η lies below a logistic threshold around ln(0.04·(S+half)^exponent)."""
    rng = np.random.default_rng(seed)
    middle = math.log(0.04) + exponent * np.log(np.asarray(staleness) + half)[:, None, None]
    common = seed_noise * rng.normal(size=num_seeds)
    own = noise * rng.logistic(size=(len(staleness), len(RATES), num_seeds))
    return (np.log(RATES)[None, :, None] < middle + common + own).astype(float)


def exponents(outcomes, staleness, **changes):
    options = dict(is_found=[True] * len(staleness), num_bootstrap=100, confidence=0.9) | changes
    found = statistics.staleness_exponents(RATES, outcomes, staleness, **options)
    return {(fit["method"], fit["variable"], fit["level"]): fit for fit in found}


def test_boundaries_of_many_curves_are_those_of_the_law_fitted_one_by_one():
    staleness = (1, 2, 4, 8, 16, 32)
    outcomes = np.concatenate([planted_outcomes(staleness, -0.5, 12, seed=seed) for seed in range(4)])
    outcomes = np.concatenate([outcomes, np.zeros((1, 8, 12)), np.ones((1, 8, 12))])  # none, censored
    found = np.exp(statistics.log_boundaries(np.log(RATES), outcomes.mean(axis=2), 12))
    for curve, mine in zip(outcomes, found, strict=True):
        boundary = stable_learning_rate(RATES, curve)
        expected = [np.nan if rate is None else rate for rate in boundary.learning_rates]
        np.testing.assert_allclose(mine, expected, rtol=1e-5)
    assert np.isnan(found[-2:]).all() and np.isfinite(found[:-2]).mean() > 0.9


@pytest.mark.parametrize(("variable", "half", "other"), [("S", 0.0, "S+1/2"), ("S+1/2", 0.5, "S")])
def test_a_planted_exponent_is_found_in_its_own_variable(variable, half, other):
    """Small S tell ln S from ln(S+½); all estimates agree, since the planted width is the same everywhere."""
    staleness = (1, 2, 4)
    found = exponents(planted_outcomes(staleness, -0.8, 2000, half=half), staleness)
    for method, level in (("boundaries", 0.8), ("boundaries", 0.5), ("regression", None)):
        fit = found[method, variable, level]
        assert fit["exponent"] == pytest.approx(-0.8, abs=0.06), (method, level)
        assert fit["interval"][0] < fit["exponent"] < fit["interval"][1] and fit["num_dropped"] == 0
        assert abs(found[method, other, level]["exponent"] + 0.8) > 0.08


def test_whole_seeds_are_resampled():
    """Where a seed shifts every boundary alike the exponent is the same in each: only unpaired seeds would blur it."""
    staleness = (4, 8, 16, 32)
    paired = planted_outcomes(staleness, -0.5, 20, noise=0.02, seed_noise=0.8)
    rng = np.random.default_rng(1)
    unpaired = np.stack([curve[:, rng.permutation(20)] for curve in paired])
    widths = [np.ptp(exponents(outcomes, staleness)["regression", "S", None]["interval"]) for outcomes in (paired, unpaired)]
    assert widths[0] < 0.5 * widths[1]


def test_what_the_runs_do_not_say_is_no_number():
    staleness = (4, 8)
    outcomes = planted_outcomes(staleness, -0.5, 10)
    one = exponents(outcomes, staleness, is_found=[True, False])
    first = one["boundaries", "S", 0.8]
    assert first["exponent"] is None and first["interval"] is None and first["staleness"] == [4]
    assert one["regression", "S", None]["exponent"] is not None
    censored = exponents(np.ones_like(outcomes), staleness)
    assert {fit["exponent"] for fit in censored.values()} == {None}
    edge = outcomes.copy()
    edge[1] = 1.0
    edge[1, -1, :5] = 0.0  # half of the seeds fall, at the largest η only: most resamples have no boundary at half
    fit = exponents(edge, staleness)["boundaries", "S", 0.5]
    assert fit["num_dropped"] > 10 and fit["interval"] is None


def test_the_stratified_test_is_fishers_for_one_stratum_and_the_sum_over_all_splits_for_more():
    for first, second in ((0, 0), (3, 9), (10, 2), (1, 0)):
        expected = stats.fisher_exact([[first, 12 - first], [second, 15 - second]]).pvalue
        mine = statistics.stratified_test(np.array([[first, second]]), np.array([[12, 15]]))
        assert mine == pytest.approx(expected, rel=1e-9)
    falls, trials = np.array([[0, 2], [1, 3]]), np.array([[3, 2], [2, 4]])
    splits = [
        [sum(place < m for place in chosen) for chosen in itertools.combinations(range(m + n), fallen)]
        for (m, n), fallen in zip(trials, falls.sum(axis=1), strict=True)
    ]
    sums = [sum(split) for split in itertools.product(*splits)]
    law = np.bincount(sums) / len(sums)
    expected = law[law <= law[1] * (1 + 1e-9)].sum()
    assert 0 < expected < 1 and statistics.stratified_test(falls, trials) == pytest.approx(expected)


def test_strata_that_differ_make_no_difference_of_the_losses():
    """Simpson: more runs of one loss in the cell where all fall. Pooled counts would call the losses different."""
    falls, trials = np.array([[18, 9], [1, 2]]), np.array([[20, 10], [10, 20]])
    pooled = stats.fisher_exact([[19, 11], [11, 19]]).pvalue
    assert pooled < 0.1 and statistics.stratified_test(falls, trials) == pytest.approx(1.0)


def test_flipping_seeds_is_the_exact_permutation_test():
    for differences in ([3, 1, 0, -2, 4], [1, 1, 1, 1, 1, 1], [0, 0], [-5, 2, 2, 1]):
        mine = statistics.seed_flip_test(differences)
        if not any(differences):
            assert mine == 1.0
            continue
        expected = stats.permutation_test(
            (np.array(differences),), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        ).pvalue
        assert mine == pytest.approx(expected)


def test_seeds_that_fall_everywhere_are_one_piece_of_evidence():
    """Two of twelve seeds fall in all twenty cells under one loss: forty falls, yet two coin flips."""
    first = np.zeros((20, 12), bool)
    first[:, :2] = True
    found = statistics.compare_falls(first, np.zeros((20, 12), bool))
    assert found["falls"] == [40, 0] and found["num_runs"] == 240
    assert found["p_fisher"] < 1e-9 and found["p_stratified"] < 1e-9 and found["p_seeds"] == 0.5
    assert statistics.compare_falls([], [])["p_seeds"] is None


def test_intervals_of_shares_are_clopper_and_pearsons():
    low, high = statistics.proportion_interval(0, 10, 0.9)
    assert low == 0 and high == pytest.approx(1 - 0.05**0.1)
    low, high = statistics.proportion_interval(7, 10, 0.9)
    assert (low, high) == pytest.approx((stats.beta.ppf(0.05, 7, 4), stats.beta.ppf(0.95, 8, 3)))


def planted_config():
    config = study_config.get_config().to_dict()
    cases = config["sweep"]["cases"]
    small = dict(learning_rates=tuple(RATES.tolist()), num_seeds=10)
    cases["adam"] |= small | dict(algorithms=("no_is", "clip", "dual_clip"), max_staleness=(0, 4, 16))
    cases["adam_control"] |= small | dict(algorithms=("no_is_drift", "clip_drift"), max_staleness=(4, 16))
    del cases["sgd"]
    return config | dict(num_bootstrap=100)


def planted_rows(config, fate):
    """Records in which a run of (algorithm, S, η, seed) has the fate and the end reward that `fate` says."""
    rows = []
    for name, case in config["sweep"]["cases"].items():
        start = dict(reward=START, gold_reward=START, ceiling=1.0, gold_ceiling=1.0, policy="p", task="t", optimizer="adam")
        rows.append({"kind": "start", "case": name, "num_parameters": 1, **start})
        for algorithm, lag, rate in itertools.product(case["algorithms"], case["max_staleness"], case["learning_rates"]):
            rewards = []
            for seed in range(case["num_seeds"]):
                kind, *end = fate(algorithm, lag, rate, seed)
                middle, last = CURVES[kind]
                rewards.append(np.interp(STEPS, [0, 60, 120], [START, middle, end[0] if end else last]).tolist())
            labels = dict(case=name, algorithm=algorithm, schedule="fixed", max_staleness=lag, learning_rate=rate)
            rows.append({"kind": "cell", **labels, "steps": STEPS, "reward": rewards, "seeds": list(range(len(rewards)))})
    return rows


LIMITS = 0.016 * np.exp(0.4 * stats.norm.ppf((np.arange(10) + 0.5) / 10))  # a threshold for every seed


def fate(algorithm, lag, rate, seed, *, exponent=-0.5):
    """clip falls where dual clip freezes; the drift limit saves no_is at equal reward and ruins clip."""
    limit = LIMITS[seed] * (max(lag, 1) ** exponent if algorithm.startswith("no_is") else 1.0)
    if algorithm == "no_is_drift":
        return ("success", 0.905) if rate < 4 * limit else ("frozen",)
    if algorithm == "clip_drift":
        return ("success", 0.7) if rate < limit / 4 else ("fall",)
    return ("success",) if rate < limit else ("frozen",) if algorithm == "dual_clip" else ("fall",)


@pytest.fixture(scope="module")
def planted():
    config = planted_config()
    collapse.validate(config)
    rows = planted_rows(config, fate)
    return config, rows, collapse.summary(rows, config, {})


def comparison(result, second):
    return next(found for found in result["comparisons"] if found["second"] == second)


def test_planted_boundaries_and_exponents(planted):
    config, _, result = planted
    losses = {loss["algorithm"]: loss for loss in result["losses"]}
    assert set(losses) == {"no_is", "clip", "dual_clip", "no_is_drift", "clip_drift"}
    cell = losses["no_is"]["cells"][1]
    counts = [int((rate < LIMITS * 0.5).sum()) for rate in RATES]
    assert cell["max_staleness"] == 4 and cell["success"] == counts
    assert cell["fall"] == cell["drawdown"] == [10 - count for count in counts]
    assert losses["dual_clip"]["cells"][0]["fall"] == [0] * 8
    # frozen at 0.4 after a peak of 0.5: just on the second rule's edge of 0.3 + 0.5·0.2, which counts as kept
    assert losses["dual_clip"]["cells"][0]["drawdown"] == [0] * 8
    fits = losses["no_is"]["exponents"]
    assert all(fit["exponent"] == pytest.approx(-0.5, abs=0.06) for fit in fits)
    assert all(abs(fit["exponent"]) < 1e-6 for fit in losses["clip"]["exponents"])
    assert [check["holds"] for check in result["checks"]] == [True, True]
    page = collapse.page(result)
    assert "η_max of no_is falls with S" in page and "**fails**" not in page
    assert "every interval lies below 0: `no_is` (adam)" in page and "−1 lies within an interval of none of them" in page
    assert "| (adam: no_is) | 0 | 10 |" in page  # beside the controlled loss, which has no S = 0 of its own


def test_falls_are_told_from_failures(planted):
    _, _, result = planted
    pair = comparison(result, "dual_clip")
    clip_falls = sum(int((rate >= LIMITS).sum()) for rate in RATES)
    assert pair["lagged"]["fall"]["falls"] == [2 * clip_falls, 0]  # S = 4 and 16; S = 0 stands apart
    assert [part["max_staleness"] for part in pair["by_staleness"]] == [0, 4, 16]
    assert pair["lagged"]["fall"]["p_seeds"] == pytest.approx(2**-9) and pair["lagged"]["failure"]["p_seeds"] == 1.0
    page = collapse.page(result)
    assert f"fell, first rule: fewer under `dual_clip` ({2 * clip_falls} against 0" in page
    assert f"any failure: no difference shown ({2 * clip_falls} against {2 * clip_falls}" in page


def test_controls_are_compared_with_the_loss_alone_whoever_wins(planted):
    config, _, result = planted
    assert collapse.control_pairs(config["sweep"]) == [
        ("no_is", "no_is_drift", "adam", "adam_control"),
        ("clip", "clip_drift", "adam", "adam_control"),
    ]
    drift, clip = comparison(result, "no_is_drift"), comparison(result, "clip_drift")
    both = sum((rate < 4 * LIMITS * lag**-0.5).any() and (rate < LIMITS * lag**-0.5).any() for rate in RATES for lag in (4, 16))
    assert drift["equal_reward"]["fall"]["num_cells"] == both > 0
    assert clip["equal_reward"]["fall"]["num_cells"] == 0 and clip["lagged"]["fall"]["falls"][1] > 0
    assert drift["best"][0]["difference"] == pytest.approx(0.005) and clip["best"][0]["difference"] == pytest.approx(-0.2)
    page = collapse.page(result)
    assert "All cells: `no_is` against `no_is_drift`: fell, first rule: fewer under `no_is_drift`" in page
    assert "All cells: `clip` against `clip_drift`: fell, first rule: fewer under `clip` (" in page
    assert "The 0 of 16 cells of equal reward: No cell to compare." in page
    # ten falls of five seeds: not enough for whole seeds, where independent runs would have sufficed
    found = drift["equal_reward"]["fall"]
    assert found["falls"] == [10, 0] and found["p_fisher"] < 0.01 and found["p_seeds"] == 2**-4
    assert (
        f"The {both} of 16 cells of equal reward: `no_is` against `no_is_drift`: fell, first rule: no difference shown" in page
    )
    assert "`clip_drift` against `clip`: better by more than 0.02 at 0, worse at 2 and equal at 0 of 2 S." in page


def test_a_boundary_that_rises_fails_and_a_missing_control_is_said(planted):
    config = planted_config()
    cases = config["sweep"]["cases"]
    cases["adam"] |= dict(algorithms=("no_is",), max_staleness=(4, 16))
    del cases["adam_control"]
    rows = planted_rows(config, lambda *run: fate(*run, exponent=0.3))
    result = collapse.summary(rows, config, {})
    assert [check["holds"] for check in result["checks"]] == [False, False]
    assert "lacking: adam/no_is" in collapse.page(result) and "**fails**" in collapse.page(result)
    rows = planted_rows(config, lambda *run: ("success",))
    assert [check["holds"] for check in collapse.summary(rows, config, {})["checks"]] == [None, False]


def test_figures_are_drawn_of_what_is_recorded_so_far(planted, tmp_path):
    config, rows, _ = planted
    part = [row for row in rows if row["kind"] == "start" or (row["algorithm"] == "no_is" and row["learning_rate"] < 0.01)]
    result = collapse.summary(part, config, {})
    assert "censored" in collapse.page(result)
    names = {path.name for path in collapse.figures(part, result, tmp_path)}
    assert names == {f"collapse_{name}.{kind}" for name in ("boundary", "success", "outcomes") for kind in ("png", "svg")}


def test_a_boundary_that_is_none_is_drawn_at_the_bottom_and_a_censored_one_at_the_largest_rate(planted):
    config, rows, _ = planted
    for outcome, status, mark in (("never learned", "none", "x"), ("success", "censored", "$\\uparrow$")):
        result = collapse.summary(planted_rows(config, lambda *run, outcome=outcome: (outcome,)), config, {})
        cells = [cell for loss in result["losses"] for cell in loss["cells"]]
        assert {cell["status"] for cell in cells} == {status}
        ax = collapse_page._boundary_figure(result).axes[0]
        marks = [line for line in ax.lines if line.get_marker() == mark]
        rates = [cell["learning_rates"][-1] for cell in cells]
        heights = {float(line.get_ydata()[0]) for line in marks}
        assert marks and (heights == {0.04} if status == "none" else heights <= set(rates))
        assert all((line.get_transform() == ax.get_xaxis_transform()) == (status == "none") for line in marks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=1), "config.seeds is not a key"),
        (dict(num_bootstrap=10), "config.num_bootstrap is 10"),
        (dict(exponent_min_staleness=0), "config.exponent_min_staleness is 0"),
        (dict(fisher_pair=("clip", "clip")), "config.fisher_pair is ('clip', 'clip')"),
        (dict(fisher_pair=("clip", "gspo")), "config.fisher_pair is ('clip', 'gspo')"),
        (dict(sweep=None), "config.sweep is None"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        collapse.validate(study_config.get_config().to_dict() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_schedules_in_a_case_are_refused():
    config = study_config.get_config().to_dict()
    config["sweep"]["cases"]["sgd"]["schedules"] = ("fixed", "periodic")
    with pytest.raises(ValueError, match="config.sweep.cases.sgd.schedules"):
        collapse.validate(config)
