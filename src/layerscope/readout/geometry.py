"""Cosines of hidden vectors with rows of the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.readout.job import Job


def cosines(
    job: Job, own: Int[Tensor, " row"], vectors: Float[Tensor, "row d_model"]
) -> dict[str, Tensor]:
    """Return cosines of a tile's rows with the unembedding rows of their tokens and sets.

    Every unembedding row that the tile needs is read once. A zero vector gives NaN.

    Returns:
        ``cos_to_token`` [row, n_tok] and ``set_cos`` [row, n_sets, longest], where asked for;
        entries of absent tokens are meaningless.
    """
    asked: dict[str, Tensor] = {}
    if job.tokens is not None:
        asked["cos_to_token"] = job.tokens.to(own.device)[own].clamp_min(0)
    if job.sets is not None:
        which = job.sets.index.to(own.device)[own].clamp_min(0)
        asked["set_cos"] = job.sets.ids.to(own.device)[which].clamp_min(0)
    if not asked:
        return {}
    ids, where = torch.unique(
        torch.cat([tokens.flatten() for tokens in asked.values()]), return_inverse=True
    )
    directions = job.unembedding.weight.detach()[ids].float()
    products = vectors @ directions.T
    products /= directions.norm(dim=-1)
    products /= vectors.norm(dim=-1, keepdim=True)
    found: dict[str, Tensor] = {}
    positions = where.split([tokens.numel() for tokens in asked.values()])
    for (name, tokens), position in zip(asked.items(), positions, strict=True):
        found[name] = products.gather(1, position.view(len(own), -1)).view(tokens.shape)
    return found
