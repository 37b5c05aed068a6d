"""Every test runs in float64 on the CPU, in the order and with the seeds written in it."""

from __future__ import annotations

import os

# Read when jax is imported; processes that tests start inherit it. Set it yourself to run the tests on another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# Not through JAX_ENABLE_X64: child processes would inherit that, and a job that forgot to ask for float64 would pass.
jax.config.update("jax_enable_x64", True)
# Tests compile much and run little: a third of their time went into optimizing programs that run once.
jax.config.update("jax_disable_most_optimizations", True)
