"""Weights that multiply a per-token loss because the tokens were drawn by another policy than the loss assumes.

Everything is a function of ρ = π_old/μ = exp(old_logprobs − behavior_logprobs): μ drew the tokens, π_old is the denominator of
the loss's own ratio. The positional order is `(old_logprobs, behavior_logprobs, mask)`, all [..., L]; weights come back as
floats [..., L], masks as 0 or 1, exactly 0 outside `mask`. They hold no learner, so nothing is detached: an update
differentiates the learner alone, and whoever differentiates the *update* in the other policies gets it right. `opsm` and the
proximal approximations do hold the learner and take `detached_logprobs`. Bounds are ratios (never 1 ± ε) and are applied to
log ρ, so that nothing overflows on its way to a bound. Inputs may be bfloat16 or float32; at least float32 is computed and
returned.

Formulas, option names of other systems, and their traps: docs/corrections.md.
"""

from __future__ import annotations

from jax_async_grpo.corrections.batch import batch_normalize, dropped_fraction, dropped_row_fraction, second_moment_mask
from jax_async_grpo.corrections.masks import geometric_mask, k_rejection, masked_max, opsm, veto
from jax_async_grpo.corrections.proximal import linear_proximal, log_linear_proximal, proximal_error, proximal_fraction
from jax_async_grpo.corrections.weights import icepop, sequence_mask_tis, sequence_mis, sequence_tis, token_mis, token_tis
from jax_async_grpo.corrections.wrapper import corrected

__all__ = [
    "batch_normalize",
    "corrected",
    "dropped_fraction",
    "dropped_row_fraction",
    "geometric_mask",
    "icepop",
    "k_rejection",
    "linear_proximal",
    "log_linear_proximal",
    "masked_max",
    "opsm",
    "proximal_error",
    "proximal_fraction",
    "second_moment_mask",
    "sequence_mask_tis",
    "sequence_mis",
    "sequence_tis",
    "token_mis",
    "token_tis",
    "veto",
]
