"""Column access for one pass through one lens, as numpy arrays with NaN for null."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from layerscope.errors import TableError
from layerscope.measures.table import LayersTable, PromptInfo, conform


@dataclass(frozen=True)
class PassRows:
    """The last-position rows of one pass through one lens, ascending by layer."""

    prompt: PromptInfo
    lens: str
    frame: pl.DataFrame
    n_layers: int

    @cached_property
    def layers(self) -> Int[np.ndarray, " row"]:
        """Row indices (0 = embedding)."""
        return self.frame["layer"].to_numpy()

    def has(self, name: str) -> bool:
        """Say whether a column exists and holds at least one value."""
        return name in self.frame.columns and self.frame[name].null_count() < self.frame.height

    @cached_property
    def _floats(self) -> dict[str, Float[np.ndarray, " row"]]:
        return {}

    def floats(self, name: str) -> Float[np.ndarray, " row"]:
        """Return a numeric column as float64; null, and a column that is absent, become NaN."""
        if name not in self._floats:
            self._floats[name] = (
                self.frame[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
                if name in self.frame.columns
                else np.full(self.frame.height, np.nan)
            )
        return self._floats[name]

    def true(self, name: str) -> Bool[np.ndarray, " row"]:
        """Return where a boolean column is true; null, and a column that is absent, are false."""
        if name not in self.frame.columns:
            return np.zeros(self.frame.height, dtype=bool)
        return self.frame[name].fill_null(False).to_numpy().astype(bool)

    def known(self, name: str) -> Bool[np.ndarray, " row"]:
        """Return where a column is not null."""
        if name not in self.frame.columns:
            return np.zeros(self.frame.height, dtype=bool)
        return self.frame[name].is_not_null().to_numpy()

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
    parts = last.partition_by("prompt_index", "lens", as_dict=True, maintain_order=True)
    lenses = table.lenses
    found: dict[tuple[int, str], PassRows] = {}
    for prompt in table.passes():
        for lens in lenses:
            frame = parts.get((prompt.prompt_index, lens))
            if frame is not None:
                found[prompt.prompt_index, lens] = PassRows(
                    prompt, lens, frame, table.meta.n_layers
                )
    return found
