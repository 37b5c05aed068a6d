"""How the programs of the exact world are compiled: what repeats, for speed; what runs once, for a short compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

__all__ = ["jit_once", "jit_repeated"]


def jit_repeated(function: Callable) -> Callable:
    """`jax.jit` for what runs long or often: without XLA's library fusions for the CPU, which slow float64 reductions.

    The gradient of a vectorized grid of small policies takes a fourth of the time without them; on other devices this is
    plain `jax.jit`.
    """
    return jax.jit(function, compiler_options=_without_library_fusions(jax.default_backend()))


def jit_once(function: Callable, **options) -> Callable:
    """`jax.jit`, with its options, for a program that runs once: half the compilation, which is most of its time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@functools.cache
def _without_library_fusions(backend: str) -> dict[str, str]:
    if backend != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # the option is experimental: another version of the compiler may not know it
        return {}
    return options
