r"""The CSV dialect of the file contract.

Comma, double quote only where needed, backslash as escape character (itself doubled), ``\n`` line
ends, UTF-8; None is an empty cell, booleans are True and False, floats are Python's shortest repr.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

import polars as pl

from layerscope.files import atomic_path

_BOTH = "\r\n"


class Contract(csv.Dialect):
    """The dialect, for `csv.reader` and `csv.writer`."""

    delimiter = ","
    quotechar = '"'
    escapechar = "\\"
    doublequote = True
    lineterminator = "\n"
    quoting = csv.QUOTE_MINIMAL


def write_csv(path: Path, frame: pl.DataFrame) -> Path:
    """Write a frame of scalars to `path`, atomically; raises OutputError."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.writer(_LineEnds(stream), dialect=Contract, lineterminator=_BOTH)
        writer.writerow(frame.columns)
        writer.writerows(frame.iter_rows())
    return path


class _LineEnds:
    """Ends lines as the contract says, although the writer was told of both line-end characters.

    A writer quotes a cell that holds a character of its line end: without this, a token that is a
    carriage return would be written bare, and be read as the end of the row.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, row: str) -> int:
        return self.stream.write(row.removesuffix(_BOTH) + Contract.lineterminator)
