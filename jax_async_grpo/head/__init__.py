"""Log-probs, policy loss and its gradient from hidden states and the output matrix; logits [B, L, V] never exist.

The tokens are cut into chunks, and a chunk's logits are made in blocks of the vocabulary, each while its slice of the output
matrix is at hand. Of a chunk e^{z−shift} is kept, [chunk, V]. With z = h·W, p = softmax(z) and w = ∂loss/∂log π(y):

    ∂loss/∂h = w·(W[:, y] − Σ_v p_v·W[:, v])        ∂loss/∂W[:, v] = Σ_tokens w·(1[v = y] − p_v)·h

The sum in the first does not hold w, so it is accumulated along with the normalizer; in the second, w and the normalizer scale
h. No product with the vocabulary is done twice and no gradient of logits is written down: docs/head.md.
"""

from __future__ import annotations

from jax_async_grpo.head.logprobs import logprobs_and_entropy, token_logprobs
from jax_async_grpo.head.loss import LossAndGradient, loss_and_gradient, policy_loss

__all__ = ["LossAndGradient", "logprobs_and_entropy", "loss_and_gradient", "policy_loss", "token_logprobs"]
