"""The ceiling is what two full batches would show, with an interval that covers; the words follow γ and the cosine together."""

import numpy as np
import pytest

from jax_async_grpo import scaling


def gradients(rng, mean, noise_std: float, steps: int):
    """[steps, D] batch gradients: mean [D] and Gaussian noise."""
    return mean + noise_std * rng.normal(size=(steps, len(mean)))


def test_the_ceiling_is_the_cosine_of_two_full_batches():
    """Full batches have half the noise variance of halves: drawn directly, their cosine is the ceiling."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=2000)
    for half_noise in (0.5, 2.0, 6.0):
        halves = [gradients(rng, mean, half_noise, 200) for _ in range(4)]
        first, second, third, fourth = halves
        measured = scaling.cosine_ceiling(scaling.half_batch_cosines(first, second))
        full = scaling.half_batch_cosines((first + second) / 2, (third + fourth) / 2).mean()
        assert measured.ceiling == pytest.approx(full, abs=0.01)
        assert measured.ceiling == pytest.approx(1 / (1 + half_noise**2 / 2 / np.mean(mean**2)), abs=0.01)
        assert measured.half_cosine < measured.ceiling


def test_ceiling_is_the_formula_and_its_error_the_delta_method_s():
    cosines = np.array([0.2, 0.3, 0.4, 0.5])
    found = scaling.cosine_ceiling(cosines)
    assert found.ceiling == pytest.approx(0.7 / 1.35) and found.num_blocks == 4
    assert found.standard_error == pytest.approx(cosines.std(ddof=1) / 2 * 2 / 1.35**2)
    assert found.interval[0] < found.ceiling < found.interval[1] and found.resolved
    assert scaling.cosine_ceiling(np.ones(5)).ceiling == 1
    wide = scaling.cosine_ceiling(cosines, confidence=0.99)
    assert wide.interval[0] < found.interval[0] and not wide.resolved


def test_intervals_cover_at_their_rate():
    rng = np.random.default_rng(1)
    mean = rng.normal(size=300)
    half_noise = 2.0
    true = 1 / (1 + half_noise**2 / 2 / np.mean(mean**2))
    covered = 0
    for _ in range(200):
        cosines = scaling.half_batch_cosines(*(gradients(rng, mean, half_noise, 12) for _ in range(2)))
        low, high = scaling.cosine_ceiling(cosines, confidence=0.9).interval
        covered += low <= true <= high
    assert 0.84 <= covered / 200 <= 0.96


def test_blocks_are_needed_where_steps_are_correlated():
    rng = np.random.default_rng(2)
    covered = np.zeros(2)
    for _ in range(200):
        walk = rng.normal(size=400) * 0.05
        for i in range(1, 400):
            walk[i] += 0.8 * walk[i - 1]
        for i, block in enumerate((1, 40)):
            low, high = scaling.cosine_ceiling(np.clip(0.3 + walk, -1, 1), block_length=block).interval
            covered[i] += low <= 0.6 / 1.3 <= high
    assert covered[0] / 200 < 0.7 and 0.84 <= covered[1] / 200 <= 0.96
    assert scaling.cosine_ceiling([9e-1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], block_length=2).half_cosine == pytest.approx(0.35)


def test_noise_alone_is_not_resolved():
    rng = np.random.default_rng(3)
    cosines = scaling.half_batch_cosines(*(rng.normal(size=(50, 400)) for _ in range(2)))
    found = scaling.cosine_ceiling(cosines)
    assert abs(found.ceiling) < 0.03 and not found.resolved


def test_what_is_no_cosine_is_no_ceiling():
    """2c/(1+c) falls below −1 for c < −1/3."""
    for cosines in ([-0.5] * 5, [-1.0] * 5, [-0.2, -0.6, -0.5]):
        found = scaling.cosine_ceiling(cosines)
        assert np.isnan([found.ceiling, *found.interval, found.standard_error]).all() and not found.resolved
    found = scaling.cosine_ceiling([-0.32, -0.33, 0.2, -0.6])
    assert -1 <= found.interval[0] < found.ceiling < found.interval[1] <= 1


def test_cosines_do_not_depend_on_the_scale():
    first, second = np.random.default_rng(5).normal(size=(2, 4, 6))
    expected = scaling.half_batch_cosines(first, second)
    for scale in (1e-300, 1e300):
        np.testing.assert_allclose(scaling.half_batch_cosines(scale * first, second / scale), expected, rtol=1e-12)


@pytest.mark.parametrize("direction, word", [(1.0, "ballistic"), (0.0, "diffusive"), (0.3, "undetermined")])
def test_simulated_drift(direction, word):
    """Straight, random and mixed paths through the whole chain: gradients, ceiling, MSD, γ, word."""
    rng = np.random.default_rng(4)
    mean = direction * np.ones(200)
    halves = [gradients(rng, mean, 0.6 if direction else 2.0, 3000) for _ in range(2)]
    full = (halves[0] + halves[1]) / 2
    path = np.cumsum(full, axis=0)
    lags = np.arange(1, 9)
    msd = [np.mean(np.sum((path[s:] - path[:-s]) ** 2, axis=1)) for s in lags]
    gamma = scaling.msd_exponent(lags, msd, num_bootstrap=200).intervals[0]
    cosine = scaling.half_batch_cosines(full[1:], full[:-1]).mean()
    assert np.log2(msd[1] / msd[0]) == pytest.approx(1 + np.log2(1 + cosine), abs=0.02)  # the identity of the docstring
    ceiling = scaling.cosine_ceiling(scaling.half_batch_cosines(*halves), block_length=10)
    assert scaling.drift_character(gamma, cosine, ceiling).word == word


CEILING = scaling.cosine_ceiling([0.4, 0.41, 0.39, 0.4])
NOISE = scaling.cosine_ceiling([0.1, -0.1, 0.05, -0.05])


@pytest.mark.parametrize(
    "gamma, cosine, ceiling, options, word, reason",
    [
        ((1.8, 2.0), 0.5, CEILING, {}, "ballistic", "gamma in"),
        ((1.8, 2.0), 0.2, CEILING, {}, "undetermined", "gradients that turn"),
        ((1.8, 2.0), 0.2, CEILING, {"aligned_share": 0.3}, "ballistic", "gamma in"),
        ((1.8, 2.0), 0.5, NOISE, {}, "undetermined", "not above its noise"),
        ((1.6, 2.0), 0.5, CEILING, {}, "undetermined", "between the thresholds or too uncertain"),
        ((1.6, 2.0), 0.5, CEILING, {"ballistic_gamma": 1.5}, "ballistic", "gamma in"),
        ((0.9, 1.2), 0.1, CEILING, {}, "diffusive", "gamma in"),
        ((0.9, 1.2), 0.1, NOISE, {}, "diffusive", "gamma in"),
        ((0.9, 1.2), -0.4, CEILING, {}, "undetermined", "agree or alternate"),
        ((0.9, 1.2), -0.4, CEILING, {"small_cosine": 0.5}, "diffusive", "gamma in"),
        ((0.9, 1.4), 0.1, CEILING, {}, "undetermined", "too uncertain"),
        ((0.9, 1.4), 0.1, CEILING, {"diffusive_gamma": 1.4}, "diffusive", "gamma in"),
    ],
)
def test_words(gamma, cosine, ceiling, options, word, reason):
    found = scaling.drift_character(gamma, cosine, ceiling, **options)
    assert found.word == word and reason in found.reason
    assert (found.aligned_share is None) == (not ceiling.resolved)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scaling.cosine_ceiling([]), r"has 0 step\(s\), 0 block\(s\) of 1; at least 3"),
        (lambda: scaling.cosine_ceiling([0.1] * 8, block_length=4), r"2 block\(s\) of 4"),
        (lambda: scaling.cosine_ceiling([0.1, np.nan, 0.2]), r"half_cosines\[1\]=nan must lie in \[-1, 1\]"),
        (lambda: scaling.cosine_ceiling([[0.1]]), r"it must be \[M\]"),
        (lambda: scaling.cosine_ceiling([0.1] * 3, confidence=1), "confidence=1"),
        (lambda: scaling.half_batch_cosines(np.ones((2, 3)), np.zeros((2, 3))), r"second_half\[0\] has norm 0"),
        (lambda: scaling.half_batch_cosines(np.full((2, 3), np.nan), np.ones((2, 3))), r"first_half\[0\] has norm nan"),
        (lambda: scaling.half_batch_cosines(np.ones((2, 3)), np.ones((3, 3))), r"must both have shape \[M, D\]"),
        (lambda: scaling.drift_character((2, 1), 0.1, CEILING), "low <= high"),
        (lambda: scaling.drift_character((np.nan, 1), 0.1, CEILING), "gamma_interval"),
        (lambda: scaling.drift_character((1, 2), np.nan, CEILING), "cosine=nan"),
        (lambda: scaling.drift_character((1, 2), 0.1, CEILING, diffusive_gamma=1.9), "must be at most ballistic_gamma"),
        (lambda: scaling.drift_character((1, 2), 0.1, CEILING, aligned_share=0), "aligned_share=0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
