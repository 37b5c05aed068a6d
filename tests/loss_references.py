"""The losses in NumPy, float64, written from the formulas of their papers and sharing no code with the package.

Every function takes the *valid* tokens of one completion, `(x, old, a, fixed, **options) -> [..., n]`: x[..., n] the learner's
log-probs, real or complex, old[n] the denominator's (of a KL term: the reference's), a[n] the advantages, fixed[n] the
learner's log-probs inside sg. `m2po` takes the valid tokens of a batch. Rows without tokens never get here, and there is no
mask: what a mask leaves out is not there. `gradient` differentiates in x by the complex step, everything else held fixed.
"""

from __future__ import annotations

import math

import numpy as np

STEP = 1e-30


def gradient(function, x, old, a, fixed, weights, **options):
    """d/dx Σ weights·ℓ, [n]: token j has its imaginary step in row j."""
    values = function(x + 1j * STEP * np.eye(len(x)), old, a, fixed, **options)
    return np.imag(values * np.ones((len(x), 1))) @ weights / STEP


def smaller(a, b):
    return np.where(np.real(a) < np.real(b), a, b)


def larger(a, b):
    return np.where(np.real(a) > np.real(b), a, b)


def between(values, low, high):
    return smaller(larger(values, low), high)


def pessimistic(ratio, a, low, high):
    return larger(-a * ratio, -a * between(ratio, low, high))


# -- ratios --------------------------------------------------------------------------------------------------------------------


def ppo_clip(x, old, a, fixed, *, epsilon_low=0.2, epsilon_high=0.2, dual_clip=None):
    loss = pessimistic(np.exp(x - old), a, 1 - epsilon_low, 1 + epsilon_high)
    return loss if dual_clip is None else np.where(a < 0, smaller(loss, -dual_clip * a), loss)


def importance_sampling(x, old, a, fixed):
    return -a * np.exp(x - old)


def reinforce(x, old, a, fixed):
    return -a * x


def decoupled_ppo(x, old, a, fixed, *, behavior_logprobs, cap=np.inf, **clip):
    return np.minimum(np.exp(old - behavior_logprobs), cap) * ppo_clip(x, old, a, fixed, **clip)


def sapo(x, old, a, fixed, *, temperature_positive=1.0, temperature_negative=1.05):
    temperature = np.where(a > 0, temperature_positive, temperature_negative)
    return -4 * a / (temperature * (1 + np.exp(-temperature * (np.exp(x - old) - 1))))


def dro(x, old, a, fixed, *, beta):
    return beta / 2 * (x - old) ** 2 - a * x


def clipped_tokens(x, old, a, fixed, *, epsilon_low=0.2, epsilon_high=0.2):
    ratio = np.exp(np.real(x) - old)
    return 1.0 * np.where(a > 0, ratio > 1 + epsilon_high, (ratio < 1 - epsilon_low) & (a < 0))


# -- one ratio a completion ----------------------------------------------------------------------------------------------------


def gspo(x, old, a, fixed, *, epsilon_low=3e-4, epsilon_high=4e-4):
    ratio = np.exp(np.mean(x - old, axis=-1, keepdims=True))
    return pessimistic(ratio, a, 1 - epsilon_low, 1 + epsilon_high)


def gspo_token(x, old, a, fixed, *, epsilon_low=3e-4, epsilon_high=4e-4):
    ratio = np.exp(x - fixed) * np.exp(np.mean(fixed - old))
    return pessimistic(ratio, a, 1 - epsilon_low, 1 + epsilon_high)


def luspo(x, old, a, fixed, **clip):
    return len(old) * gspo(x, old, a, fixed, **clip)


def gmpo(x, old, a, fixed, *, log_epsilon_low=0.4, log_epsilon_high=0.4):
    sign, d = np.sign(a), x - old
    bounded = sign * smaller(sign * d, sign * between(d, -log_epsilon_low, log_epsilon_high))
    return -a * np.exp(np.mean(bounded, axis=-1, keepdims=True))


# -- detached weights ----------------------------------------------------------------------------------------------------------


def cispo(x, old, a, fixed, *, ratio_high, ratio_low=-np.inf):
    return -np.clip(np.exp(fixed - old), ratio_low, ratio_high) * a * x


def rollout_is(x, old, a, fixed, *, behavior_logprobs, epsilon_low, epsilon_high):
    ratio = np.exp(fixed - behavior_logprobs)
    inside = (1 - epsilon_low < ratio) & (ratio < 1 + epsilon_high)
    return -ratio * inside * a * x


def topr(x, old, a, fixed, *, ratio_high=1.0):
    weight = np.where(a >= 0, 1.0, min(np.prod(np.exp(fixed - old)), ratio_high))
    return -weight * a * x


def vespo(x, old, a, fixed, *, behavior_logprobs=None, k_positive=2, lambda_positive=3, k_negative=3, lambda_negative=2):
    log_weight = np.sum(np.clip(fixed - old, -20, 20))
    if behavior_logprobs is not None:
        log_weight += np.sum(old - behavior_logprobs)
    log_weight = np.clip(log_weight, np.log(1e-8), 20)
    k, rate = np.where(a >= 0, k_positive, k_negative), np.where(a >= 0, lambda_positive, lambda_negative)
    return -np.exp(rate + k * log_weight - rate * np.exp(log_weight)) * a * x


# -- trust regions -------------------------------------------------------------------------------------------------------------


def dppo_tv(x, old, a, fixed, *, threshold_low, threshold_high, ratio_cap=20.0):
    gained = np.exp(fixed) - np.exp(old)
    keep = np.where(a > 0, gained <= threshold_high, gained >= -threshold_low)
    return -a * np.minimum(np.exp(fixed - old), ratio_cap) * x * keep


def dppo_kl(x, old, a, fixed, *, threshold_low, threshold_high, ratio_cap=20.0):
    p, q = np.exp(fixed), np.exp(old)
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
    keep = np.where(a > 0, (divergence <= threshold_high) | (p <= q), (divergence <= threshold_low) | (p >= q))
    return -a * np.minimum(p / q, ratio_cap) * x * keep


def prime(x, old, a, fixed, *, threshold_low=0.2, threshold_high=0.2, kl_coefficient=1e-3):
    gained = np.exp(np.real(x)) - np.exp(old)
    drop = ((a > 0) & (gained > threshold_high)) | ((a <= 0) & (gained < -threshold_low))
    return -(1 - drop) * a * np.exp(x - old) + kl_coefficient * (x - old) ** 2


def ipo(x, old, a, fixed, *, threshold=0.1, kl_coefficient=1e-3):
    drop = np.abs(np.exp(np.real(x)) - np.exp(old)) > threshold
    return -(1 - drop) * a * np.exp(x - old) + kl_coefficient * (x - old) ** 2


# -- the batch's second moment -------------------------------------------------------------------------------------------------


def m2_radius(x, old, a, budget):
    """The largest τ with mean min((log r)², τ²) ≤ budget over harmful tokens, by sorting; inf where it does not bind."""
    log_ratio = x - old
    squares = np.sort(log_ratio[((a > 0) & (log_ratio > 0)) | ((a < 0) & (log_ratio < 0))] ** 2)
    if not len(squares) or np.mean(squares) <= budget:
        return np.inf
    for below, largest in enumerate(squares):  # the tokens before this one stay as they are
        level = (budget * len(squares) - np.sum(squares[:below])) / (len(squares) - below)
        if level <= largest:
            return np.sqrt(level)
    raise AssertionError("the mean exceeds the budget, so some level is below the largest square")


def m2po(x, old, a, fixed, *, budget=0.04, min_epsilon_low=0.3, min_epsilon_high=0.5):
    radius = m2_radius(fixed, old, a, budget)
    low, high = max(1 - np.exp(-radius), min_epsilon_low), max(np.exp(radius) - 1, min_epsilon_high)
    return pessimistic(np.exp(x - old), a, 1 - low, 1 + high)


# -- KL terms ------------------------------------------------------------------------------------------------------------------


def k1(x, reference, a, fixed):
    return x - reference


def k2(x, reference, a, fixed):
    return (x - reference) ** 2 / 2


def k3(x, reference, a, fixed):
    d = reference - x
    # the series where e^d − d − 1 would cancel
    return np.where(np.abs(d) < 0.5, sum(d**k / math.factorial(k) for k in range(2, 13)), np.exp(d) - d - 1)


def abs_kl(x, reference, a, fixed):
    return (x - reference) * np.sign(np.real(x) - reference)


def straight_through_kl(x, reference, a, fixed, *, value="k3", gradient="k2"):
    value, gradient = globals()[value], globals()[gradient]
    return gradient(x, reference, a, fixed) - gradient(fixed, reference, a, fixed) + value(fixed, reference, a, fixed)


def ratio_weighted_k3(x, reference, a, fixed, *, old_logprobs):
    return np.exp(x - old_logprobs) * k3(x, reference, a, fixed)
