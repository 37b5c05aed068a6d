"""Text to token ids and back: the built-in characters, or any Hugging Face `tokenizer.json` on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_async_grpo.tasks import characters

__all__ = ["Tokenizer", "character_tokenizer", "load_tokenizer"]

_END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<eos>",
    "[EOS]",
)
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_INSTALL = 'tokenizers is needed to read a tokenizer.json: pip install "jax-async-grpo[tasks]"'


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Two functions and what a policy and a sampler must know of them.

    Attributes:
      encode: text -> [N] int32 token ids, without begin, end or padding.
      decode: token ids [N] -> text; special tokens vanish, ids that are none of the vocabulary become U+FFFD or vanish.
      vocab_size: V, one more than the largest id.
      pad_token: the id that fills rows; it may equal `end_token`, masks say which is which.
      end_token: the id that ends a completion.
      name: what records call it.
    """

    encode: Callable[[str], np.ndarray]
    decode: Callable[[np.ndarray], str]
    vocab_size: int
    pad_token: int
    end_token: int
    name: str


def character_tokenizer() -> Tokenizer:
    """Newline and printable ASCII, a token each; other characters become `characters.UNKNOWN_TOKEN`.

    Example:
      >>> tokenizer = character_tokenizer()
      >>> tokenizer.vocab_size, tokenizer.decode(tokenizer.encode("1 + 2"))
      (99, '1 + 2')
    """
    return Tokenizer(
        characters.encode,
        _decode_characters,
        characters.VOCAB_SIZE,
        characters.PAD_TOKEN,
        characters.END_TOKEN,
        "characters",
    )


def load_tokenizer(path: str | os.PathLike[str], *, end_token: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library; nothing is downloaded.

    The end token is the one given, else the `eos_token` of a `tokenizer_config.json` beside the file, else the only one of the
    usual ones that the vocabulary has. The padding token is found the same way; without any, the end token pads.

    Text stays text: begin tokens and templates are left out, padding and truncation are switched off, and a text that spells
    a special token ("</s>") is encoded as its characters. Byte-level vocabularies give back every text; one that normalizes,
    say to lower case, gives back the normalized text.

    Args:
      path: the file, or a folder that has a `tokenizer.json`.
      end_token: the text of the token that ends a completion, say "<|im_end|>".
      pad_token: the text of the token that pads.

    Returns:
      The tokenizer, named after the file's folder.

    Raises:
      ImportError: `tokenizers` is not installed.
      ValueError: no such file, none that the library reads, a token the vocabulary lacks, or an end token that cannot be told.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error
    path = Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} must be a tokenizer.json or a folder that has one")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception on a file it cannot read
        raise ValueError(f"path={str(path)!r} is no tokenizer.json that tokenizers can read: {error}") from error
    loaded.no_padding()
    loaded.no_truncation()
    loaded.encode_special_tokens = True
    vocabulary = loaded.get_vocab(with_added_tokens=True)
    config = _read_config(path.parent / "tokenizer_config.json")
    end = _find_token("end_token", end_token, config.get("eos_token"), _END_TOKENS, vocabulary, path)
    if end is None:
        raise ValueError(f"end_token=None cannot be told from {path}: it has none of {', '.join(_END_TOKENS)}, name the token")
    pad = _find_token("pad_token", pad_token, config.get("pad_token"), _PAD_TOKENS, vocabulary, path)
    vocab_size = max(vocabulary.values()) + 1

    def encode(text: str) -> np.ndarray:
        return np.array(loaded.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(tokens: np.ndarray) -> str:
        known = [token for token in np.asarray(tokens).tolist() if 0 <= token < vocab_size]
        return loaded.decode(known, skip_special_tokens=True)

    return Tokenizer(encode, decode, vocab_size, end if pad is None else pad, end, path.resolve().parent.name)


def _decode_characters(tokens: np.ndarray) -> str:
    """A policy may have more logits than there are characters."""
    tokens = np.asarray(tokens)
    known = (tokens >= 0) & (tokens < characters.VOCAB_SIZE)
    return characters.decode(np.where(known, tokens, characters.UNKNOWN_TOKEN))


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _find_token(
    argument: str, given: str | None, configured: Any, usual: tuple[str, ...], vocabulary: Mapping[str, int], path: Path
) -> int | None:
    if given is not None:
        if given not in vocabulary:
            raise ValueError(f"{argument}={given!r} is not in the vocabulary of {path}")
        return vocabulary[given]
    configured = configured.get("content") if isinstance(configured, dict) else configured
    if isinstance(configured, str) and configured in vocabulary:
        return vocabulary[configured]
    found = [token for token in usual if token in vocabulary]
    if len(found) > 1:
        raise ValueError(f"{argument}=None cannot be told from {path}: it has {' and '.join(found)}, name one of them")
    return vocabulary[found[0]] if found else None
