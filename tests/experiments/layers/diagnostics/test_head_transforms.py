from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import layerscope
from layerscope.experiments.layers import Fact
from layerscope.experiments.layers.diagnostics.head_transforms import head_transforms
from layerscope.experiments.layers.diagnostics.temperatures import best_temperature
from layerscope.models.backends.huggingface.backend import HuggingFaceBackend
from layerscope.readout import Unembedding
from support.diagnosed import Changed, demo, material
from support.tiny_models import tiny, tiny_tokenizer

FACTS = (Fact(key="one", prompt="The capital of Italy is", answer="Rome"),)


def test_the_last_row_of_a_good_lens_is_the_head() -> None:
    section = head_transforms(material(demo()))
    assert section["gates"] == {"last_row_exact.norm": True}
    assert section["kl_to_final_bits"] < 1e-6 and section["warnings"] == []


def test_a_lens_that_scales_fails_and_the_temperature_names_the_scale() -> None:
    louder = Changed(demo(), lambda hidden, _: 40.0 * hidden)
    section = head_transforms(material(demo(), lenses=[louder]))
    assert section["gates"]["last_row_exact.norm"] is True
    assert section["gates"]["last_row_exact.tuned"] is False
    found = [entry for entry in section["at"] if entry["lens"] == "tuned"]
    # Beyond the usual grids: the search has no edge.
    assert all(entry["temp_est"] == pytest.approx(40.0, rel=1e-3) for entry in found)
    assert all(entry["temp_settled"] for entry in found)
    assert "temperature 40" in section["warnings"][0]


def test_a_wrong_norm_is_explained_by_nothing() -> None:
    model = demo()
    turned = Changed(model, lambda hidden, _: hidden.roll(1, dims=-1))
    section = head_transforms(material(model, lenses=[turned]))
    assert section["gates"]["last_row_exact.tuned"] is False
    assert "suspect the norm" in section["warnings"][0]


def test_a_softcap_matters_and_is_found_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layerscope.load(tiny("gemma2"), tokenizer=tiny_tokenizer())
    run = material(model, FACTS)
    good = head_transforms(run)
    assert good["gates"] == {"last_row_exact.norm": True}
    after = good["kl_after_transform_bits"]
    assert after["softcap"] < 1e-6 < after["none"] and after["scale"] is None

    honest = HuggingFaceBackend.unembedding.fget
    assert honest is not None

    def uncapped(backend: HuggingFaceBackend) -> Unembedding:
        return replace(honest(backend), softcap=None)

    monkeypatch.setattr(HuggingFaceBackend, "unembedding", property(uncapped))
    assert head_transforms(material(model, FACTS))["gates"] == {"last_row_exact.norm": False}


def test_a_divergence_that_falls_for_ever_is_not_settled() -> None:
    flat = torch.zeros(8)
    peaked = torch.arange(8.0)
    assert best_temperature(peaked, peaked).temperature == 1.0
    endless = best_temperature(peaked, flat)
    assert not endless.settled and endless.temperature > 1e3
    opposite = best_temperature(peaked, peaked / 7)
    assert opposite.settled and opposite.temperature == pytest.approx(7.0, rel=1e-3)
