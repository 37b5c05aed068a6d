"""Random numbers by address: the noise of a vocabulary entry is a function of where it stands, and of nothing else.

Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), the cipher behind JAX's default keys, maps (key of a completion;
position, vocabulary index) to 32 bits. `jax.random` is not used for this last step: on a CPU its loop over the rounds is not
fused, and noise for 32k entries would cost several times as much as their logits. Written out it fuses into the choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["completion_keys", "exponential_noise", "threefry"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def completion_keys(key: jax.Array, stream, step, prompt_ids: jax.Array, group_size: int) -> jax.Array:
    """The key of every completion: `key` folded by stream, step, prompt id and member, in this order.

    Args:
      key: the root key; it is folded, not consumed.
      stream: int, which of several independent draws.
      step: int, the learner update that consumes the completions.
      prompt_ids: [B] int, global ids.
      group_size: G.

    Returns:
      [B, G, 2] uint32 words of Threefry keys.
    """
    step_key = jax.random.fold_in(jax.random.fold_in(key, stream), step)

    def of_prompt(prompt):
        prompt_key = jax.random.fold_in(step_key, prompt)
        return jax.vmap(lambda member: jax.random.fold_in(prompt_key, member))(jnp.arange(group_size, dtype=jnp.int32))

    return jax.random.key_data(jax.vmap(of_prompt)(prompt_ids))[..., :2]


def exponential_noise(keys: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    """A standard exponential E_v for every row and vocabulary entry; −log E_v is standard Gumbel noise.

    E = −log(1 − w) with w = (bits + ½)/2^32. Small E win the choice, and w has its full relative precision there: unlike
    −log of a 24-bit uniform number, no two of 2^24 entries are forced to share the noise that decides.

    Args:
      keys: [R, 2] uint32 (`completion_keys`).
      position: int, of the token in its completion.
      vocab_size: V.

    Returns:
      [V, R] float32 whatever the precision of the policy, in 1e-10..17.
    """
    index = jnp.arange(vocab_size, dtype=jnp.uint32)[:, None]
    bits, _ = threefry(keys[:, 0], keys[:, 1], jnp.full_like(index, jnp.asarray(position, jnp.uint32)), index)
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    # The largest would round to 1, whose E is infinite: an entry that is alone could not be chosen.
    return -jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2.0**-24)))


def threefry(key0: jax.Array, key1: jax.Array, count0: jax.Array, count1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32-20 of the counters under the keys, all uint32 of shapes that broadcast: two words of 32 bits each."""
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x, y = count0 + key0, count1 + key1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
