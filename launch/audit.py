"""Measures what staleness does to each loss: the exact bias of every loss × correction at the same stale points.

python -m launch.audit --config=configs/audit.py --workdir=DIR [--config.extra_losses=my_package.my_loss] [--overwrite]
"""

from __future__ import annotations

import sys

from absl import flags

from jax_async_grpo import audit, audit_summary, records
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them
_WRITTEN = ("audit.jsonl", "audit.md", "audit.html", "bias_variance.png", "curves.png", "bias_variance.svg", "curves.svg")


def main() -> int:
    config = command_line.config_of_job("configs/audit.py", job="audit")
    audit.validate(config)
    entries = audit.entries(config)
    if command_line.DRY_RUN.value:
        print(*(entry.name for entry in entries), f"{len(entries)} entries", sep="\n")
        return 0
    workdir = records.open_workdir(command_line.WORKDIR.value, config, overwrite=command_line.OVERWRITE.value, figures=_WRITTEN)
    interrupted = False
    with command_line.progress(len(entries), "loss") as report:
        try:
            audit.run_entries(config, workdir, lambda entry: report(entry.name, entry.name))
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
