"""Heads near the onset: ablated and patched one by one at the answer slot, then the top ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import polars as pl
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.facts import Fact
from layerscope.experiments.follow_up.slots import Patches, patch, run_at, values_at
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import Recording, sites_of_kind
from layerscope.models import LanguageModel, Site

Head = tuple[int, int]
TOP, RANDOM = "top", "random"
SCHEMA = {
    "item": pl.String,
    "block": pl.Int32,
    "head": pl.Int32,
    "ablate_bits": pl.Float64,
    "patch_bits": pl.Float64,
    "patch_rank": pl.Int64,
}
CURVE_SCHEMA = {
    "relation": pl.String,
    "language": pl.String,
    "item": pl.String,
    "which": pl.String,
    "draw": pl.Int32,
    "k": pl.Int32,
    "heads": pl.String,
    "ablate_bits": pl.Float64,
    "patch_bits": pl.Float64,
}


class HeadScanner:
    """Ablates and patches heads of one relation's facts.

    An ablated head gives, at the answer slot, its mean over the clean prompts of the relation.
    """

    def __init__(self, model: LanguageModel, facts: Sequence[Fact], config: FollowUpConfig) -> None:
        self.model, self.facts, self.config = model, facts, config
        try:
            sites = sites_of_kind(model, "heads")[0]
        except CapabilityError as error:
            sites, self.missing = [], str(error)
        else:
            self.missing = ""
        self.sites = {site.layer: site for site in sites}
        self._means: dict[Site, Tensor] | None = None

    def near(self, block: int) -> list[Site]:
        """Return the attention of the blocks within reach of one."""
        reach = self.config.reach
        return [
            self.sites[at] for at in range(block - reach, block + reach + 1) if at in self.sites
        ]

    def heads(self, block: int) -> list[Head]:
        """Return every head within reach of a block."""
        count = self.model.n_heads
        return [(int(site.layer or 0), head) for site in self.near(block) for head in range(count)]

    def means(self) -> dict[Site, Float[Tensor, "head d_head"]]:
        """Return every head's mean at the answer slot over the clean prompts."""
        if self._means is None:
            slots = [fact.plain() for fact in self.facts]
            found = values_at(
                self.model, slots, list(self.sites.values()), products=self.config.products
            )
            self._means = {site: value.mean(0) for site, value in found.items()}
        return self._means

    def effects(
        self, facts: Sequence[Fact], sets: Sequence[Sequence[Sequence[Head]]]
    ) -> list[list[tuple[float, float, int]]]:
        """Return, per fact and set of heads, (bits lost without, bits gained with, rank then).

        Without: means in place of the set, in the clean run. With: the set's clean values in the
        corrupted run.
        """
        means = self.means()
        sites = sorted({self.sites[b] for own in sets for some in own for b, _ in some}, key=str)
        products = self.config.products
        clean = values_at(self.model, [fact.plain() for fact in facts], sites, products=products)

        def cells(values: Mapping[Site, Tensor], own: bool) -> Any:
            def make(number: int, recording: Recording, _row: int) -> list[Patches]:
                end = recording.n_columns - 1

                def value(block: int, head: int) -> Tensor:
                    held = values[self.sites[block]]
                    return held[number, head] if own else held[head]

                return [
                    tuple(patch(self.sites[b], value(b, h), end, h) for b, h in some)
                    for some in sets[number]
                ]

            return make

        plain = [fact.plain() for fact in facts]
        corrupted = [fact.corrupted() for fact in facts]
        without = run_at(self.model, plain, cells(means, own=False), products=products)
        with_ = run_at(self.model, corrupted, cells(clean, own=True), products=products)
        return [
            [
                (lost.plain.log2p - off.log2p, on.log2p - won.plain.log2p, on.rank)
                for off, on in zip(lost.cells, won.cells, strict=True)
            ]
            for lost, won in zip(without, with_, strict=True)
        ]

    def scan(self, facts: Sequence[Fact], blocks: Sequence[int]) -> Piece:
        """Scan each fact's heads within reach of its own block, one by one."""
        heads = [self.heads(block) for block in blocks]
        found = self.effects(facts, [[[head] for head in own] for own in heads])
        rows = [
            (fact.key, block, head, *effect)
            for fact, own, effects in zip(facts, heads, found, strict=True)
            for (block, head), effect in zip(own, effects, strict=True)
        ]
        return Piece(pl.DataFrame(rows, schema=SCHEMA, orient="row"))

    def curve(self, held_out: Sequence[Fact], ranked: Sequence[Head]) -> Piece:
        """Ablate and patch the first k of ranked heads together, and as many random others.

        The others are drawn from the heads that are in no top set, so at most half are on top.
        """
        top = list(ranked[: min(self.config.curve, len(ranked) // 2)])
        sets: list[tuple[str, int, list[Head]]] = [
            (TOP, 0, top[:k]) for k in range(1, len(top) + 1)
        ]
        for draw in range(self.config.random_sets):
            order = list(ranked[len(top) :])
            Random(f"{self.config.seed} {draw}").shuffle(order)
            sets += [(RANDOM, draw, order[:k]) for k in range(1, len(top) + 1)]
        found = self.effects(held_out, [[heads for *_, heads in sets]] * len(held_out))
        rows = [
            (*fact.group, fact.key, which, draw, len(heads), _names(heads), *effect[:2])
            for fact, effects in zip(held_out, found, strict=True)
            for (which, draw, heads), effect in zip(sets, effects, strict=True)
        ]
        return Piece(pl.DataFrame(rows, schema=CURVE_SCHEMA, orient="row"))


def ranked_heads(scan: pl.DataFrame, keys: Sequence[str]) -> list[Head]:
    """Return the heads by mean gain when patched, over some facts, the strongest first.

    Only heads that were scanned for at least half of these facts.
    """
    own = scan.filter(pl.col("item").is_in(list(keys)))
    means = (
        own.group_by("block", "head")
        .agg(pl.col("patch_bits").mean().alias("bits"), pl.len().alias("n"))
        .filter(2 * pl.col("n") >= len(set(keys)))
        .sort(["bits", "block", "head"], descending=[True, False, False])
    )
    return [(block, head) for block, head in means.select("block", "head").iter_rows()]


def _names(heads: Sequence[Head]) -> str:
    return " ".join(f"{block}.{head}" for block, head in heads)
