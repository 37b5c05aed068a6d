"""The figure shows every cell once, where and how it belongs, and nothing overlaps; the table keeps to its width."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from matplotlib.image import imread

from jax_async_grpo import report

PRODUCT = "staleness_x_learning_rate"


def synthetic(policies=("tabular",), updates=("exact",), *, drift_fits=False, schedules=("fixed", "random"), seeds=2):
    """Rows of a saturating law with exponent 1 below S_rms·η = 0.1, and fits that say what they should."""
    rng = np.random.default_rng(0)
    rows, fits = [], []
    for policy, kind in itertools.product(policies, updates):
        name = dict(policy=policy, task="digit_sum", optimizer="sgd", loss="ppo_clip", updates=kind)
        for schedule, s, eta, seed in itertools.product(schedules, (1, 4, 16), (1e-3, 1e-2, 0.1), range(seeds)):
            rms = s if schedule == "fixed" else math.sqrt(s * (2 * s + 1) / 6)
            drift = 2 * rms * eta
            bias = 0.3 * drift / (1 + drift) * math.exp((kind == "sampled") * 0.3 * rng.normal())
            values = dict(max_staleness=s, learning_rate=eta, seed=seed, staleness_rms=rms, drift_rms=drift, bias_rms=bias)
            rows.append({**name, **values, "schedule": schedule, "relative_bias_rms": 5 * bias, "in_window": rms * eta <= 0.1})
        for variable in [PRODUCT, "drift"] if drift_fits else [PRODUCT]:
            exponents = dict(exponent=0.98, staleness_exponent=0.73, learning_rate_exponent=None)
            intervals = dict(exponent=[0.96, 1.01], staleness_exponent=[0.7, 0.76])
            numbers = dict(r_squared=0.99731, num_cells=24, variable=variable, intervals=intervals)
            fits.append({**name, "schedule": "all", **exponents, **numbers})
    return rows, fits


def marks(ax, gid: str):
    """Number of markers of this kind and the points themselves."""
    groups = [group for group in ax.collections if group.get_gid() == gid]
    return groups, np.concatenate([np.asarray(group.get_offsets()) for group in groups])


def slope(line) -> float:
    (x0, x1), (y0, y1) = line.get_data()
    return math.log(y1 / y0) / math.log(x1 / x0)


def lines(ax, gid: str):
    return [line for line in ax.lines if line.get_gid() == gid]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    rows, fits = synthetic()
    return rows, report.bias_figure(rows, fits, tmp_path_factory.mktemp("figure") / "bias.png")


def test_every_cell_is_drawn_once_filled_inside_the_window_and_hollow_outside(drawn):
    rows, figure = drawn
    (ax,) = figure.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    for gid, inside in [("inside", True), ("outside", False)]:
        groups, points = marks(ax, gid)
        expected = [(r["staleness_rms"] * r["learning_rate"], r["bias_rms"]) for r in rows if r["in_window"] == inside]
        np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0))
        assert len(groups) == 2  # two schedules
        for group in groups:
            assert (len(group.get_facecolors()) == 0) == (not inside)
    fixed, random = marks(ax, "inside")[0]
    assert not np.array_equal(fixed.get_paths()[0].vertices, random.get_paths()[0].vertices)
    # Color is the learning rate, in every panel and in the legend.
    colors = {}
    for group in (fixed, random):
        for color, (x, y) in zip(group.get_edgecolors(), group.get_offsets(), strict=True):
            row = next(r for r in rows if (r["staleness_rms"] * r["learning_rate"], r["bias_rms"]) == (x, y))
            colors.setdefault(row["learning_rate"], set()).add(tuple(color))
    assert all(len(own) == 1 for own in colors.values()) and len(set.union(*colors.values())) == 3
    shown = {
        text.get_text(): handle for handle, text in zip(figure.legends[0].legend_handles, figure.legends[0].texts, strict=True)
    }
    for rate, own in colors.items():
        assert shown[f"η = {rate:g}"].get_color() == own.copy().pop()
    assert {"fixed schedule", "random schedule", "in the window", "outside", "fit", "slope 1"} < set(shown)


def test_the_fit_passes_through_its_cells_and_the_guide_has_slope_one(drawn):
    rows, figure = drawn
    (ax,) = figure.axes
    ((fit,), (continued,), (guide,)) = (lines(ax, gid) for gid in ("fit", "fit continued", "slope 1"))
    assert slope(fit) == pytest.approx(0.98) and slope(continued) == pytest.approx(0.98) and slope(guide) == pytest.approx(1)
    inside = np.log([(r["staleness_rms"] * r["learning_rate"], r["bias_rms"]) for r in rows if r["in_window"]])
    (x0, x1), (y0, _) = np.log(fit.get_data())
    assert (x0, x1) == pytest.approx((inside[:, 0].min(), inside[:, 0].max()))
    assert y0 + 0.98 * (inside[:, 0].mean() - x0) == pytest.approx(inside[:, 1].mean())  # as least squares does
    assert continued.get_xdata()[1] == max(r["staleness_rms"] * r["learning_rate"] for r in rows)
    assert "slope 0.98 [0.96, 1.01]" in ax.get_title(loc="left") and "in S 0.73 [0.70, 0.76]" in ax.get_title(loc="left")
    assert "in η" not in ax.get_title(loc="left")  # not fitted, not mentioned
    assert "S_" in ax.get_xlabel() and "learning rate" in ax.get_xlabel() and "bias" in ax.get_ylabel()


def test_a_panel_says_which_staleness_its_exponent_is_of(tmp_path):
    rows, (fit,) = synthetic()
    (ax,) = report.bias_figure(rows, [{**fit, "staleness_range": [1, 16]}], tmp_path / "bias.png").axes
    assert "in S 0.73 [0.70, 0.76] for S = 1..16" in ax.get_title(loc="left")


def test_a_fit_of_one_schedule_goes_through_the_cells_of_that_schedule(tmp_path):
    rows, (fit,) = synthetic()
    rows = [{**row, "bias_rms": row["bias_rms"] * (1 if row["schedule"] == "fixed" else 10)} for row in rows]
    fits = [{**fit, "schedule": "fixed"}, {**fit, "schedule": "random", "exponent": 1.2, "intervals": None}]
    (ax,) = report.bias_figure(rows, fits, tmp_path / "bias.png").axes
    low, high = lines(ax, "fit")
    assert slope(high) == pytest.approx(1.2)
    assert high.get_ydata()[0] > 3 * low.get_ydata()[0]
    assert "fixed: slope 0.98 [0.96, 1.01]" in ax.get_title(loc="left") and "random: slope 1.20" in ax.get_title(loc="left")


def test_a_panel_for_every_policy_kind_of_updates_and_fitted_variable(tmp_path):
    rows, fits = synthetic(("tabular",), ("exact", "sampled"))
    drift_rows, drift_fits = synthetic(("transformer",), drift_fits=True)
    figure = report.bias_figure(rows + drift_rows, fits + drift_fits, tmp_path / "bias.png")
    titles = [ax.get_title(loc="left").split("\n")[0] for ax in figure.axes]
    # Policies and variables of exact updates side by side, sampled updates on a line of their own.
    assert titles == ["tabular, exact updates", *["transformer, exact updates"] * 2, "tabular, sampled updates"]
    tops = [round(ax.get_position().y0, 2) for ax in figure.axes]
    assert tops[0] == tops[1] == tops[2] > tops[3]
    assert sum("drift" in ax.get_xlabel() for ax in figure.axes) == 1
    drift = next(ax for ax in figure.axes if "drift" in ax.get_xlabel())
    np.testing.assert_allclose(
        sorted(marks(drift, "inside")[1][:, 0]), sorted(r["drift_rms"] for r in drift_rows if r["in_window"])
    )
    assert "task digit_sum" in figure.get_suptitle() and "loss ppo_clip" in figure.get_suptitle()
    assert_nothing_overlaps(figure)


def assert_nothing_overlaps(figure):
    """Axes with their titles and labels, the legend and the figure's title keep apart and inside the picture."""
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    boxes += [figure.legends[0].get_window_extent(renderer), figure._suptitle.get_window_extent(renderer)]
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
    for one, other in itertools.combinations(boxes, 2):
        overlap = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(overlap) <= 1, (one, other)


@pytest.mark.parametrize("width", [1200, 800])
def test_file_size_relative_bias_and_cells_that_have_no_place(width, tmp_path):
    rows, fits = synthetic()
    hidden = [{**rows[0], "staleness_rms": 0.0, "relative_bias_rms": 0.0}, {**rows[0], "relative_bias_rms": math.inf}]
    hidden += [{**rows[0], "relative_bias_rms": None}]
    (tmp_path / "bias.png").write_text("an older figure")
    figure = report.bias_figure(rows + hidden, fits, tmp_path / "bias.png", relative=True, width=width)
    assert imread(tmp_path / "bias.png").shape[1] == width
    assert [path.name for path in tmp_path.iterdir()] == ["bias.png"]
    (ax,) = figure.axes
    assert len(marks(ax, "inside")[1]) + len(marks(ax, "outside")[1]) == len(rows)
    assert marks(ax, "inside")[1][:, 1].min() == pytest.approx(min(row["relative_bias_rms"] for row in rows))
    assert "relative" in ax.get_ylabel() and "3 cell(s)" in figure.get_suptitle()
    assert_nothing_overlaps(figure)


def test_an_interrupted_run_without_fits_still_has_a_figure(tmp_path):
    rows, _ = synthetic(schedules=("fixed",), seeds=1)
    rows = [{**row, "in_window": False} for row in rows[:2]]
    (ax,) = report.bias_figure(rows, [], tmp_path / "bias.png").axes
    assert len(marks(ax, "outside")[1]) == 2 and not lines(ax, "fit")


def test_a_long_list_of_learning_rates_is_thinned_and_equal_ones_are_merged(tmp_path):
    rows, _ = synthetic(schedules=("fixed",), seeds=1)
    for rates, low, high in [(np.geomspace(1e-5, 1e-1, 25), 5, 9), ([0.1 * 0.1, 0.01, 0.1], 2, 2)]:
        figure = report.bias_figure([{**rows[0], "learning_rate": rate} for rate in rates], [], tmp_path / "bias.png")
        assert low <= sum(text.get_text().startswith("η") for text in figure.legends[0].texts) <= high


def test_figure_refuses(tmp_path):
    rows, fits = synthetic(schedules=("fixed",), seeds=1)
    for arguments, message in [
        (([], fits), r"rows holds 0 cell\(s\), none with"),
        (([{**rows[0], "bias_rms": 0.0}], fits), r"rows holds 1 cell\(s\), none with .* bias_rms > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            report.bias_figure(*arguments, tmp_path / "bias.png")
    with pytest.raises(ValueError, match="width=300 must be at least 600 pixels"):
        report.bias_figure(rows, fits, tmp_path / "bias.png", width=300)
    assert list(tmp_path.iterdir()) == []


# The table.


def many_fits():
    _, fits = synthetic(("tabular", "linear", "transformer"), ("exact", "sampled"))
    return [{**fit, "schedule": schedule} for fit in fits for schedule in ("fixed", "periodic", "random")]


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 140])
def test_table_keeps_to_its_width_and_loses_nothing(width):
    fits = many_fits()
    table = report.fits_table(fits, width=width)
    assert max(map(len, table.split("\n"))) <= width
    assert table.isascii() and table.count("digit_sum") == 1
    assert table.count("0.9973") == len(fits)
    flat = " ".join(table.split())
    assert flat.count("0.98 [0.96, 1.01]") == flat.count("0.73 [0.70, 0.76]") == len(fits)
    for word in ("tabular", "linear", "transformer", "fixed", "periodic", "random", "exact", "sampled", "digit_sum", "sgd"):
        assert word in table
    assert report.fits_table(fits[:1], width=5) == report.fits_table(fits[:1], width=24)


def test_table_default_width_is_100_and_says_shared_words_once():
    fits = many_fits()
    table = report.fits_table(fits)
    assert table == report.fits_table(fits, width=100)
    assert table.count("digit_sum") == table.count("ppo_clip") == 1
    head = next(line for line in table.split("\n") if "a_S" in line)
    row = next(line for line in table.split("\n") if line.startswith("transformer") and "periodic" in line)
    for column, cell in [("schedule", "periodic"), ("updates", "exact"), ("exponent", "0.98"), ("a_eta", "-"), ("cells", "24")]:
        assert row[head.index(column) :].startswith(cell)


def test_table_names_the_variable_where_it_differs():
    _, fits = synthetic(("transformer",), drift_fits=True)
    rows = report.fits_table(fits).split("\n")[-2:]
    assert rows[0].startswith("S*eta") and rows[1].startswith("drift")
    assert "exponent in drift" in report.fits_table(fits[1:])


def test_table_says_which_staleness_an_exponent_is_of():
    _, fits = synthetic(("tabular", "linear"))
    head, _, *rows = report.fits_table([{**fits[0], "staleness_range": [1, 32]}, fits[1]]).split("\n")[-4:]
    column = head.index(" S") + 1
    assert [row[column:] for row in rows] == ["1..32", "-"]


def test_table_of_nothing_and_of_gaps():
    assert report.fits_table([]) == "no fits"
    table = report.fits_table([{"policy": "tabular", "exponent": 1.0}])
    assert "policy tabular" in table and "1.00" in table and "nan" not in table.lower()
