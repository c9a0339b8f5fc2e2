"""Cosines of hidden vectors with rows of the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.readout.job import Job

_ROWS = 1024  # rows at a time: few enough that they ask for few different tokens
_DIRECTIONS = 1 << 22  # entries of unembedding rows gathered at a time


def cosines(job: Job) -> dict[str, Tensor]:
    """Return cosines of hidden rows with the unembedding rows of their tokens and sets.

    A zero vector gives NaN.

    Returns:
        CPU tensors ``cos_to_token`` [row, n_tok] and ``set_cos`` [row, n_sets, longest], where
        asked for; entries of absent tokens are meaningless.
    """
    asked: dict[str, Tensor] = {}
    if job.tokens is not None:
        asked["cos_to_token"] = job.tokens
    if job.sets is not None:
        asked["set_cos"] = job.sets.index
    found: dict[str, list[Tensor]] = {name: [] for name in asked}
    for first in range(0, job.n_rows if asked else 0, _ROWS):
        rows = slice(first, first + _ROWS)
        vectors = job.hidden.detach()[rows].float()
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        for name, which in asked.items():
            chosen = which[rows].to(vectors.device).clamp_min(0)
            if name == "cos_to_token":
                found[name].append(_with_tokens(job, vectors, chosen))
            else:
                found[name].append(_with_sets(job, vectors, chosen))
    return {name: torch.cat(pieces).cpu() for name, pieces in found.items()}


def _with_tokens(
    job: Job, unit: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row n_tok"]
) -> Float[Tensor, "row n_tok"]:
    ids, where = torch.unique(tokens, return_inverse=True)
    return _directions(job, unit, ids).gather(1, where)


def _with_sets(
    job: Job, unit: Float[Tensor, "row d_model"], which: Int[Tensor, "row n_sets"]
) -> Float[Tensor, "row n_sets longest"]:
    assert job.sets is not None
    used, which = torch.unique(which, return_inverse=True)
    ids, where = torch.unique(job.sets.ids.to(unit.device)[used].clamp_min(0), return_inverse=True)
    at = where[which]
    return _directions(job, unit, ids).gather(1, at.flatten(1)).view(at.shape)


def _directions(
    job: Job, unit: Float[Tensor, "row d_model"], ids: Int[Tensor, " id"]
) -> Float[Tensor, "row id"]:
    """Return cosines of unit vectors with some unembedding rows, each of which is read once."""
    weight = job.unembedding.weight.detach()
    pieces: list[Tensor] = []
    for some in ids.split(max(1, _DIRECTIONS // weight.shape[1])):
        directions = weight[some].float()
        pieces.append((unit @ directions.T).div_(directions.norm(dim=-1)))
    return torch.cat(pieces, dim=1)
