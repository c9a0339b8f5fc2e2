"""What a lens is: a map from a residual, at some depth, to a vector that can be unembedded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

from jaxtyping import Float
from torch import Tensor

from layerscope.errors import LensError, nearest

NormChoice = Literal["final", "next_norm"]
NORM_CHOICES: tuple[str, ...] = get_args(NormChoice)


class NormSource(Protocol):
    """What a lens needs from a model."""

    @property
    def n_layers(self) -> int:
        """Number of blocks; rows run from 0 (the embedding) to n_layers."""
        ...

    def norm_at(self, row: int, choice: NormChoice, /) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return the name of the norm that belongs to a row, and the norm itself."""
        ...


class Lens(Protocol):
    """A lens: residual and row in, hidden vectors to be unembedded out.

    Attributes:
        name: "raw", "norm", ... as recorded in tables.
        norm_choice: "final", "next_norm", or "none" for a lens that does not normalise.
    """

    name: str
    norm_choice: str

    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Map residuals of one row index to vectors that the readout unembeds, in float32."""
        ...

    def norm_module(self, layer: int) -> str:
        """Name the normalisation module used at a row index, "" for none."""
        ...


def check_layer(layer: int, n_layers: int) -> None:
    """Raise LensError unless `layer` is a row index of a model with `n_layers` blocks."""
    if not 0 <= layer <= n_layers:
        raise LensError(
            f"row {layer} does not exist; this model has rows 0 (embedding) to {n_layers}"
        )


def check_norm_choice(choice: str) -> None:
    """Raise LensError unless `choice` is "final" or "next_norm"."""
    if choice not in NORM_CHOICES:
        raise LensError(
            f"unknown norm choice {choice!r}{nearest(choice, NORM_CHOICES)}; "
            f"pass one of {', '.join(NORM_CHOICES)}"
        )
