from __future__ import annotations

import json

import pytest

import layerscope
from layerscope.cli.app import run
from layerscope.demo import model_path

PROMPTS = ["The capital of France is", "Once upon a time"]


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    """Keep the command under test apart from the others."""
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("check", "generate"))


@pytest.fixture(scope="module")
def expected():
    return layerscope.load(model_path(), device="cpu").generate(PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("streaming", ("--stream", "--no-stream"))
def test_stdout_is_the_text_alone(streaming, expected, capsys):
    command = ["generate", str(model_path()), *PROMPTS, "-n", "6", "--device", "cpu", streaming]
    assert run(command) == 0
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected.texts)


def test_json_has_ids_log_probabilities_and_reasons(expected, capsys):
    command = ["generate", str(model_path()), *PROMPTS, "-n", "6", "--device", "cpu", "--json"]
    assert run(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in document["rows"]] == list(expected.texts)
    assert [tuple(row["ids"]) for row in document["rows"]] == list(expected.ids)
    assert [row["finish"] for row in document["rows"]] == list(expected.finish)
    assert document["settings"]["max_new_tokens"] == 6


def test_seeds_and_stops_are_obeyed(expected, capsys):
    base = ["generate", str(model_path()), PROMPTS[1], "-n", "12", "--device", "cpu"]
    outs = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        assert run([*base, "--temperature", "1.5", *options]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert run([*base, "--stop", expected.texts[1][3:5]]) == 0
    assert capsys.readouterr().out == expected.texts[1][:3] + "\n"


def test_a_wrong_value_is_one_line_and_exit_code_2(capsys):
    assert run(["generate", str(model_path()), "Hi", "--top-p", "2", "--device", "cpu"]) == 2
    assert "top_p must be above 0" in capsys.readouterr().err
