"""Any study: found by its config, killed and resumed without work done twice, and its page is what its records say."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import types
from pathlib import Path

import pytest
from absl.testing import flagsaver
from matplotlib.figure import Figure

from jax_async_grpo import records, studies
from launch import command_line
from launch import study as launch_study

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem.removeprefix("study_") for path in (ROOT / "configs").glob("study_*.py"))
TOY = "toy_study_of_the_tests"
CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(study="{study}", sources={sources}, factor=3))
"""


@pytest.fixture
def toy(monkeypatch):
    """A study that squares 1, 2, 3; `measured` says which pieces were computed, `stop` where a Ctrl-C comes."""
    module = types.ModuleType(TOY)
    module.measured, module.stop = [], None

    def validate(config):
        if config["factor"] < 0:
            raise ValueError(f"config.factor is {config['factor']}; it must be >= 0")

    def measure(name):
        if name == module.stop:
            raise KeyboardInterrupt
        module.measured.append(name)
        return [{"kind": "square", "value": int(name) ** 2}]

    def figures(rows, summary, folder):
        figure = Figure()
        figure.subplots().plot([row["value"] for row in rows if row["kind"] == "square"])
        return studies.save_figure(figure, folder, "squares")

    def summary(rows, config, sources):
        others = {name: len(found) for name, found in sources.items()}
        return {"sum": config["factor"] * sum(row.get("value", 0) for row in rows), "others": others}

    module.validate, module.figures, module.summary = validate, figures, summary
    module.pieces = lambda config: ["1", "2", "3"]
    module.run = lambda config, workdir, on_piece: studies.run_pieces(module.pieces(config), workdir, on_piece, measure)
    module.page = lambda summary: f"# {summary['sum']} {summary['others']}\n\n![squares](figures:squares.png)\n"
    monkeypatch.setitem(sys.modules, TOY, module)
    return module


def launch(tmp_path, *arguments, study=TOY, sources=()):
    (tmp_path / "config.py").write_text(CONFIG.format(study=study, sources=sources))
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["launch/study.py", f"--config={tmp_path}/config.py", *map(str, arguments)]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line.run(launch_study.main)
    except SystemExit as stop:
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def test_a_killed_study_goes_on_and_the_page_finds_its_figures(toy, tmp_path):
    run, page = tmp_path / "records" / "toy", tmp_path / "pages" / "toy.md"
    toy.stop = "3"
    code, _, err = launch(tmp_path, f"--workdir={run}", f"--page={page}")
    assert (code, toy.measured) == (130, ["1", "2"]) and "goes on" in err
    assert not page.exists() and not (run / "summary.json").exists()
    toy.stop = None
    code, out, err = launch(tmp_path, f"--workdir={run}", f"--page={page}")
    assert (code, toy.measured) == (0, ["1", "2", "3"]), err
    assert "2 of 3 pieces" in out
    assert page.read_text() == "# 42 {}\n\n![squares](../records/toy/squares.png)\n"
    assert records.read_json(run / "summary.json")["sum"] == 42
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert {"squares.png", "squares.svg", "metrics.jsonl", "config.json"} < set(before)
    assert launch(tmp_path, f"--workdir={run}", f"--page={page}")[0] == 0 and toy.measured == ["1", "2", "3"]
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    assert launch(tmp_path, f"--workdir={run}", "--config.factor=1")[0] == 2
    assert launch(tmp_path, f"--workdir={run}", "--config.factor=1", "--overwrite")[0] == 0
    assert toy.measured == ["1", "2", "3"] * 2
    assert (run / "page.md").read_text() == "# 14 {}\n\n![squares](squares.png)\n"


def test_a_study_reads_the_records_of_others(toy, tmp_path):
    other = tmp_path / "other"
    code, _, err = launch(tmp_path, f"--workdir={tmp_path / 'run'}", sources=(str(other),))
    assert code == 2 and "holds no records" in err and toy.measured == []
    other.mkdir()
    records.append_jsonl(other / "metrics.jsonl", [{"kind": "piece", "piece": "a", "seconds": 1.0}] * 2)
    assert launch(tmp_path, f"--workdir={tmp_path / 'run'}", sources=(str(other),))[0] == 0
    assert "{'other': 2}" in (tmp_path / "run" / "page.md").read_text()


def test_results_of_an_unfinished_study_are_refused(toy, tmp_path):
    workdir = records.open_workdir(tmp_path / "run", {})
    studies.run_pieces(["1"], workdir, lambda *_: None, lambda name: [{"kind": "square", "value": 1}])
    assert [(row["kind"], row["piece"]) for row in workdir.read_metrics()] == [("square", "1"), ("piece", "1")]
    with pytest.raises(ValueError, match="lacks 2 of its pieces, the first is 2"):
        studies.write_results(toy, {"sources": ()}, workdir, tmp_path / "page.md")


def test_the_command_line_says_what_is_wrong_and_what_would_run(toy, tmp_path):
    code, out, _ = launch(tmp_path, "--dry_run")
    assert code == 0 and out.splitlines() == ["1", "2", "3", "3 pieces"] and not toy.measured
    for arguments, message in [(["--dry_run", "--config.factor=-1"], "config.factor is -1"), ([], "give --workdir=")]:
        code, _, err = launch(tmp_path, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    for study, message in [("no.such.study", "config.study is 'no.such.study'"), ("math", "has no function validate, pieces")]:
        code, _, err = launch(tmp_path, "--dry_run", study=study)
        assert code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="config.study is missing: this is no config of a study"):
        studies.load_study({"sources": ()})
    (tmp_path / "file").write_text("x")
    for page in (tmp_path, tmp_path / "file" / "page.md", tmp_path / "file" / "new" / "page.md"):
        code, _, err = launch(tmp_path, f"--workdir={tmp_path / 'run'}", f"--page={page}")
        assert code == 2 and err == f"error: --page={page} cannot be written; give a file in a folder that can\n"
    assert not toy.measured
    code, _, err = launch(tmp_path, "--dry_run", sources="'docs'")
    assert code == 2 and "config.sources is 'docs'" in err


def test_make_runs_every_study_in_an_order_that_gives_each_its_sources():
    line = re.search(r"^STUDIES :=(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert sorted(line) == CONFIGS
    for index, name in enumerate(line):
        config = importlib.import_module(f"configs.study_{name}").get_config().to_dict()
        assert {Path(folder).name for folder in config["sources"]} <= set(line[:index])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_and_the_summary_are_what_the_records_say(name):
    folder = ROOT / "docs" / "laws" / "records" / name
    config = importlib.import_module(f"configs.study_{name}").get_config().to_dict()
    study = studies.load_study(config)
    study.validate(config)
    rows = records.read_jsonl(folder / "metrics.jsonl")
    assert set(study.pieces(config)) <= set(studies.finished_pieces(rows))  # probes are derived from anchors, and come on top
    assert records.read_json(folder / "config.json") == records.to_plain(config)
    with contextlib.chdir(ROOT):
        result = study.summary(rows, config, studies.read_sources(config))
    page = ROOT / "docs" / "laws" / f"{name}.md"
    assert studies.page_text(study, result, f"records/{name}") == page.read_text()
    named = re.findall(r"\]\((records/[^)]+)\)", page.read_text())
    assert named and all((page.parent / path).exists() for path in named)
    # whole runs of every seed are put away compressed
    assert sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("metrics.jsonl")) < 2.5e6
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3.6e6
