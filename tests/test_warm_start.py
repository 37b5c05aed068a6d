"""Warm start: the trajectory is the exact one, the stop is the first update that reaches the target, nothing is drawn."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_async_grpo import policies, tasks
from jax_async_grpo.warm_start import supervised

# Two prompts, the first with two best actions; no best reward is 1, so that J is not the probability of the best.
REWARDS = np.array([[0.0, 0.8, 0.8, 0.2], [0.4, 0.1, 0.0, 0.0]])


@pytest.fixture(scope="module")
def bandit():
    task = tasks.bandit(REWARDS)
    policy = policies.tabular(task.vocab_size, context_length=1)
    return policy, policy.init(jax.random.key(0)), task


def expected_reward(policy, params, task) -> float:
    @jax.jit
    def logprobs(params):
        return policies.completion_logprobs(
            policy, params, task.prompts, task.completions, task.mask, prompt_mask=task.prompt_mask, allowed=task.allowed
        )

    return float((np.exp(np.asarray(logprobs(params)).sum(axis=-1)) * task.rewards).sum(axis=-1).mean())


def trajectory(learning_rate: float, momentum: float, num_updates: int) -> list[tuple[float, np.ndarray]]:
    """(J, logits) after 0, 1, ... steps of ascent on mean_x mean_{y in best(x)} log softmax(logits[x])[y]."""
    logits, velocity, visited = np.zeros((2, 4)), np.zeros((2, 4)), []
    best = np.array([[0, 0.5, 0.5, 0], [1, 0, 0, 0]])
    for _ in range(num_updates + 1):
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        visited.append(((probabilities * REWARDS).sum(axis=1).mean(), logits.copy()))
        velocity = momentum * velocity + (best - probabilities) / 2
        logits += learning_rate * velocity
    return visited


@pytest.mark.parametrize(("target", "learning_rate", "momentum"), [(0.45, 0.3, 0.0), (0.55, 0.3, 0.0), (0.45, 0.05, 0.9)])
def test_stops_at_the_first_update_that_reaches_the_target(bandit, target, learning_rate, momentum):
    policy, params, task = bandit
    visited = trajectory(learning_rate, momentum, 300)
    updates = next(n for n, (reward, _) in enumerate(visited) if reward >= target)
    options = {"target_reward": target, "learning_rate": learning_rate, "optimizer": partial(optax.sgd, momentum=momentum)}
    result = supervised(policy, params, task, max_updates=updates, **options)
    assert result.updates == updates > 1
    assert result.reward == pytest.approx(visited[updates][0], abs=1e-12)
    # The context of prompt b, token 4 + b, has code 5 + b.
    np.testing.assert_allclose(result.params["table"][5:7, :4], visited[updates][1], atol=1e-12)
    with pytest.raises(ValueError, match=rf"target_reward={target} is not reached in max_updates={updates - 1}"):
        supervised(policy, params, task, max_updates=updates - 1, **options)


def test_nothing_to_do(bandit):
    policy, params, task = bandit
    start = expected_reward(policy, params, task)
    result = supervised(policy, params, task, target_reward=start - 0.01)
    assert (result.updates, result.reward) == (0, pytest.approx(start, abs=1e-15))
    np.testing.assert_array_equal(result.params["table"], params["table"])


def test_padding_is_not_seen():
    """Completions of unequal lengths after prompts with and without padding: the same table, the exact reward."""
    allowed = np.ones((2, 3), bool)
    completions, mask = tasks.enumerate_completions(allowed, end_token=2)
    rewards = np.zeros((2, 7))
    rewards[0, 0] = rewards[1, 3] = 1
    arrays = {"completions": completions, "mask": mask, "allowed": allowed, "rewards": rewards, "end_token": 2}
    plain = tasks.make_task("plain", prompts=[[0], [1]], **arrays)
    padded = tasks.make_task("padded", prompts=[[1, 0], [2, 1]], prompt_mask=[[False, True]] * 2, **arrays)
    policy = policies.tabular(vocab_size=3, context_length=2)
    params = policy.init(jax.random.key(0))
    result, same = (supervised(policy, params, task, learning_rate=0.1) for task in (plain, padded))
    assert result.reward == pytest.approx(expected_reward(policy, result.params, plain), abs=1e-12)
    assert (result.updates, result.reward) == (same.updates, pytest.approx(same.reward, abs=1e-14))
    np.testing.assert_allclose(result.params["table"], same.params["table"], atol=1e-12)


def test_reward_grows_with_the_target():
    """With Adam, the default, on a policy whose parameters all prompts share."""
    task = tasks.digit_sum(num_prompts=4, num_digits=2, base=3, partial_credit=True)
    policy = policies.linear(task.vocab_size, context_length=6)
    params = policy.init(jax.random.key(0))
    results = [supervised(policy, params, task, target_reward=t, learning_rate=0.03) for t in (0.4, 0.6)]
    rewards, updates = [r.reward for r in results], [r.updates for r in results]
    assert 0 < updates[0] < updates[1]
    assert 0.4 <= rewards[0] < 0.45 and 0.6 <= rewards[1] < 0.65
    again = supervised(policy, params, task, target_reward=0.4, learning_rate=0.03, optimizer=optax.adam)
    np.testing.assert_array_equal(again.params["table"], results[0].params["table"])


def test_decoder_lands_in_the_window():
    task = tasks.digit_sum(num_prompts=4, num_digits=2, base=3)
    policy = policies.decoder(task.vocab_size, num_layers=1, width=16, num_heads=2, dtype=jnp.float64)
    params = jax.jit(policy.init)(jax.random.key(1))
    result = supervised(policy, params, task, learning_rate=1e-3)
    assert 0.4 <= result.reward <= 0.6 and result.updates > 0
    assert result.reward == pytest.approx(expected_reward(policy, result.params, task), abs=1e-12)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(result.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_reward": 0.61}, r"target_reward=0\.61 must be below 0\.6, the mean reward of the best completions"),
        ({"target_reward": float("nan")}, "target_reward=nan must be below"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be positive and finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive and finite"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be positive and finite"),
        ({"max_updates": 0}, "max_updates=0 must be at least 1"),
    ],
)
def test_refuses(bandit, options, message):
    with pytest.raises(ValueError, match=message) as error:
        supervised(*bandit, **options)
    assert "\n" not in str(error.value)


def test_diverging_run_stops_and_says_so(bandit):
    policy, params, task = bandit
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ValueError, match=r"the expected reward after 0 updates is nan"):
        supervised(policy, broken, task)
