"""Which token texts carry no content: white space, punctuation, control characters."""

from __future__ import annotations

import string
import unicodedata

# Shown for bytes that are part of a character; what they say is not known, so not "nothing".
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Marks by which tokenizers write a space or a line end inside a token piece.
SPACE_MARKS = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": " "})


def is_ignorable(text: str | None, *, symbols: bool = False) -> bool:
    """Say whether a decoded token is only white space, punctuation or control characters.

    Every character must be of a Unicode category Z (separators), P (punctuation) or C (control,
    format, unassigned), or one of the symbols that ASCII counts as punctuation ($+<=>^`|~). With
    `symbols`, all of category S count too, U+FFFD excepted: it shows a part of a character. An
    unknown text is not ignorable, nor is the empty one, which stands for an id without a token (a
    vocabulary padded to a round size).
    """
    if not text or REPLACEMENT in text:
        return False
    return all(_ignorable(character, symbols) for character in text.translate(SPACE_MARKS))


def is_blank(piece: str) -> bool:
    """Say whether a token shows nothing but white space and word-boundary marks (▁, Ġ, Ċ)."""
    return not piece.translate(SPACE_MARKS).strip()


def _ignorable(character: str, symbols: bool) -> bool:
    if character.isspace() or character in string.punctuation:
        return True
    kind = unicodedata.category(character)[0]
    return kind in "ZPC" or (symbols and kind == "S")
