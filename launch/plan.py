"""Says which learning rate is safe for a staleness and a horizon, from two measured boundaries that bracket it.

python -m launch.plan --config=configs/plan.py --workdir=DIR --measure [--max_staleness=S] [--horizon=T] [--learning_rate=ETA]
python -m launch.plan --log=examples/plan_log.csv [--ceiling=1] [--workdir=DIR] [--max_staleness=S] ...
"""

from __future__ import annotations

from absl import flags

from jax_async_grpo import plan_evidence, plan_log, plan_report, plan_run, planner
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
    if not LOG.value:
        return _from_config()
    if command_line.CONFIG.present or MEASURE.value:
        raise ValueError("--log is planned from as it is: give it without --config and --measure")
    runs, notes = plan_log.read_log(*LOG.value)
    S, T = _wanted(max(run.max_staleness for run in runs), int(max(run.steps[-1] for run in runs)))
    options = dict(ceiling=CEILING.value, clip_level=CLIP_LEVEL.value)
    kept = dict(log=LOG.value, max_staleness=S, horizon=T, learning_rate=LEARNING_RATE.value, **options)
    found = plan_log.evidence_of_log(runs, max_staleness=S, source=",".join(LOG.value), notes=notes, **options)
    return _report(found, S, T, kept)


def _from_config() -> int:
    if CEILING.present or CLIP_LEVEL.present:
        raise ValueError("--ceiling and --clip_level are for --log; the records of a sweep hold both")
    config = command_line.config_of_job("configs/plan.py", job="plan", instead=", or --log=FILE alone", spread=True)
    job, (S, T) = plan_run.open_job(config), _wanted(config["max_staleness"], config["horizon"])
    plan_run.check_reach(job, S, T, extrapolate=EXTRAPOLATE.value)
    if command_line.DRY_RUN.value:
        print(plan_run.describe(job, S))
        return 0
    workdir = command_line.open_workdir(plan_run.kept_config(config), plan_report.WRITTEN)
    if MEASURE.value:
        total = plan_run.num_chunks(job, S)
        with command_line.told_where_it_stops(workdir.path), command_line.progress(total, "chunk") as report:
            callbacks = (lambda name, seconds: report(name, f"{name}: {seconds:.1f} s"), command_line.say_of_program)
            plan_run.measure(job, workdir, S, *callbacks)
    return _report(plan_run.evidence(job, workdir.read_metrics(), S), S, T)


def _wanted(S: int, T: int) -> tuple[int, int]:
    S, T = (default if flag.value is None else flag.value for flag, default in ((MAX_STALENESS, S), (HORIZON, T)))
    return planner.checked_wanted(S, T, LEARNING_RATE.value, prefix="--")[:2]


def _report(evidence: plan_evidence.Evidence, S: int, T: int, kept: dict | None = None) -> int:
    """Prints the plan and writes it to the workdir, which a plan of a log, `kept`, opens only now that there is one."""
    options = dict(learning_rate=LEARNING_RATE.value, extrapolate=EXTRAPOLATE.value)
    plan = plan_evidence.plan_of(evidence, max_staleness=S, horizon=T, **options)
    folder = None if command_line.DRY_RUN.value else command_line.WORKDIR.value
    if folder and kept:
        command_line.open_workdir(kept, plan_report.WRITTEN)
    print(plan_report.text(plan, evidence))
    if folder:
        print("", *plan_report.write_report(plan, evidence, folder), sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)
