"""The streaming readout: hidden rows in, statistics over the vocabulary out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.products import ProductChoice, Products, choose
from layerscope.products import products as product_scope
from layerscope.readout import plan, ranking, statistics
from layerscope.readout.request import (
    Reference,
    Request,
    TokenSets,
    check_reference,
    check_sets,
    check_tokens,
)
from layerscope.readout.result import Collector, Readout
from layerscope.readout.statistics import LN2, Sums
from layerscope.readout.unembedding import Unembedding, as_float32, untransformed

_BUFFERS = 3  # logits, exponentials, and what single passes allocate
_MIN_SLOTS = 3  # a row, its counterpart in another lens, a reference


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
    job = _Job(hidden, unembedding, request or Request(), reference, against, tokens, token_sets)
    job.check()
    if isinstance(products, str):
        products = choose(products, device=hidden.device)
    collector = Collector()
    with product_scope(products):
        _run(job, collector, budget_bytes=budget_bytes)
    return collector.finish(n_rows=hidden.shape[0])


@dataclass(frozen=True)
class _Job:
    hidden: Tensor
    unembedding: Unembedding
    request: Request
    reference: Reference | None
    against: Tensor | None
    tokens: Tensor | None
    sets: TokenSets | None

    def check(self) -> None:
        """Raise ConfigError where the parts do not fit each other."""
        self.unembedding.check(self.hidden)
        rows, d_vocab = self.hidden.shape[0], self.unembedding.d_vocab
        if rows == 0:
            raise ConfigError("readout needs at least one row; hidden is empty")
        if self.reference is not None:
            check_reference(
                self.reference, rows=rows, d_model=self.unembedding.d_model, d_vocab=d_vocab
            )
        if self.against is not None and self.against.shape != self.hidden.shape:
            raise ConfigError(
                f"against has shape {tuple(self.against.shape)}; pass the rows of the other lens, "
                f"{tuple(self.hidden.shape)}"
            )
        if self.tokens is not None:
            check_tokens(self.tokens, rows=rows, d_vocab=d_vocab, name="tokens")
        if self.sets is not None:
            check_sets(self.sets, rows=rows, d_vocab=d_vocab)

    def source_rows(self, slots: Int[Tensor, " slot"]) -> Float[Tensor, "slot d_model"]:
        """Return the float32 hidden vectors of some slots (zeros where logits are given)."""
        n = self.hidden.shape[0]
        n_ref = self.n_references or 0
        rows = self.hidden[slots.clamp_max(n - 1)].float()
        if self.reference is not None and n_ref:
            chosen = (slots >= n) & (slots < n + n_ref)
            if self.reference.hidden is not None:
                rows[chosen] = self.reference.hidden[slots[chosen] - n].float().to(rows.device)
            else:
                rows[chosen] = 0.0
        if self.against is not None:
            chosen = slots >= n + n_ref
            rows[chosen] = self.against[slots[chosen] - n - n_ref].float()
        return rows

    @property
    def n_references(self) -> int | None:
        """Number of separate reference rows; None when references are among the rows."""
        if self.reference is None:
            return None
        separate = self.reference.hidden if self.reference.hidden is not None else None
        separate = self.reference.logits if separate is None else separate
        return None if separate is None else separate.shape[0]


def _run(job: _Job, collector: Collector, *, budget_bytes: int) -> None:
    d_vocab, device = job.unembedding.d_vocab, job.hidden.device
    max_slots = budget_bytes // (4 * _BUFFERS * d_vocab)
    if max_slots < _MIN_SLOTS:
        raise ConfigError(
            f"budget_bytes={budget_bytes} holds fewer than {_MIN_SLOTS} rows of {d_vocab} logits; "
            f"pass at least {4 * _BUFFERS * d_vocab * _MIN_SLOTS}"
        )
    index = job.reference.index if job.reference is not None else None
    tiles = list(
        plan.plan(
            n_rows=job.hidden.shape[0],
            index=index,
            n_references=job.n_references,
            paired=job.against is not None,
            max_slots=max_slots,
        )
    )
    largest = max(tile.slots.numel() for tile in tiles)
    buffers = torch.empty(2, largest * d_vocab, dtype=torch.float32, device=device)
    for tile in tiles:
        collector.add(tile.slots[:, : tile.n_out].flatten(), _tile(job, tile, buffers))


def _tile(job: _Job, tile: plan.Tile, buffers: Tensor) -> dict[str, Tensor]:
    request = job.request
    shape = (*tile.slots.shape, job.unembedding.d_vocab)
    z, scratch = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in buffers)
    slots = tile.slots.to(z.device)
    rows = job.source_rows(slots.flatten())
    cosine_sums = _products(job, tile, rows, z)

    n_own = tile.n_out * (2 if tile.paired else 1)
    own = slots[:, : tile.n_out].flatten()
    values: dict[str, Tensor] = {}
    best = statistics.top(z[:, :n_own].reshape(-1, shape[2]), request)
    logits = z[:, : tile.n_out].reshape(-1, shape[2])
    largest = z.amax(-1)
    sums = statistics.sums(z, largest, scratch)
    mine = sums.slots(slice(0, tile.n_out))
    lse = mine.logsumexp.reshape(-1)
    values["logsumexp"] = lse
    bad = ~(mine.mean.isfinite() & mine.logsumexp.isfinite()).reshape(-1)
    if request.entropy:
        values["entropy_bits"] = mine.entropy.reshape(-1) / LN2
    if request.extremes:
        least = logits.amin(-1)
        values["max_abs_logit"] = torch.maximum(logits.amax(-1), -least)
        values["min_log2p"] = (least - lse) / LN2
    if best is not None:
        values.update(_top(best, tile, lse, request))
    if job.tokens is not None:
        values.update(_tokens(job, own, logits, lse))
    if job.sets is not None:
        overlap = values.get("overlap_ids")
        values.update(_sets(job, own, logits, lse, overlap))
    values.update(_compared(tile, z, sums, request, cosine_sums))
    return _masked(
        values,
        bad | ~rows.view(*tile.slots.shape, -1)[:, : tile.n_out].isfinite().all(-1).flatten(),
    )


def _products(job: _Job, tile: plan.Tile, rows: Tensor, z: Tensor) -> dict[str, Tensor] | None:
    """Fill z with logits, converting low-precision weights slice by slice."""
    unembedding = job.unembedding
    weight = unembedding.weight.detach()
    flat = z.view(-1, z.shape[-1])
    step = z.shape[-1] if weight.dtype == torch.float32 else 4096
    wanted = job.request.cosine and (tile.reference is not None or tile.paired)
    for first in range(0, z.shape[-1], step):
        part = as_float32(weight[first : first + step])
        torch.mm(rows, part.T, out=flat[:, first : first + step])
    bare = untransformed(unembedding)
    given = job.reference.logits if job.reference is not None else None
    if bare:
        _take_given(z, tile, given, n_rows=job.hidden.shape[0])
    cosine_sums = statistics.cosines(z, tile) if wanted else None
    if not bare:
        unembedding.transform(flat)
        _take_given(z, tile, given, n_rows=job.hidden.shape[0])
        if cosine_sums is not None and given is not None:
            cosine_sums.pop("reference", None)  # given logits cannot be undone to bare products
    return cosine_sums


def _take_given(z: Tensor, tile: plan.Tile, given: Tensor | None, *, n_rows: int) -> None:
    if given is not None and tile.reference is not None:
        z[:, tile.reference] = given[tile.slots[:, tile.reference] - n_rows].to(z)


def _top(
    best: tuple[Tensor, Tensor], tile: plan.Tile, lse: Tensor, request: Request
) -> dict[str, Tensor]:
    groups = tile.slots.shape[0]
    logits, ids = (part.view(groups, -1, part.shape[-1]) for part in best)
    own_logits = logits[:, : tile.n_out].flatten(0, 1)
    own_ids = ids[:, : tile.n_out].flatten(0, 1)
    values: dict[str, Tensor] = {}
    if request.top_k:
        values["top_ids"] = own_ids[:, : request.top_k]
        values["top_logits"] = own_logits[:, : request.top_k]
        values["top_log2p"] = (own_logits[:, : request.top_k] - lse[:, None]) / LN2
    if request.gap and own_logits.shape[1] > 1:
        values["top1_top2_gap"] = own_logits[:, 0] - own_logits[:, 1]
    if request.overlap_k:
        values["overlap_ids"] = own_ids[:, : request.overlap_k]
        if tile.paired:
            other = ids[:, tile.n_out : 2 * tile.n_out].flatten(0, 1)[:, : request.overlap_k]
            values["against.jaccard"] = ranking.jaccard(values["overlap_ids"], other)
    return values


def _tokens(job: _Job, own: Tensor, logits: Tensor, lse: Tensor) -> dict[str, Tensor]:
    assert job.tokens is not None
    ids = job.tokens.to(logits.device)[own]
    absent = ids < 0
    safe = ids.clamp_min(0)
    chosen = logits.gather(-1, safe)
    return {
        "token_logit": chosen.masked_fill(absent, torch.nan),
        "token_log2p": ((chosen - lse[:, None]) / LN2).masked_fill(absent, torch.nan),
        "token_rank": ranking.ranks(logits, chosen).masked_fill(absent, 0),
        "cos_to_token": _cosines(job, own, safe).masked_fill(absent, torch.nan),
    }


def _sets(
    job: _Job, own: Tensor, logits: Tensor, lse: Tensor, overlap: Tensor | None
) -> dict[str, Tensor]:
    assert job.sets is not None
    which = job.sets.index.to(logits.device)[own]
    ids = job.sets.ids.to(logits.device)[which.clamp_min(0)]  # [row, n_sets, longest]
    absent = (ids < 0) | (which < 0)[..., None]
    safe = ids.clamp_min(0)
    log_p = logits.gather(-1, safe.flatten(1)).view(safe.shape) - lse[:, None, None]
    p = log_p.exp().masked_fill(absent, 0.0)
    no_set = which < 0
    cosine = _cosines(job, own, safe.flatten(1)).view(safe.shape)
    values = {
        "set_mass": p.sum(-1).masked_fill(no_set, torch.nan),
        "cos_to_set_max": cosine.masked_fill(absent, -torch.inf)
        .amax(-1)
        .masked_fill(absent.all(-1), torch.nan),
    }
    if overlap is not None:
        listed = (safe[..., None] == overlap[:, None, None, :]).any(-1)
        values["set_topk_mass"] = (p * listed).sum(-1).masked_fill(no_set, torch.nan)
    return values


def _cosines(job: _Job, own: Tensor, ids: Tensor) -> Tensor:
    """Return cosines of hidden rows with unembedding rows [row, any]; NaN for a zero vector."""
    rows = job.hidden[own].float()
    vectors = job.unembedding.weight.detach()[ids].float()
    inner = torch.linalg.vecdot(vectors, rows[:, None, :])
    return inner / (vectors.norm(dim=-1) * rows.norm(dim=-1)[:, None])


def _compared(
    tile: plan.Tile, z: Tensor, sums: Sums, request: Request, cosine_sums: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Compare with the other lens and with the reference."""
    values: dict[str, Tensor] = {}
    n, mine = tile.n_out, sums.slots(slice(0, tile.n_out))
    if tile.paired:
        theirs = sums.slots(slice(n, 2 * n))
        copy = Sums(mine.exponentials.clone(), mine.total, mine.logsumexp, mine.mean)
        found = statistics.divergences(z[:, :n].clone(), copy, z[:, n : 2 * n], theirs, request)
        values.update({f"against.{name}": value.flatten() for name, value in found.items()})
    if tile.reference is not None:
        one = slice(tile.reference, tile.reference + 1)
        theirs = sums.slots(one)
        theirs = Sums(theirs.exponentials.clone(), theirs.total, theirs.logsumexp, theirs.mean)
        found = statistics.divergences(z[:, :n], mine, z[:, one].clone(), theirs, request)
        values.update({f"reference.{name}": value.flatten() for name, value in found.items()})
        if request.entropy:
            values["reference_entropy_bits"] = (theirs.entropy / LN2).expand(-1, n).flatten()
    if cosine_sums is not None:
        values.update(_logit_cosines(tile, cosine_sums))
    return values


def _logit_cosines(tile: plan.Tile, cosine_sums: dict[str, Tensor]) -> dict[str, Tensor]:
    n, square = tile.n_out, cosine_sums["square"]
    partners: dict[str, Tensor] = {}
    if tile.reference is not None:
        partners["reference"] = square[:, tile.reference : tile.reference + 1]
    if tile.paired:
        partners["against"] = square[:, n : 2 * n]
    return {
        f"{name}.cosine": (cosine_sums[name][:, :n] / (square[:, :n] * norms).sqrt())
        .clamp(-1.0, 1.0)
        .flatten()
        for name, norms in partners.items()
        if name in cosine_sums
    }


def _masked(values: dict[str, Tensor], bad: Tensor) -> dict[str, Tensor]:
    """Flag rows with NaN or infinity, and blank all their statistics."""
    blanked: dict[str, Tensor] = {"nonfinite": bad}
    for name, value in values.items():
        blank = torch.nan if value.is_floating_point() else (0 if name == "token_rank" else -1)
        where = bad.view(-1, *[1] * (value.ndim - 1))
        blanked[name] = value.masked_fill(where, blank)
    return blanked
