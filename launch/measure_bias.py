"""Measures the staleness bias of GRPO exactly over a grid of (S, η, schedule) and fits its law.

python -m launch.measure_bias --config=configs/measure_bias.py --workdir=DIR [--config.a.b=v] [--dry_run] [--overwrite]
"""

from __future__ import annotations

import shutil
import sys

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from jax_async_grpo import bias_run, bias_summary, experiment, records, report
from launch import command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/measure_bias.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for config.json, metrics.jsonl, summary.json and bias.png.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and its cost, measure nothing.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh in a workdir that holds another run; other files stay.")


def main() -> int:
    # The laws are measured in float64, which accelerators lack or emulate slowly.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    if _CONFIG.value is None or (_WORKDIR.value is None and not _DRY_RUN.value):
        raise ValueError("give --config=configs/measure_bias.py and --workdir=DIR (or --dry_run)")
    config = _CONFIG.value.to_dict()
    experiment.validate(config)
    if _DRY_RUN.value:
        print(experiment.describe(config, [experiment.build_case(config, name) for name in config["cases"]]))
        return 0
    workdir = records.open_workdir(_WORKDIR.value, config, overwrite=_OVERWRITE.value, figures=("bias.png",))
    interrupted = False
    with tqdm(total=len(experiment.chunks(config)), unit="chunk", disable=not sys.stderr.isatty()) as bar:

        def on_progress(chunk: experiment.Chunk, seconds: float) -> None:
            bar.set_description(chunk.name)
            bar.update()
            if bar.disable:
                print(f"{chunk.name}: {f'{seconds:.1f} s' if seconds else 'recorded before'}", flush=True)

        try:
            bias_run.run_chunks(config, workdir, on_progress)
        except KeyboardInterrupt:
            interrupted = True
    _report(config, workdir)
    if interrupted:
        print(f"\nInterrupted: what was measured is in {workdir.path}; the same command goes on from there.", file=sys.stderr)
    return 130 if interrupted else 0


def _report(config: dict, workdir: records.Workdir) -> None:
    rows = workdir.read_metrics()
    result = bias_summary.summary(rows, config, records.versions())
    workdir.write_summary(result)
    print(report.fits_table(result["fits"], width=shutil.get_terminal_size((100, 24)).columns))
    print(bias_summary.text_report(result))
    cells = bias_summary.cells(rows, config)
    if any(cell["bias_rms"] > 0 for cell in cells):
        report.bias_figure(cells, result["fits"], workdir.path / "bias.png")
        print(f"\n{workdir.path / 'bias.png'}   {workdir.path / 'summary.json'}")


if __name__ == "__main__":
    command_line.run(main)
