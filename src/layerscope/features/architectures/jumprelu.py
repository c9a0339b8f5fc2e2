"""JumpReLU: a threshold per feature, below which a feature is exactly zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.features.architectures.base import Gate, pick


class JumpRelu(Gate):
    """A feature is its pre-activation where that exceeds its threshold, and is positive.

    Args:
        threshold: [n] thresholds in the units of the pre-activations.
        inclusive: whether a value exactly at the threshold counts (no known format says so).
        words: how the thresholds came about, for the convention line.
    """

    def __init__(
        self,
        threshold: Float[Tensor, " n"],
        *,
        inclusive: bool = False,
        words: str = "per feature",
    ) -> None:
        self.thresholds = threshold
        self.inclusive = inclusive
        self.words = words

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return pre * 1[pre > threshold], never negative."""
        threshold = pick(self.thresholds, pre, ids)
        passes = pre >= threshold if self.inclusive else pre > threshold
        # `where`, not a product, so that 0 * infinity cannot arise.
        return torch.where(passes, pre, torch.zeros_like(pre)).relu()

    def threshold(self, ids: Tensor | None = None) -> Float[Tensor, " n"]:
        """Return the thresholds, none below zero."""
        found = self.thresholds if ids is None else self.thresholds[ids.to(self.thresholds.device)]
        return found.clamp_min(0)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the thresholds."""
        return {"threshold": self.thresholds}

    def scaled(self, units: Float[Tensor, " n"]) -> JumpRelu:
        """Return the gate with thresholds in the new units."""
        return JumpRelu(
            (self.thresholds.double() * units.double()).to(self.thresholds.dtype),
            inclusive=self.inclusive,
            words=self.words,
        )

    def describe(self) -> str:
        """Return the rule."""
        return f"jumprelu {'>=' if self.inclusive else '>'} threshold {self.words}"
