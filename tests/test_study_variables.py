"""The score of the controlling variable finds the variable that was planted, and a tiny sweep goes through both analyses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from configs import study_variables, study_warnings
from configs.sweep_digits import algorithm, case
from configs.sweep_digits import get_config as default_sweep
from jax_async_grpo import records, studies, sweep_run
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies import variables, warnings
from jax_async_grpo.studies.runs import run_table, seed_draws
from tests.planted_runs import RATES, STEPS, curve, sweep_rows


def config(**changes) -> dict:
    return study_variables.get_config().to_dict() | dict(cases=("adam",), num_bootstrap=40) | changes


def analyze(rows, **changes) -> dict:
    return variables.summary([], config(**changes), {"collapse": rows})


def by_chance(value_of, middle, *, width=0.15, late=400.0):
    """Runs that succeed with a chance that falls with ln of `value_of(algorithm, S, η)` past ln(middle)."""
    rng = np.random.default_rng(7)

    def run(name, s, rate, seed):
        value, others = value_of(name, s, rate)
        succeeds = rng.random() < expit((math.log(middle) - math.log(value)) / width)
        return ("success", math.inf, others) if succeeds else ("fall", late, others)

    return run


@pytest.mark.parametrize(("power", "best"), [(0.0, "eta"), (0.5, "sqrt_s_eta"), (1.0, "s_eta")])
def test_the_planted_power_of_staleness_wins(power, best):
    rows = sweep_rows(by_chance(lambda name, s, rate: ((s / 8) ** power * rate, {}), 1.2e-3), seeds=range(20))
    (record,) = analyze(rows)["losses"]
    assert record["best"] == best
    for name, other in (("eta", 0.0), ("sqrt_s_eta", 0.5), ("s_eta", 1.0)):
        score = record["scores"][name]
        if name == best:
            assert name == "eta" or score["interval"][0] > 0
            assert score["brier"] < 1.3 * record["own_curve"] + 0.01
        else:
            assert not score["ties_with_best"] and score["brier"] > record["scores"][best]["brier"]
        assert name == "eta" or (score["interval"][1] < 0) == (power == 0 and other > 0)
    assert record["scores"]["rms_s_eta"] == record["scores"]["s_eta"]


MEASURED = {
    "drift": ("drift/from_behavior", lambda x: x),
    "ess": ("off_policy/ess_ratio", lambda x: 1 / (1 + x) ** 2),
    "second_moment": ("off_policy/second_moment", lambda x: x**2),
    "kl": ("off_policy/kl", lambda x: x**2),
    "tv": ("off_policy/tv", lambda x: x / (1 + x)),
}


@pytest.mark.parametrize("variable", [*MEASURED, "root_msd"])
def test_a_planted_measured_variable_wins_whatever_its_scale(variable):
    """The hidden x does not grow with η; every other window holds noise. A swapped window or sign would lose."""
    rng = np.random.default_rng(3)
    hidden = {(s, rate): math.exp(rng.normal()) for s in (4, 8, 16, 32) for rate in RATES}

    def value_of(name, s, rate):
        x = hidden[s, rate]
        if variable == "root_msd":
            return x, {"msd": {lag: x**2 if lag == s else rng.random() for lag in (1, 2, 4, 8, 16, 32)}}
        column, transform = MEASURED[variable]
        return x, {column: np.concatenate([[transform(x)], rng.random(4)])}

    rows = sweep_rows(by_chance(value_of, 1.0), seeds=range(12))
    found = run_table(rows, "adam", CollapseRule())
    values = variables._cell_values(found)
    success = found.outcome == "success"
    scores = {
        name: variables.transfer_score(x, success, found.max_staleness, np.ones((1, len(found))))[0]
        for name, x in values.items()
    }
    assert min(scores, key=scores.get) == variable, scores
    assert scores[variable] < 0.6 * scores["eta"]


def test_only_runs_that_stand_after_the_first_window_are_scored_and_early_failures_counted():
    """Past the boundary every run falls at once and its drift is 0 from then on: with all runs the drift would look bad."""

    def run(name, s, rate, seed):
        if s * rate > 0.02:
            return "fall", 80.0, {"drift/from_behavior": 0.0}
        return ("success" if s * rate < 0.005 else "fall"), 600.0, {"drift/from_behavior": s * rate}

    (record,) = analyze(sweep_rows(run))["losses"]
    early = sum(s * rate > 0.02 for s in (4, 8, 16, 32) for rate in RATES) * 10
    assert record["num_failed_early"] == early and record["num_scored"] == record["num_runs"] - early
    assert record["scores"]["drift"]["brier"] == pytest.approx(0, abs=1e-12)
    assert record["others"]["all_runs"]["drift"] < 0 < record["scores"]["drift"]["skill"]


def test_slow_learners_below_the_best_rate_are_left_out():
    def run(name, s, rate, seed):
        return ("never learned" if rate < 3e-4 else "success" if rate < 2e-3 else "fall"), 600.0, {}

    (record,) = analyze(sweep_rows(run))["losses"]
    assert {cell["learning_rate"] for cell in record["cells"]} == {rate for rate in RATES if rate > 3e-4}
    assert record["scores"]["eta"]["brier"] == 0 and record["scores"]["s_eta"]["skill"] is None
    assert [entry["value"] for entry in record["boundaries"]["eta"]] == pytest.approx([math.sqrt(RATES[4] * RATES[5])] * 4)


def test_one_curve_for_all_losses_where_one_was_planted():
    """Drift decides whatever the loss; η means another drift for each."""
    gain = {"a": 1.0, "b": 8.0, "c": 64.0}
    rows = sweep_rows(
        by_chance(lambda name, s, rate: (gain[name] * rate, {"drift/from_behavior": gain[name] * rate}), 6e-3, width=0.3),
        algorithms=tuple(gain),
    )
    (universal,) = analyze(rows)["universal"]
    assert universal["best"] == "drift" and universal["scores"]["drift"]["interval"][0] > 0


def test_the_curve_for_all_losses_is_that_of_the_other_losses():
    """a succeeds up to the third η, b up to the sixth: between them each is foretold the other's fate, wrong by 1."""

    def run(name, s, rate, seed):
        return ("success" if rate <= RATES[2 if name == "a" else 5] else "fall"), 400.0, {}

    (universal,) = analyze(sweep_rows(run, algorithms=("a", "b")))["universal"]
    assert universal["scores"]["eta"]["brier"] == pytest.approx(3 / 8)


def test_isotonic_predictions_are_the_best_falling_curve_and_know_the_order_alone():
    rng = np.random.default_rng(0)
    x, y, w = rng.integers(0, 12, 60).astype(float), rng.integers(0, 2, 60), rng.integers(0, 4, 60).astype(float)
    at = np.arange(-1, 13, 0.5)
    found = variables.isotonic_predictions(x, y, w, at)
    assert (np.diff(found) <= 1e-12).all()
    repeated = np.repeat(np.arange(60), w.astype(int))
    np.testing.assert_allclose(variables.isotonic_predictions(x[repeated], y[repeated], np.ones(len(repeated)), at), found)
    np.testing.assert_allclose(variables.isotonic_predictions(np.exp(x), y, w, np.exp(at)), found)
    here = variables.isotonic_predictions(x, y, w, x)
    loss = w @ (here - y) ** 2
    for _ in range(200):  # no falling curve fits better
        other = np.sort(rng.random(12))[::-1][x.astype(int)]
        assert loss <= w @ (other - y) ** 2
    np.testing.assert_allclose(variables.isotonic_predictions(x, x > 5, np.ones(60), at), np.mean(x > 5))
    np.testing.assert_allclose(
        variables.isotonic_predictions([1.0, 3.0], [1, 0], np.ones(2), np.array([2.0, 0, 9])), [0.5, 1, 0]
    )


def test_transfer_score_by_hand():
    """Group b's curve is a's and the reverse; each group counts the same whatever its size."""
    x, success = np.array([1.0, 2, 1, 2, 2]), np.array([1, 0, 1, 1, 1], bool)
    groups = np.array(["a", "a", "b", "b", "b"])
    # on b with a's curve (1, 0): errors 0, 1, 1; on a with b's curve (1, 1): 0, 1
    expected = (2 / 3 + 1 / 2) / 2
    assert variables.transfer_score(x, success, groups, np.ones((1, 5)))[0] == pytest.approx(expected)
    weights = np.array([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    score = variables.transfer_score(x, success, groups, weights)
    assert score[0] == pytest.approx((1 / 2 + 1 / 2) / 2) and np.isnan(score[1])


def test_boundary_values():
    x, success = np.array([1.0, 2, 4, 8]), np.array([1, 1, 0, 0])
    assert variables.boundary_value(x, success, np.ones(4)) == pytest.approx(math.sqrt(8))
    assert variables.boundary_value(x, np.ones(4), np.ones(4)) is None
    assert variables.boundary_value(x, np.zeros(4), np.ones(4)) is None
    assert variables.boundary_value(np.array([0.0, 1, np.inf]), np.array([1, 1, 0]), np.ones(3)) is None


def test_run_tables_say_when_a_run_had_failed_in_any_way():
    fates = {0: ("success", math.inf), 1: ("fall", 240.0), 2: ("frozen", 400.0), 3: ("never learned", math.inf)}
    rows = sweep_rows(
        lambda name, s, rate, seed: (*fates[seed], {"entropy": seed}), staleness=(4,), rates=(1e-3,), seeds=range(4)
    )
    runs = run_table(rows, "adam", CollapseRule())
    assert runs.outcome.tolist() == [fates[seed][0] for seed in range(4)]
    # a frozen run stands still within 1 % of the way to the ceiling: its rewards do from the step before on, or from 400
    assert runs.failure_step[[0, 1, 3]].tolist() == [math.inf, 240.0, math.inf] and runs.failure_step[2] == 400.0
    assert runs.collapse_step.tolist() == [math.inf, 240.0, math.inf, math.inf]
    np.testing.assert_allclose(runs.windows["reward"][0], curve("success").reshape(5, 4).mean(axis=1))
    assert runs.windows["entropy"][:, 2].tolist() == [0, 1, 2, 3] and runs.msd[0] == {1: 1.0, 2: 1.0, 4: 1.0}
    part = runs.select(runs.seed > 1)
    assert part.seed.tolist() == [2, 3] and part.windows["entropy"].shape == (2, 5) and len(part) == 2
    assert STEPS[-1] == runs.window_ends[-1]
    with pytest.raises(ValueError, match="case='sgd' has no cell"):
        run_table(rows, "sgd", CollapseRule())


def test_seed_draws_resample_all_seeds_equally():
    draws = seed_draws(5, 4000, 0)
    assert (draws.sum(axis=1) == 5).all() and np.abs(draws.mean(axis=0) - 1).max() < 0.06
    assert draws.var() == pytest.approx(0.8, abs=0.03)  # multinomial: 1 − 1/5


def test_the_page_counts_instead_of_presuming():
    rows = sweep_rows(by_chance(lambda name, s, rate: (s * rate / 8, {}), 1.2e-3), algorithms=("a", "b"), seeds=range(12))
    summary = analyze(rows)
    page = variables.page(summary)
    assert "`adam/a`: the lowest score has S·η" in page and "rms staleness·η and S·η are one variable here" in page
    assert all(f"{record['scores']['eta']['brier']:.3f}" in page for record in summary["losses"])
    flat = sweep_rows(by_chance(lambda name, s, rate: (rate, {}), 1.2e-3), seeds=range(12), schedule="periodic")
    page = variables.page(analyze(flat))
    assert "`adam/no_is`: the lowest score has η;" in page and "one variable here" not in page
    assert "Better than η alone beyond the interval: none" in page and "No case has two losses." in page
    assert "No loss has runs at two S." in variables.page(
        analyze(sweep_rows(lambda *_: ("success", math.inf, {}), staleness=(4,)))
    )


def test_the_rms_of_other_schedules_is_not_the_largest_lag():
    runs = run_table(
        sweep_rows(lambda *_: ("success", math.inf, {}), schedule="periodic", rates=(1.0,)), "adam", CollapseRule()
    )
    values = variables._run_values(runs)
    for s in (4, 32):
        rms = math.sqrt(np.mean(np.arange(s + 1) ** 2))
        np.testing.assert_allclose(values["rms_s_eta"][runs.max_staleness == s], rms)


def test_values_that_are_not_finite_count_as_worse_than_any_number():
    def run(name, s, rate, seed):
        return "success", math.inf, {"drift/from_behavior": math.nan if seed == 0 else 2.0}

    values = variables._run_values(run_table(sweep_rows(run, rates=(1.0,)), "adam", CollapseRule()))
    assert np.isinf(values["drift"][::10]).all() and (values["drift"][1::10] == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(more=1), "config.more is not a key"),
        (dict(cases=()), "config.cases is ()"),
        (dict(cases="adam"), "config.cases is 'adam'"),
        (dict(rule=dict(gain=2.0)), "config.rule: gain=2"),
        (dict(rule=3), "config.rule is 3"),
        (dict(min_staleness=0), "config.min_staleness is 0"),
        (dict(num_bootstrap=5), "config.num_bootstrap is 5"),
        (dict(confidence=1.0), "config.confidence is 1.0"),
        (dict(seed=-1), "config.seed is -1"),
        (dict(shown=("x",)), "config.shown is ('x',)"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        variables.validate(config(**change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_source_is_named():
    with pytest.raises(ValueError, match="config.source is 'other'; config.sources has collapse"):
        analyze([], source="other")


def test_a_tiny_sweep_goes_through_both_studies(tmp_path):
    """Real records: every column both studies read is there, and both write a page and figures."""
    sweep = default_sweep()
    sweep.algorithms = dict(no_is=algorithm("reinforce"))
    options = dict(policy="jax_async_grpo.policies.tabular", policy_options=dict(context_length=3))
    options |= dict(warm_start=None, optimizer="optax.sgd")
    options |= dict(task_options=dict(num_prompts=1, num_digits=1, base=3, seed=0), max_staleness=(0, 4, 8))
    options |= dict(learning_rates=(0.5, 30.0), num_updates=40, num_measurements=10, num_windows=5, num_seeds=3)
    sweep.cases = dict(adam=case(**options, algorithms=("no_is",)))
    source = records.open_workdir(tmp_path / "collapse", sweep.to_dict())
    sweep_run.run_chunks(sweep.to_dict(), source, lambda name, seconds: None)
    for study, made in ((variables, study_variables), (warnings, study_warnings)):
        part = made.get_config().to_dict() | dict(cases=("adam",), sources=(str(source.path),), num_bootstrap=20)
        study.validate(part)
        name = study.__name__.rpartition(".")[2]
        workdir = records.open_workdir(tmp_path / name, part)
        study.run(part, workdir, lambda piece, seconds: None)
        written = studies.write_results(study, part, workdir, tmp_path / f"{name}.md")
        assert len(written) >= 4 and all(path.stat().st_size for path in written)
