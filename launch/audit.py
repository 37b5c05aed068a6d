"""Measures what staleness does to each loss: the exact bias of every loss × correction at the same stale points.

python -m launch.audit --config=configs/audit.py --workdir=DIR [--config.extra_losses=my_package.my_loss] [--overwrite]
"""

from __future__ import annotations

import sys

import jax
from absl import flags
from tqdm import tqdm

from jax_async_grpo import audit, audit_summary, records
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them
_WRITTEN = ("audit.jsonl", "audit.md", "audit.html", "bias_variance.png", "curves.png")


def main() -> int:
    # The bias is measured in float64, which accelerators lack or emulate slowly.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    if not command_line.CONFIG.present or not (command_line.WORKDIR.value or command_line.DRY_RUN.value):
        raise ValueError("give --config=configs/audit.py and --workdir=DIR (or --dry_run)")
    config = command_line.read_config(command_line.CONFIG)
    audit.validate(config)
    entries = audit.entries(config)
    if command_line.DRY_RUN.value:
        print(*(entry.name for entry in entries), f"{len(entries)} entries", sep="\n")
        return 0
    workdir = records.open_workdir(command_line.WORKDIR.value, config, overwrite=command_line.OVERWRITE.value, figures=_WRITTEN)
    interrupted = False
    with tqdm(total=len(entries), unit="loss", disable=not sys.stderr.isatty()) as bar:

        def on_progress(entry: audit.Entry) -> None:
            bar.set_description(entry.name)
            bar.update()
            if bar.disable:
                print(entry.name, flush=True)
            command_line.check_interrupt()

        try:
            audit.run_entries(config, workdir, on_progress)
        except KeyboardInterrupt:
            interrupted = True
    _report(config, workdir)
    if interrupted:
        print(f"\nInterrupted: what was measured is in {workdir.path}; the same command goes on from there.", file=sys.stderr)
    return 130 if interrupted else 0


def _report(config: dict, workdir: records.Workdir) -> None:
    rows = workdir.read_rows(audit.RECORDS)
    result = audit_summary.summary(rows, config, records.versions())
    workdir.write_summary(result)
    for name in audit_summary.write_report(rows, result, workdir.path):
        print(workdir.path / name)
    print("", audit_summary.markdown_table(result["table"], limit=12), sep="\n")


if __name__ == "__main__":
    command_line.run(main)
