"""Cosines of hidden vectors with rows of the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.readout.job import Job

_ROWS = 1024  # rows at a time
_DIRECTIONS = 1 << 22  # entries of unembedding rows gathered at a time


def cosines(job: Job) -> dict[str, Tensor]:
    """Return cosines of hidden rows with the unembedding rows of their tokens and sets.

    A zero vector gives NaN.

    Returns:
        CPU tensors ``cos_to_token`` [row, n_tok] and ``set_cos`` [row, n_sets, longest], where
        asked for; entries of absent tokens are meaningless.
    """
    found: dict[str, list[Tensor]] = {}
    if job.tokens is None and job.sets is None:
        return {}
    for first in range(0, job.n_rows, _ROWS):
        rows = slice(first, first + _ROWS)
        vectors = job.hidden.detach()[rows].float()
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        if job.tokens is not None:
            tokens = job.tokens[rows].to(unit.device).clamp_min(0)
            found.setdefault("cos_to_token", []).append(_with_tokens(job, unit, tokens))
        if job.sets is not None:
            which = job.sets.index[rows].to(unit.device).clamp_min(0)
            found.setdefault("set_cos", []).append(_with_sets(job, unit, which))
    return {name: torch.cat(pieces).cpu() for name, pieces in found.items()}


def _with_tokens(
    job: Job, unit: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row n_tok"]
) -> Float[Tensor, "row n_tok"]:
    """Rows want different tokens: each takes its own."""
    weight = job.unembedding.weight.detach()
    size = max(1, _DIRECTIONS // max(1, weight.shape[1] * tokens.shape[1]))
    pieces: list[Tensor] = []
    for rows, ids in zip(unit.split(size), tokens.split(size), strict=True):
        directions = weight[ids].float()
        products = (directions * rows[:, None, :]).sum(-1)
        pieces.append(products.div_(directions.norm(dim=-1)))
    return torch.cat(pieces)


def _with_sets(
    job: Job, unit: Float[Tensor, "row d_model"], which: Int[Tensor, "row n_sets"]
) -> Float[Tensor, "row n_sets longest"]:
    """Rows share sets: one product with all members of those that are used."""
    assert job.sets is not None
    weight = job.unembedding.weight.detach()
    used, which = torch.unique(which, return_inverse=True)
    ids, where = torch.unique(job.sets.ids.to(unit.device)[used].clamp_min(0), return_inverse=True)
    pieces: list[Tensor] = []
    for some in ids.split(max(1, _DIRECTIONS // weight.shape[1])):
        directions = weight[some].float()
        pieces.append((unit @ directions.T).div_(directions.norm(dim=-1)))
    at = where[which]
    return torch.cat(pieces, dim=1).gather(1, at.flatten(1)).view(at.shape)
