"""The audit from its points to its page: what it measures is what `exact` and `bias` say, and a killed run goes on."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from jax.flatten_util import ravel_pytree

from configs import audit as audit_config
from jax_async_grpo import audit, audit_points, audit_summary, bias, exact, losses, records
from launch import audit as launch_audit
from launch import command_line

KEPT = {"ppo_clip": True, "cispo": False, "topr": False, "m2po": False, "decoupled_ppo": False}  # beside corrections?


def my_loss(logprobs, old_logprobs, advantages, mask=None):
    """A user's own: half the pull of importance sampling."""
    return 0.5 * losses.importance_sampling(logprobs, old_logprobs, advantages, mask)


def tiny_config() -> dict:
    config = audit_config.get_config().to_dict()
    config["losses"] = {name: config["losses"][name] | {"corrected": corrected} for name, corrected in KEPT.items()}
    config["corrections"] = {name: config["corrections"][name] for name in ("token_tis",)}
    config["task_options"] = dict(num_prompts=2, num_digits=2, base=2, partial_credit=True, variable_length=True, seed=0)
    config["policy_options"] = dict(context_length=4, init_scale=0.5)
    config |= dict(group_size=4, max_staleness=(0, 2, 8), learning_rates=(0.04, 0.08), time=1.0, rank_at=(8, 0.08))
    return config | dict(drifts=(1e-3, 0.1, 3.0))


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, case, points, rows) of a whole run, killed once on the way."""
    config = tiny_config()
    workdir = records.open_workdir(tmp_path_factory.mktemp("audit") / "run", config)
    audit.validate(config)
    seen = []

    def stop_after_two(entry):
        seen.append(entry.name)
        if len(seen) == 2:
            raise Stop

    with pytest.raises(Stop):
        audit.run_entries(config, workdir, stop_after_two)
    early = records.read_jsonl(workdir.path / audit.RECORDS)
    assert audit.finished_entries(early) == set(seen)
    names = []
    audit.run_entries(config, workdir, lambda entry: names.append(entry.name))
    rows = records.read_jsonl(workdir.path / audit.RECORDS)
    assert rows[: len(early)] == early and sorted(names) == sorted(entry.name for entry in audit.entries(config))
    case = audit_points.reference_case(config)
    return config, case, audit_points.build_points(config, case), rows


def points_of(rows, entry):
    return [row for row in rows if row["kind"] == "point" and row["entry"] == entry]


def test_every_loss_stands_alone_and_beside_every_correction(finished):
    config, _, _, rows = finished
    both = {"ppo_clip/proximal", "ppo_clip/token_tis"}
    assert {row["entry"] for row in rows} == {f"{name}/none" for name in KEPT} | both
    assert [entry.proximal for entry in audit.entries(config) if entry.name in ("ppo_clip/none", "ppo_clip/token_tis")] == [
        False,
        True,
    ]
    assert len(points_of(rows, "cispo/none")) == 6


def test_points_lie_on_runs_of_the_reference_loss(finished):
    config, case, points, _ = finished
    unravel = ravel_pytree(case.params)[1]
    gradient = jax.jit(case.gradient)
    params, history = case.params, [case.params]
    for _ in range(math.floor(1.0 / 0.08)):
        step = gradient(params, history[max(len(history) - 3, 0)])
        params = jax.tree.map(lambda x, g: x + 0.08 * g, params, step)
        history.append(params)
    index = next(
        i for i, label in enumerate(points.labels) if (label.get("max_staleness"), label.get("learning_rate")) == (2, 0.08)
    )
    expected = [ravel_pytree(history[i])[0] for i in (-1, -3)]
    np.testing.assert_allclose(points.learner_params[index], expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(points.behavior_params[index], expected[1], rtol=0, atol=1e-12)
    behavior = jax.jit(functools.partial(exact.task_logprobs, case.policy, task=case.task))(unravel(expected[1]))
    np.testing.assert_allclose(points.behavior[index], behavior, rtol=0, atol=1e-12)


def test_the_control_of_corrections_is_the_loss_with_their_denominator(finished):
    _, _, _, rows = finished
    # the largest ratio is far below the cap at the smallest lag, but the weight is still there
    control, weighted, alone = (points_of(rows, f"ppo_clip/{name}")[-1] for name in ("proximal", "token_tis", "none"))
    assert len({row["bias/norm"] for row in (control, weighted, alone)}) == 3


@pytest.mark.parametrize(
    "name", ["ppo_clip/none", "ppo_clip/proximal", "topr/none", "decoupled_ppo/none", "ppo_clip/token_tis"]
)
def test_numbers_are_those_of_the_oracle(finished, name):
    config, case, points, rows = finished
    entry = next(entry for entry in audit.entries(config) if entry.name == name)
    unravel = ravel_pytree(case.params)[1]

    def gradient(learner, behavior):
        def objective(params, fixed, behavior):
            proximal = learner + config["proximal_fraction"] * (behavior - learner)
            logprobs = [exact.task_logprobs(case.policy, unravel(x), case.task) for x in (params, behavior, proximal, fixed)]
            return exact.surrogate_objective(
                *logprobs[:2],
                case.task.rewards,
                case.task.mask,
                group_size=4,
                loss_fn=entry.loss_fn,
                advantage_fn=case.algorithm.advantage_fn,
                aggregation_fn=case.algorithm.aggregation_fn,
                proximal_logprobs=logprobs[2] if entry.proximal else None,
                detached_logprobs=logprobs[3],
            )

        return jax.grad(objective)(learner, learner, behavior)

    measured = jax.jit(functools.partial(bias.surrogate_bias, gradient))
    indices = [i for i, label in enumerate(points.labels) if label["kind"] == "point"]
    for index, row in zip(indices, points_of(rows, name), strict=True):
        expected = measured(points.learner_params[index], points.behavior_params[index])
        if row["max_staleness"] == 0:
            assert row["bias/norm"] == 0 == expected.norm
            continue
        for key, value in (("norm", expected.norm), ("relative_norm", expected.relative_norm), ("cosine", expected.cosine)):
            np.testing.assert_allclose(row[f"bias/{key}"], value, rtol=1e-9)
        np.testing.assert_allclose(sum(row[f"share/{role}"] for role in bias.ROLES), 1, rtol=1e-9)
        np.testing.assert_allclose(row["drift/from_behavior"], points.drift[index])
        assert 0 <= row["cut_fraction"] < 1 and row["grad/variance"] > 0


def test_small_drift_follows_the_first_order_law_and_kinks_are_named(finished):
    _, _, _, rows = finished
    curves = {row["entry"]: row for row in rows if row["kind"] == "curve"}
    for name in ("ppo_clip/none", "cispo/none", "decoupled_ppo/none", "ppo_clip/token_tis"):
        curve = curves[name]
        slope = curve["bias/norm"][0] / curve["drift/from_behavior"][0]
        np.testing.assert_allclose(slope, curve["first_order_coefficient"], rtol=0.02)
        assert curve["no_law"] is None and curve["saturation_drift"] > 1e-3
    assert curves["ppo_clip/none"]["saturation_drift"] <= 3.0
    assert "kink" in curves["topr/none"]["no_law"] and curves["topr/none"]["first_order_coefficient"] is None


def test_what_couples_rows_is_refused_with_the_reason(finished):
    config, _, _, rows = finished
    (refused,) = audit_summary.refused(rows)
    assert refused["loss"] == "m2po" and "couples rows" in refused["reason"]
    summed = refused["brute_force"]
    assert summed["group_size"] == 3 and 0 < summed["relative_bias"] < 1
    # at this drift the budget of M2PO is kept without a clip: it is importance sampling, the reference loss
    np.testing.assert_allclose(summed["relative_bias"], summed["reference_relative_bias"], rtol=1e-9)
    assert "m2po/none" in audit.finished_entries(rows)  # and not tried again
    assert "m2po" not in {line["loss"] for line in audit_summary.lines(rows, config)}


def test_table_page_and_figures_come_from_the_records(finished, tmp_path):
    config, _, _, rows = finished
    result = audit_summary.summary(rows, config, {"jax": "x"})
    biases = [line["relative_bias"] for line in result["table"]]
    assert biases == sorted(biases) and len(biases) == 6 and biases[0] > 0 and result["control_bias"] == 0
    best = next(row for row in points_of(rows, f"{result['table'][0]['loss']}/{result['table'][0]['correction']}")[::-1])
    assert (best["max_staleness"], best["learning_rate"]) == (8, 0.08) and best["bias/relative_norm"] == biases[0]
    written = audit_summary.write_report(rows, result, tmp_path)
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())
    for name in ("audit.md", "audit.html"):
        text = (tmp_path / name).read_text()
        assert all(word in text for word in ("decoupled_ppo", "kink", "couples rows", "S = 8"))
    assert audit_summary.markdown_table(result["table"], limit=2).count("\n") == 3
    # half-written: the last entry has no closing row yet
    assert len(audit_summary.lines([r for r in rows if (r["entry"], r["kind"]) != ("cispo/none", "entry")], config)) == 5
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert audit_summary.write_report([], audit_summary.summary([], config, {}), nothing) == ["audit.md", "audit.html"]


def not_a_number(logprobs, old_logprobs, advantages, mask=None):
    values = losses.importance_sampling(logprobs, old_logprobs, advantages, mask)
    return values + 0 * jnp.sqrt(-jnp.square(values))


def banded(logprobs, old_logprobs, advantages, mask=None):
    return losses.ipo(logprobs, old_logprobs, advantages, mask, threshold=0.01, kl_coefficient=0.1)


def nothing(logprobs, old_logprobs, advantages, mask=None):
    return 0 * losses.importance_sampling(logprobs, old_logprobs, advantages, mask)


def raises(logprobs, old_logprobs, advantages, mask=None):
    raise KeyError("weights")


def scalar(logprobs, old_logprobs, advantages, mask=None):
    return losses.importance_sampling(logprobs, old_logprobs, advantages, mask).sum()


def hidden(logprobs, old_logprobs, advantages, mask=None):
    return losses.importance_sampling(logprobs, jax.lax.stop_gradient(old_logprobs), advantages, mask)


def test_own_losses_that_fail_are_told_apart(finished, tmp_path):
    config = finished[0] | dict(losses={}, corrections={}, brute_force_group_size=0)
    config["extra_losses"] = ",".join(f"{__name__}.{name}" for name in ("not_a_number", "nothing", "banded", "hidden"))
    workdir = records.open_workdir(tmp_path / "run", config)
    audit.run_entries(config, workdir, lambda entry: None)
    rows = records.read_jsonl(workdir.path / audit.RECORDS)
    result = audit_summary.summary(rows, config, {})
    assert [(row["loss"], row["reason"]) for row in result["refused"]] == [
        ("not_a_number", "its gradient is not finite at some of the points"),
        ("nothing", "its fresh gradient is 0 at some of the points"),
    ]
    table = {line["loss"]: line for line in result["table"]}
    # a band drops tokens whose penalty still has a gradient
    assert table["banded"]["cut"] > 0.1 and table["banded"]["no_law"] is None
    assert "stop_gradient" in table["hidden"]["no_law"] and table["hidden"]["cut"] == 0
    audit_summary.write_report(rows, result, tmp_path)
    assert all("detached_logprobs instead" in (tmp_path / name).read_text() for name in ("audit.md", "audit.html"))


def test_a_changed_function_and_damaged_records_are_not_taken_for_the_old_ones(tmp_path, monkeypatch):
    config = tiny_config() | dict(losses={}, corrections={}, extra_losses=f"{__name__}.my_loss")
    workdir = records.open_workdir(tmp_path / "run", config, figures=(audit.RECORDS,))
    audit.run_entries(config, workdir, lambda entry: None)
    seen = []
    audit.run_entries(config, workdir, lambda entry: seen.append(entry.name))
    assert seen == ["my_loss/none"]
    monkeypatch.setattr(sys.modules[__name__], "my_loss", losses.importance_sampling)
    with pytest.raises(ValueError, match="my_loss/none of a function that has changed since; pass --overwrite"):
        audit.run_entries(config, workdir, seen.append)
    (workdir.path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds a audit.jsonl without config.json"):
        records.open_workdir(workdir.path, config | {"seed": 5}, figures=(audit.RECORDS,))
    for line, message in (("{}", "line 1 is no record"), ("[1]", "line 1 is no record"), ("%%", "not JSON.*delete the line")):
        (workdir.path / audit.RECORDS).write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            audit.run_entries(config, workdir, seen.append)


def run(*arguments):
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["launch/audit.py", *map(str, arguments)]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line.run(launch_audit.main)
    except SystemExit as stop:
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def test_own_losses_join_by_their_dotted_names():
    code, out, err = run("--config=configs/audit.py", "--dry_run", f"--config.extra_losses={my_loss.__module__}.my_loss")
    assert code == 0, err
    lines = out.splitlines()
    num_corrections = len(audit_config.get_config().corrections)
    assert lines[0] == "my_loss/none" and lines[-1] == f"{len(lines) - 1} entries"
    assert sum(line.startswith("my_loss/") for line in lines) == 2 + num_corrections


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rank_at=(5, 0.08)), "rank_at is (5, 0.08)"),
        (dict(rank_at=(0, 0.08)), "rank_at has S = 0"),
        (dict(time=0.1), "config.time is 0.1"),
        (dict(max_staleness=()), "config.max_staleness"),
        (dict(learning_rates=(0.0,)), "config.learning_rates"),
        (dict(drifts=(math.nan,)), "config.drifts"),
        (dict(group_size=1), "config.group_size is 1"),
        (dict(proximal_fraction=2), "config.proximal_fraction"),
        (dict(saturation=0), "config.saturation"),
        (dict(extra_losses="no.such_loss"), "config.extra_losses is 'no.such_loss'"),
        (dict(extra_losses=3), "config.extra_losses is 3"),
        (dict(extra_losses=f"{__name__}.raises"), "raises/none cannot be called"),
        (dict(extra_losses=f"{__name__}.scalar"), "scalar/none returns shape ()"),
        (dict(learning_rates=(0.08, 0.08)), "a value stands there twice"),
        (dict(extra_losses="jax_async_grpo.losses.ppo_clip"), "name ppo_clip more than once"),
        (dict(corrections={"proximal": dict(fn="jax_async_grpo.corrections.veto", options={})}), "config.corrections.proximal"),
        (dict(losses={}), "nothing to audit"),
        (dict(losses={"a": dict(fn="jax_async_grpo.losses.dro", options={}, corrected=False, proximal=False)}), "a/none"),
        (dict(losses={"a": dict(fn="jax_async_grpo.losses.sapo")}), "config.losses.a.options is missing"),
        (dict(seeds=1), "config.seeds is not a key"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        audit.validate(tiny_config() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_command_line_asks_for_what_is_missing(tmp_path):
    code, _, err = run(f"--workdir={tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "--config=configs/audit.py" in err
