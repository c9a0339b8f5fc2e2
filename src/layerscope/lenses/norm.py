"""The norm lens: the logit lens proper, with the model's own normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import NormChoice, NormSource, check_layer, check_norm_choice


class NormLens:
    """Normalises the residual with a norm of the model, then unembeds it (nostalgebraist, 2020).

    The norm is the model's real module, called on the residual in the dtype in which it was
    captured, so that the last row reproduces the model's own logits.

    Args:
        model: gives the norm of each row.
        choice: "final" uses the model's last norm at every row; "next_norm" uses the input norm of
            the block that follows (the last row always uses the last norm).

    Raises:
        LensError: unknown `choice`.
    """

    name: str = "norm"

    def __init__(self, model: NormSource, *, choice: NormChoice = "final") -> None:
        check_norm_choice(choice)
        self.norm_choice: str = choice
        self._choice: NormChoice = choice
        self._model = model

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the normalised residual in float32.

        Raises:
            LensError: the model has no such row.
        """
        check_layer(layer, self._model.n_layers)
        _, norm = self._model.norm_at(layer, self._choice)
        return norm(residual).float()

    def norm_module(self, layer: int) -> str:
        """Return the dotted name of the norm used at a row."""
        check_layer(layer, self._model.n_layers)
        return self._model.norm_at(layer, self._choice)[0]
