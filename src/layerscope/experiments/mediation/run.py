"""Carry out a mediation run, a few pairs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from layerscope.errors import ConfigError, nearest
from layerscope.experiments import provenance
from layerscope.experiments.attribution.prepare import PairPlan, plan_pairs
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
from layerscope.interventions.attribution.contrast import Direction
from layerscope.interventions.attribution.pairs import METRICS, MetricName
from layerscope.interventions.mediation import Mediation, mediate
from layerscope.interventions.mediation.effects import Method, Places
from layerscope.interventions.patching.pairs import PromptPair, TokenPair
from layerscope.models import LanguageModel

NAME = "mediation"
PAIR_SCHEMA = {
    "pair": pl.String,
    "mediator": pl.String,
    "total": pl.Float64,
    "indirect": pl.Float64,
    "direct": pl.Float64,
}
TOGETHER = "all together"


@dataclass(frozen=True, kw_only=True)
class MediationConfig:
    """Settings of a run.

    Attributes:
        sites: groups of mediators, or sites.
        positions: mediators at "all" positions at once, at the "last", or at "each".
        method: "patch" (exact), "atp" or "ig".
        metric, direction: as for attribution.
        steps: of "ig".
        together: also take all mediators as one.
        keep_wrong: keep pairs whose clean prompt the model does not answer.
        pairs_per_unit: pairs of one work unit (and of one batch).
        seed: of the intervals.
    """

    sites: tuple[str, ...] = ("attn_out", "mlp_out")
    positions: Places = "all"
    method: Method = "patch"
    metric: MetricName = "logit_diff"
    direction: Direction = "noise"
    steps: int = 10
    together: bool = True
    keep_wrong: bool = False
    pairs_per_unit: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, tuple[object, tuple[str, ...]]] = {
            "positions": (self.positions, ("all", "last", "each")),
            "method": (self.method, ("patch", "atp", "ig")),
            "metric": (self.metric, METRICS),
            "direction": (self.direction, ("noise", "denoise")),
        }
        for name, (value, choices) in known.items():
            if value not in choices:
                raise ConfigError(
                    f"unknown {name} '{value}'{nearest(str(value), choices)}; use "
                    f"{', '.join(choices)}"
                )
        if not self.sites or min(self.steps, self.pairs_per_unit) < 1:
            raise ConfigError("name mediators, and give steps and pairs_per_unit of 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        return {**asdict(self), "sites": list(self.sites)}


Plan = PairPlan[MediationConfig]
"""A run that is ready to start."""


def mediation(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: MediationConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Split an effect over mediators.

    Returns:
        tables ``mediation`` (one row per mediator, with intervals), ``effects`` (by pair), and
        ``pairs``.

    Raises:
        PromptError, ConfigError, SiteError, CapabilityError: the request, before it is carried out.
    """
    return execute(plan(model, pairs, config), units=units, progress=progress)


def plan(
    model: LanguageModel, pairs: Sequence[PromptPair], config: MediationConfig | None = None
) -> Plan:
    """Check sites and pairs; raises what `mediation` raises."""
    return plan_pairs(model, pairs, config or MediationConfig())


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan; a work unit is a few pairs."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = planned.identity()
    chunks = planned.chunks()
    works = [
        Work(work_key(NAME, identity, at), partial(_effects, planned, chunk), len(chunk))
        for at, chunk in enumerate(chunks)
    ]
    effects = pl.concat([piece.rows for piece in run_units(works, units=units, progress=progress)])
    watch.lap("effects")
    whole = _whole(planned, effects)
    tables = {"mediation": whole.table(), "effects": effects, "pairs": planned.prepared.table}
    summary = _summary(planned, whole, tables["mediation"])
    used = planned.prepared.pairs
    read = [ids for pair in used for ids in (pair.clean, pair.corrupt)]
    account = describe_run(NAME, model, config.to_dict(), watch, read=read, pairs=len(used))
    return Outcome(tables, summary, account)


def _mediate(planned: Plan, chunk: Sequence[TokenPair]) -> Mediation:
    config = planned.config
    places: Places = config.positions
    if places == "each":  # the same in every unit, whatever its own longest prompt
        places = list(range(planned.prepared.longest))
    return mediate(
        planned.prepared.contrast(chunk),
        list(config.sites),
        positions=places,
        method=config.method,
        steps=config.steps,
        together=config.together,
        seed=config.seed,
    )


def _effects(planned: Plan, chunk: Sequence[TokenPair]) -> Piece:
    found = _mediate(planned, chunk)
    keys = [pair.pair.key for pair in chunk]
    frames = [
        pl.DataFrame(
            {
                "pair": keys,
                "mediator": [TOGETHER if node is None else str(node)] * len(keys),
                "total": found.total,
                "indirect": found.indirect[index],
                "direct": found.direct[index],
            },
            schema=PAIR_SCHEMA,
        )
        for index, node in enumerate(found.mediators)
    ]
    names = [[str(node.site), node.unit, node.position] for node in found.mediators if node]
    return Piece(pl.concat(frames), {"mediators": names})


def _whole(planned: Plan, effects: pl.DataFrame) -> Mediation:
    """Return the mediation over all pairs from the rows of its parts."""
    from layerscope.interventions.mediation.effects import mediators_of

    config = planned.config
    places: Places = config.positions
    if places == "each":
        places = list(range(planned.prepared.longest))
    nodes = mediators_of(planned.prepared.contrast(), list(config.sites), places)
    keys = [pair.pair.key for pair in planned.prepared.pairs]
    names = [*(str(node) for node in nodes), *([TOGETHER] if config.together else [])]
    by_pair = {
        column: effects.pivot("pair", index="mediator", values=column, maintain_order=True)
        for column in ("total", "indirect", "direct")
    }

    def array(column: str) -> np.ndarray:
        table = by_pair[column]
        order = {name: at for at, name in enumerate(table["mediator"])}
        return table.select(keys).to_numpy()[[order[name] for name in names]]

    total = array("total")[0]
    base = np.maximum(
        *(np.abs(end.double().cpu().numpy()) for end in planned.prepared.contrast().ends)
    )
    zero = np.flatnonzero(np.abs(total) <= 1e-9 * np.maximum(base, 1.0))
    mediators = (*nodes, *([None] if config.together else []))
    return Mediation(
        config.method,
        mediators,
        total,
        array("indirect"),
        array("direct"),
        config.seed,
        tuple(map(int, zero)),
    )


def _summary(planned: Plan, whole: Mediation, table: pl.DataFrame) -> dict[str, Any]:
    config, prepared = planned.config, planned.prepared
    base, donor = planned.ends()
    single = table.filter(pl.col("mediator") != TOGETHER)
    order = single.sort(pl.col("indirect").abs(), descending=True, maintain_order=True).head(10)
    warnings = prepared.notes()
    keys = [pair.pair.key for pair in prepared.pairs]
    if whole.zero:
        names = ", ".join(keys[index] for index in whole.zero[:5])
        warnings.append(
            f"{len(whole.zero)} pairs have no total effect ({names}): no share of theirs exists"
        )
    if config.method != "patch":
        warnings.append(f"'{config.method}' predicts effects from gradients; patch the strongest")
    if len(keys) < 5:
        warnings.append(f"intervals over {len(keys)} pairs say little")
    return {
        "pairs": {"given": len(planned.given), "used": len(keys), "left_out": prepared.left_out},
        "method": config.method,
        "metric": config.metric,
        "direction": config.direction,
        "base_metric": base,
        "donor_metric": donor,
        "total_effect": float(whole.total.mean()),
        "zero_totals": [keys[index] for index in whole.zero],
        "top": order.select("mediator", "indirect", "direct", "recovery").to_dicts(),
        "warnings": warnings,
    }
