"""What `launch.plan` measures: anchors, a probe and a horizon run of one loss of a sweep, those that are missing.

Anchors are a sweep of the config, or the records of a sweep that has run (`config.anchors`). The config of the workdir holds
neither the wanted S nor T: plans for other values add their probes to the same records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_async_grpo import planner, records, sweep_run
from jax_async_grpo.config_checks import check_integer, check_keys, check_mapping, check_number
from jax_async_grpo.plan_evidence import Evidence, anchor_staleness, evidence_of_sweep, probe_rate

__all__ = ["PlanJob", "check_reach", "describe", "evidence", "kept_config", "measure", "num_chunks", "open_job"]

_KEYS = (
    "precision",
    "max_staleness",
    "horizon",
    "anchors",
    "case",
    "algorithm",
    "probe",
    "horizon_run",
    "sweep",
)
_RUN_KEYS = ("num_updates", "num_measurements", "first_seed", "num_seeds")
_WANTED = ("max_staleness", "horizon")


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """A checked config.

    Attributes:
      config: as given.
      sweep: config of the sweep that holds the anchors, with the planned case and algorithm only.
      case, algorithm: their names.
      folder: of the sweep that is reused; None where the job measures its own anchors.
    """

    config: Mapping[str, Any]
    sweep: Mapping[str, Any]
    case: str
    algorithm: str
    folder: Path | None


def open_job(config: Mapping[str, Any]) -> PlanJob:
    """Checks a config of `configs/plan.py` and finds the sweep of its anchors.

    Raises:
      ValueError: the first thing in it that cannot be run, in one line.
    """
    check_keys(config, _KEYS, "")
    check_integer(config["max_staleness"], "max_staleness", minimum=0)
    check_integer(config["horizon"], "horizon", minimum=1)
    check_keys(config["probe"], _RUN_KEYS, "probe")
    check_keys(config["horizon_run"], ("factor", *_RUN_KEYS), "horizon_run")
    factor = config["horizon_run"]["factor"]
    check_number(factor, "horizon_run.factor", lambda x: x == 0 or x > 1, "> 1, or 0 for no horizon run")
    check_mapping(config["sweep"], "sweep")
    folder = Path(config["anchors"]) if config["anchors"] else None
    sweep, where = (dict(config["sweep"]), "config.sweep") if folder is None else (_sweep_of(folder), f"{folder}/config.json")
    try:
        sweep_run.validate(sweep)
    except ValueError as error:
        raise ValueError(str(error).replace("config.", f"{where}: config.", 1)) from None
    if sweep["precision"] != config["precision"]:
        raise ValueError(f"config.precision is {config['precision']!r}; it must be {sweep['precision']!r} as in {where}")
    case = _one_of(config["case"], sweep["cases"], "case", where)
    algorithm = _one_of(config["algorithm"], sweep["cases"][case]["algorithms"], "algorithm", where)
    part = {**sweep["cases"][case], "algorithms": (algorithm,)}
    if 0 not in part["max_staleness"] or max(part["max_staleness"]) == 0:
        raise ValueError(
            f"{where}: case {case} has max_staleness {tuple(part['max_staleness'])}; anchors need 0 and a larger S"
        )
    return PlanJob(config, {**sweep, "cases": {case: part}}, case, algorithm, folder)


def check_reach(job: PlanJob, max_staleness: int, horizon: int, *, extrapolate: bool = False) -> None:
    """ValueError where S or T lies beyond what the anchors of the config will allow: said before they are measured."""
    part = job.sweep["cases"][job.case]
    anchor = anchor_staleness(part["max_staleness"], max_staleness)
    if not extrapolate:
        planner.check_reach(max_staleness, horizon, anchor, (part["num_updates"],))


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of a workdir depend on: the config without the wanted S and T."""
    return {key: value for key, value in config.items() if key not in _WANTED}


def describe(job: PlanJob, max_staleness: int) -> str:
    """What `measure` runs at most for a plan at S, as `--dry_run` prints it."""
    lines = [f"anchors: records of {job.folder}" if job.folder else "anchors:\n" + sweep_run.describe(job.sweep)]
    if max_staleness not in job.sweep["cases"][job.case]["max_staleness"]:
        lines.append(f"probes at S = {max_staleness} and at the larger anchor's S, at half of the smaller anchor")
    if job.config["horizon_run"]["factor"]:
        lines.append(f"a horizon run at S = 0, at {job.config['horizon_run']['factor']:g} times the anchor there")
    return "\n".join(lines)


def num_chunks(job: PlanJob, max_staleness: int) -> int:
    """How many chunks `measure` goes through at most."""
    needs_probe = max_staleness not in job.sweep["cases"][job.case]["max_staleness"]
    own = 0 if job.folder else len(sweep_run.chunks(job.sweep))
    return own + needs_probe + bool(job.config["horizon_run"]["factor"])


def measure(
    job: PlanJob,
    workdir: records.Workdir,
    max_staleness: int,
    on_chunk: Callable[[str, float], None],
    on_program: Callable[[str], None] = lambda name: None,
) -> None:
    """Runs what the workdir lacks of a plan at S: anchors, then the runs that their boundaries ask for.

    The two callbacks are those of `sweep_run.run_chunks`.

    Raises:
      ValueError: the anchors of another folder are incomplete: they are not this job's to finish.
    """
    programs: dict = {}
    if job.folder is None:
        sweep_run.run_chunks(job.sweep, workdir, on_chunk, programs, on_program)
    rows = _all_rows(job, workdir.read_metrics())
    if _unfinished(job, job.sweep["cases"], rows):
        raise ValueError(f"config.anchors={job.folder} is an unfinished sweep of {job.case}/{job.algorithm}; finish it first")
    runs = _runs(job, _evidence(job, rows, max_staleness), max_staleness)
    if runs:
        sweep = {**job.sweep, "cases": runs}
        sweep_run.validate(sweep)
        sweep_run.run_chunks(sweep, workdir, on_chunk, programs, on_program)


def evidence(job: PlanJob, rows: Sequence[Mapping[str, Any]], max_staleness: int) -> Evidence:
    """The evidence in the records for a plan at S, with a note on each run that `measure` would add.

    Raises:
      ValueError: the anchors are not measured, or not to the end.
    """
    rows = _all_rows(job, rows)
    lacking = _unfinished(job, job.sweep["cases"], rows)
    if lacking:
        number = f"{len(lacking)} of {len(sweep_run.chunks(job.sweep))} learning rates of the anchors are not measured"
        cure = f"finish the sweep in {job.folder}" if job.folder else "the same command with --measure measures them"
        raise ValueError(f"there is nothing to plan from yet: {number}; {cure}")
    found = _evidence(job, rows, max_staleness)
    runs = {name: part for name, part in _runs(job, found, max_staleness).items() if _unfinished(job, {name: part}, rows)}
    notes = tuple(f"not measured yet: {_words(name, part)}; --measure runs it" for name, part in runs.items())
    return dataclasses.replace(found, notes=found.notes + notes)


def _evidence(job: PlanJob, rows, max_staleness: int) -> Evidence:
    return evidence_of_sweep(
        rows,
        job.sweep,
        case=job.case,
        algorithm=job.algorithm,
        max_staleness=max_staleness,
        source=f"{job.case}/{job.algorithm}" + (f" of {job.folder}" if job.folder else ""),
        probe_case=_probe_name(job, max_staleness),
        horizon_case=_horizon_name(job),
    )


def _sweep_of(folder: Path) -> dict[str, Any]:
    """The sweep's config in a workdir of `launch.sweep`, or of a study made of sweeps."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"config.anchors={folder} holds no config.json; give the workdir of a sweep, or '' to measure anchors")
    config = records.read_json(path)
    config = config.get("sweep", config) if isinstance(config, dict) else {}
    if "cases" not in config or "algorithms" not in config:
        raise ValueError(f"config.anchors={folder} is no workdir of a sweep")
    return config


def _one_of(name: str, there, key: str, where: str) -> str:
    if not name and len(there) == 1:
        return next(iter(there))
    if name not in there:
        raise ValueError(f"config.{key} is {name!r}; it must be one of {', '.join(there)} in {where}")
    return name


def _all_rows(job: PlanJob, rows) -> list[Mapping[str, Any]]:
    """Of the workdir, and before them those of the folder with the anchors."""
    return [*(records.read_jsonl(job.folder / "metrics.jsonl") if job.folder else []), *rows]


def _unfinished(job: PlanJob, cases: Mapping[str, Any], rows) -> list[str]:
    """Chunks of the cases that the records lack."""
    done = sweep_run.finished_chunks(rows)
    return [chunk.name for chunk in sweep_run.chunks({**job.sweep, "cases": cases}) if chunk.name not in done]


def _probe_name(job: PlanJob, max_staleness: int) -> str:
    return f"{job.case}_probe_S{max_staleness}"


def _horizon_name(job: PlanJob) -> str:
    return f"{job.case}_horizon"


def _words(name: str, part: Mapping[str, Any]) -> str:
    kind = "a horizon run" if name.endswith("_horizon") else "probes" if len(part["max_staleness"]) > 1 else "a probe"
    lags = " and ".join(map(str, part["max_staleness"]))
    return f"{kind} (S = {lags}, eta = {part['learning_rates'][0]:g}, {part['num_updates']} updates)"


def _runs(job: PlanJob, found: Evidence, max_staleness: int) -> dict[str, dict[str, Any]]:
    """Cases of the probe and the horizon run; none of those that the anchors make needless or impossible."""
    rate, part, cases = probe_rate(found.anchors), job.sweep["cases"][job.case], {}
    if rate is not None and max_staleness not in part["max_staleness"]:
        # long enough for every lag to be seen more than once
        lags = tuple(sorted({max_staleness, found.anchors[-1].max_staleness} - {0}))
        cases[_probe_name(job, max_staleness)] = _case(part, job.config["probe"], lags, rate, 3 * max(lags))
    factor = job.config["horizon_run"]["factor"]
    if factor and found.anchors[0].learning_rate is not None:
        high = float(f"{factor * found.anchors[0].learning_rate:.3g}")
        cases[_horizon_name(job)] = _case(part, job.config["horizon_run"], (0,), high, 1)
    return cases


def _case(part, options, max_staleness: tuple[int, ...], learning_rate: float, least: int) -> dict[str, Any]:
    """A case of one η, of at least so many updates."""
    count = options["num_measurements"]
    num_updates = -(-max(options["num_updates"], least) // count) * count
    given = {"first_seed": options["first_seed"], "num_seeds": options["num_seeds"], "num_measurements": count}
    chosen = dict(max_staleness=max_staleness, learning_rates=(learning_rate,), num_updates=num_updates, num_windows=1)
    return {**part, **given, **chosen}
