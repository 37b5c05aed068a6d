"""Many measurements of the staleness bias say together what each of them cannot, and never more than they know."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy import stats

from jax_async_grpo import estimation, training
from jax_async_grpo.training import page, pooled_bias

NUM_BLOCKS = 8
summary_module = sys.modules["jax_async_grpo.training.summary"]  # the package shows the function of that name


def measurement(rng: np.random.Generator, bias: np.ndarray, fresh: np.ndarray, noise: float, step: int = 4):
    """(row of the records, the estimate) of planted vectors seen through noise in every block."""
    blocks = np.stack([bias, fresh])[:, None] + noise * rng.standard_normal((2, NUM_BLOCKS, len(bias)))
    found = estimation.from_gram(np.einsum("ajd,bkd->abjk", blocks, blocks))
    row = {"kind": "bias", "step": step, "staleness": 4, "detected": int(found.detected), "method": "sampled"}
    return row | {"ess_ratio": 0.5, "fresh_norm_squared": found.fresh_norm_squared, **found.metrics()}, found


def empty(step: int = 9, **changes):
    """A row of a batch in which at most one block has a gradient."""
    names = ("bias/norm", "bias/norm_squared", "bias/standard_error", "fresh_norm_squared", "detected")
    row = {"kind": "bias", "step": step, "staleness": 4, "method": "reweighted", "ess_ratio": 1.0, **dict.fromkeys(names, 0)}
    nan = {"bias/relative_norm": math.nan, "bias/cosine": math.nan}
    return row | nan | {"bias/detection_limit": 0.7} | changes


@pytest.fixture(scope="module")
def planted():
    """300 measurements of a bias far below their detection limit, two thirds as large as the gradient; ‖δ‖² = 0.04."""
    rng = np.random.default_rng(0)
    bias, fresh = np.zeros((2, 20))
    bias[0], fresh[1] = 0.2, 0.3
    made = [measurement(rng, bias, fresh, noise=0.3, step=t) for t in range(300)]
    return [row for row, _ in made], [estimate for _, estimate in made]


def test_together_they_find_what_each_of_them_does_not(planted):
    rows, _ = planted
    found = pooled_bias.pooled_bias(rows)
    assert found["pooled"] == found["measured"] == 300 and found["detected"] < 100
    assert found["detection_limit_median"] > 1.3 * 0.2
    for name, truth in (("norm_squared", 0.04), ("fresh_norm_squared", 0.09)):
        low, high = found[name]["interval"]
        assert 0 < low < truth < high and found[name]["standard_error"] < 0.15 * truth
    low, high = found["relative_norm_squared"]["interval"]
    assert low < 4 / 9 < high < 0.65
    # The mean of what came out positive, or was detected, is another number.
    positive = [row["bias/norm_squared"] for row in rows if row["bias/norm_squared"] > 0]
    assert np.mean(positive) > 1.1 * 0.04 and min(row["bias/norm_squared"] for row in rows) < 0


def test_without_a_bias_the_interval_holds_zero_nine_times_in_ten():
    """One thousand runs of ten measurements each, by the U-statistic written out."""
    blocks = np.random.default_rng(1).standard_normal((1000, 10, NUM_BLOCKS, 20))
    squares = np.sum(np.sum(blocks, axis=2) ** 2, axis=-1) - np.sum(blocks**2, axis=(2, 3))
    intervals = np.array([pooled_bias.mean_with_interval(run)["interval"] for run in squares])
    assert 0.87 < np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)) < 0.93


def test_the_error_of_the_square_is_found_back_in_that_of_the_norm(planted):
    rows, estimates = planted
    known = [(row, made) for row, made in zip(rows, estimates, strict=True) if row["bias/standard_error"] > 0]
    assert len(known) > 250 and any(row["bias/norm_squared"] < 0 for row, _ in known)
    assert any(made.norm_squared > made.norm_squared_error for _, made in known)
    for row, made in known:
        np.testing.assert_allclose(pooled_bias.squared_error(row), made.norm_squared_error, rtol=1e-9)
    lost = {"bias/norm_squared": -0.3, "bias/standard_error": 0.0}  # e ≤ 0.3 leaves no trace
    assert pooled_bias.squared_error(lost) == 0.3


def test_measurements_of_nothing_are_counted_apart_and_change_nothing(planted):
    rows = planted[0][:7]
    alone = pooled_bias.pooled_bias(rows)
    nothing = [empty(), empty(**{"bias/detection_limit": 0.0}), empty(fresh_norm_squared=0.5, **{"bias/detection_limit": 0.0})]
    others = [empty(staleness=0, fresh_norm_squared=0.5), empty(fresh_norm_squared=math.nan)]
    mixed = pooled_bias.pooled_bias([*nothing, *rows, *others])
    counts = {"measured": 12, "pooled": 7, "without_lag": 1, "without_gradient": 3, "not_finite": 1}
    assert {name: mixed[name] for name in counts} == counts
    assert {name: mixed[name] for name in mixed.keys() - counts} == {name: alone[name] for name in alone.keys() - counts}
    # A bias of 0 where there is a gradient and noise is a measurement, and so is one without a fresh gradient.
    kept = [empty(fresh_norm_squared=0.5), empty(**{"bias/norm_squared": 0.1})]
    assert pooled_bias.sorted_out(kept)["pooled"] == kept


def test_what_cannot_be_said_is_none():
    none = pooled_bias.pooled_bias([empty()])
    assert none["norm_squared"] == {"mean": None, "standard_error": None, "interval": None}
    assert none["detection_limit_median"] is none["relative_detection_limit_median"] is None
    assert (
        none["relative_norm_squared"]
        == {"estimate": None, "interval": None}
        == pooled_bias.pooled_bias([])["relative_norm_squared"]
    )
    one = pooled_bias.pooled_bias([empty(fresh_norm_squared=4.0, **{"bias/norm_squared": 1.0})])
    assert one["norm_squared"] == {"mean": 1.0, "standard_error": None, "interval": None}
    assert one["relative_norm_squared"] == {"estimate": 0.25, "interval": None}
    assert one["relative_detection_limit_median"] == 0.35
    lost = pooled_bias.pooled_bias([empty(fresh_norm_squared=f, **{"bias/norm_squared": 1.0}) for f in (-3.0, 1.0)])
    assert lost["relative_detection_limit_median"] is None and lost["relative_norm_squared"]["estimate"] is None


def test_the_interval_of_a_ratio_inverts_the_test_of_every_ratio():
    """Brute force: the ratios R at which the mean of values − R·scales is not rejected as 0."""
    rng = np.random.default_rng(2)
    scales = 1 + 0.8 * rng.standard_normal(12)
    values = 0.3 * scales + 0.5 * rng.standard_normal(12)
    low, high = pooled_bias.ratio_with_interval(values, scales)["interval"]
    tried = np.linspace(-3, 3, 6001)
    accepted = stats.ttest_1samp(values - tried[:, None] * scales, 0, axis=1).pvalue >= 1 - pooled_bias.LEVEL
    np.testing.assert_allclose([low, high], [tried[accepted][0], tried[accepted][-1]], atol=2e-3)
    assert pooled_bias.ratio_with_interval(values, scales - np.mean(scales) + 0.1)["interval"] is None  # no ratio is too large


# --- what a reader sees


@pytest.fixture
def drawn(monkeypatch):
    """The figure of a run with these measurements, before it is a file."""

    def draw(biases):
        kept = []
        monkeypatch.setattr(summary_module, "save_figure", lambda figure, *_: kept.append(figure) or [])
        names = {"reward": 0.5, "staleness/mean": 4.0, "off_policy/k3_kl": 0.01, "update/norm": 0.1}
        training.figure([{"kind": "update", "step": 0, **names}, *biases], "", "title")
        return kept[0]

    return draw


@pytest.mark.filterwarnings("error")
def test_the_figure_shows_every_measurement_with_its_error_below_zero_too(planted, drawn):
    rows = [*planted[0][:20], empty(step=30), empty(step=31)]
    unit = np.mean([row["fresh_norm_squared"] for row in rows[:20]])
    expected = {row["step"]: row["bias/norm_squared"] / unit for row in rows[:20]}
    assert min(expected.values()) < 0 < max(expected.values())
    axis = drawn(rows).axes[2]
    shown = {}
    for container in axis.containers:
        points, _, (bars,) = container.lines
        shown |= dict(zip(*points.get_data(), strict=True))
        for (step, middle), (low, high) in zip(points.get_xydata(), (bar[:, 1] for bar in bars.get_segments()), strict=True):
            error = pooled_bias.squared_error(rows[int(step)]) / unit
            assert (low, high) == pytest.approx((middle - error, middle + error))
    assert shown == pytest.approx(expected)
    low, high = axis.get_ylim()
    assert low < min(expected.values()) and max(expected.values()) < high
    labels = axis.get_legend_handles_labels()[1]
    assert {"detection limit, squared", "mean of all, 90 % interval", "nothing to measure"} < set(labels)
    (crosses,) = (line for line in axis.lines if line.get_label() == "nothing to measure")
    assert crosses.get_xydata().tolist() == [[30, 0], [31, 0]]
    assert drawn(rows).axes[1].get_ylabel() == "size, each in its own unit"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [[empty()], [empty(fresh_norm_squared=-1.0)], [empty(staleness=0), empty(step=10)]])
def test_a_run_that_measured_next_to_nothing_has_a_figure_too(rows, drawn):
    drawing = drawn(rows)
    drawing.draw_without_rendering()
    assert np.isfinite(drawing.axes[2].get_ylim()).all() and drawing.axes[2].get_ylabel() == "‖δ‖²"


def test_the_page_claims_no_more_than_was_measured(planted):
    def words(rows):
        return " ".join(": ".join(pair) for pair in page._said_of_bias(pooled_bias.pooled_bias(rows)))

    assert "The first interval is above 0: together they tell the bias from none" in words(planted[0])
    pairs = ((0.3, 1.0), (-0.2, 1.2), (0.1, 0.8), (0.0, 1.0))
    few = words([empty(fresh_norm_squared=f, **{"bias/norm_squared": u}) for u, f in pairs] + [empty()])
    assert "5; nothing to measure in 1 where at most one block of prompts had a gradient" in few
    assert "together they do not tell the bias from none, nor exclude one of up to" in few
    assert words([empty()]).endswith("(nearly all rewards equal): not counted below.")
    lost = [empty(fresh_norm_squared=f, **{"bias/norm_squared": u}) for f, u in ((-1.0, 0.1), (1.5, -0.1), (0.1, 0.0))]
    assert "The gradient itself cannot be told from 0" in words(lost) and "nor exclude" not in words(lost)


def test_one_title_for_whoever_draws():
    config = {"task": "jax_async_grpo.tasks.digit_text", "task_options": {"num_digits": 2}}
    config |= {"staleness": {"max": 4}, "optimizer": {"learning_rate": 1e-3}}
    assert summary_module.title(config) == "digit_text, S = 4, η = 0.001"
    for options, name in (({"dataset": "chain_sum"}, "chain_sum"), ({"path": "data/train.jsonl"}, "train")):
        assert summary_module.title(config | {"task_options": options}).startswith(f"{name}, S = 4")
