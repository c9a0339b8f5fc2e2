"""Normalisation of every token by itself: the one convention that cannot be folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-5


@dataclass(frozen=True)
class TokenNorm:
    """How a token is normalised before it is encoded, and restored after it is decoded.

    ``layer_norm``: (x - mean) / (std + 1e-5), std with Bessel's correction; back std * y + mean.
    ``constant_norm_rescale``: x sqrt(d) / |x|; back y |x| / sqrt(d).
    """

    kind: Literal["layer_norm", "constant_norm_rescale"]

    def apply(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Return the normalised tokens."""
        if self.kind == "layer_norm":
            centred = x - x.mean(dim=-1, keepdim=True)
            return centred / (x.std(dim=-1, keepdim=True) + _EPSILON)
        return x / self.scale(x)

    def scale(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        """Return what a normalised change is multiplied with to be a raw one."""
        if self.kind == "layer_norm":
            return x.std(dim=-1, keepdim=True)
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5

    def undo(
        self, y: Float[Tensor, "*rows d"], x: Float[Tensor, "*rows d"]
    ) -> Float[Tensor, "*rows d"]:
        """Return normalised values y in the units of the tokens x."""
        if self.kind == "layer_norm":
            return y * self.scale(x) + x.mean(dim=-1, keepdim=True)
        return y * self.scale(x)
