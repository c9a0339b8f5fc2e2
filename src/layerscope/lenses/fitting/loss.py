"""KL(teacher || lens) of many layers at once, with its gradient, one tile of logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.readout.unembedding import Unembedding

BUDGET_BYTES = 16 * 2**20  # of logits alive at once
ROWS_AT_ONCE = 256  # of all layers: what a fit holds beside them, gradients among it, stays small
_BUFFERS = 4  # teacher probabilities and log-probabilities, lens logits, scratch
_SLICE = 1 << 23  # entries of a low-precision unembedding converted at a time


def kl_to_teacher(
    hidden: Float[Tensor, "layer row d_model"],
    teacher: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, " layer"]:
    """Return KL(teacher || lens) per layer in nats, averaged over rows; differentiable in `hidden`.

    Teacher and lens go through the same head, with bias, scale and softcap. The gradient is formed
    in the same pass over the logits, so that no more than a tile of rows x vocabulary exists, for
    one layer at a time.

    Args:
        hidden: [layer, row, d_model] vectors that a lens hands to the head.
        teacher: [row, d_model] vectors that the model's own head sees, at the same positions.
        unembedding: the head.
        budget_bytes: memory for the logits of a tile (at least one row is taken).
    """
    return _FusedKL.apply(hidden, teacher, unembedding, budget_bytes)  # pyright: ignore


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, unembedding: Unembedding, budget_bytes: int
    ) -> Tensor:
        n_layers, n_rows, _ = hidden.shape
        wanted = hidden.requires_grad
        gradient = torch.zeros_like(hidden) if wanted else None
        total = torch.zeros(n_layers, dtype=torch.float64, device=hidden.device)
        tile = max(1, budget_bytes // (4 * _BUFFERS * unembedding.d_vocab))
        for first in range(0, n_rows, tile):
            rows = slice(first, first + tile)
            log_p = torch.log_softmax(
                unembedding.transform(product(teacher[rows], unembedding)), -1
            )
            p = log_p.exp()
            entropy = -(p * log_p).sum(-1)
            for layer in range(n_layers):
                z = unembedding.transform(product(hidden[layer, rows], unembedding))
                slope = _slope(z, unembedding) if gradient is not None else None
                # KL = sum p log p - sum p z + log Z, with the largest z moved to 0
                expected = torch.linalg.vecdot(p, z.sub_(z.amax(-1, keepdim=True)))
                mass = z.exp_().sum(-1)
                total[layer] += (mass.log() - entropy - expected).double().sum()
                if gradient is not None:
                    z.div_(mass[:, None]).sub_(p)
                    if slope is not None:
                        z.mul_(slope)
                    gradient[layer, rows] = _back(z, unembedding)
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(n_rows))
        return (total / n_rows).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None, None], None, None, None


def _slices(unembedding: Unembedding) -> Iterator[tuple[slice, Tensor]]:
    """Yield the unembedding in float32, piece by piece where it has to be converted."""
    weight = unembedding.weight.detach()
    size = weight.shape[0] if weight.dtype == torch.float32 else max(1, _SLICE // weight.shape[1])
    for first in range(0, weight.shape[0], size):
        part = slice(first, first + size)
        yield part, weight[part].float()


def product(
    hidden: Float[Tensor, "row d_model"], unembedding: Unembedding
) -> Float[Tensor, "row vocab"]:
    """Return ``hidden @ weight.T`` in float32, without a float32 copy of the whole weight."""
    hidden = hidden.detach()
    pieces = [hidden @ weight.T for _, weight in _slices(unembedding)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _slope(z: Tensor, unembedding: Unembedding) -> Tensor | None:
    """Return dz/d(product) where it is not 1 everywhere."""
    if unembedding.softcap is None:
        return None if unembedding.scale == 1.0 else z.new_tensor(unembedding.scale)
    return (1.0 - (z / unembedding.softcap).square()) * unembedding.scale


def _back(gradient: Tensor, unembedding: Unembedding) -> Float[Tensor, "row d_model"]:
    total: Tensor | None = None
    for part, weight in _slices(unembedding):
        piece = gradient[:, part] @ weight
        total = piece if total is None else total.add_(piece)
    assert total is not None
    return total
