"""The streaming readout: hidden rows in, statistics over the vocabulary out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.products import ProductChoice, Products, choose
from layerscope.products import products as product_scope
from layerscope.readout import finish, geometry
from layerscope.readout.job import BITS, Job
from layerscope.readout.part import Part
from layerscope.readout.plan import Budget, Tile, plan
from layerscope.readout.request import Reference, Request, TokenSets
from layerscope.readout.result import Collector, Readout
from layerscope.readout.unembedding import Unembedding, as_float32


@torch.no_grad()
def readout(
    hidden: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    *,
    request: Request | None = None,
    reference: Reference | None = None,
    against: Float[Tensor, "row d_model"] | None = None,
    tokens: Int[Tensor, "row n_tok"] | None = None,
    token_sets: TokenSets | None = None,
    products: Products | ProductChoice = "checked",
    budget_bytes: int = 256 * 2**20,
) -> Readout:
    """Unembed all rows, tile by tile, and return their statistics; logits are never kept.

    Results do not depend on the budget beyond float32 rounding, and the same call on the same
    machine gives the same bytes.

    Args:
        hidden: [row, d_model] vectors ready to be unembedded (a lens has transformed them).
        unembedding: the model's head.
        request: what to compute; everything but the overlap sets by default.
        reference: what rows are compared with (see Reference).
        against: [row, d_model] the same rows in another lens, compared pairwise.
        tokens: [row, n_tok] ids whose log-probability, rank and cosine are wanted; -1 for none.
        token_sets: sets of tokens whose probability mass is wanted.
        products: "checked" (the fastest float32-accurate product), "default" (torch as found).
        budget_bytes: memory for tiles; the statistics themselves come on top.

    Returns:
        Readout of CPU tensors in the order of the rows.

    Raises:
        ConfigError: shapes or ids do not fit, or the budget is below a few rows of logits.
    """
    job = Job(hidden, unembedding, request or Request(), reference, against, tokens, token_sets)
    job.check()
    if isinstance(products, str):
        products = choose(products, device=hidden.device)
    budget = Budget.of(
        budget_bytes,
        d_vocab=unembedding.d_vocab,
        d_model=unembedding.d_model,
        converted=unembedding.weight.dtype != torch.float32,
    )
    tiles = plan(
        n_rows=job.n_rows,
        index=None if reference is None else reference.index,
        n_references=job.n_references,
        paired=against is not None,
        budget=budget,
    )
    collector = Collector()
    stream = _Stream(job, budget, tiles, products)
    for tile in tiles:
        stream.read(tile, collector)
    return finish.finish(collector.finish(n_rows=job.n_rows), job)


class _Stream:
    """Reads tiles one after the other through the same buffers."""

    def __init__(
        self, job: Job, budget: Budget, tiles: list[Tile], products: ProductChoice
    ) -> None:
        self.job, self.budget, self.products = job, budget, products
        d_vocab, device = job.unembedding.d_vocab, job.hidden.device
        worked_on = max(
            tile.slots.shape[1] * min(budget.worked_on(tile.slots.shape[1]), tile.slots.shape[0])
            for tile in tiles
        )
        n_tile = max(tile.slots.numel() for tile in tiles)
        self.logits = torch.empty(n_tile * d_vocab, device=device)
        self.scratch = torch.empty(3 if tiles[0].paired else 2, worked_on * d_vocab, device=device)

    def read(self, tile: Tile, collector: Collector) -> None:
        """Unembed one tile and collect its raw sums."""
        n_groups, n_slots = tile.slots.shape
        slots = tile.slots.to(self.logits.device)
        vectors = self.job.vectors(slots.flatten())
        z = self.logits[: slots.numel() * self.job.unembedding.d_vocab]
        z = z.view(n_groups, n_slots, -1)
        self._multiply(vectors, z.view(slots.numel(), -1))
        own = slots[:, : tile.n_out].flatten()
        mine = vectors.view(n_groups, n_slots, -1)[:, : tile.n_out].flatten(0, 1)
        raw = geometry.cosines(self.job, own, mine)
        raw["broken"] = ~mine.isfinite().all(-1)
        collector.add(own, raw)
        step = self.budget.worked_on(n_slots)
        for first in range(0, n_groups, step):
            part = slice(first, first + step)
            rows = slots[part, : tile.n_out].flatten()
            sums = Part(self.job, tile, slots[part], z[part], self.scratch).sums()
            collector.add(rows, {name: value.flatten(0, 1) for name, value in sums.items()})

    def _multiply(self, vectors: Tensor, out: Tensor) -> None:
        """Write the bare products, in bits, converting low-precision weights slice by slice."""
        weight = self.job.unembedding.weight.detach()
        vectors = vectors * BITS
        with product_scope(self.products):
            if weight.dtype == torch.float32:
                torch.mm(vectors, weight.T, out=out)
                return
            for first in range(0, weight.shape[0], self.budget.slice):
                part = slice(first, first + self.budget.slice)
                torch.mm(vectors, as_float32(weight[part]).T, out=out[:, part])
