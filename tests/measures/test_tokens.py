from __future__ import annotations

import pytest

from layerscope.measures.tokens import is_blank, is_ignorable

SPACES = (" ", "\n", "\t\r", "▁", "Ċ", "\u200b", "\x00", "\u3000")


@pytest.mark.parametrize("text", [*SPACES, *".,$+“»。，–", "...", "`|~", "Ġ."])
def test_text_without_content(text: str) -> None:
    assert is_ignorable(text)


@pytest.mark.parametrize("text", ["a", " the", "1", "東京", ".a", "€", "é", "π", "😀"])
def test_text_with_content(text: str) -> None:
    assert not is_ignorable(text)


def test_other_symbols_count_when_asked() -> None:
    assert is_ignorable("€😀", symbols=True)
    assert not is_ignorable("€a", symbols=True)


def test_a_part_of_a_character_never_counts() -> None:
    assert not is_ignorable("\ufffd", symbols=True)
    assert not is_ignorable(" \ufffd.", symbols=True)


@pytest.mark.parametrize("text", [None, ""])
def test_what_stands_for_no_token_is_not_ignorable(text: str | None) -> None:
    assert not is_ignorable(text)
    assert not is_ignorable(text, symbols=True)


@pytest.mark.parametrize(
    ("piece", "blank"),
    [("▁", True), ("Ġ", True), (" ", True), ("", True), ("▁a", False), (".", False), ("Ġ7", False)],
)
def test_blank_pieces(piece: str, blank: bool) -> None:
    assert is_blank(piece) is blank
