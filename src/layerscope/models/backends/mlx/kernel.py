"""What an attention kernel of mlx-lm reads, and its scores and pattern recomputed from that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.models.backends.mlx.arrays import to_torch


@dataclass(frozen=True)
class KernelShape:
    """The sizes of what one block's attention kernel reads.

    `error` is the largest difference between the kernel's output and that of the recomputed
    pattern, relative to the largest value.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    error: float


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One call of an attention kernel, in the model's columns.

    Attributes:
        query: [batch, head, query, d], after norms and rotary embedding.
        key: [batch, kv_head, key, d], the past's included.
        value: [batch, kv_head, key, d_value], the past's included.
        scale: factor on the products.
        mask: None, "causal", booleans, or numbers that are added.
        softcap: cap on the scores, or None.
        sinks: [head], logits that take a share of the softmax, or None.
    """

    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch kv_head key d"]
    value: Float[Tensor, "batch kv_head key d_value"]
    scale: float
    mask: Any
    softcap: float | None = None
    sinks: Tensor | None = None

    def shape(self, output: Float[Tensor, "batch head query d_value"]) -> KernelShape:
        """Return the sizes, and how well the kernel's output is reproduced."""
        mixed = self.mix(self.pattern(self.scores()))
        size = float(mixed.float().abs().max())
        difference = float((mixed.float() - output.float()).abs().max())
        error = difference / size if size else math.inf
        return KernelShape(
            self.query.shape[1],
            self.key.shape[1],
            self.query.shape[-1],
            self.value.shape[-1],
            error if math.isfinite(error) else math.inf,
        )

    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Return what the softmax reads: scaled, capped, biased; minus infinity where masked."""
        n_heads = self.query.shape[1]
        key = _for_queries(self.key, n_heads).float()
        scores = self.query.float() @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        visible = _visible(self.mask, *scores.shape[-2:])
        if isinstance(visible, Tensor) and visible.dtype != torch.bool:
            scores, visible = scores + visible.float(), visible > torch.finfo(visible.dtype).min / 2
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return scores.to(self.query.dtype)

    def pattern(
        self, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the softmax over keys (and the head's sink, which takes a share of its own)."""
        wide = scores.float()
        # A query that may look nowhere looks nowhere; its softmax would be NaN.
        nowhere = wide.isneginf().all(dim=-1, keepdim=True)
        wide = wide.masked_fill(nowhere, 0.0)
        if self.sinks is not None:
            sink = self.sinks.to(wide).reshape(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
            weights = torch.softmax(torch.cat([wide, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(wide, dim=-1)
        return weights.masked_fill(nowhere, 0.0).to(scores.dtype)

    def mix(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query d_value"]:
        """Return the values, weighted with a pattern."""
        mixed = pattern.float() @ _for_queries(self.value, pattern.shape[1]).float()
        return mixed.to(self.value.dtype)


def _visible(mask: Any, n_queries: int, n_keys: int) -> Tensor | None:
    """Return what a mask says, to be broadcast over [batch, head, query, key]."""
    if mask is None:
        return None
    if isinstance(mask, str):
        return _causal(n_queries, n_keys)
    assert isinstance(mask, mx.array)
    visible = to_torch(mask)
    # Attention that groups its heads takes [batch, 1, 1, query, key].
    return visible.squeeze(2) if visible.ndim == 5 else visible


def _causal(n_queries: int, n_keys: int) -> Bool[Tensor, "query key"]:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def _for_queries(heads: Tensor, n_heads: int) -> Float[Tensor, "batch head key d"]:
    """Return keys or values once per query head: head h reads group h * n_kv_heads // n_heads."""
    return heads.repeat_interleave(n_heads // heads.shape[1], dim=1)
