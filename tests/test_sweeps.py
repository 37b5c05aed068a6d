"""Sweeps of whole training runs: each is the plain loop of updates, and records do not depend on when a sweep was killed."""

from __future__ import annotations

import contextlib
import io
import itertools

import jax
import numpy as np
import optax
import pytest
from absl.testing import flagsaver

from configs import sweep_digits
from jax_async_grpo import exact, experiment, metrics, records, scaling, sweep_run, sweep_summary, sweeps
from jax_async_grpo.update import create_state, update_step
from launch import command_line
from launch import sweep as launch_sweep

ALGORITHMS = dict(no_is=sweep_digits.algorithm("reinforce"), clip=sweep_digits.algorithm("ppo_clip", epsilon_low=0.1))


def tiny_config() -> dict:
    config = sweep_digits.get_config().to_dict()
    bandit = dict(
        policy="jax_async_grpo.policies.tabular",
        policy_options=dict(context_length=1, init_scale=1.0),
        task="jax_async_grpo.tasks.bandit",
        task_options=dict(rewards=((1.0, 0.0, 0.0), (0.0, 0.5, 1.0))),
        warm_start={},
        optimizer="optax.sgd",
        algorithms=tuple(ALGORITHMS),
        max_staleness=(0, 3),
        learning_rates=(0.5, 2.0),
        num_updates=24,
        num_measurements=8,
        num_windows=2,
        num_seeds=3,
    )
    cases = dict(bandit=sweep_digits.case(**bandit))
    return config | dict(precision="float64", group_size=4, algorithms=ALGORITHMS, cases=cases)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, rows, bytes of the records) of a sweep killed after its first and its third chunk."""
    config = tiny_config()
    sweep_run.validate(config)
    path = tmp_path_factory.mktemp("sweep") / "run"
    for stop_at in (1, 3, None):
        workdir, seen, prepared = records.open_workdir(path, config), [], []

        def stop(name, seconds, stop_at=stop_at, seen=seen):
            seen.append((name, seconds))
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as said:
            sweep_run.run_chunks(config, workdir, stop, on_program=prepared.append)
            command_line.say_of_program(prepared[0])
    assert prepared == ["bandit/clip/2"] and "bandit/clip/2: warm start and compilation" in said.getvalue()
    assert [seconds == 0 for _, seconds in seen] == [True, True, True, False]
    return config, workdir.read_metrics(), (path / "metrics.jsonl").read_bytes()


def test_a_killed_sweep_ends_with_the_same_bytes(finished, tmp_path):
    config, _, data = finished
    workdir = records.open_workdir(tmp_path / "whole", config)
    sweep_run.run_chunks(config, workdir, lambda name, seconds: None)
    assert (workdir.path / "metrics.jsonl").read_bytes() == data


def test_every_cell_is_recorded_once_with_all_its_seeds(finished):
    config, rows, _ = finished
    cells = [row for row in rows if row["kind"] == "cell"]
    expected = set(itertools.product(("no_is", "clip"), (0, 3), (0.5, 2.0)))
    assert {(row["algorithm"], row["max_staleness"], row["learning_rate"]) for row in cells} == expected
    assert len(cells) == len(expected) and all(np.shape(row["reward"]) == (3, 8) for row in cells)
    assert [row["ceiling"] for row in rows if row["kind"] == "start"] == [1.0]


def test_a_run_of_a_sweep_is_the_plain_loop_of_updates(finished):
    """θ_t, its reward and its drift, for one run under lag, against update_step called in Python."""
    config, rows, _ = finished
    case = sweep_run.build_case(config, "bandit", "clip")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config["seed"]), 1), 2)
    optimizer = optax.sgd(0.5)
    gradient = case.update_gradient("sampled")
    step = jax.jit(lambda state: update_step(state, 3, lambda *arguments: gradient(key, *arguments), optimizer)[0])
    reward = jax.jit(lambda params: case.rewards(params)["reward"])
    state, rewards, path = create_state(case.params, optimizer, capacity=5), [], [case.params]
    for t in range(24):
        state = step(state)
        path.append(state.params)
        if (t + 1) % 3 == 0:
            rewards.append(float(reward(state.params)))
    (row,) = (r for r in rows if r.get("algorithm") == "clip" and r["max_staleness"] == 3 and r["learning_rate"] == 0.5)
    np.testing.assert_allclose(row["reward"][2], rewards, rtol=1e-3)  # recorded with four digits
    drift = [float(metrics.drift(path[t], path[max(t - 3, 0)])["drift/from_behavior"]) for t in range(3, 25, 3)]
    windows = np.reshape(drift, (2, 4)).mean(axis=1)
    np.testing.assert_allclose(row["windows"]["drift/from_behavior"][2], windows, rtol=1e-2)  # recorded with three

    np.testing.assert_allclose(row["msd"][2][row["msd_lags"].index(3)], np.mean(np.square(drift)), rtol=1e-2)


def test_cosines_of_exact_updates_are_those_of_neighboring_gradients():
    config = tiny_config()
    case = sweep_run.build_case(config, "bandit", "no_is")
    program = sweeps.training_grid(
        case.update_gradient("exact"), lambda learner, behavior: case.rewards(learner), case.optimizer_fn, capacity=4
    )
    schedule = experiment.Cell("periodic", 2, 0).staleness(0, 9)
    curves = program(case.params, np.array([0.5]), schedule[None], jax.random.split(jax.random.key(0), 1), np.arange(1, 9))
    np.testing.assert_allclose(curves.values["grad/cosine_twin"], 1, rtol=1e-12)  # nothing is drawn
    params, gradients, gradient = [case.params], [], jax.jit(case.gradient)
    for t, lag in enumerate(schedule):
        gradients.append(gradient(params[t], params[t - min(lag, t)]))
        params.append(jax.tree.map(lambda p, g: p + 0.5 * g, params[t], gradients[t]))
    cosines = [float(metrics.gradient_cosine(gradients[t], gradients[t - 1])) for t in range(1, 9)]
    np.testing.assert_allclose(curves.values["grad/cosine_prev"][0], cosines, rtol=1e-10)
    assert curves.values["staleness/realised"][0].tolist() == [1, 2, 0, 1, 2, 0, 1, 2]


def test_exact_off_policy_measures_agree_with_their_definitions():
    case = sweep_run.build_case(tiny_config(), "bandit", "no_is")
    other = jax.tree.map(lambda leaf: leaf + 0.3 * np.sin(np.arange(leaf.size)).reshape(leaf.shape), case.params)
    found = exact.off_policy(case.policy, other, case.params, case.task)
    p, q = (np.exp(exact.task_logprobs(case.policy, params, case.task).sum(-1)) for params in (other, case.params))
    ratio = p / q
    expected = {
        "off_policy/kl": (q * (ratio - 1 - np.log(ratio))).sum(1).mean(),  # k3
        "off_policy/ess_ratio": 1 / (p**2 / q).sum(1).mean(),
        "off_policy/second_moment": (q * np.log(ratio) ** 2).sum(1).mean(),  # one token a completion
        "off_policy/tv": np.maximum(p - q, 0).sum(1).mean(),
        "entropy": -(p * np.log(p)).sum(1).mean(),
    }
    assert set(found) == set(expected)
    apart = exact.off_policy(case.policy, jax.tree.map(np.zeros_like, other), jax.tree.map(lambda x: 1e3 * x, other), case.task)
    assert apart["off_policy/ess_ratio"] == 0  # 0·inf would be NaN, and scale_by_ess with it
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_boundaries_are_read_off_the_records_at_any_horizon():
    """Planted curves: at η = 1, 2 all seeds learn; at 4 they fall behind half of the horizon; at 8 at once."""
    steps = np.arange(10, 101, 10)
    good, late, early = np.linspace(0.5, 1, 10), np.r_[np.linspace(0.5, 1, 5), np.full(5, 0.1)], np.full(10, 0.1)
    rows = [dict(kind="start", case="c", reward=0.4, ceiling=1.0)]
    for rate, curve in ((4.0, late), (1.0, good), (8.0, early), (2.0, good)):
        cell = dict(case="c", algorithm="a", schedule="fixed", max_staleness=1, learning_rate=rate, steps=steps.tolist())
        rows.append(dict(kind="cell", **cell, reward=np.tile(curve, (20, 1)).tolist(), seeds=list(range(20))))
    config = dict(rule={}, level=0.8, confidence=0.9)
    whole, half = sweep_summary.summary(rows, config, {})["boundaries"]
    assert (whole["horizon"], half["horizon"]) == (100.0, 50.0)
    assert whole["status"] == half["status"] == "found"
    assert 2 < whole["eta_80"] < 4 < half["eta_80"] < 8  # a shorter horizon forgives what falls later
    assert whole["outcomes"] == [{"success": 20}, {"success": 20}, {"fall": 20}, {"fall": 20}]
    said = sweep_summary.table({"boundaries": [whole]})
    assert f"{whole['eta_80']:.3g}" in said and "fall 40" in said


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("precision", "bfloat16", "config.precision is 'bfloat16'; it must be one of"),
        ("rule.keep", 1.5, "config.rule: keep"),
        ("rule.typo", 0.5, "config.rule: .*typo"),
        ("algorithms", {}, "config.algorithms is empty"),
        ("algorithms.clip.loss_options", dict(epsilon=0.1), "config.loss .* refuses its options"),
        ("algorithms.clip.control", "optax.nothing", "config.algorithms.clip.control is 'optax.nothing'"),
        ("cases.bandit.algorithms", ("clip", "tis"), "config.cases.bandit.algorithms is .*it must name some of"),
        ("cases.bandit.updates", "both", "config.cases.bandit.updates is 'both'"),
        ("cases.bandit.num_updates", 25, "num_updates is 25; it must be a multiple of num_measurements = 8"),
        ("cases.bandit.max_staleness", (0, 24), "never sees such a lag"),
        ("cases.bandit.learning_rates", (0.5, 0.5), "0.5 stands there twice"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_field(path, value, message):
    config = tiny_config()
    *parents, last = path.split(".")
    part = config
    for parent in parents:
        part[parent] = dict(part[parent])
        part = part[parent]
    part[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        sweep_run.validate(config)
    assert "\n" not in str(caught.value)


def test_control_stands_behind_the_optimizer():
    config = tiny_config()
    control = dict(control="optax.scale", control_options=dict(step_size=0.5))
    config["algorithms"] = {"no_is": ALGORITHMS["no_is"], "half": sweep_digits.algorithm("reinforce", **control)}
    plain, half = (sweep_run.build_case(config, "bandit", name).optimizer_fn(1.0) for name in ("no_is", "half"))
    gradient = {"table": np.ones((6, 5))}
    updates = [optimizer.update(gradient, optimizer.init(gradient))[0]["table"] for optimizer in (plain, half)]
    np.testing.assert_array_equal(updates[1], 0.5 * updates[0])


def test_the_job_prints_the_plan_and_the_table(finished, tmp_path):
    config, _, data = finished
    (tmp_path / "config.py").write_text(
        "import ml_collections\nfrom tests.test_sweeps import tiny_config\n"
        "def get_config():\n    return ml_collections.ConfigDict(tiny_config())\n"
    )
    (tmp_path / "run").mkdir()
    records.write_json(tmp_path / "run" / "config.json", config)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(data)  # as if it had run: only the table is left to make
    flags = dict(config=str(tmp_path / "config.py"), workdir=str(tmp_path / "run"))
    for dry_run, expected in (("true", "4 chunks"), ("false", "failures at higher eta")):
        with (
            flagsaver.as_parsed(**flags, dry_run=dry_run, overwrite="false"),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            assert launch_sweep.main() == 0
        assert expected in said.getvalue()
    assert "compilation" not in said.getvalue()  # nothing was
    written = ("summary.json", *sweep_summary.FIGURES)
    assert scaling.OUTCOMES[0] == "success" and all((tmp_path / "run" / name).exists() for name in written)
