"""How tokens and numbers are written, the same way in the page and in the terminal."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

SPACE, NEWLINE, RETURN, TAB, EMPTY = "·", "↵", "␍", "⇥", "∅"
MARKER_LEGEND = (
    (SPACE, "space"),
    (NEWLINE, "line break"),
    (TAB, "tab"),
    (EMPTY, "empty token"),
    ("‹U+200F›", "an invisible character, by its Unicode number"),
)
_MARKERS = {" ": SPACE, "\n": NEWLINE, "\r": RETURN, "\t": TAB}
# Control, format (bidirectional marks, joiners), surrogate, separators of lines, paragraphs, words.
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
# What could end a script element or a JavaScript string early.
_JSON_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def visible(token: str | None, *, keep_spaces: bool = False) -> str:
    """Return a token in which white space and invisible characters can be seen.

    With ``keep_spaces`` ordinary spaces stay, which reads better for whole prompts.
    """
    if not token:
        return EMPTY
    return "".join(_visible_char(char, keep_spaces=keep_spaces) for char in token)


def _visible_char(char: str, *, keep_spaces: bool) -> str:
    if char == " " and keep_spaces:
        return char
    if char in _MARKERS:
        return _MARKERS[char]
    if unicodedata.category(char) in _INVISIBLE:
        return f"‹U+{ord(char):04X}›"
    return char


def quoted(token: str | None) -> str:
    """Return a token for running text: in typographic quotes, white space visible."""
    return f"“{visible(token)}”"


def rounded(value: Any, digits: int = 4) -> float | int | None:
    """Round to significant digits for a compact data block; NaN, infinity and null become None."""
    if value is None or isinstance(value, bool):
        return None
    number = float(value)
    if not math.isfinite(number):
        return None
    number = float(f"{number:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number


def number(value: Any, digits: int = 3) -> str:
    """Write a number for reading: an en dash for null, counts with separators, few digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if 0.0 < size < 1e-3 or size >= 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}" if size < 1e3 else f"{value:,.0f}"


def json_block(value: Any) -> str:
    """Serialise for a ``<script type="application/json">`` element.

    ``<``, ``>``, ``&`` and the two Unicode line separators are written as escapes, so that no token
    can end the element. Raises ValueError on NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_JSON_ESCAPES)
