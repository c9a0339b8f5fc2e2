"""Statistics of one tile of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.readout import ranking
from layerscope.readout.plan import Tile
from layerscope.readout.request import Request

LN2 = math.log(2.0)
_EXP_RANGE = 40.0  # exp of a logit within +-this is as accurate as exp of a shifted one
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sums:
    """Unnormalised sums over the vocabulary of a tile's slots, and what normalises them.

    Attributes:
        exponentials: [group, slot, vocab] exp(z - shift).
        total: [group, slot] their sums, float64.
        logsumexp: [group, slot] of z, float64.
        mean: [group, slot] expectation of z under softmax(z), float64.
    """

    exponentials: Float[Tensor, "group slot vocab"]
    total: Float[Tensor, "group slot"]
    logsumexp: Float[Tensor, "group slot"]
    mean: Float[Tensor, "group slot"]

    @property
    def entropy(self) -> Float[Tensor, "group slot"]:
        """Entropy in nats."""
        return (self.logsumexp - self.mean).clamp_min(0.0)

    def slots(self, chosen: slice) -> Sums:
        """Return the sums of some slots of every group."""
        return Sums(
            self.exponentials[:, chosen],
            self.total[:, chosen],
            self.logsumexp[:, chosen],
            self.mean[:, chosen],
        )


def sums(
    z: Float[Tensor, "group slot vocab"],
    largest: Float[Tensor, "group slot"],
    out: Float[Tensor, "group slot vocab"],
) -> Sums:
    """Exponentiate a tile into `out` and take the sums every other statistic needs."""
    shift = torch.where(largest.abs() > _EXP_RANGE, largest, torch.zeros_like(largest))
    if bool(shift.any()):
        torch.sub(z, shift[..., None], out=out)
        out.exp_()
    else:
        torch.exp(z, out=out)
    total = out.sum(-1).double()
    mean = dot(out, z) / total
    return Sums(out, total, shift.double() + total.log(), mean)


def dot(
    left: Float[Tensor, "group slot vocab"], right: Float[Tensor, "group other vocab"]
) -> Float[Tensor, "group slot"]:
    """Return the inner products over the vocabulary (float64 holding a float32 sum)."""
    return torch.linalg.vecdot(left, right.expand_as(left)).double()


def divergences(
    z: Float[Tensor, "group slot vocab"],
    p: Sums,
    other: Float[Tensor, "group other vocab"],
    q: Sums,
    request: Request,
) -> dict[str, Float[Tensor, "group slot"]]:
    """Compare rows with others (one per group, or one per row), overwriting z and p's exponentials.

    Uses KL(p||q) = E_p[z - z'] - (lse - lse'): differences of log-softmax, exactly 0 for equal
    rows, never a logarithm of an underflowed probability.
    """
    values: dict[str, Tensor] = {}
    if request.kl_to_reference or request.kl_from_reference:
        difference = torch.sub(z, other, out=z)
        gap = p.logsumexp - q.logsumexp
        if request.kl_to_reference:
            values["kl_to_bits"] = _bits(dot(p.exponentials, difference) / p.total - gap)
        if request.kl_from_reference:
            values["kl_from_bits"] = _bits(gap - dot(difference, q.exponentials) / q.total)
    if not (request.js or request.l1):
        return values
    # The reference's probabilities; the smallest normal number stands in for 0 below the logarithm.
    likely = q.exponentials * (1.0 / q.total).float()[..., None] + _TINY
    mixture = p.exponentials
    torch.addcmul(
        likely, p.exponentials, (1.0 / p.total).float()[..., None], out=mixture
    )  # p + q, twice the mixture
    if request.l1:
        values["l1"] = (
            torch.sub(mixture, likely, alpha=2.0).abs_().sum(-1).double().clamp_(0.0, 2.0)
        )
    if request.js:
        logarithm = torch.log(mixture, out=z)
        entropy = LN2 - 0.5 * dot(mixture, logarithm)
        values["js_bits"] = _bits(entropy - 0.5 * (p.entropy + q.entropy)).clamp_max_(1.0)
    return values


def _bits(nats: Tensor) -> Tensor:
    return nats.div_(LN2).clamp_min_(0.0)


def top(
    rows: Float[Tensor, "row vocab"], request: Request
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]] | None:
    """Return the most likely tokens that any part of the request needs."""
    k = min(max(request.top_k, request.overlap_k, 2 if request.gap else 0), rows.shape[-1])
    return ranking.top_k(rows, k) if k else None


def cosines(
    product: Float[Tensor, "group slot vocab"], tile: Tile
) -> dict[str, Float[Tensor, "group slot"]]:
    """Return the sums behind the cosines of bare products: squares and products with partners."""
    sums_of: dict[str, Tensor] = {"square": dot(product, product)}
    if tile.reference is not None:
        sums_of["reference"] = dot(product, product[:, tile.reference : tile.reference + 1])
    if tile.paired:
        n = tile.n_out
        sums_of["against"] = dot(product[:, :n], product[:, n : 2 * n])
    return sums_of
