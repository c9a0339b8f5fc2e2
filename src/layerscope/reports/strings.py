"""A table of distinct token strings, so that the page stores each of them once."""

from __future__ import annotations

import json
from collections.abc import Iterable

from layerscope.reports.text import visible


class StringTable:
    """Gives every distinct token a small number; the texts have their white space made visible."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self.texts: list[str] = []
        self.bytes = 0  # what the texts take in the data block, quotes and commas included

    def add(self, token: str | None) -> int:
        """Return the number of a token, -1 for null."""
        if token is None:
            return -1
        found = self._index.get(token)
        if found is None:
            found = self._index[token] = len(self.texts)
            text = visible(token)
            self.texts.append(text)
            self.bytes += len(json.dumps(text, ensure_ascii=False).encode()) + 1
        return found

    def add_all(self, tokens: Iterable[str | None] | None) -> list[int]:
        """Return the numbers of several tokens; an empty list for null."""
        return [self.add(token) for token in tokens or ()]
