"""Clean values put into the corrupted run at the answer slot, and the onsets they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from torch import Tensor

from layerscope.errors import LayerscopeError
from layerscope.experiments.follow_up.facts import Fact
from layerscope.experiments.follow_up.slots import (
    Patches,
    Result,
    patch,
    run_at,
    values_at,
)
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import Recording, sites_of_kind
from layerscope.models import LanguageModel, Site
from layerscope.products import Products

KINDS = ("attn_out", "resid_mid", "mlp_out", "resid_post")
CAUSAL = ("mlp_out", "resid_post")  # of which the causal onset is the first
CONTROLLED = CAUSAL
CLEAN, CONTROL = "clean", "third"
SCHEMA = {
    "item": pl.String,
    "donor": pl.String,
    "site": pl.String,
    "block": pl.Int32,
    "row": pl.Int32,
    "logit_diff": pl.Float64,
    "log2p": pl.Float64,
    "bits": pl.Float64,
    "rank": pl.Int64,
    "flip": pl.Boolean,
}


def available(model: LanguageModel) -> tuple[dict[str, list[Site]], dict[str, str]]:
    """Return the sites that can be patched, by kind, and why the other kinds cannot."""
    found: dict[str, list[Site]] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        try:
            found[kind] = sites_of_kind(model, kind)[0]
        except LayerscopeError as error:
            missing[kind] = str(error)
    return found, missing


def patch_facts(
    model: LanguageModel, facts: Sequence[Fact], *, products: Products = "default"
) -> Piece:
    """Patch every block's sites at the answer slot, clean into corrupted, and the control's.

    Returns:
        One row per fact, donor, site and block; payload ``plain``: per fact what both runs say.
    """
    kinds, _ = available(model)
    every = [site for sites in kinds.values() for site in sites]
    donors = {
        CLEAN: values_at(model, [fact.plain() for fact in facts], every, products=products),
        CONTROL: values_at(
            model,
            [(fact.third or fact.clean).slot() for fact in facts],
            [site for kind in CONTROLLED for site in kinds.get(kind, [])],
            products=products,
        ),
    }
    clean = run_at(model, [fact.plain() for fact in facts], _nothing, products=products)
    plans = [_cells_of(fact, donors) for fact in facts]

    def make(number: int, recording: Recording, _row: int) -> list[Patches]:
        end = recording.n_columns - 1
        return [(patch(site, donors[who][site][number], end),) for who, site in plans[number]]

    corrupted = run_at(model, [fact.corrupted() for fact in facts], make, products=products)
    rows = [
        row
        for fact, plan, result in zip(facts, plans, corrupted, strict=True)
        for row in _rows(fact, plan, result)
    ]
    plain = {
        fact.key: {"clean": list(own.plain[:3]), "corrupted": list(other.plain[:3])}
        for fact, own, other in zip(facts, clean, corrupted, strict=True)
    }
    return Piece(pl.DataFrame(rows, schema=SCHEMA, orient="row"), {"plain": plain})


def _nothing(_number: int, _recording: Recording, _row: int) -> list[Patches]:
    return []


def _cells_of(fact: Fact, donors: Mapping[str, Mapping[Site, Tensor]]) -> list[tuple[str, Site]]:
    """Return who gives what: the clean run everything, the third one only where there is one."""
    names = [CLEAN] if fact.third is None else [CLEAN, CONTROL]
    return [(name, site) for name in names for site in donors[name]]


def _rows(fact: Fact, plan: Sequence[tuple[str, Site]], result: Result) -> list[tuple[Any, ...]]:
    before = result.plain
    rows: list[tuple[Any, ...]] = []
    for (who, site), seen in zip(plan, result.cells, strict=True):
        assert site.layer is not None
        flip = before.rank > 1 and seen.rank == 1
        rows.append(
            (
                fact.key,
                who,
                site.kind,
                site.layer,
                site.layer + 1,
                seen.logit_diff,
                seen.log2p,
                seen.log2p - before.log2p,
                seen.rank,
                flip,
            )
        )
    return rows


def causal_onsets(patches: pl.DataFrame, *, min_bits: float) -> pl.DataFrame:
    """Return, per item, the first row where a patch gives rank 1 and at least `min_bits`.

    Columns ``onset_SITE`` per site; ``causal``: the earlier of an MLP's and a block's;
    ``control``: the same for the third subject's values, which should give none.
    """
    hits = patches.filter((pl.col("rank") == 1) & (pl.col("bits") >= min_bits))
    own = hits.filter(pl.col("donor") == CLEAN)
    table = patches.select("item").unique(maintain_order=True)

    def first(rows: pl.DataFrame, name: str) -> pl.DataFrame:
        return rows.group_by("item", maintain_order=True).agg(pl.col("row").min().alias(name))

    parts = {f"onset_{kind}": own.filter(pl.col("site") == kind) for kind in KINDS}
    parts["causal"] = own.filter(pl.col("site").is_in(CAUSAL))
    parts["control"] = hits.filter(pl.col("donor") == CONTROL)
    for name, rows in parts.items():
        table = table.join(first(rows, name), on="item", how="left", maintain_order="left")
    controlled = patches.filter(pl.col("donor") == CONTROL)["item"].unique()
    return table.with_columns(pl.col("item").is_in(controlled.implode()).alias("controlled"))
