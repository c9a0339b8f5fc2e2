"""What a readout returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Divergences:
    """How each row's distribution p differs from another, q (bits; L1 is 0..2)."""

    kl_to_bits: Float[Tensor, " row"] | None = None  # KL(p || q)
    kl_from_bits: Float[Tensor, " row"] | None = None  # KL(q || p)
    js_bits: Float[Tensor, " row"] | None = None
    l1: Float[Tensor, " row"] | None = None
    cosine: Float[Tensor, " row"] | None = None  # of bias-free, untransformed logits
    jaccard: Float[Tensor, " row"] | None = None  # of the overlap_k most likely tokens


@dataclass(frozen=True)
class Readout:
    """Statistics of every row over the vocabulary: CPU tensors, None where not asked for.

    Floats are float32. A row that holds NaN or infinity is flagged in `nonfinite`; its floats are
    NaN, its ids -1 and its ranks 0. Where only the reference does, or the row of the other lens,
    the comparison is NaN. A token or set that was given as -1 yields NaN and rank 0.
    """

    logsumexp: Float[Tensor, " row"]  # nats
    nonfinite: Bool[Tensor, " row"]
    entropy_bits: Float[Tensor, " row"] | None = None
    top_ids: Int[Tensor, "row k"] | None = None  # most likely first, ties by lowest id
    top_logits: Float[Tensor, "row k"] | None = None
    top_log2p: Float[Tensor, "row k"] | None = None  # bits
    top1_top2_gap: Float[Tensor, " row"] | None = None  # logits
    overlap_ids: Int[Tensor, "row overlap_k"] | None = None
    max_abs_logit: Float[Tensor, " row"] | None = None
    min_log2p: Float[Tensor, " row"] | None = None  # bits
    token_logit: Float[Tensor, "row n_tok"] | None = None
    token_log2p: Float[Tensor, "row n_tok"] | None = None  # bits
    token_rank: Int[Tensor, "row n_tok"] | None = None  # 1 + strictly larger logits; 0 for none
    cos_to_token: Float[Tensor, "row n_tok"] | None = None  # hidden with the unembedding row
    set_mass: Float[Tensor, "row n_sets"] | None = None
    set_topk_mass: Float[Tensor, "row n_sets"] | None = (
        None  # members among the overlap_k likeliest
    )
    cos_to_set_max: Float[Tensor, "row n_sets"] | None = None
    reference: Divergences | None = None
    reference_entropy_bits: Float[Tensor, " row"] | None = None
    against: Divergences | None = None
    kernels: str = "plain"  # which passes ran: "plain", or the compiler of the fused ones

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.logsumexp.shape[0]


class Collector:
    """Gathers the raw sums of many tiles and puts their rows back into the caller's order."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, rows: Int[Tensor, " n"], values: dict[str, Tensor]) -> None:
        """Take some values of the caller's rows `rows`."""
        for name, value in values.items():
            self._pieces.setdefault(name, []).append((rows, value))

    def finish(self, *, n_rows: int) -> dict[str, Tensor]:
        """Return CPU tensors of all rows: NaN, 0 or False where a row has no value."""
        joined: dict[str, Tensor] = {}
        in_order = torch.arange(n_rows)
        for name, pieces in self._pieces.items():
            if len(pieces) == 1 and torch.equal(pieces[0][0].cpu(), in_order):
                joined[name] = pieces[0][1].cpu()
                continue
            rows = torch.cat([piece[0] for piece in pieces]).cpu()
            values = torch.cat([piece[1] for piece in pieces]).cpu()
            empty = torch.nan if values.is_floating_point() else 0
            joined[name] = torch.full((n_rows, *values.shape[1:]), empty, dtype=values.dtype)
            joined[name][rows] = values
        return joined
