"""The planner's test: on planted records the truth is known, so every number of the page has one right value."""

from __future__ import annotations

import copy
import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs import study_prediction
from configs.sweep_digits import algorithm, case
from jax_async_grpo import planner, records, sweep_run
from jax_async_grpo.delay_stability import delay_stability
from jax_async_grpo.studies import contract, delay, prediction, prediction_delay

RATES = tuple(0.01 * 1.3**k for k in range(22))


def tiny_config() -> dict:
    config = study_prediction.get_config().to_dict()
    world = dict(
        policy="jax_async_grpo.policies.tabular",
        policy_options=dict(context_length=1, init_scale=1.0),
        task="jax_async_grpo.tasks.bandit",
        task_options=dict(rewards=((1.0, 0.0, 0.0), (0.0, 0.5, 1.0))),
        warm_start={},
        optimizer="optax.sgd",
        algorithms=("no_is",),
        learning_rates=(0.5, 1.0, 2.0),
        num_measurements=10,
        num_windows=2,
        num_seeds=2,
    )
    cases = {
        "w_anchor": case(**world, max_staleness=(0, 2), num_updates=20, first_seed=100),
        "w_truth": case(**world, max_staleness=(4, 5), num_updates=40),
    }
    sweep = config["sweep"] | dict(precision="float64", group_size=4, algorithms={"no_is": algorithm("reinforce")}, cases=cases)
    probe = dict(num_updates=10, first_seed=200, num_seeds=2)
    return config | dict(precision="float64", anchor_staleness=2, probe=probe, apart=(), sweep=sweep)


def planted(eta_80_of_lag, gamma=1.0):
    """Records of a world in which a run succeeds up to an η that depends on S alone; √KL grows as s^{γ/2}."""
    config = tiny_config()
    config["anchor_staleness"] = 8
    for name, lags in (("w_anchor", (0, 8)), ("w_truth", (16, 32))):
        config["sweep"]["cases"][name] |= dict(max_staleness=lags, learning_rates=RATES)
    rows = [dict(kind="start", case=name, reward=0.4, ceiling=1.0) for name in ("w_anchor", "w_truth")]
    rows += [dict(kind="start", case=f"w_no_is_{kind}", reward=0.4, ceiling=1.0) for kind in ("probe", "near_probe")]

    def cell(name, lag, rate, num_updates):
        steps = np.arange(1, 11) * num_updates // 10
        # seeds differ a little, so that success is lost over a range
        limits = eta_80_of_lag(lag) * np.exp(0.2 * np.linspace(-1, 1, 20) + 0.1)
        reward = [[0.9 if rate < limit else 0.1] * 10 for limit in limits]
        lags = sorted({1, *(2**k for k in range(6) if 2**k < lag), max(lag, 1)})
        msd = [[(2 * rate) ** 2 * s**1.6 for s in lags]] * 20  # the parameters move otherwise
        measures = {"off_policy/tv": min(0.1 * rate * lag, 1.0), "off_policy/kl": (0.1 * rate) ** 2 * lag**gamma}
        measures |= {
            "off_policy/second_moment": 0.1 * (rate * (lag + 1e-9)) ** 2,
            "off_policy/ess_ratio": 1 / (1 + 0.1 * rate * lag) ** 2,
        }
        return dict(
            kind="cell", piece=name, case=name, algorithm="no_is", schedule="fixed", max_staleness=lag, learning_rate=rate,
            steps=steps.tolist(), reward=reward, seeds=list(range(20)), msd_lags=lags, msd=msd,
            windows={key: [[value]] * 20 for key, value in measures.items()},
        )  # fmt: skip

    for name, lags, updates in (("w_anchor", (0, 8), 400), ("w_truth", (16, 32), 800)):
        rows += [cell(name, lag, rate, updates) for lag in lags for rate in RATES]
    probes = prediction._probe_cases(config, rows)
    for name, part in probes.items():
        rows += [cell(name, lag, rate, 80) for lag in part["max_staleness"] for rate in part["learning_rates"]]
    return config, rows, probes


def law(exponent):
    return lambda lag: 1 / (1 / 1.0 + 10 * (lag / 8) ** exponent)


def test_a_world_that_obeys_the_form_is_predicted():
    """1/η_80 = 1 + 10·(S/8)^{γ/2} with the γ of the policy's drift: only the spacing of the η ladder is left as an error."""
    config, rows, probes = planted(law(0.5))
    result = prediction.summary(rows, config, {})
    scores = result["scores"]["all"]
    chosen, anchored = probes["w_no_is_probe"]["learning_rates"][0], result["settings"][0]["anchor_rates"][8]
    assert chosen == max(rate for rate in RATES if rate <= anchored / 2)
    assert scores["planner"]["worst"] < 0.15
    assert scores["s_eta"]["median"] > 0.4 and scores["constant"]["median"] > 0.4  # the wrong forms miss
    assert scores["sqrt_msd"]["median"] > 0.2
    assert not result["checks"][0]["holds"]  # two settings are too few to say so
    assert all(check["holds"] for check in result["checks"][1:] if "without anchors" not in check["name"])
    assert {s["plan"]["status"] for s in result["settings"]} == {"bracketed"}


def test_ballistic_drift_makes_the_planner_the_product_rule():
    config, rows, _ = planted(law(1.0), gamma=2.0)
    scores = prediction.summary(rows, config, {})["scores"]["all"]
    np.testing.assert_allclose(scores["planner"]["worst"], scores["s_eta"]["worst"], rtol=1e-9)
    assert scores["planner"]["worst"] < 0.15 and scores["constant"]["median"] > 0.4


def test_a_world_that_breaks_the_form_fails_its_criteria():
    """Lag that suddenly matters: nothing in the anchors or the drift says so, and the page must."""
    config, rows, _ = planted(lambda lag: 0.5 if lag <= 8 else 0.02)
    result = prediction.summary(rows, config, {})
    assert any(not check["holds"] for check in result["checks"])
    assert "**fails**" in prediction.page(result)


def test_words_instead_of_numbers_are_counted_and_not_scored():
    config, rows, probes = planted(lambda lag: 100.0 if lag == 0 else 0.08)
    result = prediction.summary(rows, config, {})
    assert result["scores"]["all"].keys() <= {"without_anchors"}  # η_80 at S = 0 is beyond the ladder
    assert result["statuses"] == [dict(plan="censored", truth="found", number=2)] and probes
    assert result["settings"][0]["plan"]["rate"] is None  # beyond S_a a censored anchor at S = 0 bounds nothing
    config, rows, probes = planted(lambda lag: 0.001)
    result = prediction.summary(rows, config, {})
    assert result["statuses"] == [dict(plan="none", truth="none", number=2)] and not probes


def test_rivals_are_what_their_names_say():
    anchors = tuple(planner.Anchor(S, 400, "found", eta) for S, eta in ((0, 0.4), (8, 0.1)))
    found = prediction.rivals(anchors, 32, 800, {"tv": 2.0})
    expected = dict(constant=0.1, s_eta_constant=0.025, paper_min=0.025, s_eta=1 / (2.5 + 4 * 7.5), tv=1 / (2.5 + 2 * 7.5))
    expected["log_log"] = 0.4 * 0.25 ** (math.log(33) / math.log(9))
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_study_runs_stops_and_goes_on(tmp_path):
    """Anchors, truth and probes of a tiny world, killed once; then the page from the records alone."""
    config = tiny_config()
    prediction.validate(config)
    seen = []

    def stop(name, seconds):
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    workdir = records.open_workdir(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt):
        prediction.run(config, workdir, stop)
    prediction.run(config, workdir, lambda name, seconds: seen.append(name))
    assert len(seen) == len(set(seen)) and set(prediction.pieces(config)) <= set(seen)
    written = contract.write_results(prediction, config, workdir, tmp_path / "page.md")
    assert {path.name for path in written} >= {"page.md", "prediction.png", "prediction.svg"}
    assert "| w | no_is | 4 |" in (tmp_path / "page.md").read_text()


def test_planted_thresholds_stand_in_the_table_and_on_their_side_of_the_truth():
    """A threshold of half the truth errs by ln 2 in every setting, whatever the anchors say."""
    config, rows, _ = planted(law(0.5))
    truths = {s["max_staleness"]: s["truth"]["eta_80"] for s in prediction.summary(rows, config, {})["settings"]}
    assert "Delay stability is not in this table" in prediction.page(prediction.summary(rows, config, {}))
    known = dict(kind="delay", world="w", algorithm="no_is")
    result = prediction.summary(
        rows + [known | dict(max_staleness=s, learning_rate=x / 2) for s, x in truths.items()], config, {}
    )
    score = result["scores"]["no_is"]["delay_stability"]
    assert score["number"] == 2 and score["median"] == pytest.approx(math.log(2)) == pytest.approx(score["worst"])
    assert result["delay"]["all"] == dict(number=2, at_or_below=2, median_ratio=pytest.approx(0.5))
    page = prediction.page(result)
    assert "| no_is | delay stability at θ_0 | 0.69 | 0.69 | 0.69 | 2 |" in page and "no_is 2 of 2 (median ratio 0.50)" in page
    assert "It is a lower bound throughout." in page
    result = prediction.summary([*rows, known | dict(max_staleness=16, learning_rate=3 * truths[16])], config, {})
    assert result["delay"]["all"] == dict(number=1, at_or_below=0, median_ratio=pytest.approx(3.0))  # of one setting alone
    assert "no lower bound with no_is" in prediction.page(result)


def linearized(loss="reinforce", **changes):
    """The Jacobians of a tiny world, whose θ_0 is random."""
    config = tiny_config()
    config["sweep"]["cases"]["w_truth"] |= changes
    config["sweep"]["algorithms"] = {"no_is": algorithm(loss)}
    case_ = sweep_run.build_case(config["sweep"], "w_truth", "no_is")
    return case_, prediction_delay.linearization(case_, num_draws=400, seed=0)


@pytest.fixture(scope="module")
def tabular():
    return linearized()


def test_the_jacobians_of_a_bandit_are_those_of_the_delay_study():
    """One prompt, one logit an action: the delay study differentiates the same field by another road."""
    study = dict(rewards=(1.0, 0.3, 0.0), group_size=4, losses={"no_is": "jax_async_grpo.losses.reinforce"})
    of_study = delay.bandit_case(study, "no_is")
    at = delay.make_equilibrium(of_study)(0.1)
    case_, _ = linearized(task_options=dict(rewards=((1.0, 0.3, 0.0),)))
    leaves, tree = jax.tree.flatten(case_.params)
    (table,) = leaves
    logits = np.zeros(table.shape)
    logits[:, : len(at.params)] = at.params
    placed = dataclasses.replace(case_, params=jax.tree.unflatten(tree, [logits]))
    found = prediction_delay.linearization(placed, num_draws=2, seed=0)
    rows = prediction_delay.measure_delay(found, (0, 3, 4), rank=24)
    learner, behavior = at.learner + 0.1 * np.eye(3), at.behavior  # the sweep has no decay
    kept = prediction_delay.decaying_directions(*prediction_delay.seen_directions(learner, behavior))
    for row in rows:
        expected = delay_stability(*kept, row["max_staleness"]).max_learning_rate
        assert row["learning_rate"] == pytest.approx(expected, rel=1e-6)
    assert rows[0]["num_seen"] == 2 and rows[0]["learning_rate"] > rows[2]["learning_rate"]


def test_optimizers_rescale_the_plain_map(tabular):
    case_, plain = tabular
    _, slow = linearized(optimizer_options=dict(momentum=0.75))
    assert plain.factor == 1 and slow.factor == 0.25
    np.testing.assert_array_equal(slow.behavior, plain.behavior)
    adam_case, adam = linearized(optimizer="optax.adam", optimizer_options=dict(eps=1e-3))
    scale, _ = prediction_delay.optimizer_map(adam_case, num_draws=400, seed=0)
    seen = np.diag(plain.behavior) != 0
    assert seen.sum() == 6  # two prompts, three actions
    np.testing.assert_allclose(scale[~seen], 1e3)  # nothing is drawn there
    # the similarity leaves the eigenvalues of D·B
    left, right = (np.sort(np.linalg.eigvals(m).real) for m in (adam.behavior, scale[:, None] * plain.behavior))
    np.testing.assert_allclose(left, right, atol=1e-9 * np.abs(right).max())
    draw = jax.jit(case_.update_gradient("sampled"))
    draws = [draw(jax.random.key(k), case_.params, case_.params, 0, 0) for k in range(100)]
    square = np.mean([ravel_pytree(g)[0] ** 2 for g in draws], axis=0)
    np.testing.assert_allclose(1 / scale[seen] - 1e-3, np.sqrt(square[seen]), rtol=0.35)


def test_growing_directions_leave_and_the_leading_ones_stay():
    """diag blocks whose thresholds are known: the growing one and the still one must not make the answer 0."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    learner = turn @ np.diag([0.0, 0.0, -1.0, 2.0, 0.0, -0.01]) @ turn.T
    behavior = turn @ np.diag([-1.7, -0.4, 0.2, -1.0, 0.0, 0.0]) @ turn.T
    at = prediction_delay.Linearization(learner, behavior, 0.5)
    (row,) = prediction_delay.measure_delay(at, [5], rank=2)
    assert (row["num_seen"], row["num_decaying"], row["rank"]) == (5, 4, 3)
    assert row["learning_rate"] == pytest.approx(0.5 * 2 / 1.7 * math.sin(math.pi / 22), rel=1e-9)


def test_delay_pieces_are_measured_once_and_losses_that_agree_share_them(tmp_path):
    """To first order at θ = φ clip is importance sampling; without importance sampling is another matter."""
    config = tiny_config()
    losses = dict(no_is="reinforce", clip="ppo_clip", is_="importance_sampling")
    config["sweep"]["algorithms"] = {name: algorithm(loss) for name, loss in losses.items()}
    config["sweep"]["cases"]["w_truth"]["algorithms"] = tuple(losses)
    assert not prediction_delay.delay_pieces(config)
    config["delay"] = dict(worlds=("w",), rank=8, num_draws=4)
    prediction.validate(config)
    assert prediction.pieces(config)[-3:] == ["delay/w/no_is", "delay/w/clip", "delay/w/is_"]
    workdir, seen = records.open_workdir(tmp_path / "run", config), []
    for _ in range(2):
        prediction_delay.run_delay(config, workdir, lambda name, seconds: seen.append(name))
    assert seen == prediction_delay.delay_pieces(config)
    found = {(r["algorithm"], r["max_staleness"]): r["learning_rate"] for r in workdir.read_metrics() if r["kind"] == "delay"}
    assert len(found) == 6
    for lag in (4, 5):
        assert found["clip", lag] == found["is_", lag] > 1.5 * found["no_is", lag] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["sweep"]["cases"].pop("w_truth"), "the world w needs w_anchor"),
        (lambda c: c["sweep"]["cases"]["w_anchor"].update(max_staleness=(0, 3)), r"max_staleness \(0, 2\)"),
        (lambda c: c["criteria"].pop("p90"), "config.criteria.p90 is missing"),
        (lambda c: c.update(anchor_staleness=0), "config.anchor_staleness is 0"),
        (lambda c: c.update(delay=dict(worlds=("v",), rank=8, num_draws=4)), r"config.delay.worlds is \('v',\)"),
        (lambda c: c.update(delay=dict(worlds=("w",), rank=0, num_draws=4)), "config.delay.rank is 0"),
        (
            lambda c: (
                c.update(delay=dict(worlds=("w",), rank=8, num_draws=4)),
                c["sweep"]["cases"]["w_truth"].update(optimizer="optax.lion"),
            ),
            "'w', whose optimizer is optax.lion",
        ),
        (lambda c: c["sweep"].update(precision="float16"), "config.sweep.precision is 'float16'"),
    ],
)
def test_a_wrong_config_is_one_line(change, message):
    config = copy.deepcopy(tiny_config())
    change(config)
    with pytest.raises(ValueError, match=message):
        prediction.validate(config)
