"""Every test runs in float64 on the CPU, in the order and with the seeds written in it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile

# Read when jax is imported; processes that tests start inherit it. Set it yourself to run the tests on another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Matrices are small here: threads of BLAS wait for each other, and pytest's workers use every core already.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests compile much and run little, in the processes that they start as well: a third of their time went into optimizing
# programs that run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# XLA sends each fused loop through MLIR and then splits the code among threads: five times the compilation, for programs that
# run once.
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def shorten_compilation() -> None:
    """Adds FLAGS to XLA_FLAGS, for this process, pytest's workers and the processes that tests start."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in FLAGS if flag.partition("=")[0] not in given]
    if not missing:
        return
    chosen = os.environ | {"XLA_FLAGS": " ".join([given, *missing]).strip()}
    # A compiler that does not know a flag ends its process, so another process asks.
    if subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=chosen, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = chosen["XLA_FLAGS"]


def share_compilations() -> None:
    """Programs that several tests compile, in whichever process, are compiled once: they lie in a folder of this session."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # pytest's workers and the processes that tests start inherit it
    folder = tempfile.mkdtemp(prefix="jax_async_grpo_tests_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


shorten_compilation()
share_compilations()
gc.set_threshold(100_000, 20, 20)  # traces are many objects and hardly any garbage: collections took a fifteenth of the time

import jax  # noqa: E402

# Not through JAX_ENABLE_X64: child processes would inherit that, and a job that forgot to ask for float64 would pass.
jax.config.update("jax_enable_x64", True)
