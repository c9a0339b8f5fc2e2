"""The causal follow-up: facts with a confirmed onset, patched, scanned, steered, translated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from layerscope.experiments import battery as observation
from layerscope.experiments import provenance
from layerscope.experiments.follow_up import head_scan, languages, patches
from layerscope.experiments.follow_up.crossings import crossings_of
from layerscope.experiments.follow_up.facts import (
    Fact,
    Ledger,
    Left,
    choose_facts,
    onsets_of,
    split,
)
from layerscope.experiments.follow_up.findings import verdict, warnings_of
from layerscope.experiments.follow_up.prepare import Plan, plan
from layerscope.experiments.follow_up.stages import EXPERIMENT, Stages, chunks, contents
from layerscope.experiments.follow_up.steer import steer_relations
from layerscope.experiments.follow_up.summary import items_table, summary_of
from layerscope.experiments.units import Outcome, Progress, UnitStore, Work, describe_run
from layerscope.products import Products

__all__ = ["Plan", "execute", "plan"]


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Find the onsets, then patch, scan, steer and translate; all of it resumable.

    Tables: ``items`` (one row per fact: both onsets), ``patches``, ``heads``, ``curve``,
    ``directions``, ``mediation``, ``vectors``, ``languages``, ``excluded``.
    """
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    stages = Stages(planned, units, progress, watch)
    found = observation.execute(planned.observed, units=units, progress=stages.told("observe"))
    watch.lap("observe")
    ledger = Ledger([_left(row) for row in found.tables["excluded"].iter_rows(named=True)])
    facts = choose_facts(
        planned.prompts, onsets_of(found.tables["items"]), ledger, seed=config.seed
    )
    patched, plain = _patch(planned, facts, stages)
    facts = _measured(facts, plain, ledger)
    patched = patched.filter(pl.col("item").is_in([fact.key for fact in facts]))
    onsets = patches.causal_onsets(patched, min_bits=config.min_bits)
    items = items_table(facts, plain, onsets, patched)
    scan, curve, missing = _heads(planned, facts, items, stages, ledger)
    steered, fitted = steer_relations(planned, facts, items, stages, ledger)
    crossed = _languages(planned, facts, stages, ledger)
    tables = {
        "items": items,
        "patches": patched,
        "heads": scan,
        "curve": curve,
        **steered,
        "languages": crossed,
        "excluded": _excluded(ledger),
    }
    summary: dict[str, Any] = {
        "model": model.name,
        "n_layers": model.n_layers,
        "battery": planned.battery.name,
        "language": config.language,
        "counts": {
            "asked": len(planned.prompts),
            "followed": len(facts),
            "excluded": dict(sorted(Counter(left.stage for left in ledger.left).items())),
        },
        "unavailable": {**patches.available(model)[1], **missing},
        **summary_of(tables, config),
        "fitted": fitted,
    }
    summary["verdict"] = verdict(summary["onsets"])
    summary["warnings"] = warnings_of(summary, config)
    watch.lap("measure")
    return Outcome(tables, summary, _provenance(planned, watch))


def _left(row: Mapping[str, Any]) -> Left:
    return Left(row["item"], row["relation"], row["language"], row["stage"], row["reason"])


def _patch(
    planned: Plan, facts: Sequence[Fact], stages: Stages
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Patch the facts in units; return all rows, and what the plain runs say by item."""
    products: Products = planned.config.products
    works = [
        stages.work(
            "patch",
            contents(group),
            lambda group=group: patches.patch_facts(planned.model, group, products=products),
        )
        for group in chunks(facts, planned.config.facts_per_unit)
    ]
    pieces = stages.run("patch", works)
    rows = pl.concat([pl.DataFrame(schema=patches.SCHEMA), *(piece.rows for piece in pieces)])
    plain: dict[str, Any] = {}
    for piece in pieces:
        plain |= piece.payload["plain"]
    return rows, plain


def _measured(
    facts: Sequence[Fact], plain: Mapping[str, Mapping[str, Any]], ledger: Ledger
) -> list[Fact]:
    """Leave out facts whose corrupted prompt is answered all the same."""
    kept: list[Fact] = []
    for fact in facts:
        if plain[fact.key]["corrupted"][2] == 1:
            reason = f"the prompt about {fact.partner.item.subject} gives the same answer"
            ledger.add(fact.clean.item, "corrupted_answered", reason)
        else:
            kept.append(fact)
    return kept


def _heads(
    planned: Plan, facts: Sequence[Fact], items: pl.DataFrame, stages: Stages, ledger: Ledger
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, str]]:
    """Scan heads near each fact's causal onset (the observed one where there is none)."""
    config = planned.config
    missing: dict[str, str] = {}
    rows: dict[str, int] = dict(items.select("item", "onset_for_heads").iter_rows())
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.group].append(fact)
    scanners = {
        group: head_scan.HeadScanner(planned.model, own, config) for group, own in groups.items()
    }
    works: list[Work] = []
    for group, own in groups.items():
        scanner = scanners[group]
        if scanner.missing:
            missing["heads"] = scanner.missing
            continue
        everyone = contents(own)  # the means are over all of them
        for some in chunks(own, config.facts_per_unit):
            blocks = [rows[fact.key] - 1 for fact in some]
            works.append(
                stages.work(
                    "heads",
                    [everyone, contents(some), blocks],
                    lambda scanner=scanner, some=some, blocks=blocks: scanner.scan(some, blocks),
                )
            )
    pieces = stages.run("heads", works)
    scan = pl.concat([pl.DataFrame(schema=head_scan.SCHEMA), *(piece.rows for piece in pieces)])
    works = []
    for group, own in groups.items():
        if missing:
            continue
        train, held_out = split(
            own, share=config.train_share, most=config.most_train, seed=config.seed
        )
        ranked = head_scan.ranked_heads(scan, [fact.key for fact in train])
        if not held_out or not ranked:
            for fact in own:
                ledger.add(
                    fact.clean.item, "head_curve", "too few facts of its kind to hold some out"
                )
            continue
        works.append(
            stages.work(
                "curve",
                [contents(own), contents(held_out), ranked],
                lambda scanner=scanners[group], held_out=held_out, ranked=ranked: scanner.curve(
                    held_out, ranked
                ),
            )
        )
    pieces = stages.run("curve", works)
    empty = pl.DataFrame(schema=head_scan.CURVE_SCHEMA)
    return scan, pl.concat([empty, *(piece.rows for piece in pieces)]), missing


def _languages(
    planned: Plan, facts: Sequence[Fact], stages: Stages, ledger: Ledger
) -> pl.DataFrame:
    """Patch English MLP outputs into the other languages' corrupted prompts."""
    sites = patches.available(planned.model)[0].get("mlp_out", [])
    crossings = crossings_of(planned, facts, ledger)
    works = [
        stages.work(
            "languages",
            [
                [
                    entry.slot().content(),
                    list(entry.source.ids),
                    list(entry.clean.ids),
                    None if entry.third is None else list(entry.third.ids),
                ]
                for entry in group
            ],
            lambda group=group: languages.cross(
                planned.model, group, sites, products=planned.config.products
            ),
        )
        for group in chunks(crossings, planned.config.facts_per_unit)
    ]
    pieces = stages.run("languages", works)
    return pl.concat([pl.DataFrame(schema=languages.SCHEMA), *(piece.rows for piece in pieces)])


def _excluded(ledger: Ledger) -> pl.DataFrame:
    names = ("item", "relation", "language", "stage", "reason")
    rows = [asdict(left) for left in ledger.left]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String))


def _provenance(planned: Plan, watch: provenance.Stopwatch) -> dict[str, Any]:
    battery = {"name": planned.battery.name, "sha256": planned.battery.digest()}
    return describe_run(
        EXPERIMENT,
        planned.model,
        planned.config.to_dict(),
        watch,
        read=[prompt.ids for prompt in planned.read()],
        battery=battery,
    )
