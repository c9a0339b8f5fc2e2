"""Words of a text: every token belongs to the one it stands in, and a word is as loud as it."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from layerscope.experiments.pathways.corpus import Text
from layerscope.experiments.pathways.encoding import texts_schema
from layerscope.experiments.pathways.words import by_words, words_in, words_of_tokens
from support.tiny_models import tiny_tokenizer

TEXT = "I can't bet $1,500 -- größer Risk…"
WORDS = ["i", "can't", "bet", "$", "1,500", "--", "größer", "risk", "…"]


def test_every_token_belongs_to_the_word_it_stands_in() -> None:
    assert [word for word, _, _ in words_in(TEXT)] == WORDS
    tokenizer = tiny_tokenizer()
    encoded: Any = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    found = words_of_tokens(TEXT, encoded["input_ids"], tokenizer)
    assert found is not None
    named = [each for each in found if each is not None]
    assert named == sorted(named) and set(named) == set(range(len(WORDS)))
    for number, (first, last) in zip(found, encoded["offset_mapping"], strict=True):
        piece = TEXT[first:last].strip().lower()
        assert number is None if not piece else piece in WORDS[number or 0]
    # A text that was cut, and ids that are not of this text.
    assert words_of_tokens(TEXT, encoded["input_ids"][:4], tokenizer) == found[:4]
    assert words_of_tokens(TEXT, [5, 5, 5], tokenizer) is None


def test_a_word_is_worth_its_largest_token() -> None:
    rows = [
        (0, 1, 7, 0, [0, 2], [1.0, 4.0]),
        (0, 2, 8, 0, [0], [3.0]),
        (0, 3, 9, 1, [], []),
        (0, 4, 9, None, [1], [9.0]),
        (2, 1, 7, 0, [1], [2.0]),
    ]
    entries = pl.DataFrame(rows, schema=texts_schema().schema, orient="row")
    texts = [Text("texts", "", None, text) for text in ("bets won", "", "Won bets")]
    words, names = by_words(entries, texts)
    said = [(row["text"], row["position"], names[row["token_id"]]) for row in words.to_dicts()]
    assert said == [(0, 0, "bets"), (0, 1, "won"), (2, 0, "won")]
    assert words["features"].to_list() == [[0, 2], None, [1]]
    assert words["values"].to_list() == [[3.0, 4.0], None, [2.0]]


@pytest.mark.parametrize("text", ["", "   "])
def test_a_text_of_blanks_has_no_word(text: str) -> None:
    assert words_in(text) == []
