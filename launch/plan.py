"""Says which learning rate is safe for a staleness and a horizon, from two measured boundaries that bracket it.

python -m launch.plan --config=configs/plan.py --workdir=DIR --measure [--max_staleness=S] [--horizon=T] [--learning_rate=ETA]
python -m launch.plan --log=examples/plan_log.csv [--ceiling=1] [--workdir=DIR] [--max_staleness=S] ...
"""

from __future__ import annotations

from absl import flags

from jax_async_grpo import option_checks, plan_evidence, plan_log, plan_report, plan_run, planner, records
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them
MEASURE = flags.DEFINE_bool("measure", False, "Run what the plan lacks: anchors, a probe, a horizon run.")
LOG = flags.DEFINE_list(
    "log", None, "Logs to plan from in place of --config: CSV or JSON of any system, workdirs of launch.train (docs/plan.md)."
)
MAX_STALENESS = flags.DEFINE_integer("max_staleness", None, "S wanted, updates; default: the config's, or the log's largest.")
HORIZON = flags.DEFINE_integer("horizon", None, "T wanted, updates; default: the config's, or the log's longest run.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "A learning rate to ask about: its head-room, the S it allows.")
EXTRAPOLATE = flags.DEFINE_bool("extrapolate", False, "Allow S and T beyond four times those of the anchors.")
CEILING = flags.DEFINE_float("ceiling", None, "Highest reward there can be, to judge the runs of a log by.")
CLIP_LEVEL = flags.DEFINE_float("clip_level", 0.05, "Clip fraction of a log at which the drift is R_batch.")


def main() -> int:
    if LEARNING_RATE.value is not None:
        option_checks.as_positive("--learning_rate", LEARNING_RATE.value)
    if not LOG.value:
        return _from_config()
    if command_line.CONFIG.present or MEASURE.value:
        raise ValueError("--log is planned from as it is: give it without --config and --measure")
    runs, notes = plan_log.read_log(*LOG.value)
    S, T = _wanted(max(run.max_staleness for run in runs), int(max(run.steps[-1] for run in runs)))
    options = dict(ceiling=CEILING.value, clip_level=CLIP_LEVEL.value)
    evidence = plan_log.evidence_of_log(runs, max_staleness=S, source=",".join(LOG.value), notes=notes, **options)
    kept = dict(log=LOG.value, max_staleness=S, horizon=T, learning_rate=LEARNING_RATE.value, **options)
    return _report(evidence, S, T, kept)


def _from_config() -> int:
    if not command_line.CONFIG.present:
        raise ValueError("give --config=configs/plan.py and --workdir=DIR (or --dry_run), or --log=FILE with a log of your own")
    if CEILING.present or CLIP_LEVEL.present:
        raise ValueError("--ceiling and --clip_level are for --log; the records of a sweep hold both")
    config = command_line.config_of_job("configs/plan.py", job="plan", spread=True)
    job, (S, T) = plan_run.open_job(config), _wanted(config["max_staleness"], config["horizon"])
    if not EXTRAPOLATE.value:
        plan_run.check_reach(job, S, T)
    if command_line.DRY_RUN.value:
        print(plan_run.describe(job, S))
        return 0
    workdir = _open_workdir(plan_run.kept_config(config))
    if MEASURE.value:
        total = plan_run.num_chunks(job, S)
        with command_line.told_where_it_stops(workdir.path), command_line.progress(total, "chunk") as report:
            on_chunk = lambda name, seconds: report(name, f"{name}: {seconds:.1f} s")  # noqa: E731
            plan_run.measure(job, workdir, S, on_chunk, command_line.say_of_program)
    return _report(plan_run.evidence(job, workdir.read_metrics(), S), S, T)


def _wanted(max_staleness: int, horizon: int) -> tuple[int, int]:
    S = max_staleness if MAX_STALENESS.value is None else MAX_STALENESS.value
    T = horizon if HORIZON.value is None else HORIZON.value
    option_checks.as_integer("--max_staleness", S, minimum=0, maximum=planner.LARGEST)
    return S, option_checks.as_integer("--horizon", T, minimum=1, maximum=planner.LARGEST)


def _open_workdir(kept: dict) -> records.Workdir:
    path, overwrite = command_line.WORKDIR.value, command_line.OVERWRITE.value
    return records.open_workdir(path, kept, overwrite=overwrite, figures=plan_report.WRITTEN)


def _report(evidence: plan_evidence.Evidence, S: int, T: int, kept: dict | None = None) -> int:
    """Prints the plan and writes it to the workdir, which a plan of a log, `kept`, opens only now that there is one."""
    options = dict(learning_rate=LEARNING_RATE.value, extrapolate=EXTRAPOLATE.value)
    plan = plan_evidence.plan_of(evidence, max_staleness=S, horizon=T, **options)
    is_written = command_line.WORKDIR.value and not command_line.DRY_RUN.value
    if is_written and kept:
        _open_workdir(kept)
    print(plan_report.text(plan, evidence))
    if is_written:
        print("", *plan_report.write_report(plan, evidence, command_line.WORKDIR.value), sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
