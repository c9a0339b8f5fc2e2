"""Contrast sets of many shapes, also of published data."""

from __future__ import annotations

import json

import pytest

from layerscope.errors import PromptError
from layerscope.interventions.steering.contrasts import Contrast, ContrastSet, read_contrasts
from layerscope.interventions.steering.dose import examples_of
from support.loaded import loaded
from support.shared import shared_path


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_are_read_from_json_yaml_and_csv(tmp_path):
    rows = [
        {"positive": "yes", "negative": "no", "prompt": "Is it? "},
        {"positive": "A good day.", "negative": "A bad day.", "label": "day"},
    ]
    expected = (
        Contrast("yes", "no", "Is it? "),
        Contrast("A good day.", "A bad day.", "", "day"),
    )
    as_json = read_contrasts(written(tmp_path, "a.json", json.dumps(rows)))
    as_lines = read_contrasts(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    as_yaml = read_contrasts(
        written(
            tmp_path,
            "a.yaml",
            "contrasts:\n- {positive: 'yes', negative: 'no', prompt: 'Is it? '}\n"
            "- {positive: A good day., negative: A bad day., label: day}\n",
        )
    )
    assert as_json.contrasts == as_lines.contrasts == as_yaml.contrasts == expected
    as_csv = read_contrasts(written(tmp_path, "a.csv", "positive,negative\nup,down\nin,out\n"))
    assert as_csv.contrasts == (Contrast("up", "down"), Contrast("in", "out"))
    assert expected[0].texts == ("Is it? yes", "Is it? no")


def test_lists_need_another_side(tmp_path):
    texts = written(tmp_path, "t.json", '["I run", "I sit"]')
    with pytest.raises(PromptError, match="one side only"):
        read_contrasts(texts)
    with pytest.raises(PromptError, match=r"lacks \{text\}"):
        read_contrasts(texts, positive="happy: {text}", negative="sad")
    pairs = read_contrasts(texts, positive="happy: {text}", negative="sad: {text}")
    assert pairs.paired and pairs.contrasts[1].texts == ("happy: I sit", "sad: I sit")
    other = written(tmp_path, "o.json", '["He ran", "He sat", "He lay"]')
    assert not read_contrasts(texts, against=other).paired


def test_damaged_files_are_named_with_their_row(tmp_path):
    for text, message in (
        ('[{"positive": "a"}]', "row 1: give 'positive' and 'negative'"),
        ("{", "is not valid JSON"),
        ("[]", "give a list of contrasts"),
        ('[{"positive": "a", "negative": "b"}]', "needs 2 contrasts"),
    ):
        with pytest.raises(PromptError, match=message):
            read_contrasts(written(tmp_path, "bad.json", text))
    bad = written(tmp_path, "bad.csv", "statement,label\nIt is so.,maybe\n")
    with pytest.raises(PromptError, match="the label must be 1 or 0, not 'maybe'"):
        read_contrasts(bad)
    with pytest.raises(PromptError, match="does not exist"):
        read_contrasts(tmp_path / "none.json")


def test_published_shapes_are_understood():
    facts = read_contrasts(shared_path("data", "repe", "facts", "facts_true_false.csv"))
    assert not facts.paired and len(facts) > 100
    moods = shared_path("data", "repe", "emotions")
    found = read_contrasts(moods / "happiness.json", against=moods / "sadness.json")
    assert len(found) > 50 and not found.paired
    stems = read_contrasts(
        shared_path("data", "repeng", "all_truncated_outputs.json"),
        positive="I am happy. {text}",
        negative="I am sad. {text}",
    )
    assert stems.paired and len(stems) > 100
    choices = read_contrasts(shared_path("data", "truthfulqa", "mc_task.json"))
    table = read_contrasts(shared_path("data", "truthfulqa", "TruthfulQA.csv"))
    for each in (choices, table):
        first = each.contrasts[0]
        assert first.prompt == "Q: What happens to you if you eat watermelon seeds?\nA:"
        assert "digestive system" in first.positive and "grow" in first.negative


def test_texts_are_cut_where_they_part():
    contrasts = (
        Contrast("The park is one", "The park is two"),
        Contrast("one two", "three four"),
        Contrast("The city in the text", "The city inside the text"),
    )
    examples, left_out = examples_of(loaded("llama"), contrasts)
    assert [example.text for example in examples] == ["The park is", "The city"]
    assert left_out == 1
    tokenizer = loaded("llama").tokenizer
    assert tokenizer.decode(examples[1].positive) == " in the text"


def test_a_split_holds_every_contrast_once():
    whole = ContrastSet("n", tuple(Contrast(f"a{n}", f"b{n}") for n in range(20)))
    parts = whole.split(validation=0.2, test=0.3, seed=1)
    assert [len(part) for part in parts] == [10, 4, 6]
    assert {c for part in parts for c in part.contrasts} == set(whole.contrasts)
    assert parts == whole.split(validation=0.2, test=0.3, seed=1)
