"""Aggregations against loops over rows, and the same number however a batch is cut: micro-batches, shards, packed rows."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_async_grpo import aggregation
from jax_async_grpo.aggregation import MaskedSum

_CASES = 200
_SHAPES = [(3, 4, 5), (4, 1, 3)]  # B, G, L
_ROWS = ("sequence_mean", "sequence_sum", "constant_length")
_MEANS = (*_ROWS, "token_mean", "prompt_mean")
_LENGTH = dict(constant_length=dict(length=7))


def _reference(name, values, kept, original, *, denominator="kept", count_empty_rows=True, total_count=None, length=None):
    """The aggregate, row by row; `values` are [B, G, L] and count where `kept`."""
    counted = original if denominator == "original" else kept
    if name == "token_mean":
        total, count = sum(values[kept]), counted.sum()
    else:
        merge = (-1, values.shape[-1]) if name != "prompt_mean" else (values.shape[0], -1)
        total, count = 0.0, 0
        for row, valid, tokens in zip(*(x.reshape(merge) for x in (values, kept, counted)), strict=True):
            divisor = {"sequence_sum": 1, "constant_length": length}.get(name, tokens.sum())
            total += sum(row[valid]) / max(divisor, 1)
            count += count_empty_rows or tokens.any()
    return total / max(count if total_count is None else total_count, 1)


def _option_sets(name):
    empties = [{}] if name == "token_mean" else [{}, dict(count_empty_rows=False)]
    sets = [dict(denominator=d, **e) for d in ("kept", "original") for e in empties]
    return [options | _LENGTH.get(name, {}) for options in [*sets, dict(total_count=11)]]


def _random_case(rng, shape):
    """Values with garbage where they must not matter, the kept mask, the original mask; empty rows, now and then nothing."""
    lengths = rng.integers(0, shape[-1] + 1, size=(*shape[:-1], 1)) * (rng.random() > 0.03)
    original = np.arange(shape[-1]) < lengths
    rejected = rng.random((*shape[:-1], 1)) < 0.3
    kept = original & ~rejected & (rng.random(shape) > 0.1)
    return np.where(kept, rng.normal(size=shape), rng.choice([np.nan, np.inf, 1e300])), kept, original


@pytest.mark.parametrize("shape", _SHAPES, ids=["G=4", "G=1"])
@pytest.mark.parametrize("name", _MEANS)
def test_value_and_gradient_are_the_references(name, shape):
    rng = np.random.default_rng(len(name))
    cases = [_random_case(rng, shape) for _ in range(_CASES)]
    directions = rng.normal(size=(_CASES, *shape))
    function, option_sets = getattr(aggregation, name), _option_sets(name)

    def run(values, kept, original, direction):
        def value(v, options):
            return function(v, kept, original_mask=original, **options).mean()

        found = [jax.value_and_grad(value)(values, options) for options in option_sets]
        return [(v, jnp.vdot(gradient, direction)) for v, gradient in found]

    results = jax.jit(jax.vmap(run))(*(np.stack(x) for x in zip(*cases, strict=True)), directions)
    for options, (values, slopes) in zip(option_sets, results, strict=True):
        expected = [_reference(name, *case, **options) for case in cases]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-13)
        # it is linear in the values: the slope in a direction is its value there
        expected = [_reference(name, v, *case[1:], **options) for v, case in zip(directions, cases, strict=True)]
        np.testing.assert_allclose(slopes, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", _SHAPES, ids=["G=4", "G=1"])
def test_sums_over_a_constant_are_the_references(shape):
    rng = np.random.default_rng(1)
    cases = [_random_case(rng, shape)[:2] for _ in range(_CASES)]
    functions = (aggregation.token_sum, functools.partial(aggregation.sum_norm, norm=0.3))
    run = jax.vmap(lambda v, m: [jax.value_and_grad(lambda x, f=f: f(x, m).mean())(v) for f in functions])
    (sums, ones), (scaled, shares) = jax.jit(run)(*(np.stack(x) for x in zip(*cases, strict=True)))
    expected = np.array([sum(values[mask]) for values, mask in cases])
    masks = np.stack([mask for _, mask in cases])
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(scaled, expected / 0.3, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(ones, masks)
    np.testing.assert_allclose(shares, masks / 0.3, rtol=1e-15)


def test_identities():
    rng = np.random.default_rng(2)
    values, lengths = rng.normal(size=(3, 4, 5)), np.broadcast_to(3, (3, 4, 1))
    equal, ragged = np.arange(5) < lengths, np.arange(5) < rng.integers(1, 6, size=(3, 4, 1))

    @jax.jit
    def run(mask):
        functions = dict.fromkeys(
            ("token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean", "token_sum")
        )
        found = {name: getattr(aggregation, name)(values, mask).mean() for name in functions}
        found["norm"] = aggregation.sum_norm(values, mask, norm=3 * 4 * 5).mean()
        found["global"] = aggregation.token_mean(values, mask, total_count=mask.sum()).mean()
        found["lone"] = aggregation.prompt_mean(values[:, :1], mask[:, :1]).mean()
        found["first"] = aggregation.sequence_mean(values[:, :1], mask[:, :1]).mean()
        return found

    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-13)

    full, equal, ragged = run(np.ones((3, 4, 5), bool)), run(equal), run(ragged)
    for found in (full, equal, ragged):
        same(found["token_mean"], found["global"])  # bnpo is dapo where there is one micro-batch
        same(found["norm"], found["constant_length"])
        same(found["lone"], found["first"])
    same(full["constant_length"], full["token_mean"])  # dr_grpo is a token mean where every row is full
    for found in (full, equal):  # grpo is dapo for equal lengths
        same(found["sequence_mean"], found["token_mean"])
        same(found["prompt_mean"], found["token_mean"])
    same(equal["sequence_sum"], 3 * equal["sequence_mean"])
    assert len({round(float(ragged[name]), 9) for name in (*_MEANS, "token_sum")}) == 6  # and in general all part


def test_rejection_inflates_what_is_left_only_where_kept_tokens_are_counted():
    values, original = jnp.ones((2, 2, 3)), np.ones((2, 2, 3), bool)
    kept = original.copy()
    kept[0, 1], kept[1, 0, 2] = False, False

    def weight(name, denominator):
        def mean(v):
            return getattr(aggregation, name)(v, kept, original_mask=original, denominator=denominator).mean()

        return jax.grad(mean)(values)[1, 0, 0]

    names = ("token_mean", "sequence_mean", "prompt_mean")
    found = jax.jit(lambda: [[weight(name, denominator) for denominator in ("original", "kept")] for name in names])()
    np.testing.assert_allclose(found, [[1 / 12, 1 / 8], [1 / 12, 1 / 8], [1 / 12, 1 / 10]], rtol=1e-14)


# The same number however the batch is cut.


def _batch(seed, shape=(8, 2, 4)):
    values, kept, original = _random_case(np.random.default_rng(seed), shape)
    kept[0], original[0] = False, False  # one part has nothing
    return np.where(kept, values, np.nan), kept, original


def _totals(name, original):
    """What `total_count` is beforehand, with empty rows counted."""
    return dict(token_mean=original.sum(), prompt_mean=original.shape[0]).get(name, original[..., 0].size)


@pytest.mark.parametrize("name", [*_MEANS, "token_sum", "sum_norm"])
def test_micro_batches_and_shards_are_the_whole_batch(name):
    values, kept, original = _batch(3)
    plain, known = {}, {}
    if name in _MEANS:
        plain = dict(denominator="original", **_LENGTH.get(name, {}))
        known = dict(total_count=_totals(name, original))
    elif name == "sum_norm":
        plain = dict(norm=9.0)
    mesh = jax.make_mesh((jax.device_count(),), ("parts",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("parts")

    def part(v, m, o, **options):
        masks = dict(original_mask=o) if name in _MEANS else {}
        return getattr(aggregation, name)(v, m, **masks, **plain, **options)

    def parts(v, **options):
        return [part(v[i : i + 1], kept[i : i + 1], original[i : i + 1], **options) for i in range(len(v))]

    def mapped(v):
        run = jax.vmap(lambda *x: part(*x).psum("parts"), axis_name="parts")
        return run(v[:, None], kept[:, None], original[:, None]).mean()[0]

    def of_shard(v, m, o):
        return part(v, m, o).psum("parts").mean()

    def share(v, m, o):
        count = part(v, m, o).psum("parts").count
        return part(v, m, o, total_count=count) if name in _MEANS else part(v, m, o)

    def inside(v):  # each shard differentiates its own share of the mean
        run = jax.vmap(jax.value_and_grad(lambda *x: share(*x).mean()), axis_name="parts")
        shares, gradients = run(v[:, None], kept[:, None], original[:, None])
        return shares.sum(), gradients[:, 0]

    sharded = jax.shard_map(of_shard, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec())
    ways = [
        lambda v: part(v, kept, original).mean(),
        lambda v: functools.reduce(operator.add, parts(v)).mean(),
        lambda v: sum(p.mean() for p in parts(v, **known)),
        lambda v: functools.reduce(operator.add, parts(v, **known)).mean(),
        mapped,
        lambda v: sharded(v, kept, original),
    ]
    whole, *others = jax.jit(lambda v: [*(jax.value_and_grad(way)(v) for way in ways), inside(v)])(values)
    assert whole[0] != 0
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), other, whole)


def _pack(rng, num_rows, length, num_packed, packed_length):
    """Rows of random lengths laid into packed rows: [R, N] index of row·length + position (-1 = padding), segment ids."""
    source = np.full((num_packed, packed_length), -1)
    ids, used, packed = np.zeros_like(source), np.zeros(num_packed, int), np.zeros(num_packed, int)
    lengths = rng.integers(1, length + 1, size=num_rows)
    for row, n in enumerate(lengths):
        into = rng.choice(np.flatnonzero(used + n <= packed_length))
        packed[into] += 1
        source[into, used[into] : used[into] + n] = row * length + np.arange(n)
        ids[into, used[into] : used[into] + n] = packed[into]
        used[into] += n
    return source, ids, lengths


def test_packed_rows_are_the_unpacked_ones():
    num_rows, length, num_packed, packed_length = 6, 5, 4, 10
    option_sets = [(name, options) for name in _ROWS for options in _option_sets(name)]
    rng = np.random.default_rng(4)
    cases = []
    for _ in range(_CASES):
        source, ids, lengths = _pack(rng, num_rows, length, num_packed, packed_length)
        original = (np.arange(length) < lengths[:, None]) & (rng.random((num_rows, length)) > 0.2)
        original[0] &= rng.random() > 0.5  # a row that is there and has no valid token
        kept = original & (rng.random((num_rows, 1)) > 0.3)
        cases.append((np.where(kept, rng.normal(size=kept.shape), np.nan), kept, original, source, ids))

    def run(values, kept, original, source, ids):
        def laid(x, padding):
            return jnp.where(source >= 0, x.reshape(-1)[source], padding)

        def unpacked(v, name, options):
            return getattr(aggregation, name)(v, kept, original_mask=original, **options).mean()

        def packed(v, name, options):
            segments = dict(segment_ids=ids, num_segments=num_rows)
            # padding holds garbage and both masks are True there: the segment ids alone leave it out
            masks = dict(mask=laid(kept, True), original_mask=laid(original, True))
            return getattr(aggregation, name)(laid(v, jnp.nan), **masks, **segments, **options).mean()

        return [[jax.value_and_grad(way)(values, *s) for s in option_sets] for way in (unpacked, packed)]

    expected, found = jax.jit(jax.vmap(run))(*(np.stack(x) for x in zip(*cases, strict=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)


def test_a_traced_segment_id_out_of_range_is_not_dropped_silently():
    run = jax.jit(lambda ids: aggregation.sequence_sum(jnp.ones((2, 3)), segment_ids=ids, num_segments=2).mean())
    np.testing.assert_allclose(run(np.array([[1, 1, 2], [1, 0, 0]])), 4 / 3)
    for wrong in (3, -1):
        assert np.isnan(run(np.array([[1, 1, 2], [wrong, 0, 0]])))


def test_adding_is_not_appending_and_a_count_of_zero_divides_by_nothing():
    one = MaskedSum(jnp.float32(2.0), jnp.float32(4.0))
    assert one + one == MaskedSum(4.0, 8.0) and (one + one).mean() == 0.5
    assert aggregation.token_sum(np.ones((2, 3))).mean() == 6
    nothing = np.zeros((2, 2, 3), bool)
    option_sets = ({}, dict(total_count=0), dict(original_mask=nothing, denominator="original"))

    def empty(values):
        return [getattr(aggregation, name)(values, nothing, **options).mean() for name in _MEANS for options in option_sets]

    np.testing.assert_array_equal(jax.jit(empty)(np.full((2, 2, 3), np.nan)), 0.0)


def test_low_precision_comes_in_and_float32_comes_out():
    values = jax.ShapeDtypeStruct((2, 2, 300), jnp.bfloat16)
    for name in (*_MEANS, "token_sum"):
        found = jax.eval_shape(getattr(aggregation, name), values)
        assert found.sum.dtype == found.count.dtype == jnp.float32
    assert aggregation.token_sum(jnp.ones((1, 1, 300), jnp.bfloat16)).sum == 300  # bfloat16 would stop at 256


_V = np.ones((2, 3))
_IDS = np.array([[1, 1, 2], [1, 0, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregation.token_mean(_V, _V[:1]), "mask has shape"),
        (lambda: aggregation.token_mean(_V, _V / 2), "mask must be bool"),
        (lambda: aggregation.token_mean(1.0), "values is a scalar"),
        (lambda: aggregation.token_mean(_V, denominator="all"), "denominator is 'all'"),
        (lambda: aggregation.sequence_mean(_V, denominator="original"), "original_mask is None"),
        (lambda: aggregation.sequence_mean(_V, original_mask=_V[:1]), "original_mask has shape"),
        (lambda: aggregation.sequence_mean(_V, total_count=-1), "total_count is -1"),
        (lambda: aggregation.sequence_mean(_V, total_count=np.ones(2)), "total_count has shape"),
        (lambda: aggregation.constant_length(_V, length=0), "length of constant_length is 0"),
        (lambda: aggregation.constant_length(_V, segment_ids=_IDS, num_segments=2), "length of constant_length is None"),
        (lambda: aggregation.prompt_mean(_V[0]), "values has shape"),
        (lambda: aggregation.sum_norm(_V, norm=0.0), "norm of sum_norm is 0.0"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS), "num_segments is None"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS, num_segments=0), "num_segments is 0"),
        (lambda: aggregation.sequence_sum(_V, num_segments=2), "segment_ids is None"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS[:1], num_segments=2), "segment_ids has shape"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS * 1.0, num_segments=2), "segment_ids has dtype"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS, num_segments=1), "segment_ids reach from 0 to 2"),
        (lambda: aggregation.sequence_sum(_V, segment_ids=_IDS - 1, num_segments=2), "segment_ids reach from -1 to 1"),
    ],
)
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
