"""Which token texts carry no content: white space, punctuation, control characters."""

from __future__ import annotations

import string
import unicodedata

# Marks by which tokenizers write a space or a line end inside a token piece.
SPACE_MARKS = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": " "})


def is_ignorable(text: str | None, *, symbols: bool = False) -> bool:
    """Say whether a decoded token is only white space, punctuation or control characters.

    Every character must be of a Unicode category Z (separators), P (punctuation) or C (control,
    format, unassigned), or one of the symbols that ASCII counts as punctuation ($+<=>^`|~). With
    `symbols`, all of category S count too. The empty text is ignorable; an unknown text is not.
    """
    if text is None:
        return False
    return all(_ignorable(character, symbols) for character in text.translate(SPACE_MARKS))


def _ignorable(character: str, symbols: bool) -> bool:
    if character.isspace() or character in string.punctuation:
        return True
    kind = unicodedata.category(character)[0]
    return kind in "ZPC" or (symbols and kind == "S")
