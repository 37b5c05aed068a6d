"""The head without logits against the head with them, in float64, on tiny shapes; what it may hold, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import aggregation, head, losses

_SHAPE, _WIDTH, _VOCABULARY = (2, 3, 4), 5, 11
_MASK = np.arange(_SHAPE[-1]) < np.array([[4, 2, 0], [3, 1, 4]])[..., None]
_NAMES = ("hidden", "unembed", "old_logprobs", "advantages", "behavior_logprobs")


def _case(seed=0):
    rng = np.random.default_rng(seed)
    old, behavior = -2.0 + 0.5 * rng.normal(size=(2, *_SHAPE))
    return dict(
        hidden=rng.normal(size=(*_SHAPE, _WIDTH)),
        unembed=rng.normal(size=(_WIDTH, _VOCABULARY)),
        tokens=rng.integers(0, _VOCABULARY, size=_SHAPE),
        old_logprobs=old,
        advantages=rng.normal(size=_SHAPE[:-1]),
        behavior_logprobs=behavior,
    )


def _plain_logprobs(hidden, unembed, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ unembed), tokens[..., None], axis=-1)[..., 0]


def _plain(loss_fn, aggregation_fn, case, names=()):
    """Loss and gradient in every float argument, from logits and autodiff."""
    floats = {name: jnp.asarray(case[name]) for name in _NAMES}

    def loss(hidden, unembed, old_logprobs, advantages, behavior_logprobs):
        logprobs = _plain_logprobs(hidden, unembed, case["tokens"])
        inputs = dict(behavior_logprobs=behavior_logprobs) if "behavior_logprobs" in names else {}
        values = loss_fn(logprobs, old_logprobs, advantages, jnp.asarray(_MASK), **inputs)
        return aggregation_fn(values, jnp.asarray(_MASK)).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*floats.values())


def _chunked(loss_fn, case, names=(), **options):
    def loss(hidden, unembed, old_logprobs, advantages, behavior_logprobs):
        inputs = dict(behavior_logprobs=behavior_logprobs) if "behavior_logprobs" in names else None
        arrays = (hidden, unembed, case["tokens"], old_logprobs, advantages, _MASK)
        return head.policy_loss(*arrays, loss_fn=loss_fn, loss_inputs=inputs, **options)

    floats = [jnp.asarray(case[name]) for name in _NAMES]
    return jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*floats)


def _assert_same(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-13), actual, expected)


_LOSSES = {
    "ppo_clip": (functools.partial(losses.ppo_clip, epsilon_high=0.28), "token"),
    "cispo": (functools.partial(losses.cispo, ratio_high=1.5), "token"),
    "decoupled_ppo": (functools.partial(losses.decoupled_ppo, cap=2.0), "token"),
    "gspo": (functools.partial(losses.gspo, epsilon_low=0.2, epsilon_high=0.3), "row"),
    "topr": (losses.topr, "row"),
    "m2po": (functools.partial(losses.m2po, min_epsilon_low=0.1, min_epsilon_high=0.1), "batch"),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ppo_clip", dict(chunk_size=5, block_size=4)),  # neither divides 24 tokens or 11 entries
        ("ppo_clip", dict(chunk_size=8, block_size=11)),
        ("ppo_clip", dict()),
        ("cispo", dict(chunk_size=7, block_size=3)),
        ("decoupled_ppo", dict(chunk_size=6, block_size=5)),
        ("gspo", dict(chunk_size=17, block_size=4)),  # 4 rows and 2 rows
        ("gspo", dict(chunk_size=8, block_size=11)),  # 2 rows thrice
        ("gspo", dict(chunk_size=3, block_size=4)),  # a row is longer than a chunk
        ("topr", dict(chunk_size=4, block_size=6)),
        ("m2po", dict(chunk_size=10, block_size=4)),
    ],
)
def test_value_and_every_gradient_are_those_of_the_head_with_logits(name, sizes):
    loss_fn, coupling = _LOSSES[name]
    names = ("behavior_logprobs",) if name == "decoupled_ppo" else ()
    case = _case(len(name))
    actual = _chunked(loss_fn, case, names, coupling=coupling, **sizes)
    _assert_same(actual, _plain(loss_fn, aggregation.sequence_mean, case, names))
    assert all(np.abs(gradient).max() > 1e-4 for gradient in actual[1][: 4 + len(names)])


@pytest.mark.parametrize("aggregation_fn", [aggregation.token_mean, functools.partial(aggregation.constant_length, length=7)])
def test_aggregation_and_defaults(aggregation_fn):
    case, loss_fn = _case(1), losses.ppo_clip
    actual = _chunked(loss_fn, case, aggregation_fn=aggregation_fn, chunk_size=8)
    _assert_same(actual, _plain(loss_fn, aggregation_fn, case))


def test_loss_and_gradient_at_once():
    case = _case(2)
    case.pop("behavior_logprobs")
    options = dict(loss_fn=losses.ppo_clip, coupling="token", chunk_size=5, block_size=4)
    result = tuple(jax.jit(functools.partial(head.loss_and_gradient, **options))(**case, mask=_MASK))
    value, (d_hidden, d_unembed, *_) = _plain(losses.ppo_clip, aggregation.sequence_mean, _case(2))
    logprobs = _plain_logprobs(case["hidden"], case["unembed"], case["tokens"])
    _assert_same(result, (value, jnp.where(_MASK, logprobs, 0.0), d_hidden, d_unembed))


def test_the_value_alone_is_the_differentiated_value():
    case, loss_fn = _case(3), losses.gspo
    arrays = [case[name] for name in ("hidden", "unembed", "tokens", "old_logprobs", "advantages")]
    value = jax.jit(functools.partial(head.policy_loss, loss_fn=loss_fn, chunk_size=8))(*arrays, _MASK)
    np.testing.assert_allclose(value, _plain(loss_fn, aggregation.sequence_mean, case)[0], rtol=1e-12)


@pytest.mark.parametrize("coupling", ["token", "batch"])
def test_the_cotangent_scales(coupling):
    case = _case(4)
    arrays = [case[name] for name in ("tokens", "old_logprobs", "advantages")]

    def loss(hidden):
        arguments = (hidden, case["unembed"], *arrays, _MASK)
        return head.policy_loss(*arguments, loss_fn=losses.ppo_clip, coupling=coupling, chunk_size=5)

    hidden = jnp.asarray(case["hidden"])
    scaled, gradient = jax.jit(lambda x: (jax.grad(lambda x: -3 * loss(x))(x), jax.grad(loss)(x)))(hidden)
    np.testing.assert_allclose(scaled, -3 * gradient, rtol=1e-12)


def test_logprobs_and_entropy_and_their_gradients():
    case, weights = _case(5), np.random.default_rng(5).normal(size=(2, *_SHAPE))
    hidden, unembed = jnp.asarray(case["hidden"]), jnp.asarray(case["unembed"])

    def plain(hidden, unembed):
        logits = hidden @ unembed
        return jnp.where(_MASK, _plain_logprobs(hidden, unembed, case["tokens"]), 0), jnp.where(
            _MASK, losses.entropy(logits), 0
        )

    def chunked(hidden, unembed):
        return head.logprobs_and_entropy(hidden, unembed, case["tokens"], _MASK, chunk_size=5, block_size=4)

    def only(hidden, unembed):
        return head.token_logprobs(hidden, unembed, case["tokens"], _MASK, chunk_size=7)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(function, cotangents):
        values, pull = jax.vjp(function, hidden, unembed)
        return values, pull(cotangents)

    _assert_same(with_gradient(chunked, tuple(weights)), with_gradient(plain, tuple(weights)))
    logprobs_alone = with_gradient(lambda *arrays: plain(*arrays)[0], weights[0])
    _assert_same(with_gradient(only, weights[0]), logprobs_alone)


@pytest.mark.parametrize("coupling", ["row", "batch"])
def test_what_stands_under_the_mask_touches_nothing(coupling):
    case = _case(6)
    dirty = dict(case, hidden=np.where(_MASK[..., None], case["hidden"], np.nan), tokens=np.where(_MASK, case["tokens"], -999))
    dirty["old_logprobs"] = np.where(_MASK, case["old_logprobs"], np.inf)
    clean, spoiled = (_chunked(losses.ppo_clip, c, coupling=coupling, chunk_size=8) for c in (case, dirty))
    jax.tree.map(np.testing.assert_array_equal, clean, spoiled)
    assert (np.asarray(spoiled[1][0])[~_MASK] == 0).all()


def test_large_logits_stay_finite():
    case = _case(7)
    case["hidden"] = 300 * case["hidden"]
    actual = _chunked(losses.reinforce, case, chunk_size=8, block_size=3)
    _assert_same(actual, _plain(losses.reinforce, aggregation.sequence_mean, case))


def test_vmap_is_a_loop():
    case = _case(8)
    hidden = jnp.stack([case["hidden"], 0.5 * case["hidden"]])
    unembed = jnp.stack([case["unembed"], 1 + case["unembed"]])

    @jax.jit
    def gradient(hidden, unembed):
        arrays = (hidden, unembed, case["tokens"], case["old_logprobs"], case["advantages"], _MASK)
        return head.loss_and_gradient(*arrays, loss_fn=losses.ppo_clip, coupling="token", chunk_size=5, block_size=4)

    mapped = jax.jit(jax.vmap(gradient))(hidden, unembed)
    for i in range(2):
        _assert_same(jax.tree.map(lambda x, i=i: x[i], mapped), gradient(hidden[i], unembed[i]))


@pytest.mark.parametrize("coupling", ["token", "batch"])
def test_inside_shard_map_the_gradient_of_a_replicated_matrix_is_summed(coupling):
    case = _case(9)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradient(hidden, unembed, *arrays):
        result = head.loss_and_gradient(hidden, unembed, *arrays, loss_fn=losses.ppo_clip, coupling=coupling, chunk_size=5)
        return jax.lax.psum(result.loss, "data"), result.hidden, result.unembed

    specs = dict(in_specs=(sharded, replicated, *[sharded] * 4), out_specs=(replicated, sharded, replicated))
    arrays = [jnp.asarray(case[name]) for name in ("hidden", "unembed", "tokens", "old_logprobs", "advantages")]
    value, d_hidden, d_unembed = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(*arrays, jnp.asarray(_MASK))
    expected = _plain(losses.ppo_clip, aggregation.sequence_mean, case)
    _assert_same((value, d_hidden, d_unembed), (expected[0], *expected[1][:2]))


def test_low_precision_comes_in_and_the_loss_is_float32():
    case = _case(10)
    arrays = [jnp.asarray(case[name], jnp.bfloat16) for name in ("hidden", "unembed")]
    others = [jnp.asarray(case[name], jnp.float32) for name in ("old_logprobs", "advantages")]
    gradient = functools.partial(head.loss_and_gradient, loss_fn=losses.ppo_clip, chunk_size=8)
    result = jax.jit(gradient)(*arrays, case["tokens"], *others, _MASK)
    assert [x.dtype for x in result] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    case |= dict(zip(("hidden", "unembed"), (np.asarray(x, float) for x in arrays), strict=True))
    value, gradients = _plain(losses.ppo_clip, aggregation.sequence_mean, case)
    np.testing.assert_allclose(result.loss, value, rtol=1e-5)
    for actual, expected in zip((result.hidden, result.unembed), gradients, strict=False):
        np.testing.assert_allclose(np.asarray(actual, float), expected, atol=0.02 * np.abs(expected).max())


def _gradient_of(num_rows, coupling):
    """A jitted gradient and its shapes: rows of 8 tokens, a chunk of 16, 4,096 entries in blocks of 512."""
    float64 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
    shape = (num_rows, 8)
    arguments = (
        float64((*shape, 4)),
        float64((4, 4096)),
        jax.ShapeDtypeStruct(shape, int),
        float64(shape),
        float64((num_rows,)),
    )
    options = dict(loss_fn=losses.ppo_clip, coupling=coupling, chunk_size=16, block_size=512)
    return functools.partial(head.loss_and_gradient, **options), arguments


@pytest.mark.parametrize("coupling", ["row", "batch"])
def test_temporary_memory_is_that_of_a_chunk(coupling):
    def temporary_bytes(num_rows):
        function, arguments = _gradient_of(num_rows, coupling)
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(4), temporary_bytes(32)
    logits_of_a_token = 4096 * 8
    assert many - few < (32 - 4) * 8 * logits_of_a_token / 20  # what grows are [N, D] and [N]
    assert few < 2.5 * 16 * logits_of_a_token + (0 if coupling == "row" else 4 * 4096 * 8)


def _array_sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _array_sizes(inner)


@pytest.mark.parametrize("coupling", ["token", "row", "batch"])
def test_no_array_holds_logits_of_all_tokens(coupling):
    function, arguments = _gradient_of(32, coupling)
    sizes = list(_array_sizes(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(sizes) > 100
    assert max(sizes) == (16 * 4096 if coupling != "batch" else max(4 * 4096, 256 * 4 * 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(old_logprobs=None), "old_logprobs is None"),
        (dict(old_logprobs=np.zeros((2, 3))), "old_logprobs has shape"),
        (dict(advantages=np.zeros(2)), "advantages has shape"),
        (dict(hidden=np.zeros((2, 3, 4, 6))), "hidden has shape"),
        (dict(unembed=np.zeros(5)), "unembed has shape"),
        (dict(tokens=np.zeros(_SHAPE)), "tokens has dtype"),
        (dict(mask=np.ones((2, 3))), "mask has shape"),
        (dict(coupling="sequence"), "coupling is 'sequence'"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(block_size=0), "block_size is 0"),
        (dict(loss_inputs=dict(behavior_logprobs=np.zeros(3))), "behavior_logprobs has shape"),
        (dict(loss_fn=lambda *arrays: jnp.sum(arrays[0])), "loss_fn returns shape"),
    ],
)
def test_errors_name_the_argument(changes, message):
    case = _case()
    case.pop("behavior_logprobs")
    with pytest.raises(ValueError, match=message):
        head.policy_loss(**{**case, "mask": _MASK, "loss_fn": losses.ppo_clip, **changes})


def test_a_loss_that_couples_more_than_said_is_refused():
    case = _case(0)
    for loss_fn, coupling, message in (
        (losses.m2po, "row", "m2po couples rows; pass coupling='batch'"),
        (losses.m2po, "token", "m2po couples tokens"),
        (losses.gspo, "token", "gspo couples tokens; pass coupling='row'"),
    ):
        with pytest.raises(ValueError, match=message):
            _chunked(loss_fn, case, (), coupling=coupling)


@pytest.mark.parametrize("token", [-100, _VOCABULARY])
def test_a_valid_token_outside_of_the_vocabulary_shows_and_one_under_the_mask_does_not(token):
    case = _case(0)
    index = np.argwhere(_MASK)[0]
    dirty = np.where(_MASK, case["tokens"], token)
    expected = head.token_logprobs(case["hidden"], case["unembed"], jnp.asarray(case["tokens"]), _MASK)
    np.testing.assert_array_equal(head.token_logprobs(case["hidden"], case["unembed"], jnp.asarray(dirty), _MASK), expected)
    dirty[tuple(index)] = token
    spoiled = np.asarray(head.token_logprobs(case["hidden"], case["unembed"], jnp.asarray(dirty), _MASK))
    assert np.isnan(spoiled[tuple(index)]) and np.isnan(spoiled).sum() == 1
