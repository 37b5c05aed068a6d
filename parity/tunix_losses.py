"""tunix's own loss on given log-probs: `grpo_loss_fn` and the advantage estimators, with only the model's forward replaced."""

from __future__ import annotations

import importlib.metadata
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common, function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample

__all__ = ["ORIGIN", "VERSIONS", "loss_and_gradient"]

ORIGIN = "tunix.rl.algo_core.grpo_loss_fn"
VERSIONS = {"google-tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__}


class _Logprobs(nnx.Module):
    def __init__(self, values):
        self.values = nnx.Param(values)


def _given_logprobs(graphdef, state, **_):
    values = nnx.merge(graphdef, state).values[...]
    return values, jnp.zeros((*values.shape, 2))


def loss_and_gradient(
    arrays: dict[str, np.ndarray], rows_cut: tuple[int, ...], group_size: int, options: dict
) -> tuple[float, np.ndarray]:
    """tunix's loss and its gradient in the learner's log-probs; it computes in float32.

    Args:
      arrays: of `inputs.seeded_inputs`.
      rows_cut: rows whose completion mask is empty.
      group_size: G.
      options: attributes of `GRPOConfig`; the loss reads some that it does not declare.

    Returns:
      (loss, [N, L] gradient).
    """
    config = GRPOConfig(num_generations=group_size)
    config.temperature = 1.0  # the learner copies it from the rollout's config
    for name, value in options.items():
        setattr(config, name, value)
    single = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    mask = jnp.asarray(arrays["mask"]).at[jnp.array(rows_cut, int)].set(False)
    estimate = function_registry.get_advantage_estimator(config.advantage_estimator)
    example = TrainExample(
        prompt_ids=jnp.zeros((len(mask), 1), jnp.int32),
        prompt_mask=jnp.ones((len(mask), 1), bool),
        completion_ids=jnp.zeros(mask.shape, jnp.int32),
        completion_mask=mask,
        advantages=estimate(rewards=single["rewards"], num_generations=group_size),
        old_per_token_logps=single["old_logprobs"],
        ref_per_token_logps=single["reference_logprobs"] if config.beta else None,
    )

    def loss_fn(model):
        return algo_core.grpo_loss_fn(model, example, config, pad_id=0, eos_id=1)

    with mock.patch.object(common, "compute_per_token_logps", _given_logprobs):
        (loss, _), gradient = nnx.value_and_grad(loss_fn, has_aux=True)(_Logprobs(single["logprobs"]))
    return float(loss), np.asarray(gradient["values"][...])
