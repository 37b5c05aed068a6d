"""Planted boundaries are found with intervals that cover at their rate; separated data cover their gap; else a word."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import special

from jax_async_grpo import scaling

RATES = np.geomspace(1e-3, 0.1, 8)


def planted(slope: float, middle: float, level: float) -> float:
    return middle * math.exp(-special.logit(level) / slope)


def test_expected_counts_give_the_planted_boundary():
    slope, middle = 3.0, 0.012
    counts = np.round(1e6 * special.expit(-slope * np.log(RATES / middle)))
    found = scaling.stable_learning_rate(RATES, counts, np.full(8, 1e6), levels=(0.8, 0.5, 0.2))
    assert found.status == "found" and not found.separated
    for level, eta in zip(found.levels, found.learning_rates, strict=True):
        assert eta == pytest.approx(planted(slope, middle, level), rel=1e-3)
    assert found.width == pytest.approx(math.log(found.at(0.2) / found.eta_80), rel=1e-9)
    assert found.width == pytest.approx(2 * math.log(4) / slope, rel=1e-3)
    assert found.eta_50 == found.at(0.5)
    for (low, high), eta in zip(found.intervals, found.learning_rates, strict=True):
        assert low < eta < high < low * 1.01


def test_the_estimate_maximizes_the_penalized_likelihood():
    """Against a dense scan of log-likelihood + half the log-determinant of the information."""
    counts, trials = np.array([20, 19, 15, 6, 2, 0]), np.full(6, 20)
    z = np.log(RATES[:6])
    found = scaling.stable_learning_rate(RATES[:6], counts, trials)
    slope, middle = 2 * math.log(4) / found.width, math.log(found.eta_50)

    def penalized(k, m):
        logits = -k[..., None] * (z - m[..., None])
        likelihood = special.log_expit(logits) @ counts + special.log_expit(-logits) @ (trials - counts)
        w = trials * special.expit(logits) * special.expit(-logits)
        return likelihood + np.log(w.sum(-1) * (w @ z**2) - (w @ z) ** 2) / 2

    scan = penalized(*np.meshgrid(slope * np.linspace(0.8, 1.25, 151), middle + np.linspace(-0.3, 0.3, 151)))
    best = float(penalized(np.array(slope), np.array(middle)))
    assert scan.max() <= best + 1e-9 and scan.max() >= best - 1e-3


def test_the_interval_is_the_likelihood_ratio_s():
    counts, trials = np.array([20, 19, 15, 6, 2, 0]), np.full(6, 20)
    z = np.log(RATES[:6])
    slopes = np.geomspace(0.5, 20, 1500)

    def profile(place):
        logits = special.logit(0.8) - slopes[:, None] * (z - place)
        return (special.log_expit(logits) @ counts + special.log_expit(-logits) @ (trials - counts)).max()

    low, high = scaling.stable_learning_rate(RATES[:6], counts, trials, confidence=0.9).intervals[0]
    highest = max(profile(place) for place in np.linspace(math.log(low), math.log(high), 400))
    for edge in (low, high):
        assert 2 * (highest - profile(math.log(edge))) == pytest.approx(1.6448536**2, abs=0.02)
    wider = scaling.stable_learning_rate(RATES[:6], counts, trials, confidence=0.99).intervals[0]
    assert wider[0] < low and high < wider[1]


def test_intervals_cover_at_their_rate():
    rng = np.random.default_rng(0)
    slope, middle = 2.77, 0.013
    covered = 0
    for _ in range(200):
        counts = rng.binomial(20, special.expit(-slope * np.log(RATES / middle)))
        found = scaling.stable_learning_rate(RATES, counts, np.full(8, 20), levels=(0.8,), confidence=0.9)
        low, high = found.intervals[0]
        covered += low <= planted(slope, middle, 0.8) <= high
        assert low <= found.eta_80 <= high
    assert 0.84 <= covered / 200 <= 0.96


def test_shared_seeds_widen_the_interval_of_single_runs():
    """Every seed has one threshold: single runs know, counts don't and cover too rarely."""
    rng = np.random.default_rng(1)
    slope, middle = 2.77, 0.013
    covered = np.zeros(2)
    for _ in range(60):
        thresholds = math.log(middle) + rng.logistic(size=20) / slope
        runs = (np.log(RATES)[:, None] < thresholds).astype(int)
        for i, arguments in enumerate([(runs,), (runs.sum(axis=1), np.full(8, 20))]):
            found = scaling.stable_learning_rate(RATES, *arguments, levels=(0.5,))
            low, high = found.intervals[0]
            covered[i] += low <= middle <= high
    assert covered[0] / 60 >= 0.8 and covered[1] < covered[0]


@pytest.mark.parametrize("trials", [3, 20])
def test_separated_runs_leave_the_gap(trials):
    found = scaling.stable_learning_rate([1e-3, 1e-2, 3e-2, 0.1], [trials, trials, 0, 0], [trials] * 4)
    assert found.status == "found" and found.separated
    for eta, (low, high) in zip(found.learning_rates, found.intervals, strict=True):
        assert low <= 1e-2 < eta < 3e-2 <= high
    assert 0 < found.eta_80 < found.eta_50 and math.isfinite(found.width)
    few, many = (scaling.stable_learning_rate([1e-2, 3e-2], [n, 0], [n, n]).intervals[0] for n in (3, 100))
    assert few[0] < many[0] and few[1] >= many[1]


def test_only_the_upper_side_is_fitted_from_the_smallest_of_equal_bests():
    upper = scaling.stable_learning_rate(RATES[2:], [20, 20, 15, 8, 2, 0], [20] * 6)
    with_low_side = scaling.stable_learning_rate(RATES, [0, 8, 20, 20, 15, 8, 2, 0], [20] * 8)
    assert with_low_side.learning_rates == pytest.approx(upper.learning_rates, rel=1e-6)
    dip = scaling.stable_learning_rate(RATES[2:], [20, 11, 20, 8, 2, 0], [20] * 6)
    smooth = scaling.stable_learning_rate(RATES[4:], [20, 8, 2, 0], [20] * 4)
    assert dip.width > 1.3 * smooth.width  # the dip between two equal bests is seen


def test_a_boundary_below_the_rate_of_highest_success_is_no_boundary():
    """Runs that have not learned yet lie there: the fit would put η_80 among them."""
    found = scaling.stable_learning_rate(RATES, [0, 14, 16, 10, 4, 2, 0, 2], np.full(8, 20))
    assert found.status == "ill-defined" and found.eta_80 is None and "below the rate of highest success" in found.reason
    assert found.estimate[0] < RATES[2]


def test_order_and_units_do_not_matter():
    counts = np.array([20, 20, 19, 17, 9, 4, 1, 0])
    one = scaling.stable_learning_rate(RATES, counts, np.full(8, 20))
    other = scaling.stable_learning_rate(1e-4 * RATES[::-1], counts[::-1], np.full(8, 20))
    np.testing.assert_allclose(other.learning_rates, 1e-4 * np.array(one.learning_rates), rtol=1e-6)
    np.testing.assert_allclose(other.intervals, 1e-4 * np.array(one.intervals), rtol=1e-4)
    assert other.shares == one.shares


@pytest.mark.parametrize(
    "successes, status, reason",
    [
        ([0] * 8, "none", "highest share of success is 0.00, below 0.8"),
        ([0, 0, 10, 15, 10, 3, 0, 0], "none", "0.75, below 0.8"),
        ([20] * 8, "censored", "the largest rate tried, 0.1, still succeeds in 100%"),
        ([0, 0, 10, 18, 19, 20, 19, 16], "censored", "succeeds in 80%"),
        ([20, 5, 2, 1, 0, 0, 0, 18], "censored", "90%"),
        ([20, 20, 4, 17, 2, 18, 0, 0], "ill-defined", "2 rates past the first share below 0.5 are back at 0.8"),
        ([20, 20, 4, 17, 2, 18, 20, 20], "ill-defined", "4 rates"),
        ([17, 16, 15, 14, 13, 12, 11, 10], "ill-defined", r"ln\(eta_20/eta_80\)=.* is above 2.48"),
    ],
)
def test_a_word_instead_of_a_number(successes, status, reason):
    found = scaling.stable_learning_rate(RATES, successes, [20] * 8)
    assert found.status == status
    assert found.learning_rates == found.intervals == (None, None) and found.width is None
    assert found.eta_80 is None and found.eta_50 is None
    assert re.search(reason, found.reason)
    assert (found.estimate is None) == (status != "ill-defined")


def test_width_levels_and_a_level_beyond_the_rates():
    counts = [20, 20, 20, 19, 18, 16, 14, 13]
    narrow = scaling.stable_learning_rate(RATES, counts, [20] * 8, max_width=0.5)
    assert narrow.status == "ill-defined"
    wide = scaling.stable_learning_rate(RATES, counts, [20] * 8, max_width=9)
    assert wide.status == "found" and wide.eta_50 is None and wide.intervals[1] is None and "0.5" in wide.reason
    assert wide.estimate is None
    with pytest.raises(ValueError, match=r"level=0.3 was not fitted; levels=\(0.8, 0.5\)"):
        wide.at(0.3)
    assert scaling.stable_learning_rate(RATES, counts, [20] * 8, levels=(0.6,)).status == "censored"


def test_no_number_for_any_outcome_of_two_runs_at_three_rates_that_is_not_found():
    for counts in itertools.product(range(3), repeat=3):
        found = scaling.stable_learning_rate([1e-3, 1e-2, 1e-1], counts, [2, 2, 2])
        if found.status != "found":
            assert found.learning_rates == (None, None) and found.width is None
        else:
            assert 1e-4 < found.eta_80 <= 0.1 and max(counts) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], [], []), r"learning_rates has shape \(0,\)"),
        (([1, 2], [1], [1, 1]), r"successes has shape \(1,\); with trials it must be \[n\], n=2"),
        (([1, 2], [1, 1]), r"successes has shape \(2,\); without trials it must be \[n, seeds\]"),
        (([1, 1], [1, 0], [1, 1]), "a rate twice"),
        (([0, 1], [1, 0], [1, 1]), "learning_rates holds 0"),
        (([np.nan, 1], [1, 0], [1, 1]), "learning_rates holds nan"),
        (([1, 2], [3, 0], [2, 2]), "successes must be integers from 0 to trials"),
        (([1, 2], [np.nan, 0], [2, 2]), "successes must be integers"),
        (([1, 2], [[1, 2], [0, 0]]), "successes must be integers from 0 to 1"),
        (([1, 2], [0, 0], [0, 2]), "trials=.* must be integers >= 1"),
        (([1, 2], [0, 0], [2]), r"trials has shape \(1,\)"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        scaling.stable_learning_rate(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"levels": (80,)}, "levels=80 must lie in"),
        ({"levels": ()}, "at least one"),
        ({"confidence": 1}, "confidence=1"),
        ({"max_width": 0}, "max_width=0"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        scaling.stable_learning_rate([1, 2], [1, 0], [1, 1], **options)
