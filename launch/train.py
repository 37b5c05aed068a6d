"""Trains a language model on stale rollouts, with the staleness bias measured on the way; stopped anywhere, it goes on.

python -m launch.train --config=configs/train_arithmetic.py --workdir=DIR [--config.a.b=v] [--dry_run] [--overwrite]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from absl import flags

from jax_async_grpo import records, training, workdir_lock
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.tasks import HangingVerifiers
from jax_async_grpo.training import monitor as training_monitor
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them


def main() -> int:
    config = command_line.config_of_job("configs/train_arithmetic.py", job="train")
    with training_monitor.stop_signals() as stop:
        command_line.check_interrupt()
        job = training.build(config)  # before the workdir, which would keep a config that cannot run
        if stop:
            return stop.code
        if command_line.DRY_RUN.value:
            print(training.describe(job, *training.sizes(job)))
            return 0
        folder = Path(command_line.WORKDIR.value)
        with workdir_lock.workdir_lock(folder), command_line.told_where_it_stops(folder):
            if command_line.OVERWRITE.value and (folder / "checkpoints").exists():
                shutil.rmtree(folder / "checkpoints")  # before the new config stands there, which they would pass for
            workdir = command_line.open_workdir(config, training.FIGURES)
            print(training.describe(job, *training.sizes(job)), flush=True)
            return _train(job, workdir, stop)


def _train(job: training.TrainJob, workdir: records.Workdir, stop: training_monitor.Stop) -> int:
    kept = {name: job.config["checkpoint"][name] for name in ("keep_last", "keep_best")}
    with Checkpoints(workdir.path / "checkpoints", **kept) as checkpoints, training_monitor.Monitor(job, workdir) as monitor:
        try:
            trainer = training.Trainer(job, workdir, checkpoints, monitor.on_row, lambda: bool(stop))
            was_complete, stop.is_saving = trainer.is_complete, True
            if not was_complete:
                monitor.started_at(trainer.progress.step, is_resumed=trainer.is_resumed)
                trainer.run()
        except training.Stopped as error:
            print(f"stopped: {error}", file=sys.stderr)
            return stop.code
        except (training.BadUpdates, HangingVerifiers) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1 if isinstance(error, training.BadUpdates) else 2
    rows = workdir.read_metrics()
    written = _write_results(job, workdir, rows, only_missing=was_complete)
    if not trainer.is_complete:
        said = f"stopped after update {trainer.progress.step}: all is saved; the same command goes on from there."
        print(said, file=sys.stderr)
        return stop.code
    done = f"already complete: {trainer.progress.step} updates, " if was_complete else ""
    print(f"{done}{training.last_line(rows)}", *(["", *written] if written else []), sep="\n")
    return 0


def _write_results(job: training.TrainJob, workdir: records.Workdir, rows: list[dict], *, only_missing: bool) -> list[Path]:
    """summary.json and the figures; the files that were written."""
    names = ("summary.json", *training.FIGURES)
    if only_missing and all((workdir.path / name).exists() for name in names):
        return []
    workdir.write_summary(training.summary(rows, records.versions()))
    return [workdir.path / "summary.json", *training.figure(rows, workdir.path, training.title(job.config))]


if __name__ == "__main__":
    command_line.run(main)
