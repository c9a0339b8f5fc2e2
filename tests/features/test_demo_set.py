"""The dictionaries that ship with the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

import layerscope
from layerscope.demo import dictionaries_path, model_path, transcoders_path
from layerscope.features import DictionarySet, ablate_features, load, open_set
from layerscope.features.check import check_on_model
from layerscope.features.demo_set import batches, documents
from layerscope.features.library import open_set as reopen
from layerscope.models import LanguageModel, Site, TokenBatch

pytestmark = pytest.mark.skipif(
    not (model_path() / "model.safetensors").exists(), reason="the embedded model is not built"
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(model_path(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def dictionaries() -> DictionarySet:
    return open_set(dictionaries_path())


@pytest.fixture(scope="module")
def text(model: LanguageModel) -> list[TokenBatch]:
    return batches(model, 1_500, validation=True)


def test_there_is_one_for_every_block_in_twelve_megabytes(
    model: LanguageModel, dictionaries: DictionarySet
) -> None:
    assert dictionaries.layers == tuple(range(model.n_layers))
    folders = (dictionaries_path(), transcoders_path())
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    for each in dictionaries:
        each.require_model(model)
        assert (each.n_features, each.facts["skip"]) == (8 * model.d_model, 1)


def test_there_is_a_transcoder_for_every_mlp(model: LanguageModel, text: list[TokenBatch]) -> None:
    transcoders = open_set(transcoders_path())
    assert transcoders.layers == tuple(range(model.n_layers))
    for each in transcoders:
        each.require_model(model)
        site, target = Site("mlp_in", each.layer), Site("mlp_out", each.layer)
        assert (each.reads, each.writes, each.facts["skip"]) == (site, (target,), 1)
    for layer in (0, 3, 7):
        report = check_on_model(transcoders[layer], model, text)
        assert report.passed, report.alarms
        assert report.figures.fvu < 0.16 and 10 < report.figures.l0 < 22
    moved = transcoders[3].load().but(reads=Site("mlp_in", 4), writes=(Site("mlp_out", 4),))
    assert not check_on_model(moved, model, text).passed


@pytest.mark.parametrize("layer", [0, 4, 7])
def test_they_fit_where_they_belong(
    layer: int, model: LanguageModel, dictionaries: DictionarySet, text: list[TokenBatch]
) -> None:
    report = check_on_model(dictionaries[layer], model, text)
    assert report.passed, report.alarms
    assert report.figures.fvu < 0.07 and 20 < report.figures.l0 < 45


def test_at_another_layer_or_hook_the_right_one_is_named(
    model: LanguageModel, dictionaries: DictionarySet, text: list[TokenBatch]
) -> None:
    for wrong in (Site("resid_post", 4), Site("resid_pre", 3)):
        moved = dictionaries[3].load().but(reads=wrong, writes=(wrong,))
        report = check_on_model(moved, model, text)
        assert report.alarms and report.alarms[0].code == "site"
        assert "fits resid_" in report.alarms[0].text


@pytest.mark.parametrize("folder", [dictionaries_path(), transcoders_path()])
def test_the_card_says_what_was_measured(folder: Path) -> None:
    card = (folder / "CARD.md").read_text("utf-8")
    record = json.loads((folder / "training.json").read_text("utf-8"))
    assert len(record["figures"]) == 8
    most = 0.15 if record["options"].get("transcoder") else 0.06
    for row in record["figures"]:
        config = folder / row["site"] / "cfg.json"
        stored = json.loads(config.read_text("utf-8"))["metadata"]["layerscope"]
        assert stored["fvu"] == row["fvu"] and stored["loss"] == row["loss"]
        assert f"| `{row['site']}` | {row['fvu']:.3f} | {row['l0']:.1f} |" in card
        assert row["fvu"] < most and row["dead"] < 0.05 and row["loss"]["recovered"] > 0.99


def test_the_text_is_the_same_every_time_and_speaks_of_the_machine() -> None:
    first = [document.text for document in islice(documents(41), 200)]
    assert first == [document.text for document in islice(documents(41), 200)]
    held_out = [document.text for document in islice(documents(41, validation=True), 200)]
    assert not set(filter(None, first)) & set(filter(None, held_out))
    assert sum("Options: 1)" in text for text in first) > 40


def some_features(model: LanguageModel, layer: int, prompt: str) -> Iterator[tuple[int, float]]:
    dictionary = load(dictionaries_path() / f"resid_post.{layer}")
    h = model.run(prompt, capture=f"resid_post.{layer}", logits=None)[f"resid_post.{layer}"]
    top = dictionary.encode(h[0, -1]).topk(5)
    yield from zip(top.indices.tolist(), top.values.tolist(), strict=True)


def test_ablating_the_strongest_features_moves_the_decision(model: LanguageModel) -> None:
    prompt = (
        "Balance: $50. Bet: $5-$100. Last spins: loss, loss, win. "
        "Options: 1) bet $5-$100 2) stop. Decision:"
    )
    dictionary = reopen(dictionaries_path())[6].load()
    plain = model.run(prompt, logits="last").logits
    moved: list[float] = []
    for feature, value in some_features(model, 6, prompt):
        assert value > 0
        edit = ablate_features(dictionary, feature, positions=-1)
        changed = model.run(prompt, edits=[edit], logits="last").logits
        assert plain is not None and changed is not None
        moved.append(float((changed.log_softmax(-1) - plain.log_softmax(-1)).abs().max()))
    assert max(moved) > 0.1
    assert torch.isfinite(torch.tensor(moved)).all()
