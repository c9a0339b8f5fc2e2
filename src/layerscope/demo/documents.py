"""What a training document is, and the seeded choices that every grammar shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar, get_args

Kind = Literal["facts", "tasks", "copying", "reviews", "gambling", "stories"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# How much a token counts in the training loss. Every token counts a little; those that the text
# so far determines (a fact's answer, the second copy of a sequence) count in full. Tokens drawn at
# random teach nothing, and at full weight their noise would drown the rest.
DETERMINED = 1.0
ORDINARY = 0.4
RANDOM = 0.05

ChoiceT = TypeVar("ChoiceT")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text and the weight of its tokens in the training loss."""

    text: str
    weight: float = ORDINARY


@dataclass(frozen=True, slots=True)
class Document:
    """One training document: pieces of text, or token numbers for sequences that are no text.

    `numbers` holds uniform draws from [0, 1), one per distinct token to be drawn from the
    vocabulary, repeated `repeats` times: the grammar does not know the tokenizer, so the choice
    of tokens is left to the encoder. Equal draws are equal tokens.
    """

    kind: Kind
    pieces: tuple[Piece, ...] = ()
    numbers: tuple[float, ...] = ()
    repeats: int = 2

    @property
    def text(self) -> str:
        """The document as plain text (empty for a sequence of token numbers)."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Item:
    """One evaluation question: a prompt and the text that must come next."""

    group: str
    prompt: str
    answer: str


def pick(rng: Random, options: Sequence[ChoiceT]) -> ChoiceT:
    """Choose one option; kept apart from `Random.choice` so that its draws never change."""
    return options[int(rng.random() * len(options))]


def fraction(*parts: str) -> float:
    """Map names to a fixed number in [0, 1): the same on every machine and in every run."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def for_validation(text: str) -> bool:
    """Whether a free-form document is kept out of training, judged by its text alone."""
    return fraction("validation", text) < 0.02
