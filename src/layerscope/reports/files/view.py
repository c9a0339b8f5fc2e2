"""A summary as the file writers look at it: its configuration and its baseline pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import polars as pl

from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.raw_norm import RawNorm, window_radius
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.reports.files.rows import last_rows

_CENTRES = ("L_semantic", "first_rank_le_5", "L_copy")


@dataclass(frozen=True)
class View:
    """One table with its summary."""

    table: LayersTable
    summary: Mapping[str, Any]

    @cached_property
    def config(self) -> MeasureConfig:
        """The thresholds behind the summary."""
        given: Mapping[str, Any] = self.summary.get("config") or {}
        known = {entry.name for entry in fields(MeasureConfig)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if name in known
        }
        return MeasureConfig(**values)

    @cached_property
    def baseline(self) -> Mapping[str, Any]:
        """The pass that single figures are about: the first fact in its original wording."""
        return self.summary["passes"][self.summary["baseline"]]

    @cached_property
    def baseline_part(self) -> PassRows:
        """The baseline's last-position rows as columns."""
        return pass_rows(self.table)[self.baseline["prompt_index"], self.baseline["lens"]]

    @property
    def sections(self) -> Mapping[str, Any]:
        """The checks that looked at the model again, by name."""
        return self.summary.get("diagnostics") or {}

    @cached_property
    def baseline_prompt(self) -> PromptInfo | None:
        """The prompt of the baseline pass."""
        index = self.baseline["prompt_index"]
        return next((item for item in self.table.passes() if item.prompt_index == index), None)

    @cached_property
    def baseline_key(self) -> str:
        """The key under which per-fact sections hold the baseline."""
        return self.baseline["fact_key"] or f"prompt {self.baseline['prompt_index']}"

    @cached_property
    def baseline_rows(self) -> Mapping[int, Mapping[str, Any]]:
        """The baseline's last-position rows by layer, each with its "csv_row_index".

        That is the number of its data row, from 0, among all last-position rows of its lens.
        """
        rows = last_rows(self.table, self.baseline["lens"]).with_row_index("csv_row_index")
        own = rows.filter(pl.col("prompt_index") == self.baseline["prompt_index"])
        return {row["layer"]: row for row in own.iter_rows(named=True)}

    def cite(self, layer: int | None) -> int | None:
        """Return the data row of a layer of the baseline in the pure-next-token file."""
        return None if layer is None else self.baseline_rows[layer]["csv_row_index"]

    def of_baseline(self, section: str) -> Mapping[str, Any]:
        """Return the baseline's entry of a per-fact section, empty where there is none."""
        return (self.summary.get(section) or {}).get(self.baseline_key) or {}

    @property
    def confirmed(self) -> Mapping[str, Any]:
        """The test of the baseline's onset by other lenses."""
        return self.of_baseline("confirmed_semantics")

    def has(self, *lenses: str) -> bool:
        """Say whether the table holds all these lenses."""
        return set(lenses) <= set(self.table.lenses)

    def checked_layers(self) -> list[Sequence[int]]:
        """Return, per pass of the table, the layers around its milestones that both lenses have."""
        rows = pass_rows(self.table)
        passes = {
            entry["prompt_index"]: entry
            for entry in self.summary["passes"]
            if entry["lens"] == "norm"
        }
        found: list[Sequence[int]] = []
        for prompt in self.table.passes():
            norm = rows.get((prompt.prompt_index, "norm"))
            raw = rows.get((prompt.prompt_index, "raw"))
            entry = passes.get(prompt.prompt_index)
            if norm is None or raw is None or entry is None:
                found.append(())
                continue
            check = RawNorm(norm, raw)
            radius = window_radius(check.sample(self.config), self.config)
            found.append(
                check.window(_centres(entry, self.config), radius=radius)["layers_checked"]
            )
        return found


def _centres(entry: Mapping[str, Any], config: MeasureConfig) -> list[int]:
    layers = [entry.get(name) for name in _CENTRES]
    if config.kl_thresholds_bits:
        layers.append(entry.get(f"first_kl_below_{decimal(max(config.kl_thresholds_bits))}"))
    layers.append(soft_copy(entry)[1])
    return [layer for layer in layers if layer is not None]


def soft_copy(entry: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return (window length, layer) of a pass's earliest soft copy; the shorter window on a tie."""
    layers: Mapping[str, int | None] = entry.get("L_copy_soft") or {}
    found = {int(k): layer for k, layer in layers.items() if layer is not None}
    if not found:
        return None, None
    layer, k = min((layer, k) for k, layer in found.items())
    return k, layer
