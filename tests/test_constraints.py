"""Planted radii are recovered with intervals that cover, the fit beats a dense scan, and what never binds gets no number."""

import numpy as np
import pytest

from jax_async_grpo import scaling

S, T = (v.ravel().astype(float) for v in np.meshgrid([0, 1, 2, 4, 8, 16, 32], [100, 400, 1600]))
BATCH, CRITICAL = 0.5, 20.0


def law(staleness=S, horizon=T, batch=BATCH, critical=CRITICAL):
    with np.errstate(divide="ignore"):
        return np.minimum(batch / staleness, critical / horizon)


def fit(eta, staleness=S, horizon=T, **options):
    return scaling.fit_stability_limit(staleness, horizon, eta, **{"num_bootstrap": 200} | options)


def values(found):
    return [r.value for r in (found.batch_radius, found.critical_radius, found.regime_ratio)]


def test_planted_radii_and_the_regime_boundary():
    found = fit(law())
    assert values(found) == pytest.approx([BATCH, CRITICAL, BATCH / CRITICAL], rel=1e-9)
    assert (found.num_staleness_limited, found.num_horizon_limited) == (6, 15)
    horizons = np.array([100.0, 1000.0])
    boundary = found.regime_boundary(horizons)
    np.testing.assert_allclose(BATCH / boundary, CRITICAL / horizons)  # there both limits are equal
    for radius in (found.batch_radius, found.critical_radius):
        np.testing.assert_allclose(radius.interval, radius.value, rtol=1e-9)
        assert radius.status == "found"


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_the_global_minimum(seed):
    """Against a dense scan, by the sum of squares: the scan never finds less, and hardly more. Seed 1 ends on a kink."""
    rng = np.random.default_rng(seed)
    eta = law() * np.exp(0.8 * rng.normal(size=len(S)))
    found = fit(eta)
    with np.errstate(divide="ignore"):
        log_s = np.log(S)
    alpha, beta = np.meshgrid(np.linspace(-4, 3, 351), np.linspace(0, 6, 351))
    predicted = np.minimum(alpha[..., None] - log_s, beta[..., None] - np.log(T))
    scan = np.sum((np.log(eta) - predicted) ** 2, axis=-1).min()
    best = found.scores[0].rms_log_error ** 2 * len(S)
    assert best <= scan + 1e-9 and scan - best < 5e-3


def test_intervals_cover_at_their_rate():
    rng = np.random.default_rng(0)
    covered = np.zeros(3)
    for _ in range(200):
        found = fit(law() * np.exp(0.2 * rng.normal(size=len(S))))
        for i, (radius, true) in enumerate(
            zip(
                (found.batch_radius, found.critical_radius, found.regime_ratio),
                (BATCH, CRITICAL, BATCH / CRITICAL),
                strict=True,
            )
        ):
            covered[i] += radius.interval[0] <= true <= radius.interval[1]
    assert (covered / 200 >= 0.84).all() and (covered / 200 <= 0.96).all(), covered / 200


def test_groups_are_resampled_whole():
    """An error that a group shares: the interval over groups has to be wide, the one over points is not."""
    rng = np.random.default_rng(1)
    inside = (S > 0) & (T < 1600)
    staleness, horizon, groups = np.tile(S[inside], 8), np.tile(T[inside], 8), np.repeat(np.arange(8), inside.sum())
    eta = law(staleness, horizon) * np.exp(0.5 * rng.normal(size=8)[groups] + 0.02 * rng.normal(size=len(groups)))
    by_group, by_point = (fit(eta, staleness, horizon, groups=g) for g in (groups, None))
    assert values(by_group) == values(by_point)
    wide, narrow = (np.log(f.critical_radius.interval[1] / f.critical_radius.interval[0]) for f in (by_group, by_point))
    assert wide > 1.8 * narrow


def test_update_norm_and_drift_set_the_units():
    rng = np.random.default_rng(2)
    eta = law() * np.exp(0.1 * rng.normal(size=len(S)))
    plain, scaled = fit(eta), fit(eta, update_norm=3.0)
    np.testing.assert_allclose(values(scaled), np.array(values(plain)) * [3, 3, 1], rtol=1e-9)
    np.testing.assert_allclose(values(fit(eta / 2)), np.array(values(plain)) * [0.5, 0.5, 1], rtol=1e-9)
    norms = rng.uniform(1, 5, size=len(S))
    assert values(fit(law() / norms, update_norm=norms)) == pytest.approx([BATCH, CRITICAL, BATCH / CRITICAL])
    drift = np.where(S > 0, 7 * np.sqrt(S), np.nan)  # nothing is asked of it at S = 0
    with np.errstate(divide="ignore"):
        diffusive = np.minimum(np.where(S > 0, BATCH / drift, np.inf), CRITICAL / T)
    assert values(fit(diffusive, drift=drift))[:2] == pytest.approx([BATCH, CRITICAL])
    np.testing.assert_allclose(values(fit(eta, drift=np.where(S > 0, S, 0.0))), values(plain), rtol=1e-9)


@pytest.mark.parametrize(
    "name, eta",
    [
        ("min(a/X, b/Y)", law()),
        ("constant", np.full(len(S), 0.01)),
        ("c/X", 0.3 / np.maximum(S, 1e-9)),
        ("c/Y", 5 / T),
        ("c/X^a", 0.3 * np.maximum(S, 1e-9) ** -0.4),
        ("1/(1/h + X/c)", 1 / (1 / 0.02 + S / 0.3)),
    ],
)
def test_every_law_wins_on_its_own_data(name, eta):
    rng = np.random.default_rng(3)
    used = S > 0
    exact = {s.name: s for s in fit(eta[used], S[used], T[used]).scores}
    assert exact[name].rms_log_error < 1e-6 and exact[name].leave_one_out_error < 1e-5
    noisy = fit((eta * np.exp(0.1 * rng.normal(size=len(S))))[used], S[used], T[used]).scores
    best = min(noisy, key=lambda score: score.aicc)
    assert best.name == name
    assert noisy[0].name == "min(a/X, b/Y)" and len(noisy) == 6
    for score in noisy:  # nested or not, a point left out is predicted worse than one that was fitted
        assert score.leave_one_out_error > score.rms_log_error


def test_scores_are_their_formulas():
    rng = np.random.default_rng(4)
    eta = 5 / T * np.exp(0.3 * rng.normal(size=len(S)))
    score = next(s for s in fit(eta).scores if s.name == "c/Y")
    residual = np.log(eta * T) - np.log(eta * T).mean()
    n = len(S)
    assert score.rms_log_error == pytest.approx(np.sqrt(np.mean(residual**2)))
    assert score.leave_one_out_error == pytest.approx(np.sqrt(np.mean((residual * n / (n - 1)) ** 2)))
    assert score.aicc == pytest.approx(n * np.log(np.mean(residual**2)) + 4 + 12 / (n - 3))


def test_laws_without_a_value_at_staleness_zero_say_so_by_an_infinite_error():
    scores = {s.name: s.rms_log_error for s in fit(law()).scores}
    assert np.isinf([scores["c/X"], scores["c/X^a"]]).all()
    assert np.isfinite([scores[name] for name in ("min(a/X, b/Y)", "constant", "c/Y", "1/(1/h + X/c)")]).all()


POSITIVE = S > 0


@pytest.mark.parametrize(
    "eta, staleness, horizon, batch, critical",
    [
        (20 / T, S, T, "binds", None),
        (BATCH / S[POSITIVE], S[POSITIVE], T[POSITIVE], None, "binds"),
        (np.full(len(S), 0.01), S, T, "a constant", "a constant"),
        (law(horizon=400), S, np.full(len(S), 400.0), None, "fewer than two values of horizon"),
        (law(np.where(POSITIVE, 8.0, 0.0)), np.where(POSITIVE, 8.0, 0.0), T, "fewer than two values of staleness >= 1", None),
        (20 / T, np.zeros(len(S)), T, "fewer than two values of staleness >= 1", None),
        (law(np.full(len(S), 8.0), 400), np.full(len(S), 8.0), np.full(len(S), 400.0), "fewer than two", "fewer than two"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_not_identifiable_by_name(eta, staleness, horizon, batch, critical, noise):
    eta = eta * np.exp(noise * np.random.default_rng(5).normal(size=len(eta)))
    found = fit(eta, staleness, horizon)
    for radius, expected in [(found.batch_radius, batch), (found.critical_radius, critical)]:
        if expected is None:
            assert radius.status == "found" and radius.value > 0
        else:
            assert radius.value is None and radius.interval is None
            assert radius.status.startswith("not identifiable: ")
            assert expected in radius.status or "a constant" in radius.status
    assert found.regime_ratio.value is None and found.regime_boundary(100) is None


def test_the_other_radius_is_fitted_without_the_one_that_never_binds():
    eta = 20 / T * np.exp(0.3 * np.random.default_rng(6).normal(size=len(T)))
    assert fit(eta).critical_radius.value == pytest.approx(np.exp(np.mean(np.log(eta * T))))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eta": []}, r"max_learning_rate has shape \(0,\); it must be \[n\] with n >= 5"),
        ({"eta": np.where(S == 4, np.nan, 1.0)}, r"max_learning_rate\[3\]=nan must be finite and > 0"),
        ({"eta": np.zeros(len(S))}, r"max_learning_rate\[0\]=0 must be"),
        ({"staleness": S - 1}, r"max_staleness\[0\]=-1 must be finite and >= 0"),
        ({"horizon": 0 * T}, r"horizon\[0\]=0"),
        ({"horizon": T[:3]}, r"horizon has shape \(3,\)"),
        ({"update_norm": np.inf}, r"update_norm\[0\]=inf"),
        ({"drift": 0 * S}, r"drift\[1\]=0 must be finite and > 0"),
        ({"groups": np.zeros(len(S))}, "1 label"),
        ({"groups": [1, 2]}, r"groups has shape \(2,\)"),
        ({"num_bootstrap": 5}, "num_bootstrap=5"),
        ({"confidence": 2}, "confidence=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        fit(**{"eta": law()} | changes)
    assert "\n" not in str(error.value)


def test_points_of_the_other_constraint_are_not_averaged_into_a_radius():
    """Half of the points are limited by a horizon seen at one T alone: it has no radius, and does not pull at the other."""
    staleness, horizon = (grid.ravel() for grid in np.meshgrid([1, 2, 4, 8, 16, 32, 64], [10, 1000]))
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(14))
    found = scaling.fit_stability_limit(staleness, horizon, np.minimum(1 / staleness, 20 / horizon) * noise, num_bootstrap=200)
    assert found.critical_radius.value is None
    low, high = found.batch_radius.interval
    assert low < 1 < high and 0.8 < found.batch_radius.value < 1.25
