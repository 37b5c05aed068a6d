"""The page of a run, recomputed from its records: bias measurement, audit, sweep, study, training, or anything else.

What kind of run it is, its config says. A folder of another kind, a plan for example, is shown as it is: its JSON files as
tables and the figures that lie there. Figures that are drawn here are also written to the folder, as PNG and SVG. An unfinished
run gets a page of what is there, which says first what is missing.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jax_async_grpo import audit, audit_summary, bias_summary, experiment, records, report, studies, sweep_run, sweep_summary
from jax_async_grpo.bias_run import finished_chunks
from jax_async_grpo.config_checks import job_of
from jax_async_grpo.html_report import Folded, Items, Markdown, Page, Part, Picture, Section, Table, Text
from jax_async_grpo.sweep_figure import level_of, sweep_figure, whole_horizon
from jax_async_grpo.training import page as training_page

__all__ = ["page_of_run"]

Record = Mapping[str, Any]
Rows = Sequence[Record]

_NAMED_AT_MOST = 5  # of what is missing
_ABSENT = "–"


def page_of_run(folder: str | os.PathLike) -> Page:
    """The page of the run in `folder`; draws its figures into the folder.

    Args:
      folder: the --workdir of a launch script, finished or not.

    Raises:
      ValueError: `folder` is no folder, holds no run, or its records are damaged or of a version with other names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"workdir={folder} is no folder; give the --workdir of a run")
    documents = _documents(folder)
    if not documents:
        raise ValueError(f"workdir={folder} holds no run: there is no config.json and no summary; give the --workdir of a run")
    config = documents.get("config.json", {})
    kind = job_of(config)
    if kind not in _BUILDERS:
        return _other_page(folder, documents)
    name = audit.RECORDS if kind == "audit" else "metrics.jsonl"
    rows = records.Workdir(folder, resumed=True).read_rows(name, otherwise="run the job again")
    summary = documents.get("summary.json", {})
    versions = summary.get("versions", {}) if isinstance(summary, dict) else None
    if not isinstance(versions, dict):
        raise ValueError(f"{folder / 'summary.json'} is no summary of a run; the job that wrote it writes it anew")
    try:
        page = _BUILDERS[kind](folder, config, rows, versions)
        what = _what_was_run(kind, folder, config, versions)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # files are the user's: anything can stand in them
        is_name = isinstance(error, KeyError) and error.args and isinstance(error.args[0], str)
        wrong = f"lacks {error}" if is_name else f"cannot be read as a run of launch.{kind} ({type(error).__name__}: {error})"
        raise ValueError(f"workdir={folder} {wrong}: damaged, or of another version of the package; run it again") from error
    return Page(page.title, page.lead, [*page.sections, what], page.warnings)


def _documents(folder: Path) -> dict[str, Any]:
    """{name: content} of the JSON files directly in the folder, config.json first."""
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.name != "config.json", path.name)):
        try:
            found[path.name] = records.read_json(path)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); the job that wrote it writes it anew") from None
    return found


def _what_was_run(kind: str, folder: Path, config: Record, versions: Record) -> Section:
    parts: list[Part] = [
        Text(
            f"python -m launch.{kind} --config=FILE --workdir={shlex.quote(str(folder))}, where FILE gives the config below "
            "(its name is not recorded)."
        ),
        _config_table(config),
    ]
    if versions:
        parts.append(
            Table(["What the numbers depend on", "version"], [[key, _shown(value)] for key, value in versions.items()])
        )
    else:
        parts.append(Text("Versions of the libraries are not recorded: the run wrote no summary.json yet."))
    return Section("What was run", parts)


def _config_table(config: Record) -> Folded:
    flat = flatten_dict(dict(config), sep=".", is_leaf=lambda _, value: not value)
    rows = [[key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] for key, value in flat.items()]
    return Folded(f"Config, {len(flat)} values", [Table(["key", "value"], rows)])


def _warnings(missing: Sequence[str], of: int, unit: str) -> list[str]:
    if not missing:
        return []
    more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
    named = f"{len(missing)} of {of} {unit} are missing ({', '.join(missing[:_NAMED_AT_MOST])}{more})"
    return [
        f"This run is not finished: {named}. The numbers are those of what is there and will change; the same command goes on "
        "from there."
    ]


def _limits(items: Iterable[tuple[str, str]], docs: str) -> Section:
    """What the numbers do not say, and where it is explained how to read them."""
    found = list(items)
    parts: list[Part] = [Items(found)] if found else [Text("Nothing: everything asked for was measured and fitted.")]
    return Section("Not measured, censored or refused", [*parts, Text(f"How to read this page: {docs} in the repository.")])


def _bias_page(folder: Path, config: Record, rows: Rows, versions: Record) -> Page:
    result = bias_summary.summary(rows, config, versions)
    cells, fits = bias_summary.cells(rows, config), result["fits"]
    chunks, done = experiment.chunks(config), finished_chunks(rows)
    sections = []
    if any(cell["bias_rms"] > 0 for cell in cells):
        drawn = report.bias_figure(cells, fits, folder / "bias.png")
        studies.save_figure(drawn, folder, "bias", formats=("svg",), outlines=True)
        sections.append(Section("The law", [_exponents(fits, config), Picture(folder / "bias.svg", _BIAS_CAPTION)]))
    if fits:
        sections.append(Section("What predicts the exponent in S", [_predictions(fits), _local_table(fits, config)]))
    sections += _bias_tables(result)
    return Page(
        title="Staleness bias of the GRPO gradient",
        lead=f"How far the gradient of stale rollouts, H(θ,φ), is from the fresh one, H(θ,θ), measured exactly in {len(cells)} "
        f"runs over staleness S (learner updates) and learning rate η; {result['seconds']:.0f} s of measurement. Largest bias "
        f"of the controls without staleness: {_control(result['max_bias_without_staleness'])}.",
        sections=[*sections, _limits(_bias_limits(result, cells, config), "docs/measure_bias.md")],
        warnings=_warnings([chunk.name for chunk in chunks if chunk.name not in done], len(chunks), "chunks"),
    )


_BIAS_CAPTION = (
    "Root-mean-square bias ‖δ‖ against S_rms·η (realised staleness in updates × learning rate) or the drift ‖θ−φ‖, both axes "
    "logarithmic. A point is one run: color its learning rate, shape its schedule, filled if it lies in the window declared "
    "beforehand and entered the fit. The black line is the fit, dashed where it is continued; the dotted gray line has slope "
    "1, the law ‖δ‖ ∝ S·η. Points that leave the line on the right show where the law ends."
)


def _exponents(fits: Rows, config: Record) -> Table:
    rows = [
        [
            *(str(fit[key]) for key in ("case", "optimizer", "updates", "schedule")),
            "drift" if fit["variable"] == "drift" else "S·η",
            *(
                _with_interval(fit[key], fit["intervals"][key])
                for key in ("exponent", "staleness_exponent", "learning_rate_exponent")
            ),
            f"{fit['r_squared']:.4f}",
            str(fit["num_cells"]),
            "{}..{}".format(*fit["staleness_range"]),
        ]
        for fit in fits
    ]
    columns = [
        "case",
        "optimizer",
        "updates",
        "schedule",
        "variable",
        "exponent in it",
        "in S",
        "in η",
        "R²",
        "runs",
        "S (updates)",
    ]
    caption = (
        f"Exponents of the bias, with {config['confidence']:.0%} bootstrap intervals: over whole seeds for sampled updates; "
        "exact updates have no noise, and theirs say how straight the line is."
    )
    return Table(columns, rows, caption)


def _predictions(fits: Rows) -> Table:
    rows = [
        [
            *(str(fit[key]) for key in ("case", "updates", "schedule")),
            bias_summary.PREDICTIONS[name],
            f"{fit['staleness_exponent']:.3f}",
            f"{prediction['staleness_exponent']:.3f}",
            "[{:+.3f}, {:+.3f}]".format(*prediction["difference_interval"]),
            "rejected" if prediction["rejected"] else _ABSENT,
        ]
        for fit in fits
        for name, prediction in fit["predictions"].items()
    ]
    columns = ["case", "updates", "schedule", "prediction", "measured", "predicted", "interval of the difference", "verdict"]
    return Table(columns, rows, "Exponents in S over the same runs. Only sampled updates can reject: their interval has noise.")


def _local_table(fits: Rows, config: Record) -> Table:
    rows = [
        [
            *(str(fit[key]) for key in ("case", "updates", "schedule")),
            "{} to {}".format(*local["max_staleness"]),
            _with_interval(local["exponent"], local["interval"]),
            str(local["num_pairs"]),
        ]
        for fit in fits
        for local in fit["local_exponents"]
    ]
    caption = (
        f"The exponent in S between neighbors, with {config['confidence']:.0%} intervals: where it changes, the curve bends."
    )
    return Table(["case", "updates", "schedule", "S (updates)", "exponent", "pairs of runs"], rows, caption)


def _bias_tables(result: Record) -> list[Section]:
    responses = [(case, found) for case, found in result["linear_response_error"].items() if found]
    first_order = [
        [
            case,
            f"{found['relative_error_at_1e-3']:.1e}",
            f"{found['slope']:.3f}",
            ", ".join(f"{name} {share:+.0%}" for name, share in result["decomposition"][case]["share"].items()),
        ]
        for case, found in responses
    ]
    limits = [
        [case, limit["staleness_budget"], ", ".join(bias_summary.radii(limit))]
        for case, limit in result["stability_limit"].items()
        if limit
    ]
    drift = [
        [curve["case"], curve["updates"], _with_interval(curve["exponent"], curve["interval"]), str(curve["num_runs"])]
        for curve in result["msd"]
    ]
    tables = {
        "First-order law and parts of the bias": Table(
            ["case", "relative error at S·η = 1e-3", "slope in drift", "shares of the bias by role"],
            first_order,
            "One jvp along the drift predicts the bias; the error of that shrinks with slope 1.",
        ),
        "Two-constraint limit of the learning rate": Table(
            ["case", "η ≪ min(R_batch/drift per η, R_crit/(T·G_upd))", "measured radii (norms of parameters)"], limits
        ),
        "Drift without lag": Table(
            ["case", "updates", "exponent of MSD(s) in s", "runs"],
            drift,
            "2 is ballistic, 1 diffusive; half of it predicts a_S.",
        ),
    }
    return [Section(heading, [table]) for heading, table in tables.items() if table.rows]


def _bias_limits(result: Record, cells: Rows, config: Record) -> Iterable[tuple[str, str]]:
    outside = sum(cell["staleness_rms"] > 0 and not cell["in_window"] for cell in cells)
    if outside:
        yield "Outside the window", f"{outside} of {len(cells)} runs were measured and entered no fit; they are drawn hollow."
    fitted = {(fit["case"], fit["updates"]) for fit in result["fits"]}
    for case, part in config["cases"].items():
        for updates in part["updates"]:
            if (case, updates) not in fitted:
                yield f"{case}, {updates} updates", "no exponents: too few runs in the window, S, η or seeds."
        if not result["linear_response_error"].get(case):
            yield f"{case}, first-order law", "not measured."
        limit = result["stability_limit"].get(case)
        if not limit:
            yield f"{case}, limit", "not measured: not reached yet, or nothing moved."
            continue
        _, batch, critical = bias_summary.radii(limit)
        if limit["batch_clip_radius"] in (None, math.inf):
            yield f"{case}, staleness limit", batch
        if limit["critical_drift_radius"] in (None, math.inf):
            yield f"{case}, horizon limit", critical


def _audit_page(folder: Path, config: Record, rows: Rows, versions: Record) -> Page:
    result = audit_summary.summary(rows, config, versions)
    at, table = result["ranked_at"], result["table"]
    pictures = _audit_pictures(folder, rows, table)
    return Page(
        title=audit_summary.title(result),
        lead=f"{len(table)} lines, each a loss alone or beside a correction, measured exactly at the same stale points and "
        f"ranked by relative bias at S = {at['max_staleness']} updates, η = {at['learning_rate']:g}. Largest bias of the "
        f"controls at S = 0: {_control(result['control_bias'])}.",
        sections=[
            *([Section("Figures", pictures)] if pictures else []),
            *audit_summary.sections(table, result["refused"]),
            Section("How to read this page", [Text("docs/audit.md in the repository.")]),
        ],
        warnings=_audit_warnings(config, rows),
    )


def _audit_warnings(config: Record, rows: Rows) -> list[str]:
    try:
        expected = [entry.name for entry in audit.entries(config)]
    except ValueError as error:  # a loss of the user's own that cannot be imported here
        return [f"Whether lines are missing cannot be told here: {error}."]
    done = audit.finished_entries(rows)
    return _warnings([name for name in expected if name not in done], len(expected), "lines")


def _audit_pictures(folder: Path, rows: Rows, table: Rows) -> list[Picture]:
    drawn: list[tuple[str, Callable, Any, str]] = []
    if any(line["relative_bias"] > 0 and line["relative_std"] > 0 for line in table):
        drawn.append(("bias_variance", audit_summary.bias_variance_figure, table, _TRADE_CAPTION))
    if any(row["kind"] == "curve" for row in rows):
        drawn.append(("curves", audit_summary.curves_figure, rows, _CURVES_CAPTION))
    for name, draw, data, _ in drawn:
        studies.save_figure(draw(data, folder / f"{name}.png"), folder, name, formats=("svg",), outlines=True)
    return [Picture(folder / f"{name}.svg", caption) for name, *_, caption in drawn]


_TRADE_CAPTION = (
    "Relative staleness bias (logarithmic) against the scatter of the gradient of one sampled batch, both relative to the "
    "fresh gradient. Black and named: a loss alone; colored: beside a correction. Lower is less bias, further left less noise."
)
_CURVES_CAPTION = (
    "Relative bias against the drift ‖θ−φ‖, a panel per loss, both axes logarithmic: the loss alone in black, its corrections "
    "colored, dotted its first-order law. Where a curve leaves the dotted line, the law ends."
)


def _sweep_page(folder: Path, config: Record, rows: Rows, versions: Record) -> Page:
    result = sweep_summary.summary(rows, config, versions)
    chunks, done = sweep_run.chunks(config), sweep_run.finished_chunks(rows)
    lines, sections = whole_horizon(result["boundaries"]), []
    if lines:
        sweep_figure(result, folder / "sweep.png")
        picture = Picture(folder / "sweep.svg", _sweep_caption(lines[0], config))
        shorter = [line for line in result["boundaries"] if line not in lines]
        sections = [
            Section("The learning rate up to which runs hold", [_boundaries(lines, config), picture]),
            *([Section("The same runs at half of the horizon", [_boundaries(shorter, config)])] if shorter else []),
            Section("How the runs ended", [_fates(lines)]),
        ]
    return Page(
        title="Learning rates at which whole training runs hold",
        lead=f"{result['num_runs']} training runs over largest staleness S (updates), learning rate η, seed and algorithm, "
        "each judged at its end by one rule: it succeeded, or it fell, froze, never learned or became non-finite.",
        sections=[*sections, _limits(_sweep_limits(result["boundaries"]), "docs/design.md and configs/sweep_digits.py")],
        warnings=_warnings([chunk.name for chunk in chunks if chunk.name not in done], len(chunks), "chunks"),
    )


def _sweep_caption(line: Record, config: Record) -> str:
    _, level = level_of(line)
    return (
        f"Share of successful runs ({line['num_seeds']} seeds a point) against the learning rate η, a panel per algorithm, a "
        f"color per S; in the strip below, per S, the fitted η at which {level:.0%} succeed (dotted line) with its "
        f"{config['confidence']:.0%} interval, or the word that takes its place. The panel without an algorithm's name has "
        "that η against S: markers at the lower edge mean that no tried η reaches the share (none), at the upper that the "
        "largest tried still does (censored), at both that no single boundary exists (ill-defined). A bar that ends "
        "at an edge is open there."
    )


def _boundaries(lines: Rows, config: Record) -> Table:
    key, level = level_of(lines[0])
    rows = [
        [
            *(str(line[name]) for name in ("case", "algorithm", "schedule", "max_staleness")),
            f"{line['horizon']:g}",
            _shown(line[key]) if line["status"] == "found" else line["status"],
            _interval(line["interval"]) if line["status"] == "found" else _ABSENT,
            f"{line['width']:.2f}" if line["status"] == "found" else _ABSENT,
            str(line["num_seeds"]),
        ]
        for line in lines
    ]
    name = f"η_{key.removeprefix('eta_')}"
    columns = ["case", "algorithm", "schedule", "S (updates)", "T (updates)", name, "interval", "width (nats)", "seeds"]
    caption = (
        f"{name}: the learning rate at which {level:.0%} of the runs succeed, with a {config['confidence']:.0%} "
        "profile-likelihood interval; width: ln(η_20/η_80), how gradually success is lost."
    )
    return Table(columns, rows, caption)


def _fates(lines: Rows) -> Folded:
    rows = [
        [
            *(str(line[name]) for name in ("case", "algorithm", "schedule", "max_staleness")),
            f"{rate:g}",
            f"{share:.2f}",
            ", ".join(f"{kind} {count}" for kind, count in outcomes.items()),
        ]
        for line in lines
        for rate, share, outcomes in zip(line["learning_rates"], line["shares"], line["outcomes"], strict=True)
    ]
    columns = ["case", "algorithm", "schedule", "S (updates)", "η", "share of success", "runs that ended so"]
    return Folded(f"Outcomes of every cell, {len(rows)} lines", [Table(columns, rows, "At the whole horizon.")])


def _sweep_limits(boundaries: Rows) -> Iterable[tuple[str, str]]:
    for line in boundaries:
        if line["status"] != "found":
            name = (
                f"{line['case']}, {line['algorithm']}, {line['schedule']}, S = {line['max_staleness']}, T = {line['horizon']:g}"
            )
            fitted = f" (fitted all the same, not to be used: {line['estimate'][0]:.3g})" if line["estimate"] else ""
            yield name, f"{line['status']}: {line['reason']}{fitted}"


def _study_page(folder: Path, config: Record, rows: Rows, versions: Record) -> Page:
    """The study's own page; its pieces alone where it is unfinished or its module or sources are not to be had here."""
    done = studies.finished_pieces(rows)
    timed = Table(["piece", "seconds"], [[name, f"{seconds:g}"] for name, seconds in done.items()])
    pieces = Section("Pieces of work", [Folded(f"{len(done)} pieces, {sum(done.values()):.0f} s", [timed])])
    title, lead = f"Study {config['study']}", "A question with the rule of its answer declared before the run."
    try:
        study = studies.load_study(config)
        names = study.pieces(config)
        missing = [name for name in names if name not in done]
        if missing:
            return Page(title, lead, [pieces], _warnings(missing, len(names), "pieces"))
        result = study.summary(rows, config, studies.read_sources(config))
    except ValueError as error:
        return Page(title, lead, [pieces], [f"The study's page cannot be made here: {error}."])
    study.figures(rows, result, folder)
    answer = Section("Question and answer", [Markdown(studies.page_text(study, result, "."), folder)])
    return Page(title, lead, [answer, pieces])


def _other_page(folder: Path, documents: Mapping[str, Any]) -> Page:
    """Every JSON file as tables, every figure once (SVG before PNG), every JSONL file counted."""
    shown = {name: content for name, content in documents.items() if name != "config.json"}
    sections = [Section(name, _tree(content)) for name, content in shown.items()]
    by_stem = {path.stem: path for suffix in ("png", "svg") for path in sorted(folder.glob(f"*.{suffix}"))}
    if by_stem:
        sections.append(
            Section("Figures", [Picture(path, f"{path.name} as it lies in the folder") for path in by_stem.values()])
        )
    counted = [[path.name, str(len(records.read_jsonl(path)))] for path in sorted(folder.glob("*.jsonl"))]
    if counted:
        sections.append(Section("Records", [Table(["file", "rows"], counted)]))
    if isinstance(documents.get("config.json"), dict):
        sections.append(Section("What was run", [_config_table(documents["config.json"])]))
    lead = "A run whose kind this report has no page for: its files as they are, nothing recomputed."
    return Page(
        f"Run {folder.resolve().name}", lead, sections, [] if shown else ["There is no summary: the run is not finished."]
    )


def _tree(value: Any, label: str = "values") -> list[Part]:
    """JSON as tables: what is plain in a dict in one, a list of dicts in one, and what lies deeper folded."""
    if isinstance(value, dict):
        plain = [[key, _shown(item)] for key, item in value.items() if _is_plain(item)]
        deeper = [Folded(key, _tree(item, key)) for key, item in value.items() if not _is_plain(item)]
        return [*([Table([label, ""], plain)] if plain else []), *deeper]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        columns = list(dict.fromkeys(key for item in value for key in item))
        return [Table(columns, [[_shown(item[key]) if key in item else _ABSENT for key in columns] for item in value])]
    return [Text(_shown(value))]


def _is_plain(value: Any) -> bool:
    nested = isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)
    return not nested and not (isinstance(value, dict) and value)


def _shown(value: Any) -> str:
    """A value in words: four digits of a float, a dash for None."""
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


def _control(value: float | None) -> str:
    return "not measured yet" if value is None else f"{value:.4g} (0 is right)"


def _interval(interval: Sequence[float]) -> str:
    return "[{:.3g}, {:.3g}]".format(*interval)


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.2f}" + ("" if interval is None else " [{:.2f}, {:.2f}]".format(*interval))


_BUILDERS = {
    "study": _study_page,
    "audit": _audit_page,
    "sweep": _sweep_page,
    "measure_bias": _bias_page,
    "train": training_page.page,
}
