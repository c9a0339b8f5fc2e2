from __future__ import annotations

import json

import pytest

from layerscope.cli.app import run
from support.tiny_models import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def commands(monkeypatch):
    """Keep the command under test apart from the others."""
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("check", "measures"))


def test_a_sound_model_passes(folder, commands, capsys):
    assert run(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "residual_sum" in out and "holds" in out and "fails" not in out


def test_json_has_every_identity_and_nothing_else_on_stdout(folder, commands, capsys):
    assert run(["check", str(folder), "--json", "--dtype", "bf16"]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)["models"]
    assert outcome["passed"] and outcome["dtype"] == "bfloat16" and outcome["error"] is None
    assert {entry["name"] for entry in outcome["identities"]} >= {"embedding", "unembedding"}
    assert all(entry["error"] <= entry["bound"] for entry in outcome["identities"])


def test_a_missing_model_is_an_outcome_beside_the_others(folder, commands, capsys, tmp_path):
    assert run(["check", str(tmp_path / "absent"), str(folder), "--json"]) == 2
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert not first["passed"] and "absent" in first["error"] and second["passed"]


def test_a_failed_identity_is_named_with_its_size(folder, commands, capsys, monkeypatch):
    from layerscope.models.backends.huggingface import structure
    from layerscope.models.backends.huggingface.families import Family

    wrong = Family("llama", ("llama",), input_norm="post_attention_layernorm")
    monkeypatch.setattr(structure, "family_of", lambda _: wrong)
    assert run(["check", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "fails block" in captured.out
    assert "next_norm" in captured.err and "bound 1e-05" in captured.err
