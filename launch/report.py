"""Writes one HTML page of any run: it needs no network, no script and no other file.

python -m launch.report --workdir=DIR [--output=FILE.html]

DIR is the workdir of any launch script, finished or not. The figures on the page are also in DIR, as PNG and SVG.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags

from jax_async_grpo import html_report, run_pages
from launch import command_line

flags.declare_key_flag("workdir")  # --help shows it; the other flags of a job have no meaning here
OUTPUT = flags.DEFINE_string("output", None, "File of the page; without it report.html in the workdir.")


def main() -> int:
    if not command_line.WORKDIR.value:
        raise ValueError("give --workdir=DIR, the folder of a run")
    jax.config.update("jax_enable_x64", True)  # as the job that fitted them; accelerators lack float64
    jax.config.update("jax_platforms", "cpu")
    workdir = Path(command_line.WORKDIR.value)
    output = Path(OUTPUT.value or workdir / "report.html")
    if OUTPUT.value and (output.suffix != ".html" or not output.resolve().parent.is_dir()):
        raise ValueError(f"--output={output} must end in .html and lie in a folder that exists")
    if output.is_dir():
        raise ValueError(f"--output={output} is a folder; give a file" if OUTPUT.value else f"{output} is a folder; remove it")
    html_report.write_page(run_pages.page_of_run(workdir), output)
    print(output)
    return 0


if __name__ == "__main__":
    command_line.run(main)
