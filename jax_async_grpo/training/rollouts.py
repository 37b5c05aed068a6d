"""Rollouts of a text task: which prompts a batch has, completions drawn from given parameters, scores of the task's verifier.

Everything is a function of (seed, batch, parameters): what was drawn can be drawn again, so only a run's step needs to be kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import sampling
from jax_async_grpo.tasks import Scores, TextTask, Verifiers
from jax_async_grpo.types import Params, Policy, Rollouts

__all__ = ["EVALUATION_STREAM", "TRAINING_STREAM", "WARM_START_STREAM", "Drawer", "batch_prompts", "drawer"]

TRAINING_STREAM, EVALUATION_STREAM, WARM_START_STREAM = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawer:
    """Draws and scores groups of completions.

    Attributes:
      generate: (params, prompts[B, P], prompt_mask, prompt_ids[B], step, stream) -> `sampling.Completions`, compiled.
      verifiers: score them.
    """

    generate: Callable[..., sampling.Completions]
    verifiers: Verifiers

    def __call__(
        self,
        params: Params,
        task: TextTask,
        prompt_ids: np.ndarray,
        *,
        step: int,
        version: int,
        stream: int,
        draw_ids: np.ndarray | None = None,
        put: Callable = jnp.asarray,
    ) -> tuple[Rollouts, Scores]:
        """Scored groups of these rows of the task.

        Args:
          params: φ.
          task: questions.
          prompt_ids: [B] rows of the task.
          step: the update that consumes them; random numbers fold it.
          version: the update whose parameters φ are.
          draw_ids: [B] int, what random numbers fold in the place of a row, so that a question that comes twice is drawn anew;
            default the rows.
          stream: tells training, evaluation and bias measurements apart.
          put: host array -> device array, e.g. in the sharding of a batch.

        Returns:
          (Rollouts on the devices, what the verifier made of them).
        """
        prompts, prompt_mask = task.prompts[prompt_ids], task.prompt_mask[prompt_ids]
        ids = np.asarray(prompt_ids if draw_ids is None else draw_ids, np.int32)
        placed = [put(array) for array in (prompts, prompt_mask, ids)]
        drawn = self.generate(params, *placed, jnp.int32(step), jnp.int32(stream))
        completions, mask = np.asarray(drawn.completions), np.asarray(drawn.mask)
        scores = self.verifiers.score(task, np.asarray(prompt_ids), completions, mask)
        rollouts = Rollouts(
            prompts=placed[0],
            prompt_mask=placed[1],
            completions=drawn.completions,
            mask=drawn.mask,
            behavior_logprobs=drawn.logprobs,
            rewards=put(scores.rewards),
            policy_version=put(np.full(completions.shape[:2], version, np.int32)),
        )
        return rollouts, scores


def drawer(
    policy: Policy,
    verifiers: Verifiers,
    key: jax.Array,
    *,
    group_size: int,
    max_length: int,
    tokenizer: Any,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
) -> Drawer:
    """A `Drawer` with its program, compiled once for each number of prompts.

    Args:
      policy: of the parameters it will get.
      verifiers: of the task.
      key: root key of the run; it is folded, not consumed.
      group_size: G.
      max_length: L.
      tokenizer: for its end and pad tokens.
      temperature, top_k, top_p, greedy: of `sampling.generate`; top_k 0 and top_p 1 = all tokens.
    """

    @jax.jit
    def generate(params, prompts, prompt_mask, prompt_ids, step, stream):
        return sampling.generate(
            policy,
            params,
            prompts,
            prompt_mask,
            key,
            group_size=group_size,
            max_length=max_length,
            end_token=tokenizer.end_token,
            pad_token=tokenizer.pad_token,
            prompt_ids=prompt_ids,
            step=step,
            stream=stream,
            temperature=temperature,
            top_k=top_k or None,
            top_p=None if top_p == 1 else top_p,
            greedy=greedy,
        )

    return Drawer(generate, verifiers)


def batch_prompts(
    seed: int, num_rows: int, num_prompts: int, batch: int, *, stream: int = TRAINING_STREAM
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the task in batch b, their ids): every epoch is a new permutation, and batches follow each other through epochs.

    Args:
      seed: of the run.
      num_rows: M questions of the task.
      num_prompts: B.
      batch: b ≥ 0.
      stream: tells the orders of a warm start and of the run apart.

    Returns:
      ([B], [B]) int64; the id is epoch·M + row: a question that an epoch and the next put into one batch has two.

    >>> first, second = (batch_prompts(0, 6, 3, batch)[0] for batch in (0, 1))
    >>> sorted([*first.tolist(), *second.tolist()])
    [0, 1, 2, 3, 4, 5]
    """
    positions = np.arange(batch * num_prompts, (batch + 1) * num_prompts)
    epochs = positions // num_rows
    orders = {epoch: np.random.default_rng([seed, stream, epoch]).permutation(num_rows) for epoch in set(epochs.tolist())}
    rows = np.array([orders[epoch][position % num_rows] for epoch, position in zip(epochs, positions, strict=True)])
    return rows, epochs * num_rows + rows
