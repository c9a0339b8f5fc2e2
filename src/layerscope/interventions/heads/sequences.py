"""Seeded sequences of random tokens that come twice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int

from layerscope.errors import ConfigError
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.prompts import leading_specials


@dataclass(frozen=True, eq=False)
class Repeated:
    """Rows ``[front] r1 .. rn r1 .. rn``.

    Attributes:
        batch: the ids.
        front: what the tokenizer puts before every text (one BOS, or nothing).
        length: n.
    """

    batch: TokenBatch
    front: int
    length: int

    @property
    def second(self) -> range:
        """Columns of the second occurrences."""
        return range(self.front + self.length, self.front + 2 * self.length)

    @property
    def predicted(self) -> range:
        """Columns of the second occurrence whose next token has been seen to follow before."""
        return range(self.second.start, self.second.stop - 1)


def repeated_tokens(
    model: LanguageModel, *, n_sequences: int = 8, length: int = 25, seed: int = 0
) -> Repeated:
    """Draw sequences of distinct ordinary tokens, each repeated once.

    Args:
        model: its tokenizer's special tokens are never drawn.
        n_sequences: rows.
        length: tokens before they repeat.
        seed: of the draw; it depends on nothing else but the vocabulary.

    Raises:
        ConfigError: the context or the vocabulary is too small.
    """
    if n_sequences < 1 or length < 2:
        raise ConfigError("repeated tokens need at least one sequence of two tokens")
    front = _front(model)
    if model.n_ctx is not None and len(front) + 2 * length > model.n_ctx:
        raise ConfigError(
            f"twice {length} tokens do not fit into a context of {model.n_ctx}; use a length of "
            f"at most {(model.n_ctx - len(front)) // 2}"
        )
    special = set(model.tokenizer.all_special_ids)
    size = min(model.d_vocab, model.backend.info.n_embeddings, len(model.tokenizer))
    ordinary = torch.tensor([id_ for id_ in range(size) if id_ not in special])
    if len(ordinary) < length:
        raise ConfigError(
            f"the vocabulary has {len(ordinary)} ordinary tokens, fewer than {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [
        ordinary[torch.randperm(len(ordinary), generator=generator)[:length]]
        for _ in range(n_sequences)
    ]
    ids = [[*front, *row.tolist(), *row.tolist()] for row in rows]
    return Repeated(TokenBatch.from_ids(ids), len(front), length)


def _front(model: LanguageModel) -> tuple[int, ...]:
    return leading_specials(model.tokenizer)


def parts_of(repeated: Repeated, most: int) -> list[Repeated]:
    """Return the sequences in parts of about the same size, of at most so many rows."""
    n_rows = len(repeated.batch)
    number = -(-n_rows // most)
    cuts = [n_rows * part // number for part in range(number + 1)]
    return [
        Repeated(
            TokenBatch.from_ids(repeated.batch.ids[a:b].tolist()), repeated.front, repeated.length
        )
        for a, b in pairwise(cuts)
    ]


def tokens_of(repeated: Repeated) -> Int[torch.Tensor, "row token"]:
    """Return the tokens that repeat, once."""
    return repeated.batch.ids[:, repeated.front : repeated.front + repeated.length]
