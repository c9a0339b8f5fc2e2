"""The back-patching experiment: the whole grid of every prompt, and two controls of its size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import torch

from layerscope.errors import ConfigError, PromptError
from layerscope.experiments import provenance
from layerscope.experiments.back_patching.config import BackPatchConfig
from layerscope.experiments.back_patching.summary import CellKey, best_cell, summarise
from layerscope.experiments.patching.gather import finite, speed_of
from layerscope.experiments.patching.questions import Question, QuestionSet, TokenQuestion, ask
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
    Cell,
    Cost,
    Patch,
    Place,
    Reader,
    Recording,
    Speed,
    batch_of,
    check_budget,
    cost_of_cells,
    metric_of,
    naive_cells,
    record,
    run_cells,
)
from layerscope.interventions.patching.ablations import back_patches
from layerscope.models import Edit, LanguageModel, Replace, Site

NAME = "back-patch"
REAL, OTHER_POSITION, OTHER_LAYER = "back-patch", "random position", "random layer"
CELL_SCHEMA = {
    "prompt": pl.String,
    "which": pl.String,
    "source": pl.Int64,
    "target": pl.Int64,
    "place": pl.String,
    "position": pl.Int64,
    "token": pl.String,
    "from_layer": pl.Int64,
    "from_position": pl.Int64,
    "rank": pl.Int64,
    "base_rank": pl.Int64,
    "value": pl.Float64,
    "base": pl.Float64,
}
TEXT_SCHEMA = {
    "prompt": pl.String,
    "plain": pl.String,
    "plain_exact": pl.Boolean,
    "patched": pl.String,
    "patched_exact": pl.Boolean,
}


@dataclass(frozen=True, eq=False)
class BackPatchPlan:
    """A run that is ready: layers and prompts checked, nothing patched."""

    model: LanguageModel
    config: BackPatchConfig
    chosen: QuestionSet
    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all patches."""
        return None if self.speed is None else self.speed.seconds(self.cost, self.model.n_layers)

    def describe(self) -> str:
        """Return the plan in one line."""
        cost = self.cost
        saved = cost.naive_block_tokens / max(cost.block_tokens, 1)
        time = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        return (
            f"{len(self.chosen.used)} of {len(self.chosen.given)} prompts, {cost.cells} patches "
            f"with both controls in {cost.passes} passes{time} and {cost.bytes / 2**20:.0f} MiB; "
            f"{saved:.1f} times less computed than with one full pass each"
        )


def back_patch(
    model: LanguageModel,
    questions: Sequence[Question],
    config: BackPatchConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Put what later blocks read where earlier ones read, cell by cell.

    Returns:
        tables ``cells`` (one row per prompt, cell and control), ``grid`` (shares over prompts),
        ``texts`` (what the model says with the best cell) and ``prompts``.

    Raises:
        PromptError: no prompt can be used. ConfigError: no source lies above a target, or the run
            is beyond its budget; before anything is patched.
    """
    return execute(plan(model, questions, config), units=units, progress=progress)


def plan(
    model: LanguageModel,
    questions: Sequence[Question],
    config: BackPatchConfig | None = None,
    *,
    timed: bool = True,
) -> BackPatchPlan:
    """Check everything, ask every prompt once, and predict the cost.

    Args:
        timed: measure this machine for the prediction (a few short passes).
    """
    config = config or BackPatchConfig()
    for name in ("sources", "targets"):
        beyond = [at for at in getattr(config, name) or () if not 0 <= at < model.n_layers]
        if beyond:
            raise ConfigError(
                f"{name} names block {beyond[0]}; the model has blocks 0 to {model.n_layers - 1}"
            )
    pairs = _pairs(model, config)
    if not pairs:
        raise ConfigError("back-patching needs a source above a target; choose higher sources")
    bare = [one.key for one in questions if not one.answers]
    if bare:
        raise PromptError(
            f"prompt '{bare[0]}' has no answer, and back-patching asks whether it is right; add it"
        )
    chosen = ask(
        model, questions, metrics=(config.metric,), keep_wrong=True, products=config.products
    )
    cost = NO_COST
    for one in chosen.used:
        patches = [
            Cell((Patch(Site("resid_pre", target), (place.clean,), torch.zeros(1)),))
            for place in _places(one, config)
            for _, target in pairs
        ]
        width = len(one.ids)
        options: dict[str, Any] = {"recorded": width, "budget": config.budget_bytes, "whole": True}
        cost += cost_of_cells(model, 3 * patches, width, **options)
    speed = speed_of(model, chosen.used[0].ids, products=config.products) if timed else None
    planned = BackPatchPlan(model, config, chosen, cost, speed)
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def execute(
    planned: BackPatchPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan: a work unit per prompt, then one per prompt for the best cell's texts."""
    watch = provenance.Stopwatch()
    model, config, used = planned.model, planned.config, planned.chosen.used
    settings = {**config.to_dict(), "max_seconds": None, "max_bytes": None}
    identity = [settings, model.provenance(), provenance.versions()]
    works = [
        Work(work_key(NAME, one.question.to_dict(), *identity), partial(_grid, planned, one))
        for one in used
    ]
    pieces = run_units(works, units=units, progress=shifted(progress, 0, 2 * len(used)))
    watch.lap("grid")
    cells = pl.concat([piece.rows for piece in pieces])
    best = best_cell(cells)
    works = [
        Work(
            work_key(NAME, "text", one.question.to_dict(), best, *identity),
            partial(_text, planned, one, best),
        )
        for one in used
    ]
    told = run_units(works, units=units, progress=shifted(progress, len(used), 2 * len(used)))
    watch.lap("texts")
    tables = {
        "cells": cells,
        "texts": pl.concat([piece.rows for piece in told]),
        "prompts": planned.chosen.table(),
    }
    checks = [piece.payload for piece in pieces if piece.payload.get("cells")]
    summary, grid = summarise(tables, planned.chosen, best, planned.cost, checks, config)
    account = describe_run(
        NAME,
        model,
        config.to_dict(),
        watch,
        read=[one.ids for one in used],
        model_name=model.name,
        plan={**planned.cost.to_dict(), "text": planned.describe()},
    )
    return Outcome({**tables, "grid": grid}, summary, account)


def _pairs(model: LanguageModel, config: BackPatchConfig) -> list[tuple[int, int]]:
    every = range(model.n_layers)
    return [
        (source, target)
        for source in (every if config.sources is None else config.sources)
        for target in (every if config.targets is None else config.targets)
        if source > target
    ]


def _places(one: TokenQuestion, config: BackPatchConfig) -> list[Place]:
    if config.positions == "last":
        return [place for place in one.places if place.clean == len(one.ids) - 1]
    return [place for place in one.places if place.clean >= one.front]


def _record(planned: BackPatchPlan, one: TokenQuestion) -> tuple[Recording, Reader]:
    config = planned.config
    runs = record(planned.model, batch_of([one.ids]), products=config.products)
    metrics = (metric_of("rank"), metric_of(config.metric))
    return runs, Reader(planned.model, metrics, (one.targets,), runs.final, config.products)


def _grid(planned: BackPatchPlan, one: TokenQuestion) -> Piece:
    """Patch every cell of a prompt, and beside each its two controls."""
    config, key = planned.config, one.question.key
    runs, read = _record(planned, one)
    columns: list[dict[str, Any]] = []
    cells: list[Cell] = []
    names = {place.clean: place.label for place in _places(one, config)}
    triples, patches = back_patches(
        runs, columns=list(names), sources=config.sources, targets=config.targets
    )
    for (source, target, column), cell in zip(triples, patches, strict=True):
        draw = random.Random(f"{config.seed} {key} {source} {target} {column}")
        others = [at for at in range(one.front, len(one.ids)) if at != column]
        layers = [at for at in range(planned.model.n_layers) if at not in (source, target)]
        found: list[tuple[str, int, int]] = [(REAL, source, column)]
        if others:
            found.append((OTHER_POSITION, source, draw.choice(others)))
        if layers:
            found.append((OTHER_LAYER, draw.choice(layers), column))
        for which, layer, position in found:
            value = runs.residuals[layer][0, position : position + 1]
            patch = Patch(Site("resid_pre", target), (column,), value)
            cells.append(cell if which == REAL else Cell((patch,)))
            columns.append(
                {
                    "prompt": key,
                    "which": which,
                    "source": source,
                    "target": target,
                    "place": names[column],
                    "position": column,
                    "token": one.tokens[column],
                    "from_layer": layer,
                    "from_position": position,
                }
            )
    values = run_cells(runs, cells, read, budget=config.budget_bytes)
    base = read(runs.final, [0])[0]
    for row, (rank, value) in zip(columns, values.tolist(), strict=True):
        row |= {
            "rank": int(rank),
            "base_rank": int(base[0]),
            "value": finite(value),
            "base": finite(float(base[1])),
        }
    return Piece(
        pl.DataFrame(columns, schema=CELL_SCHEMA), _check(runs, cells, values, read, config)
    )


def _check(
    runs: Recording,
    cells: Sequence[Cell],
    values: torch.Tensor,
    read: Reader,
    config: BackPatchConfig,
) -> dict[str, Any]:
    chosen = spread(len(cells), config.verify)
    if not chosen:
        return {"cells": 0}
    slow = naive_cells(runs, [cells[at] for at in chosen])
    return compared(read(slow, [0] * len(chosen))[:, 1], values[chosen][:, 1])


def _text(planned: BackPatchPlan, one: TokenQuestion, best: CellKey) -> Piece:
    """Let the model answer, as it is and with the best cell, and compare the words."""
    source, target, label = best
    runs, _ = _record(planned, one)
    row: dict[str, Any] = {**dict.fromkeys(TEXT_SCHEMA), "prompt": one.question.key}
    ways: dict[str, list[Edit]] = {"plain": []}
    at = next((place.clean for place in one.places if place.label == label), None)
    if at is not None:
        value = runs.residuals[source][0, at]
        ways["patched"] = [Replace(f"resid_pre.{target}", value=value, positions=[at])]
    for name, edits in ways.items():
        made = planned.model.generate(
            batch_of([one.ids]), max_new_tokens=planned.config.max_new_tokens, edits=edits
        )
        row[name] = made.texts[0]
        answers = one.question.answers
        row[f"{name}_exact"] = any(exact(made.texts[0], answer) for answer in answers)
    return Piece(pl.DataFrame([row], schema=TEXT_SCHEMA))


def exact(text: str, answer: str) -> bool:
    """Return whether a text begins with the whole answer, and with no longer word."""
    said, word = text.strip(), answer.strip()
    return said.startswith(word) and not said[len(word) : len(word) + 1].isalnum()
