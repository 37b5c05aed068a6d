"""A plain optax loop with one of our losses, on rollouts that are always STALENESS updates old.

    python -m examples.optax_loop

The policy learns to add two digits in base 4; nothing of this library but the loss, the ring of old parameters and the task.
Expect a mean reward that rises from about 0.25 to above 0.95, in ten seconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo import advantages, aggregation, exact, losses, policies, sampling, staleness, tasks

STALENESS = 4
GROUP_SIZE = 16
NUM_UPDATES = 100

task = tasks.digit_sum(num_prompts=8, num_digits=1, base=4)
policy = policies.tabular(task.vocab_size, context_length=4)
optimizer = optax.adam(0.05)


def loss_fn(params, rollouts):
    """CISPO over a batch of rollouts, with the log-probs they were drawn from as the ratio's denominator."""
    logprobs = policies.token_logprobs(
        policy, params, rollouts.prompts, rollouts.completions, rollouts.mask, allowed=task.allowed
    )
    advantage = advantages.group_normalized(rollouts.rewards)
    values = losses.cispo(logprobs, rollouts.behavior_logprobs, advantage, rollouts.mask, ratio_high=3.0)
    return aggregation.token_mean(values, rollouts.mask).mean()


@jax.jit
def update(params, opt_state, history, key):
    """Draws groups from the parameters of STALENESS updates ago and takes one step on them."""
    history = staleness.push(history, params)
    behavior_params, _ = staleness.read(history, STALENESS)
    behavior_logprobs = exact.task_logprobs(policy, behavior_params, task)
    rollouts = sampling.sample_enumerated(key, task, behavior_logprobs, GROUP_SIZE, step=history.step)
    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, rollouts), opt_state, params)
    return optax.apply_updates(params, updates), opt_state, history, jnp.mean(rollouts.rewards)


def main():
    params = policy.init(jax.random.key(0))
    opt_state = optimizer.init(params)
    history = staleness.create_history(params, capacity=STALENESS + 1)
    for step in range(NUM_UPDATES + 1):
        params, opt_state, history, reward = update(params, opt_state, history, jax.random.key(1))
        if step % 20 == 0:
            print(f"update {step:3}  reward {reward:.3f}")


if __name__ == "__main__":
    main()
