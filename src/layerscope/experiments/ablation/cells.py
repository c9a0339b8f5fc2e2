"""One prompt on the bench: its nodes ablated, disturbed as much at random, and in sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from layerscope.experiments.ablation.config import AblationConfig
from layerscope.experiments.ablation.reference import References, draw_of
from layerscope.experiments.patching.gather import finite
from layerscope.experiments.patching.questions import TokenQuestion
from layerscope.experiments.patching.twice import compared, spread
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import (
    Cell,
    Patch,
    Reader,
    Recording,
    batch_of,
    metric_of,
    naive_cells,
    record,
    run_cells,
)
from layerscope.interventions.patching.ablations import Ablation, Reference, ablation_cell
from layerscope.models import Site

NODE_KEYS = ("kind", "site", "unit", "place", "how")
CELL_SCHEMA = {
    "prompt": pl.String,
    "kind": pl.String,
    "site": pl.String,
    "layer": pl.Int64,
    "unit": pl.Int64,
    "place": pl.String,
    "position": pl.Int64,
    "token": pl.String,
    "how": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "base": pl.Float64,
    "effect": pl.Float64,
}
CONTROL_SCHEMA = {
    "prompt": pl.String,
    "kind": pl.String,
    "site": pl.String,
    "unit": pl.Int64,
    "place": pl.String,
    "how": pl.String,
    "set": pl.String,
    "size": pl.Int64,
    "draw": pl.Int64,
    "value": pl.Float64,
    "base": pl.Float64,
    "effect": pl.Float64,
}
# (kind, site, unit, place, how), as tables have them.
NodeKey = tuple[str, str, int | None, str, str]
# (kind, how, "top" or "random", draw, nodes)
SetKey = tuple[str, str, str, int, tuple[NodeKey, ...]]


@dataclass(frozen=True)
class Spot:
    """A site, or one unit of it, of a kind that was asked for."""

    kind: str
    site: Site
    unit: int | None

    def empty(self, columns: tuple[int, ...]) -> Cell:
        """Return a cell at these positions whose values are not looked at."""
        return Cell((Patch(self.site, columns, torch.zeros(len(columns)), self.unit),))


@dataclass(frozen=True, eq=False)
class Bench:
    """A recorded prompt, and what its ablations take their values from."""

    question: TokenQuestion
    runs: Recording
    references: dict[Ablation, Reference]
    reader: Reader
    config: AblationConfig

    @classmethod
    def of(
        cls,
        references: References,
        one: TokenQuestion,
        spots: Sequence[Spot],
        metrics: Sequence[str],
        config: AblationConfig,
    ) -> Bench:
        """Record a prompt for the ablation of some spots."""
        model = references.model
        sites = list(dict.fromkeys(str(spot.site) for spot in spots))
        runs = record(model, batch_of([one.ids]), capture=sites, products=config.products)
        values: dict[Ablation, Reference] = {
            how: references.for_prompt(one.ids, how, config.seed)
            for how in config.how
            if how != "zero"
        }
        chosen = tuple(metric_of(name) for name in metrics)
        reader = Reader(model, chosen, (one.targets,), runs.final, config.products)
        return cls(one, runs, values, reader, config)

    @staticmethod
    def columns_of(one: TokenQuestion, config: AblationConfig) -> list[tuple[int, ...]]:
        """Return the positions that are ablated together, BOS excluded."""
        width = len(one.ids)
        if config.positions == "all":
            return [tuple(range(one.front, width))]
        if config.positions == "last":
            return [(width - 1,)]
        return [(place.clean,) for place in one.places if place.clean >= one.front]

    def base(self) -> Tensor:
        """Return the metrics of the untouched prompt, [metric]."""
        return self.reader(self.runs.final, [0])[0]

    def patches(self, spots: Sequence[Spot], how: Ablation) -> dict[tuple[Spot, str], Patch]:
        """Return what ablates each spot at each place, by (spot, name of the place)."""
        found: dict[tuple[Spot, str], Patch] = {}
        whole: dict[tuple[Site, tuple[int, ...]], Patch] = {}
        for columns in self.columns_of(self.question, self.config):
            for spot in spots:
                key = (spot.site, columns)
                if key not in whole:
                    cell = ablation_cell(
                        self.runs,
                        spot.site,
                        how,
                        columns=columns,
                        reference=self.references.get(how),
                        other=0 if how == "resample" else None,
                        factor=self.config.noise_factor,
                        seed=draw_of(self.config.seed, [*self.question.ids, *columns], 2**31),
                    )
                    whole[key] = cell.patches[0]
                value = whole[key].value
                part = value if spot.unit is None else value[:, spot.unit]
                found[spot, self._place(columns)] = Patch(spot.site, columns, part, spot.unit)
        return found

    def sweep(self, spots: Sequence[Spot]) -> Piece:
        """Ablate every spot at every place in every way, and check some by full passes."""
        base = self.base()
        keys: list[tuple[Spot, str, Ablation, Patch]] = []
        for how in self.config.how:
            for (spot, place), patch in self.patches(spots, how).items():
                keys.append((spot, place, how, patch))
        cells = [Cell((patch,)) for *_, patch in keys]
        values = self._run(cells)
        columns: dict[str, list[Any]] = {name: [] for name in CELL_SCHEMA}
        for at, metric in enumerate(self.reader.metrics):
            plain = float(base[at])
            for (spot, place, how, patch), value in zip(keys, values[:, at].tolist(), strict=True):
                position = patch.columns[0] if self.config.positions != "all" else None
                row = {
                    "prompt": self.question.question.key,
                    "kind": spot.kind,
                    "site": str(spot.site),
                    "layer": spot.site.layer,
                    "unit": spot.unit,
                    "place": place,
                    "position": position,
                    "token": None if position is None else self.question.tokens[position],
                    "how": how,
                    "metric": metric.name,
                    "value": finite(value),
                    "base": finite(plain),
                    "effect": finite(value - plain),
                }
                for name, cell in row.items():
                    columns[name].append(cell)
        return Piece(pl.DataFrame(columns, schema=CELL_SCHEMA), self._check(cells, values))

    def control(
        self, spots: Sequence[Spot], nodes: Sequence[NodeKey], sets: Sequence[SetKey]
    ) -> Piece:
        """Disturb the strongest nodes at random, as far as their ablation moves them, and ablate
        sets of nodes together."""
        wanted = {node[1:3] for node in nodes} | {n[1:3] for one in sets for n in one[4]}
        needed = [spot for spot in spots if (str(spot.site), spot.unit) in wanted]
        patches: dict[NodeKey, Patch] = {}
        for how in self.config.how:
            for (spot, place), patch in self.patches(needed, how).items():
                patches[spot.kind, str(spot.site), spot.unit, place, how] = patch
        rows: list[dict[str, Any]] = []
        cells: list[Cell] = []
        for node in nodes:
            for draw in range(self.config.draws):
                if node in patches:
                    cells.append(Cell((self._disturbed(patches[node], node, draw),)))
                    rows.append({**dict(zip(NODE_KEYS, node, strict=True)), "draw": draw})
        for kind, how, which, draw, members in sets:
            together = tuple(patches[node] for node in members if node in patches)
            if len(together) == len(members):
                cells.append(Cell(together))
                row = {"kind": kind, "how": how, "set": which, "size": len(members), "draw": draw}
                rows.append(row)
        values = self._run(cells)[:, 0].tolist() if cells else []
        base = float(self.base()[0])
        shared = {"prompt": self.question.question.key, "base": finite(base)}
        found = [
            {**row, **shared, "value": finite(value), "effect": finite(value - base)}
            for row, value in zip(rows, values, strict=True)
        ]
        return Piece(pl.DataFrame(found, schema=CONTROL_SCHEMA))

    def _disturbed(self, patch: Patch, node: NodeKey, draw: int) -> Patch:
        """Return the node's own value, moved in a random direction as far as its ablation does."""
        own = self.runs.value(patch.site)[0, list(patch.columns)]
        if patch.unit is not None:
            own = own[:, patch.unit]
        wide = torch.promote_types(own.dtype, torch.float32)
        flat = (patch.value.to(wide) - own.to(wide)).reshape(len(patch.columns), -1)
        seed = draw_of(self.config.seed, self.question.ids, 2**31)
        generator = torch.Generator().manual_seed(
            draw_of(seed, [draw, *map(ord, str(node))], 2**62)
        )
        random = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat)
        random *= flat.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
        value = own.to(wide) + random.reshape(own.shape)
        return Patch(patch.site, patch.columns, value, patch.unit)

    def _run(self, cells: Sequence[Cell]) -> Tensor:
        return run_cells(self.runs, cells, self.reader, budget=self.config.budget_bytes)

    def _check(self, cells: Sequence[Cell], values: Tensor) -> dict[str, Any]:
        chosen = spread(len(cells), self.config.verify)
        if not chosen:
            return {"cells": 0}
        slow = naive_cells(self.runs, [cells[at] for at in chosen])
        return compared(self.reader(slow, [0] * len(chosen)), values[chosen])

    def _place(self, columns: tuple[int, ...]) -> str:
        if self.config.positions == "all":
            return "all"
        return next(place.label for place in self.question.places if place.clean == columns[0])
