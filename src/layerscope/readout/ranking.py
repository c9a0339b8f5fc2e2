"""Order statistics of rows of logits: the most likely tokens, and how far two lists overlap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LONGEST_BLOCK = 64
_CROWDED = 64  # times k: with more candidates than this a row is sorted in full


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


@dataclass(frozen=True)
class Candidates:
    """Every logit that may be among the k largest of its row, ordered by row and then by id."""

    rows: Int[Tensor, " n"]
    ids: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    n_rows: int

    @staticmethod
    def join(parts: Sequence[Candidates]) -> Candidates:
        """Append the rows of several parts."""
        offsets = itertools.accumulate((part.n_rows for part in parts), initial=0)
        rows = [part.rows + offset for part, offset in zip(parts, offsets, strict=False)]
        return Candidates(
            torch.cat(rows),
            torch.cat([part.ids for part in parts]),
            torch.cat([part.values for part in parts]),
            sum(part.n_rows for part in parts),
        )

    def largest(self, k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
        """Return the k largest of every row and their ids, largest first, ties by lowest id.

        A row with fewer candidates (one with NaN) is filled up with -inf and id 0.
        """
        count = torch.bincount(self.rows, minlength=self.n_rows)
        start = count.cumsum(0) - count
        place = torch.arange(len(self.rows), device=start.device) - start[self.rows]
        values = self.values.new_full((self.n_rows, max(k, int(count.max()))), -torch.inf)
        ids = self.ids.new_zeros(values.shape)
        values[self.rows, place], ids[self.rows, place] = self.values, self.ids
        # They come in the order of their ids, so that a stable sort leaves the lowest first.
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids.gather(1, order[:, :k])


def candidates(
    logits: Float[Tensor, "row vocab"], maxima: Float[Tensor, "row block"], k: int
) -> Candidates:
    """Find all logits that may be among the k largest of their rows, ties included.

    The block maxima give a bound that at least k logits reach; only the blocks that reach it are
    searched.

    Args:
        logits: at least k columns.
        maxima: their `block_maxima` for `block_length(vocab, k)`.
        k: how many are looked for.
    """
    if maxima.shape[1] < k:
        return _sorted(logits, k)
    bound = _bound(maxima, k)
    rows, ids, values = _reaching(logits, maxima >= bound, bound, block_length(logits.shape[1], k))
    found = Candidates(rows, ids, values, len(logits))
    if len(rows) <= _CROWDED * k:  # then no row can be
        return found
    crowded = torch.bincount(rows, minlength=len(logits)) > _CROWDED * k
    return _relieve(logits, found, crowded, k) if bool(crowded.any()) else found


def _relieve(
    logits: Float[Tensor, "row vocab"], found: Candidates, crowded: Bool[Tensor, " row"], k: int
) -> Candidates:
    """Replace the candidates of crowded rows by the k largest themselves."""
    which, kept = crowded.nonzero().flatten(), ~crowded[found.rows]
    exact = _sorted(logits[which], k)
    rows, order = torch.cat((found.rows[kept], which[exact.rows])).sort(stable=True)
    ids = torch.cat((found.ids[kept], exact.ids))[order]
    return Candidates(rows, ids, torch.cat((found.values[kept], exact.values))[order], found.n_rows)


def _sorted(logits: Float[Tensor, "row vocab"], k: int) -> Candidates:
    """Return exactly the k largest of every row, by a full sort."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    rows = torch.arange(len(logits), device=logits.device).repeat_interleave(ids.shape[1])
    return Candidates(rows, ids.flatten(), logits.gather(1, ids).flatten(), len(logits))


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
