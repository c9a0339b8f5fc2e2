"""From tokens to text, one token at a time: whole characters, kept spaces, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerscope.models.vocabulary import REPLACEMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokeniser:
    """Turns tokens into text as they come; the pieces add up to the text of the whole.

    Decoding tokens one by one loses what lies between them: a character whose bytes are spread
    over several tokens, the space that a decoder strips from the front of a text. So a token is
    decoded together with those before it, and only what it adds is given out; an incomplete
    character is held back until its last byte comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = 0
        self._read = len(self._ids)
        # What is known of ids[start:read]; an incomplete character there is for us to finish.
        text = self._decode(0)
        self._known = text.rstrip(REPLACEMENT)
        self._between = self._known == text  # whether ids[read:] begins between two characters

    def push(self, token: int) -> str:
        """Return what this token adds; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._start)
        return "" if text.endswith(REPLACEMENT) else self._give(text)

    def finish(self) -> str:
        """Return what was held back: the token's own U+FFFD for characters never completed."""
        return self._give(self._decode(self._start)) if self._read < len(self._ids) else ""

    def _give(self, text: str) -> str:
        new = text[len(self._known) :]
        if not text.startswith(self._known):  # broken bytes: the decoder took the known ones along
            new = self._decode(self._read)
        if new and self._between:
            self._start = self._read
            self._known = self._decode(self._start)
        else:  # a token without text gives a decoder nothing to hold on to: keep what was there
            self._known = text
        self._between = True
        self._read = len(self._ids)
        return new

    def _decode(self, start: int) -> str:
        return decode(self._tokenizer, self._ids[start:])


class StopStrings:
    """Watches a text that comes in pieces, and ends it where one of several strings begins."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return what is certainly before any stop string; the rest is held back."""
        self._held += piece
        found = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
            return given
        keep = max((self._overlap(string) for string in self._strings), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given

    def finish(self) -> str:
        """Return what was held back, when nothing follows."""
        given, self._held = self._held, ""
        return given

    def _overlap(self, string: str) -> int:
        """Return how much of the text's end may be the beginning of a stop string."""
        longest = min(len(self._held), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ids without special tokens, with every space as it is."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
