"""What every gate owes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor


class Gate(ABC):
    """The step from pre-activations to feature values, in raw units and differentiable.

    Attributes:
        local: whether a feature's value follows from its own pre-activation alone, so that some
            features can be computed without the others.
    """

    local: bool = True

    @abstractmethod
    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return feature values of the same shape; `ids` names the features of the last axis.

        The gradient of an active feature passes, that of an inactive one is zero.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return the rule in a few words for the convention line."""

    def threshold(self, ids: Tensor | None = None) -> Float[Tensor, " n"] | float | None:
        """Return what a pre-activation must exceed; None where that depends on the others."""
        return None

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the gate's own vectors, each [n]."""
        return {}

    def scaled(self, units: Float[Tensor, " n"]) -> Gate:
        """Return the gate for pre-activations that were multiplied by one number per feature."""
        raise NotImplementedError


def pick(vector: Tensor, like: Tensor, ids: Tensor | None) -> Tensor:
    """Return a gate's vector for the features of the last axis, on the device of the values."""
    chosen = vector if ids is None else vector[ids.to(vector.device)]
    return chosen.to(like.device, like.dtype)
