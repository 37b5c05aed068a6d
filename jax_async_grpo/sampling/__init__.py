"""Groups of completions drawn from a policy, with the log-probs they were really drawn from.

Random numbers fold (stream, consumption step, global prompt id, member): a completion does not depend on which other prompts
are in the batch, on their order, on the size of the group or on the number of devices.
"""

from __future__ import annotations

from jax_async_grpo.sampling.choice import sampling_logits
from jax_async_grpo.sampling.enumerated import sample_enumerated
from jax_async_grpo.sampling.generation import Completions, generate

__all__ = ["Completions", "generate", "sample_enumerated", "sampling_logits"]
