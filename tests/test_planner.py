"""The planner: exact where its form is exact, honest where it cannot know, and no number where there is none."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from jax_async_grpo import planner
from jax_async_grpo.planner import Anchor, HorizonRun, Probe


def probe(max_staleness=32, gamma=1.0, learning_rate=0.01, **changes) -> Probe:
    """√MSD(s) = 2 η s^(γ/2)."""
    lags = [1, 2, 4, 8, 16, 32]
    drift = {lag: 2 * learning_rate * lag ** (gamma / 2) for lag in lags if lag <= max_staleness}
    return Probe(max_staleness, learning_rate, drift, **changes)


def at_lag(max_staleness) -> Probe:
    """The same drift, probed at another S."""
    return dataclasses.replace(probe(), max_staleness=max_staleness)


def anchors(fresh=0.1, stale=0.04, **changes) -> tuple[Anchor, Anchor]:
    shared = dict(horizon=400, status="found", num_seeds=20) | changes
    return tuple(Anchor(S, learning_rate=eta, interval=(eta / 1.2, eta * 1.2), **shared) for S, eta in ((0, fresh), (8, stale)))


def plan(**changes) -> planner.Plan:
    return planner.make_plan(**dict(max_staleness=32, horizon=800, probe=probe(), anchors=anchors()) | changes)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_what_lag_costs_grows_as_measured_drift(gamma):
    """1/η = 1/η_0 + (S/S_a)^{γ/2}·(1/η_a − 1/η_0), with the exponent of the probe."""
    made = plan(probe=probe(gamma=gamma))
    lost = 4 ** (gamma / 2) * (1 / 0.04 - 1 / 0.1)
    np.testing.assert_allclose(made.max_learning_rate, 1 / (1 / 0.1 + lost), rtol=1e-12)
    np.testing.assert_allclose(made.staleness_limit, 1 / lost, rtol=1e-12)
    np.testing.assert_allclose(made.batch_radius, made.staleness_limit * 2 * 32 ** (gamma / 2), rtol=1e-12)
    np.testing.assert_allclose([made.drift_exponent, made.update_norm], [gamma / 2, 2.0], rtol=1e-12)
    assert made.status == "bracketed" and made.recommended == made.max_learning_rate / 2


@pytest.mark.parametrize(("staleness", "expected"), [(0, 0.1), (8, 0.04)])
def test_at_an_anchor_the_plan_is_the_anchor(staleness, expected):
    made = plan(max_staleness=staleness, probe=None)
    np.testing.assert_allclose(made.max_learning_rate, expected, rtol=1e-12)
    assert made.update_norm is None  # nothing measured it


def test_intervals_hold_the_anchors_errors_and_the_models():
    narrow = plan(
        model_error=1e-6,
        anchors=tuple(Anchor(S, 400, "found", eta, (eta / 1.001, eta * 1.001)) for S, eta in ((0, 0.1), (8, 0.04))),
    )
    low, high = narrow.interval
    assert high / low < 1.01 and low < narrow.max_learning_rate < high
    wide = plan()
    ratio = math.log(wide.interval[1] / wide.interval[0])
    assert 2 * 1.645 * 0.5 < ratio < 2 * 1.645 * 0.65
    assert plan(confidence=0.5).interval[0] > wide.interval[0]


def test_lag_that_costs_nothing_leaves_the_mean_of_the_anchors():
    made = plan(anchors=anchors(fresh=0.04, stale=0.05))
    np.testing.assert_allclose(made.max_learning_rate, math.sqrt(0.04 * 0.05), rtol=1e-12)  # both measure one boundary
    assert made.staleness_limit == math.inf and made.binding == "optimizer"


def test_a_horizon_run_limits_what_the_anchors_allow():
    """η·T = η_hi·t_c: collapse at step 50 with η = 1 ends T = 800 at η = 1/16, T = 8000 at a tenth of that."""
    run = HorizonRun(1.0, 400, 50)
    short = plan(max_staleness=0, horizon_run=run, probe=None)
    np.testing.assert_allclose([short.horizon_limit, short.max_learning_rate], 1 / 16, rtol=1e-12)
    assert short.binding == "horizon"
    long = plan(max_staleness=0, horizon=8000, horizon_run=run, probe=None, extrapolate=True)
    np.testing.assert_allclose(long.max_learning_rate, 1 / 160, rtol=1e-12)
    never = plan(horizon_run=HorizonRun(1.0, 400, None))
    assert never.horizon_limit == math.inf and any("did not collapse within 400" in note for note in never.notes)
    assert never.max_learning_rate == plan().max_learning_rate


def test_words_of_the_anchors_become_words_of_the_plan():
    fresh, stale = anchors()
    for word in ("none", "ill-defined"):
        made = plan(anchors=(fresh, Anchor(8, 400, word, None)))
        assert made.status == word and made.max_learning_rate is None and "S = 8" in made.notes[0]
        assert "no learning rate" in made.budget
        assert plan(probe=None, anchors=(fresh, Anchor(8, 400, word, None))).status == word  # nothing to probe for
    bound = plan(anchors=(fresh, Anchor(8, 400, "censored", 0.04)))
    assert bound.status == "censored" and "lower bound" in bound.notes[-1] and ">=" in bound.budget


def test_a_bound_is_claimed_only_where_it_is_one():
    """Beyond S_a a larger η_0 makes the prediction smaller: censoring at S = 0 bounds nothing there, and does below S_a."""
    fresh, stale = anchors()
    open_ended = Anchor(0, 400, "censored", 0.1)
    made = plan(anchors=(open_ended, stale))
    assert made.status == "censored" and made.max_learning_rate is None and "larger rates at S = 0" in made.notes[0]
    below = [plan(max_staleness=4, probe=at_lag(4), anchors=(a, stale)).max_learning_rate for a in (open_ended, fresh)]
    higher = Anchor(0, 400, "found", 10.0)
    beyond = [plan(anchors=(a, stale)).max_learning_rate for a in (fresh, higher)]
    assert below[0] == below[1] < plan(max_staleness=4, probe=at_lag(4), anchors=(higher, stale)).max_learning_rate
    assert beyond[1] < beyond[0]


def test_open_intervals_are_less_certain_not_more():
    both, low, high = ((0.05, 0.2), (0.0, 0.2), (0.05, math.inf))
    errors = [Anchor(0, 400, "found", 0.1, interval).log_error for interval in (both, low, high, (0.0, math.inf), None)]
    np.testing.assert_allclose(errors[:3], math.log(2) / 1.6448536269514722, rtol=1e-12)
    assert errors[3] == 1.0 and errors[4] == 0.25
    with pytest.raises(ValueError, match="must hold its learning rate"):
        Anchor(0, 400, "found", 0.1, (0.2, 0.3))
    with pytest.raises(ValueError, match="learning_rate=-1"):
        HorizonRun(-1.0, 400, 50)


def test_without_anchors_it_is_an_order_of_magnitude():
    made = plan(anchors=(), probe=probe(total_variation=0.125))
    np.testing.assert_allclose(made.max_learning_rate, 0.04, rtol=1e-12)  # total variation may grow to one half
    assert made.status == "order of magnitude" and made.interval[1] / made.interval[0] > 10 and len(made.notes) == 1
    assert plan(anchors=(), probe=probe()).status == "not planned"
    beyond = plan(anchors=(), probe=probe(total_variation=0.5))
    assert beyond.max_learning_rate == 0.01 and "probe at a lower one" in beyond.notes[-1]
    with pytest.raises(ValueError, match="total_variation=1.5"):
        probe(total_variation=1.5)


@pytest.mark.parametrize("S", [4, 32])
def test_the_drift_of_the_policy_goes_before_that_of_the_parameters(S):
    """X(S)/X(S_a) is that of √KL where it is known at both, between the anchors and beyond; the parameters' otherwise."""
    lost = 1 / 0.04 - 1 / 0.1
    of_policy = dataclasses.replace(at_lag(S), policy_drift={S: 0.3, 8: 0.2})
    made = plan(max_staleness=S, probe=of_policy)
    np.testing.assert_allclose(made.max_learning_rate, 1 / (10 + 1.5 * lost), rtol=1e-12)
    assert made.drift_measure == "policy" and not any("of the parameters" in note for note in made.notes)
    half_known = plan(max_staleness=S, probe=dataclasses.replace(of_policy, policy_drift={S: 0.3}))
    np.testing.assert_allclose(
        half_known.max_learning_rate, plan(max_staleness=S, probe=at_lag(S)).max_learning_rate, rtol=1e-12
    )
    assert half_known.drift_measure == "parameters" and f"S = {S} and at S = 8" in " ".join(half_known.notes)
    widths = [math.log(one.interval[1] / one.interval[0]) for one in (made, half_known)]
    assert widths[1] > widths[0]  # what predicts worse says so
    with pytest.raises(ValueError, match="policy_drift at lag 8"):
        probe(policy_drift={8: 0.0})


def test_the_staleness_a_rate_allows_takes_the_policys_drift_too():
    """√KL that does not grow with the lag leaves η_80 at the larger anchor's for every S."""
    flat = dataclasses.replace(probe(), policy_drift={8: 0.2, 32: 0.2})
    assert plan(learning_rate=0.019, probe=flat).largest_staleness == 32
    assert plan(learning_rate=0.021, probe=flat).largest_staleness == 0


def test_the_staleness_a_learning_rate_allows_inverts_the_plan():
    made = plan(learning_rate=0.015)
    neighbors = (made.largest_staleness, made.largest_staleness + 1)
    at = [plan(max_staleness=S, probe=at_lag(S)).recommended for S in neighbors]
    assert at[0] >= 0.015 > at[1]
    np.testing.assert_allclose(made.headroom, made.max_learning_rate / 0.015, rtol=1e-12)
    assert plan(learning_rate=0.08).largest_staleness is None  # too much even without lag


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(anchors=anchors()[:1]), r"anchors are given at S = \[0\]; a plan needs"),
        (dict(anchors=anchors()[1:] * 2), r"anchors are given at S = \[8, 8\]"),
        (dict(probe=None), "probe is missing: S = 32"),
        (dict(probe=None, anchors=()), "neither anchors nor a probe"),
        (dict(max_staleness=33, probe=at_lag(33)), "max_staleness=33 is more than 4 times the anchors' 8"),
        (dict(horizon=1601), "horizon=1601 is more than 4 times the anchors' 400"),
        (dict(horizon=99), "horizon=99 is less than 1/4 of the anchors' 400"),
        (dict(max_staleness=16, anchors=()), "probe ran at S = 32; without anchors it must be at max_staleness=16"),
        (dict(learning_rate=0.0), "learning_rate=0 must be > 0"),
        (dict(horizon=0), "horizon=0 must be an integer >= 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan(**changes)
    assert "\n" not in str(caught.value)


def test_extrapolation_is_possible_when_asked_for():
    made = plan(max_staleness=64, probe=at_lag(64), extrapolate=True)
    assert made.max_learning_rate < plan().max_learning_rate
    assert made.notes[0].startswith("EXTRAPOLATED: max_staleness=64 is more than 4 times the anchors' 8")
    for horizon, words in ((1601, "more than 4 times the anchors' 400"), (99, "less than 1/4 of the anchors' 400")):
        assert words in plan(horizon=horizon, extrapolate=True).notes[0]
    assert not any("EXTRAPOLATED" in note for note in plan(extrapolate=True).notes)


def test_an_anchor_or_probe_without_sense_is_refused():
    with pytest.raises(ValueError, match="status='ok'"):
        Anchor(0, 400, "ok", 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        Anchor(0, 400, "found", None)
    with pytest.raises(ValueError, match="lag 1, one update"):
        Probe(8, 0.1, {8: 1.0})
