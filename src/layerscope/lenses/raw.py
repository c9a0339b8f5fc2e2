"""The raw lens: the residual as it is."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import NormSource, check_layer


class RawLens:
    """Unembeds the un-normalised residual.

    Its numbers are not calibrated (the head was trained on normalised vectors); it is there to show
    what the norm lens owes to the normalisation.
    """

    name: str = "raw"
    norm_choice: str = "none"

    def __init__(self, model: NormSource) -> None:
        self._n_layers = model.n_layers

    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the residual in float32.

        Raises:
            LensError: the model has no such row.
        """
        check_layer(layer, self._n_layers)
        return residual.float()

    def norm_module(self, layer: int) -> str:
        """Return "": no module is used."""
        check_layer(layer, self._n_layers)
        return ""
