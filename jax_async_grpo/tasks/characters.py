"""Characters as tokens: one fixed table, so that the vocabulary never depends on the data."""

from __future__ import annotations

import numpy as np

__all__ = ["CHARACTERS", "END_TOKEN", "PAD_TOKEN", "UNKNOWN_TOKEN", "VOCAB_SIZE", "decode", "encode"]

PAD_TOKEN = 0
END_TOKEN = 1
UNKNOWN_TOKEN = 2
CHARACTERS = "\n" + "".join(map(chr, range(0x20, 0x7F)))
"""Newline and printable ASCII; `CHARACTERS[i]` is token `i + 3`."""
VOCAB_SIZE = 3 + len(CHARACTERS)

_TOKEN = {character: token for token, character in enumerate(CHARACTERS, start=3)}


def encode(text: str) -> np.ndarray:
    """Token ids of a text, [len(text)] int32; a character outside the table becomes `UNKNOWN_TOKEN`."""
    return np.array([_TOKEN.get(character, UNKNOWN_TOKEN) for character in text], np.int32)


def decode(tokens: np.ndarray) -> str:
    """The text of token ids [N]; padding and end tokens vanish, `UNKNOWN_TOKEN` becomes U+FFFD."""
    special = {PAD_TOKEN: "", END_TOKEN: "", UNKNOWN_TOKEN: "\ufffd"}
    return "".join(special.get(token, CHARACTERS[token - 3]) for token in np.asarray(tokens).tolist())
