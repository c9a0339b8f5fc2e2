"""The patching experiment: every node of every pair, as tables, a plan and its own check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import torch

from layerscope.experiments import provenance
from layerscope.experiments.patching.config import PatchConfig
from layerscope.experiments.patching.control import strangers, with_donor
from layerscope.experiments.patching.gather import PairSet, finite, gather
from layerscope.experiments.patching.summary import NODE_KEYS, NodeKey, strongest, summarise
from layerscope.experiments.patching.twice import compared, spread
from layerscope.experiments.units import (
    Outcome,
    Piece,
    Progress,
    UnitStore,
    Work,
    describe_run,
    run_units,
    shifted,
    work_key,
)
from layerscope.interventions.patching import (
    NO_COST,
    Cost,
    Node,
    PromptPair,
    Speed,
    TokenPair,
    calibrate,
    check_budget,
    cost_of,
    metric_of,
    naive_cells,
    nodes_of,
    record_pair,
    recovery,
    sites_of_kind,
    sweep,
)
from layerscope.models import LanguageModel

CELL_SCHEMA = {
    "pair": pl.String,
    "kind": pl.String,
    "site": pl.String,
    "layer": pl.Int64,
    "unit": pl.Int64,
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
    **{name: CELL_SCHEMA[name] for name in NODE_KEYS},
    "value": pl.Float64,
    "recovery": pl.Float64,
}


@dataclass(frozen=True)
class PatchPlan:
    """A run that is ready: everything checked, the pairs that take part known, nothing patched.

    Attributes:
        chosen: the pairs, those that take part and the others.
        cost: of all sweeps. speed: of this machine; None where it was not measured.
    """

    model: LanguageModel
    config: PatchConfig
    chosen: PairSet
    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all sweeps."""
        return None if self.speed is None else self.speed.seconds(self.cost, self.model.n_layers)

    def describe(self) -> str:
        """Return the plan in one line."""
        cost = self.cost
        saved = cost.naive_block_tokens / max(cost.block_tokens, 1)
        time = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        pairs = f"{len(self.chosen.used)} of {len(self.chosen.given)} pairs"
        return (
            f"{pairs}, {cost.cells} cells in {cost.passes} passes{time} and "
            f"{cost.bytes / 2**20:.0f} MiB; {saved:.1f} times less computed than with one full "
            "pass per cell"
        )


def patch(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: PatchConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Patch every pair as the configuration says.

    Raises:
        PromptError: no pair can be used. ConfigError, SiteError, CapabilityError: the settings do
            not fit the model, or the run is beyond its budget; before anything is patched.
    """
    return execute(plan(model, pairs, config), units=units, progress=progress)


def plan(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: PatchConfig | None = None,
    *,
    timed: bool = True,
) -> PatchPlan:
    """Check everything, see which pairs the model answers, and predict the cost.

    Args:
        timed: measure this machine for the prediction (a few short passes).
    """
    config = config or PatchConfig()
    for kind in config.sites:
        sites_of_kind(model, kind, config.layers)
    chosen = gather(
        model,
        pairs,
        metrics=config.metrics,
        answered=config.answered,
        keep_wrong=config.keep_wrong,
        products=config.products,
    )
    used = chosen.used
    cost = NO_COST
    whole = any(metric_of(name).whole for name in config.metrics)
    for one in used:
        for kind in config.sites:
            nodes = _nodes(model, one, kind, config)
            cost += cost_of(model, one, nodes, budget=config.budget_bytes, whole=whole)
    speed = None
    if timed:
        speed = calibrate(model, used[0], products=config.products)
    planned = PatchPlan(model, config, chosen, cost, speed)
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def execute(
    planned: PatchPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan: a work unit per pair and kind, then one per pair for the control."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = [model.provenance(), provenance.versions()]
    settings = {**config.to_dict(), "max_seconds": None, "max_bytes": None}
    works: list[Work] = []
    for pair in planned.chosen.used:
        for kind in config.sites:
            nodes = _nodes(model, pair, kind, config)
            key = work_key("patch", {**settings, "sites": [kind]}, pair.pair.to_dict(), *identity)
            works.append(Work(key, _Unit(planned, pair, nodes), size=len(nodes)))
    others = _others(planned)
    size = sum(work.size for work in works)
    total = size + len(others)
    pieces = run_units(works, units=units, progress=shifted(progress, 0, total))
    watch.lap("patch")
    cells = pl.concat([piece.rows for piece in pieces])
    top = strongest(cells, config.metrics[0])
    works = []
    for pair in planned.chosen.used:
        other = others.get(pair.pair.key)
        if other is not None:
            texts = (pair.pair.to_dict(), other.pair.to_dict())
            key = work_key("patch", "control", settings, texts, top, *identity)
            works.append(Work(key, partial(_control, planned, pair, other, cells, top)))
    beside = run_units(works, units=units, progress=shifted(progress, size, total))
    watch.lap("control")
    rows = [piece.rows for piece in beside]
    control = pl.concat(rows) if rows else pl.DataFrame(schema=CONTROL_SCHEMA)
    table = planned.chosen.table()
    checks = [piece.payload for piece in pieces if piece.payload.get("cells")]
    summary = summarise(cells, control, table, planned.cost, checks, config)
    return Outcome(
        {"cells": cells, "control": control, "pairs": table},
        summary,
        describe_run(
            "patch",
            model,
            config.to_dict(),
            watch,
            read=[ids for pair in planned.chosen.used for ids in (pair.clean, pair.corrupt)],
            model_name=model.name,
            plan={
                **planned.cost.to_dict(),
                "predicted_seconds": planned.seconds,
                "text": planned.describe(),
            },
        ),
    )


@dataclass(frozen=True)
class _Unit:
    """One pair and one kind of site."""

    planned: PatchPlan
    pair: TokenPair
    nodes: Sequence[Node]

    def __call__(self) -> Piece:
        model, config, pair = self.planned.model, self.planned.config, self.pair
        values = sweep(
            model,
            pair,
            self.nodes,
            config.metrics,
            direction=config.direction,
            products=config.products,
            budget=config.budget_bytes,
        )
        tokens = pair.tokens
        columns: dict[str, list[Any]] = {name: [] for name in CELL_SCHEMA}
        for at, metric in enumerate(config.metrics):
            base, donor = float(values.base[at]), float(values.donor[at])
            recovered = recovery(values.cells[:, at], base, donor)
            rows = zip(
                self.nodes,
                values.cells[:, at].tolist(),
                [None] * len(self.nodes) if recovered is None else recovered.tolist(),
                strict=True,
            )
            for node, value, share in rows:
                place = node.place
                row = {
                    "pair": pair.pair.key,
                    "kind": node.kind,
                    "site": str(node.site),
                    "layer": node.site.layer,
                    "unit": node.unit,
                    "place": _label(node),
                    "position": None if place is None else place.clean,
                    "token": None if place is None else tokens[place.clean],
                    "metric": metric,
                    "value": finite(value),
                    "base": finite(base),
                    "donor": finite(donor),
                    "recovery": None if share is None else finite(share),
                }
                for name, cell in row.items():
                    columns[name].append(cell)
        return Piece(pl.DataFrame(columns, schema=CELL_SCHEMA), self._check(values.cells))

    def _check(self, values: torch.Tensor) -> dict[str, Any]:
        """Compute a few cells again, each by a full pass of its own, and compare the metrics."""
        config, model = self.planned.config, self.planned.model
        chosen = spread(len(self.nodes), config.verify)
        if not chosen:
            return {"cells": 0}
        nodes = [self.nodes[at] for at in chosen]
        runs = record_pair(
            model, self.pair, nodes, direction=config.direction, products=config.products
        )
        reader = runs.reader(tuple(metric_of(name) for name in config.metrics))
        slow = naive_cells(runs.base, [runs.cell(node) for node in nodes])
        return compared(reader(slow, [runs.base_row] * len(chosen)), values[chosen])


def _others(planned: PatchPlan) -> dict[str, TokenPair]:
    """Return for each pair the one whose values are its control."""
    config = planned.config
    if not config.control:
        return {}
    if config.metrics[0] == "kl" and config.direction == "denoise":
        return {}  # measured from the clean run, which would be the other pair's
    return strangers(planned.chosen.used, config.direction)


def _control(
    planned: PatchPlan, pair: TokenPair, other: TokenPair, cells: pl.DataFrame, top: list[NodeKey]
) -> Piece:
    """Patch the strongest nodes of a pair with another pair's values."""
    model, config = planned.model, planned.config
    crossed = with_donor(pair, other, config.direction)
    nodes = {
        (kind, str(node.site), node.unit, _label(node)): node
        for kind in config.sites
        for node in _nodes(model, crossed, kind, config)
    }
    chosen = [key for key in top if key in nodes]
    values = sweep(
        model,
        crossed,
        [nodes[key] for key in chosen],
        config.metrics[:1],
        direction=config.direction,
        products=config.products,
        budget=config.budget_bytes,
    ).cells[:, 0]
    own = cells.filter(pair=pair.pair.key, metric=config.metrics[0]).row(0, named=True)
    base, donor = own["base"], own["donor"]
    shares = None if base is None or donor is None else recovery(values, base, donor)
    rows = [
        {
            "pair": pair.pair.key,
            "other": other.pair.key,
            **dict(zip(NODE_KEYS, key, strict=True)),
            "value": finite(float(values[at])),
            "recovery": None if shares is None else finite(float(shares[at])),
        }
        for at, key in enumerate(chosen)
    ]
    return Piece(pl.DataFrame(rows, schema=CONTROL_SCHEMA))


def _label(node: Node) -> str:
    return "all" if node.place is None else node.place.label


def _nodes(model: LanguageModel, pair: TokenPair, kind: str, config: PatchConfig) -> list[Node]:
    return nodes_of(
        model, pair, kind, where=config.where(kind), layers=config.layers, units=config.units
    )
