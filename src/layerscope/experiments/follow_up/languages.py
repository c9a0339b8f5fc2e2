"""English MLP outputs put into another language's corrupted prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
from torch import Tensor

from layerscope.experiments.follow_up.facts import Prompt
from layerscope.experiments.follow_up.slots import Patches, Slot, patch, run_at, values_at
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import Recording
from layerscope.models import LanguageModel, Site
from layerscope.products import Products

SCHEMA = {
    "relation": pl.String,
    "language": pl.String,
    "item": pl.String,
    "donor": pl.String,
    "block": pl.Int32,
    "row": pl.Int32,
    "bits": pl.Float64,
    "rank": pl.Int64,
    "flip": pl.Boolean,
    "answered": pl.Boolean,
    "same_token": pl.Boolean,
}
SOURCE, OWN, OTHER = "source", "own", "other"


@dataclass(frozen=True)
class Crossing:
    """A fact in two languages.

    Attributes:
        source: its question in the language that values are taken from.
        clean: the same fact in the other language. corrupted: another subject, in that language.
        third: a third subject in the source language, the control; None where there is none.
    """

    source: Prompt
    clean: Prompt
    corrupted: Prompt
    third: Prompt | None

    def slot(self) -> Slot:
        """Return the corrupted prompt, read for the fact's answer in its own language."""
        item = self.clean.item.key
        return Slot(item, self.corrupted.ids, self.clean.answer, self.corrupted.answer)


def cross(
    model: LanguageModel,
    crossings: Sequence[Crossing],
    sites: Sequence[Site],
    *,
    products: Products = "default",
) -> Piece:
    """Patch every block's MLP output at the answer slot, from three donors.

    ``source`` is the fact in the source language, ``own`` the fact in the language itself (what
    could be reached at most), ``other`` a third subject in the source language (the control).
    ``answered``: the model answers the clean prompt of the language. ``same_token``: the answer
    begins alike in both languages, so that nothing had to be translated.
    """
    donors: dict[str, dict[Site, Tensor]] = {
        SOURCE: _values(model, [entry.source for entry in crossings], sites, products),
        OWN: _values(model, [entry.clean for entry in crossings], sites, products),
        OTHER: _values(model, [e.third or e.source for e in crossings], sites, products),
    }
    plans = [
        [(name, site) for name in donors if name != OTHER or entry.third for site in sites]
        for entry in crossings
    ]

    def make(number: int, recording: Recording, _row: int) -> list[Patches]:
        end = recording.n_columns - 1
        return [(patch(site, donors[name][site][number], end),) for name, site in plans[number]]

    plain = run_at(
        model,
        [entry.clean.slot() for entry in crossings],
        lambda _number, _recording, _row: [],
        products=products,
    )
    results = run_at(model, [entry.slot() for entry in crossings], make, products=products)
    rows: list[tuple[object, ...]] = []
    for entry, own, plan, result in zip(crossings, plain, plans, results, strict=True):
        item, before = entry.clean.item, result.plain
        for (name, site), seen in zip(plan, result.cells, strict=True):
            block = site.layer or 0
            flip = before.rank > 1 and seen.rank == 1
            bits = seen.log2p - before.log2p
            what = (item.relation, item.language, item.key, name, block, block + 1)
            same = entry.source.answer == entry.clean.answer
            rows.append((*what, bits, seen.rank, flip, own.plain.rank == 1, same))
    return Piece(pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def _values(
    model: LanguageModel, prompts: Sequence[Prompt], sites: Sequence[Site], products: Products
) -> dict[Site, Tensor]:
    return values_at(model, [prompt.slot() for prompt in prompts], sites, products=products)
