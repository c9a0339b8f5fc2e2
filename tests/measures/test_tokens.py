from __future__ import annotations

import pytest

from layerscope.measures.tokens import is_ignorable

SPACES = ("", " ", "\n", "\t\r", "▁", "Ċ", "\u200b", "\x00", "\u3000")


@pytest.mark.parametrize("text", [*SPACES, *".,$+“»。，–", "...", "`|~", "Ġ."])
def test_text_without_content(text: str) -> None:
    assert is_ignorable(text)


@pytest.mark.parametrize("text", ["a", " the", "1", "東京", ".a", "€", "é", "π", "😀"])
def test_text_with_content(text: str) -> None:
    assert not is_ignorable(text)


def test_other_symbols_count_when_asked() -> None:
    assert is_ignorable("€😀", symbols=True)
    assert not is_ignorable("€a", symbols=True)


def test_unknown_text_is_not_ignorable() -> None:
    assert not is_ignorable(None)
