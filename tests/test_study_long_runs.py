"""The study of long runs: learning rates follow from another study's records, and planted collapses decide between two laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from configs import study_long_runs as study_config
from configs import sweep_digits
from jax_async_grpo import records, sweep_run
from jax_async_grpo.scaling import stable_learning_rate
from jax_async_grpo.studies import finished_pieces, long_runs

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
STEPS, SEEDS = [8, 16, 24], 12
# Successful seeds at every rate. S = 3 never gets there; S = 5 never falls.
SOURCE = {("no_is", 0): (12, 12, 12, 11, 3, 0), ("no_is", 3): (3, 2, 1, 0, 0, 0), ("no_is", 5): (12,) * 6,
          ("clip", 0): (12, 12, 12, 12, 0, 0), ("clip", 3): (12, 12, 8, 1, 0, 0), ("clip", 5): (12, 9, 4, 0, 0, 0)}  # fmt: skip


def tiny_config() -> dict:
    """Bandits in float64, three times longer."""
    config = study_config.get_config().to_dict()
    bandit = sweep_digits.case(
        policy="jax_async_grpo.policies.tabular",
        policy_options=dict(context_length=1, init_scale=1.0),
        task="jax_async_grpo.tasks.bandit",
        task_options=dict(rewards=((1.0, 0.0, 0.0), (0.0, 0.5, 1.0))),
        warm_start={},
        optimizer="optax.sgd",
        algorithms=("no_is", "clip"),
        max_staleness=(0, 3, 5),
        learning_rates=RATES,
        num_updates=24,
        num_measurements=3,
        num_windows=1,
        num_seeds=SEEDS,
    )
    algorithms = dict(no_is=sweep_digits.algorithm("reinforce"), clip=sweep_digits.algorithm("ppo_clip"))
    config["sweep"] |= dict(precision="float64", group_size=4, algorithms=algorithms, cases=dict(bandit=bandit))
    small = dict(precision="float64", case="bandit", algorithms=("no_is", "clip"), max_staleness=(0, 3, 5))
    return config | small | dict(factors=(1, 3), num_measurements=6, num_windows=2, num_seeds=4, sources=("somewhere/source",))


def start_row(case: str) -> dict:
    rewards = dict(reward=0.3, gold_reward=0.3, ceiling=1.0, gold_ceiling=1.0)
    return {"kind": "start", "case": case, "piece": "p", **rewards}


def cell_row(case, algorithm, lag, rate, steps, rewards) -> dict:
    labels = dict(case=case, algorithm=algorithm, schedule="fixed", max_staleness=lag, learning_rate=rate)
    return {"kind": "cell", "piece": "p", **labels, "steps": list(steps), "reward": rewards, "seeds": list(range(len(rewards)))}


def source_rows() -> list[dict]:
    rows = [start_row("bandit")]
    for (algorithm, lag), counts in SOURCE.items():
        for rate, count in zip(RATES, counts, strict=True):
            rewards = [[0.5, 0.8, 0.9]] * count + [[0.5, 0.3, 0.0]] * (SEEDS - count)
            rows.append(cell_row("bandit", algorithm, lag, rate, STEPS, rewards))
    return rows


@pytest.fixture(scope="module")
def planned():
    config = tiny_config()
    long_runs.validate(config)
    return config, long_runs.plan(config, source_rows())


def test_the_study_as_configured_can_be_run_and_keeps_its_budget():
    config = study_config.get_config().to_dict()
    long_runs.validate(config)
    assert config["num_seeds"] * 24 * 8000 <= config["max_run_updates"] == 2_000_000
    with pytest.raises(ValueError, match="config.max_run_updates is 1000000; the plan may take 1920000"):
        long_runs.validate(config | dict(max_run_updates=1_000_000))


def test_learning_rates_are_the_largest_of_the_grid_below_a_share_of_the_boundary(planned):
    _, entries = planned
    for entry in entries:
        counts = SOURCE[entry["algorithm"], entry["max_staleness"]]
        curve = np.array([[1] * count + [0] * (SEEDS - count) for count in counts])
        boundary = stable_learning_rate(RATES, curve)
        assert entry["status"] == boundary.status and entry["boundary"] == boundary.eta_80
        if boundary.eta_80 is None:
            assert entry["learning_rate"] is None and boundary.status in entry["reason"]
        else:
            allowed = [rate for rate in RATES if rate <= entry["share"] * boundary.eta_80]
            assert entry["learning_rate"] == max(allowed, default=None)
    assert {entry["status"] for entry in entries} == {"found", "none", "censored"}
    placed = {(e["algorithm"], e["max_staleness"], e["share"]): e["learning_rate"] for e in entries}
    assert placed["clip", 5, 0.8] == 0.25 and placed["clip", 5, 0.5] is None  # below the smallest rate tried
    assert len({placed["clip", 3, share] for share in (0.8, 0.5)}) == 2


def test_an_unfinished_source_is_refused(planned):
    config, _ = planned
    rows = [row for row in source_rows() if (row.get("algorithm"), row.get("learning_rate")) != ("clip", 2.0)]
    with pytest.raises(ValueError, match="with 5 of 6 learning rates of bandit/clip at S = 0"):
        long_runs.plan(config, rows)


def test_every_pair_of_lag_and_rate_is_run_once_with_new_seeds(planned):
    config, entries = planned
    sweep = long_runs.long_sweep(config, entries)
    sweep_run.validate(sweep)
    wanted = {(e["algorithm"], e["max_staleness"], e["learning_rate"]) for e in entries if e["learning_rate"] is not None}
    found = [
        (chunk.algorithm, cell.max_staleness, chunk.learning_rate) for chunk in sweep_run.chunks(sweep) for cell in chunk.cells
    ]
    assert set(found) == wanted and all(found.count(run) == config["num_seeds"] for run in wanted)
    seeds = {cell.seed for chunk in sweep_run.chunks(sweep) for cell in chunk.cells}
    assert seeds == set(range(200, 204)) and {case["num_updates"] for case in sweep["cases"].values()} == {72}


def test_expected_shares_are_those_of_the_moved_boundary():
    entry = dict(learning_rate=1.0, boundary=2.0, width=math.log(3))
    slope = 2 * math.log(4) / math.log(3)
    for factor in (1, 2, 10):
        odds = 4 * (2.0 / factor) ** slope  # of success at η = 1: 4 to 1 at the boundary
        assert long_runs.expected_share(entry, factor, 0.8) == pytest.approx(odds / (1 + odds))
    assert long_runs.expected_share(entry | dict(learning_rate=2.0), 1, 0.8) == pytest.approx(0.8)


def test_the_steepest_exponent_is_the_one_whose_expected_share_is_the_lowest():
    entry = dict(learning_rate=1.0, boundary=2.0, width=1.3)
    for factor, exponent in ((10, -1.0), (10, -0.3), (4, -0.5)):
        share = long_runs.expected_share(entry, factor**-exponent, 0.8)
        assert long_runs.steepest_exponent(entry, share, factor, 0.8) == pytest.approx(exponent)
    assert long_runs.steepest_exponent(entry, 0.0, 10, 0.8) is None


def test_survival_is_the_share_left_where_all_are_watched_to_the_end():
    found = long_runs.survival([30, None, 10, 30, None], 100, 0.9)
    assert [(point["step"], point["share"]) for point in found] == [(10, pytest.approx(0.8)), (30, pytest.approx(0.4))]
    assert all(0 < point["interval"][0] < point["share"] < point["interval"][1] < 1 for point in found)
    assert long_runs.survival([None] * 3, 100, 0.9) == []
    assert long_runs.survival([100, 100], 100, 0.9) == [{"step": 100.0, "share": 0.0, "interval": None}]


def planted(planned, collapse_step):
    """Summary of runs in which seed j loses its reward at `collapse_step(j)`; None: never; −inf: it learns after T."""
    config, entries = planned
    config = config | dict(num_seeds=10)
    steps, rows = np.arange(12, 73, 12), []
    sweep = long_runs.long_sweep(config, entries)
    for name, case in sweep["cases"].items():
        rows.append(start_row(name))
        for algorithm in case["algorithms"]:
            ends = [collapse_step(seed) or math.inf for seed in range(10)]
            rewards = [
                np.where(steps >= abs(end), 0.0, np.where((end < 0) & (steps <= 24), 0.35, 0.9)).tolist() for end in ends
            ]
            rows.append(cell_row(name, algorithm, *case["max_staleness"], *case["learning_rates"], steps, rewards))
    return long_runs.summary(rows, config, {"source": source_rows()}), rows


def test_runs_that_hold_exclude_the_horizon_law(planned):
    result, _ = planted(planned, lambda seed: None)
    assert result["cells"] and all(cell["success"] == [10, 10] and cell["survival"] == [] for cell in result["cells"])
    steep = [cell for cell in result["cells"] if cell["expected_horizon_law"][-1] < 0.5]
    assert steep and all(cell["excludes_horizon_law"] and not cell["excludes_same"] for cell in steep)
    page = long_runs.page(result)
    assert "No run collapsed by the first rule." in page and "none shows that the boundary moved" in page
    assert (
        "`no_is` at S = 3, share 0.8: the boundary is none" in page and "`clip` at S = 5, share 0.5: no learning rate" in page
    )


def test_runs_that_are_lost_later_do_not_exclude_it_and_are_counted(planned):
    """Seeds 0 to 7 fall at 60 of 72 updates, seed 8 at 12, the last learns after the horizon T, which is 24."""
    result, _ = planted(planned, lambda seed: 60 if seed < 8 else 12 if seed == 8 else -math.inf)
    for cell in result["cells"]:
        assert cell["success"] == [8, 1] and cell["kept"] == [8, 0] and cell["outcomes"] == {"fall": 9, "success": 1}
        assert sorted(time for time in cell["collapse_times"] if time) == [12.0] + [60.0] * 8
        assert [point["share"] for point in cell["survival"]] == pytest.approx([0.9, 0.1])
        assert cell["excludes_same"]
    num_cells = len(result["cells"])
    assert sum(part["num_runs"] for part in result["pooled"]) == 10 * num_cells
    page, distinct = (
        long_runs.page(result),
        len({(c["algorithm"], c["max_staleness"], c["learning_rate"]) for c in result["cells"]}),
    )
    assert f"Of {9 * distinct} collapses by the first rule in {10 * distinct} distinct runs, {distinct} came within T" in page
    assert f"in {distinct} of them success is lost with time" in page and "none shows that the boundary moved" not in page
    if distinct < num_cells:
        assert f"the same runs counted in both: {num_cells - distinct}." in page


def test_a_run_of_the_machinery(tmp_path, monkeypatch):
    """Records of the source in a folder, one loss at one lag: pieces, a real run, page and figure."""
    monkeypatch.chdir(tmp_path)
    records.append_jsonl(_made(tmp_path / "somewhere" / "source") / "metrics.jsonl", source_rows())
    config = tiny_config() | dict(algorithms=("clip",), max_staleness=(0,), shares=(0.8,))
    long_runs.validate(config)
    (name,) = long_runs.pieces(config)
    workdir, seen = records.open_workdir(tmp_path / "run", config), []
    long_runs.run(config, workdir, lambda *piece: seen.append(piece[0]))
    rows = workdir.read_metrics()
    assert seen == [name] and set(finished_pieces(rows)) == {name}
    (row,) = (row for row in rows if row["kind"] == "cell")
    assert row["steps"] == list(range(12, 73, 12)) and row["seeds"] == [200, 201, 202, 203]
    result = long_runs.summary(rows, config, {"source": source_rows()})
    (cell,) = result["cells"]
    assert cell["learning_rate"] == row["learning_rate"] and sum(cell["outcomes"].values()) == 4
    assert "| clip | 0 | 0.8 |" in long_runs.page(result)
    assert {path.name for path in long_runs.figures(rows, result, tmp_path)} == {"long_runs.png", "long_runs.svg"}


def _made(folder):
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=1), "config.seeds is not a key"),
        (dict(sources=()), "config.sources is ()"),
        (dict(case="sgd2"), "config.case is 'sgd2'"),
        (dict(algorithms=("gspo",)), "config.algorithms is ('gspo',)"),
        (dict(max_staleness=(0, 7)), "config.max_staleness is (0, 7)"),
        (dict(shares=(0.8, 1.5)), "config.shares is 1.5"),
        (dict(factors=(2, 10)), "config.factors is (2, 10)"),
        (dict(factors=(1, 10, 5)), "config.factors is (1, 10, 5)"),
        (dict(num_measurements=84), "config.num_measurements is 84"),
        (dict(first_seed=19), "config.first_seed is 19"),
        (dict(num_seeds=1), "config.num_seeds is 1"),
    ],
)
def test_bad_config_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ValueError) as caught:
        long_runs.validate(study_config.get_config().to_dict() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
