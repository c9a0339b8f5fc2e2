"""Text as a stream of documents: plain files, JSON lines, Parquet, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from layerscope.errors import ConfigError, nearest

PIECE_CHARACTERS = 2048  # a plain file is cut after a blank line once a piece is this long
LONGEST_LINE = 16_384
PARQUET_ROWS = 512
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
DEMO = "layerscope-demo"  # as a location: what the embedded model was trained on
DEMO_DOCUMENTS = 200_000  # some 8 million of its tokens; its grammar would go on for ever


@dataclass(frozen=True)
class TextSource:
    """Where text comes from; read anew at every call of `documents`, one document at a time.

    Attributes:
        location: a file (``.jsonl`` and ``.parquet`` by their suffix, anything else is plain text)
            or the name or folder of a Hugging Face dataset; `layerscope-demo` is text like that
            which the embedded model was trained on, made as it is read.
        field: which field or column of a record holds the text.
        split: which split of a Hugging Face dataset; of `layerscope-demo`, anything but "train" is
            its validation text.
    """

    location: str
    field: str = "text"
    split: str = "train"

    @property
    def kind(self) -> str:
        """ "plain", "jsonl", "parquet", "dataset" or "demo"."""
        path = Path(self.location)
        if not path.is_file():
            return "demo" if self.location == DEMO and not path.exists() else "dataset"
        if path.suffix in PARQUET_SUFFIXES:
            return "parquet"
        return "jsonl" if path.suffix in JSON_SUFFIXES else "plain"

    @property
    def continuous(self) -> bool:
        """Whether documents are pieces of one text, so that nothing belongs between them."""
        return self.kind == "plain"

    def documents(self) -> Iterator[str]:
        """Yield the documents that are not empty.

        Raises:
            ConfigError: the source does not exist, is not UTF-8, or a record has no such field.
        """
        readers = {
            "plain": self._plain,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "dataset": self._dataset,
            "demo": self._demo,
        }
        for text in readers[self.kind]():
            if text.strip():
                yield text

    def _lines(self) -> Iterator[str]:
        try:
            with Path(self.location).open(encoding="utf-8", newline="") as stream:
                while line := stream.readline(LONGEST_LINE if self.kind == "plain" else -1):
                    yield line
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.location} is not UTF-8 text (byte {error.start}); convert it, or give a "
                "JSON lines or Parquet file"
            ) from error
        except OSError as error:
            raise ConfigError(f"cannot read {self.location}: {error.strerror}") from error

    def _plain(self) -> Iterator[str]:
        piece: list[str] = []
        length = 0
        for line in self._lines():
            piece.append(line)
            length += len(line)
            if length >= LONGEST_LINE or (length >= PIECE_CHARACTERS and not line.strip()):
                yield "".join(piece)
                piece, length = [], 0
        yield "".join(piece)

    def _jsonl(self) -> Iterator[str]:
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    f"line {number} of {self.location} is not JSON: {error}; one record a line"
                ) from error
            yield self._text_of(record, f"line {number} of {self.location}")

    def _parquet(self) -> Iterator[str]:
        import polars as pl

        try:
            scan = pl.scan_parquet(self.location)
            columns = scan.collect_schema().names()
            self._check_field(columns, self.location)
            first = 0
            while len(part := scan.select(self.field).slice(first, PARQUET_ROWS).collect()):
                for text in part[self.field]:
                    yield self._text_of({self.field: text}, self.location)
                first += len(part)
        except pl.exceptions.PolarsError as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"{self.location} is not a readable Parquet file: {line}") from error

    def _dataset(self) -> Iterator[str]:
        try:
            import datasets  # pyright: ignore[reportMissingImports] - optional
        except ImportError:
            raise ConfigError(
                f"'{self.location}' is no file; to read it as a Hugging Face dataset, install "
                "datasets (pip install datasets)"
            ) from None
        library: Any = datasets
        try:
            if (Path(self.location) / "dataset_info.json").exists():
                found = library.load_from_disk(self.location)
            elif (Path(self.location) / "dataset_dict.json").exists():
                found = library.load_from_disk(self.location)[self.split]
            else:
                found = library.load_dataset(self.location, split=self.split, streaming=True)
        # The library raises errors of many packages; whatever it raises means one thing.
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"'{self.location}' is neither a file nor a readable Hugging Face dataset with a "
                f"split '{self.split}': {line}"
            ) from error
        for record in cast("Iterable[Any]", found):
            yield self._text_of(record, self.location)

    def _demo(self) -> Iterator[str]:
        from layerscope.demo.corpus import SEED, documents

        made = documents(SEED, validation=self.split != "train")
        for document in islice(made, DEMO_DOCUMENTS):
            yield document.text

    def _check_field(self, names: Iterable[str], where: str) -> None:
        known = list(names)
        if self.field not in known:
            raise ConfigError(
                f"{where} has no field '{self.field}'{nearest(self.field, known)}; it has "
                f"{', '.join(known[:8]) or 'none'}"
            )

    def _text_of(self, record: Any, where: str) -> str:
        if not isinstance(record, dict):
            raise ConfigError(f"{where} is not a record with a field '{self.field}'")
        known = cast("dict[str, Any]", record)
        self._check_field(known, where)
        text = known[self.field]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ConfigError(
                f"field '{self.field}' of {where} holds a {type(text).__name__}, not text"
            )
        return text
