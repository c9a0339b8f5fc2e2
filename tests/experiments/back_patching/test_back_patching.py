"""Back-patching as an experiment: the grid, its controls, a planted hop, texts and the command."""

from __future__ import annotations

import json

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.back_patching import BackPatchConfig, back_patch, plan
from layerscope.experiments.back_patching.run import exact
from layerscope.experiments.patching.questions import Question
from layerscope.models import Replace
from support.loaded import loaded
from support.toys import bare_gpt2

QUESTIONS = [
    Question(key=name, prompt=f"The capital of {name} is called simply", answers=(answer,))
    for name, answer in (("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"))
]


def test_cells_and_controls_are_edits_of_the_whole_run():
    model = loaded("llama")
    outcome = back_patch(model, QUESTIONS, BackPatchConfig(positions="each", verify=5))
    cells = outcome.tables["cells"]
    assert outcome.summary["verified"]["worst_error"] < 1e-4
    width = len(model.tokenize([QUESTIONS[0].prompt]).row_ids(0))
    pairs = {(1, 0), (2, 0), (2, 1)}
    real = cells.filter(which="back-patch", prompt="France")
    assert set(real.select("source", "target").rows()) == pairs
    assert real.height == 3 * (width - 1)  # every token but the BOS
    assert (real["from_layer"] == real["source"]).all()
    other = cells.filter(which="random position")
    assert (other["from_position"] != other["position"]).all() and (
        other["from_position"] > 0
    ).all()
    layer = cells.filter(which="random layer")
    assert (layer["from_layer"] != layer["source"]).all()
    assert (layer["from_layer"] != layer["target"]).all()
    stored = model.run([QUESTIONS[0].prompt], capture="resid_pre.*")
    answer = model.tokenize([f"{QUESTIONS[0].prompt} Paris"]).row_ids(0)[width]
    for which in ("back-patch", "random position", "random layer"):
        for row in cells.filter(which=which, prompt="France").to_dicts()[::7]:
            value = stored[f"resid_pre.{row['from_layer']}"][0, row["from_position"]]
            edit = Replace(f"resid_pre.{row['target']}", value=value, positions=[row["position"]])
            logits = model.run([QUESTIONS[0].prompt], edits=[edit], logits="last").logits[0, -1]
            assert row["value"] == pytest.approx(float(logits.log_softmax(-1)[answer]), abs=1e-4)
            assert row["rank"] == 1 + int((logits > logits[answer]).sum())


def hopper():
    """Two hops that come in the wrong order: block 0 maps b to c, block 1 maps a to b.

    Words t1, t2, t3 are a, b, c. The model says b after a: the second hop is only in a block that
    has passed. Back-patched, b reaches block 0, and c comes out.
    """
    toy = bare_gpt2(n_layers=3, n_heads=1, d_model=8, d_mlp=4, d_vocab=8, n_ctx=8)
    toy.embed[1, 0] = toy.embed[2, 1] = toy.embed[3, 2] = 1.0
    toy.unembed[1, 0] = toy.unembed[2, 1] = toy.unembed[3, 2] = 1.0
    toy.embed[4, 7] = toy.unembed[4, 7] = 1.0
    toy.embed[5, 6] = toy.unembed[5, 6] = 1.0
    toy.w_in(0)[1, 0], toy.w_out(0)[0, 2] = 1.0, 3.0  # b -> c
    toy.w_in(1)[0, 0], toy.w_out(1)[0, 1] = 1.0, 2.0  # a -> b
    return toy.model(verify=False)


def test_a_planted_hop_is_completed_by_back_patching_and_by_no_control():
    model = hopper()
    question = Question(key="hop", prompt="t4 t1", answers=("t3",))
    config = BackPatchConfig(max_new_tokens=1, verify=10)
    outcome = back_patch(model, [question], config)
    summary = outcome.summary
    assert summary["prompts"]["wrong"] == 1
    # b is there from block 2 on; read by block 0 it becomes c.
    assert (summary["best"]["source"], summary["best"]["target"]) == (2, 0)
    assert summary["best"]["back-patch"]["corrected"] == 1
    assert summary["any_cell"]["back-patch"] == 1
    assert summary["any_cell"]["random position"] == 0
    assert summary["best"]["random layer"]["corrected"] == 0
    grid = outcome.tables["grid"].filter(which="back-patch")
    shares = {(row["source"], row["target"]): row["corrected"] for row in grid.to_dicts()}
    assert shares == {(1, 0): 0.0, (2, 0): 1.0, (2, 1): 0.0}
    (text,) = outcome.tables["texts"].to_dicts()
    assert (text["plain"].strip(), text["patched"].strip()) == ("t2", "t3")
    assert not text["plain_exact"] and text["patched_exact"]
    assert summary["texts"]["corrected"] == 1 and summary["texts"]["spoilt"] == 0
    assert summary["verified"]["worst_error"] < 1e-12
    assert any("give 4 or more" in line for line in summary["cautions"])


def test_the_best_cell_is_tried_on_prompts_it_was_not_chosen_on():
    model = hopper()
    questions = [
        Question(key=f"hop {n}", prompt=f"{'t5 ' * n}t1", answers=("t3",)) for n in range(1, 6)
    ]
    right = Question(key="right", prompt="t5 t1", answers=("t2",))
    config = BackPatchConfig(max_new_tokens=1)
    summary = back_patch(model, [*questions, right], config).summary
    held = summary["held_out"]
    assert (held["source"], held["target"], held["prompts"]) == (2, 0, 2)
    assert held["back-patch"] == 1
    assert summary["best"]["back-patch"]["kept"] == 0  # what was right says c as well
    assert summary["prompts"]["right"] == 1 and summary["texts"]["spoilt"] == 1


def test_whole_answers_are_words():
    assert exact(" Paris, of course", "Paris") and exact("Paris", " Paris")
    assert not exact("Parisian", "Paris") and not exact("the Paris", "Paris")


def test_bad_requests_are_refused_before_anything_runs():
    def refused(error, match, questions=QUESTIONS, **settings):
        with pytest.raises(error, match=match):
            plan(loaded("llama"), questions, BackPatchConfig(**settings))

    refused(ConfigError, "block 9; the model has blocks 0 to 2", sources=(9,))
    refused(ConfigError, "a source above a target", sources=(0,))
    refused(ConfigError, "positions='first'", positions="first")
    refused(ConfigError, "rank is measured in any case", metric="rank")
    refused(ConfigError, "MiB", max_bytes=1)
    bare = [Question(key="bare", prompt="The capital")]
    refused(PromptError, "prompt 'bare' has no answer", questions=bare)


def test_the_command_prints_its_plan_and_keeps_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("back_patch", "check"))
    prompts = tmp_path / "prompts.json"
    rows = [
        {"prompt": "The capital of France is", "answer": "Paris", "labels": {"land": "France"}},
        {"prompt": "Some place in Japan is", "answer": "Tokyo", "labels": {"land": "Japan"}},
    ]
    prompts.write_text(json.dumps(rows))
    command = ["back-patch", str(model_path()), "--prompts", str(prompts), "--device", "cpu"]
    out = ["--out", str(tmp_path / "runs")]
    assert run([*command, "--positions", "each", *out]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 prompts, " in printed.err and "whole answers" in printed.out
    latest = tmp_path / "runs" / "run-latest"
    page = (latest / "report.html").read_text("utf-8")
    for text in ("Back-patching", "At land", "At last", "random layer", "What the model writes"):
        assert text in page
    places = pl.read_parquet(latest / "cells.parquet")["place"].unique().to_list()
    assert sorted(places) == ["land", "last"]
    assert run([*command, "--plan", "--json", *out]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 2 * 28 * 3
    assert run([*command, "--source", "0"]) == 2
    assert "a source above a target" in capsys.readouterr().err
