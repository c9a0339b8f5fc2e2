"""Lenses with fitted parameters: temperature, bias, tuned, prism, Jacobian."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import LensError
from layerscope.lenses.base import NormChoice, NormSource, check_layer, check_norm_choice

Tensors = dict[str, Tensor]


class FittedLens(Protocol):
    """A lens with tensors that can be stored; the last row is always the model's own head."""

    kind: ClassVar[str]
    convention: ClassVar[str]
    name: str
    norm_choice: str

    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Map residuals of one row index to vectors that the readout unembeds, in float32."""
        ...

    def norm_module(self, layer: int) -> str:
        """Name the normalisation module used at a row index."""
        ...

    def tensors(self) -> Tensors:
        """Return the fitted tensors by name."""
        ...


class _Fitted:
    """What fitted lenses share: the norms, and tensors that follow the residual's device."""

    def __init__(self, model: NormSource, tensors: Tensors, norm: NormChoice) -> None:
        check_norm_choice(norm)
        self.norm_choice: str = norm
        self._choice: NormChoice = norm
        self._model = model
        self._tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}

    def tensors(self) -> Tensors:
        """Return the fitted tensors by name."""
        return dict(self._tensors)

    def norm_module(self, layer: int) -> str:
        """Return the dotted name of the norm used at a row."""
        check_layer(layer, self._model.n_layers)
        return self._model.norm_at(layer, self._choice)[0]

    def _norm(self, residual: Tensor, layer: int) -> Tensor:
        return self._model.norm_at(layer, self._choice)[1](residual).float()

    def _last(self, layer: int) -> bool:
        check_layer(layer, self._model.n_layers)
        return layer == self._model.n_layers

    def _at(self, name: str, residual: Tensor) -> Tensor:
        tensor = self._tensors[name]
        if tensor.device != residual.device:
            tensor = self._tensors[name] = tensor.to(residual.device)
        return tensor

    def _check(self, name: str, shape: tuple[int | None, ...]) -> None:
        found = tuple(self._tensors[name].shape)
        fits = len(found) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, found, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise LensError(f"lens tensor '{name}' has shape {list(found)}; needed: [{wanted}]")


class TemperatureLens(_Fitted):
    """The norm lens with one temperature per row index: the normalised residual times 1 / tau.

    Args:
        model: gives the norm of each row.
        tensors: ``inverse_temperature`` [n_layers], 1 / tau of row 0 to n_layers - 1; 0 where no
            finite temperature is best.
        norm: which norm it uses.
    """

    kind: ClassVar[str] = "temperature"
    convention: ClassVar[str] = "hidden = norm(residual) * inverse_temperature[row]"
    name: str = "temperature"

    def __init__(self, model: NormSource, tensors: Tensors, *, norm: NormChoice = "final") -> None:
        super().__init__(model, tensors, norm)
        self._check("inverse_temperature", (model.n_layers,))

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the scaled, normalised residual in float32; raises LensError for no such row."""
        hidden = self._norm(residual, layer)
        if self._last(layer):
            return hidden
        return hidden * self._at("inverse_temperature", hidden)[layer]


class BiasLens(_Fitted):
    """A translation per row index before the norm: what a tuned lens does without its matrix.

    Args:
        model: gives the norm of each row.
        tensors: ``bias`` [n_layers, d_model].
        norm: which norm it uses.
    """

    kind: ClassVar[str] = "bias"
    convention: ClassVar[str] = "hidden = norm(residual + bias[row])"
    name: str = "bias"

    def __init__(self, model: NormSource, tensors: Tensors, *, norm: NormChoice = "final") -> None:
        super().__init__(model, tensors, norm)
        self._check("bias", (model.n_layers, None))

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the translated, normalised residual; raises LensError for no such row."""
        if self._last(layer):
            return self._norm(residual, layer)
        moved = residual.float() + self._at("bias", residual)[layer]
        return self._norm(moved.to(residual.dtype), layer)


class TunedLens(_Fitted):
    """An affine translator per row index before the norm (Belrose et al., 2023).

    Args:
        model: gives the norm of each row.
        tensors: ``bias`` [n_layers, d_model] and either ``weight`` [n_layers, d_model, d_model] or
            the factors ``down`` [n_layers, d_model, rank] and ``up`` [n_layers, rank, d_model];
            optionally ``inverse_temperature`` [n_layers].
        norm: which norm it uses.
    """

    kind: ClassVar[str] = "tuned"
    convention: ClassVar[str] = (
        "rows: hidden = norm(residual + residual @ weight[row].T + bias[row]), "
        "with residual @ down[row] @ up[row] for factors, times inverse_temperature[row] if there"
    )
    name: str = "tuned"

    def __init__(self, model: NormSource, tensors: Tensors, *, norm: NormChoice = "final") -> None:
        super().__init__(model, tensors, norm)
        n_layers, d_model = model.n_layers, self._tensors["bias"].shape[-1]
        self._check("bias", (n_layers, d_model))
        if "weight" in self._tensors:
            self._check("weight", (n_layers, d_model, d_model))
        else:
            rank = self._tensors["down"].shape[-1]
            self._check("down", (n_layers, d_model, rank))
            self._check("up", (n_layers, rank, d_model))
        if "inverse_temperature" in self._tensors:
            self._check("inverse_temperature", (n_layers,))

    def translate(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the residual carried to the last layer's basis, before the norm, in float32."""
        x = residual.float()
        if "weight" in self._tensors:
            change = x @ self._at("weight", x)[layer].T
        else:
            change = x @ self._at("down", x)[layer] @ self._at("up", x)[layer]
        return x + change + self._at("bias", x)[layer]

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the translated, normalised residual; raises LensError for no such row."""
        if self._last(layer):
            return self._norm(residual, layer)
        hidden = self._norm(self.translate(residual, layer).to(residual.dtype), layer)
        if "inverse_temperature" in self._tensors:
            hidden = hidden * self._at("inverse_temperature", hidden)[layer]
        return hidden


class PrismLens(_Fitted):
    """One decoder shared by all row indices: whiten, rotate, colour.

    Args:
        model: gives the norm of each row.
        tensors: ``mean_in``, ``mean_out`` [d_model]; ``whiten`` [d_model] or [d_model, d_model];
            ``rotation`` [d_model, d_model]; ``colour`` like ``whiten``; ``gain`` [1].
        norm: which norm it uses.
    """

    kind: ClassVar[str] = "prism"
    convention: ClassVar[str] = (
        "rows: hidden = gain * ((norm(residual) - mean_in) @ whiten @ rotation @ colour) + mean_out"
        ", with a vector for @ where whiten or colour is diagonal"
    )
    name: str = "prism"

    def __init__(self, model: NormSource, tensors: Tensors, *, norm: NormChoice = "final") -> None:
        super().__init__(model, tensors, norm)
        d_model = self._tensors["mean_in"].shape[-1]
        self._check("mean_in", (d_model,))
        self._check("mean_out", (d_model,))
        self._check("rotation", (d_model, d_model))
        self._check("gain", (1,))
        for name in ("whiten", "colour"):
            self._check(name, (d_model,) * self._tensors[name].ndim)

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return what the shared decoder makes of the residual; raises LensError."""
        hidden = self._norm(residual, layer)
        if self._last(layer):
            return hidden
        white = _apply(hidden - self._at("mean_in", hidden), self._at("whiten", hidden))
        turned = white @ self._at("rotation", hidden)
        coloured = _apply(turned, self._at("colour", hidden))
        return coloured * self._at("gain", hidden) + self._at("mean_out", hidden)


class JacobianLens(_Fitted):
    """Transport by the averaged Jacobian from a row to the last residual (Gurnee et al., 2026).

    Args:
        model: gives the norm of each row.
        tensors: ``jacobian`` [n_layers, d_model, d_model], entry [row, i, j] the mean derivative of
            coordinate i of the last residual by coordinate j of the row's.
        norm: "final": what is transported is in the basis of the last residual.

    Raises:
        LensError: another norm choice.
    """

    kind: ClassVar[str] = "jacobian"
    convention: ClassVar[str] = "rows: hidden = norm(residual @ jacobian[row].T), final norm"
    name: str = "jacobian"

    def __init__(self, model: NormSource, tensors: Tensors, *, norm: NormChoice = "final") -> None:
        super().__init__(model, tensors, norm)
        if norm != "final":
            raise LensError("the Jacobian lens ends in the last residual: use norm='final'")
        d_model = self._tensors["jacobian"].shape[-1]
        self._check("jacobian", (model.n_layers, d_model, d_model))

    @torch.no_grad()
    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the transported, normalised residual; raises LensError for no such row."""
        if self._last(layer):
            return self._norm(residual, layer)
        moved = residual.float() @ self._at("jacobian", residual)[layer].T
        return self._norm(moved.to(residual.dtype), layer)


FITTED: dict[str, Any] = {
    lens.kind: lens for lens in (TemperatureLens, BiasLens, TunedLens, PrismLens, JacobianLens)
}


def _apply(rows: Tensor, map_: Tensor) -> Tensor:
    return rows * map_ if map_.ndim == 1 else rows @ map_
