"""Documents as token numbers, packed into rows of one length for training.

Documents in one row do not see each other (see `Batch.mask`) and each counts its positions from
zero, so that training shows the model just what it meets in use: one text after one BOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerscope.demo.documents import DETERMINED, ORDINARY, RANDOM, Document
from layerscope.demo.vocabulary import BOS, CONTEXT, EOS, SPECIAL, special_id

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_OPEN_ROWS = 48
_ENCODE_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document's tokens, BOS and EOS included, and the loss weight of each."""

    ids: list[int]
    weights: list[float]


@dataclass(slots=True)
class Batch:
    """Packed rows: tokens, document number (0 for padding), position, and loss weight."""

    ids: NDArray[np.int64]
    owner: NDArray[np.int64]
    positions: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(slots=True)
class _Row:
    ids: list[int] = field(default_factory=list[int])
    owner: list[int] = field(default_factory=list[int])
    positions: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])
    documents: int = 0

    def add(self, document: Encoded) -> None:
        length = len(document.ids)
        self.documents += 1
        self.ids += document.ids
        self.owner += [self.documents] * length
        self.positions += range(length)
        self.weights += document.weights


def _encode_text(document: Document, encoding: Encoding, bos: int, eos: int) -> Encoded:
    """Give every token the weight of the piece in which its last character lies."""
    by_character: list[float] = []
    for piece in document.pieces:
        by_character += [piece.weight] * len(piece.text)
    weights = [by_character[end - 1] for _, end in encoding.offsets]
    return Encoded([bos, *encoding.ids, eos], [0.0, *weights, ORDINARY])


def _encode_numbers(document: Document, size: int, bos: int, eos: int) -> Encoded:
    first = len(SPECIAL)
    once = [first + int(number * (size - first)) for number in document.numbers]
    weights = [RANDOM] * len(once) + [DETERMINED] * (len(once) * (document.repeats - 1))
    if document.repeats == 1:
        # A walk: a step is determined where the same step was made before.
        known: set[tuple[int, int]] = set()
        for at, step in enumerate(pairwise(once), start=1):
            weights[at] = DETERMINED if step in known else RANDOM
            known.add(step)
    return Encoded([bos, *(once * document.repeats), eos], [0.0, *weights, ORDINARY])


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode documents in order; those longer than the context are cut short."""
    size = tokenizer.get_vocab_size()
    bos, eos = special_id(tokenizer, BOS), special_id(tokenizer, EOS)
    source = iter(documents)
    while batch := list(islice(source, _ENCODE_BATCH)):
        encodings = tokenizer.encode_batch([d.text for d in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            if document.numbers:
                result = _encode_numbers(document, size, bos, eos)
            else:
                result = _encode_text(document, encoding, bos, eos)
            yield Encoded(result.ids[:CONTEXT], result.weights[:CONTEXT])


def pack(encoded: Iterator[Encoded], rows: int, pad: int) -> Batch:
    """Fill `rows` rows, putting each document into the fullest open row that has room for it."""
    done: list[_Row] = []
    open_rows = [_Row() for _ in range(_OPEN_ROWS)]
    while len(done) < rows:
        document = next(encoded)
        fitting = [row for row in open_rows if len(row.ids) + len(document.ids) <= CONTEXT]
        if not fitting:
            fullest = max(open_rows, key=lambda row: len(row.ids))
            open_rows.remove(fullest)
            done.append(fullest)
            fitting = [_Row()]
            open_rows.append(fitting[0])
        max(fitting, key=lambda row: len(row.ids)).add(document)
    batch = Batch(
        ids=np.full((rows, CONTEXT), pad, dtype=np.int64),
        owner=np.zeros((rows, CONTEXT), dtype=np.int64),
        positions=np.zeros((rows, CONTEXT), dtype=np.int64),
        weights=np.zeros((rows, CONTEXT), dtype=np.float32),
    )
    for index, row in enumerate(done):
        length = len(row.ids)
        batch.ids[index, :length] = row.ids
        batch.owner[index, :length] = row.owner
        batch.positions[index, :length] = row.positions
        batch.weights[index, :length] = row.weights
    return batch
