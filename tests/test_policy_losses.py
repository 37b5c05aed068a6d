"""Every policy loss and KL term against tests/loss_references.py: value, gradients, their derivatives; and what they refuse.

One compilation per loss and shape serves the 200 cases of each kind.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import loss_references
import numpy as np
import pytest

from jax_async_grpo import losses

NUM_CASES = 200
BEHAVIOR = "the log-probs of a third policy"
KL_TERMS = ("k1", "k2", "k3", "abs_kl", "straight_through_kl", "ratio_weighted_k3")
# by loss: the options with one advantage a completion, [4, 5] tokens, and those with one a token, [1, 3] tokens
OPTIONS = {
    "ppo_clip": ({}, dict(epsilon_low=1.0, epsilon_high=0.28, dual_clip=1.5)),
    "importance_sampling": ({}, {}),
    "reinforce": ({}, {}),
    "decoupled_ppo": (
        dict(behavior_logprobs=BEHAVIOR),
        dict(behavior_logprobs=BEHAVIOR, cap=1.1, epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.4),
    ),
    "sapo": ({}, dict(temperature_positive=0.7, temperature_negative=2.0)),
    "dro": (dict(beta=0.3), dict(beta=2.0)),
    "clipped_tokens": ({}, dict(epsilon_low=0.05, epsilon_high=0.5)),
    "gspo": ({}, dict(epsilon_low=0.05, epsilon_high=0.1)),
    "gspo_token": ({}, dict(epsilon_low=0.05, epsilon_high=0.1)),
    "luspo": ({}, dict(epsilon_low=0.05, epsilon_high=0.1)),
    "gmpo": ({}, dict(log_epsilon_low=0.05, log_epsilon_high=0.1)),
    "cispo": (dict(ratio_high=1.3), dict(ratio_high=1.5, ratio_low=0.8)),
    "rollout_is": (
        dict(behavior_logprobs=BEHAVIOR, epsilon_low=0.3, epsilon_high=0.6),
        dict(behavior_logprobs=BEHAVIOR, epsilon_low=1.0, epsilon_high=0.2),
    ),
    "topr": ({}, dict(ratio_high=1.3)),
    "vespo": (
        {},
        dict(behavior_logprobs=BEHAVIOR, k_positive=1.5, lambda_positive=2.5, k_negative=0.5, lambda_negative=1.1),
    ),
    "dppo_tv": (
        dict(threshold_low=0.05, threshold_high=0.1),
        dict(threshold_low=0.1, threshold_high=0.02, ratio_cap=1.2),
    ),
    "dppo_kl": (
        dict(threshold_low=0.01, threshold_high=0.03),
        dict(threshold_low=0.03, threshold_high=0.003, ratio_cap=1.2),
    ),
    "prime": ({}, dict(threshold_low=0.02, threshold_high=0.05, kl_coefficient=0.2)),
    "ipo": ({}, dict(threshold=0.03, kl_coefficient=0.0)),
    "m2po": ({}, dict(budget=0.01, min_epsilon_low=0.01, min_epsilon_high=0.02)),
    "k1": ({}, {}),
    "k2": ({}, {}),
    "k3": ({}, {}),
    "abs_kl": ({}, {}),
    "straight_through_kl": ({}, dict(value_fn=losses.k1, gradient_fn=losses.k3)),
    "ratio_weighted_k3": (dict(old_logprobs=BEHAVIOR), dict(old_logprobs=BEHAVIOR)),
}
REFERENCE_OPTIONS = {("straight_through_kl", 1): dict(value="k1", gradient="k3")}
SHAPES = ((4, 5), (1, 3))
WHOLE_BATCH = ("m2po",)
EVERY_VARIANT = [pytest.param(name, variant, id=f"{name}-{variant}") for name in OPTIONS for variant in (0, 1)]


# -- cases ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def cases(variant, extreme):
    """200 seeded cases: log-probs of three policies, advantages, masks, cotangents, directions; 0 outside the masks."""
    shape = (NUM_CASES, *SHAPES[variant])
    rng = np.random.default_rng([variant, extreme])
    spread = 10 ** rng.uniform(-2.5, 0, (NUM_CASES, 1, 1))
    old = -np.abs(rng.normal(1.0, 0.8, shape)) - 0.01
    learner, behavior = (np.minimum(old + spread * rng.normal(size=shape), -1e-3) for _ in range(2))
    if extreme:  # one of two policies at e^-50 of the other
        up, down = rng.random(shape) < 0.1, rng.random(shape) < 0.1
        old = np.where(up, learner - 50, old)
        learner = np.where(down & ~up, old - 50, learner)
        behavior = np.where(rng.random(shape) < 0.05, behavior - 50, behavior)
    advantages = rng.normal(size=shape if variant else shape[:-1])
    advantages[rng.random(advantages.shape) < 0.15] = 0
    lengths = rng.integers(0, shape[-1] + 1, (*shape[:-1], 1))
    mask = np.where(rng.random((NUM_CASES, 1, 1)) < 0.5, np.arange(shape[-1]) < lengths, rng.random(shape) < 0.6)
    assert (mask.sum(-1) == 0).any() and (mask.sum(-1) == shape[-1]).any()
    weights, *directions = rng.normal(size=(4, *shape))
    tokens = (np.where(mask, x, 0.0) for x in (learner, old, behavior))
    return *tokens, advantages, mask, weights, np.stack(directions, axis=1)


def spoiled(variant, extreme):
    """The same cases with NaN, inf and huge numbers wherever no valid token looks."""
    learner, old, behavior, advantages, mask, *rest = cases(variant, extreme)
    garbage = np.random.default_rng(7).choice([np.nan, np.inf, -np.inf, 1e300], (4, *mask.shape))
    tokens = (np.where(mask, x, g) for x, g in zip((learner, old, behavior), garbage, strict=False))
    unused = ~mask if variant else ~mask.any(-1)
    return *tokens, np.where(unused, garbage[3] if variant else np.nan, advantages), mask, *rest


# -- the package's side --------------------------------------------------------------------------------------------------------


def detaches(name):
    return "detached_logprobs" in inspect.signature(getattr(losses, name)).parameters


def call(name, options, learner, old, advantages, mask, behavior, detached=None):
    """The loss with the third policy where its options say so, and the detached log-probs if given and known to it."""
    options = {key: behavior if value is BEHAVIOR else value for key, value in options.items()}
    if detached is not None and detaches(name):
        options["detached_logprobs"] = detached
    return getattr(losses, name)(learner, old, *(() if name in KL_TERMS else (advantages,)), mask, **options)


@functools.cache
def compiled(name, variant):
    """Value, gradients in all log-probs, the update's gradient, and the gradient's derivatives along directions."""
    apply = functools.partial(call, name, OPTIONS[name][variant])

    def of_case(learner, old, behavior, advantages, mask, weights, directions):
        def total(learner, old, behavior, detached=None):
            values = apply(learner, old, advantages, mask, behavior, detached)
            return jnp.sum(weights * values), values

        def gradient(*policies):  # in the learner, which also stands where it is detached
            return jax.grad(total, has_aux=True)(*policies, policies[0])[0]

        def derivative(*tangents):
            return jax.jvp(gradient, (learner, old, behavior), tangents)[1]

        one_at_a_time = jnp.eye(3)[:, :, None, None] * directions  # [which, policy, ...]
        gradients, value = jax.grad(total, (0, 1, 2, 3), has_aux=True)(learner, old, behavior, learner)
        found = dict(value=value, gradients=gradients, derivatives=jax.vmap(derivative)(*jnp.moveaxis(one_at_a_time, 1, 0)))
        if detaches(name):
            found["gradient"], found["update_value"] = jax.grad(total, has_aux=True)(learner, old, behavior)
        return found

    return jax.jit(jax.vmap(of_case))


@functools.cache
def measured(name, variant, extreme):
    inputs = cases(variant, extreme)
    mask = inputs[4].astype(float) if variant else inputs[4]
    return jax.tree.map(np.asarray, compiled(name, variant)(*inputs[:4], mask, *inputs[5:]))


# -- the reference's side ------------------------------------------------------------------------------------------------------


def units(name, variant, extreme):
    """(index of the valid tokens of a completion, or of a batch, in the cases' arrays; their numbers)"""
    *tokens, advantages, mask, weights, directions = cases(variant, extreme)
    advantages = advantages if variant else np.broadcast_to(advantages[..., None], mask.shape)
    last = 2 if name in WHOLE_BATCH else 1
    for outer in np.ndindex(mask.shape[:-last]):
        index = tuple(np.full(mask[outer].sum(), i) for i in outer) + np.nonzero(mask[outer])
        if len(index[-1]):
            along = [directions[index[0], k, *index[1:]] for k in range(3)]
            yield index, [x[index] for x in tokens], advantages[index], weights[index], along


def reference_options(name, variant, behavior):
    options = REFERENCE_OPTIONS.get((name, variant), OPTIONS[name][variant])
    return {key: behavior if value is BEHAVIOR else value for key, value in options.items()}


@pytest.mark.parametrize("name, variant", EVERY_VARIANT)
def test_value_and_gradient_are_those_of_the_formula(name, variant):
    reference = getattr(loss_references, name)
    value, gradient = np.zeros((2, NUM_CASES, *SHAPES[variant]))
    for index, (learner, old, behavior), a, weights, _ in units(name, variant, True):
        options = reference_options(name, variant, behavior)
        value[index] = np.broadcast_to(reference(learner, old, a, learner, **options), a.shape)
        gradient[index] = loss_references.gradient(reference, learner, old, a, learner, weights, **options)
    found = measured(name, variant, True)
    mask = cases(variant, True)[4]
    assert (value[mask] != 0).mean() > 0.05 and (gradient[mask] != 0).any() == (name != "clipped_tokens")
    # terms as large as the value may cancel in the gradient, which then has their rounding
    rounding = 1e-13 + 1e-10 * np.abs(gradient) + 1e-14 * np.abs(value * cases(variant, True)[5])
    np.testing.assert_allclose(found["value"], value, rtol=1e-11, atol=1e-14)
    np.testing.assert_array_less(np.abs(found["gradients"][0] - gradient), rounding)
    if detaches(name):  # what an update takes, without detached_logprobs
        np.testing.assert_allclose(found["update_value"], value, rtol=1e-11, atol=1e-14)
        np.testing.assert_array_less(np.abs(found["gradient"] - gradient), rounding)
    for outside in (found["value"][~mask], *(x[~mask] for x in found["gradients"])):
        assert not outside.any()


@pytest.mark.parametrize("name, variant", EVERY_VARIANT)
def test_gradient_differentiates_in_the_learner_and_in_the_other_policies(name, variant):
    # g(θ) = ∂_0 ℓ(θ, .., sg(θ)): its derivative in θ goes through both places where θ stands
    reference, step = getattr(loss_references, name), 1e-7
    expected = np.zeros((3, NUM_CASES, *SHAPES[variant]))
    for index, policies, a, weights, directions in units(name, variant, False):
        for which, direction in enumerate(directions):
            sides = []
            for sign in (1, -1):
                learner, old, behavior = (x + sign * step * direction * (k == which) for k, x in enumerate(policies))
                options = reference_options(name, variant, behavior)
                sides.append(loss_references.gradient(reference, learner, old, a, learner, weights, **options))
            expected[(which, *index)] = (sides[0] - sides[1]) / (2 * step)
    found = np.moveaxis(measured(name, variant, False)["derivatives"], 1, 0)
    uses = BEHAVIOR in OPTIONS[name][variant].values()
    assert uses == (expected[2] != 0).any() == (found[2] != 0).any()
    scale = np.abs(expected).max(axis=(-1, -2), keepdims=True)
    np.testing.assert_allclose(found / (1 + scale), expected / (1 + scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, variant", EVERY_VARIANT)
def test_what_stands_under_the_mask_touches_no_value_gradient_or_derivative(name, variant):
    dirty = compiled(name, variant)(*(x.astype(float) if x.dtype == bool and variant else x for x in spoiled(variant, True)))
    jax.tree.map(np.testing.assert_array_equal, dirty, measured(name, variant, True))


# -- shapes, precision ---------------------------------------------------------------------------------------------------------

POINTWISE = [name for name in OPTIONS if name not in (*WHOLE_BATCH, *KL_TERMS)]


def test_any_leading_axes_give_the_same_numbers():
    # alone [5] with a scalar advantage, [2, 50, 2, 4, 5], and [200, 4, 5] at once
    learner, old, behavior, advantages, mask, *_ = cases(0, False)

    @jax.jit
    def run(name_arrays):
        def of(name, *arrays):
            return call(name, OPTIONS[name][0], *arrays)

        shaped = [x.reshape(2, 50, 2, *x.shape[1:]) for x in name_arrays]
        alone = {name: jax.vmap(jax.vmap(functools.partial(of, name)))(*name_arrays) for name in POINTWISE}
        many = {name: of(name, *shaped) for name in POINTWISE + list(KL_TERMS)}
        return alone, many

    alone, many = run((learner, old, advantages, mask, behavior))
    for name in POINTWISE:
        np.testing.assert_allclose(alone[name], measured(name, 0, False)["value"], rtol=1e-13, atol=1e-15, err_msg=name)
    for name, values in many.items():
        assert values.shape == (2, 50, 2, 4, 5)
        np.testing.assert_allclose(
            np.reshape(values, mask.shape), measured(name, 0, False)["value"], rtol=1e-13, atol=1e-15, err_msg=name
        )


def test_low_precision_without_a_mask_is_computed_in_float32_over_every_token():
    learner, old, behavior, advantages, mask, *rest = cases(0, False)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (learner, old, behavior, advantages)]
    exact = [np.asarray(x, np.float64) for x in low]

    @jax.jit
    @jax.vmap
    def run(learner, old, behavior, advantages):
        found = {name: call(name, OPTIONS[name][0], learner, old, advantages, None, behavior) for name in OPTIONS}
        return found, losses.m2_bounds(learner, old, advantages, budget=0.001), losses.entropy(learner)

    found, bounds, entropies = run(*low)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, bounds, entropies))} == {np.dtype(np.float32)}
    for name, values in found.items():  # in bfloat16 the differences would be 1e-2; the programs are compiled already
        double = compiled(name, 0)(*exact, np.ones_like(mask), *rest)["value"]
        np.testing.assert_allclose(values, double, rtol=2e-5, atol=2e-6, err_msg=name)
    p = np.exp(exact[0]) / np.exp(exact[0]).sum(-1, keepdims=True)
    np.testing.assert_allclose(entropies, -(p * np.log(p)).sum(-1), rtol=1e-5)


# -- what is refused -----------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "clip": [("epsilon_low", x) for x in (0.0, -0.1, 1.5, np.nan)] + [("epsilon_high", x) for x in (0.0, -0.1, np.nan)],
    "positive": [-1.0, 0.0, np.nan, np.inf],
}
BOUNDS = {
    **{name: OUT_OF_RANGE["clip"] for name in ("clipped_tokens", "gspo", "gspo_token", "luspo", "rollout_is")},
    "ppo_clip": [*OUT_OF_RANGE["clip"], ("dual_clip", 1.1), ("dual_clip", np.nan)],
    "decoupled_ppo": [*OUT_OF_RANGE["clip"], ("dual_clip", 1.1), ("cap", 0.0), ("cap", -1.0), ("cap", np.nan)],
    "cispo": [("ratio_high", 1.0), ("ratio_high", np.nan), *(("ratio_low", x) for x in (-0.1, 1.0, np.nan))],
    "m2po": [("min_epsilon_low", 1.5)],
    "dppo_tv": [("ratio_cap", 1.0), ("ratio_cap", np.nan)],
    "dppo_kl": [("ratio_cap", 1.0), ("ratio_cap", np.nan)],
    "prime": [("kl_coefficient", x) for x in (-1e-3, np.nan, np.inf)],
    "ipo": [("kl_coefficient", x) for x in (-1e-3, np.nan, np.inf)],
    "top_entropy_mask": [("fraction", x) for x in (0.0, -0.1, 1.1, np.nan)],
}
POSITIVE = {
    "sapo": ("temperature_positive", "temperature_negative"),
    "dro": ("beta",),
    "gmpo": ("log_epsilon_low", "log_epsilon_high"),
    "topr": ("ratio_high",),
    "vespo": ("k_positive", "lambda_positive", "k_negative", "lambda_negative"),
    "dppo_tv": ("threshold_low", "threshold_high"),
    "dppo_kl": ("threshold_low", "threshold_high"),
    "prime": ("threshold_low", "threshold_high"),
    "ipo": ("threshold",),
    "m2po": ("budget", "min_epsilon_low", "min_epsilon_high"),
    "m2_bounds": ("budget",),
}
REFUSED = [(name, *pair) for name, pairs in BOUNDS.items() for pair in pairs]
REFUSED += [(name, option, x) for name, options in POSITIVE.items() for option in options for x in OUT_OF_RANGE["positive"]]
COUPLED = {"m2_bounds": dict(budget=0.1), "top_entropy_mask": dict(fraction=0.5)}


def arguments(name):
    """Keyword arguments that are accepted, concrete and small, by the names of the signature."""
    arrays = {key: np.full((2, 3), -1.0) for key in ("logprobs", "old_logprobs", "behavior_logprobs", "reference_logprobs")}
    arrays |= dict(proximal_logprobs=arrays["logprobs"], entropies=arrays["logprobs"], detached_logprobs=arrays["logprobs"])
    arrays |= dict(advantages=np.ones(2), mask=np.ones((2, 3), bool))
    chosen = {key: arrays[key] for key in inspect.signature(getattr(losses, name)).parameters if key in arrays}
    options = OPTIONS.get(name, [COUPLED.get(name)])[0]
    return chosen | {key: value for key, value in options.items() if value is not BEHAVIOR}


@pytest.mark.parametrize("name, option, value", REFUSED)
def test_bounds_out_of_range_are_refused_by_name(name, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        getattr(losses, name)(**arguments(name) | {option: value})


def test_the_table_of_refusals_is_complete():
    numbers = {
        (name, key)
        for name in (*OPTIONS, *COUPLED)
        for key, parameter in inspect.signature(getattr(losses, name)).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and not key.endswith(("_logprobs", "_fn", "_name"))
    }
    assert numbers == {(name, option) for name, option, _ in REFUSED}
    assert {*OPTIONS, *COUPLED, "M2Bounds", "entropy"} == set(losses.__all__)


ARRAYS = [
    (name, key) for name in (*OPTIONS, *COUPLED) for key in arguments(name) if isinstance(arguments(name)[key], np.ndarray)
]


@pytest.mark.parametrize("name, array", ARRAYS)
def test_arrays_that_miss_or_do_not_fit_are_refused_by_name(name, array):
    accepted = arguments(name)
    optional = array in ("mask", "detached_logprobs") or (name, array) == ("vespo", "behavior_logprobs")
    if not optional:
        with pytest.raises(ValueError, match=f"^{array} is None"):
            getattr(losses, name)(**accepted | {array: None})
    first = array in ("logprobs", "entropies")  # the others are held against it
    wrong_shape = (3,) if array == "advantages" else (3, 2)
    for shape in (wrong_shape, (1, *wrong_shape)):
        wrong = np.ones(shape) if array == "mask" else np.full(shape, -1.0)
        with pytest.raises(ValueError, match="has shape" if first else f"^{array} has shape"):
            getattr(losses, name)(**accepted | {array: wrong})


@pytest.mark.parametrize("name", [*OPTIONS, *COUPLED])
def test_masks_that_are_not_boolean_and_scalars_are_refused(name):
    accepted = arguments(name)
    for mask in (np.full((2, 3), 0.5), np.full((2, 3), np.nan), np.full((2, 3), 2)):
        with pytest.raises(ValueError, match="mask must be bool"):
            getattr(losses, name)(**accepted | {"mask": mask})
    first = next(iter(accepted))
    with pytest.raises(ValueError, match=f"{first} is a scalar"):
        getattr(losses, name)(**accepted | {key: np.float64(-1.0) for key, x in accepted.items() if np.ndim(x)})


def test_messages_say_it_in_one_line():
    for name, option, value in REFUSED:
        with pytest.raises(ValueError) as error:
            getattr(losses, name)(**arguments(name) | {option: value})
        assert "\n" not in str(error.value) and "must be" in str(error.value), (name, option)
    with pytest.raises(ValueError, match="logits is a scalar"):
        losses.entropy(1.0)
