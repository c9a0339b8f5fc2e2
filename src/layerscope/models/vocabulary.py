"""The text of every token of a vocabulary, and which tokens say nothing.

Decoding goes over the whole vocabulary at once: calls token by token cost seconds on a vocabulary
of a quarter of a million tokens.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from layerscope.measures.tokens import is_ignorable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["decode_tokens", "ignore_mask", "is_ignorable", "token_scheme", "token_strings"]

TokenScheme = Literal["byte_level", "metaspace", "decode"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_texts_of: weakref.WeakKeyDictionary[Any, dict[int, tuple[str | None, ...]]] = (
    weakref.WeakKeyDictionary()
)


def token_strings(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Return the text of the tokens ``0 .. size - 1``, leading spaces kept, cached per tokenizer.

    A token that is part of a character is rendered with U+FFFD; an id that the tokenizer does not
    have (a vocabulary padded to a round size) as the empty string.
    """
    return ["" if text is None else text for text in _vocabulary_texts(tokenizer, size)]


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token on its own, as `token_strings` renders it."""
    return ["" if text is None else text for text in _texts(tokenizer, ids)]


def ignore_mask(
    tokenizer: PreTrainedTokenizerBase, size: int, *, ignore_symbols: bool = False
) -> NDArray[np.bool_]:
    """Return a mask over the ids ``0 .. size - 1``: True where a token says nothing.

    Decided by `is_ignorable`; an id without a token, or a part of a character, is never masked.
    """
    return np.fromiter(
        (
            text is not None
            and REPLACEMENT not in text
            and is_ignorable(text, symbols=ignore_symbols)
            for text in _vocabulary_texts(tokenizer, size)
        ),
        dtype=np.bool_,
        count=size,
    )


def _vocabulary_texts(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[str | None, ...]:
    """Return `_texts` of the whole vocabulary; a tokenizer that grew is decoded again."""
    by_size = _texts_of.setdefault(tokenizer, {})
    known = len(tokenizer)
    texts = by_size.get(known)
    if texts is None or len(texts) < size:
        texts = tuple(_texts(tokenizer, range(max(size, known))))
        by_size.clear()
        by_size[known] = texts
    return texts[:size]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str | None]:
    scheme = token_scheme(tokenizer)
    tokens: list[str | None] = list(tokenizer.convert_ids_to_tokens(list(ids)))
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    if scheme == "decode":
        decoded = tokenizer.batch_decode(
            [[id_] for id_, token in zip(ids, tokens, strict=True) if token],
            clean_up_tokenization_spaces=False,
        )
        remaining = iter(decoded)
        return [next(remaining) if token else None for token in tokens]
    render = _from_byte_level if scheme == "byte_level" else _from_metaspace
    return [
        added[id_] if id_ in added else render(token) if token else None
        for id_, token in zip(ids, tokens, strict=True)
    ]


def token_scheme(tokenizer: PreTrainedTokenizerBase) -> TokenScheme:
    """Say how the tokens of this tokenizer spell their text.

    ``byte_level`` (GPT-2 and its heirs: one character per byte), ``metaspace`` (SentencePiece:
    ``▁`` for a space, ``<0xNN>`` for a byte) or ``decode`` (else: ask the tokenizer itself).
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder: Any = getattr(backend, "decoder", None)
    if decoder is None:
        if hasattr(tokenizer, "byte_decoder"):
            return "byte_level"
        return "metaspace" if hasattr(tokenizer, "sp_model") else "decode"
    state = decoder.__getstate__().decode("utf-8")
    if '"ByteLevel"' in state:
        return "byte_level"
    return "metaspace" if "▁" in state or '"Metaspace"' in state else "decode"


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's map from printable characters to bytes (Radford et al. 2019, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _from_byte_level(token: str) -> str:
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token]).decode("utf-8", "replace")
    except KeyError:
        return token


def _from_metaspace(token: str) -> str:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)]).decode("utf-8", "replace")
        except ValueError:
            return token
    return token.replace("▁", " ")
