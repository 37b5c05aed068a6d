"""Per-token policy losses (to be minimized) and KL terms as pure functions of arrays; nothing is reduced.

The positional order of every policy loss is `(logprobs, old_logprobs, advantages, mask)`; all but the advantages have the
shape [..., L] of completion tokens. Advantages may lack the token axis: [...] is one advantage per completion. Differentiate
with respect to the argument you mean (the learner's log-probs are argument 0): no function stops the gradient of another
policy's log-probs, and losses that detach the learner take `detached_logprobs`. Positions outside the mask give exactly 0 and
pass no gradient, whatever stands there. Inputs may be bfloat16 or float32; at least float32 is computed and returned.

Formulas, and the option names of other systems: docs/losses.md.
"""

from __future__ import annotations

from jax_async_grpo.losses.detached_weight import cispo, rollout_is, topr, vespo
from jax_async_grpo.losses.kl import abs_kl, k1, k2, k3, ratio_weighted_k3, straight_through_kl
from jax_async_grpo.losses.ratio import (
    clipped_tokens,
    decoupled_ppo,
    dro,
    importance_sampling,
    ppo_clip,
    reinforce,
    sapo,
)
from jax_async_grpo.losses.second_moment import M2Bounds, m2_bounds, m2po
from jax_async_grpo.losses.sequence import gmpo, gspo, gspo_token, luspo
from jax_async_grpo.losses.token_entropy import entropy, top_entropy_mask
from jax_async_grpo.losses.trust_region import dppo_kl, dppo_tv, ipo, prime

__all__ = [
    "M2Bounds",
    "abs_kl",
    "cispo",
    "clipped_tokens",
    "decoupled_ppo",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "entropy",
    "gmpo",
    "gspo",
    "gspo_token",
    "importance_sampling",
    "ipo",
    "k1",
    "k2",
    "k3",
    "luspo",
    "m2_bounds",
    "m2po",
    "ppo_clip",
    "prime",
    "ratio_weighted_k3",
    "reinforce",
    "rollout_is",
    "sapo",
    "straight_through_kl",
    "top_entropy_mask",
    "topr",
    "vespo",
]
