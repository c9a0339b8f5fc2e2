"""Residuals at sampled positions, and what the head sees there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.corpus import DataConfig, batches
from layerscope.models.batches import TokenBatch
from layerscope.models.language_model import LanguageModel
from layerscope.models.run import Capture


@dataclass(frozen=True, eq=False)
class States:
    """What a model computed at some positions.

    Attributes:
        residual: [layer, row, d_model] the residual of every row index of the model, 0 (the
            embedding) to n_layers, in the dtype in which it was computed.
        head: [row, d_model] the vectors that the model's own head unembeds, float32.
    """

    residual: Float[Tensor, "layer row d_model"]
    head: Float[Tensor, "row d_model"]


def row_sites(n_layers: int) -> list[str]:
    """Return the sites of row 0 to n_layers."""
    return ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(n_layers))]


@torch.no_grad()
def states_at(
    model: LanguageModel, ids: Int[Tensor, "batch pos"], positions: list[list[int]]
) -> States:
    """Run one batch and keep the residuals of the given positions of each sequence only."""
    sites = row_sites(model.n_layers)
    capture = Capture([*sites, "final_norm"], positions=positions)
    # As a batch: sequences are all of one length, and need no check for padding.
    batch = TokenBatch.from_tensors(ids, torch.ones_like(ids))
    result = model.run(batch, capture=capture, logits=None)
    residual = torch.stack([result[site].flatten(0, 1) for site in sites])
    return States(residual, result["final_norm"].flatten(0, 1).float())


def collect(model: LanguageModel, ids: Int[Tensor, "sequence pos"], config: DataConfig) -> States:
    """Return the states of all sequences to evaluate on, at their sampled positions.

    Memory: (n_layers + 2) x sequences x `evaluation_positions` x d_model values.
    """
    config = replace(config, positions=min(config.positions, config.evaluation_positions))
    parts = [states_at(model, part, positions) for part, positions in batches(ids, config)]
    return States(
        torch.cat([part.residual for part in parts], dim=1),
        torch.cat([part.head for part in parts]),
    )


def normed(
    model: LanguageModel, residual: Float[Tensor, "layer row d_model"], norm: NormChoice
) -> Float[Tensor, "layer row d_model"]:
    """Return the normalised residuals of row indices 0 and up, in float32; differentiable.

    Row indices that share a norm go through it together.
    """
    found = [model.norm_at(row, norm) for row in range(len(residual))]
    parts: list[Tensor] = []
    first = 0
    for _, group in groupby(found, key=lambda named: named[0]):
        norms = list(group)
        rows = slice(first, first + len(norms))
        parts.append(norms[0][1](residual[rows]).float())
        first = rows.stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)
