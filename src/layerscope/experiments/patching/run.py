"""The patching experiment: every node of every pair, as tables, a plan and its own check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from layerscope.errors import ConfigError
from layerscope.experiments import provenance
from layerscope.experiments.patching.config import PatchConfig
from layerscope.experiments.patching.summary import summarise
from layerscope.experiments.units import (
    Outcome,
    Piece,
    Progress,
    UnitStore,
    Work,
    describe_run,
    run_units,
    work_key,
)
from layerscope.interventions.patching import (
    NO_COST,
    Cost,
    Node,
    PromptPair,
    Speed,
    TokenPair,
    batch_of,
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
    tokenize_pairs,
)
from layerscope.models import LanguageModel
from layerscope.models.vocabulary import decode_tokens

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
PAIR_SCHEMA = {
    "pair": pl.String,
    "clean": pl.String,
    "corrupt": pl.String,
    "answers": pl.String,
    "foils": pl.String,
    "n_clean": pl.Int64,
    "n_corrupt": pl.Int64,
    "answer_rank": pl.Int64,
    "answered": pl.Boolean,
    "used": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True)
class PatchPlan:
    """A run that is ready: everything checked, the pairs that take part known, nothing patched.

    Attributes:
        pairs: those that take part. refused: the others' reasons, by key.
        answered: by key, how the model answers the clean prompt.
        cost: of all sweeps. speed: of this machine; None where it was not measured.
    """

    model: LanguageModel
    config: PatchConfig
    given: tuple[PromptPair, ...]
    pairs: tuple[TokenPair, ...]
    tokens: dict[str, TokenPair]
    refused: dict[str, str]
    answered: dict[str, Answered]
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
        return (
            f"{len(self.pairs)} of {len(self.given)} pairs, {cost.cells} cells in {cost.passes} "
            f"passes{time} and {cost.bytes / 2**20:.0f} MiB; {saved:.1f} times less computed than "
            "with one full pass per cell"
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
    tokens, refused = tokenize_pairs(model, pairs)
    _check_metrics(config, tokens)
    answered = {one.pair.key: _answers(model, one, config) for one in tokens}
    used = [one for one in tokens if config.keep_wrong or answered[one.pair.key].counts]
    cost = NO_COST
    whole = any(metric_of(name).whole for name in config.metrics)
    for one in used:
        for kind in config.sites:
            nodes = _nodes(model, one, kind, config)
            cost += cost_of(model, one, nodes, budget=config.budget_bytes, whole=whole)
    speed = None
    if used and timed:
        speed = calibrate(model, used[0], products=config.products)
    planned = PatchPlan(
        model,
        config,
        tuple(pairs),
        tuple(used),
        {one.pair.key: one for one in tokens},
        refused,
        answered,
        cost,
        speed,
    )
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def execute(
    planned: PatchPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan, one work unit per pair and kind of site, and summarise it."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = [model.provenance(), provenance.versions()]
    works: list[Work] = []
    for pair in planned.pairs:
        for kind in config.sites:
            nodes = _nodes(model, pair, kind, config)
            settings = {**config.to_dict(), "sites": [kind], "max_seconds": None, "max_bytes": None}
            works.append(
                Work(
                    work_key("patch", settings, pair.pair.to_dict(), *identity),
                    _Unit(planned, pair, nodes),
                    size=len(nodes),
                )
            )
    pieces = run_units(works, units=units, progress=progress)
    watch.lap("patch")
    cells = (
        pl.concat([piece.rows for piece in pieces]) if pieces else pl.DataFrame(schema=CELL_SCHEMA)
    )
    table = _pair_table(planned)
    checks = [piece.payload for piece in pieces if piece.payload.get("cells")]
    summary = summarise(cells, table, planned.cost, checks, config)
    return Outcome(
        {"cells": cells, "pairs": table},
        summary,
        describe_run(
            "patch",
            model,
            config.to_dict(),
            watch,
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
                    "place": "all" if place is None else place.label,
                    "position": None if place is None else place.clean,
                    "token": None if place is None else tokens[place.clean],
                    "metric": metric,
                    "value": _finite(value),
                    "base": _finite(base),
                    "donor": _finite(donor),
                    "recovery": None if share is None else _finite(share),
                }
                for name, cell in row.items():
                    columns[name].append(cell)
        return Piece(pl.DataFrame(columns, schema=CELL_SCHEMA), self._check(values.cells))

    def _check(self, values: torch.Tensor) -> dict[str, Any]:
        """Compute a few cells again, each by a full pass of its own, and compare the metrics."""
        config, model = self.planned.config, self.planned.model
        count = min(config.verify, len(self.nodes))
        if not count:
            return {"cells": 0}
        # Evenly spread, so that no part of a sweep goes unchecked over many pairs.
        first = len(self.nodes) // (2 * count)
        chosen = [first + at * len(self.nodes) // count for at in range(count)]
        nodes = [self.nodes[at] for at in chosen]
        runs = record_pair(
            model, self.pair, nodes, direction=config.direction, products=config.products
        )
        reader = runs.reader(tuple(metric_of(name) for name in config.metrics))
        slow = naive_cells(runs.base, [runs.cell(node) for node in nodes])
        again = reader(slow, [runs.base_row] * count)
        fast = values[chosen]
        error = (again - fast).abs()
        return {
            "cells": count,
            "error": _finite(float(error.max())),
            "scale": _finite(float(torch.maximum(again.abs(), fast.abs()).max())),
        }


def _nodes(model: LanguageModel, pair: TokenPair, kind: str, config: PatchConfig) -> list[Node]:
    return nodes_of(
        model, pair, kind, where=config.where(kind), layers=config.layers, units=config.units
    )


def _check_metrics(config: PatchConfig, tokens: Sequence[TokenPair]) -> None:
    """Refuse metrics that a pair has no tokens for, before anything runs."""
    for name in config.metrics:
        metric = metric_of(name)
        for one in tokens:
            if not one.targets.answers and name != "kl":
                raise ConfigError(
                    f"the metric '{name}' needs an answer, and pair '{one.pair.key}' has none: add "
                    "it, or measure kl"
                )
            if metric.foils and not one.targets.foils:
                raise ConfigError(
                    f"the metric '{name}' needs a foil, and pair '{one.pair.key}' has none: add "
                    "it, or measure prob, logprob or rank"
                )


@dataclass(frozen=True)
class Answered:
    """How the model answers a clean prompt: the rank of its best answer, and whether it counts."""

    rank: int | None
    counts: bool


def _answers(model: LanguageModel, pair: TokenPair, config: PatchConfig) -> Answered:
    """Return whether a clean prompt is answered: better than with a foil, or best of all."""
    targets = pair.targets
    if not targets.answers:
        return Answered(None, True)
    logits = model.run(batch_of([pair.clean]), logits="last", products=config.products).logits
    assert logits is not None
    row = logits[0, -1].float()
    best = row[list(targets.answers)].max()
    rank = 1 + int((row > best).sum())
    if config.answered == "foil" and targets.foils:
        margin = row[list(targets.answers)].mean() - row[list(targets.foils)].mean()
        return Answered(rank, float(margin) > 0)
    return Answered(rank, rank == 1)


def _pair_table(planned: PatchPlan) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    used = {one.pair.key for one in planned.pairs}
    for pair in planned.given:
        tokens = planned.tokens.get(pair.key)
        answered = planned.answered.get(pair.key)
        reason = planned.refused.get(pair.key, "")
        if answered is not None and not answered.counts:
            reason = "the model does not answer the clean prompt"

        def first(ids: Sequence[int]) -> str:
            return " | ".join(decode_tokens(planned.model.tokenizer, list(ids)))

        rows.append(
            {
                "pair": pair.key,
                "clean": pair.clean,
                "corrupt": pair.corrupt,
                "answers": first(tokens.targets.answers) if tokens else " | ".join(pair.answers),
                "foils": first(tokens.targets.foils) if tokens else " | ".join(pair.foils),
                "n_clean": len(tokens.clean) if tokens else None,
                "n_corrupt": len(tokens.corrupt) if tokens else None,
                "answer_rank": None if answered is None else answered.rank,
                "answered": None if answered is None else answered.counts,
                "used": pair.key in used,
                "reason": reason,
            }
        )
    return pl.DataFrame(rows, schema=PAIR_SCHEMA)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
