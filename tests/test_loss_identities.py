"""Identities between the losses, the exact oracle's two ways to each, first-order laws, and the losses that see the batch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import loss_references
import numpy as np
import pytest

from jax_async_grpo import bias, losses
from jax_async_grpo.advantages import leave_one_out
from jax_async_grpo.aggregation import sequence_mean, sequence_sum
from jax_async_grpo.exact import brute_force_objective, surrogate_objective
from jax_async_grpo.separability import named_parameters

# every separable policy loss, with options that a drift of a few percent does not reach
SMOOTH = {
    "ppo_clip": dict(dual_clip=3.0),
    "importance_sampling": {},
    "reinforce": {},
    "decoupled_ppo": dict(cap=2.0),
    "sapo": {},
    "dro": dict(beta=0.3),
    "gspo": dict(epsilon_low=0.05, epsilon_high=0.1),
    "gspo_token": dict(epsilon_low=0.05, epsilon_high=0.1),
    "luspo": dict(epsilon_low=0.05, epsilon_high=0.1),
    "gmpo": {},
    "cispo": dict(ratio_high=1.3, ratio_low=0.7),
    "rollout_is": dict(epsilon_low=0.3, epsilon_high=0.6),
    "vespo": {},
    "dppo_tv": dict(threshold_low=0.05, threshold_high=0.1),
    "dppo_kl": dict(threshold_low=0.03, threshold_high=0.05),
    "prime": {},
    "ipo": {},
}
SEPARABLE = SMOOTH | {"topr": {}}
OF_COMPLETIONS = ("gspo", "luspo", "gmpo")
BEHAVIOR_LOSSES = ("decoupled_ppo", "rollout_is")


@functools.cache  # one object per loss, which the oracle probes once
def loss(name):
    return functools.partial(getattr(losses, name), **(SEPARABLE | {"m2po": {}})[name])


def batch(seed=0, spread=0.3, shape=(16, 5)):
    rng = np.random.default_rng(seed)
    old = -np.abs(rng.normal(1.0, 0.5, shape)) - 0.1
    mask = np.arange(shape[-1]) < rng.integers(0, shape[-1] + 1, (*shape[:-1], 1))
    return old + spread * rng.normal(size=shape), old, rng.normal(size=shape[:-1]), mask


# -- identities ----------------------------------------------------------------------------------------------------------------


@functools.cache
def fresh_gradients():
    """(log-probs, denominator, A, mask, weights) -> {loss: gradient of Σ weights·ℓ}"""

    @jax.jit
    def run(learner, old, advantages, mask, weights):
        def of(name):
            more = dict(behavior_logprobs=old) if name in BEHAVIOR_LOSSES else {}
            return jax.grad(lambda x: jnp.sum(weights * loss(name)(x, old, advantages, mask, **more)))(learner)

        return {name: of(name) for name in (*SEPARABLE, "m2po")}

    return run


def test_every_loss_has_the_gradient_of_reinforce_where_the_policies_agree():
    _, old, advantages, mask = batch()
    rng = np.random.default_rng(1)
    rows, tokens = rng.normal(size=(len(mask), 1)) * np.ones(mask.shape), rng.normal(size=mask.shape)
    found = {
        kind: fresh_gradients()(old.copy(), old, advantages, mask, w) for kind, w in dict(rows=rows, tokens=tokens).items()
    }
    lengths = mask.sum(-1, keepdims=True)
    for name, gradient in found["rows"].items():  # luspo: the weight of a row times its length
        expected = -advantages[:, None] * mask * rows * (lengths if name == "luspo" else 1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-13, atol=1e-15, err_msg=name)
    for name, gradient in found["tokens"].items():
        same = np.allclose(gradient, -advantages[:, None] * mask * tokens, rtol=1e-13, atol=1e-15)
        assert same == (name not in OF_COMPLETIONS), name


@functools.cache
def pairs():
    """{identity: (value and gradient of one side, of the other)} away from equal policies, in one compilation."""
    learner, old, advantages, mask = batch(2)
    third, per_token = old + 0.2, np.random.default_rng(3).normal(size=mask.shape)

    def ratio_capped(x, cap):
        ratio = jnp.minimum(jnp.exp(x - old), cap)
        clipped = jnp.clip(ratio, 0.8, 1.3)
        return jnp.where(mask, -jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None]), 0.0)

    def clip_loss(x, **options):
        return losses.ppo_clip(x, old, advantages, mask, epsilon_low=0.2, epsilon_high=0.3, **options)

    def of(name, x, a=advantages, **options):
        return getattr(losses, name)(x, old, a, mask, **options)

    wide = dict(epsilon_low=1.0, epsilon_high=1e6)
    decoupled = functools.partial(losses.decoupled_ppo, advantages=advantages, mask=mask)
    two_sides = {
        "gspo, token": (lambda x: of("gspo", x, epsilon_high=0.1), lambda x: of("gspo_token", x, epsilon_high=0.1)),
        "gspo, token, advantages of tokens": (
            lambda x: of("gspo", x, per_token, **wide),
            lambda x: of("gspo_token", x, per_token, **wide),
        ),
        "cap": (lambda x: clip_loss(x, dual_clip=1.5), lambda x: ratio_capped(x, 1.5)),
        "cap that matters": (lambda x: clip_loss(x, dual_clip=1.5), clip_loss),
        "large epsilon": (lambda x: of("ppo_clip", x, **wide), lambda x: of("importance_sampling", x)),
        "cispo without a cap": (lambda x: of("cispo", x, ratio_high=1e9), lambda x: of("importance_sampling", x)),
        "proximal = behavior": (
            lambda x: decoupled(x, old, behavior_logprobs=old, epsilon_high=0.3),
            lambda x: of("ppo_clip", x, epsilon_high=0.3),
        ),
        "proximal = learner": (
            lambda x: decoupled(x, jnp.asarray(learner), behavior_logprobs=third, cap=1.2),
            lambda x: jnp.minimum(jnp.exp(learner - third), 1.2) * of("reinforce", x),
        ),
        "m2po, large budget": (lambda x: of("m2po", x, budget=1e6), lambda x: of("importance_sampling", x)),
        "m2po, no budget": (
            lambda x: of("m2po", x, budget=1e-12, min_epsilon_low=0.2, min_epsilon_high=0.3),
            clip_loss,
        ),
    }

    def with_gradient(function, aggregation_fn, x):
        return jax.value_and_grad(lambda x: aggregation_fn(function(x), mask).mean())(x)

    @jax.jit
    def run(x):
        found = {key: [with_gradient(side, sequence_mean, x) for side in sides] for key, sides in two_sides.items()}
        luspo, gspo = lambda x: of("luspo", x, **wide), lambda x: of("gspo", x, **wide)
        found["luspo"] = with_gradient(luspo, sequence_mean, x), with_gradient(gspo, sequence_sum, x)
        return found

    return jax.tree.map(np.asarray, run(learner))


def same(a, b):
    return np.allclose(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "identity, value_too",
    [
        ("gspo, token", True),
        ("luspo", True),
        ("cap", True),
        ("large epsilon", True),
        ("cispo without a cap", False),
        ("proximal = behavior", True),
        ("proximal = learner", False),
        ("m2po, large budget", True),
        ("m2po, no budget", True),
    ],
)
def test_one_loss_is_another(identity, value_too):
    (value, gradient), (other_value, other_gradient) = pairs()[identity]
    assert same(gradient, other_gradient) and np.abs(gradient).max() > 1e-3
    assert same(value, other_value) == value_too


@pytest.mark.parametrize("difference", ["gspo, token, advantages of tokens", "cap that matters"])
def test_one_loss_is_not_another(difference):
    (_, gradient), (_, other) = pairs()[difference]
    assert not np.allclose(gradient, other, rtol=1e-3, atol=1e-5)


# -- the exact oracle ----------------------------------------------------------------------------------------------------------

GROUP_SIZE = 3
MASK = np.array([[1, 0], [1, 1], [1, 1]], bool)  # three completions of one or two tokens carry all the probability
REWARDS = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
ADVANTAGES = REWARDS - REWARDS.mean(-1, keepdims=True) + 0.1


def enumerated(logits):
    """log π of the tokens of every completion, [B, Y, L], from logits[B, 2, 2]: end, (go on, left), (go on, right)."""
    logprobs = jax.nn.log_softmax(logits)
    first, second = logprobs[:, 0], logprobs[:, 1]
    rows = [[first[:, 0], jnp.zeros(len(first))], [first[:, 1], second[:, 0]], [first[:, 1], second[:, 1]]]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


@functools.cache
def three_policies():
    return [np.asarray(jax.jit(enumerated)(logits)) for logits in np.random.default_rng(4).normal(size=(3, 2, 2, 2))]


@functools.cache
def both_ways():
    """{loss: [(value, gradient in the learner) by the closed form, by brute force]}, the denominator a third policy."""

    @jax.jit
    def run(learner, behavior, proximal):
        def of(objective, name):
            options = dict(group_size=GROUP_SIZE, loss_fn=loss(name), advantage_fn=leave_one_out, proximal_logprobs=proximal)
            return jax.value_and_grad(lambda x: objective(x, behavior, REWARDS, MASK, **options))(learner)

        return {name: [of(way, name) for way in (surrogate_objective, brute_force_objective)] for name in SEPARABLE}

    return run(*three_policies())


@pytest.mark.parametrize("name", SEPARABLE)
def test_closed_form_is_the_sum_over_all_groups(name):
    (value, gradient), (brute_value, brute_gradient) = both_ways()[name]
    scale = np.abs(brute_gradient).max()
    assert scale > 1e-3
    np.testing.assert_allclose(value, brute_value, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, brute_gradient, rtol=0, atol=1e-12 * scale)


def test_oracle_refuses_m2po_and_brute_force_takes_it():
    learner, behavior, _ = three_policies()
    chosen = functools.partial(losses.m2po, min_epsilon_low=1e-3, min_epsilon_high=1e-3)
    options = dict(group_size=GROUP_SIZE, loss_fn=chosen, advantage_fn=leave_one_out)
    with pytest.raises(ValueError, match="m2po couples rows"):
        surrogate_objective(learner, behavior, REWARDS, MASK, **options)
    found = jax.jit(functools.partial(brute_force_objective, mask=MASK, **options))(learner, behavior, REWARDS)
    expected, bound = 0.0, 0
    for prompt, group in np.ndindex(2, 3**GROUP_SIZE):
        members = np.array(np.unravel_index(group, (3,) * GROUP_SIZE))
        reward, valid = REWARDS[prompt, members], MASK[members]
        advantages = np.broadcast_to((reward - (reward.sum() - reward) / (GROUP_SIZE - 1))[:, None], valid.shape)[valid]
        x, old = (p[prompt, members][valid] for p in (learner, behavior))
        values = np.zeros(valid.shape)
        values[valid] = loss_references.m2po(x, old, advantages, x, min_epsilon_low=1e-3, min_epsilon_high=1e-3)
        probability = np.exp(behavior[prompt, members].sum())
        expected -= probability * np.mean(values.sum(-1) / valid.sum(-1)) / 2
        bound += np.isfinite(loss_references.m2_radius(x, old, advantages, 0.04))
    assert bound > 10
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# -- the first-order law -------------------------------------------------------------------------------------------------------

ABOVE_ONE = functools.partial(losses.topr, ratio_high=1.5)
LOGITS, DIRECTION = np.random.default_rng(6).normal(size=(2, 2, 2, 2))


def gradients_of(loss_fns, proximal_is_learner=False):
    """(θ, φ) -> {name: ∂_θ Σ_y π_φ(y)·Σ_l ℓ_l} for logits [B, 2, 2]; what a loss asks for by name it gets."""

    def gradients(learner_logits, behavior_logits):
        fixed, behavior = enumerated(learner_logits), enumerated(behavior_logits)
        old = fixed if proximal_is_learner else behavior
        weights, mask = jnp.exp(behavior.sum(-1, keepdims=True)), np.broadcast_to(MASK, behavior.shape)

        def of(loss_fn):
            given = dict(behavior_logprobs=behavior, detached_logprobs=fixed)
            given = {name: given[name] for name in named_parameters(loss_fn) if name in given}
            return jax.grad(lambda x: jnp.sum(weights * loss_fn(enumerated(x), old, ADVANTAGES, mask, **given)))(learner_logits)

        return {name: of(loss_fn) for name, loss_fn in loss_fns.items()}

    return gradients


def test_smooth_losses_pass_the_guard_of_the_first_order_law():
    every = {name: loss(name) for name in SMOOTH} | {"topr": ABOVE_ONE}
    bias.check_first_order(gradients_of(every), LOGITS, DIRECTION)


def with_penalty(logprobs, old_logprobs, advantages, mask):
    penalty = losses.abs_kl(logprobs, old_logprobs, mask)
    return losses.importance_sampling(logprobs, old_logprobs, advantages, mask) + 0.1 * penalty


@pytest.mark.parametrize(
    "loss_fn, proximal_is_learner",
    [(loss("topr"), False), (with_penalty, False), (functools.partial(losses.decoupled_ppo, cap=1.0), True)],
    ids=["topr", "abs_kl", "decoupled_ppo capped at 1"],
)
def test_losses_with_a_kink_at_equal_policies_are_flagged(loss_fn, proximal_is_learner):
    with pytest.raises(bias.FirstOrderError, match="kink"):
        bias.check_first_order(gradients_of({"": loss_fn}, proximal_is_learner), LOGITS, DIRECTION)


# -- losses that see the batch -------------------------------------------------------------------------------------------------


@functools.cache
def bounds_of(budget):
    return jax.jit(functools.partial(losses.m2_bounds, budget=budget))


@pytest.mark.parametrize("budget", [0.04, 0.2])
def test_m2_bounds_use_up_the_budget_exactly(budget):
    binding = 0
    for seed in range(100):
        x, old, advantages, mask = batch(seed, spread=10 ** np.random.default_rng(seed).uniform(-1.5, 1.5))
        bounds = bounds_of(budget)(x, old, advantages, mask)
        a = np.broadcast_to(advantages[:, None], mask.shape)[mask]
        radius = loss_references.m2_radius(x[mask], old[mask], a, budget)
        d = (x - old)[mask]
        squares = d[d * a > 0] ** 2
        np.testing.assert_allclose(bounds.second_moment, squares.mean(), rtol=1e-12)
        if np.isinf(radius):
            assert (bounds.epsilon_low, bounds.epsilon_high) == (1, np.inf) and squares.mean() <= budget
            continue
        binding += 1
        found = np.log1p(bounds.epsilon_high)
        np.testing.assert_allclose([found, -np.log1p(-bounds.epsilon_low)], radius, rtol=1e-11)
        np.testing.assert_allclose(np.minimum(squares, found**2).mean(), budget, rtol=1e-12)
    assert 20 < binding < 100


def test_m2_bounds_at_the_budget_without_harm_and_with_ties():
    shape = batch()[0].shape
    run, ones, everything = bounds_of(0.04), np.ones(shape[:-1]), np.ones(shape, bool)

    def of(log_ratios):
        return run(np.full(shape, -1.0) + log_ratios, np.full(shape, -1.0), ones, everything)

    harmless = of(np.full(shape, -5.0))
    assert (harmless.epsilon_low, harmless.epsilon_high, harmless.second_moment) == (1, np.inf, 0)
    np.testing.assert_allclose(of(np.full(shape, 0.7)).epsilon_high, np.expm1(0.2), rtol=1e-12)  # all alike: τ² = budget
    for seed in range(100):  # the moment is the budget up to rounding: either answer is right, NaN is not
        values = np.abs(np.random.default_rng(seed).normal(size=shape))
        bounds = of(values * np.sqrt(0.04 / np.mean(values**2)))
        assert bounds.epsilon_high >= np.expm1(0.2) and 0 < bounds.epsilon_low <= 1


def test_top_entropy_mask_is_numpys_quantile():
    run = jax.jit(losses.top_entropy_mask, static_argnames="fraction")
    for fraction in (0.2, 0.37, 1.0):
        for seed in range(20):
            entropies, _, _, mask = batch(seed)
            mask = mask if seed else np.zeros_like(mask)
            found = run(np.where(mask, entropies, np.nan), mask, fraction=fraction)
            expected = mask & (entropies >= np.quantile(entropies[mask], 1 - fraction)) if seed else mask
            np.testing.assert_array_equal(found, expected)


def test_sharded_is_unsharded():
    learner, old, advantages, mask = batch(5, spread=0.5)
    arrays = (learner, old, advantages, mask)
    shards = [x.reshape(8, 2, *x.shape[1:]) for x in arrays]
    options = dict(budget=0.01, min_epsilon_low=1e-3, min_epsilon_high=1e-3)

    def run(arrays, axis_name=None):
        def total(x, old, fixed):
            def local(x, old, advantages, mask, fixed):
                return losses.m2po(x, old, advantages, mask, axis_name=axis_name, detached_logprobs=fixed, **options)

            local = jax.vmap(local, axis_name=axis_name) if axis_name else local
            values = local(x, old, *arrays[2:], fixed)
            return jnp.sum(jnp.sin(jnp.arange(values.size)).reshape(values.shape) * values), values

        def keep(entropies, mask):
            return losses.top_entropy_mask(entropies, mask, fraction=0.3, axis_name=axis_name)

        gradients, values = jax.grad(total, (0, 1, 2), has_aux=True)(*arrays[:2], arrays[0])
        return values, gradients, (jax.vmap(keep, axis_name=axis_name) if axis_name else keep)(arrays[0], arrays[3])

    whole, parts = jax.jit(run)(arrays), jax.jit(functools.partial(run, axis_name="shard"))(shards)
    own = jax.jit(jax.vmap(functools.partial(losses.m2_bounds, budget=0.01)))(*shards).epsilon_high
    assert len(set(own.tolist())) > 2 and np.abs(whole[1][2]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.reshape(b, a.shape), a, rtol=1e-12, atol=1e-14), whole, parts)


SHARD_MAP = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax_async_grpo import losses

jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
old, mask = rng.normal(-1, 0.3, (16, 5)), rng.random((16, 5)) < 0.7
learner, advantages = old + 0.5 * rng.normal(size=(16, 5)), rng.normal(size=16)


def run(learner, old, advantages, mask, axis_name=None):
    def total(x):
        values = losses.m2po(x, old, advantages, mask, budget=0.01, min_epsilon_low=1e-3, axis_name=axis_name)
        return jnp.sum(values * old), values

    gradient, values = jax.grad(total, has_aux=True)(learner)
    return values, gradient, losses.top_entropy_mask(-old, mask, fraction=0.3, axis_name=axis_name)


sharded = jax.shard_map(functools.partial(run, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
found, whole = jax.jit(sharded)(learner, old, advantages, mask), jax.jit(run)(learner, old, advantages, mask)
assert len(found[0].sharding.device_set) == 8
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, whole)
print("same")
"""


def test_eight_devices_see_one_batch():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(SHARD_MAP)]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.split() == ["same"], result.stderr[-2000:]
