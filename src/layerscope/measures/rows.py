"""Column access for one pass through one lens, as numpy arrays with NaN for null."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from layerscope.errors import TableError
from layerscope.measures.table import LayersTable, PromptInfo, conform


class Columns:
    """The columns of a frame, each converted once, however many passes are slices of it."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame
        self._names = frozenset(frame.columns)
        self.names = tuple(frame.columns)
        self.floats = cache(self._floats)
        self.true = cache(self._true)
        self.known = cache(self._known)
        self.entry_floats = cache(self._entry_floats)
        self.entries = cache(self._entries)

    @cached_property
    def layers(self) -> Int[np.ndarray, " row"]:
        """Row indices (0 = embedding)."""
        return self.frame["layer"].to_numpy()

    def _floats(self, name: str) -> Float[np.ndarray, " row"]:
        if name not in self._names:
            return np.full(self.frame.height, np.nan)
        return _as_floats(self.frame[name])

    def _true(self, name: str) -> Bool[np.ndarray, " row"]:
        if name not in self._names:
            return np.zeros(self.frame.height, dtype=bool)
        return self.frame[name].fill_null(False).to_numpy().astype(bool)

    def _known(self, name: str) -> Bool[np.ndarray, " row"]:
        if name not in self._names:
            return np.zeros(self.frame.height, dtype=bool)
        return self.frame[name].is_not_null().to_numpy()

    def _entry_floats(self, name: str, index: int) -> Float[np.ndarray, " row"]:
        return _as_floats(self._entry(name, index))

    def _entries(self, name: str, index: int) -> list[Any]:
        return self._entry(name, index).to_list()

    def _entry(self, name: str, index: int) -> pl.Series:
        return self.frame[name].list.get(index, null_on_oob=True)


def _as_floats(column: pl.Series) -> Float[np.ndarray, " row"]:
    return column.cast(pl.Float64).fill_null(float("nan")).to_numpy()


@dataclass(frozen=True)
class PassRows:
    """The last-position rows of one pass through one lens, ascending by layer.

    They are the rows `start` to `stop - 1` of `columns`.
    """

    prompt: PromptInfo
    lens: str
    columns: Columns
    start: int
    stop: int
    n_layers: int

    @property
    def frame(self) -> pl.DataFrame:
        """The rows as a frame."""
        return self.columns.frame[self.start : self.stop]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all columns."""
        return self.columns.names

    @property
    def layers(self) -> Int[np.ndarray, " row"]:
        """Row indices (0 = embedding)."""
        return self.columns.layers[self.start : self.stop]

    def has(self, name: str) -> bool:
        """Say whether a column exists and holds at least one value."""
        return bool(self.known(name).any())

    def floats(self, name: str) -> Float[np.ndarray, " row"]:
        """Return a numeric column as float64; null, and a column that is absent, become NaN."""
        return self.columns.floats(name)[self.start : self.stop]

    def true(self, name: str) -> Bool[np.ndarray, " row"]:
        """Return where a boolean column is true; null, and a column that is absent, are false."""
        return self.columns.true(name)[self.start : self.stop]

    def known(self, name: str) -> Bool[np.ndarray, " row"]:
        """Return where a column is not null."""
        return self.columns.known(name)[self.start : self.stop]

    def entries(self, name: str, index: int) -> list[Any]:
        """Return the entry of a list column at an index, None where the list is shorter or null."""
        return self.columns.entries(name, index)[self.start : self.stop]

    def entry_floats(self, name: str, index: int) -> Float[np.ndarray, " row"]:
        """Return the entry of a list of numbers at an index, NaN where it is missing."""
        return self.columns.entry_floats(name, index)[self.start : self.stop]

    def at(self, name: str, layer: int | None) -> float | None:
        """Return a numeric value at a layer, None when the layer or the value is missing."""
        if layer is None:
            return None
        hits = np.flatnonzero(self.layers == layer)
        if not hits.size:
            return None
        value = float(self.floats(name)[hits[0]])
        return None if np.isnan(value) else value


def pass_rows(table: LayersTable) -> dict[tuple[int, str], PassRows]:
    """Split a table's last-position rows by (prompt_index, lens), in the order of the passes.

    Raises TableError when a value does not fit the schema or a row occurs twice.
    """
    try:
        last = conform(table.rows.filter(pl.col("is_last")))
    except pl.exceptions.PolarsError as error:
        raise TableError(
            f"the table holds a value that does not fit its column: {error}"
        ) from error
    key = ["prompt_index", "lens", "layer"]
    if last.select(key).is_duplicated().any():
        raise TableError("the table holds two last-position rows of one prompt, lens and layer")
    columns, spans, start = Columns(last), dict[tuple[int, str], tuple[int, int]](), 0
    # `conform` sorts, so the rows of one pass through one lens lie together.
    counts = last.group_by("prompt_index", "lens", maintain_order=True).len()
    for index, lens, count in counts.iter_rows():
        spans[index, lens] = (start, start + count)
        start += count
    lenses = table.lenses
    found: dict[tuple[int, str], PassRows] = {}
    for prompt in table.passes():
        for lens in lenses:
            span = spans.get((prompt.prompt_index, lens))
            if span is not None:
                found[prompt.prompt_index, lens] = PassRows(
                    prompt, lens, columns, *span, n_layers=table.meta.n_layers
                )
    return found
