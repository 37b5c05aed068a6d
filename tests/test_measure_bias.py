"""The main job from its command line to its files: what it writes, refuses, resumes and survives."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache

from jax_async_grpo import bias_run, bias_summary, diagnostics, experiment, losses, records, staleness, sweeps
from launch import command_line, measure_bias

ROOT = Path(__file__).resolve().parent.parent
RATES = (0.01, 0.02, 0.04)
CONFIG = f"""
from configs import measure_bias

def get_config():
    config = measure_bias.get_config()
    config.num_bootstrap = 100
    config.cases = {{"tabular": config.cases.tabular}}
    config.cases.tabular.update(dict(
        schedules=("fixed", "periodic"), max_staleness=(0, 1, 3), learning_rates={RATES}, time_window=(0.5, 1.5),
        num_measurements=8, num_seeds=4))
    return config
"""
CASE = "--config.cases.tabular."
EXACT = f"{CASE}updates=('exact',)"  # what takes less time where sampled updates add nothing

Result = collections.namedtuple("Result", "code out err")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def job(*arguments, stderr=io.StringIO) -> Result:
    """`python -m launch.measure_bias ARGUMENTS` in this process."""
    out, err, argv = io.StringIO(), stderr(), sys.argv
    sys.argv = ["launch/measure_bias.py", *map(str, arguments)]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line.run(measure_bias.main)
    except SystemExit as stop:
        return Result(stop.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Runs of this module share compiled programs through a cache on disk: what they differ in is not what is compiled."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # one for all workers
    settings = {
        "jax_compilation_cache_dir": str(folder / "measure_bias_cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX asks for the folder once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return f"--config={path}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config_file):
    """A whole run of the tiny config: (workdir, result). Tests only read it."""
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    result = job(config_file, f"--workdir={workdir}")
    assert result.code == 0, result.err
    return workdir, result


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    for file in finished[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rows_of(workdir: Path) -> list[dict]:
    return records.read_jsonl(workdir / "metrics.jsonl")


def measured_rows(workdir: Path) -> list[str]:
    """All rows in a canonical order, without the time they took."""
    return sorted(json.dumps(row | {"seconds": None}, sort_keys=True) for row in rows_of(workdir))


def summary_of(workdir: Path) -> dict:
    """summary.json without what may differ between two runs."""
    summary = records.read_json(workdir / "summary.json")
    return {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


# What a run writes.


def test_the_files_of_a_run_are_there_and_nothing_else(finished):
    workdir, _ = finished
    assert sorted(file.name for file in workdir.iterdir()) == ["bias.png", "config.json", "metrics.jsonl", "summary.json"]
    config = records.read_json(workdir / "config.json")
    assert config["cases"]["tabular"]["max_staleness"] == [0, 1, 3] and config["num_bootstrap"] == 100
    assert config["cases"]["tabular"]["optimizer"] == "optax.sgd"  # defaults stand there too
    assert (workdir / "bias.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_measured_step_of_every_cell_has_a_row(finished):
    rows = rows_of(finished[0])
    kinds = collections.Counter((row["kind"], row["updates"]) for row in rows)
    runs = len(RATES) * 2 * 3  # times schedules, times S
    assert kinds == {
        ("measurement", "exact"): runs * 8,
        ("measurement", "sampled"): 4 * runs * 8,
        ("cell", "exact"): runs,
        ("cell", "sampled"): 4 * runs,
        ("chunk", "exact"): len(RATES),
        ("chunk", "sampled"): len(RATES),
        ("diagnostics", "exact"): 1,
        ("response", "sampled"): 1,
    }
    assert all(row["policy"] == "tabular" and row["task"] == "bandit" for row in rows if row["kind"] == "measurement")


def test_without_staleness_the_bias_is_exactly_zero_and_with_it_it_is_not(finished):
    for row in (row for row in rows_of(finished[0]) if row["kind"] == "measurement"):
        stale = row["staleness/realised"] > 0
        lag = row["max_staleness"]
        assert row["staleness/realised"] == (row["step"] % (lag + 1) if row["schedule"] == "periodic" else lag)
        for name in ("bias/norm", "bias/relative_norm", "drift/from_behavior"):
            assert (row[name] > 1e-6) if stale else (row[name] == 0.0)
        assert abs(row["bias/cosine"] - 1) < (0.01 if stale else 1e-12)
    assert records.read_json(finished[0] / "summary.json")["max_bias_without_staleness"] == 0.0


def test_rows_agree_with_a_plain_loop(finished):
    """One cell by hand: θ_{t+1} = θ_t + η H(θ_t, θ_{t−s_t}), and δ_t from the definition."""
    config = records.read_json(finished[0] / "config.json")
    case = experiment.build_case(config, "tabular")
    gradient = jax.jit(case.gradient)
    rate, lags = RATES[2], staleness.periodic(3, 60)
    versions = [case.params["table"]]
    biases = []
    for step, lag in enumerate(lags):
        learner, behavior = ({"table": versions[step - s]} for s in (0, min(lag, step)))
        stale, fresh = (gradient(learner, other)["table"] for other in (behavior, learner))
        biases.append(float(np.linalg.norm(stale - fresh)))
        versions.append(versions[step] + rate * stale)
    cell = {"kind": "measurement", "updates": "exact", "schedule": "periodic", "max_staleness": 3, "learning_rate": rate}
    rows = [row for row in rows_of(finished[0]) if cell.items() <= row.items()]
    assert len(rows) == 8 and len({row["staleness/realised"] for row in rows}) > 2
    for row in rows:
        step = row["step"]
        drift = np.linalg.norm(versions[step] - versions[step - lags[step]])
        np.testing.assert_allclose(row["bias/norm"], biases[step], rtol=1e-9)
        np.testing.assert_allclose(row["drift/from_behavior"], drift, rtol=1e-12)
        assert 0.5 - rate <= rate * step <= 1.5


def test_the_summary_holds_what_is_promised(finished):
    summary = records.read_json(finished[0] / "summary.json")
    promised = "fits linear_response_error decomposition stability_limit seconds versions complete msd num_cells"
    assert set(promised.split()) <= set(summary)
    assert summary["complete"] is True and summary["num_cells"] == 90 and summary["seconds"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    assert [(fit["updates"], fit["schedule"]) for fit in summary["fits"]] == [
        (updates, schedule) for updates in ("exact", "sampled") for schedule in ("fixed", "periodic", "all")
    ]
    exponents = ("staleness_exponent", "learning_rate_exponent", "exponent")
    for fit in summary["fits"]:
        named = {key: fit[key] for key in ("policy", "task", "optimizer", "loss")}
        assert named == {"policy": "tabular", "task": "bandit", "optimizer": "sgd", "loss": "ppo_clip"}
        assert fit["num_cells"] == (2 - (fit["schedule"] != "all")) * 6 * (4 if fit["updates"] == "sampled" else 1)
        assert fit["staleness_range"] == [1, 3]
        for name in exponents:
            low, high = fit["intervals"][name]
            assert low <= high and low - 1e-9 <= fit[name] <= high + 1e-9 and math.isfinite(low + high)
        if fit["updates"] == "exact":
            assert all(abs(fit[name] - 1) < 0.02 for name in exponents) and 0.995 <= fit["r_squared"] <= 1
    assert summary["linear_response_error"]["tabular"]["relative_error_at_1e-3"] < 1e-3
    assert abs(sum(summary["decomposition"]["tabular"]["share"].values()) - 1) < 1e-9
    limit = summary["stability_limit"]["tabular"]
    # at the reference cell: the middle rate, the fixed schedule, S = 3
    assert limit["learning_rate"] == RATES[1] and limit["staleness_budget"].startswith("S=3, T=")
    assert limit["headroom"] > 1 and limit["batch_clip_radius"] > 0
    assert limit["regime"] == "horizon not measured" and limit["horizon_limit"] is limit["critical_drift_radius"] is None


def test_sampled_updates_have_another_law_and_the_first_order_law_predicts_it(finished):
    fits = {(fit["updates"], fit["schedule"]): fit for fit in records.read_json(finished[0] / "summary.json")["fits"]}
    sampled, exact = fits["sampled", "all"], fits["exact", "all"]
    assert sampled["intervals"]["staleness_exponent"][1] < 0.95 < exact["staleness_exponent"]
    assert 0.85 < sampled["learning_rate_exponent"] < 1.05
    # distance alone is rejected, distance as the gradient sees it is not
    rejected = {name: prediction["rejected"] for name, prediction in sampled["predictions"].items()}
    assert rejected == {"drift": True, "msd": True, "response_msd": False}
    assert abs(sampled["predictions"]["response_msd"]["staleness_exponent"] - sampled["staleness_exponent"]) < 0.06
    assert sampled["predictions"]["response_msd"]["learning_rate_exponent"] is None
    assert not any(prediction["rejected"] for prediction in exact["predictions"].values())
    assert "is rejected here" in finished[1].out and "first-order law along runs without lag, same seeds" in finished[1].out


def test_the_exponent_between_neighboring_staleness_is_that_of_the_two(finished):
    """From the cells themselves, whose schedules, rates and seeds match."""
    config = records.read_json(finished[0] / "config.json")
    cells = bias_summary.cells(rows_of(finished[0]), config)
    for fit in records.read_json(finished[0] / "summary.json")["fits"]:
        (local,) = fit["local_exponents"]
        assert local["max_staleness"] == [1, 3] and local["num_pairs"] == fit["num_cells"] / 2
        low, high = local["interval"]
        assert low < local["exponent"] < high
        if fit["schedule"] == "fixed":  # S_rms is 1 and 3 in all of them
            mine = [c for c in cells if (c["updates"], c["schedule"]) == (fit["updates"], "fixed")]
            means = [np.mean([math.log(c["bias_rms"]) for c in mine if c["max_staleness"] == s]) for s in (1, 3)]
            assert local["exponent"] == pytest.approx((means[1] - means[0]) / math.log(3), rel=1e-9)


SMALL = (EXACT, f"{CASE}first_order=False", f"{CASE}schedules=('fixed',)")


def test_a_schedule_without_lag_at_the_last_step_is_diagnosed_all_the_same(tmp_path, config_file):
    small = (f"{CASE}max_staleness=(0, 1)", f"{CASE}learning_rates=(0.02, 0.04, 0.16)", "--config.seed=2")
    result = job(config_file, EXACT, f"{CASE}schedules=('random',)", *small, f"--workdir={tmp_path}")
    assert result.code == 0, result.err
    rows, summary = rows_of(tmp_path), records.read_json(tmp_path / "summary.json")
    (diagnosed,) = (row for row in rows if row["kind"] == "diagnostics")
    reference = {key: diagnosed[key] for key in ("learning_rate", "max_staleness", "schedule", "step")}
    assert reference == {"learning_rate": 0.04, "max_staleness": 1, "schedule": "random", "step": diagnosed["step"]}
    (last,) = (row for row in rows if row["kind"] == "measurement" and reference.items() <= row.items())
    assert last["staleness/realised"] == 0 and diagnosed["pair_staleness"] == 1 and diagnosed["drift"] > 1e-3
    limit = summary["stability_limit"]["tabular"]
    assert 0 < limit["batch_clip_radius"] < math.inf and 0 < limit["max_learning_rate"] < math.inf
    assert summary["linear_response_error"]["tabular"]["relative_error_at_1e-3"] < 1e-3
    assert sum(summary["decomposition"]["tabular"]["share"].values()) == pytest.approx(1)
    assert "unbounded" not in result.out
    # at the largest rate strata are narrower than an update: a step counts once
    (chunk,) = (row for row in rows if row["kind"] == "chunk" and row["learning_rate"] == 0.16)
    steps = [row["step"] for row in rows if row["kind"] == "measurement" and row["learning_rate"] == 0.16]
    assert chunk["num_measurements"] == len(set(steps)) == 6 and len(steps) == 2 * 6


def test_without_staleness_a_run_is_complete_and_not_built_again(tmp_path, config_file, monkeypatch):
    arguments = (config_file, *SMALL, f"{CASE}max_staleness=(0,)", f"{CASE}learning_rates=(0.02,)", f"--workdir={tmp_path}")
    result = job(*arguments)
    assert result.code == 0, result.err
    summary = records.read_json(tmp_path / "summary.json")
    assert summary["complete"] is True and summary["fits"] == []
    limit = summary["stability_limit"]["tabular"]
    assert limit["batch_clip_radius"] is limit["max_learning_rate"] is limit["headroom"] is None
    assert "no eta_max found (horizon not measured)" in result.out and "R_batch not measured" in result.out
    monkeypatch.setattr(bias_run, "build_case", forbidden)
    assert job(*arguments).code == 0
    assert summary_of(tmp_path) == {key: value for key, value in summary.items() if key not in ("seconds", "versions")}


def test_float32_parameters_are_held_to_float32(tmp_path, config_file):
    low = (f"{CASE}policy_options.dtype=float32", f"{CASE}learning_rates=(0.02,)", f"{CASE}schedules=('fixed',)")
    result = job(config_file, EXACT, *low, f"--workdir={tmp_path}")
    assert result.code == 0, result.err
    (diagnosed,) = (row for row in rows_of(tmp_path) if row["kind"] == "diagnostics")
    assert 1e-12 < diagnosed["invariants"]["recorded_behavior_logprobs"] < 1e-5


def test_what_is_printed_is_what_is_in_the_summary(finished):
    workdir, result = finished
    summary = records.read_json(workdir / "summary.json")
    chunks = [line for line in result.out.split("\n") if line.startswith("tabular/")]
    assert [line.split(":")[0] for line in chunks] == [f"tabular/{u}/{r}" for u in ("exact", "sampled") for r in RATES]
    for fit in summary["fits"]:
        low, high = fit["intervals"]["staleness_exponent"]
        assert f"{fit['staleness_exponent']:.2f} [{low:.2f}, {high:.2f}]" in result.out
    assert summary["stability_limit"]["tabular"]["staleness_budget"].split(", eta_max")[0] in result.out
    assert str(workdir / "summary.json") in result.out and str(workdir / "bias.png") in result.out
    assert result.err == ""


# A second run, and what an interrupted one leaves.


def forbidden(*_, **__):
    raise AssertionError("something was measured")


def test_a_second_run_measures_nothing_and_says_the_same(copy_of_finished, config_file, finished, monkeypatch):
    monkeypatch.setattr(sweeps, "bias_grid", forbidden)
    rows = (copy_of_finished / "metrics.jsonl").read_bytes()
    for name in ("summary.json", "bias.png"):
        (copy_of_finished / name).unlink()
    result = job(config_file, f"--workdir={copy_of_finished}")
    assert result.code == 0 and result.out.count("recorded before") == 6
    assert (copy_of_finished / "metrics.jsonl").read_bytes() == rows
    assert summary_of(copy_of_finished) == summary_of(finished[0])
    assert (copy_of_finished / "bias.png").read_bytes() == (finished[0] / "bias.png").read_bytes()


def test_the_summary_comes_from_records_and_config_alone(finished, monkeypatch):
    monkeypatch.setattr(experiment, "build_case", forbidden)
    config = records.read_json(finished[0] / "config.json")
    stored = json.loads((finished[0] / "summary.json").read_text())
    result = bias_summary.summary(rows_of(finished[0]), config, {"jax": "of another machine"})
    assert records.to_plain(result) == stored | {"versions": {"jax": "of another machine"}}
    assert bias_summary.summary([], config, {})["complete"] is False


def test_ctrl_c_leaves_what_was_measured_and_the_next_run_goes_on(tmp_path, config_file, finished, monkeypatch):
    original = bias_run._run_chunk

    def interrupted(config, case, chunk, *arguments):
        measured = original(config, case, chunk, *arguments)
        if chunk.learning_rate == RATES[1]:
            os.kill(os.getpid(), signal.SIGINT)
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(bias_run, "_run_chunk", interrupted)
        result = job(config_file, EXACT, f"--workdir={tmp_path}")
    assert result.code == 130 and "the same command goes on from there" in result.err
    assert {row["chunk"] for row in rows_of(tmp_path)} == {f"tabular/exact/{RATES[0]}"}
    summary = records.read_json(tmp_path / "summary.json")
    assert summary["complete"] is False and summary["num_cells"] == 6

    result = job(config_file, EXACT, f"--workdir={tmp_path}")
    assert result.code == 0 and result.out.count("recorded before") == 1
    assert measured_rows(tmp_path) == [row for row in measured_rows(finished[0]) if json.loads(row)["updates"] == "exact"]
    both, mine = summary_of(finished[0]), summary_of(tmp_path)
    assert mine["complete"] is True and mine["fits"] == both["fits"][:3] and mine["stability_limit"] == both["stability_limit"]


def test_a_ctrl_c_that_is_lost_in_a_callback_of_jax_counts_after_the_chunk(tmp_path, config_file, monkeypatch):
    ran = []

    def lose_one(config, workdir, on_progress):
        for chunk in experiment.chunks(config):
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            ran.append(chunk.name)
            on_progress(chunk, 1.0)

    monkeypatch.setattr(bias_run, "run_chunks", lose_one)
    before = signal.getsignal(signal.SIGINT)
    result = job(config_file, f"--workdir={tmp_path}")
    assert result.code == 130 and ran == [f"tabular/exact/{RATES[0]}"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_summary_is_made_loses_nothing(copy_of_finished, config_file, monkeypatch):
    before = {file.name: file.read_bytes() for file in copy_of_finished.iterdir()}

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(bias_summary, "summary", interrupt)
    result = job(config_file, f"--workdir={copy_of_finished}")
    assert result.code == 130 and "Traceback" not in result.err and "Interrupted" in result.err
    assert {file.name: file.read_bytes() for file in copy_of_finished.iterdir()} == before


def test_a_chunk_that_was_cut_off_is_run_again_and_counted_once(copy_of_finished, config_file, finished):
    lines = (copy_of_finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    name = f"tabular/exact/{RATES[2]}"
    kept = [line for line in lines if json.loads(line)["kind"] != "chunk" or json.loads(line)["chunk"] != name]
    assert len(kept) == len(lines) - 1
    # what the dead run wrote last was torn; its measured rows are wrong on purpose: they must not be used
    wrong = [re.sub(r'"bias/norm": \d', '"bias/norm": 9', line) if f'"{name}"' in line else line for line in kept]
    assert wrong != kept
    (copy_of_finished / "metrics.jsonl").write_text("".join(wrong) + kept[-1][:40])
    with pytest.warns(UserWarning, match="cut off"):
        result = job(config_file, f"--workdir={copy_of_finished}")
    assert result.code == 0 and result.out.count("recorded before") == 5
    assert summary_of(copy_of_finished) == summary_of(finished[0])


def test_a_violated_invariant_is_named_and_its_chunk_not_recorded(tmp_path, config_file, monkeypatch):
    original = sweeps.bias_grid

    def violating(*arguments, **options):
        program = original(*arguments, **options)

        def run(params, learning_rate, *rest):
            measured = program(params, learning_rate, *rest)
            if learning_rate != RATES[1]:
                return measured
            wrong = measured.violations["ring_version"].at[4, 5].set(2.0)  # periodic S=1 at the sixth measured step
            return measured._replace(violations=measured.violations | {"ring_version": wrong})

        return run

    monkeypatch.setattr(sweeps, "bias_grid", violating)
    step = experiment.chunks(_loaded(config_file))[1].measure_steps[5]
    result = job(config_file, EXACT, f"--workdir={tmp_path}")
    violation_line(result, "tabular/exact/0.02", "periodic S=1 seed 0", f"ring_version violated at step {step}: 2 > ")
    assert {row["chunk"] for row in rows_of(tmp_path)} == {f"tabular/exact/{RATES[0]}"}
    summary = records.read_json(tmp_path / "summary.json")
    assert summary["complete"] is False and summary["num_cells"] == 6


def violation_line(result: Result, *words: str) -> None:
    assert result.code == 1 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err, result.err


def test_a_single_seed_gives_no_fit_and_no_error(finished):
    config = records.read_json(finished[0] / "config.json")
    rows = [row for row in rows_of(finished[0]) if not row.get("seed")]
    fits = bias_summary.summary(rows, config, {})["fits"]
    assert {fit["updates"] for fit in fits} == {"exact"}  # nothing to resample, so no interval


def test_an_invariant_that_fails_in_the_diagnostics_costs_no_finished_chunk(tmp_path, config_file, monkeypatch):
    violations = {"recorded_behavior_logprobs": 0.5, "zero_sum_advantages": diagnostics.NOT_APPLICABLE}
    monkeypatch.setattr(diagnostics, "invariant_violations", lambda *_: violations)
    result = job(config_file, EXACT, f"--workdir={tmp_path}")
    violation_line(result, f"tabular/exact/{RATES[1]}", "fixed S=3 seed 0", "recorded_behavior_logprobs", "0.5 > ")
    assert bias_run.finished_chunks(rows_of(tmp_path)) == {f"tabular/exact/{rate}" for rate in RATES[:2]}
    assert "diagnostics" not in {row["kind"] for row in rows_of(tmp_path)}


def test_rollouts_of_sampled_updates_are_held_to_their_records(tmp_path, config_file, monkeypatch):
    original = experiment.Case.rollouts

    def drawn_elsewhere(case, key, behavior_params, step, policy_version):
        elsewhere = jax.tree.map(lambda leaf: 1.001 * leaf, behavior_params)
        rollouts = original(case, key, behavior_params, step, policy_version)
        recorded = original(case, key, elsewhere, step, policy_version).behavior_logprobs
        return dataclasses.replace(rollouts, behavior_logprobs=recorded)

    monkeypatch.setattr(experiment.Case, "rollouts", drawn_elsewhere)
    sampled = (f"{CASE}updates=('sampled',)", f"{CASE}num_seeds=1", f"{CASE}schedules=('fixed',)")
    result = job(config_file, *sampled, f"--workdir={tmp_path}")
    violation_line(result, f"tabular/sampled/{RATES[0]}", "fixed S=3 seed 0", "recorded_behavior_logprobs")
    assert not (tmp_path / "metrics.jsonl").exists()


def _loaded(config_file: str) -> dict:
    namespace: dict = {}
    exec(Path(config_file.partition("=")[2]).read_text(), namespace)
    return namespace["get_config"]().to_dict()


# What a run is told.


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr(bias_run, "run_chunks", forbidden)
    for arguments in ((), (f"--workdir={tmp_path / 'new'}",)):
        result = job(config_file, "--dry_run", *arguments)
        assert result.code == 0 and result.err == ""
        assert [line.split()[:3] for line in result.out.split("\n")[1:3]] == [
            ["tabular", "exact", "18"],
            ["tabular", "sampled", "72"],
        ]
    assert list(tmp_path.iterdir()) == []


def test_the_job_turns_float64_on_by_itself(config_file):
    jax.config.update("jax_enable_x64", False)
    try:
        assert job(config_file, "--dry_run").code == 0
        assert jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", True)


def test_on_a_terminal_a_bar_shows_the_progress(copy_of_finished, config_file, monkeypatch):
    monkeypatch.setattr(sweeps, "bias_grid", forbidden)
    result = job(config_file, f"--workdir={copy_of_finished}", stderr=Terminal)
    assert result.code == 0 and "recorded before" not in result.out and "6/6" in result.err


def my_own_loss(logprobs, old_logprobs, advantages, mask=None):
    return losses.ppo_clip(logprobs, old_logprobs, advantages, mask, epsilon_low=0.2, epsilon_high=0.2)


def test_a_users_own_loss_runs_by_its_dotted_name(tmp_path, config_file, finished):
    own = (f"--config.loss={__name__}.my_own_loss", "--config.loss_options={}")
    result = job(config_file, EXACT, *own, f"--workdir={tmp_path}")
    assert result.code == 0, result.err
    mine, theirs = (records.read_json(workdir / "summary.json")["fits"][:3] for workdir in (tmp_path, finished[0]))
    assert [fit["loss"] for fit in mine] == ["my_own_loss"] * 3
    assert [fit | {"loss": "ppo_clip"} for fit in mine] == theirs


def test_a_workdir_of_another_config_is_refused_and_overwrite_starts_afresh(copy_of_finished, config_file, monkeypatch):
    monkeypatch.setattr(bias_run, "run_chunks", lambda *_: None)
    (copy_of_finished / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in copy_of_finished.iterdir()}
    other = (config_file, "--config.seed=1", f"{CASE}num_seeds=3", f"--workdir={copy_of_finished}")
    refused_line(job(*other), "seed is 0 there and 1 here", "num_seeds is 4 there and 3 here", "--overwrite")
    assert {file.name: file.read_bytes() for file in copy_of_finished.iterdir()} == before
    assert job(*other, "--overwrite").code == 0
    assert records.read_json(copy_of_finished / "config.json")["seed"] == 1
    assert not (copy_of_finished / "metrics.jsonl").exists() and not (copy_of_finished / "bias.png").exists()
    assert records.read_json(copy_of_finished / "summary.json")["complete"] is False
    assert (copy_of_finished / "notes.txt").read_text() == "mine"


# What is refused: exit code 2 and one line, before anything is measured or written.


def refused_line(result: Result, *words: str) -> None:
    assert result.code == 2 and result.out == "", result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err, result.err


def coupled_loss(logprobs, old_logprobs, advantages, mask=None):
    return my_own_loss(logprobs, old_logprobs, advantages - advantages.mean(), mask)


def hiding_loss(logprobs, old_logprobs, advantages, mask=None):
    return -jax.lax.stop_gradient(jax.numpy.exp(logprobs - old_logprobs)) * advantages[..., None] * logprobs


MINE = __name__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"{CASE}max_staleness=(0, -1)",), ("config.cases.tabular.max_staleness is -1", ">= 0")),
        ((f"{CASE}learning_rates=(0.,)",), ("config.cases.tabular.learning_rates is 0.0", "> 0")),
        ((f"{CASE}learning_rates=(-0.1,)",), ("config.cases.tabular.learning_rates is -0.1", "> 0")),
        ((f"{CASE}learning_rates=(nan,)",), ("config.cases.tabular.learning_rates is '(nan,)'", "> 0")),
        (("--config.group_size=1",), ("config.advantage", "group_size is 1", "group_size >= 2")),
        (("--config.loss_options.epsilon_low=0.",), ("config.loss", "epsilon_low is 0.0", "(0, 1]")),
        (("--config.loss_options.epsilon=0.1",), ("config.loss", "'epsilon'")),
        (("--config.nope=1",), ("config.nope is not a key", "the keys are seed,")),
        ((f"{CASE}nope=1",), ("config.cases.tabular.nope is not a key", "the keys are policy,")),
        (
            ("--config.cases.tabluar.num_seeds=1",),
            ("--config.cases.tabluar.num_seeds=1: there is no tabluar; there are tabular\n",),
        ),
        (("--config.seed=one",), ("--config.seed=one must be an integer\n",)),
        (("--config.seed=1.5",), ("--config.seed=1.5 must be an integer\n",)),
        (("--config.cases=tabular",), ("--config.cases=tabular must be a dict",)),
        (("--config.max_compositions=20",), ("36 compositions", "max_compositions = 20", "lower group_size")),
        (("--config.loss=jax_async_grpo.losses.ppo_clp",), ("config.loss is", "no attribute 'ppo_clp'")),
        ((f"{CASE}task=my_tasks.task",), ("config.cases.tabular.task is 'my_tasks.task'", "No module named 'my_tasks'")),
        ((f"{CASE}policy_options.depth=2",), ("config.cases.tabular.policy (", "depth")),
        ((f"--config.loss={MINE}.coupled_loss", "--config.loss_options={}"), ("config.loss is", "couples rows")),
        ((f"--config.loss={MINE}.hiding_loss", "--config.loss_options={}"), ("config.loss is", "stop_gradient")),
        (("--nope",), ("nope", "--help")),
        (("--overwrit",), ("overwrit", "--help")),
        (("--dry_run=perhaps",), ("--dry_run=perhaps",)),
        (("tabular",), ("unexpected argument 'tabular'", "--name=value")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(tmp_path, config_file, monkeypatch, arguments, words):
    monkeypatch.setattr(bias_run, "run_chunks", forbidden)
    workdir = tmp_path / "run"
    refused_line(job(config_file, f"--workdir={workdir}", *arguments), *words)
    assert not workdir.exists()


def test_rows_of_unequal_length_refuse_a_token_mean(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr(bias_run, "run_chunks", forbidden)
    task = (f"{CASE}task=test_experiment.two_lengths", f"{CASE}task_options={{}}")
    aggregation = "--config.aggregation=jax_async_grpo.aggregation.token_mean"
    result = job(config_file, f"--workdir={tmp_path / 'run'}", *task, aggregation)
    refused_line(result, "config.aggregation is", "unequal lengths", "use sequence_mean")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot be read", "No such file")),
        ("def get_config(:\n", ("the config file: SyntaxError", "line 1")),
        ("def get_config():\n    return no_such_name\n", ("the config file: NameError", "no_such_name", "line 2")),
        ("import no_such_module\n", ("the config file: ModuleNotFoundError", "no_such_module")),
        ("def get_config():\n    return {'seed': 0}\n", ("get_config() returns dict", "ConfigDict")),
        ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict(dict(seed=0))\n", ("is missing",)),
    ],
    ids=["missing", "syntax", "name", "import", "dict", "keys"],
)
def test_config_files_that_cannot_be_used_are_one_line(tmp_path, content, words):
    path = tmp_path / "bad_config.py"
    if content is not None:
        path.write_text(content)
    refused_line(job(f"--config={path}", f"--workdir={tmp_path / 'run'}"), *words)
    assert not (tmp_path / "run").exists()


def test_forgotten_flags_are_named(tmp_path, config_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = "--config=configs/measure_bias.py", "--workdir=DIR (or --dry_run)"
    refused_line(job(), f"give {config} and {workdir}\n")
    for arguments in ((config_file,), (config_file, "--workdir=")):
        refused_line(job(*arguments), f"give {workdir}\n")
    for arguments in ((f"--workdir={tmp_path}",), ("--dry_run",)):
        refused_line(job(*arguments), f"give {config}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a file", "under a file", "not writable"])
def test_workdirs_that_cannot_be_used_are_one_line(tmp_path, config_file, monkeypatch, kind):
    monkeypatch.setattr(bias_run, "run_chunks", forbidden)
    (tmp_path / "file").write_text("x")
    workdir = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "run"}.get(kind, tmp_path / "new")
    if kind == "not writable":

        def refuse(self, *_, **__):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no mode stops
    refused_line(job(config_file, f"--workdir={workdir}"), f"workdir={workdir}", "folder" if kind == "a file" else "--workdir")
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_one_line_and_keeps_the_records(copy_of_finished, config_file, monkeypatch):
    rows = (copy_of_finished / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.Workdir, "write_summary", full)
    result = job(config_file, f"--workdir={copy_of_finished}")
    assert result.code == 2 and result.err == "error: [Errno 28] No space left on device\n"
    assert (copy_of_finished / "metrics.jsonl").read_bytes() == rows


PROGRAM = """
import atexit, os, signal, sys, warnings
from launch import command_line

def main():
    print("measured", end="")  # no line's end: the stream is to be flushed
    warnings.warn("scores are\\nnot cached")
    if "catch" in sys.stdin.read():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            return 130
    return {code}

atexit.register(print, ", torn down", end="")
if __name__ == "__main__":
    command_line.run(main)
"""


@pytest.mark.parametrize(
    ("code", "stdin", "left", "out", "err"),
    [
        ("0", "", 0, "measured, torn down", ""),
        ("2", "", 2, "measured, torn down", ""),
        ("130", "catch", 130, "measured", ""),
        ("os.kill(os.getpid(), signal.SIGINT)", "", 130, "measured", "\nInterrupted.\n"),
    ],
)
def test_as_a_program_it_warns_in_one_line_and_leaves_at_once_when_interrupted(tmp_path, code, stdin, left, out, err):
    """A compiled program that was left behind crashes the interpreter while it is torn down, so it is not."""
    script = tmp_path / "job.py"
    script.write_text(PROGRAM.format(code=code))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr) == (left, out, f"warning: scores are not cached\n{err}")


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """As `| head -1` does: a pipe whose reading end is closed."""
    script = tmp_path / "job.py"
    script.write_text("from launch import command_line\ndef main():\n    print('plan')\ncommand_line.run(main)\n")
    reading, writing = os.pipe()
    os.close(reading)
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    ran = subprocess.run([sys.executable, str(script)], **options)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_as_a_program_it_explains_itself():
    """Where the terminal knows ASCII alone too, which has no η."""
    command = [sys.executable, "-m", "launch.measure_bias", "--help"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    ran = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True, timeout=120)
    shown = ran.stdout
    assert ran.returncode == 0 and not ran.stderr
    assert "Measures the staleness bias of GRPO exactly" in shown and "--config=configs/measure_bias.py --workdir=DIR" in shown
    assert all(flag in shown for flag in ("--config:", "--workdir:", "--[no]dry_run:", "--[no]overwrite:"))


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, b"Interrupted"), (signal.SIGTERM, b"Terminated")])
def test_a_signal_while_libraries_are_imported_is_one_line(tmp_path, number, word):
    """Here by the first library that a job imports."""
    (tmp_path / "absl.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "launch.train", "--dry_run"]
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)  # background jobs of a shell ignore Ctrl-C
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, preexec_fn=heard)
    assert (ran.returncode, ran.stdout, ran.stderr) == (128 + number, b"", b"\n" + word + b".\n")


def test_whoever_imports_a_job_keeps_the_signal_handlers():
    code = "import signal; before = signal.getsignal(2), signal.getsignal(15); import launch; "
    code += "assert before == (signal.getsignal(2), signal.getsignal(15))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
