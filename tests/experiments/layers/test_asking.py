"""A prompt that cannot be asked is listed with its reason; the others are read all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import layerscope
from layerscope.errors import AlignmentError
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.experiments.layers.asking import ask
from layerscope.models import LanguageModel
from support.memory_units import Units
from support.tiny_models import tiny, tiny_tokenizer

A = Fact(key="a", prompt="One and two and", answer="three", foil="one", control="Red and")
INSIDE = Fact(key="inside", prompt="two ", answer="three", ablated="two", foil="x", control="One")
LONG = Fact(key="long", prompt="word " * 2000 + "is", answer="this")
D = Fact(key="d", prompt="Red and", answer="blue")
GOOD = PromptSet("good", (A, D))
MIXED = PromptSet("mixed", (INSIDE, A, LONG, D))
CONFIG = LayersConfig(passes_per_batch=2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())


def test_table_and_finished_work_do_not_depend_on_what_was_left_out(
    model: LanguageModel, tmp_path: Path
) -> None:
    units = Units()
    alone = execute(plan(model, GOOD, CONFIG), units=units)
    written = units.written
    mixed = execute(plan(model, MIXED, CONFIG), units=units)
    assert units.written == written  # every unit was there already
    tables: list[bytes] = []
    for name, result in {"alone": alone, "mixed": mixed}.items():
        path = tmp_path / name
        result.table.write_parquet(path)
        tables.append(path.read_bytes())
    assert tables[0] == tables[1]
    assert alone.left_out == [] and alone.summary["prompts"] == {"given": 3, "left_out": []}
    assert mixed.summary["passes"] == alone.summary["passes"]


def test_each_is_listed_with_stage_and_reason(model: LanguageModel) -> None:
    result = layerscope.analyze(model, MIXED, CONFIG)
    listed = [(e["prompt"], e["variant"], e["stage"]) for e in result.left_out]
    assert listed == [
        ("inside", "orig", "alignment"),
        ("inside", "no_filler", "fact"),
        ("long", "orig", "prompt"),
        ("inside", "control", "fact"),
    ]
    reasons = [entry["reason"] for entry in result.left_out]
    assert "drop the whitespace at the end of the prompt" in reasons[0]
    assert "8001 tokens" in reasons[2] and "shorten it" in reasons[2]
    assert result.summary["prompts"]["given"] == 7
    assert result.provenance["prompts"]["left_out"] == result.left_out
    assert result.provenance["prompts"]["sha256"] == MIXED.digest()
    gold = result.summary["gold_alignment"]
    assert (gold["n"], gold["rate"]) == (4, 0.75)  # three asked, one that has no alignment
    codes = [reason["code"] for reason in result.summary["measurement_guidance"]["reasons"]]
    assert "gold_alignment_partial" in codes


def test_a_variant_is_left_out_alone(model: LanguageModel) -> None:
    fact = Fact(key="f", prompt="One two", answer="three", ablated="two ", foil="x", control="two ")
    other = Fact(key="g", prompt="One", answer="two", foil="x", control="Red and")
    asked = ask(model, PromptSet("p", (fact, other)), CONFIG)
    assert [(entry.prompt, entry.variant) for entry in asked.left_out] == [
        ("f", "no_filler"),
        ("f", "control"),
    ]
    assert [entry.source.prompt_id for entry in asked.passes] == ["pos", "pos", "ctl"]
    assert [entry.source.index for entry in asked.passes] == [0, 1, 2]


def test_a_shared_control_is_left_out_alone(model: LanguageModel) -> None:
    fact = Fact(key="f", prompt="One two", answer="three", foil="x", control="two ")
    asked = ask(model, PromptSet("p", (D, fact)), CONFIG)
    (entry,) = asked.left_out
    assert (entry.prompt, entry.variant) == ("f", "control")
    assert len(asked.passes) == 2


def test_nothing_left_is_an_error_that_names_the_first(model: LanguageModel) -> None:
    with pytest.raises(AlignmentError, match=r"'inside' \(orig\).*drop the whitespace"):
        plan(model, PromptSet("p", (INSIDE, LONG)), CONFIG)
