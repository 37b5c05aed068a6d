"""The seeded arrays that every system is given: two groups of three completions, rows of unequal length."""

from __future__ import annotations

import numpy as np

__all__ = ["GROUP_SIZE", "LENGTHS", "seeded_inputs"]

GROUP_SIZE = 3
LENGTHS = (5, 3, 4, 1, 5, 2)
_SEED = 9100  # log-ratios on both sides of every bound of the cases, and none within 0.5 % of one


def seeded_inputs() -> dict[str, np.ndarray]:
    """Log-probs, mask, entropies and rewards of one batch; rounded so that every value is exact in float32.

    Returns:
      Arrays by the names of our arguments: `logprobs`, `old_logprobs`, `behavior_logprobs`, `reference_logprobs`, `entropies`
      [N, L] float64; `mask` [N, L] bool; `rewards` [N]; N = 2 groups of `GROUP_SIZE`, in order.
    """
    rng = np.random.default_rng(_SEED)
    shape = len(LENGTHS), max(LENGTHS)
    old = -rng.uniform(0.7, 3.0, shape)
    arrays = {
        "logprobs": old + 0.4 * rng.normal(size=shape),
        "old_logprobs": old,
        "behavior_logprobs": old + 0.3 * rng.normal(size=shape),
        "reference_logprobs": old + 0.5 * rng.normal(size=shape),
        "entropies": rng.uniform(0.1, 2.0, shape),
        "rewards": rng.uniform(size=shape[0]),
    }
    exact = {name: np.round(array * 1024) / 1024 for name, array in arrays.items()}
    return exact | {"mask": np.arange(shape[1]) < np.array(LENGTHS)[:, None]}
