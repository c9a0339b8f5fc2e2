"""The ablation experiment: every node of every prompt, then the strongest beside disturbances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import polars as pl

from layerscope.errors import ConfigError, PromptError
from layerscope.experiments import provenance
from layerscope.experiments.ablation.cells import Bench, Spot
from layerscope.experiments.ablation.config import ABLATED, AblationConfig
from layerscope.experiments.ablation.reference import BY_POSITION, References
from layerscope.experiments.ablation.summary import chosen_nodes, chosen_sets, summarise
from layerscope.experiments.patching.gather import speed_of
from layerscope.experiments.patching.questions import Question, QuestionSet, TokenQuestion, ask
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
    Speed,
    check_budget,
    cost_of_cells,
    metric_of,
    sites_of_kind,
)
from layerscope.models import LanguageModel

NAME = "ablate"


@dataclass(frozen=True, eq=False)
class AblationPlan:
    """A run that is ready: everything checked, nothing ablated.

    Attributes:
        chosen: the prompts. references: what values are taken from. spots: sites and units.
        cost: of the sweeps. speed: of this machine; None where it was not measured.
    """

    model: LanguageModel
    config: AblationConfig
    metrics: tuple[str, ...]
    chosen: QuestionSet
    references: References
    spots: tuple[Spot, ...]
    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all sweeps."""
        return None if self.speed is None else self.speed.seconds(self.cost, self.model.n_layers)

    def describe(self) -> str:
        """Return the plan in one line."""
        cost = self.cost
        time = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        return (
            f"{len(self.chosen.used)} of {len(self.chosen.given)} prompts, {cost.cells} ablations "
            f"in {cost.passes} passes{time} and {cost.bytes / 2**20:.0f} MiB; values from "
            f"{len(self.references.ids)} reference prompts"
        )


def ablate(
    model: LanguageModel,
    questions: Sequence[Question],
    config: AblationConfig | None = None,
    *,
    reference: Sequence[str] | None = None,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Ablate every node by itself, and the strongest together.

    Args:
        reference: prompts that means, spreads and resampled values are taken from; by default those
            of the run.

    Returns:
        tables ``cells`` (one row per prompt, node, way and metric), ``control`` (the strongest
        beside random changes of the same size), ``sets`` and ``prompts``.

    Raises:
        PromptError: no prompt can be used. ConfigError, SiteError, CapabilityError: the settings do
            not fit the model or the prompts; before anything is ablated.
    """
    planned = plan(model, questions, config, reference=reference)
    return execute(planned, units=units, progress=progress)


def plan(
    model: LanguageModel,
    questions: Sequence[Question],
    config: AblationConfig | None = None,
    *,
    reference: Sequence[str] | None = None,
    timed: bool = True,
) -> AblationPlan:
    """Check everything, see which prompts the model answers, and predict the cost.

    Args:
        timed: measure this machine for the prediction (a few short passes).
    """
    config = config or AblationConfig()
    spots = _spots(model, config)
    metrics = config.metrics
    if metrics is None:
        foils = all(one.foils for one in questions)
        answers = all(one.answers for one in questions)
        metrics = ("logit_diff" if foils else "logprob", "kl") if answers else ("kl",)
    chosen = ask(
        model,
        questions,
        metrics=metrics,
        answered=config.answered,
        keep_wrong=config.keep_wrong,
        products=config.products,
    )
    if not chosen.used:
        raise PromptError(
            f"the model answers none of {len(questions)} prompts; give others, or keep wrong ones"
        )
    texts = [one.ids for one in chosen.tokens.values()]
    if reference is not None:
        batch = model.tokenize(list(reference))
        texts = [batch.row_ids(row) for row in range(len(batch))]
    sites = tuple(dict.fromkeys(spot.site for spot in spots))
    references = References(model, sites, tuple(dict.fromkeys(map(tuple, texts))))
    chosen = _with_values(chosen, references, config)
    cost = NO_COST
    whole = any(metric_of(name).whole for name in metrics)
    for one in chosen.used:
        cost += _cost(model, one, spots, config, whole=whole)
    speed = None
    if timed:
        speed = speed_of(model, chosen.used[0].ids, products=config.products)
    planned = AblationPlan(model, config, metrics, chosen, references, spots, cost, speed)
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def execute(
    planned: AblationPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan: a work unit per prompt and kind of site, then one per prompt."""
    watch = provenance.Stopwatch()
    model, config, used = planned.model, planned.config, planned.chosen.used
    settings = {**config.to_dict(), "max_seconds": None, "max_bytes": None}
    identity = [
        {**settings, "metrics": planned.metrics},
        [list(row) for row in planned.references.ids],
        model.provenance(),
        provenance.versions(),
    ]
    total = len(used) * (len(config.sites) + 1)
    works = [
        Work(
            work_key(NAME, kind, one.question.to_dict(), *identity),
            partial(_sweep, planned, one, kind),
        )
        for one in used
        for kind in config.sites
    ]
    pieces = run_units(works, units=units, progress=shifted(progress, 0, total))
    watch.lap("sweeps")
    cells = pl.concat([piece.rows for piece in pieces])
    nodes = chosen_nodes(cells, planned.metrics[0])
    sets = chosen_sets(cells, planned.metrics[0], config)
    works = [
        Work(
            work_key(NAME, "control", one.question.to_dict(), nodes, sets, *identity),
            partial(_control, planned, one, nodes, sets),
        )
        for one in used
    ]
    beside = run_units(works, units=units, progress=shifted(progress, len(pieces), total))
    watch.lap("control")
    rows = pl.concat([piece.rows for piece in beside])
    tables = {
        "cells": cells,
        "control": rows.filter(pl.col("set").is_null()).drop("set", "size"),
        "sets": rows.filter(pl.col("set").is_not_null()).select(
            "prompt", "kind", "how", "set", "size", "draw", "value", "base", "effect"
        ),
        "prompts": planned.chosen.table(),
    }
    checks = [piece.payload for piece in pieces if piece.payload.get("cells")]
    summary = summarise(
        tables,
        planned.metrics[0],
        planned.chosen,
        planned.cost,
        checks,
        config,
        len(planned.references.ids),
    )
    account = describe_run(
        NAME,
        model,
        config.to_dict(),
        watch,
        read=[*(one.ids for one in used), *planned.references.ids],
        model_name=model.name,
        metrics=list(planned.metrics),
        reference_prompts=len(planned.references.ids),
        plan={
            **planned.cost.to_dict(),
            "predicted_seconds": planned.seconds,
            "text": planned.describe(),
        },
    )
    return Outcome(tables, summary, account)


def _sweep(planned: AblationPlan, one: TokenQuestion, kind: str) -> Piece:
    spots = [spot for spot in planned.spots if spot.kind == kind]
    bench = Bench.of(planned.references, one, spots, planned.metrics, planned.config)
    return bench.sweep(spots)


def _control(
    planned: AblationPlan,
    one: TokenQuestion,
    nodes: Sequence[tuple[Any, ...]],
    sets: Sequence[tuple[Any, ...]],
) -> Piece:
    bench = Bench.of(planned.references, one, planned.spots, planned.metrics[:1], planned.config)
    return bench.control(planned.spots, nodes, sets)


def _spots(model: LanguageModel, config: AblationConfig) -> tuple[Spot, ...]:
    """Return every site and unit of the kinds asked for."""
    found: list[Spot] = []
    for kind in config.sites:
        sites, by_unit = sites_of_kind(model, kind, config.layers)
        for site in sites:
            units: Sequence[int | None] = [None]
            if by_unit:
                n_units = model.backend.trailing(site, 1)[0]
                units = range(n_units) if config.units is None else config.units
                beyond = [unit for unit in units if not 0 <= (unit or 0) < n_units]
                if beyond:
                    raise ConfigError(
                        f"'{site}' has units 0 to {n_units - 1}, not {beyond[0]}; choose among them"
                    )
            found += [Spot(kind, site, unit) for unit in units]
    assert all(spot.kind in ABLATED for spot in found)
    return tuple(found)


def _with_values(
    chosen: QuestionSet, references: References, config: AblationConfig
) -> QuestionSet:
    """Leave out prompts for which the reference has no prompt of the same length.

    Raises:
        PromptError: no prompt is left.
    """
    ways = [way for way in config.how if way in BY_POSITION]
    lacking = {
        one.question.key: (
            f"no other reference prompt has {len(one.ids)} tokens, which {ways[0]} needs: its "
            "values are taken position by position"
        )
        for one in chosen.used
        if ways and not references.others(one.ids)
    }
    used = tuple(one for one in chosen.used if one.question.key not in lacking)
    if not used:
        key, reason = next(iter(lacking.items()))
        raise PromptError(f"prompt '{key}': {reason}; give more prompts, or use mean or zero")
    return replace(chosen, used=used, refused={**chosen.refused, **lacking})


def _cost(
    model: LanguageModel,
    one: TokenQuestion,
    spots: Sequence[Spot],
    config: AblationConfig,
    *,
    whole: bool,
) -> Cost:
    cells = [
        spot.empty(columns)
        for columns in Bench.columns_of(one, config)
        for spot in spots
        for _ in config.how
    ]
    return cost_of_cells(
        model, cells, len(one.ids), recorded=len(one.ids), budget=config.budget_bytes, whole=whole
    )
