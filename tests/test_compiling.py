"""What the compiler is asked for, and that another compiler's refusal leaves plain jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import compiling


def gradient(x):
    return jax.grad(lambda x: jnp.sum(jnp.sum(jnp.tanh(x)[:, None] * jnp.arange(36.0)[None, :, None], axis=1) ** 2))(x)


def test_both_compute_what_jit_computes():
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = jax.jit(gradient)(x)
    for jit in (compiling.jit_once, compiling.jit_repeated):
        np.testing.assert_allclose(jit(gradient)(x), expected, rtol=1e-13)


def test_a_repeated_program_has_no_library_fusion_on_the_cpu():
    def compiled(jit):
        return jit(gradient).lower(np.ones((50, 30))).compile().as_text()

    assert "__ynn_fusion" not in compiled(compiling.jit_repeated)
    if compiling._without_library_fusions("cpu"):
        assert "__ynn_fusion" in compiled(jax.jit)  # else the option has lost its purpose


def test_unknown_options_and_other_devices_leave_plain_jit(monkeypatch):
    assert compiling._without_library_fusions("tpu") == {}
    real = jax.jit

    def refusing(function, compiler_options=None):
        if compiler_options:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")
        return real(function)

    compiling._without_library_fusions.cache_clear()
    monkeypatch.setattr(jax, "jit", refusing)
    try:
        assert float(compiling.jit_repeated(lambda x: x + 1)(1.0)) == 2.0
    finally:
        compiling._without_library_fusions.cache_clear()
