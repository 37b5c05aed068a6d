"""Audit your own loss: its exact staleness bias beside ppo_clip's, at matched drift (`python -m examples.audit_own_loss`)."""

import functools

import jax
import jax.numpy as jnp
import optax

from jax_async_grpo import advantages, bias, exact, losses, policies, tasks


def my_loss(logprobs, old_logprobs, advantages, mask):
    return -jnp.tanh(jnp.exp(logprobs - old_logprobs)) * advantages[..., None] * mask


jax.config.update("jax_enable_x64", True)  # a small bias drowns in float32
task = tasks.digit_sum(num_prompts=4, num_digits=2, base=4, partial_credit=True)
policy = policies.linear(task.vocab_size, context_length=6, init_scale=0.5)
learner, direction = policy.init(jax.random.key(0)), policy.init(jax.random.key(1))
direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
for loss_fn in (losses.ppo_clip, my_loss):
    algorithm = dict(group_size=8, loss_fn=loss_fn, advantage_fn=advantages.group_normalized)
    gradient_fn = functools.partial(exact.surrogate_gradient, policy, task=task, **algorithm)
    measure = jax.jit(functools.partial(bias.surrogate_bias, gradient_fn))
    for drift in (0.05, 0.1, 1.0):  # how far the behavior policy lies behind the learner, ‖θ − φ‖
        measured = measure(learner, jax.tree.map(lambda p, d, drift=drift: p - drift * d, learner, direction))
        print(f"{loss_fn.__name__:8}  drift {drift:4}  bias {measured.norm:.2e}  relative {measured.relative_norm:6.2%}")
