"""What is compared: for every case the options that select a loss in another system, and the same loss written with ours.

Imports neither torch nor the other systems, so that `make test` can check ours against what they once returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import advantages, aggregation, corrections, losses
from parity.inputs import GROUP_SIZE

__all__ = ["CASES", "ROWS_CUT", "TOLERANCE", "Case", "loss_and_gradient"]

TOLERANCE = {"trl": 1e-9, "tunix": 1e-6}
"""Largest difference of the loss, whose tokens are of order 1, and of the gradient relative to its largest entry.

TRL runs in float64 and is kept with 10 digits; tunix casts to float32 itself.
"""
ROWS_CUT = (4,)
"""Rows whose completion was cut off by the length limit; cases with `cut` mask them."""


class Case(NamedTuple):
    """One loss in two systems.

    Attributes:
      name: unique in its system.
      options: what the other system is configured with, beside its defaults.
      values: (logprobs, batch) -> [N, L], our per-token loss.
      aggregation: (values, mask) -> scalar.
      advantage_fn: rewards[P, G] -> advantages[P, G].
      cut: the rows of `ROWS_CUT` have an empty mask.
    """

    name: str
    options: dict
    values: Callable
    aggregation: Callable
    advantage_fn: Callable
    cut: bool = False


def loss_and_gradient(case: Case, arrays: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """Our loss of a case and its gradient in the learner's log-probs, in float64.

    Args:
      case: of `CASES`.
      arrays: of `inputs.seeded_inputs`.

    Returns:
      (loss, [N, L] gradient).
    """
    with jax.enable_x64(True):
        batch = SimpleNamespace(**{name: jnp.asarray(array) for name, array in arrays.items()})
        if case.cut:
            batch.mask = batch.mask.at[jnp.array(ROWS_CUT)].set(False)
        batch.advantages = case.advantage_fn(batch.rewards.reshape(-1, GROUP_SIZE)).reshape(-1)
        loss, gradient = jax.value_and_grad(lambda x: case.aggregation(case.values(x, batch), batch.mask))(batch.logprobs)
        return float(loss), np.asarray(gradient)


def policy(loss_fn: Callable, **options) -> Callable:
    """A policy loss of `losses` on the batch's arrays."""
    return lambda x, b: loss_fn(x, b.old_logprobs, b.advantages, b.mask, **options)


def with_kl(policy_values: Callable, coefficient: float, kl_fn: Callable) -> Callable:
    """A policy loss and a KL term to the reference, added per token."""
    return lambda x, b: policy_values(x, b) + coefficient * kl_fn(x, b.reference_logprobs, b.mask)


def weighted(policy_values: Callable, correction: Callable, **options) -> Callable:
    """A policy loss times a weight of π_old against the sampler."""
    return lambda x, b: policy_values(x, b) * correction(b.old_logprobs, b.behavior_logprobs, b.mask, **options)


def mean(aggregation_fn: Callable, **options) -> Callable:
    """An aggregation of `aggregation`, divided."""
    return lambda values, mask: aggregation_fn(values, mask, **options).mean()


def over_kept_rows(aggregation_fn: Callable) -> Callable:
    """The same sum over rows, divided by the rows that have a valid token: tunix's convention."""
    return lambda values, mask: aggregation_fn(values, mask).sum / jnp.sum(mask.any(-1))


def trl_cases() -> list[Case]:
    """TRL: every `loss_type` and the options that change the loss."""
    normalized = functools.partial(advantages.group_normalized, ddof=1, epsilon=1e-4)
    rows, tokens = mean(aggregation.sequence_mean), mean(aggregation.token_mean)
    clip = dict(epsilon_low=0.2, epsilon_high=0.28)
    clip_options = dict(epsilon=0.2, epsilon_high=0.28)
    ppo = policy(losses.ppo_clip, **clip)

    def case(name, options, values, aggregation_fn=rows, advantage_fn=normalized, cut=False):
        return Case(name, dict(loss_type="grpo") | options, values, aggregation_fn, advantage_fn, cut)

    def top_entropy(x, b):
        return ppo(x, b) * losses.top_entropy_mask(b.entropies, b.mask, fraction=0.6)

    def vespo_against_the_sampler(x, b):
        return policy(losses.vespo, behavior_logprobs=b.behavior_logprobs)(x, b)

    def unbiased_kl(x, b):
        return ppo(x, b) + 0.3 * losses.ratio_weighted_k3(x, b.reference_logprobs, b.mask, old_logprobs=b.old_logprobs)

    def without_off_policy_rows(x, b):
        return ppo(x, b) * corrections.opsm(x, b.behavior_logprobs, b.advantages, b.mask, threshold=0.05)

    def against_sampler(mode, correction, trl_low=None, **options):
        bounds = dict(vllm_importance_sampling_clip_min=trl_low, vllm_importance_sampling_clip_max=1.2)
        chosen = dict(use_vllm=True, vllm_importance_sampling_mode=mode) | bounds | clip_options
        name = f"grpo {mode.replace('_', ' ')}" + (" two-sided" if trl_low else "")
        return case(name, chosen, weighted(ppo, correction, **options))

    sequence = dict(importance_sampling_level="sequence")
    return [
        case("grpo", clip_options, ppo),
        case("bnpo", dict(loss_type="bnpo") | clip_options, ppo, tokens),
        case("dapo", dict(loss_type="dapo") | clip_options, ppo, tokens),
        case(
            "dr_grpo",
            dict(loss_type="dr_grpo", max_completion_length=8, scale_rewards="none") | clip_options,
            ppo,
            mean(aggregation.constant_length, length=8),
            advantages.group_centered,
        ),
        case("grpo delta", dict(delta=1.4) | clip_options, policy(losses.ppo_clip, **clip, dual_clip=1.4)),
        case("grpo beta", dict(beta=0.3, use_bias_correction_kl=False) | clip_options, with_kl(ppo, 0.3, losses.k3)),
        case("grpo beta bias-corrected", dict(beta=0.3, use_bias_correction_kl=True) | clip_options, unbiased_kl),
        case("grpo top entropy", dict(top_entropy_quantile=0.6) | clip_options, top_entropy),
        case("grpo truncated rows masked", dict(mask_truncated_completions=True) | clip_options, ppo, cut=True),
        case("gspo", sequence | dict(epsilon=0.1, epsilon_high=0.15), policy(losses.gspo, epsilon_low=0.1, epsilon_high=0.15)),
        case(
            "luspo",
            sequence | dict(loss_type="luspo", epsilon=0.1, epsilon_high=0.15),
            policy(losses.luspo, epsilon_low=0.1, epsilon_high=0.15),
        ),
        case("luspo token level", dict(loss_type="luspo") | clip_options, ppo, mean(aggregation.sequence_sum)),
        case("cispo", dict(loss_type="cispo", epsilon_high=1.3), policy(losses.cispo, ratio_high=1.3), tokens),
        case(
            "sapo",
            dict(loss_type="sapo", sapo_temperature_pos=0.8, sapo_temperature_neg=1.3),
            policy(losses.sapo, temperature_positive=0.8, temperature_negative=1.3),
        ),
        case("vespo", dict(loss_type="vespo"), policy(losses.vespo), tokens),
        case(
            "vespo gates",
            dict(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=2.0, vespo_lambda_neg=1.0),
            policy(losses.vespo, k_positive=1.5, lambda_positive=2.5, k_negative=2.0, lambda_negative=1.0),
            tokens,
        ),
        case(
            "vespo against the sampler",
            dict(
                loss_type="vespo",
                use_vllm=True,
                vllm_importance_sampling_mode="token_truncate",
                vllm_importance_sampling_clip_max=100.0,
            ),
            vespo_against_the_sampler,
            tokens,
        ),
        against_sampler("token_truncate", corrections.token_tis, cap=1.2),
        against_sampler("token_truncate", corrections.token_tis, trl_low=0.8, low=0.8, cap=1.2),
        against_sampler("token_mask", corrections.token_mis, cap=1.2),
        against_sampler("token_mask", corrections.icepop, trl_low=0.8, low=0.8, high=1.2),
        against_sampler("sequence_truncate", corrections.sequence_tis, cap=1.2),
        against_sampler("sequence_mask", corrections.sequence_mis, cap=1.2),
        case(
            "grpo off-policy rows masked",
            dict(off_policy_mask_threshold=0.05, use_vllm=True, vllm_importance_sampling_correction=False) | clip_options,
            without_off_policy_rows,
        ),
    ]


def tunix_cases() -> list[Case]:
    """tunix: both `loss_algo`, every `loss_agg_mode`, `kl_loss_mode` and advantage estimator."""
    normalized = functools.partial(advantages.group_normalized, ddof=1, epsilon=1e-6)
    rows = mean(aggregation.sequence_mean)
    ppo = policy(losses.ppo_clip)

    def case(name, options, values=ppo, aggregation_fn=rows, advantage_fn=normalized, cut=False):
        return Case(name, dict(beta=0.0) | options, values, aggregation_fn, advantage_fn, cut)

    scaled, summed = mean(aggregation.constant_length), mean(aggregation.sequence_sum)
    return [
        case("grpo", {}),
        case("clip-higher", dict(epsilon_high=0.28), policy(losses.ppo_clip, epsilon_high=0.28)),
        case("dual clip", dict(epsilon_c=1.4), policy(losses.ppo_clip, dual_clip=1.4)),
        case("token-mean", dict(loss_agg_mode="token-mean"), aggregation_fn=mean(aggregation.token_mean)),
        case("token-scale", dict(loss_agg_mode="sequence-mean-token-scale"), aggregation_fn=scaled),
        case("token-sum", dict(loss_agg_mode="seq-mean-token-sum"), aggregation_fn=summed),
        case("token-sum-norm", dict(loss_agg_mode="sequence-mean-token-sum-norm"), aggregation_fn=summed),
        case(
            "gspo-token",
            dict(loss_algo="gspo-token", epsilon=0.1, epsilon_high=0.15),
            policy(losses.gspo_token, epsilon_low=0.1, epsilon_high=0.15),
        ),
        case("kl", dict(beta=0.3, kl_loss_mode="kl"), with_kl(ppo, 0.3, losses.k1)),
        case("mse_kl", dict(beta=0.3, kl_loss_mode="mse_kl"), with_kl(ppo, 0.3, losses.k2)),
        case("low_var_kl", dict(beta=0.3, kl_loss_mode="low_var_kl"), with_kl(ppo, 0.3, losses.k3)),
        case("rloo", dict(advantage_estimator="rloo"), advantage_fn=advantages.leave_one_out),
        case("drgrpo", dict(advantage_estimator="drgrpo"), advantage_fn=advantages.group_centered),
        case("empty row", {}, aggregation_fn=over_kept_rows(aggregation.sequence_mean), cut=True),
    ]


CASES = {"trl": trl_cases(), "tunix": tunix_cases()}
