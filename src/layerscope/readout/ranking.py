"""Order statistics of rows of logits: the most likely tokens, and how far two lists overlap."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LONGEST_BLOCK = 64
_CROWDED = 32  # times k: with more candidates than this a row is sorted in full


def block_length(d_vocab: int, k: int) -> int:
    """Return how many tokens share a block maximum when k tokens are looked for."""
    length = _LONGEST_BLOCK
    while length > 1 and d_vocab // length < 5 * k:
        length //= 2
    return length


def block_maxima(logits: Float[Tensor, "*row vocab"], length: int) -> Float[Tensor, "*row block"]:
    """Return the largest logit of every `length` tokens; the last block may be short."""
    whole = logits.shape[-1] // length
    maxima = logits[..., : whole * length].unflatten(-1, (whole, length)).amax(-1)
    if whole * length == logits.shape[-1]:
        return maxima
    rest = logits[..., whole * length :].amax(-1, keepdim=True)
    return torch.cat((maxima, rest), dim=-1)


def top_k(
    logits: Float[Tensor, "row vocab"], maxima: Float[Tensor, "row block"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Return the k largest logits of every row and their ids, largest first, ties by lowest id.

    The block maxima give a bound that at least k logits reach; only the blocks that reach it are
    searched, and all logits that reach it are sorted. A row with NaN has ids without meaning.

    Args:
        logits: at least k columns.
        maxima: their `block_maxima` for `block_length(vocab, k)`.
        k: how many.
    """
    if maxima.shape[1] < k:
        return _sorted(logits, k)
    bound = _bound(maxima, k)
    rows, ids, values = _reaching(logits, maxima >= bound, bound, block_length(logits.shape[1], k))
    count = torch.bincount(rows, minlength=len(logits))
    width = max(k, min(int(count.max()), _CROWDED * k))
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    crowded = (count > width).nonzero().flatten()
    if crowded.numel():
        kept = place < width
        rows, ids, values, place = rows[kept], ids[kept], values[kept], place[kept]
    padded = values.new_full((len(logits), width), -torch.inf)
    padded_ids = ids.new_zeros(padded.shape)
    padded[rows, place], padded_ids[rows, place] = values, ids
    # They come in the order of their ids, so that a stable sort leaves the lowest first.
    padded, order = padded.sort(dim=-1, descending=True, stable=True)
    top, top_ids = padded[:, :k], padded_ids.gather(1, order[:, :k])
    if crowded.numel():
        top[crowded], top_ids[crowded] = _sorted(logits[crowded], k)
    return top, top_ids


def _sorted(
    logits: Float[Tensor, "row vocab"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def _bound(maxima: Float[Tensor, "row block"], k: int) -> Float[Tensor, "row 1"]:
    """Return a value that at least k blocks reach, close to the k-th largest maximum."""
    # Groups of blocks from all over the vocabulary: tokens with neighbouring ids, which are often
    # likely together, fall into different groups.
    depth = max(1, maxima.shape[1] * 2 // (5 * k))
    groups = maxima.shape[1] // depth
    best = maxima[:, : depth * groups].unflatten(1, (depth, groups)).amax(1)
    return torch.topk(best, k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _reaching(
    logits: Float[Tensor, "row vocab"],
    searched: Bool[Tensor, "row block"],
    bound: Float[Tensor, "row 1"],
    length: int,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Return (rows, ids, values) of all logits that reach the bound, by row and then by id."""
    whole = logits.shape[1] // length
    rows, blocks = searched[:, :whole].nonzero(as_tuple=True)
    members = logits[:, : whole * length].unflatten(1, (whole, length))[rows, blocks]
    entry, within = (members >= bound[rows]).nonzero(as_tuple=True)
    rows, ids, values = rows[entry], blocks[entry] * length + within, members[entry, within]
    if whole * length == logits.shape[1]:
        return rows, ids, values
    rest = logits[:, whole * length :]
    more_rows, more = (rest >= bound).nonzero(as_tuple=True)
    rows, order = torch.cat((rows, more_rows)).sort(stable=True)
    ids = torch.cat((ids, more + whole * length))[order]
    return rows, ids, torch.cat((values, rest[more_rows, more]))[order]


def jaccard(left: Int[Tensor, "row k"], right: Int[Tensor, "row k"]) -> Float[Tensor, " row"]:
    """Return |intersection| / |union| of two id sets of equal size per row (ids unique within)."""
    shared = (left[:, :, None] == right[:, None, :]).any(-1).sum(-1).double()
    return shared / (2 * left.shape[1] - shared)
