"""Measures the staleness bias of GRPO exactly over a grid of (S, η, schedule) and fits its law.

python -m launch.measure_bias --config=configs/measure_bias.py --workdir=DIR [--config.a.b=v] [--dry_run] [--overwrite]
"""

from __future__ import annotations

import shutil
import sys

from absl import flags

from jax_async_grpo import bias_run, bias_summary, experiment, invariants, records, report
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them


def main() -> int:
    config = command_line.config_of_job("configs/measure_bias.py", job="measure_bias")
    experiment.validate(config)
    experiment.check_algorithm(config)
    cases = [experiment.build_case(config, name, start=False) for name in config["cases"]]
    for case in cases:
        experiment.check_case(config, case)
    if command_line.DRY_RUN.value:
        print(experiment.describe(config, cases))
        return 0
    workdir = records.open_workdir(
        command_line.WORKDIR.value, config, overwrite=command_line.OVERWRITE.value, figures=("bias.png", "bias.svg")
    )
    code, stopped = 0, ""
    with command_line.progress(len(experiment.chunks(config)), "chunk") as tell:

        def on_progress(chunk: experiment.Chunk, seconds: float) -> None:
            tell(chunk.name, f"{chunk.name}: {f'{seconds:.1f} s' if seconds else 'recorded before'}")

        try:
            bias_run.run_chunks(config, workdir, on_progress)
        except (KeyboardInterrupt, invariants.InvariantViolation) as stop:
            code, stopped = (130, "\nInterrupted") if isinstance(stop, KeyboardInterrupt) else (1, f"error: {stop}")
    _report(config, workdir)
    if stopped:
        print(f"{stopped}: what was measured is in {workdir.path}; the same command goes on from there.", file=sys.stderr)
    return code


def _report(config: dict, workdir: records.Workdir) -> None:
    rows = workdir.read_metrics()
    result = bias_summary.summary(rows, config, records.versions())
    workdir.write_summary(result)
    print(report.fits_table(result["fits"], width=shutil.get_terminal_size((100, 24)).columns))
    print(bias_summary.text_report(result))
    cells = bias_summary.cells(rows, config)
    written = [workdir.path / "summary.json"]
    if any(cell["bias_rms"] > 0 for cell in cells):
        written.append(workdir.path / "bias.png")
        report.bias_figure(cells, result["fits"], written[-1])
    print("", *written, sep="\n")


if __name__ == "__main__":
    command_line.run(main)
