"""A relation's direction at one block: fitted, added, removed, and what runs through it.

The direction of a relation is the mean, over training facts, of the residual at the answer slot of
its question less that of other questions about the same subject. So it holds what is asked, not
of whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.slots import Patches, Slot, patch, run_at, values_at
from layerscope.experiments.units import Piece
from layerscope.interventions.patching import Recording
from layerscope.models import LanguageModel, Site

CONCEPT, RANDOM = "concept", "random"
ADD, PROJECT = "add", "project"
DOSE_SCHEMA = {
    "relation": pl.String,
    "set": pl.String,
    "item": pl.String,
    "variant": pl.String,
    "direction": pl.String,
    "draw": pl.Int32,
    "operation": pl.String,
    "alpha": pl.Float64,
    "log2p_before": pl.Float64,
    "rank_before": pl.Int64,
    "log2p": pl.Float64,
    "rank": pl.Int64,
    "bits": pl.Float64,
    "moved": pl.Float64,
    "index": pl.Float64,
}
MEDIATION_SCHEMA = {
    "relation": pl.String,
    "pair": pl.String,
    "item": pl.String,
    "direction": pl.String,
    "draw": pl.Int32,
    "total_bits": pl.Float64,
    "through_bits": pl.Float64,
    "around_bits": pl.Float64,
    "rank_whole": pl.Int64,
    "rank_through": pl.Int64,
}
LEAST_MOVED = 0.01  # below this mass the index divides by next to nothing


@dataclass(frozen=True, eq=False)
class Direction:
    """A fitted direction.

    Attributes:
        block: whose output it is read from and acts on.
        vector: [d_model], the difference of means; alpha = 1 adds it as it is.
        facts: how many it is fitted on. split_half: cosine of those of two halves.
        typical_norm: median length of the residual at the slot there.
    """

    block: int
    vector: Float[Tensor, " d_model"]
    facts: int
    split_half: float | None
    typical_norm: float

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """The direction, of length 1."""
        return self.vector / self.vector.norm()

    @property
    def site(self) -> Site:
        """Where it acts."""
        return Site("resid_post", self.block)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of it, ready for JSON."""
        return {
            "block": self.block,
            "row": self.block + 1,
            "facts": self.facts,
            "norm": float(self.vector.norm()),
            "typical_norm": self.typical_norm,
            "split_half": self.split_half,
        }


@dataclass(frozen=True)
class Trial:
    """A prompt that a direction is tried on; its slot's answer is the relation's own."""

    set: str
    variant: str
    slot: Slot


@dataclass(frozen=True)
class Pair:
    """A prompt that is patched, and the one whose residual is taken; the slot's answer counts."""

    kind: str
    base: Slot
    donor: Slot


def fit(
    model: LanguageModel,
    own: Sequence[Slot],
    others: Sequence[Sequence[Slot]],
    block: int,
    config: FollowUpConfig,
) -> Direction:
    """Fit the direction: questions of the relation against others about the same subjects."""
    site = Site("resid_post", block)
    mine = values_at(model, own, [site], products=config.products)[site].float()
    flat = [slot for some in others for slot in some]
    theirs = values_at(model, flat, [site], products=config.products)[site].float()
    means = torch.stack([part.mean(0) for part in theirs.split([len(some) for some in others])])
    differences = (mine - means).cpu()
    halves = (differences[::2].mean(0), differences[1::2].mean(0)) if len(own) > 1 else None
    cosine = None if halves is None else float(torch.cosine_similarity(*halves, dim=0))
    typical = float(torch.cat([mine, theirs]).norm(dim=-1).median())
    return Direction(block, differences.mean(0), len(own), cosine, typical)


def random_directions(direction: Direction, count: int, *, seed: int) -> list[Tensor]:
    """Return random directions of the same length."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(direction.vector), generator=generator)
    return list(drawn / drawn.norm(dim=1, keepdim=True) * direction.vector.norm())


def named_vectors(
    direction: Direction, config: FollowUpConfig
) -> list[tuple[str, int, Float[Tensor, " d_model"]]]:
    """Return the direction and its random controls, with kind and number of the draw."""
    drawn = random_directions(direction, config.random_directions, seed=config.seed)
    return [(CONCEPT, 0, direction.vector)] + [
        (RANDOM, draw, vector) for draw, vector in enumerate(drawn)
    ]


def without(
    residual: Float[Tensor, " d_model"], vector: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """Return (I - vv') h with v of length 1."""
    unit = vector / vector.norm()
    return residual - (residual @ unit) * unit


def dose(
    model: LanguageModel,
    relation: str,
    trials: Sequence[Trial],
    direction: Direction,
    config: FollowUpConfig,
) -> Piece:
    """Add multiples of the direction at the answer slot, and project it out; random ones beside.

    ``index`` is bits gained / mass moved among the other top tokens; null where less
    than 0.01 moved.
    """
    vectors = named_vectors(direction, config)
    plans = [
        (name, draw, operation, alpha, vector)
        for name, draw, vector in vectors
        for operation, alpha in [*((ADD, alpha) for alpha in config.alphas), (PROJECT, None)]
    ]

    def make(_number: int, recording: Recording, row: int) -> list[Patches]:
        held, end = recording.value(direction.site)[row, -1], recording.n_columns - 1
        cells: list[Patches] = []
        for *_, alpha, vector in plans:
            v = vector.to(held.device, torch.promote_types(held.dtype, torch.float32))
            h = held.to(v.dtype)
            value = without(h, v) if alpha is None else h + alpha * v
            cells.append((patch(direction.site, value.to(held.dtype), end),))
        return cells

    results = run_at(
        model,
        [trial.slot for trial in trials],
        make,
        capture=[direction.site],
        top=config.top_tokens,
        products=config.products,
    )
    rows: list[tuple[Any, ...]] = []
    for trial, result in zip(trials, results, strict=True):
        before = result.plain
        for (name, draw, operation, alpha, _), seen in zip(plans, result.cells, strict=True):
            bits = seen.log2p - before.log2p
            index = bits / seen.moved if seen.moved >= LEAST_MOVED else None
            what = (relation, trial.set, trial.slot.key, trial.variant, name, draw)
            figures = (before.log2p, before.rank, seen.log2p, seen.rank, bits, seen.moved, index)
            rows.append((*what, operation, alpha, *figures))
    return Piece(pl.DataFrame(rows, schema=DOSE_SCHEMA, orient="row"))


def mediate(
    model: LanguageModel,
    relation: str,
    pairs: Sequence[Pair],
    direction: Direction,
    config: FollowUpConfig,
) -> Piece:
    """Put the donor's whole residual in, only its part along the direction, and only the rest."""
    site = direction.site
    donors = values_at(model, [pair.donor for pair in pairs], [site], products=config.products)[
        site
    ]
    vectors = named_vectors(direction, config)
    splits: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda change, v: change - without(change, v),
        without,
    ]

    def make(number: int, recording: Recording, row: int) -> list[Patches]:
        held, end = recording.value(site)[row, -1], recording.n_columns - 1
        wide = torch.promote_types(held.dtype, torch.float32)
        h, change = held.to(wide), donors[number].to(wide) - held.to(wide)
        values = [h + change]
        for _, _, vector in vectors:
            values += [h + split(change, vector.to(held.device, wide)) for split in splits]
        return [(patch(site, value.to(held.dtype), end),) for value in values]

    results = run_at(
        model,
        [pair.base for pair in pairs],
        make,
        capture=[site],
        products=config.products,
    )
    rows: list[tuple[Any, ...]] = []
    for pair, result in zip(pairs, results, strict=True):
        before, (whole, *parts) = result.plain.log2p, result.cells
        for number, (name, draw, _) in enumerate(vectors):
            through, around = parts[2 * number], parts[2 * number + 1]
            bits = [seen.log2p - before for seen in (whole, through, around)]
            what = (relation, pair.kind, pair.base.key, name, draw)
            rows.append((*what, *bits, whole.rank, through.rank))
    return Piece(pl.DataFrame(rows, schema=MEDIATION_SCHEMA, orient="row"))
