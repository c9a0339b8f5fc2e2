"""The tokenizer and the packing of documents into rows."""

from itertools import islice

import numpy as np
import pytest
from tokenizers import Tokenizer

from layerscope.demo import corpus, facts, tasks
from layerscope.demo.documents import Document, Piece
from layerscope.demo.packing import encode, pack
from layerscope.demo.vocabulary import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    VOCABULARY_SIZE,
    build_tokenizer,
    special_id,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def test_tokenizer_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    assert build_tokenizer().to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE <= 4096


def test_answers_are_single_tokens(tokenizer: Tokenizer) -> None:
    def is_one_token(word: str) -> bool:
        return len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1

    capitals = [row["capital"] for row in facts.facts_table() if " " not in row["capital"]]
    assert [word for word in capitals if not is_one_token(word)] == []
    words = [row[task] for task in tasks.TASKS for row in tasks.word_table() if row[task]]
    assert sum(map(is_one_token, words)) >= 0.98 * len(words)


def test_weights_follow_the_pieces(tokenizer: Tokenizer) -> None:
    document = Document("facts", (Piece("The capital of Peru is", 0.25), Piece(" Lima", 1.0)))
    (encoded,) = encode([document], tokenizer)
    assert encoded.ids[0] == special_id(tokenizer, BOS)
    assert encoded.ids[-1] == special_id(tokenizer, EOS)
    assert encoded.weights[0] == 0.0
    assert encoded.weights[1:-2] == [0.25] * (len(encoded.ids) - 3)
    assert encoded.weights[-2] == 1.0


def test_number_documents_repeat_ordinary_tokens(tokenizer: Tokenizer) -> None:
    document = Document("copying", numbers=(0.0, 0.5, 0.999), repeats=3)
    (encoded,) = encode([document], tokenizer)
    body = encoded.ids[1:-1]
    assert body == body[:3] * 3
    assert min(body) > special_id(tokenizer, PAD)
    assert max(body) < VOCABULARY_SIZE


def test_packed_rows_hold_whole_documents(tokenizer: Tokenizer) -> None:
    pad = special_id(tokenizer, PAD)
    batch = pack(encode(corpus.documents(1), tokenizer), rows=40, pad=pad)
    assert batch.ids.shape == (40, CONTEXT)
    assert (batch.owner > 0).mean() > 0.95
    starts = batch.ids == special_id(tokenizer, BOS)
    np.testing.assert_array_equal(starts, (batch.positions == 0) & (batch.owner > 0))
    ends = batch.ids == special_id(tokenizer, EOS)
    assert ends.sum() == starts.sum()
    assert (batch.ids[batch.owner == 0] == pad).all()
    assert (batch.weights[batch.owner == 0] == 0).all()


def test_no_document_fills_more_than_the_context(tokenizer: Tokenizer) -> None:
    eos = special_id(tokenizer, EOS)
    for encoded in encode(islice(corpus.documents(2), 3000), tokenizer):
        assert len(encoded.ids) <= CONTEXT
        assert encoded.ids[-1] == eos
