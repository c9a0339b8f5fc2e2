"""Dictionaries whose answers are known, and how each format would store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerscope.features import Matrix, SparseDictionary
from layerscope.features.architectures import Gate, JumpRelu
from layerscope.models import Site


@dataclass(frozen=True)
class Planted:
    """Activations that are sparse sums of known directions.

    directions: [n, d] of unit norm; values: [row, n] true coefficients, 0 or between 1 and 3;
    offset: [d] a constant; x = values @ directions + offset.
    """

    directions: Tensor
    values: Tensor
    offset: Tensor

    @property
    def x(self) -> Tensor:
        return self.values @ self.directions + self.offset


def planted(
    n: int = 24, d: int = 32, k: int = 3, rows: int = 200, *, seed: int = 0, offset: float = 1.0
) -> Planted:
    """Return orthonormal directions; the offset is orthogonal to them all (so n < d)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    directions = basis[:n]
    constant = offset * basis[n:].sum(0) if n < d else torch.zeros(d, dtype=torch.float64)
    values = torch.zeros(rows, n, dtype=torch.float64)
    for row in range(rows):
        chosen = torch.randperm(n, generator=generator)[:k]
        values[row, chosen] = 1 + 2 * torch.rand(k, generator=generator, dtype=torch.float64)
    return Planted(directions, values, constant)


def random_dictionary(
    n: int = 40,
    d: int = 16,
    *,
    gate: Gate | None = None,
    site: str = "resid_post.1",
    seed: int = 0,
    centered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SparseDictionary:
    """Return a dictionary of random weights, in memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    decoder_bias = draw(d)
    return SparseDictionary(
        reads=Site.parse(site),
        writes=(Site.parse(site),),
        encoder=Matrix.of("encoder", draw(n, d) / d**0.5),
        decoders=(Matrix.of("decoder", draw(n, d) / d**0.5),),
        gate=gate or JumpRelu(draw(n).abs() * 0.5),
        bias=draw(n) * 0.1,
        decoder_bias=decoder_bias,
        center=decoder_bias if centered else None,
    )
