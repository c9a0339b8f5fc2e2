"""Gated dictionaries: one affine map decides whether, a rescaled one how much."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.features.architectures.base import Gate, pick


class Gated(Gate):
    """A feature is ReLU(m) where the gate's pre-activation is positive.

    Both maps share their direction, so ``m = slope * pre + shift`` with ``slope = exp(r_mag)`` and
    ``shift = b_mag - b_gate * slope``: the pre-activation here is that of the gate.
    """

    def __init__(self, slope: Float[Tensor, " n"], shift: Float[Tensor, " n"]) -> None:
        self.slope = slope
        self.shift = shift

    @classmethod
    def of(
        cls, r_mag: Float[Tensor, " n"], b_gate: Float[Tensor, " n"], b_mag: Float[Tensor, " n"]
    ) -> Gated:
        """Return the gate of the three stored vectors."""
        slope = r_mag.double().exp()
        shift = b_mag.double() - b_gate.double() * slope
        return cls(slope.to(b_gate.dtype), shift.to(b_gate.dtype))

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return 1[pre > 0] * ReLU(slope * pre + shift)."""
        magnitude = pre * pick(self.slope, pre, ids) + pick(self.shift, pre, ids)
        return torch.where(pre > 0, magnitude, torch.zeros_like(magnitude)).relu()

    def threshold(self, ids: Tensor | None = None) -> Float[Tensor, " n"]:
        """Return the gate's pre-activation above which the feature is not zero."""
        found = (-self.shift / self.slope).clamp_min(0)
        return found if ids is None else found[ids.to(found.device)]

    def tensors(self) -> Mapping[str, Tensor]:
        """Return slope and shift of the magnitude."""
        return {"slope": self.slope, "shift": self.shift}

    def scaled(self, units: Float[Tensor, " n"]) -> Gated:
        """Return the gate in the new units: the slope stays."""
        return Gated(self.slope, (self.shift.double() * units.double()).to(self.shift.dtype))

    def describe(self) -> str:
        """Return the rule."""
        return "gated"
