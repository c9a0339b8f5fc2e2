"""A tuned lens taken apart: each part as a lens of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import Lens, NormChoice
from layerscope.lenses.fitted import BiasLens, TemperatureLens, TunedLens
from layerscope.lenses.norm import NormLens
from layerscope.models import LanguageModel

FITTED_TEMPERATURE = "temp_fitted"


class MatrixOnly:
    """The matrix of a tuned lens without its bias and temperature."""

    name = "matrix_only"

    def __init__(self, lens: TunedLens, model: LanguageModel) -> None:
        kept = {
            key: torch.zeros_like(value) if key == "bias" else value
            for key, value in lens.tensors().items()
            if key != "inverse_temperature"
        }
        self.norm_choice = lens.norm_choice
        self._lens = TunedLens(model, kept, norm=_choice(lens))

    def transform(
        self, residual: Float[Tensor, "row d_model"], layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return the rotated, normalised residual."""
        return self._lens.transform(residual, layer)

    def norm_module(self, layer: int) -> str:
        """Return the dotted name of the norm used at a row."""
        return self._lens.norm_module(layer)


def variants_of(
    model: LanguageModel, lenses: Mapping[str, Lens]
) -> tuple[dict[str, Lens], dict[str, str]]:
    """Return the variants of the tuned lens among `lenses`, and where each comes from.

    `baseline` is the norm lens under the same norm, `tuned` the whole lens, `rot_only` its matrix
    and bias without temperature, `matrix_only` its matrix alone, `own_bias_only` its bias alone.
    `temp_only` is the norm lens under the tuned lens's own temperatures, or, where it has none,
    under those that were fitted beside it; without either it equals the baseline. `bias_only` is a
    lens of biases that was fitted beside it, else the tuned lens's own bias. `temp_fitted` is the
    temperature lens that was fitted beside it, where there is one.
    """
    tuned = lenses.get("tuned")
    if not isinstance(tuned, TunedLens):
        return {}, {}
    choice, tensors = _choice(tuned), tuned.tensors()
    plain = {key: value for key, value in tensors.items() if key != "inverse_temperature"}
    own_bias = BiasLens(model, {"bias": tensors["bias"]}, norm=choice)
    baseline = NormLens(model, choice=choice)
    found: dict[str, Lens] = {
        "baseline": baseline,
        "tuned": tuned,
        "rot_only": TunedLens(model, plain, norm=choice),
        "matrix_only": MatrixOnly(tuned, model),
        "own_bias_only": own_bias,
    }
    sources = {"bias_only": "the tuned lens's own bias", "temp_only": "none: the lens has no tau"}
    found["bias_only"], found["temp_only"] = own_bias, baseline
    if isinstance(fitted := lenses.get("bias"), BiasLens):
        found["bias_only"], sources["bias_only"] = fitted, "a bias lens fitted beside it"
    if isinstance(fitted := lenses.get("temperature"), TemperatureLens):
        found[FITTED_TEMPERATURE] = fitted
        found["temp_only"] = fitted
        sources["temp_only"] = "a temperature lens fitted beside it"
    if "inverse_temperature" in tensors:
        own = {"inverse_temperature": tensors["inverse_temperature"]}
        found["temp_only"] = TemperatureLens(model, own, norm=choice)
        sources["temp_only"] = "the tuned lens's own temperatures"
    return found, sources


def _choice(lens: TunedLens) -> NormChoice:
    return "next_norm" if lens.norm_choice == "next_norm" else "final"
