"""The path patching experiment: every edge of every pair, its own check, and its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import polars as pl

from layerscope.errors import SiteError
from layerscope.experiments import provenance
from layerscope.experiments.patching.control import strangers
from layerscope.experiments.patching.gather import PairSet, gather
from layerscope.experiments.path_patching.config import (
    PathConfig,
    receivers_named,
    senders_named,
)
from layerscope.experiments.path_patching.edges import CONTROL_SCHEMA, EdgesOf
from layerscope.experiments.path_patching.summary import strongest, summarise
from layerscope.experiments.units import (
    Outcome,
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
    PromptPair,
    Speed,
    TokenPair,
    calibrate,
    check_budget,
)
from layerscope.interventions.patching.paths import Edge, edges_of
from layerscope.models import LanguageModel

NAME = "path"


@dataclass(frozen=True, eq=False)
class PathPlan:
    """A run that is ready: names understood, pairs checked, nothing patched.

    Attributes:
        edges: that lead upwards. chosen: the pairs. cost: of all of them; speed: of this machine.
    """

    model: LanguageModel
    config: PathConfig
    edges: tuple[Edge, ...]
    chosen: PairSet
    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all edges."""
        return None if self.speed is None else self.speed.seconds(self.cost, self.model.n_layers)

    def of(self, pair: TokenPair) -> EdgesOf:
        """Return the edges in one of the pairs."""
        return EdgesOf(self.model, self.config, self.edges, pair)

    def describe(self) -> str:
        """Return the plan in one line."""
        cost = self.cost
        time = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        return (
            f"{len(self.chosen.used)} of {len(self.chosen.given)} pairs, {len(self.edges)} edges "
            f"each, {cost.cells} numbers in {cost.passes} passes{time} and "
            f"{cost.bytes / 2**20:.0f} MiB"
        )


def path_patch(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: PathConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Patch every edge from the senders to the receivers by itself.

    Returns:
        tables ``edges`` (one row per pair, edge, position and metric), ``control`` (the strongest
        edges with another pair's values) and ``pairs``.

    Raises:
        PromptError: no pair can be used. ConfigError, SiteError, CapabilityError: the settings do
            not fit the model, or the run is beyond its budget; before anything is patched.
    """
    return execute(plan(model, pairs, config), units=units, progress=progress)


def plan(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: PathConfig | None = None,
    *,
    timed: bool = True,
) -> PathPlan:
    """Understand the names, see which pairs the model answers, and predict the cost.

    Args:
        timed: measure this machine for the prediction (a few short passes).
    """
    config = config or PathConfig()
    senders = senders_named(model, config.senders)
    receivers = receivers_named(model, config.receivers)
    edges = tuple(edges_of(model, senders, receivers))
    if not edges:
        raise SiteError(
            f"no sender ({', '.join(config.senders)}) writes before a receiver "
            f"({', '.join(config.receivers)}) reads; choose receivers above the senders"
        )
    chosen = gather(
        model,
        pairs,
        metrics=config.metrics,
        answered=config.answered,
        keep_wrong=config.keep_wrong,
        products=config.products,
        aligned=True,
    )
    cost = NO_COST
    for pair in chosen.used:
        cost += EdgesOf(model, config, edges, pair).cost()
    speed = None
    if timed:
        speed = calibrate(model, chosen.used[0], products=config.products)
    planned = PathPlan(model, config, edges, chosen, cost, speed)
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def execute(
    planned: PathPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan: a work unit per pair, then one per pair for the control."""
    watch = provenance.Stopwatch()
    model, config, used = planned.model, planned.config, planned.chosen.used
    settings = {**config.to_dict(), "max_seconds": None, "max_bytes": None}
    identity = [settings, model.provenance(), provenance.versions()]
    others = strangers(used, config.direction) if config.control else {}
    total = len(used) + len(others)

    works = [
        Work(work_key(NAME, pair.pair.to_dict(), *identity), planned.of(pair).measure)
        for pair in used
    ]
    pieces = run_units(works, units=units, progress=shifted(progress, 0, total))
    watch.lap("edges")
    edges = pl.concat([piece.rows for piece in pieces])
    chosen = strongest(edges, config.metrics[0])
    works = [
        Work(
            work_key(NAME, "control", pair.pair.to_dict(), other.pair.to_dict(), chosen, *identity),
            partial(planned.of(pair).control, other, chosen),
        )
        for pair in used
        if (other := others.get(pair.pair.key)) is not None
    ]
    checks = [piece.payload for piece in pieces if piece.payload.get("cells")]
    rows = [
        piece.rows
        for piece in run_units(works, units=units, progress=shifted(progress, len(used), total))
    ]
    watch.lap("control")
    control = pl.concat(rows) if rows else pl.DataFrame(schema=CONTROL_SCHEMA)
    table = planned.chosen.table()
    summary = summarise(edges, control, table, planned.cost, checks, config)
    account = describe_run(
        NAME,
        model,
        config.to_dict(),
        watch,
        read=[ids for pair in used for ids in (pair.clean, pair.corrupt)],
        model_name=model.name,
        plan={
            **planned.cost.to_dict(),
            "predicted_seconds": planned.seconds,
            "text": planned.describe(),
        },
    )
    return Outcome({"edges": edges, "control": control, "pairs": table}, summary, account)
