"""Every edge of one pair: measured, some of them a second time, and as another pair says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from layerscope.experiments.patching.gather import finite
from layerscope.experiments.patching.twice import compared, spread
from layerscope.experiments.path_patching.check import two_passes
from layerscope.experiments.path_patching.config import PathConfig
from layerscope.experiments.path_patching.summary import EDGE_KEYS, EdgeKey
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import (
    Cell,
    Cost,
    Patch,
    Reader,
    Recording,
    TokenPair,
    cost_of_cells,
    metric_of,
    recovery,
)
from layerscope.interventions.patching.paths import Edge, record_for_paths, run_paths
from layerscope.models import LanguageModel, Site

EDGE_SCHEMA = {
    "pair": pl.String,
    "sender": pl.String,
    "receiver": pl.String,
    "place": pl.String,
    "position": pl.Int64,
    "token": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "base": pl.Float64,
    "donor": pl.Float64,
    "recovery": pl.Float64,
}
CONTROL_SCHEMA = {
    "pair": pl.String,
    "other": pl.String,
    **{name: EDGE_SCHEMA[name] for name in EDGE_KEYS},
    "value": pl.Float64,
    "recovery": pl.Float64,
}
# (index of the edge, position) of one number to measure; no position for all of them.
Item = tuple[int, int | None]


@dataclass(frozen=True, eq=False)
class EdgesOf:
    """The edges of a run in one of its pairs."""

    model: LanguageModel
    config: PathConfig
    edges: tuple[Edge, ...]
    pair: TokenPair

    def items(self) -> list[Item]:
        """Return every number to measure, in the order of the table."""
        width = len(self.pair.clean)
        places: dict[str, list[int | None]] = {
            "all": [None],
            "last": [width - 1],
            "each": list(range(width)),
        }
        chosen = places[self.config.positions]
        return [(at, place) for at in range(len(self.edges)) for place in chosen]

    def measure(self) -> Piece:
        """Measure every edge, and some of them a second time."""
        config, pair = self.config, self.pair
        runs = self._record(None)
        items = self.items()
        values = self._values(runs, items, pair.same)
        ends = runs.ends()
        columns: dict[str, list[Any]] = {name: [] for name in EDGE_SCHEMA}
        for index, metric in enumerate(config.metrics):
            base, donor = (float(end) for end in ends[:, index])
            shares = recovery(values[:, index], base, donor)
            for item, (at, place) in enumerate(items):
                row = {
                    **dict(zip(EDGE_KEYS, self._key(at, place), strict=True)),
                    "pair": pair.pair.key,
                    "position": place,
                    "token": None if place is None else pair.tokens[place],
                    "metric": metric,
                    "value": finite(float(values[item, index])),
                    "base": finite(base),
                    "donor": finite(donor),
                    "recovery": None if shares is None else finite(float(shares[item])),
                }
                for name, cell in row.items():
                    columns[name].append(cell)
        rows = pl.DataFrame(columns, schema=EDGE_SCHEMA)
        return Piece(rows, self._check(runs, items, values))

    def control(self, other: TokenPair, chosen: Sequence[EdgeKey]) -> Piece:
        """Measure some edges with what another pair's prompt would say."""
        runs = self._record(other)
        items = {self._key(at, place): (at, place) for at, place in self.items()}
        kept = [key for key in chosen if key in items]
        values = self._values(runs, [items[key] for key in kept], 0)[:, 0]
        base, donor = (float(end) for end in self._record(None).ends()[:, 0])
        shares = recovery(values, base, donor)
        rows = [
            {
                "pair": self.pair.pair.key,
                "other": other.pair.key,
                **dict(zip(EDGE_KEYS, key, strict=True)),
                "value": finite(float(values[index])),
                "recovery": None if shares is None else finite(float(shares[index])),
            }
            for index, key in enumerate(kept)
        ]
        return Piece(pl.DataFrame(rows, schema=CONTROL_SCHEMA))

    def cost(self) -> Cost:
        """Return what they compute: a block each for what is heard, then the climbs."""
        model, config, n_columns = self.model, self.config, len(self.pair.clean)
        places = n_columns - self.pair.same if config.positions == "each" else 1
        everything = tuple(range(n_columns))
        heard = [edge for edge in self.edges if edge.receiver.input != "logits"]
        # Only where a cell acts decides what it costs; its values are not looked at.
        cells = [
            Cell(
                (Patch(Site("resid_pre", edge.receiver.layer), everything, torch.zeros(n_columns)),)
            )
            for edge in heard
        ]
        climbs = cost_of_cells(
            model,
            cells * places,
            n_columns,
            recorded=2 * n_columns,
            budget=config.budget_bytes,
            whole=any(metric_of(name).whole for name in config.metrics),
        )
        groups = {(edge.receiver.input, edge.receiver.layer) for edge in self.edges}
        return climbs + Cost(
            cells=(len(self.edges) - len(heard)) * places,
            idle=0,
            passes=len(groups) * places,
            blocks=len(groups) * places,
            block_tokens=len(heard) * places * n_columns,
            naive_block_tokens=len(self.edges) * places * model.n_layers * n_columns,
            recorded_tokens=0,
            read_tokens=0,
            bytes=0,
        )

    def _record(self, other: TokenPair | None) -> _Runs:
        """Run the pair, and where there is another pair, let that one's prompt be the donor."""
        pair, config = self.pair, self.config
        denoise = config.direction == "denoise"
        ids = [pair.clean, pair.corrupt]
        base, donor = (1, 0) if denoise else (0, 1)
        if other is not None:
            ids.append(other.clean if denoise else other.corrupt)
            donor = 2
        senders = list(dict.fromkeys(edge.sender for edge in self.edges))
        recording = record_for_paths(
            self.model, torch.tensor(ids), senders, products=config.products
        )
        reader = Reader(
            self.model,
            tuple(metric_of(name) for name in config.metrics),
            (pair.targets,) * len(ids),
            recording.final[:1].expand(len(ids), -1),
            config.products,
        )
        return _Runs(recording, base, donor, reader)

    def _values(self, runs: _Runs, items: Sequence[Item], shared: int) -> Tensor:
        """Return the metrics of items, [item, metric]; the first `shared` tokens cannot differ."""
        values = runs.ends()[:1].repeat(len(items), 1)
        by_place: dict[int | None, list[int]] = {}
        for index, (_, place) in enumerate(items):
            if place is None or place >= shared:
                by_place.setdefault(place, []).append(index)
        for place, indices in by_place.items():
            values[indices] = run_paths(
                runs.recording,
                [self.edges[items[index][0]] for index in indices],
                runs.reader,
                base_row=runs.base,
                donor_row=runs.donor,
                positions=None if place is None else [place],
                budget=self.config.budget_bytes,
            )
        return values

    def _check(self, runs: _Runs, items: Sequence[Item], values: Tensor) -> dict[str, Any]:
        """Compute a few edges again by full passes with everything else frozen."""
        chosen = spread(len(items), self.config.verify)
        if not chosen:
            return {"cells": 0}
        final = [
            two_passes(
                runs.recording,
                self.edges[items[at][0]],
                base_row=runs.base,
                donor_row=runs.donor,
                position=items[at][1],
            )
            for at in chosen
        ]
        again = runs.reader(torch.stack(final), [runs.base] * len(chosen))
        return compared(again, values[chosen])

    def _key(self, at: int, place: int | None) -> EdgeKey:
        """Name an edge and a position; the last one by that name, so that all pairs share it."""
        edge = self.edges[at]
        name = "all" if place is None else str(place)
        if place == len(self.pair.clean) - 1:
            name = "last"
        return str(edge.sender), str(edge.receiver), name


@dataclass(frozen=True, eq=False)
class _Runs:
    """Rows of a pair: what is patched and what speaks; read as the pair's own answers."""

    recording: Recording
    base: int
    donor: int
    reader: Reader

    def ends(self) -> Tensor:
        """Return the metrics of base and donor, [2, metric]."""
        return self.reader(self.recording.final[[self.base, self.donor]], [self.base] * 2)
