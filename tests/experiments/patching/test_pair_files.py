"""Prompt pairs and facts from our own files and from published sets."""

from __future__ import annotations

import json

import pytest

import layerscope
from layerscope.demo import model_path
from layerscope.errors import PromptError
from layerscope.experiments.patching import read_facts, read_pairs
from support.shared import shared_path as shared


@pytest.fixture(scope="module")
def model():
    return layerscope.load(model_path(), device="cpu")


def test_own_files_in_three_formats_say_the_same(tmp_path):
    rows = [
        {"key": "a", "clean": "x y", "corrupt": "x z", "answers": ["p", "q"], "foil": "r"},
        {"clean": "u", "corrupt": "v", "answer": "w", "labels": {"it": ["u", "v"]}},
    ]
    written = tmp_path / "pairs.json"
    written.write_text(json.dumps(rows))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    table = tmp_path / "pairs.csv"
    table.write_text(
        "key,clean,corrupt,answer,foil,labels\na,x y,x z,p|q,r,\n"
        ',u,v,w,,"{""it"": [""u"", ""v""]}"\n'
    )
    text = tmp_path / "pairs.yaml"
    text.write_text(json.dumps({"pairs": rows}))  # JSON is YAML
    expected = read_pairs(written)
    assert expected[0].answers == ("p", "q") and expected[0].foils == ("r",)
    assert expected[1].key == "0002" and expected[1].labels == {"it": ("u", "v")}
    for path in (lines, table, text):
        assert read_pairs(path) == expected
    assert read_pairs(written, limit=1) == expected[:1]


def test_files_that_do_not_hold_pairs_are_refused(tmp_path):
    def refused(match, text, name="pairs.json"):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(PromptError, match=match):
            read_pairs(path)

    refused("entry 1: corrupt is missing", '[{"clean": "a"}]')
    refused("give a list of pairs", '{"other": 1}')
    refused("holds no pair", "[]")
    refused("is not valid JSON", "[{]")
    twice = [{"key": "a", "clean": "x", "corrupt": other} for other in "yz"]
    refused("key 'a' occurs twice", json.dumps(twice))
    refused("must be a .yaml, .csv, .json", "x", "pairs.txt")
    refused("a label needs its text", '[{"clean":"x","corrupt":"y","labels":{"a":["b"]}}]')
    with pytest.raises(PromptError, match="does not exist"):
        read_pairs(tmp_path / "none.yaml")


def test_published_sets_are_read(model):
    ioi = read_pairs(shared("data/ioi/ioi_names_templates.json"), limit=5)
    assert len(ioi) == 5
    for one in [*ioi, *read_pairs(shared("data/mib/IOI_task"), limit=5)]:
        assert one.clean.endswith(" to") and "[" not in one.clean and "{" not in one.clean
        assert one.answers[0] in one.clean and one.clean.count(one.foils[0]) == 2
        assert one.corrupt.count(one.answers[0]) == 2
    years = read_pairs(shared("data/eap_ig/greater_than_data.csv"), limit=3)
    assert years[0].answers[0] == "53" and years[0].foils[-1] == "52"
    verbs = read_pairs(shared("data/feature_circuits_sva/simple_test.json"), limit=3)
    assert verbs[0].clean == "The uncle" and verbs[0].foils == (" have",)
    with pytest.raises(PromptError, match="another tokenizer's"):
        read_pairs(shared("data/eap_ig/ioi_llama.csv"), model=model, limit=1)
    opposites = read_pairs(shared("data/lre_relations/linguistic/adj_antonym.json"), model=model)
    assert all(
        len(model.tokenize([one.clean]).row_ids(0)) == len(model.tokenize([one.corrupt]).row_ids(0))
        for one in opposites
    )
    facts = read_facts(shared("data/rome_known_1000/known_1000.json"), limit=3)
    assert facts[0].subject == "Vinson Massif" and facts[0].answer == "Antarctica"
    facts = read_facts(shared("data/lre_relations/linguistic/adj_antonym.json"))
    assert facts[0].subject in facts[0].prompt
