"""Order statistics of rows of logits: the most likely tokens and the ranks of given ones."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(
    logits: Float[Tensor, "row vocab"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Return the k largest logits and their ids, largest first, ties by lowest id."""
    values, ids = torch.topk(logits, k, dim=-1)
    values, ids = _order(values, ids)
    # Ties across the boundary: topk may have kept a higher id and dropped a lower one.
    crowded = ((logits >= values[:, -1:]).sum(-1) > k).nonzero().flatten()
    if crowded.numel():
        exact_values, exact_ids = torch.sort(logits[crowded], dim=-1, descending=True, stable=True)
        values[crowded], ids[crowded] = exact_values[:, :k], exact_ids[:, :k]
    return values, ids


def _order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by value, largest first, then by id."""
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def ranks(
    logits: Float[Tensor, "row vocab"], thresholds: Float[Tensor, "row n_tok"]
) -> Int[Tensor, "row n_tok"]:
    """Return 1 + the number of logits strictly above each threshold."""
    columns = [(logits > column[:, None]).sum(-1) for column in thresholds.unbind(-1)]
    return torch.stack(columns, dim=-1) + 1


def jaccard(left: Int[Tensor, "row k"], right: Int[Tensor, "row k"]) -> Float[Tensor, " row"]:
    """Return |intersection| / |union| of two id sets of equal size per row (ids unique within)."""
    shared = (left[:, :, None] == right[:, None, :]).any(-1).sum(-1).double()
    return shared / (2 * left.shape[1] - shared)
