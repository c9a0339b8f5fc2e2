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
    if job.tokens is None and job.sets is None:
        return {}
    asked: dict[str, Tensor] = {}
    which = own
    if job.tokens is not None:
        asked["cos_to_token"] = job.tokens.to(own.device)[own].clamp_min(0)
    if job.sets is not None:
        used, which = torch.unique(
            job.sets.index.to(own.device)[own].clamp_min(0), return_inverse=True
        )
        asked["set_cos"] = job.sets.ids.to(own.device)[used].clamp_min(0)
    ids, where = torch.unique(
        torch.cat([tokens.flatten() for tokens in asked.values()]), return_inverse=True
    )
    directions = job.unembedding.weight.detach()[ids].float()
    products = vectors @ directions.T
    products /= directions.norm(dim=-1)
    products /= vectors.norm(dim=-1, keepdim=True)
    positions = dict(
        zip(asked, where.split([tokens.numel() for tokens in asked.values()]), strict=True)
    )
    found: dict[str, Tensor] = {}
    if "cos_to_token" in asked:
        at = positions["cos_to_token"].view(asked["cos_to_token"].shape)
        found["cos_to_token"] = products.gather(1, at)
    if "set_cos" in asked:
        at = positions["set_cos"].view(asked["set_cos"].shape)[which]  # [row, n_sets, longest]
        found["set_cos"] = products.gather(1, at.flatten(1)).view(at.shape)
    return found
