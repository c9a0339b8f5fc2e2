"""Checks of trained models: what they find there is known from the models themselves."""

from __future__ import annotations

import json

import pytest

from layerscope.experiments.layers import Fact
from layerscope.experiments.layers.diagnostics.heldout import held_out
from layerscope.experiments.layers.diagnostics.ignored import copy_mask
from layerscope.experiments.layers.diagnostics.repeatability import repeatability
from layerscope.experiments.layers.diagnostics.skip_layers import skip_layers_sanity
from layerscope.models import load
from support.diagnosed import FEW, material
from support.shared import shared_path

pytestmark = pytest.mark.real_model
GIRL = "Once upon a time, there was a little girl named {}."


def facts() -> list[Fact]:
    names = json.loads(shared_path("models", "gender_task.json").read_text())["girl_names"][:3]
    return [Fact(key=name, prompt=GIRL.format(name), answer="She") for name in names]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_trained_models_repeat_themselves_and_read_the_prose(name: str) -> None:
    run = material(load(shared_path("models", name)), facts())
    assert all(repeatability(run)["gates"].values())
    assert held_out(run).source == "built-in"
    section = skip_layers_sanity(run)
    assert section["full_bits_per_token"] < 5.0
    assert 0.0 < section["m=2"] < section["m=4"]


def test_capitals_of_babyllama_are_a_token_of_their_own_which_the_mask_ignores() -> None:
    answers = {
        name: copy_mask(material(load(shared_path("models", name)), facts()))["gates"]
        for name in ("stories260K", "babyllama-tok105")
    }
    assert answers["stories260K"]["answers_not_masked"] is True
    assert answers["babyllama-tok105"]["answers_not_masked"] is False


def test_a_model_of_digits_is_read_on_its_own_samples() -> None:
    model = load(shared_path("models", "mingpt-adder"))
    text = held_out(material(model, [Fact(key="sum", prompt="1234", answer="6")]))
    assert text.source == "samples" and "cannot encode" in text.notes[0]
    assert text.tokens >= FEW.sample_tokens
