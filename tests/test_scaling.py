"""Fits recover laws that are known, intervals cover at their rate, radii agree with a dense scan, limits with their parts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jax_async_grpo import scaling

STALENESS = np.array([1.0, 2, 4, 8, 16, 32, 64])
LEARNING_RATES = np.array([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])


def grid(num_seeds: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x [n, 2] over S × η × seeds, and the seed of every point."""
    s, eta, seed = np.meshgrid(STALENESS, LEARNING_RATES, np.arange(num_seeds), indexing="ij")
    return np.stack([s.ravel(), eta.ravel()], axis=1), seed.ravel()


# Fits.


@pytest.mark.parametrize("exponent, prefactor", [(1.0, 3.0), (-0.7, 1e-9), (0.0, 1.0), (2.5, 1e12)])
def test_one_exponent_is_exact_without_noise(exponent, prefactor):
    x = np.geomspace(1e-6, 1e-1, 12)
    fit = scaling.fit_power_law(x, prefactor * x**exponent)
    np.testing.assert_allclose(fit.exponents, [exponent], atol=1e-12)
    np.testing.assert_allclose(fit.prefactor, prefactor, rtol=1e-11)
    np.testing.assert_allclose(fit.intervals, [[exponent, exponent]], atol=1e-11)
    np.testing.assert_allclose(fit.predict(x), prefactor * x**exponent, rtol=1e-11)
    assert fit.residual_std < 1e-12
    assert math.isnan(fit.r_squared) if exponent == 0 else fit.r_squared == pytest.approx(1, abs=1e-12)
    assert (fit.num_points, fit.window, fit.seed) == (12, None, 0)


def test_two_exponents_are_told_apart():
    x, _ = grid()
    y = 5 * x[:, 0] ** 0.73 * x[:, 1] ** 0.99
    fit = scaling.fit_power_law(x, y)
    np.testing.assert_allclose(fit.exponents, [0.73, 0.99], atol=1e-12)
    np.testing.assert_allclose(fit.predict(x), y, rtol=1e-11)
    # One exponent in the product hides the two: it lies between them.
    product = scaling.fit_power_law(x.prod(axis=1), y)
    assert 0.73 < product.exponents[0] < 0.99 and product.r_squared < 1 - 1e-4


def test_fit_is_least_squares_in_logarithms():
    rng = np.random.default_rng(1)
    x, _ = grid()
    y = np.exp(rng.normal(size=len(x))) * x[:, 0] ** 0.5
    fit = scaling.fit_power_law(x, y)
    design = np.column_stack([np.ones(len(x)), np.log(x)])
    solution, squares, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    np.testing.assert_allclose(fit.exponents, solution[1:], rtol=1e-9)
    np.testing.assert_allclose(np.log(fit.prefactor), solution[0], rtol=1e-9)
    np.testing.assert_allclose(fit.residual_std, np.sqrt(squares[0] / (len(x) - 3)), rtol=1e-9)
    np.testing.assert_allclose(fit.r_squared, 1 - squares[0] / np.sum((np.log(y) - np.log(y).mean()) ** 2), rtol=1e-9)


def test_bootstrap_draws_equal_a_plain_loop():
    """Weighted normal equations must be the fit of the resampled rows; the loop refits them one by one."""
    rng = np.random.default_rng(2)
    x, groups = grid(num_seeds=4)
    y = np.exp(0.3 * rng.normal(size=len(x))) * x.prod(axis=1)
    fit = scaling.fit_power_law(x, y, groups=groups, num_bootstrap=100, seed=7)
    counts = np.random.default_rng(7).multinomial(4, [0.25] * 4, size=100)
    for draw, count in zip(fit.bootstrap_exponents[:10], counts, strict=False):
        rows = np.concatenate([np.repeat(np.flatnonzero(groups == g), count[g]) for g in range(4)])
        design = np.column_stack([np.ones(len(rows)), np.log(x[rows])])
        np.testing.assert_allclose(draw, np.linalg.lstsq(design, np.log(y[rows]), rcond=None)[0][1:], rtol=1e-9)


def test_intervals_cover_at_about_their_rate():
    rng = np.random.default_rng(3)
    x = np.geomspace(1e-4, 1e-1, 40)
    covered = {0.5: 0, 0.95: 0}
    for trial in range(200):
        y = x * np.exp(0.2 * rng.normal(size=len(x)))
        for confidence in covered:
            low, high = scaling.fit_power_law(x, y, confidence=confidence, num_bootstrap=300, seed=trial).intervals[0]
            covered[confidence] += low <= 1 <= high
    assert 0.42 <= covered[0.5] / 200 <= 0.58
    assert 0.89 <= covered[0.95] / 200 <= 0.98


def test_grouped_intervals_cover_clustered_errors_and_naive_ones_do_not():
    """Every seed has its own exponent error, shared by its cells: resampling cells takes 35 dependent points for 35 facts."""
    rng = np.random.default_rng(4)
    x, seeds = grid(num_seeds=20)
    z = np.log(x.prod(axis=1))
    covered, widths = np.zeros(2), np.zeros(2)
    for trial in range(200):
        y = np.exp(z * (1 + 0.1 * rng.normal(size=20)[seeds]) + 0.02 * rng.normal(size=len(z)))
        for column, groups in enumerate([seeds, None]):
            fit = scaling.fit_power_law(np.exp(z), y, groups=groups, num_bootstrap=200, confidence=0.9, seed=trial)
            low, high = fit.intervals[0]
            covered[column] += low <= 1 <= high
            widths[column] += high - low
    assert 0.84 <= covered[0] / 200 <= 0.96
    assert covered[1] / 200 <= 0.75
    assert widths[0] > 1.5 * widths[1]


def test_few_groups_get_expanded_percentiles():
    """Five groups at 95 %: t_4 = 2.7764, times √(5/4) = 3.1041, and Φ(−3.1041) = 0.000954 in place of 0.025."""
    rng = np.random.default_rng(9)
    x, seeds = grid(num_seeds=5)
    y = x.prod(axis=1) * np.exp(rng.normal(size=len(x)))
    fit = scaling.fit_power_law(x, y, groups=seeds)
    np.testing.assert_allclose(
        fit.intervals, np.quantile(fit.bootstrap_exponents, [0.000954, 1 - 0.000954], axis=0).T, rtol=1e-4
    )
    difference = scaling.bootstrap_difference(fit, scaling.fit_power_law(x, y**0.5, groups=seeds))
    np.testing.assert_allclose(difference.intervals, fit.intervals / 2, rtol=1e-9)


def test_window_selects_by_the_product_or_a_declared_variable_edges_included():
    x, _ = grid()
    product = x.prod(axis=1)
    y = product / (1 + product / 0.05)  # saturates
    assert scaling.fit_power_law(x, y).exponents[0] < 0.98
    fit = scaling.fit_power_law(x, y, window=(1e-4, 1e-3))
    selected = scaling.in_window(product, (1e-4, 1e-3))
    np.testing.assert_array_equal(selected, (product > 0.999e-4) & (product < 1.001e-3))
    assert fit.num_points == selected.sum() < len(x) and fit.window == (1e-4, 1e-3)
    np.testing.assert_allclose(fit.exponents, scaling.fit_power_law(x[selected], y[selected]).exponents, rtol=1e-12)
    drift = product * x[:, 0]
    by_drift = scaling.fit_power_law(x, y, window=(0, 1e-3), window_variable=drift)
    assert by_drift.num_points == scaling.in_window(drift, (0, 1e-3)).sum() != fit.num_points
    assert scaling.in_window([0.1 * 3, 0.31], (0.1, 0.3)).tolist() == [True, False]
    assert scaling.in_window([0.0, 1e9], None).all()


def test_what_lies_outside_the_window_does_not_matter():
    x, y = np.array([0, 1, 2, 4, 8, 16.0]), np.array([0, 1, 2, 4, 8, np.inf])
    fit = scaling.fit_power_law(x, y, window=(1, 8))  # S = 0 and a run that diverged lie outside
    np.testing.assert_allclose(fit.exponents, [1], atol=1e-12)


def test_confidence_and_seed_are_used():
    rng = np.random.default_rng(5)
    x = np.geomspace(1, 100, 15)
    y = x * np.exp(rng.normal(size=15))
    wide, narrow = (scaling.fit_power_law(x, y, confidence=c).intervals[0] for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    again, other = (scaling.fit_power_law(x, y, confidence=0.99, seed=s).intervals[0] for s in (0, 1))
    np.testing.assert_array_equal(wide, again)
    assert not np.array_equal(wide, other)


def test_degenerate_resamples_are_dropped_and_counted():
    """Four points at two places: a resample of one place only has no slope. Probability 2·(1/2)^4 = 1/8."""
    fit = scaling.fit_power_law([1.0, 1, 2, 2], [1.0, 1.1, 2, 2.1], num_bootstrap=4000)
    assert fit.num_dropped == np.isnan(fit.bootstrap_exponents[:, 0]).sum()
    assert abs(fit.num_dropped / 4000 - 1 / 8) < 0.02
    assert np.isfinite(fit.intervals).all()


def test_paired_difference_cancels_shared_errors():
    rng = np.random.default_rng(6)
    x, seeds = grid(num_seeds=12)
    log_drift = np.log(x) @ [0.73, 0.99] + np.log(x[:, 0]) * 0.1 * rng.normal(size=12)[seeds]
    log_bias = log_drift + 0.05 * np.log(x[:, 0]) + 0.01 * rng.normal(size=len(x))
    bias, drift = (scaling.fit_power_law(x, np.exp(v), groups=seeds, num_bootstrap=500) for v in (log_bias, log_drift))
    difference = scaling.bootstrap_difference(bias, drift, confidence=0.9)
    np.testing.assert_allclose(difference.difference, bias.exponents - drift.exponents)
    assert difference.num_draws == 500
    low, high = difference.intervals[0]
    assert low <= 0.05 <= high and high - low < 0.1 * np.ptp(bias.intervals[0])
    wider = scaling.bootstrap_difference(bias, drift, confidence=0.99).intervals[0]
    assert wider[0] < low and high < wider[1]


def test_unpaired_fits_are_refused():
    x, seeds = grid(num_seeds=3)
    y = x.prod(axis=1)
    fit = scaling.fit_power_law(x, y, groups=seeds)
    for other, message in [
        (scaling.fit_power_law(x[:, 0], y, groups=seeds), "number of exponents 2 against 1"),
        (scaling.fit_power_law(x, y, groups=seeds, seed=1), "seed 0 against 1"),
        (scaling.fit_power_law(x, y, groups=seeds, num_bootstrap=100), "num_bootstrap 2000 against 100"),
        (scaling.fit_power_law(x, y, groups=seeds + 1), "groups inside the window differ"),
        (scaling.fit_power_law(x, y), "groups inside the window differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaling.bootstrap_difference(fit, other)


X2 = np.array([[1, 1], [2, 1], [4, 2], [8, 5.0], [3, 3]])


@pytest.mark.parametrize(
    "x, y, arguments, message",
    [
        ([1, 2, 3], [1, 0, 3], {}, r"y holds 0\.0 at point 1; a power law needs finite values > 0"),
        ([1, 2, 3], [1, np.nan, 3], {}, "y holds nan at point 1"),
        ([1, -2, 3], [1, 2, 3], {}, r"x\[:, 0\] holds -2\.0 at point 1"),
        ([1, np.inf, 3], [1, 2, 3], {}, r"x\[:, 0\] holds inf at point 1"),
        ([1, 2, 3], [1, 2], {}, r"y has shape \(2,\)"),
        ([1, 2], [1, 2], {}, "^2 point.s. given; 1 exponent.s. need at least 3$"),
        ([1, 2, 3, 4], [1, 2, 3, 4], {"window": (2, 3)}, "2 of 4 point"),
        ([2, 2, 2], [1, 2, 3], {}, r"x\[:, 0\] is constant \(2\) in the window"),
        (X2[:, [0, 0]], X2[:, 0], {}, "collinear"),
        (X2[:, [0, 0]] ** [1, -2], X2[:, 0], {}, "collinear"),
        (np.ones((5, 3)), np.ones(5), {}, r"x has shape \(5, 3\); allowed"),
        (X2[:, 0], X2[:, 1], {"groups": ["a"] * 5}, r"groups has one label \(a\)"),
        (X2[:, 0], X2[:, 1], {"groups": [1, 2]}, r"groups has shape \(2,\)"),
        (X2[:, 0], X2[:, 1], {"window": (3, 1)}, "0 <= low < high"),
        (X2[:, 0], X2[:, 1], {"window": 3}, "must be a pair"),
        (X2[:, 0], X2[:, 1], {"window": (0, 9), "window_variable": X2[:, 1]}, "never by its outcome"),
        (X2[:, 0], X2[:, 1], {"window": (0, 9), "window_variable": [1, 2, 3, 4, np.nan]}, r"\[4\]=nan"),
        (X2[:, 0], X2[:, 1], {"window_variable": X2[:, 0]}, "without a window"),
        (X2[:, 0], X2[:, 1], {"num_bootstrap": 10}, "num_bootstrap=10 must be an integer >= 100"),
        (X2[:, 0], X2[:, 1], {"confidence": 95}, r"confidence=95 must lie in \(0, 1\)"),
        (X2[:, 0], X2[:, 1], {"seed": -1}, "seed=-1 must be an integer >= 0"),
        (X2[:, 0], X2[:, 1] + 1j, {}, "y is complex; a power law is of real numbers"),
        (X2[:, 0] + 0j, X2[:, 1], {}, "x is complex"),
    ],
)
def test_fit_refuses(x, y, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        scaling.fit_power_law(x, y, **arguments)
    assert "\n" not in str(error.value)


def test_predict_refuses_another_number_of_columns():
    with pytest.raises(ValueError, match=r"x has 1 column\(s\); this fit has 2"):
        scaling.fit_power_law(X2, X2[:, 0]).predict(X2[:, 0])


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_msd_exponent(gamma):
    lags = np.arange(17)
    fit = scaling.msd_exponent(lags, 1e-7 * lags**gamma)  # lag 0 is there and left out
    np.testing.assert_allclose(fit.exponents, [gamma], atol=1e-12)
    assert fit.num_points == 16
    stacked = scaling.msd_exponent(
        np.tile(lags, 2), np.tile(1.0 * lags**gamma, 2), window=(2, 8), groups=np.repeat([0, 1], 17), num_bootstrap=100
    )
    assert stacked.num_points == 14 and len(stacked.bootstrap_exponents) == 100
    for bad, message in [([-1, 1, 2], "integers >= 0"), ([0.5, 1, 2], "integers >= 0"), ([1, 2], r"shape \[n\]")]:
        with pytest.raises(ValueError, match=message):
            scaling.msd_exponent(bad, [1.0, 2, 3])


def test_msd_of_a_random_walk_and_of_a_straight_line():
    rng = np.random.default_rng(8)
    walk = np.cumsum(rng.normal(size=(4000, 10)), axis=0)
    line = np.arange(400.0)[:, None] * np.ones(3)
    for path, gamma in [(walk, 1), (line, 2)]:
        msd = [np.mean(np.sum((path[s:] - path[: len(path) - s]) ** 2, axis=1)) for s in range(17)]
        assert scaling.msd_exponent(range(17), msd).exponents[0] == pytest.approx(gamma, abs=0.05)


# The clip radius.


def ragged(seed: int):
    """A step function of r with weights that come and go (not monotone), as a clipped fraction over tokens is."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(30))
    start = np.exp(rng.uniform(np.log(1e-3), np.log(1.0), size=30))
    stop = start * rng.uniform(1.2, 3.0, size=30)
    stop[::2] = np.inf
    return lambda radii: ((np.asarray(radii)[:, None] > start) & (np.asarray(radii)[:, None] < stop)) @ weights


@pytest.mark.parametrize("seed", range(12))
def test_radius_agrees_with_a_brute_scan(seed):
    fn = ragged(seed)
    dense = np.geomspace(1e-5, 10, 400_000)
    fractions = np.concatenate([fn(part) for part in np.split(dense, 20)])
    step = dense[1] / dense[0] - 1
    for level in (0.02, 0.1, 0.3):
        radius = scaling.batch_clip_radius(fn, level=level, max_radius=10, min_radius=1e-5, num_scan=2000)
        reached = fractions >= level
        brute = dense[np.argmax(reached)] if reached.any() else np.inf
        assert radius == brute or abs(radius / brute - 1) <= step + 1e-6
        if np.isfinite(radius):
            assert fn(np.array([radius]))[0] >= level  # reached there, and not just below
            assert fn(np.array([radius * (1 - 2e-6)]))[0] < level


def test_radius_is_the_first_crossing_of_a_function_that_falls_back():
    def fn(radii):
        return np.where((radii >= 0.02) & (radii < 0.03), 0.5, 0.0) + np.where(radii >= 0.7, 0.5, 0.0)

    assert scaling.batch_clip_radius(fn, level=0.3, max_radius=1) == pytest.approx(0.02, rel=1e-6)
    assert scaling.batch_clip_radius(fn, level=0.3, max_radius=1, min_radius=0.05) == pytest.approx(0.7, rel=1e-6)
    assert scaling.batch_clip_radius(fn, level=0.3, max_radius=0.019) == math.inf
    assert scaling.batch_clip_radius(fn, level=0.6, max_radius=1) == math.inf


def test_refinement_takes_the_first_of_several_crossings():
    """All three crossings lie between two neighbors of the coarse scan, 0.178 and 0.422; bisection would find the last."""

    def fn(radii):
        return 1.0 * (((radii > 0.2) & (radii < 0.22)) | ((radii > 0.25) & (radii < 0.27)) | (radii > 0.3))

    radius = scaling.batch_clip_radius(fn, level=0.5, max_radius=1, min_radius=1e-3, num_scan=9)
    assert radius == pytest.approx(0.2, rel=1e-6)


def test_an_excursion_as_wide_as_a_scan_step_is_found_at_any_scale():
    """The documented resolution at the defaults is 5.6 %: 6 % wide excursions, from 1e-5 to 1, are never missed."""
    for start in np.geomspace(1e-5, 0.9, 40):
        radius = scaling.batch_clip_radius(lambda r: 1.0 * ((r >= start) & (r <= 1.06 * start)), level=0.5, max_radius=1)  # noqa: B023
        assert radius == pytest.approx(start, rel=1e-6)


def test_radius_tolerance_level_one_and_a_fixed_number_of_radii():
    sizes = []

    def fn(radii):
        sizes.append(len(radii))
        return np.minimum(radii / 0.3, 1.0)

    assert scaling.batch_clip_radius(fn, level=1.0, max_radius=2, num_scan=64, relative_tolerance=1e-10) == pytest.approx(
        0.3, rel=1e-10
    )
    precise = len(sizes)
    assert set(sizes) == {64}
    scaling.batch_clip_radius(fn, level=1.0, max_radius=2, num_scan=64, relative_tolerance=0.1)
    assert len(sizes) - precise < precise


@pytest.mark.parametrize(
    "fn, arguments, message",
    [
        (None, {"level": 0}, r"level=0 must lie in \(0, 1\]"),
        (None, {"level": math.nan}, "level=nan"),
        (None, {"max_radius": 0}, "max_radius=0 must be > 0"),
        (None, {"max_radius": math.inf}, "max_radius=inf must be > 0 and finite"),
        (None, {"min_radius": 2}, "min_radius=2 must be smaller than max_radius=1"),
        (None, {"num_scan": 4}, "num_scan=4 must be an integer >= 8"),
        (None, {"relative_tolerance": 0}, "relative_tolerance=0"),
        (lambda r: np.ones_like(r), {}, "min_radius=1e-06: the clipped fraction reaches level=0.1 there already"),
        (lambda r: 2 * r, {}, r"returned .* at radius .*; allowed: 0 to 1"),
        (lambda r: np.full_like(r, np.nan), {}, "returned nan at radius 1e-06"),
        (lambda r: 0.5, {}, r"returned shape \(\) for radii \(256,\)"),
    ],
)
def test_radius_refuses(fn, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        scaling.batch_clip_radius(fn or (lambda r: r / 1.0), **{"level": 0.1, "max_radius": 1, **arguments})
    assert "\n" not in str(error.value)


# The two-constraint limit.


def test_limits_are_their_formulas_and_scale_with_their_parts():
    arguments = dict(max_staleness=8, horizon=400, update_norm=2.5, batch_clip_radius=0.1, critical_drift_radius=30.0)
    limit = scaling.max_stable_learning_rate(**arguments)
    assert limit.staleness_limit == pytest.approx(0.1 / (8 * 2.5), rel=1e-15)
    assert limit.horizon_limit == pytest.approx(30 / (400 * 2.5), rel=1e-15)
    assert (limit.max_learning_rate, limit.regime) == (limit.staleness_limit, "staleness-limited")
    assert limit.ballistic_staleness_limit == limit.staleness_limit
    double = scaling.max_stable_learning_rate(**arguments | {"max_staleness": 16})
    assert double.staleness_limit == limit.staleness_limit / 2 and double.horizon_limit == limit.horizon_limit
    tight = scaling.max_stable_learning_rate(**arguments | {"critical_drift_radius": 3.0})
    assert (tight.max_learning_rate, tight.regime) == (tight.horizon_limit, "horizon-limited")
    assert tight.max_learning_rate == pytest.approx(3 / 1000)
    assert scaling.max_stable_learning_rate(**arguments | {"max_staleness": 1}).staleness_limit == 8 * limit.staleness_limit
    assert limit.headroom(0.001) == pytest.approx(5) and limit.headroom(0.01) == pytest.approx(0.5)


def test_measured_drift_replaces_the_ballistic_one_and_both_are_reported():
    arguments = dict(max_staleness=16, horizon=100, update_norm=2.0, batch_clip_radius=0.1)
    # Diffusive: √MSD(S)/η = √S·G_upd, a factor √S below ballistic.
    limit = scaling.max_stable_learning_rate(**arguments, drift_per_learning_rate=4 * 2.0)
    assert limit.staleness_limit == pytest.approx(4 * limit.ballistic_staleness_limit)
    assert limit.max_learning_rate == limit.staleness_limit
    same = scaling.max_stable_learning_rate(**arguments, drift_per_learning_rate=16 * 2.0)
    assert same.staleness_limit == same.ballistic_staleness_limit


@pytest.mark.parametrize(
    "max_staleness, clip_radius, critical_radius, limits, regime",
    [
        (8, 0.1, 20.0, (0.1 / 16, 0.1), "staleness-limited"),
        (8, 0.1, math.inf, (0.1 / 16, math.inf), "staleness-limited"),
        (8, 0.1, None, (0.1 / 16, None), "horizon not measured"),
        (8, math.inf, 20.0, (math.inf, 0.1), "horizon-limited"),
        (8, math.inf, math.inf, (math.inf, math.inf), "not reached"),
        (8, math.inf, None, (math.inf, None), "horizon not measured"),
        (8, None, 20.0, (None, 0.1), "staleness limit not measured"),
        (8, None, None, (None, None), "neither measured"),
        (0, 0.1, 20.0, (math.inf, 0.1), "horizon-limited"),
        (0, None, None, (math.inf, None), "horizon not measured"),
    ],
)
def test_what_was_not_measured_or_not_reached_is_neither_a_limit_nor_its_absence(
    max_staleness, clip_radius, critical_radius, limits, regime
):
    limit = scaling.max_stable_learning_rate(
        max_staleness=max_staleness,
        horizon=100,
        update_norm=2.0,
        batch_clip_radius=clip_radius,
        critical_drift_radius=critical_radius,
    )
    assert (limit.staleness_limit, limit.horizon_limit) == pytest.approx(limits) and limit.regime == regime
    found = [value for value in limits if value is not None and value < math.inf]
    line = scaling.staleness_budget_line(limit, 1e-4)
    if found:
        assert limit.max_learning_rate == pytest.approx(min(found)) and limit.headroom(1e-4) == pytest.approx(min(found) / 1e-4)
        assert f"({regime})" in line and "headroom" in line
    else:
        assert limit.max_learning_rate is None and limit.headroom(1e-4) is None
        assert line.endswith(f", no eta_max found ({regime})")
    assert "unbounded" not in line and "inf" not in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_staleness": -1}, "max_staleness=-1 must be an integer >= 0"),
        ({"max_staleness": 1.5}, "max_staleness=1.5 must be an integer >= 0"),
        ({"max_staleness": True}, "max_staleness=True must be an integer >= 0"),
        ({"horizon": 0}, "horizon=0 must be an integer >= 1"),
        ({"update_norm": 0.0}, "update_norm=0 must be > 0 and finite"),
        ({"update_norm": math.inf}, "update_norm=inf must be > 0 and finite"),
        ({"batch_clip_radius": 0.0}, "batch_clip_radius=0 must be > 0"),
        ({"batch_clip_radius": math.nan}, "batch_clip_radius=nan must be > 0"),
        ({"critical_drift_radius": math.nan}, "critical_drift_radius=nan must be > 0"),
        ({"critical_drift_radius": -2.0}, "critical_drift_radius=-2 must be > 0"),
        ({"drift_per_learning_rate": 0.0}, "drift_per_learning_rate=0 must be > 0"),
        ({"drift_per_learning_rate": 1.0, "max_staleness": 0}, "drift_per_learning_rate=1 needs max_staleness >= 1"),
    ],
)
def test_limit_refuses(arguments, message):
    valid = dict(max_staleness=8, horizon=100, update_norm=1.0, batch_clip_radius=0.1)
    with pytest.raises(ValueError, match=message) as error:
        scaling.max_stable_learning_rate(**valid | arguments)
    assert "\n" not in str(error.value)


def test_budget_line():
    arguments = dict(max_staleness=8, horizon=400, update_norm=1.0, batch_clip_radius=0.096, critical_drift_radius=40.0)
    limit = scaling.max_stable_learning_rate(**arguments)
    assert scaling.staleness_budget_line(limit, 1e-3) == (
        "S=8, T=400, eta=0.001: S*eta=8.0e-3, T*eta=0.40, eta_max=0.012 (staleness-limited), headroom 12x"
    )
    assert scaling.staleness_budget_line(limit, 2.4e-2).endswith("headroom 0.50x (exceeded)")
    measured = scaling.max_stable_learning_rate(**arguments, drift_per_learning_rate=2.0)
    assert scaling.staleness_budget_line(measured, 1e-7) == (
        "S=8, T=400, eta=1e-07: S*eta=8.0e-7, T*eta=4.0e-5, eta_max=0.048 (staleness-limited; 0.012 if drift were ballistic), "
        "headroom 4.8e5x"
    )
    alone = scaling.max_stable_learning_rate(**arguments | {"critical_drift_radius": None}, drift_per_learning_rate=2.0)
    assert scaling.staleness_budget_line(alone, 1e-3).endswith(
        "eta_max=0.048 (horizon not measured; 0.012 if drift were ballistic), headroom 48x"
    )
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning_rate="):
            scaling.staleness_budget_line(limit, bad)
