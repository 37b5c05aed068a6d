"""Runs a grid of (loss, S, η, seed) to the end of its horizon and says up to which learning rate the runs hold.

python -m launch.sweep --config=configs/sweep_digits.py --workdir=DIR [--config.a.b=v] [--dry_run] [--overwrite]
"""

from __future__ import annotations

import sys

from absl import flags

from jax_async_grpo import invariants, records, sweep_figure, sweep_run, sweep_summary
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them


def main() -> int:
    config = command_line.config_of_job("configs/sweep_digits.py", job="sweep", spread=True)
    sweep_run.validate(config)
    if command_line.DRY_RUN.value:
        print(sweep_run.describe(config))
        return 0
    workdir = records.open_workdir(
        command_line.WORKDIR.value, config, overwrite=command_line.OVERWRITE.value, figures=sweep_summary.FIGURES
    )
    code, stopped = 0, ""
    with command_line.progress(len(sweep_run.chunks(config)), "chunk") as report:

        def on_chunk(name: str, seconds: float) -> None:
            report(name, f"{name}: {f'{seconds:.1f} s' if seconds else 'recorded before'}")

        try:
            sweep_run.run_chunks(config, workdir, on_chunk, on_program=command_line.say_of_program)
        except (KeyboardInterrupt, invariants.InvariantViolation) as stop:
            code, stopped = (130, "\nInterrupted") if isinstance(stop, KeyboardInterrupt) else (1, f"error: {stop}")
    _report(config, workdir)
    if stopped:
        print(f"{stopped}: what was run is in {workdir.path}; the same command goes on from there.", file=sys.stderr)
    return code


def _report(config: dict, workdir: records.Workdir) -> None:
    result = sweep_summary.summary(workdir.read_metrics(), config, records.versions())
    workdir.write_summary(result)
    written = [workdir.path / "summary.json"]
    if result["boundaries"]:
        written += [workdir.path / name for name in sweep_summary.FIGURES]
        sweep_figure.sweep_figure(result, written[1])
    print(sweep_summary.table(result), "", *written, sep="\n")


if __name__ == "__main__":
    command_line.run(main)
