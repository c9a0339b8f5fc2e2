"""The streaming readout: hidden rows in, statistics over the vocabulary out."""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.products import ProductChoice, Products, choose
from layerscope.products.choice import MATRIX_UNITS
from layerscope.readout import finish, fused, geometry, logits, ranking
from layerscope.readout.buffers import lent
from layerscope.readout.job import Job
from layerscope.readout.part import Part, own_rows
from layerscope.readout.plan import Budget, Tile, plan
from layerscope.readout.request import Reference, Request, TokenSets
from layerscope.readout.result import Collector, Readout
from layerscope.readout.unembedding import Unembedding
from layerscope.readout.workers import Workers


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
    kernels: fused.Kernels = "auto",
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
        kernels: "fused" (compiled passes, which need numba), "plain" (torch's own operations), or
            "auto": fused on a CPU where numba is installed, for jobs of at least 2 ** 24 logits,
            or 2 ** 18 in at most 48 rows; else plain. They differ by float32 rounding; the result
            says which ran. Fused kernels also multiply up to 48 rows by themselves (see `dots`),
            whatever the products.
        budget_bytes: memory for tiles; the statistics themselves come on top.

    Returns:
        Readout of CPU tensors in the order of the rows.

    Raises:
        ConfigError: shapes or ids do not fit, the budget is below a few rows of logits, or fused
            kernels are asked for and cannot be had.
    """
    job = Job(hidden, unembedding, request or Request(), reference, against, tokens, token_sets)
    job.check()
    compiled = fused.load(kernels, job)
    if isinstance(products, str):
        products = choose(products, device=hidden.device, compiled=compiled is not None)
    workers = Workers.of(hidden.device)
    budget = Budget.of(
        budget_bytes,
        d_vocab=unembedding.d_vocab,
        d_model=unembedding.d_model,
        converted=unembedding.weight.dtype != torch.float32,
        in_parts=products.precision == MATRIX_UNITS,
        workers=workers.count,
    )
    tiles = plan(
        n_rows=job.n_rows,
        index=None if reference is None else reference.index,
        n_references=job.n_references,
        paired=against is not None,
        budget=budget,
    )
    collector = Collector()
    n_logits = max(tile.slots.numel() for tile in tiles) * unembedding.d_vocab
    with workers, lent(n_logits, hidden.device) as memory:
        stream = _Stream(job, budget, tiles, products, workers, compiled, memory)
        for tile in tiles:
            stream.read(tile, collector)
        raw = collector.finish(n_rows=job.n_rows)
        ran = "plain" if compiled is None else compiled.VERSION
        return finish.finish(raw | geometry.cosines(job), job, kernels=ran)


# Passes over fewer logits than this are done before another thread has heard of them.
_SHARED = 1 << 19
Likeliest = tuple[Float[Tensor, "group slot k"], Int[Tensor, "group slot k"]]


class _Stream:
    """Reads tiles one after the other through the same buffers."""

    def __init__(
        self,
        job: Job,
        budget: Budget,
        tiles: list[Tile],
        products: ProductChoice,
        workers: Workers,
        compiled: ModuleType | None,
        memory: Float[Tensor, " logit"],
    ) -> None:
        self.compiled, self.logits = compiled, memory
        self.job, self.budget, self.products, self.workers = job, budget, products, workers
        d_vocab, device = job.unembedding.d_vocab, job.hidden.device
        worked_on = max(
            tile.slots.shape[1] * min(budget.worked_on(tile.slots.shape[1]), tile.slots.shape[0])
            for tile in tiles
        )
        self.dots = None if compiled is None else fused.load_dots(len(memory) // d_vocab)
        shape = (3 if tiles[0].paired else 1, worked_on * d_vocab)
        if compiled is not None:
            shape = (fused.SCRATCH_ROWS, d_vocab)
        self.block_length = ranking.block_length(d_vocab, job.n_likely)
        self.scratch = [torch.empty(shape, device=device) for _ in range(budget.workers)]
        self.converted: list[Tensor] | None = None
        if job.unembedding.weight.dtype != torch.float32:
            shape = (budget.slice, job.unembedding.d_model)
            self.converted = [torch.empty(shape, device=device) for _ in range(budget.workers)]

    def read(self, tile: Tile, collector: Collector) -> None:
        """Unembed one tile and collect its raw sums."""
        job, d_vocab = self.job, self.job.unembedding.d_vocab
        n_groups, n_slots = tile.slots.shape
        slots = tile.slots.to(self.logits.device)
        own = slots[:, : tile.n_out]
        vectors = job.vectors(slots.flatten())
        flat = self.logits[: slots.numel() * d_vocab].view(-1, d_vocab)
        logits.multiply(
            job,
            vectors,
            out=flat,
            budget=self.budget,
            converted=self.converted,
            products=self.products,
            workers=self.workers,
            dots=self.dots,
        )
        z = flat.view(n_groups, n_slots, d_vocab)
        mine = vectors.view(n_groups, n_slots, -1)[:, : tile.n_out].flatten(0, 1)
        # 0 times anything finite is 0; times NaN or infinity it is NaN.
        collector.add(own.flatten(), {"broken": (mine * 0.0).sum(-1).ne(0.0)})
        found = logits.to_logits(job, tile, slots, z)
        found.update(logits.look_up(job, own, z[:, : tile.n_out]))
        collector.add(own.flatten(), _flattened(found))
        step = self.budget.worked_on(n_slots)
        parts = [slice(first, first + step) for first in range(0, n_groups, step)]
        thresholds = found.get("token_z")
        passes = self._plain if self.compiled is None else self._fused
        raw, likeliest = passes(tile, z, parts, thresholds)
        if likeliest is not None:
            raw.update(logits.most_likely(job, tile, own, likeliest))
        collector.add(own.flatten(), _flattened(raw))

    def _fused(
        self, tile: Tile, z: Tensor, parts: list[slice], thresholds: Tensor | None
    ) -> tuple[dict[str, Tensor], Likeliest | None]:
        assert self.compiled is not None
        sums = fused.FusedTile(self.compiled, self.job, tile)

        def rank(piece: fused.Piece, _worker: int = 0) -> None:
            wanted = None if thresholds is None else thresholds[piece.groups]
            sums.rank(piece, z[piece.groups], wanted)

        def compare(piece: fused.Piece, worker: int) -> None:
            sums.compare(piece, z[piece.groups], scratch=self.scratch[worker])

        def both(piece: fused.Piece, worker: int) -> None:
            rank(piece)
            compare(piece, worker)

        at_once = self.budget.workers if z.numel() >= _SHARED else 1
        pieces = sums.pieces(parts, at_once)
        # Rows of a group that is shared out wait for its reference; others stay in the cache.
        for work in (both,) if len(pieces) == len(parts) else (rank, compare):
            self.workers.map(work, pieces, at_once=at_once)
        return sums.own_rows(), sums.likeliest() if self.job.n_likely else None

    def _plain(
        self, tile: Tile, z: Tensor, parts: list[slice], thresholds: Tensor | None
    ) -> tuple[dict[str, Tensor], Likeliest | None]:
        job = self.job

        def work(part: slice, worker: int) -> tuple[ranking.Candidates | None, dict[str, Tensor]]:
            maxima = ranking.block_maxima(z[part], self.block_length)
            likely = None
            if job.n_likely:
                rows = (z[part].flatten(0, 1), maxima.flatten(0, 1))
                likely = ranking.candidates(*rows, job.n_likely)
            passes = Part(job, tile, z[part], maxima.amax(-1), scratch=self.scratch[worker])
            return likely, passes.sums(None if thresholds is None else thresholds[part])

        done = self.workers.map(work, parts, at_once=self.budget.workers)
        raw = own_rows(tile, [sums for _, sums in done])
        candidates = [likely for likely, _ in done if likely is not None]
        if not candidates:
            return raw, None
        found = ranking.Candidates.join(candidates).largest(job.n_likely)
        top_z, top_ids = (part.unflatten(0, tile.slots.shape) for part in found)
        return raw, (top_z, top_ids)


def _flattened(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.flatten(0, 1) for name, value in values.items()}
