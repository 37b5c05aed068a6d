"""The ring against a Python list of all versions, under every transformation; schedules against their definition."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import staleness
from jax_async_grpo.staleness import create_history, nbytes, push, read

CAPACITY = 4
NUM_UPDATES = 11  # goes round the ring more than twice


def make_versions(num: int = NUM_UPDATES) -> list:
    rng = np.random.default_rng(0)
    return [
        {
            "table": jnp.asarray(rng.normal(size=(2, 3))),
            "layers": (jnp.asarray(rng.normal(size=4), jnp.float32), jnp.asarray(rng.integers(9, size=()), jnp.int32)),
        }
        for _ in range(num)
    ]


def stack(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


jit_push = jax.jit(push)


def fill(versions: list, **options) -> staleness.ParamHistory:
    history = create_history(versions[0], CAPACITY, **options)
    for params in versions:
        history = jit_push(history, params)
    return history


def run_in_scan(history, versions, schedule):
    """The history after all pushes, and what read gave at every step."""

    def body(history, inputs):
        params, lag = inputs
        history = push(history, params)
        return history, read(history, lag)

    return jax.lax.scan(body, history, (versions, schedule))


def test_read_gives_the_version_of_min_s_t_steps_ago():
    versions = make_versions()
    history = create_history(versions[0], CAPACITY)
    assert int(history.step) == -1 and history.versions.tolist() == [-1] * CAPACITY
    for t, params in enumerate(versions):
        history = push(history, params)
        assert int(history.step) == t
        for s in range(CAPACITY):
            got, realised_staleness = read(history, s)
            chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
            chex.assert_trees_all_equal(got, versions[t - min(s, t)])
            assert int(realised_staleness) == min(s, t) and realised_staleness.dtype == jnp.int32


@pytest.mark.parametrize("make", [staleness.fixed, staleness.periodic, functools.partial(staleness.random, 3)])
def test_scan_with_a_traced_schedule_reads_the_same_versions(make):
    versions = make_versions()
    schedule = make(CAPACITY - 1, NUM_UPDATES)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(run_in_scan, n=1), donate_argnums=0)
    for _ in range(2):
        history, (behavior, realised_staleness) = run(create_history(versions[0], CAPACITY), stack(versions), schedule)
    expected = staleness.realised(schedule)
    assert realised_staleness.tolist() == expected.tolist()
    chex.assert_trees_all_equal(behavior, stack([versions[t - s] for t, s in enumerate(expected)]))
    assert sorted(history.versions.tolist()) == list(range(NUM_UPDATES - CAPACITY, NUM_UPDATES))


def test_vmap_over_staleness_and_over_histories():
    versions = make_versions()
    lags = jnp.array([3, 0, 2])
    behavior, realised_staleness = jax.jit(jax.vmap(read, in_axes=(None, 0)))(fill(versions[:3]), lags)
    assert realised_staleness.tolist() == [2, 0, 2]  # at t = 2 there is nothing older than θ_0
    chex.assert_trees_all_equal(behavior, stack([versions[0], versions[2], versions[0]]))

    # Histories of different ages, each with its own staleness: a grid over seeds.
    histories = stack([fill(versions[:n]) for n in (2, 6, 9)])
    assert histories.capacity == CAPACITY
    histories = jax.jit(jax.vmap(push))(histories, stack([versions[9], versions[10], versions[1]]))
    behavior, realised_staleness = jax.jit(jax.vmap(read))(histories, lags)
    assert realised_staleness.tolist() == [2, 0, 2]
    chex.assert_trees_all_equal(behavior, stack([versions[0], versions[10], versions[7]]))

    def create_and_read(params):
        return read(push(create_history(params, CAPACITY), params), 1)[0]

    chex.assert_trees_all_equal(jax.jit(jax.vmap(create_and_read))(stack(versions[:3])), stack(versions[:3]))


@pytest.mark.parametrize("bad", [0.5, True, [1], [[1, 2]]])
def test_an_array_that_is_not_one_integer_is_refused(bad):
    with pytest.raises(ValueError, match=r"^staleness is (float|int|bool).*; it must be one integer$"):
        read(fill(make_versions(5)), jnp.array(bad))


@pytest.mark.parametrize("bad", [-1, CAPACITY, CAPACITY + 7, np.int64(CAPACITY), 1.0, True, None, np.array([0, 1])])
def test_a_static_staleness_outside_the_ring_is_refused(bad):
    with pytest.raises(ValueError, match=r"^staleness is .*(0\.\.3|>= 0)$"):
        read(fill(make_versions(5)), bad)


@pytest.mark.parametrize(("lag", "returned"), [(CAPACITY, 0), (CAPACITY + 1, 1), (-1, CAPACITY - 1)])
def test_a_traced_staleness_outside_the_ring_tells_what_was_really_read(lag, returned):
    versions = make_versions()
    behavior, realised_staleness = jax.jit(read)(fill(versions), jnp.asarray(lag))
    assert int(realised_staleness) == returned != lag
    chex.assert_trees_all_equal(behavior, versions[-1 - returned])


def test_bfloat16_storage_rounds_once_and_reads_back_in_the_template_dtypes():
    versions = make_versions()
    history = fill(versions, dtype=jnp.bfloat16)
    assert [x.dtype for x in jax.tree.leaves(history.params)] == [jnp.bfloat16, jnp.int32, jnp.bfloat16]
    for read_fn in (read, jax.jit(read)):
        behavior, _ = read_fn(history, jnp.asarray(2))
        chex.assert_trees_all_equal_shapes_and_dtypes(behavior, versions[0])
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype != jnp.int32 else x, versions[-3])
        chex.assert_trees_all_equal(behavior, rounded)
    assert not np.array_equal(behavior["table"], versions[-3]["table"])  # the values do need rounding


def test_versions_of_uncommitted_parameters_are_free_to_move():
    params = {"w": jnp.zeros(3)}
    assert not create_history(params, CAPACITY).params["w"].committed
    committed = jax.device_put(params, jax.devices()[0])
    assert create_history(committed, CAPACITY).params["w"].committed


def test_nbytes_counts_the_stored_versions():
    params = make_versions(1)[0]
    assert nbytes(create_history(params, CAPACITY)) == CAPACITY * (6 * 8 + 4 * 4 + 4)
    assert nbytes(create_history(params, CAPACITY, dtype=jnp.bfloat16)) == CAPACITY * (6 * 2 + 4 * 2 + 4)
    shapes = jax.eval_shape(functools.partial(create_history, capacity=32), params)
    assert nbytes(shapes) == 32 * (6 * 8 + 4 * 4 + 4)


def test_a_donated_push_writes_in_place():
    versions = make_versions(3)
    donated = jax.jit(push, donate_argnums=0)
    history = create_history(versions[0], CAPACITY)
    aliased = donated.lower(history, versions[0]).compile().memory_analysis().alias_size_in_bytes
    assert aliased >= nbytes(history)
    for params in versions:
        old, history = history, donated(history, params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    chex.assert_trees_all_equal(read(history, 2)[0], versions[0])


def test_push_and_read_are_traced_once_whatever_the_step():
    chex.clear_trace_counter()
    versions = make_versions(6)
    push_once, read_once = (jax.jit(chex.assert_max_traces(f, n=1)) for f in (push, read))
    history = create_history(versions[0], CAPACITY)
    for t, params in enumerate(versions):
        history = push_once(history, params)
        assert int(read_once(history, jnp.asarray(t % CAPACITY))[1]) == t % CAPACITY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity is 0; it must be an integer >= 1"),
        ({"capacity": 2.0}, r"capacity is 2\.0; it must be an integer >= 1"),
        ({"capacity": 2, "dtype": jnp.int8}, r"dtype of the history is int8; it must be a floating-point type"),
        ({"capacity": 2, "memory_kind": "attic"}, r"memory kinds: device, pinned_host"),
    ],
)
def test_create_history_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        create_history(make_versions(1)[0], **options)


def test_push_refuses_parameters_of_another_model():
    history = fill(make_versions(2))
    params = make_versions(1)[0]
    with pytest.raises(ValueError, match=r"^params\['table'\] has shape \(3, 2\); the history stores \(2, 3\)$"):
        push(history, {**params, "table": params["table"].T})
    with pytest.raises(ValueError, match=r"^params has the structure .*; the history stores"):
        push(history, {"table": params["table"]})


def test_pinned_host_storage_gives_the_same_versions():
    versions = make_versions()
    schedule = staleness.periodic(CAPACITY - 1, NUM_UPDATES)
    on_host = create_history(versions[0], CAPACITY, dtype=jnp.float32, memory_kind="pinned_host")
    on_device = create_history(versions[0], CAPACITY, dtype=jnp.float32)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(on_host.params)} == {"pinned_host"}
    run = jax.jit(run_in_scan, donate_argnums=0)
    host_history, host_reads = run(on_host, stack(versions), schedule)
    device_history, device_reads = run(on_device, stack(versions), schedule)
    chex.assert_trees_all_equal(host_reads, device_reads)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(host_history.params)} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(host_reads)} == {"device"}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(on_host))  # donated from host memory too

    # Outside jit, and through lax.map, which stands in for vmap.
    behavior, _ = read(push(host_history, versions[0]), 1)
    chex.assert_trees_all_equal(behavior, read(push(device_history, versions[0]), 1)[0])
    lags = jnp.arange(CAPACITY)
    host_map, device_map = (jax.lax.map(functools.partial(read, h), lags) for h in (host_history, device_history))
    chex.assert_trees_all_equal(host_map, device_map)


def test_parameters_that_live_on_the_host_are_kept_there():
    params = jax.device_put(make_versions(1)[0], jax.memory.Space.Host)
    history = push(create_history(params, CAPACITY), params)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(history.params)} == {"pinned_host"}
    with pytest.raises(ValueError, match=r"^memory_kind 'pinned_host' needs concrete parameters; .* outside jit and vmap"):
        jax.jit(lambda p: create_history(p, 2, memory_kind="pinned_host"))(params)


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jax_async_grpo.staleness import create_history, push, read

    SPECS = {"w": P("data", "model"), "b": P("model"), "scale": P()}
    SHAPES = {"w": (8, 4), "b": (4,), "scale": ()}

    def scan(history, params, schedule):
        def body(carry, s):
            history, params = carry
            history = push(history, params)
            behavior, _ = read(history, s)
            return (history, jax.tree.map(lambda p, b: p - 0.1 * b, params, behavior)), behavior["scale"]
        return jax.lax.scan(body, (history, params), schedule)

    def check(memory_kind, axis_type):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        version = lambda t: {k: jax.device_put(jnp.full(SHAPES[k], float(t)), NamedSharding(mesh, SPECS[k])) for k in SPECS}

        def sharded_as(params, kind, *ring):
            for k, leaf in params.items():
                want = NamedSharding(mesh, P(*ring, *SPECS[k]), memory_kind=kind)
                assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (k, leaf.sharding)
                assert leaf.sharding.memory_kind == kind, (k, leaf.sharding)

        kind = memory_kind or "device"
        history = create_history(version(0), 3, memory_kind=memory_kind)
        sharded_as(history.params, kind, None)
        donated, jit_read = jax.jit(push, donate_argnums=0), jax.jit(read)
        for t in range(5):
            history = donated(history, version(t))
        sharded_as(history.params, kind, None)
        shards = {s.device: s.data.nbytes for s in history.params["w"].addressable_shards}
        assert len(shards) == 8 and set(shards.values()) == {3 * 8 * 4 * 4 // 8}, shards
        behavior, realised = jit_read(history, jnp.asarray(2))
        sharded_as(behavior, "device")
        assert int(realised) == 2
        for k, leaf in behavior.items():
            np.testing.assert_array_equal(leaf, np.full(SHAPES[k], 2.0))

        history = create_history(version(1), 3, memory_kind=memory_kind)
        (history, params), seen = jax.jit(scan, donate_argnums=0)(history, version(1), jnp.full(6, 2))
        sharded_as(history.params, kind, None)
        theta = [1.0]
        for t in range(6):
            theta.append(theta[-1] - 0.1 * theta[t - min(2, t)])
        np.testing.assert_allclose(params["w"], np.full((8, 4), theta[-1]), rtol=1e-5)
        np.testing.assert_allclose(seen, [theta[t - min(2, t)] for t in range(6)], rtol=1e-5)

    check(None, AxisType.Auto)
    check("pinned_host", AxisType.Auto)
    check("pinned_host", AxisType.Explicit)
    print("sharded")
"""


def test_versions_stay_sharded_over_eight_devices_in_either_memory():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.split() == ["sharded"], result.stderr[-2000:]


def test_schedules_are_what_they_are_called():
    assert staleness.fixed(3, 5).tolist() == [3] * 5
    assert staleness.periodic(2, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    drawn = staleness.random(7, 3, 4000)
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4 and (abs(counts - 1000) < 5 * np.sqrt(4000 * 3 / 16)).all()  # 5 standard deviations
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / np.sqrt(4000)
    for schedule in (staleness.fixed(3, 5), staleness.periodic(2, 8), drawn):
        assert schedule.dtype == np.int32 and type(schedule) is np.ndarray


def test_random_schedules_repeat_grow_and_differ():
    draw = staleness.random
    assert draw(1, 9, 50).tolist() == draw(1, 9, 80)[:50].tolist()
    assert draw(1, 9, 50).tolist() != draw(2, 9, 50).tolist()
    key = jax.random.key(1)
    assert draw(key, 9, 50).tolist() == draw(key, 9, 80)[:50].tolist()
    assert draw(key, 9, 50).tolist() != draw(jax.random.fold_in(key, 1), 9, 50).tolist()


def test_maximum_staleness_zero_is_zero_for_every_schedule():
    for schedule in (staleness.fixed(0, 6), staleness.periodic(0, 6), staleness.random(5, 0, 6)):
        assert schedule.tolist() == [0] * 6 and staleness.rms(schedule) == 0.0


def test_realised_is_min_s_t():
    assert staleness.realised(staleness.fixed(3, 6)).tolist() == [0, 1, 2, 3, 3, 3]
    per_prompt = np.array([[2, 0], [2, 1], [0, 2], [5, 1]])
    realised_staleness = staleness.realised(per_prompt)
    assert realised_staleness.tolist() == [[0, 0], [1, 1], [0, 2], [3, 1]] and realised_staleness.dtype == np.int32


@pytest.mark.parametrize("max_staleness", [1, 2, 8, 31])
def test_periodic_and_random_have_the_same_rms(max_staleness):
    exact = np.sqrt(max_staleness * (2 * max_staleness + 1) / 6)
    assert staleness.rms(staleness.periodic(max_staleness, 5 * (max_staleness + 1))) == pytest.approx(exact, rel=1e-12)
    assert staleness.rms(staleness.random(0, max_staleness, 40_000)) == pytest.approx(exact, rel=0.02)
    assert staleness.rms(staleness.fixed(max_staleness, 7)) == max_staleness


@pytest.mark.parametrize("make", [staleness.fixed, staleness.periodic, functools.partial(staleness.random, 0)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 5), r"^max_staleness is -1; it must be an integer >= 0$"),
        ((2.0, 5), r"^max_staleness is 2\.0; it must be an integer >= 0$"),
        ((2**40, 5), r"^max_staleness is 1099511627776; schedules are int32, so it must be at most 2147483647$"),
        ((True, 5), r"^max_staleness is True; it must be an integer >= 0$"),
        ((2, 0), r"^num_updates is 0; it must be an integer >= 1$"),
        ((2, "5"), r"^num_updates is '5'; it must be an integer >= 1$"),
    ],
)
def test_schedules_refuse(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_random_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match=r"^seed is .*; it must be an integer >= 0$"):
        staleness.random(seed, 2, 5)


@pytest.mark.parametrize("bad", [3, [0.0, 1.0], [1, -1], np.zeros(0, int), np.zeros((0, 2), int)])
@pytest.mark.parametrize("function", [staleness.realised, staleness.rms])
def test_functions_of_schedules_refuse_other_arrays(function, bad):
    with pytest.raises(ValueError, match=r"^staleness must be integers >= 0 of shape \[T\] or \[T, B\]; got "):
        function(np.asarray(bad))
