"""Plain ReLU dictionaries."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from layerscope.features.architectures.base import Gate


class Relu(Gate):
    """A feature is its pre-activation where that is positive."""

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return max(pre, 0)."""
        return pre.relu()

    def threshold(self, ids: Tensor | None = None) -> float:
        """Return 0."""
        return 0.0

    def scaled(self, units: Float[Tensor, " n"]) -> Relu:
        """Return the same gate: units are positive."""
        return self

    def describe(self) -> str:
        """Return the rule."""
        return "relu"
