"""Finished runs of small models, for checks that look at them again, and models that misbehave."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import layerscope
from layerscope.demo import model_path
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.settings import Settings
from layerscope.lenses.base import Lens
from layerscope.lenses.norm import NormLens
from layerscope.models import LanguageModel
from support.loaded import hf

STEM = "Give the city name only, plain text. The capital of {} is called simply"
CAPITALS = (("Germany", "Berlin"), ("France", "Paris"), ("Italy", "Rome"))
FACTS = tuple(Fact(key=city, prompt=STEM.format(land), answer=city) for land, city in CAPITALS)
FEW = replace(Settings(), text_tokens=256, sample_tokens=192, sample_length=40, audit_places=32)


@cache
def demo() -> LanguageModel:
    """Return the embedded model; shared, so leave it as you found it."""
    return layerscope.load(model_path(), device="cpu", dtype="float32")


def demo_copy() -> LanguageModel:
    """Return a copy of the embedded model, to be spoilt."""
    return layerscope.load(copy.deepcopy(hf(demo())), tokenizer=demo().tokenizer, verify=False)


def spoilt(change: Callable[[Tensor, nn.Module], Tensor]) -> LanguageModel:
    """Return a copy of the embedded model whose sixth block gives something else."""
    model = demo_copy()
    module: Any = hf(model)

    def hook(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], module), *output[1:])
        return change(output, module)

    module.model.layers[5].register_forward_hook(hook)
    return model


def material(
    model: LanguageModel,
    facts: Sequence[Fact] = FACTS,
    *,
    lenses: Sequence[Lens] = (),
    settings: Settings = FEW,
    config: LayersConfig | None = None,
    text: str | None = None,
) -> Material:
    """Run facts through a model and return what the checks read; `lenses` come on top."""
    planned = plan(model, PromptSet("facts", tuple(facts)), config or LayersConfig())
    found = {lens.name: lens for lens in (*planned.lenses, *lenses)}
    return Material(planned, found, execute(planned).table, settings, text=text)


class Changed:
    """The norm lens with a change of what it gives, under a name of its own."""

    norm_choice = "final"

    def __init__(
        self, model: LanguageModel, change: Callable[[Tensor, int], Tensor], name: str = "tuned"
    ) -> None:
        self._norm = NormLens(model)
        self._change = change
        self.name = name

    def transform(self, residual: Tensor, layer: int) -> Tensor:
        return self._change(self._norm.transform(residual, layer), layer)

    def norm_module(self, layer: int) -> str:
        return self._norm.norm_module(layer)


def tuned_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of a tuned lens that changes nothing."""
    n, d = model.n_layers, model.d_model
    return {"weight": torch.zeros(n, d, d), "bias": torch.zeros(n, d)}
