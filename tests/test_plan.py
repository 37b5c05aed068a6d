"""`launch.plan`: planted boundaries come back from records and logs, what cannot be told is said, and nothing runs twice."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from configs import plan as plan_config
from configs import sweep_digits, train_smoke
from jax_async_grpo import plan_evidence, plan_log, plan_report, plan_run, planner, records
from jax_async_grpo.planner import Anchor, HorizonRun, Probe
from launch import plan as launch_plan
from tests.launched import job_of

ROOT = Path(__file__).resolve().parent.parent
RULE = dict(rule={}, level=0.8, confidence=0.9)
G = 5.0  # planted norm of an update over η
HALF_GAMMA = 0.6  # planted √MSD(s) = G η s^0.6
POLICY_GAMMA = 0.4  # planted √KL(s) = 3 η s^0.4, of the policy


def drift(learning_rate: float, lag: float) -> float:
    return G * learning_rate * lag**HALF_GAMMA


def policy_kl(learning_rate: float, lag: float) -> float:
    return (3 * learning_rate * lag**POLICY_GAMMA) ** 2


def sweep_rows(boundaries: dict[int, float], *, case="c", rates=None, num_updates=400, collapse_at=0.3) -> list[dict]:
    """Records of 10 seeds: they learn up to the planted boundary of their S and fall at collapse_at·T above it."""
    steps = np.arange(1, 41) * num_updates // 40
    good = np.linspace(0.42, 0.9, 40)
    bad = np.where(steps >= collapse_at * num_updates, 0.1, good)
    rows: list[dict] = [dict(kind="start", case=case, reward=0.4, ceiling=1.0)]
    for lag, boundary in boundaries.items():
        for rate in rates or 0.01 * 2.0 ** np.arange(8):
            curve = good if rate < boundary else bad
            lags = sorted({1, *(2**k for k in range(10) if 2**k < lag), max(lag, 1)})
            row = dict(kind="cell", case=case, algorithm="a", schedule="fixed", max_staleness=lag, learning_rate=float(rate))
            row |= dict(steps=steps.tolist(), reward=np.tile(curve, (10, 1)).tolist(), seeds=list(range(10)), msd_lags=lags)
            row["msd"] = [[drift(rate, x) ** 2 for x in lags]] * 10
            means = {"off_policy/kl": policy_kl(rate, lag), "off_policy/tv": min(rate, 1.0), "off_policy/ess_ratio": 0.9}
            row["windows"] = {name: [[value]] * 10 for name, value in means.items()}
            rows.append(row)
    return rows


def evidence(rows, max_staleness=32, **names) -> plan_evidence.Evidence:
    return plan_evidence.evidence_of_sweep(rows, RULE, case="c", algorithm="a", max_staleness=max_staleness, **names)


def plan(of, max_staleness=32, horizon=400, **options) -> planner.Plan:
    return plan_evidence.plan_of(of, max_staleness=max_staleness, horizon=horizon, **options)


PROBE = dict(case="c_probe", rates=[0.02], num_updates=80)


def test_anchors_and_probe_of_a_sweep_are_what_was_planted():
    found = evidence(sweep_rows({0: 0.3, 8: 0.1}) + sweep_rows({32: 9.0}, **PROBE), probe_case="c_probe")
    fresh, stale = found.anchors
    assert (fresh.max_staleness, stale.max_staleness, fresh.horizon, fresh.num_seeds) == (0, 8, 400, 10)
    assert 0.16 < fresh.learning_rate < 0.32 and 0.08 < stale.learning_rate < 0.16  # the rates on either side
    made = plan(found)
    np.testing.assert_allclose([made.update_norm, made.drift_exponent], [G, HALF_GAMMA], rtol=1e-6)
    lost = 4**POLICY_GAMMA * (1 / stale.learning_rate - 1 / fresh.learning_rate)
    np.testing.assert_allclose(made.max_learning_rate, 1 / (1 / fresh.learning_rate + lost), rtol=1e-6)
    np.testing.assert_allclose(made.batch_radius, made.staleness_limit * G * 32**HALF_GAMMA, rtol=1e-6)
    assert made.status == "bracketed" and not made.notes and found.ess == pytest.approx(0.9)


def test_the_anchor_is_the_measured_staleness_next_to_the_wanted_one():
    rows = sweep_rows({0: 0.3, 4: 0.15, 16: 0.05})
    assert [evidence(rows, S).anchors[1].max_staleness for S in (1, 4, 7, 8, 9, 64)] == [4, 4, 4, 16, 16, 16]
    at = evidence(rows, 16)
    assert plan(at, 16).max_learning_rate == pytest.approx(at.anchors[1].learning_rate)
    assert at.probe.learning_rate <= at.anchors[1].learning_rate / 2 < 2 * at.probe.learning_rate  # the rates double


def test_without_a_probe_drift_is_continued_and_that_is_said():
    made = plan(evidence(sweep_rows({0: 0.3, 8: 0.1})))
    assert made.drift == pytest.approx(G * 32**HALF_GAMMA)
    assert any("no probe at S = 32: its drift is continued from runs at S = 8" in note for note in made.notes)


@pytest.mark.parametrize(
    ("boundaries", "status", "said"),
    [
        ({0: 0.3, 8: 0.001}, "none", "NONE"),
        ({0: 9.0, 8: 0.1}, "censored", "CENSORED"),
        ({0: 9.0, 8: 9.0}, "censored", "CENSORED"),
    ],
)
def test_words_of_a_sweep_reach_the_text_and_the_figure(boundaries, status, said):
    found = evidence(sweep_rows(boundaries))
    made = plan(found)
    assert made.status == status and said in plan_report.text(made, found)
    labels = [text.get_text() for text in plan_report.figure(made, found).axes[0].texts]
    assert labels.count("never failed") == sum(boundary == 9.0 for boundary in boundaries.values())


def test_a_horizon_run_that_the_anchor_refutes_is_left_out():
    """Anchor: η_0 ≈ 0.23 holds for 400 updates. A fall at η·t = 6.4·24 leaves 0.38 for 400, one at 6.4·4 only 0.064."""
    found = {}
    for share in (0.07, 0.01, 9.0):
        rows = sweep_rows({0: 0.3, 8: 0.1})
        run = sweep_rows({0: 0.001}, case="h", rates=[6.4], collapse_at=share)
        run[1]["steps"] = [4 + step - 10 for step in run[1]["steps"]]  # so that step 4 can be told
        found[share] = evidence(rows + run, horizon_case="h")
    real, refuted, held = found.values()
    assert real.horizon_run == HorizonRun(6.4, 394, 24.0)
    assert plan(real, horizon=1600).horizon_limit == pytest.approx(6.4 * 24 / 1600)
    assert plan(real, horizon=1600).binding in ("horizon", "staleness")
    assert refuted.horizon_run is None and "not the horizon" in refuted.notes[-1]
    assert held.horizon_run.collapse_step is None and plan(held).horizon_limit == math.inf


# --- logs


def log_rows(boundaries: dict[int, float], probe: int | None = 32, **left_out) -> list[dict]:
    """A log with the same planted truth: rewards at steps 0, 200, 400, four runs a rate, a short probe."""
    rows = []
    for lag, boundary in boundaries.items():
        for rate in 0.01 * 2.0 ** np.arange(8):
            for seed in range(4):
                for step, reward in ((0, 0.4), (200, 0.7), (400, 0.9 if rate < boundary else 0.1)):
                    row = dict(run=f"{lag}/{rate}/{seed}", max_staleness=lag, learning_rate=rate, step=step, reward=reward)
                    moved = dict(drift=drift(rate, lag), kl=policy_kl(rate, lag)) if lag else dict(drift=0.0, kl=0.0)
                    rows.append(row | dict(staleness=lag, update_norm=G * rate) | moved)
    steps = () if probe is None else (probe, probe + 10)
    for step in steps:
        measured = dict(update_norm=G * 0.02, drift=drift(0.02, probe), staleness=probe, tv=0.1, ess=0.8)
        measured["kl"] = policy_kl(0.02, probe)
        rows.append(dict(run="probe", max_staleness=probe, learning_rate=0.02, step=step, **measured))
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def write_log(path: Path, rows) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


def of_log(path: Path, max_staleness=32, ceiling=1.0, **options) -> plan_evidence.Evidence:
    runs, notes = plan_log.read_log(path)
    return plan_log.evidence_of_log(runs, max_staleness=max_staleness, ceiling=ceiling, notes=notes, **options)


@pytest.mark.parametrize("name", ["log.csv", "log.json", "log.jsonl"])
def test_a_log_gives_the_planted_plan_in_every_format(tmp_path, name):
    found = of_log(write_log(tmp_path / name, log_rows({0: 0.3, 8: 0.1})))
    fresh, stale = found.anchors
    assert (fresh.horizon, stale.horizon, stale.num_seeds, found.ess) == (400, 400, 4, pytest.approx(0.8))
    assert 0.16 < fresh.learning_rate < 0.32 and 0.08 < stale.learning_rate < 0.16
    made = plan(found)
    np.testing.assert_allclose([made.update_norm, made.drift_exponent], [G, HALF_GAMMA], rtol=1e-6)
    lost = 4**POLICY_GAMMA * (1 / stale.learning_rate - 1 / fresh.learning_rate)
    np.testing.assert_allclose(made.max_learning_rate, 1 / (1 / fresh.learning_rate + lost), rtol=1e-6)


def test_a_log_without_kl_is_planned_from_the_parameters(tmp_path):
    """Both S are needed: without either the drift of the parameters stands in, and the plan says so."""
    rows = log_rows({0: 0.3, 8: 0.1})
    for lacks in (lambda row: True, lambda row: row["run"] == "probe"):
        partial = [{k: v for k, v in row.items() if k != "kl" or not lacks(row)} for row in rows]
        found = of_log(write_log(tmp_path / "log.csv", partial))
        lost = 4**HALF_GAMMA * (1 / found.anchors[1].learning_rate - 1 / found.anchors[0].learning_rate)
        np.testing.assert_allclose(plan(found).max_learning_rate, 1 / (1 / found.anchors[0].learning_rate + lost), rtol=1e-6)
        assert "no KL was measured at both" in plan_report.text(plan(found), found)
    found = of_log(write_log(tmp_path / "log.csv", rows))
    assert found.probe.policy_drift == pytest.approx({8: math.sqrt(policy_kl(0.02, 8)), 32: math.sqrt(policy_kl(0.02, 32))})


def test_records_and_logs_of_the_same_runs_agree(tmp_path):
    of_records = evidence(sweep_rows({0: 0.3, 8: 0.1}), 8)
    logged = of_log(write_log(tmp_path / "log.csv", log_rows({0: 0.3, 8: 0.1}, probe=None)), 8)
    for one, other in zip(of_records.anchors, logged.anchors, strict=True):
        assert (one.status, one.max_staleness, one.horizon) == (other.status, other.max_staleness, other.horizon)
        assert one.learning_rate == pytest.approx(other.learning_rate, rel=0.1)  # ten seeds and four
    assert plan(of_records, 8).drift == pytest.approx(plan(logged, 8).drift)


def test_without_drift_the_update_norm_bounds_it_and_that_is_said(tmp_path):
    found = of_log(write_log(tmp_path / "log.csv", log_rows({0: 0.3, 8: 0.1}, drift=None)))
    made = plan(found)
    assert made.drift_exponent == 1.0 and made.drift == pytest.approx(32 * G)
    assert any("update_norm * staleness" in note for note in made.notes)


def test_stated_outcomes_need_no_rewards_and_overrule_them(tmp_path):
    rows = log_rows({0: 0.3, 8: 0.1})
    for row in rows:
        row["outcome"] = ("success" if row.pop("reward") == 0.9 else "fall") if row["step"] == 400 else ""
    stated = of_log(write_log(tmp_path / "log.csv", rows), ceiling=None)
    judged = of_log(write_log(tmp_path / "judged.csv", log_rows({0: 0.3, 8: 0.1})))
    assert stated.anchors == judged.anchors
    wrong = [row | ({"outcome": "frozen"} if row["max_staleness"] == 8 else {}) for row in log_rows({0: 0.3, 8: 0.1})]
    assert of_log(write_log(tmp_path / "wrong.csv", wrong)).anchors[1].status == "none"


def test_a_short_run_is_a_probe_unless_it_fell(tmp_path):
    """Runs of 40 updates that have not learned yet are no failures; those that fell or became NaN are."""
    rows = log_rows({0: 0.3, 8: 0.1})
    short = dict(max_staleness=8, learning_rate=0.01, update_norm=G * 0.01)
    lazy = [dict(run=f"lazy{k}", step=step, reward=0.41, **short) for k in range(9) for step in (0, 40)]
    before = of_log(write_log(tmp_path / "a.csv", rows)).anchors
    assert of_log(write_log(tmp_path / "b.csv", rows + lazy)).anchors == before
    for reward in (0.05, math.nan):
        fell = [row | dict(reward=reward if row["step"] else 0.4) for row in lazy]
        assert of_log(write_log(tmp_path / "c.csv", rows + fell)).anchors[1] != before[1]


def test_the_operational_radius_is_the_smallest_drift_that_clips_enough(tmp_path):
    rows = log_rows({0: 0.3, 8: 0.1})
    for row in rows:
        row["clip_fraction"] = min(1.0, row.get("drift", 0.0) / 10)
    path = write_log(tmp_path / "log.csv", rows)
    drifts = sorted(row["drift"] for row in rows)
    for level in (0.05, 0.2):
        expected = next(x for x in drifts if x / 10 >= level)
        assert plan(of_log(path, clip_level=level)).clip_radius == pytest.approx(expected)
    assert plan(of_log(path, clip_level=1.0)).clip_radius == (math.inf if drifts[-1] < 10 else pytest.approx(10, rel=1))
    assert plan(of_log(write_log(tmp_path / "none.csv", log_rows({0: 0.3, 8: 0.1})))).clip_radius is None


def test_a_probe_alone_is_an_order_of_magnitude(tmp_path):
    for rows in (log_rows({}), log_rows({0: 0.3})):
        found = of_log(write_log(tmp_path / "log.csv", rows))
        made = plan(found)
        assert made.status == "order of magnitude" and "ORDER OF MAGNITUDE ONLY" in plan_report.text(made, found)
        assert made.max_learning_rate == pytest.approx(0.02 * 0.5 / 0.1)  # total variation may grow to one half
    assert any("S = 0 alone" in note for note in made.notes)


def test_a_horizon_run_of_a_log_limits_it(tmp_path):
    rows = log_rows({0: 0.3, 8: 0.1})
    run = [
        dict(run="hi", role="horizon", max_staleness=0, learning_rate=6.4, step=t, reward=r) for t, r in ((0, 0.4), (20, 0.1))
    ]
    assert of_log(write_log(tmp_path / "log.csv", rows + run)).horizon_run == HorizonRun(6.4, 20, 20.0)
    with pytest.raises(ValueError, match="run hi has role horizon and max_staleness=1"):
        of_log(write_log(tmp_path / "log.csv", rows + [row | dict(max_staleness=1) for row in run]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"log.csv holds no rows"),
        ("run,max_staleness,learning_rate,step\n", r"log.csv holds no rows"),
        ("Some text\nwith, commas\n", r"log.csv: column run is missing; needed are run, max_staleness"),
        ("run;max_staleness;learning_rate;step\n", "column run is missing; the header seems to be separated by semicolons, it"),
        ("run\tmax_staleness\tlearning_rate\tstep\n", "column run is missing; the header seems to be separated by tabs, it"),
        ("run,max_staleness,Learning_Rate,step\n", "learning_rate is missing; 'Learning_Rate' is there: names are in lower"),
        ("run,max_staleness,learning_rate,step,reward, reward\n", r"log.csv: column reward stands twice in the header"),
        ("run,max_staleness,lr,step\na,0,1,1\n", r"column learning_rate is missing; needed are run, max_staleness"),
        ("run,max_staleness,learning_rate,step\na,0,x,1\n", r"log.csv:2: learning_rate='x' must be a number > 0"),
        ("run,max_staleness,learning_rate,step\na,0,1,1\na,0.5,1,2\n", r"log.csv:3: max_staleness='0.5' must be an integer"),
        ("run,max_staleness,learning_rate,step\na,0,1,1\na,2,1,2\n", r"log.csv:3: max_staleness=2.0 of run a, which had 0"),
        ("run,max_staleness,learning_rate,step\na,0,1,1\na,0,1,1\n", r"log.csv:3: step 1 of run a stands there twice"),
        ("run,max_staleness,learning_rate,step\na,0,1_0e-06,1\n", r"log.csv:2: learning_rate='1_0e-06' must be a number > 0"),
        ("run,max_staleness,learning_rate,step\na,0,1e-60,1\n", r"learning_rate='1e-60' must be a number > 0"),
        ("run,max_staleness,learning_rate,step\na,0,1,1e300\n", r"step='1e300' must be an integer >= 0, at most 1e\+15"),
        ("run,max_staleness,learning_rate,step\na,0,1,inf\n", r"step='inf' must be an integer >= 0, at most"),
        ("run,max_staleness,learning_rate,step\na,1e9,1,1\n", r"max_staleness='1e9' must be an integer >= 0, at most 1e\+06"),
        ("run,max_staleness,learning_rate,step\na,0,1\n", r"log.csv:2 has another number of cells"),
        ("run,max_staleness,learning_rate,step\na,0,1,0\n", r"log.csv:2: run a has no row after step 0"),
        ("run,max_staleness,learning_rate,step\n,0,1,1\n", r"log.csv:2: run is empty"),
        ("run,max_staleness,learning_rate,step\na,0,1,\n", r"log.csv:2: step is empty; it must be an integer"),
        ("run,max_staleness,learning_rate,step,ess\na,0,1,1,1.5\n", r"log.csv:2: ess='1.5' must be a share"),
        ("run,max_staleness,learning_rate,step,reward\na,0,1,1,-1\n", r"log.csv:2: reward='-1' must be a number >= 0"),
        ("run,max_staleness,learning_rate,step,outcome\na,0,1,1,ok\n", r"log.csv:2: outcome='ok' must be empty or one of"),
    ],
)
def test_a_bad_log_is_one_line_with_its_place(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        plan_log.read_log(tmp_path / "log.csv")
    assert "\n" not in str(caught.value)


def test_json_that_is_none_is_refused(tmp_path):
    for name, text, message in (
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "{}", "holds an object; it must be a list"),
        ("a.json", "null", "holds null; it must be a list"),
        ("a.JSON", "1.5", "holds a number; it must be a list"),
        ("a.json", "[1]", "entry 1 is no object"),
        ("a.jsonl", '{"run": 1}\n{', "a.jsonl:2 is not JSON"),
        ("a.json", "[" * 100_000, "a.json is not JSON: maximum recursion"),
        ("a.json", f'[{{"run": 1, "max_staleness": 0, "learning_rate": 1, "step": 1{"0" * 400}}}]', "step=10+ must be an int"),
        ("none.csv", None, "none.csv cannot be read: No such file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            plan_log.read_log(tmp_path / name)


@pytest.mark.filterwarnings("error")
def test_a_norm_without_a_finite_square_is_as_good_as_a_run_that_became_non_finite(tmp_path):
    made = {}
    for norm in (1e308, math.inf, ""):
        rows = log_rows({0: 0.3, 8: 0.1})
        rows[-1]["update_norm"] = norm
        made[norm] = plan(of_log(write_log(tmp_path / "log.csv", rows)))
    assert made[1e308] == made[math.inf] == made[""]


def test_rewards_without_a_ceiling_ask_for_one(tmp_path):
    with pytest.raises(ValueError, match="states no outcome .* --ceiling"):
        of_log(write_log(tmp_path / "log.csv", log_rows({0: 0.3, 8: 0.1})), ceiling=None)


def test_a_log_without_anchors_and_probe_says_what_to_give(tmp_path):
    rows = [dict(run="a", max_staleness=0, learning_rate=0.1, step=step, reward=0.5) for step in (0, 10)]
    with pytest.raises(ValueError, match="nothing to plan from; give reward or outcome of runs"):
        of_log(write_log(tmp_path / "log.csv", rows))


def test_a_learning_rate_that_changes_counts_by_its_largest(tmp_path):
    """A warm-up: G_upd is per learning rate of each row."""
    rows = log_rows({0: 0.3, 8: 0.1})
    for row in rows:
        if row["step"] == 200:
            row |= dict(learning_rate=row["learning_rate"] / 2, update_norm=row["update_norm"] / 2, drift=row["drift"] / 2)
    found = of_log(write_log(tmp_path / "log.csv", rows))
    plain = of_log(write_log(tmp_path / "plain.csv", log_rows({0: 0.3, 8: 0.1})))
    assert found.anchors == plain.anchors and "learning rates change" in found.notes[0]
    assert plan(found, 8).update_norm == pytest.approx(G) and plan(found, 8).drift == pytest.approx(plan(plain, 8).drift)


# --- workdirs of training runs


def training_run(folder: Path, S: int, rate: float, *, seed=0, boundary=math.inf, num_updates=400, every=50, **changes) -> Path:
    """Records of a training run with the planted truth: held-out reward rises to 0.9, above the boundary it falls to 0.1."""
    config = train_smoke.get_config()
    config.seed, config.staleness.max, config.optimizer.learning_rate, config.num_updates = seed, S, rate, num_updates
    config.update_from_flattened_dict(changes)
    rows: list[dict] = [dict(kind="warm_start", step=0, heldout_reward=0.1), dict(kind="start", reward=0.4)]
    for t in range(num_updates + 1):
        if t % every == 0:
            reward = 0.4 + 0.5 * t / num_updates if rate < boundary else 0.4 if t == 0 else 0.1
            rows.append({"kind": "evaluation", "step": t, "heldout_reward": reward, "collapse/flag": 0})
        if t < num_updates:
            s = min(S, t)
            row = {"kind": "update", "step": t, "reward": 0.01, "update/norm": G * rate, "update/is_finite": 1.0}
            row |= {"pg_clipfrac": 0.01 * s, "off_policy/ess_ratio": 1.0 + 1e-7, "off_policy/kl": -3.0, "lr/current": rate}
            row |= {"staleness/mean": s + 1e-7, "off_policy/k3_kl": policy_kl(rate, s) if s else -1e-17}
            rows.append(row | {"drift/from_behavior": drift(rate, s) if s else 0.0})
    folder.mkdir()
    records.write_json(folder / "config.json", config.to_dict())
    records.append_jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_a_training_run_is_a_run_of_a_log(tmp_path):
    """A row an update; reward where it was evaluated, of held-out questions, and once more at the end."""
    (run,), notes = plan_log.read_log(training_run(tmp_path / "s2", 2, 0.25, num_updates=10, every=4))
    columns = run.columns
    assert (run.name, run.max_staleness, run.learning_rate, run.outcome, notes) == ("s2", 2, 0.25, "", ())
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # not evaluated at 10
    np.testing.assert_allclose(columns["reward"], [0.4, *[math.nan] * 3, 0.6, *[math.nan] * 3, 0.8, math.nan])
    assert columns["staleness"].tolist() == [0, 1] + [2] * 8 and columns["ess"].max() == 1 and np.isnan(columns["tv"]).all()
    np.testing.assert_allclose(columns["update_norm"], G * 0.25)
    np.testing.assert_allclose(columns["drift"][:3], [0, drift(0.25, 1), drift(0.25, 2)])
    np.testing.assert_allclose(columns["kl"][:3], [0, policy_kl(0.25, 1), policy_kl(0.25, 2)])
    np.testing.assert_allclose(columns["clip_fraction"][:3], [0, 0.01, 0.02])
    (run,), _ = plan_log.read_log(training_run(tmp_path / "ends", 2, 0.25, num_updates=8, every=4))
    assert run.steps.tolist() == list(range(9)) and run.columns["reward"][-1] == pytest.approx(0.9)
    assert np.isnan(run.columns["update_norm"][-1]) and run.rates[-1] == 0.25


def test_training_runs_and_files_are_planned_together(tmp_path):
    """Anchors of training runs at S = 0 and 8, the probe in a file: the same plan as from one log."""
    boundaries = {0: 0.3, 8: 0.1}
    options = dict(num_updates=20, every=10)
    folders = [
        training_run(tmp_path / f"s{lag}_{rate:g}_{seed}", lag, float(rate), seed=seed, boundary=boundary, **options)
        for lag, boundary in boundaries.items()
        for rate in 0.01 * 2.0 ** np.arange(2, 7)
        for seed in range(4)
    ]
    probe = write_log(tmp_path / "probe.csv", [row for row in log_rows({}) if row["run"] == "probe"])
    code, said, error = job(f"--log={','.join(map(str, [*folders, probe]))}", "--ceiling=1", "--max_staleness=32")
    assert code == 0 and "bracketed" in said and "differ in" not in said, error
    runs, notes = plan_log.read_log(*folders, probe)
    found = plan_log.evidence_of_log(runs, max_staleness=32, ceiling=1.0, notes=notes)
    fresh, stale = found.anchors
    assert (fresh.max_staleness, stale.max_staleness, fresh.num_seeds) == (0, 8, 4)
    assert 0.16 < fresh.learning_rate < 0.32 and 0.08 < stale.learning_rate < 0.16  # the rates on either side
    made = plan(found, horizon=20)
    np.testing.assert_allclose([made.update_norm, made.drift_exponent], [G, HALF_GAMMA], rtol=1e-6)
    lost = 4**POLICY_GAMMA * (1 / stale.learning_rate - 1 / fresh.learning_rate)
    np.testing.assert_allclose(made.max_learning_rate, 1 / (1 / fresh.learning_rate + lost), rtol=1e-6)


def test_what_a_training_run_does_not_say_is_left_out(tmp_path):
    """η_0 = 0 of a warm-up; a mean staleness between two numbers; rollouts replayed; a run that gave up."""
    folder = training_run(tmp_path / "run", 2, 0.25, num_updates=8, every=4, max_bad_updates=2)
    rows = records.read_jsonl(folder / "metrics.jsonl")
    updates = [row for row in rows if row["kind"] == "update"]
    updates[0]["lr/current"] = 0.0
    updates[4]["staleness/mean"] = 1.5
    for row in updates[5:]:
        del row["drift/from_behavior"]
    for row in updates[6:]:
        row |= {"update/is_finite": 0.0, "off_policy/k3_kl": math.nan}
    (folder / "metrics.jsonl").unlink()
    records.append_jsonl(folder / "metrics.jsonl", rows)
    (run,), _ = plan_log.read_log(folder)
    assert run.rates.tolist() == [0.25] * 9 and run.outcome == "non-finite"
    assert np.isnan(run.columns["update_norm"]).tolist() == [True] + [False] * 7 + [True]
    assert np.isnan(run.columns["drift"]).tolist() == [True, False, False, False] + [True] * 5
    assert np.isnan(run.columns["kl"]).tolist() == [True, False, False, False, True, False, True, True, True]


def test_what_training_runs_have_in_common_is_checked(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    short = dict(num_updates=4, every=4)
    one = training_run(tmp_path / "a" / "run", 0, 0.1, **short, updates_per_batch=2)
    two = training_run(tmp_path / "b" / "run", 4, 0.2, seed=5, **short, group_size=16, loss="mine.loss")
    runs, notes = plan_log.read_log(one, two)
    assert [run.name for run in runs] == [str(one), str(two)]  # both folders are called run
    reused, differ = notes
    assert reused == f"data are used more than once in {one}: their lag exceeds S"
    assert differ == "the training runs differ in group_size, loss, updates_per_batch: a plan supposes that they do not"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "run is a folder without a config.json; give a file or the --workdir of launch.train"),
        ({"config.json": "{"}, "run is a folder without a config.json"),
        ({"config.json": '{"cases": {}}'}, "run is the folder of another job; give a file or the --workdir of launch.train"),
        ({"config.json": None}, "run has no metrics.jsonl: the run has not begun"),
        ({"config.json": None, "metrics.jsonl": '{"kind": "start"}\n'}, "run has no update in its metrics.jsonl yet"),
        ({"config.json": None, "metrics.jsonl": '{"kind": "update"}\n'}, "run has no evaluation in its metrics.jsonl yet"),
    ],
)
def test_a_folder_that_says_nothing_is_one_line(tmp_path, files, message):
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        text = json.dumps(train_smoke.get_config().to_dict()) if text is None else text
        (tmp_path / "run" / name).write_text(text)
    code, said, error = job(f"--log={tmp_path / 'run'}", "--ceiling=1")
    assert code == 2 and not said and message in error and error.count("\n") == 1


def test_one_training_run_is_no_plan_and_what_to_run_is_said(tmp_path):
    folder = training_run(tmp_path / "run", 8, 0.01, num_updates=20, every=10)
    code, said, error = job(f"--log={folder}", "--ceiling=1")
    assert code == 0 and "NOT PLANNED" in said, error
    words = " ".join(said.split())
    assert "use eta no number: see to run" in words and "to run runs at S = 0 and at one larger S" in words
    page, section = re.search(r"(docs/\S+\.md) has the loop for launch.train \(under '(.*?)'\)", words).groups()
    loop = (ROOT / page).read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    assert "python -m launch.train" in loop and "--log=$(ls -d runs/S*" in loop
    config = re.search(r"--config=(\S+) --measure", words)[1]
    assert (ROOT / config).exists()


def test_the_documented_columns_are_those_that_are_read():
    page = (ROOT / "docs" / "plan.md").read_text().partition("| Column | From |")[0]
    table = [line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")]
    assert [name for name in table if not name.startswith("--")] == list(plan_log.COLUMNS)


# --- report


def test_text_and_json_hold_every_number_of_the_plan(tmp_path):
    found = evidence(sweep_rows({0: 0.3, 8: 0.1}) + sweep_rows({32: 9.0}, **PROBE), probe_case="c_probe")
    made = plan(found, learning_rate=0.01)
    paths = plan_report.write_report(made, found, tmp_path / "new")
    assert [path.name for path in paths] == list(plan_report.WRITTEN) and all(path.stat().st_size > 500 for path in paths)
    said = paths[0].read_text()
    assert max(map(len, said.splitlines())) <= 80
    numbers = [made.recommended, made.max_learning_rate, *made.interval, made.staleness_limit, made.optimizer_limit]
    for number in (*numbers, made.batch_radius, made.drift, made.update_norm):
        assert f"{number:.3g}" in said
    assert f"largest S     {made.largest_staleness}" in said and "budget        S=32, T=400: eta_80 =" in said
    plain = records.read_json(paths[1])
    assert plain["plan"]["max_learning_rate"] == made.max_learning_rate and plain["plan"]["budget"] == made.budget
    assert plain["evidence"]["probe"]["drift"]["32"] == pytest.approx(found.probe.drift[32])


@pytest.mark.parametrize(
    ("learning_rate", "said"), [(5.0, "ABOVE the predicted eta_80"), (0.15, "none, it is too much even"), (1e-4, "32 or more")]
)
def test_what_a_learning_rate_allows_is_said(learning_rate, said):
    found = evidence(sweep_rows({0: 0.3, 8: 0.1}))
    assert said in " ".join(plan_report.text(plan(found, learning_rate=learning_rate), found).split())


def test_the_figure_shows_the_anchors_and_what_was_asked():
    anchors = (Anchor(0, 400, "found", 0.2, (0.1, 0.4)), Anchor(8, 400, "ill-defined", None))
    found = plan_evidence.Evidence("x", anchors, Probe(8, 0.01, {1: 0.05, 8: 0.2}))
    labels = plan_report.figure(plan(found, 8, learning_rate=0.1), found).axes[0].get_legend_handles_labels()[1]
    assert {"S = 8: ill-defined", "measured anchors", "asked: η = 0.1"} <= set(labels)


# --- the job


def tiny_config() -> ml_collections.ConfigDict:
    """A bandit in float64: a ladder over which all runs hold, or none."""
    config = plan_config.get_config()
    config.precision = config.sweep.precision = "float64"
    config.max_staleness, config.horizon = 6, 40
    config.probe = dict(num_updates=10, num_measurements=5, first_seed=9, num_seeds=2)
    config.horizon_run = dict(factor=4.0, num_updates=20, num_measurements=5, first_seed=5, num_seeds=2)
    config.sweep.group_size = 4
    bandit = sweep_digits.case(
        policy="jax_async_grpo.policies.tabular",
        policy_options=dict(context_length=1),
        task="jax_async_grpo.tasks.bandit",
        task_options=dict(rewards=((1.0, 0.0, 0.0), (0.0, 0.5, 1.0))),
        warm_start={},
        optimizer="optax.sgd",
        algorithms=("no_is", "clip"),
        max_staleness=(0, 3),
        learning_rates=(0.5, 1.0),
        num_updates=40,
        num_measurements=20,
        num_windows=2,
        num_seeds=2,
    )
    config.sweep.cases = ml_collections.ConfigDict(dict(bandit=bandit))
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(job, workdir) of a run killed after its first chunk and taken up again."""
    job = plan_run.open_job(tiny_config().to_dict())
    path = tmp_path_factory.mktemp("plan") / "run"
    workdir = records.open_workdir(path, plan_run.kept_config(job.config))

    def stop(name, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_run.measure(job, workdir, 6, stop)
    with pytest.raises(ValueError, match="1 of 2 learning rates of the anchors are not measured; .*--measure"):
        plan_run.evidence(job, workdir.read_metrics(), 6)
    seen = []
    plan_run.measure(job, workdir, 6, lambda name, seconds: seen.append((name, seconds > 0)))
    assert [ran for _, ran in seen] == [False, True, True, True] and len(seen) == plan_run.num_chunks(job, 6)
    return job, workdir


def test_measuring_finds_anchors_then_the_probe_and_the_horizon_run_they_ask_for(measured):
    job, workdir = measured
    cells = {row["case"]: row for row in workdir.read_metrics() if row["kind"] == "cell"}
    probe, horizon = cells["bandit_probe_S6"], cells["bandit_horizon"]
    found = plan_run.evidence(job, workdir.read_metrics(), 6)
    rates = [anchor.learning_rate for anchor in found.anchors]
    assert [anchor.max_staleness for anchor in found.anchors] == [0, 3]
    assert probe["learning_rate"] == pytest.approx(min(rates) / 2, rel=1e-2) and probe["max_staleness"] == 6
    assert probe["steps"][-1] == 20 and horizon["learning_rate"] == pytest.approx(4 * rates[0], rel=1e-2)  # 20 ≥ 3 S
    assert found.probe.max_staleness == 6 and set(found.probe.drift) == {1, 2, 4, 6} and not found.notes


def test_another_staleness_reuses_the_anchors_and_asks_for_its_probe(measured):
    job, workdir = measured
    found = plan_run.evidence(job, workdir.read_metrics(), 5)
    assert any("not measured yet: probes (S = 3 and 5, eta" in note for note in found.notes)
    assert found.anchors == plan_run.evidence(job, workdir.read_metrics(), 6).anchors
    assert plan_run.evidence(job, workdir.read_metrics(), 3).notes == ()  # an anchor needs no probe


def test_anchors_of_a_sweep_that_has_run_are_reused(measured, tmp_path):
    _, workdir = measured
    config = tiny_config()
    config.anchors, config.horizon_run.factor = str(workdir.path), 0.0
    job = plan_run.open_job(config.to_dict())
    here = records.open_workdir(tmp_path / "run", plan_run.kept_config(job.config))
    assert "not measured yet: probes (S = 3 and 7" in plan_run.evidence(job, here.read_metrics(), 7).notes[-1]
    assert plan_run.evidence(job, [], 3).anchors[1].max_staleness == 3
    with pytest.raises(ValueError, match="config.anchors=.* holds no config.json"):
        plan_run.open_job(config.to_dict() | dict(anchors=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="config.algorithm is 'tis'; it must be one of no_is, clip in"):
        plan_run.open_job(config.to_dict() | dict(algorithm="tis"))
    with pytest.raises(ValueError, match="config.precision is 'float32'; it must be 'float64' as in"):
        plan_run.open_job(config.to_dict() | dict(precision="float32"))
    other = plan_run.open_job(config.to_dict() | dict(algorithm="clip"))
    with pytest.raises(ValueError, match="unfinished sweep of bandit/clip"):
        plan_run.measure(other, here, 3, lambda name, seconds: None)


job = job_of(launch_plan.main, "plan")


def test_the_job_plans_from_what_is_there(measured, tmp_path):
    _, workdir = measured
    file = tmp_path / "config.py"
    file.write_text("from tests.test_plan import tiny_config as get_config\n")
    here = (f"--config={file}", f"--workdir={workdir.path}")
    code, said, _ = job(*here, "--dry_run")
    assert code == 0 and "probes at S = 6 and at the larger anchor's S, at half" in said and "2 chunks" in said
    code, said, _ = job(*here, "--learning_rate=0.1")
    assert code == 0 and "S = 6, T = 40 learner" in said and "head-room" in said and (workdir.path / "plan.svg").exists()
    code, said, _ = job(*here, "--measure", "--max_staleness=3", "--horizon=20")
    assert code == 0 and "S = 3, T = 20 learner" in said
    for arguments, message in (
        (("--max_staleness=30", "--horizon=40"), "max_staleness=30 is more than 4 times the anchors' 3; .*--extrapolate"),
        (("--max_staleness=-1",), "--max_staleness=-1 must be an integer >= 0"),
        (("--extrapolate", f"--horizon=1{'0' * 400}"), "--horizon=10+ must be an integer in 1..10+$"),
        (("--config.algorithm=tis",), "config.algorithm is 'tis'"),
        (("--config.probe.num_seeds=3",), "holds another config: probe.num_seeds is 2 there and 3 here"),
        (("--log=x.csv",), "--log is planned from as it is"),
        (("--ceiling=1",), "--ceiling and --clip_level are for --log"),
        (("--clip_level=0.05",), "--ceiling and --clip_level are for --log"),
        (("--typo=1",), "Unknown command line flag 'typo'"),
    ):
        code, said, error = job(*here, *arguments)
        assert code == 2 and not said and re.search(message, error) and error.count("\n") == 1, error
    code, _, error = job(here[0], f"--workdir={tmp_path / 'new'}")
    assert code == 2 and "nothing to plan from yet: 2 of 2 learning rates" in error


def test_the_example_log_is_planned_without_a_config(tmp_path):
    log = f"--log={ROOT / 'examples' / 'plan_log.csv'}"
    code, said, _ = job(log, "--ceiling=1", "--learning_rate=3e-7")
    assert code == 0 and "bracketed" in said and "plan.png" not in said  # no workdir, no files
    page = " ".join((ROOT / "docs" / "plan.md").read_text().split())
    for line in said.strip().splitlines()[:18]:
        assert " ".join(line.split()) in page, line
    assert job(log, "--ceiling=1", "--max_staleness=33")[0] == 2
    code, said, _ = job(log, "--ceiling=1", "--max_staleness=33", "--extrapolate", f"--workdir={tmp_path}")
    assert code == 0 and all((tmp_path / name).exists() for name in plan_report.WRITTEN)


def test_forgotten_flags_and_configs_of_other_jobs_are_named():
    code, said, error = job()
    assert (code, said) == (2, "") and "--config=configs/plan.py and --workdir=DIR" in error and "--log=FILE" in error
    for name in ("sweep_digits", "study_delay", "measure_bias", "audit", "train_smoke"):
        other = name.partition("_")[0] if name != "measure_bias" else name
        code, _, error = job(f"--config={ROOT / 'configs' / name}.py", "--dry_run")
        assert code == 2 and f"{name}.py looks like a config of another job: python -m launch.{other} takes it" in error
        assert error.count("\n") == 1
    assert job(f"--config={ROOT / 'configs' / 'plan.py'}", "--dry_run")[0] == 0


def test_what_no_plan_could_answer_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_run, "measure", None)
    file = tmp_path / "config.py"
    file.write_text("from tests.test_plan import tiny_config as get_config\n")
    for arguments, message in (
        (("--learning_rate=-1",), "--learning_rate=-1 must be > 0 and finite"),
        (("--learning_rate=nan",), "--learning_rate=nan must be > 0 and finite"),
        (("--horizon=161",), "horizon=161 is more than 4 times the anchors' 40; .*--extrapolate"),
        (("--horizon=9",), "horizon=9 is less than 1/4 of the anchors' 40; .*--extrapolate"),
        (("--max_staleness=13",), "max_staleness=13 is more than 4 times the anchors' 3; .*--extrapolate"),
    ):
        for how in ("--dry_run", "--measure"):
            code, said, error = job(f"--config={file}", f"--workdir={tmp_path / 'run'}", how, *arguments)
            assert code == 2 and not said and re.search(message, error) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()
    assert job(f"--config={file}", "--dry_run", "--extrapolate", "--horizon=161")[0] == 0


def test_a_plan_of_a_log_leaves_other_folders_alone(tmp_path):
    planned = (f"--log={ROOT / 'examples' / 'plan_log.csv'}", "--ceiling=1")
    other = tmp_path / "other"
    records.open_workdir(other, {"clip_level": 0.1, "cases": {}})
    code, said, _ = job(*planned, f"--workdir={other}", "--dry_run")
    assert code == 0 and "bracketed" in said and [path.name for path in other.iterdir()] == ["config.json"]
    code, said, error = job(*planned, f"--workdir={other}")
    assert (code, said) == (2, "") and "holds another config" in error and len(list(other.iterdir())) == 1
    mine = f"--workdir={tmp_path / 'mine'}"
    assert [job(*planned, mine)[0] for _ in range(2)] == [0, 0]
    before = (tmp_path / "mine" / "plan.txt").read_bytes()
    code, said, error = job(*planned, mine, "--max_staleness=4")
    assert (code, said) == (2, "") and "max_staleness is 32 there and 4 here" in error
    assert (tmp_path / "mine" / "plan.txt").read_bytes() == before
    assert job(*planned, mine, "--max_staleness=4", "--overwrite")[0] == 0


def test_a_folder_that_cannot_be_written_is_said_before_the_plan(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder, message in (("file", "is a file; give a folder"), ("file/under", "cannot be created or written")):
        code, said, error = job(f"--log={ROOT / 'examples' / 'plan_log.csv'}", "--ceiling=1", f"--workdir={tmp_path / folder}")
        assert (code, said) == (2, "") and f"workdir={tmp_path / folder} {message}" in error and error.count("\n") == 1


def test_a_wrong_config_is_one_line():
    for change, message in (
        (dict(typo=1), "config.typo is not a key of this job"),
        (dict(horizon=0), "config.horizon is 0; it must be an integer >= 1"),
        (dict(horizon_run=dict(tiny_config().horizon_run, factor=0.5)), "config.horizon_run.factor is 0.5; it must be"),
        (dict(case="digits"), "config.case is 'digits'; it must be one of bandit in config.sweep"),
        (dict(sweep=1), "config.sweep is 1; it must be a ConfigDict"),
        (dict(anchors="no/such"), "config.anchors=no/such holds no config.json"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            plan_run.open_job(tiny_config().to_dict() | change)
        assert "\n" not in str(caught.value)
