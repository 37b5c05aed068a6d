"""A page says what the records say, whatever kind of run it is; it is valid HTML, loads nothing and escapes everything."""

from __future__ import annotations

import base64
import contextlib
import html.parser
import io
import itertools
import math
import sys
import types

import numpy as np
import pytest
from absl.testing import flagsaver
from matplotlib.figure import Figure

from configs import audit as audit_config
from configs import measure_bias as bias_config
from configs import train_smoke
from jax_async_grpo import audit, bias_run, experiment, html_report, records, run_pages, studies, sweep_run, sweep_summary
from jax_async_grpo.html_report import Folded, Items, Markdown, Page, Picture, Section, Table, Text
from jax_async_grpo.sweep_figure import level_of, sweep_figure, whole_horizon
from launch import command_line
from launch import report as launch_report

VOID = {"br", "hr", "img", "meta"}
NASTY = """<script>alert("1 & 2's")</script></td>{{ 7 * 7 }}"""


class Reader(html.parser.HTMLParser):
    """Texts, cells of tables and image data of a page; complaints about tags that do not match and what loads or runs."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.complaints, self.texts, self.images, self.tables, self.warnings = [], [], [], [], [], []
        self.warned = False
        self.feed(text)
        self.close()
        self.complaints += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("script", "link", "iframe", "object", "base") or any(name.startswith("on") for name in named):
            self.complaints.append(f"<{tag}> loads or runs something")
        for name in ("src", "href", "srcset", "action"):
            if name in named and not named[name].startswith(("data:image/", "#")):
                self.complaints.append(f"{name}={named[name]} leads out of the page")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(base64.b64decode(named["src"].partition("base64,")[2]))
            self.complaints += [] if named.get("alt") else ["an image has no alt"]
        self.warned = named.get("class") == "warning"

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.complaints.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        if "style" in self.open:
            self.complaints += ["the style loads something"] if "url(" in data or "@import" in data else []
            return
        self.texts.append(data)
        if self.warned and data.strip():
            self.warnings.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def column(self, name: str) -> list[str]:
        """Cells of the first table that has the column."""
        table = next(table for table in self.tables if name in table[0])
        return [row[table[0].index(name)] for row in table[1:]]


def read(page: Page) -> Reader:
    found = Reader(html_report.render(page))
    assert found.complaints == []
    return found


def picture(folder, name="dot", text="") -> None:
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, text)
    studies.save_figure(figure, folder, name)


def test_what_a_page_holds_is_read_back_as_it_was(tmp_path):
    picture(tmp_path)
    table = Table([NASTY, "b"], [[NASTY, "1.0"], ["", "–"]], NASTY)
    parts = [Text(NASTY), Items([(NASTY, "note" + NASTY)]), table, Folded(NASTY, [Text("inner")])]
    parts += [Picture(tmp_path / "dot.svg", NASTY), Picture(tmp_path / "dot.png", "dots")]
    found = read(Page(NASTY, NASTY, [Section(NASTY, parts)], [NASTY]))
    assert found.tables == [[[NASTY, "b"], [NASTY, "1.0"], ["", "–"]]]
    assert "".join(found.texts).count(NASTY) == 13 and "inner" in found.text
    assert found.warnings == [NASTY]
    assert found.images == [(tmp_path / name).read_bytes() for name in ("dot.svg", "dot.png")]


def test_markdown_keeps_its_structure_and_loads_nothing(tmp_path):
    picture(tmp_path)
    text = (
        "# Law\n\n**bold** <b onclick='x'>raw</b> [words](../docs/x.md) <https://a.b/c> [bad](javascript:alert(1))\n\n"
        "| a | b |\n|---|---|\n| 1 | `<i>` |\n\n![dots](dot.svg) ![gone](lost.png) ![net](https://a.b/c.png)\n\n<script>1</script>\n"
    )
    found = read(Page("t", "l", [Section("s", [Markdown(text, tmp_path)])]))
    assert found.tables == [[["a", "b"], ["1", "<i>"]]]
    assert found.images == [(tmp_path / "dot.svg").read_bytes()]
    for words in (
        "<b onclick='x'>raw</b>",
        "words (../docs/x.md)",
        "<script>1</script>",
        "[figure not found: gone]",
        "found: net]",
    ):
        assert words in found.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<p>a<b>c</p></b>", "closes something else"),
        ("<p>a", "never closed"),
        ("<p></p></div>", "closes something else"),
        ("<img src='http://a.b/c.png' alt=x>", "leads out"),
        ("<a href='docs/x.md'>x</a>", "leads out"),
        ("<script>1</script>", "runs"),
        ("<p onclick='1'>x</p>", "runs"),
        ("<style>@import 'x'</style>", "style loads"),
        ("<img src='data:image/png;base64,' alt=''>", "no alt"),
    ],
)
def test_the_reader_of_these_tests_catches(text, complaint):
    assert any(complaint in found for found in Reader(text).complaints)


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    html_report.write_page(Page("old", "l", []), path)
    (tmp_path / "x.gif").write_bytes(b"")
    for part, message in (
        (Table(["a"], [["1"], ["1", "2"]]), r"rows\[1\] has 2 cells; the table has 1 columns"),
        (Picture(tmp_path / "x.gif", "c"), "x.gif is no .svg or .png file"),
    ):
        with pytest.raises(ValueError, match=message):
            html_report.write_page(Page("new", "l", [Section("s", [part])]), path)
    assert "old" in path.read_text() and sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "x.gif"]


# Planted sweep: at "clip" the largest good η is 4 at S = 0 and 1 at S = 3, at S = 7 none is good and at S = 15 every one; at
# "free" success comes back twice.
RATES, GOOD = (0.5, 1.0, 2.0, 4.0, 8.0), {0: 4.0, 3: 1.0, 7: 0.0, 15: 9.0}


def sweep_run_of(folder, *, without=(), num_updates=40, stride=4):
    folder.mkdir(exist_ok=True)
    case = dict(algorithms=("clip", "free"), schedules=("fixed",), max_staleness=tuple(GOOD), learning_rates=RATES)
    case |= dict(num_seeds=6, first_seed=0, num_updates=num_updates)
    rule = dict(end_window=0.1, keep=0.7)
    config = dict(rule=rule, level=0.7, confidence=0.9, algorithms=dict(clip={}, free={}), cases=dict(digits=case))
    steps = np.arange(stride, num_updates + 1, stride)
    good, bad = np.linspace(0.5, 1, len(steps)), np.full(len(steps), 0.1)
    rows = [dict(kind="start", case="digits", reward=0.4, ceiling=1.0)]
    for chunk in sweep_run.chunks(config):
        if chunk.name in without:
            continue
        for lag in GOOD:
            holds = chunk.learning_rate <= GOOD[lag] if chunk.algorithm == "clip" else RATES.index(chunk.learning_rate) % 2 == 0
            curves = np.tile(good if holds else bad, (6, 1)).tolist()
            names = dict(case="digits", algorithm=chunk.algorithm, schedule="fixed", max_staleness=lag)
            values = dict(learning_rate=chunk.learning_rate, steps=steps.tolist(), seeds=list(range(6)), reward=curves)
            rows.append(dict(kind="cell", piece=chunk.name, **names, **values))
        rows.append(dict(kind="piece", piece=chunk.name))
    records.write_json(folder / "config.json", config)
    records.append_jsonl(folder / "metrics.jsonl", rows)
    return config, rows


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    config, rows = sweep_run_of(folder)
    return folder, sweep_summary.summary(rows, config, {}), read(run_pages.page_of_run(folder))


def test_a_sweeps_page_says_every_boundary_or_the_word_for_it(swept):
    folder, summary, page = swept
    whole = whole_horizon(summary["boundaries"])
    assert [line["horizon"] for line in whole] == [40.0] * 8
    words = ["found", "found", "none", "censored"] + ["ill-defined"] * 4
    assert [line["status"] for line in whole] == words
    said = page.column("η_70")
    assert said == [f"{line['eta_70']:.4g}" if line["status"] == "found" else line["status"] for line in whole]
    assert page.column("interval")[:3] == ["[{:.3g}, {:.3g}]".format(*line["interval"]) for line in whole[:2]] + ["–"]
    assert page.column("S (updates)") == ["0", "3", "7", "15"] * 2 and page.column("T (updates)") == ["40"] * 8
    assert page.column("share of success")[: len(RATES)] == ["1.00"] * 4 + ["0.00"]
    assert page.warnings == [] and page.images == [(folder / "sweep.svg").read_bytes()]
    assert "S = 7, T = 40 : none: the highest share of success is 0.00, below 0.7" in page.text
    assert "S = 15, T = 40 : censored: the largest rate tried, 8, still succeeds in 100%" in page.text
    assert "not to be used" in page.text and "rule.keep" in page.column("key")
    assert "Versions of the libraries are not recorded" in page.text


def test_the_figure_of_a_sweep_shows_what_its_summary_holds(swept, tmp_path):
    _, summary, _ = swept
    whole = whole_horizon(summary["boundaries"])
    figure = sweep_figure(summary, tmp_path / "sweep.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.png", "sweep.svg"]
    clip, free, boundaries = figure.axes
    for ax, name in ((clip, "clip"), (free, "free")):
        mine = [line for line in whole if line["algorithm"] == name]
        curves = [line for line in ax.lines if line.get_gid() == "shares"]
        assert [curve.get_ydata().tolist() for curve in curves] == [line["shares"] for line in mine]
        assert [curve.get_xdata().tolist() for curve in curves] == [list(RATES)] * 4
        assert [text.get_text() for text in ax.texts] == [line["status"] for line in mine if line["status"] != "found"]
    found = [line for line in whole if line["status"] == "found"]
    strip = [line for line in clip.lines if line.get_gid() == "boundary"]
    assert [line.get_xdata()[0] for line in strip] == [line["eta_70"] for line in found]
    assert all(line.get_ydata()[0] < 0 for line in strip)  # below the shares
    curve = next(line for line in boundaries.lines if line.get_gid() == "boundary")
    np.testing.assert_allclose(curve.get_ydata(), [line["eta_70"] for line in found] + [math.nan] * 2)
    bars = [line.get_ydata() for line in boundaries.lines if line.get_gid() == "interval"]
    low, high = boundaries.get_ylim()
    np.testing.assert_allclose(bars, [np.clip(line["interval"], low, high) for line in found])
    places = {
        gid: [line.get_ydata() for line in boundaries.lines if line.get_gid() == gid]
        for gid in ("none", "censored", "ill-defined")
    }
    assert [len(places[gid]) for gid in places] == [1, 1, 4]
    assert places["none"][0][0] < min(RATES) and places["censored"][0][0] > max(RATES)  # at the edges, off every tried rate
    assert all(len(edges) == 2 for edges in places["ill-defined"])
    assert level_of(found[0]) == ("eta_70", 0.7)
    again = tmp_path / "again"
    again.mkdir()
    sweep_figure(summary, again / "sweep.png")
    assert (again / "sweep.svg").read_bytes() == (tmp_path / "sweep.svg").read_bytes()


def test_a_figure_of_no_sweep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="summary holds no boundary"):
        sweep_figure({"boundaries": []}, tmp_path / "sweep.png")
    with pytest.raises(ValueError, match="must end in .png"):
        sweep_figure({"boundaries": []}, tmp_path / "sweep.svg")


def test_an_unfinished_sweep_says_what_is_missing(tmp_path):
    sweep_run_of(tmp_path / "part", without=("digits/clip/4", "digits/free/8"))
    page = read(run_pages.page_of_run(tmp_path / "part"))
    (warning,) = page.warnings
    assert "2 of 10 chunks are missing (digits/clip/4, digits/free/8)" in warning
    (tmp_path / "part" / "metrics.jsonl").unlink()
    page = read(run_pages.page_of_run(tmp_path / "part"))
    assert "10 of 10 chunks are missing (digits/clip/0.5" in page.warnings[0] and "and 5 more" in page.warnings[0]
    assert page.images == [] and "rule.keep" in page.column("key")


def bias_run_of(folder, *, exponent=1.0):
    """Exact runs of a planted law ‖δ‖ = 0.1·(S·η)^exponent, the last chunk missing; no limit was reached."""
    folder.mkdir()
    config = bias_config.get_config().to_dict()
    changes = dict(
        updates=("exact",), schedules=("fixed",), max_staleness=(0, 1, 2, 4), learning_rates=(0.01, 0.02, 0.04, 0.08)
    )
    config |= dict(num_bootstrap=100, cases={"tabular": {**config["cases"]["tabular"], **changes, "num_measurements": 3}})
    rows = []
    for chunk in experiment.chunks(config)[:-1]:
        names = dict(chunk=chunk.name, case="tabular", policy="tabular", task="bandit", optimizer="sgd", loss="ppo_clip")
        for cell in chunk.cells:
            key = names | dict(updates="exact", learning_rate=chunk.learning_rate, seed=cell.seed)
            key |= dict(schedule=cell.schedule, max_staleness=cell.max_staleness)
            bias = 0.1 * (cell.max_staleness * chunk.learning_rate) ** exponent
            measured = {"bias/norm": bias, "bias/relative_norm": 2 * bias, "drift/from_behavior": cell.max_staleness}
            measured |= {"staleness/realised": cell.max_staleness, "reward": 0.5}
            rows += [dict(kind="measurement", **key, step=int(step), **measured) for step in chunk.measure_steps]
            rows.append(dict(kind="cell", **key, msd=[float(lag**2) for lag in range(5)]))
        rows.append(dict(kind="chunk", chunk=chunk.name, seconds=1.5))
    limit = dict(update_norm=0.2, batch_clip_radius=math.inf, largest_clip_radius_searched=12.5, critical_drift_radius=None)
    limit |= dict(collapse=dict(largest_drift=None), staleness_budget="S=4: no limit found")
    rows.append(dict(kind="diagnostics", case="tabular", limit=limit, seconds=0.5))
    records.write_json(folder / "config.json", config)
    records.write_json(folder / "summary.json", {"versions": {"jax": "9.8.7"}})
    records.append_jsonl(folder / "metrics.jsonl", rows)
    return rows


def test_a_sweep_without_a_shorter_horizon_has_no_section_on_it(tmp_path):
    sweep_run_of(tmp_path / "run", num_updates=20, stride=20)
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert "half of the horizon" not in page.text and page.column("T (updates)") == ["20"] * 8


def test_a_bias_measurements_page_says_the_law_and_what_was_not_measured(tmp_path):
    rows = bias_run_of(tmp_path / "run", exponent=1.5)
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert page.column("exponent in it") == page.column("in η") == page.column("in S") == ["1.50 [1.50, 1.50]"]
    assert page.column("measured")[0] == "1.500" and page.column("exponent of MSD(s) in s") == ["2.00 [2.00, 2.00]"]
    assert "1 of 4 chunks are missing (tabular/exact/0.08)" in page.warnings[0] and f"{1.5 * 3 + 0.5:.0f} s" in page.text
    assert "tabular, staleness limit : R_batch above 12.5: the clip level is not reached before" in page.text
    assert "tabular, horizon limit : R_crit not measured" in page.text and "S=4: no limit found" in page.text
    assert "tabular, first-order law : not measured" in page.text
    assert "9.8.7" in page.text and len(bias_run.finished_chunks(rows)) == 3
    assert page.images == [(tmp_path / "run" / "bias.svg").read_bytes()] and (tmp_path / "run" / "bias.png").exists()


def audit_run_of(folder, *, losses, extra=""):
    """Two finished entries and a refused one; curves that follow their law."""
    folder.mkdir()
    config = audit_config.get_config().to_dict()
    config |= dict(losses={name: config["losses"][name] for name in losses}, corrections={}, extra_losses=extra)
    rows, drifts = [], list(config["drifts"])
    for factor, name in enumerate(("ppo_clip", "gspo"), start=1):
        identity = dict(entry=f"{name}/none", loss=name, correction="none")
        for lag, rate in itertools.product(config["max_staleness"], config["learning_rates"]):
            bias = {"bias/norm": factor * lag * rate, "bias/relative_norm": factor * lag * rate / 2, "bias/cosine": 0.9}
            grad = {"grad/fresh_norm": 2.0, "grad/norm": 2.0, "grad/variance": 1.0, "cut_fraction": 0.0}
            shares = {f"share/{role}": 1 / 3 for role in ("sampling", "denominator", "statistics")}
            rows.append(dict(kind="point", max_staleness=lag, learning_rate=rate, **identity, **bias, **grad, **shares))
        norms = {"bias/norm": [factor * x for x in drifts], "bias/relative_norm": [factor * x / 2 for x in drifts]}
        law = dict(first_order_coefficient=float(factor), saturation_drift=math.inf, no_law=None)
        rows += [
            dict(kind="curve", **identity, **{"drift/from_behavior": drifts}, **norms, **law),
            dict(kind="entry", **identity),
        ]
    identity = dict(entry="m2po/none", loss="m2po", correction="none")
    rows += [dict(kind="refused", reason="it <couples> rows", **identity), dict(kind="entry", **identity)]
    records.write_json(folder / "config.json", config)
    records.append_jsonl(folder / audit.RECORDS, rows)


def test_an_audits_page_ranks_refuses_and_says_what_is_missing(tmp_path):
    folder = tmp_path / "run"
    audit_run_of(folder, losses=("ppo_clip", "gspo", "m2po", "sapo"))
    page = read(run_pages.page_of_run(folder))
    assert page.column("loss") == ["ppo_clip", "gspo"] and page.column("relative bias") == ["0.6400", "1.2800"]
    assert page.column("law left at") == ["> 4", "> 4"] and "m2po/none : it <couples> rows" in page.text
    assert "1 of 4 lines are missing (sapo/none)" in page.warnings[0]
    assert page.images == [(folder / f"{name}.svg").read_bytes() for name in ("bias_variance", "curves")]
    assert (folder / "curves.png").exists() and not (folder / "audit.html").exists()
    assert "controls at S = 0: 0 (0 is right)" in page.text
    (folder / audit.RECORDS).unlink()
    page = read(run_pages.page_of_run(folder))
    assert "4 of 4 lines are missing" in page.warnings[0] and "None is finished yet." in page.text and page.images == []


def test_an_audit_of_a_loss_that_is_not_here_is_shown_all_the_same(tmp_path):
    audit_run_of(tmp_path / "run", losses=("ppo_clip",), extra="no_such_package.loss")
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert "Whether lines are missing cannot be told here" in page.warnings[0] and page.column("loss") == ["ppo_clip", "gspo"]


@pytest.fixture
def toy(monkeypatch):
    """A study that squares 1 and 2."""
    module, name = types.ModuleType("toy_study_of_the_page"), "toy_study_of_the_page"
    module.validate, module.pieces = lambda config: None, lambda config: ["1", "2"]
    module.run = lambda config, workdir, on_piece: None
    module.summary = lambda rows, config, sources: {"sum": sum(row.get("square", 0) for row in rows)}
    module.page = lambda summary: f"# The sum is {summary['sum']}\n\n![squares](figures:squares.png)\n"
    module.figures = lambda rows, summary, folder: picture(folder, "squares")
    monkeypatch.setitem(sys.modules, name, module)
    return name


def study_of(folder, study, pieces):
    folder.mkdir(exist_ok=True)
    records.write_json(folder / "config.json", dict(study=study, sources=[]))
    for piece in pieces:
        rows = [dict(kind="square", piece=piece, square=int(piece) ** 2), dict(kind="piece", piece=piece, seconds=0.5)]
        records.append_jsonl(folder / "metrics.jsonl", rows)


def test_a_studys_page_is_its_own_once_it_is_finished(toy, tmp_path):
    study_of(tmp_path / "run", toy, ["1"])
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert "1 of 2 pieces are missing (2)" in page.warnings[0] and "The sum" not in page.text
    study_of(tmp_path / "run", toy, ["2"])
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert "The sum is 5" in page.text and page.warnings == [] and page.column("piece") == ["1", "2"]
    assert page.images == [(tmp_path / "run" / "squares.png").read_bytes()]
    study_of(tmp_path / "run", "no_such_study", [])
    page = read(run_pages.page_of_run(tmp_path / "run"))
    assert (
        "cannot be made here" in page.warnings[0] and "no_such_study" in page.warnings[0] and page.column("piece") == ["1", "2"]
    )


def training_run_of(folder, *, num_updates=12, bias=True, **changes):
    """Records of twelve updates at S = 4, the third skipped; two bias measurements, one of them detected, and NaN in places."""
    folder.mkdir()
    config = train_smoke.get_config()
    config.staleness.max, config.optimizer.learning_rate, config.num_updates = 4, 0.02, 12
    config.update_from_flattened_dict(changes)
    rows = [dict(kind="warm_start", step=0, heldout_reward=0.1), dict(kind="start", num_parameters=12345, warm_start_updates=7)]
    for t in range(num_updates + 1):
        if t % 4 == 0:
            failed = {"verifier/raised": 3 * t, "verifier/timed_out": 0, "verifier/not_finite": t}
            collapse = {"collapse/flag": int(t > 8), "collapse/step": 9.5 if t > 8 else None}
            rows.append({"kind": "evaluation", "step": t, "heldout_reward": 0.25 + 0.05 * t, **failed, **collapse})
        if bias and t in (4, 8):
            row = {"kind": "bias", "step": t, "detected": int(t == 8), "method": NASTY, "ess_ratio": 0.75}
            row |= {"staleness": 4, "fresh_norm_squared": 0.32, "bias/norm_squared": (0.01 * t) ** 2}
            row |= {"bias/norm": 0.01 * t, "bias/standard_error": 0.0125, "bias/detection_limit": 0.0625 if t == 4 else 0.03}
            rows.append(row | {"bias/relative_norm": math.nan if t == 4 else 0.125, "bias/cosine": 0.975})
        if t < num_updates:
            row = {"kind": "update", "step": t, "reward": 0.2, "update/norm": 0.1, "update/is_finite": float(t != 2)}
            row |= {"staleness/mean": min(t, 4.0), "staleness/max": min(t, 4.0), "off_policy/k3_kl": 0.01 * t}
            rows.append(row | {"lr/t_eta": 0.02 * (t + 1)})
    records.write_json(folder / "config.json", config.to_dict())
    records.append_jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_a_training_runs_page_says_how_it_went(tmp_path):
    folder = training_run_of(tmp_path / "run")
    page = read(run_pages.page_of_run(folder))
    outcome = dict(zip(page.column("quantity"), page.column("value"), strict=True))
    assert (
        outcome["updates"] == "12 of 12" and outcome["parameters"] == "12,345" and outcome["updates of the warm start"] == "7"
    )
    assert [outcome[f"held-out reward, {name}"] for name in ("start", "end", "best")] == ["0.25", "0.85", "0.85"]
    assert outcome["collapse"] == "after 9.5 updates" and outcome["updates skipped as not finite"] == "1"
    assert outcome["staleness, mean (updates)"] == "3.167" and outcome["staleness, largest (updates)"] == "4"
    assert outcome["sum of the learning rates, T·η"] == "0.24"
    assert outcome["samples that the verifier failed on"] == "36 raised, 12 not finite"
    assert page.column("‖δ‖") == ["0.04", "0.08"] and page.column("detection limit") == ["0.0625", "0.03"]
    assert page.column("detected") == ["no", "yes"] and page.column("over the fresh gradient") == ["–", "0.125"]
    assert page.column("standard error") == ["0.0125"] * 2 and page.column("fresh gradient") == [NASTY] * 2
    assert "Measurements : 2. One by one : told from none in 1 of 2" in page.text
    assert "sees a ‖δ‖ of 0.0462 (median of the detection limits) four times in five, 0.0818 times the root mean" in page.text
    assert "estimated as 0.004 ± 0.0024 (standard error), 90 % interval [-0.0112, 0.0192]" in page.text
    assert "Their ratio: 0.0125 [-0.0349, 0.0599]. The first interval is not above 0: together they do not tell" in page.text
    assert "nor exclude one of up to 0.24 times the gradient" in page.text
    assert page.column("held-out reward") == ["0.25", "0.45", "0.65", "0.85"]
    assert page.column("failed samples so far") == ["0", "16", "32", "48"] and page.column("collapse") == [
        "no",
        "no",
        "no",
        "collapsed",
    ]
    assert page.images == [(folder / "train.svg").read_bytes()] and (folder / "train.png").exists()
    assert not page.warnings and "Staleness bias :" not in page.text and "staleness.max" in page.column("key")
    assert "digit_text with decoder, trained on rollouts that are up to S = 4" in page.text and "S·η = 0.08" in page.text


def test_an_unfinished_training_run_says_so_and_what_was_not_measured(tmp_path):
    options = dict(bias=False, task=NASTY, updates_per_batch=3, replay="rollouts", max_bad_updates=1)
    page = read(run_pages.page_of_run(training_run_of(tmp_path / "run", num_updates=6, **options)))
    assert "This run is not finished: 6 of 12 updates are done" in page.warnings[0] and len(page.images) == 1
    assert "Staleness bias : not measured: no measurement was due yet" in page.text
    assert "Independent data : each batch serves 3 updates" in page.text and "replay of rollouts keeps no old ones" in page.text
    gave_up = training_run_of(tmp_path / "bad", num_updates=3, bias=False, max_bad_updates=1, **{"bias.every": 0})
    page = read(run_pages.page_of_run(gave_up))
    assert page.warnings == ["This run gave up after 3 of 12 updates: loss or gradient of the last 1 are not finite."]
    assert "not measured: bias.every is 0" in page.text
    page = read(run_pages.page_of_run(training_run_of(tmp_path / "none", num_updates=-1)))
    assert "0 of 12 updates are done" in page.warnings[0] and not page.images


def test_an_unknown_run_is_shown_as_it_is(tmp_path):
    picture(tmp_path, "plan", "svg")
    records.write_json(tmp_path / "config.json", {"wanted": {"max_staleness": 4}})
    limits = [{"regime": NASTY, "eta": 0.0123456}, {"eta": math.inf, "known": False, "interval": [0.5, None]}]
    records.write_json(
        tmp_path / "plan.json", {"recommended": 1.5, "limits": limits, "deeper": {"radius": {"value": math.nan}}}
    )
    records.append_jsonl(tmp_path / "anchors.jsonl", [{"kind": "a"}] * 3)
    page = read(run_pages.page_of_run(tmp_path))
    assert page.column("regime") == [NASTY, "–"] and page.column("eta") == ["0.01235", "inf"]
    assert page.column("known") == ["–", "no"] and page.column("interval") == ["–", "[0.5, –]"]
    assert [["recommended", "1.5"]] == page.tables[0][1:] and "nan" in page.text and ["anchors.jsonl", "3"] in page.tables[-2]
    assert page.images == [(tmp_path / "plan.svg").read_bytes()]  # one figure in two formats is shown once
    assert page.column("key") == ["wanted.max_staleness"]


def launch(*arguments):
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["launch/report.py", *map(str, arguments)]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line.run(launch_report.main)
    except SystemExit as stop:
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def test_the_job_writes_one_file_and_says_where(tmp_path):
    records.write_json(tmp_path / "summary.json", {"a": 1})
    assert launch(f"--workdir={tmp_path}") == (0, f"{tmp_path}/report.html\n", "")
    assert launch(f"--workdir={tmp_path}", f"--output={tmp_path}/own.html") == (0, f"{tmp_path}/own.html\n", "")
    assert (tmp_path / "own.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    records.open_workdir(tmp_path, {"b": 1}, overwrite=True)
    assert not (tmp_path / "report.html").exists()  # of the run that was there


SWEEP = '{"cases": {}, "rule": {}, "algorithms": {}, "level": 0.8, "confidence": 0.9}'


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["--workdir={}"], "holds no run: there is no config.json and no summary"),
        ({"metrics.jsonl": "{}\n"}, ["--workdir={}"], "holds no run"),
        ({}, ["--workdir={}/none"], "none is no folder; give the --workdir of a run"),
        ({"file": ""}, ["--workdir={}/file"], "file is no folder"),
        ({"summary.json": "{"}, ["--workdir={}"], "summary.json is not JSON"),
        ({"config.json": '{"study": "x", "sources": []}', "metrics.jsonl": "{}\n"}, ["--workdir={}"], "line 1 is no record"),
        ({"config.json": SWEEP, "metrics.jsonl": "{\n"}, ["--workdir={}"], "delete the line, or run the job again\n"),
        ({"config.json": '{"rank_at": [1, 0.5], "losses": {}}'}, ["--workdir={}"], "lacks 'extra_losses'"),
        ({"config.json": SWEEP, "summary.json": "[]"}, ["--workdir={}"], "summary.json is no summary of a run"),
        ({"config.json": SWEEP, "summary.json": '{"versions": 3}'}, ["--workdir={}"], "summary.json is no summary of a run"),
        ({"config.json": SWEEP.replace("{}", "[1]", 1)}, ["--workdir={}"], "cannot be read as a run of launch.sweep (Attrib"),
        ({"config.json": SWEEP.replace("{}", '{"a": null}', 1)}, ["--workdir={}"], "launch.sweep (TypeError: "),
        ({"config.json": SWEEP.replace("{}", '{"x": 1}')}, ["--workdir={}"], "cannot be read as a run of launch.sweep"),
        ({"config.json": "[" * 100_000}, ["--workdir={}"], "config.json is not JSON"),
        ({"summary.json": "{}"}, ["--workdir={}", "--output={}/x.pdf"], "x.pdf must end in .html"),
        ({"summary.json": "{}"}, ["--workdir={}", "--output={}/none/x.html"], "lie in a folder that exists"),
        ({"summary.json": "{}", "x.html/y": ""}, ["--workdir={}", "--output={}/x.html"], "x.html is a folder; give a file"),
        ({}, [], "give --workdir=DIR"),
    ],
)
def test_what_is_no_run_is_one_clear_line(tmp_path, files, arguments, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, out, err = launch(*(argument.format(tmp_path) for argument in arguments))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "report.html").exists()
