"""Kills a training run with SIGKILL at random moments, saves included, and compares its end with that of one never stopped.

    python -m benchmarks.train_resume [--kills=10]

The moments are drawn beforehand: a number of seconds after the first checkpoint of each attempt. Every update is saved, so that
many of them fall into a save. Exit code 1 if a byte of the records, or a bit of parameters, optimizer or ring, differs.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jax_async_grpo.checkpoint_files import read_manifest

ROOT = Path(__file__).resolve().parent.parent
NUM_UPDATES, SEED = 60, 0


def start(folder: Path) -> subprocess.Popen:
    config = f"--config={ROOT / 'tests' / 'tiny_training.py'}"
    options = [f"--config.num_updates={NUM_UPDATES}", "--config.checkpoint.every=1", "--config.evaluation.every=100"]
    command = [sys.executable, "-m", "launch.train", config, f"--workdir={folder}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (folder / "checkpoints").glob("step_*"))


def killed(folder: Path, delay: float) -> str:
    """Runs until `delay` seconds after a new checkpoint, then kills; says where."""
    before, process = saved_steps(folder), start(folder)
    while process.poll() is None and saved_steps(folder)[-1:] in ([], before[-1:]):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    unfinished = any((folder / "checkpoints").glob(".unfinished*"))
    return f"killed after {delay:.2f} s, newest checkpoint {saved_steps(folder)[-1:]}{', within a save' if unfinished else ''}"


def leaves(folder: Path) -> dict[str, bytes]:
    """The newest checkpoint's files of numbers, by name."""
    newest = max((folder / "checkpoints").glob("step_*"))
    content = read_manifest(newest)
    return {"host": repr(content["host"]).encode(), **_arrays(newest)}


def _arrays(checkpoint: Path) -> dict[str, bytes]:
    import orbax.checkpoint.experimental.v1 as ocp

    return {name: np.asarray(leaf).tobytes() for name, leaf in ocp.load(checkpoint / "arrays").items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    delays = np.random.default_rng(SEED).uniform(0.0, 2.0, parser.parse_args().kills)
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "killed", Path(folder) / "whole"
        for delay in delays:
            print(killed(one, float(delay)), flush=True)
        codes = [start(path).wait() for path in (one, other)]
        same_rows = (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        same_state = leaves(one) == leaves(other)
    print(f"records identical: {same_rows}; parameters, optimizer, ring and host state identical: {same_state}")
    return 0 if codes == [0, 0] and same_rows and same_state else 1


if __name__ == "__main__":
    sys.exit(main())
