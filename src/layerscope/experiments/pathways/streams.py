"""Records of JSON files one by one, so that memory does not grow with the file.

A file is an array of records, an object that holds one (under ``results``, ``responses``,
``trials`` or ``records``) beside its own fields, or JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_ARRAYS = ("results", "responses", "trials", "records")
_SPACE = " \t\r\n"
_TAIL = 32  # longer than any literal, escape or number that may be cut


class StreamError(Exception):
    """A file stops being JSON; `offset` is the byte where the record that fails begins."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.offset = offset


class RecordStream:
    """Iterate over the records of one file; `fields` fills with the object's own fields.

    Raises:
        StreamError: while iterating, where the file is cut or is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._passed = 0  # bytes of text that is no longer held

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as self._stream:
            try:
                if self.path.suffix == ".jsonl":
                    yield from self._lines()
                else:
                    yield from self._document()
            except UnicodeDecodeError as error:
                raise StreamError(f"not UTF-8: {error.reason}", self._offset()) from None

    def _lines(self) -> Iterator[Any]:
        for line in self._stream:
            text = line.decode("utf-8")
            if text.strip():
                try:
                    yield json.loads(text)
                except json.JSONDecodeError as error:
                    raise StreamError(error.msg, self._passed) from None
            self._passed += len(line)

    def _document(self) -> Iterator[Any]:
        first = self._peek()
        if first == "[":
            self._at += 1
            yield from self._array()
        elif first == "{":
            self._at += 1
            yield from self._object()
        else:
            raise StreamError("neither an array nor an object", self._offset())
        if self._peek(at_end=True) != "":
            raise StreamError("more follows the end of the document", self._offset())

    def _array(self) -> Iterator[Any]:
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield self._value()
            if self._separator("]"):
                return

    def _object(self) -> Iterator[Any]:
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            name = self._value()
            if not isinstance(name, str) or self._peek() != ":":
                raise StreamError("a field without a name or value", self._offset())
            self._at += 1
            if name in _ARRAYS and self._peek() == "[":
                self._at += 1
                yield from self._array()
            else:
                self.fields[name] = self._value()
            if self._separator("}"):
                return

    def _separator(self, end: str) -> bool:
        found = self._peek()
        if found not in (",", end):
            raise StreamError(f"',' or '{end}' is missing", self._offset())
        self._at += 1
        return found == end

    def _value(self) -> Any:
        """Decode the value that begins here, reading on until it is whole."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A fault well before the end of what was read is no matter of reading on.
                whole = not error.msg.startswith("Unterminated")
                if (whole and error.pos < len(self._text) - _TAIL) or not self._more():
                    raise StreamError(error.msg, self._offset()) from None
                continue
            # A number at the very end of what was read may go on.
            if end == len(self._text) and not isinstance(value, str | list | dict) and self._more():
                continue
            self._at = end
            return value

    def _peek(self, *, at_end: bool = False) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                if at_end:
                    return ""
                raise StreamError("the file ends too early", self._offset())

    def _more(self) -> bool:
        """Read a further piece, forgetting what was consumed; False at the end of the file."""
        # As much again as is held, so that one long record is not scanned over and over.
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        if not data:
            return False
        while data[-1] >= 0x80:  # never cut a character in two
            further = self._stream.read(1)
            if not further:
                break
            data += further
        self._passed += len(self._text[: self._at].encode("utf-8"))
        self._text = self._text[self._at :] + data.decode("utf-8")
        self._at = 0
        return True

    def _offset(self) -> int:
        return self._passed + len(self._text[: self._at].encode("utf-8"))
