"""A batch over eight simulated devices, or in micro-batches, gives what the whole batch gives on one: the chain of an update.

The devices are simulated in a process of their own, since their number is fixed when JAX starts.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import advantages, aggregation, corrections, head, losses
from jax_async_grpo.aggregation import MaskedSum

NUM_DEVICES = 8
SHAPE, WIDTH, VOCABULARY = (16, 4, 6), 5, 40  # [B, G, L], D, V


def batch():
    rng = np.random.default_rng(0)
    old, behavior = -2.0 + 0.6 * rng.normal(size=(2, *SHAPE))
    return dict(
        logprobs=old + 0.4 * rng.normal(size=SHAPE),
        old_logprobs=old,
        behavior_logprobs=behavior,
        rewards=rng.integers(0, 3, size=SHAPE[:2]) / 2,
        mask=np.arange(SHAPE[-1]) < rng.integers(0, SHAPE[-1] + 1, size=(*SHAPE[:2], 1)),
        hidden=rng.normal(size=(*SHAPE, WIDTH)),
        tokens=rng.integers(0, VOCABULARY, size=SHAPE),
    )


def loss_of(batch, axis_name=None) -> MaskedSum:
    """Everything in it that a statistic of the batch enters: advantage, bounds of the clip, weights, count of tokens."""
    advantage = advantages.batch_scaled(batch["rewards"], axis_name=axis_name)
    values = losses.m2po(
        batch["logprobs"], batch["old_logprobs"], advantage, batch["mask"], min_epsilon_low=0.1, axis_name=axis_name
    )
    weights = corrections.token_tis(batch["old_logprobs"], batch["behavior_logprobs"], batch["mask"], cap=2.0)
    weights = corrections.batch_normalize(weights, batch["mask"], axis_name=axis_name)
    total = aggregation.token_mean(values * weights, batch["mask"])
    return total if axis_name is None else total.psum(axis_name)


def head_loss(batch, unembed):
    advantage = advantages.group_normalized(batch["rewards"])
    arrays = batch["hidden"], unembed, batch["tokens"], batch["old_logprobs"], advantage, batch["mask"]
    return head.policy_loss(*arrays, loss_fn=losses.gspo, chunk_size=16, block_size=16)


def computed(mesh=None) -> dict[str, list]:
    """Loss and gradient of the chain and of the head, on the mesh if there is one."""
    spec, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    arrays = jax.tree.map(jnp.asarray, batch())
    unembed = jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, VOCABULARY)))
    chain, of_head = lambda b: loss_of(b).mean(), head_loss
    if mesh is not None:
        on_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=everywhere)
        chain = on_mesh(lambda b: loss_of(b, "data").mean(), in_specs=spec)
        of_head = on_mesh(lambda b, w: jax.lax.pmean(head_loss(b, w), "data"), in_specs=(spec, everywhere))

    def with_logprobs(logprobs):
        return chain(arrays | {"logprobs": logprobs})

    def with_states(hidden, unembed):
        return of_head(arrays | {"hidden": hidden}, unembed)

    value, slope = jax.jit(jax.value_and_grad(with_logprobs))(arrays["logprobs"])
    head_value, slopes = jax.jit(jax.value_and_grad(with_states, argnums=(0, 1)))(arrays["hidden"], unembed)
    results = dict(value=value, slope=slope, head=head_value, head_hidden=slopes[0], head_unembed=slopes[1])
    return {name: np.asarray(x).tolist() for name, x in results.items()}


@pytest.fixture(scope="module")
def whole():
    return computed()


def test_eight_devices_give_what_one_gives(whole):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    code = "import json, jax; from tests import test_sharding as t; print(json.dumps(t.on_all_devices()))"
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    sharded = json.loads(result.stdout.splitlines()[-1])
    assert sharded.pop("num_devices") == NUM_DEVICES
    assert np.abs(whole["slope"]).max() > 1e-3 and np.abs(whole["head_unembed"]).max() > 1e-3
    for name, value in whole.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-9, atol=1e-13, err_msg=name)


def on_all_devices() -> dict:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return computed(mesh) | {"num_devices": jax.device_count()}


def test_a_statistic_of_each_shard_alone_is_another_loss(whole):
    arrays = batch()
    shards = [{name: np.split(x, NUM_DEVICES)[i] for name, x in arrays.items()} for i in range(NUM_DEVICES)]
    alone = functools.reduce(lambda a, b: a + b, map(jax.jit(loss_of), shards)).mean()
    assert abs(alone - whole["value"]) > 1e-3 * abs(whole["value"])


def test_micro_batches_add_up_where_no_statistic_couples_them():
    arrays = batch()

    @jax.jit
    def loss(batch):
        advantage = advantages.group_normalized(batch["rewards"])
        values = losses.ppo_clip(batch["logprobs"], batch["old_logprobs"], advantage, batch["mask"])
        return aggregation.token_mean(values, batch["mask"])

    parts = [{name: np.split(x, 4)[i] for name, x in arrays.items()} for i in range(4)]
    added = functools.reduce(lambda a, b: a + b, map(loss, parts))
    np.testing.assert_allclose(added.mean(), loss(arrays).mean(), rtol=1e-13)
