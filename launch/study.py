"""Runs a study and writes its page: theory against simulation, or a law against records, with every rule declared beforehand.

python -m launch.study --config=configs/study_delay.py --workdir=DIR [--page=docs/laws/delay.md] [--dry_run] [--overwrite]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags

from jax_async_grpo import records, studies
from launch import command_line

flags.adopt_module_key_flags(command_line)  # --help shows them
PAGE = flags.DEFINE_string("page", None, "File of the page, Markdown; without it page.md in the workdir.")


def main() -> int:
    config = command_line.config_of_job("configs/study_delay.py", job="study", spread=True)
    study = studies.load_study(config)
    study.validate(config)
    names = study.pieces(config)
    if PAGE.value:
        _check_page(Path(PAGE.value))
    if command_line.DRY_RUN.value:
        print(*names, f"{len(names)} pieces", sep="\n")
        return 0
    studies.read_sources(config)  # before the work, not after it
    workdir = records.open_workdir(command_line.WORKDIR.value, config, overwrite=command_line.OVERWRITE.value)
    done = studies.finished_pieces(workdir.read_metrics())
    missing = [name for name in names if name not in done]
    if len(missing) < len(names):
        print(f"{len(names) - len(missing)} of {len(names)} pieces are in {workdir.path} already.")
    try:
        with command_line.progress(len(missing), "piece") as report:
            study.run(config, workdir, lambda name, seconds: report(name, f"{name}: {seconds:.1f} s"))
    except KeyboardInterrupt:
        print(f"\nInterrupted: finished pieces are in {workdir.path}; the same command goes on from there.", file=sys.stderr)
        return 130
    for path in studies.write_results(study, config, workdir, PAGE.value or workdir.path / "page.md"):
        print(path)
    return 0


def _check_page(page: Path) -> None:
    """Before the work, not after it; the folder of the page may have to be made."""
    there = next(folder for folder in page.absolute().parents if folder.exists())
    if page.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--page={page} cannot be written; give a file in a folder that can")


if __name__ == "__main__":
    command_line.run(main)
