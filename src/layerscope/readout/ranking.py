"""Order statistics of rows of logits: the most likely tokens, and how far two lists overlap."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 64  # tokens per block; one pass finds every block's maximum


def top_k(
    logits: Float[Tensor, "row vocab"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Return the k largest logits and their ids, largest first, ties by lowest id.

    The k largest entries lie in the k blocks with the largest maxima, so that only those are
    searched. Rows where a tie at the edge leaves that open are sorted in full.
    """
    n_blocks = logits.shape[1] // _BLOCK
    if n_blocks < 2 * (k + 1):
        values, ids = torch.topk(logits, k, dim=-1)
        crowded = (logits >= values[:, -1:]).sum(-1) > k
    else:
        values, ids, crowded = _search_blocks(logits, k, n_blocks)
    values, ids = _order(values, ids)
    rows = crowded.nonzero().flatten()
    if rows.numel():
        exact, order = torch.sort(logits[rows], dim=-1, descending=True, stable=True)
        values[rows], ids[rows] = exact[:, :k], order[:, :k]
    return values, ids


def _search_blocks(logits: Tensor, k: int, n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    body, tail = logits.split([n_blocks * _BLOCK, logits.shape[1] - n_blocks * _BLOCK], dim=1)
    blocks = body.unflatten(1, (n_blocks, _BLOCK))
    # One block more than needed: its maximum bounds everything that is not searched.
    maxima, chosen = torch.topk(blocks.amax(-1), k + 1, dim=-1, sorted=False)
    row = torch.arange(logits.shape[0], device=logits.device)[:, None]
    candidates = torch.cat((blocks[row, chosen].flatten(1), tail), dim=1)
    values, found = torch.topk(candidates, k, dim=-1)
    block = torch.div(found, _BLOCK, rounding_mode="floor")
    in_tail = block > k
    start = chosen.gather(1, block.clamp_max(k)) * _BLOCK
    ids = torch.where(in_tail, found - (k + 1 - n_blocks) * _BLOCK, start + found % _BLOCK)
    edge = values[:, -1:]
    crowded = (maxima.amin(-1, keepdim=True) == edge)[:, 0] | ((candidates >= edge).sum(-1) > k)
    return values, ids, crowded


def _order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by value, largest first, then by id."""
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def jaccard(left: Int[Tensor, "row k"], right: Int[Tensor, "row k"]) -> Float[Tensor, " row"]:
    """Return |intersection| / |union| of two id sets of equal size per row (ids unique within)."""
    shared = (left[:, :, None] == right[:, None, :]).any(-1).sum(-1).double()
    return shared / (2 * left.shape[1] - shared)
