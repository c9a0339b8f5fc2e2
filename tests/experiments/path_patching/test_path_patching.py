"""Path patching as an experiment: names, every edge against two full passes, control, page."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError, SiteError
from layerscope.experiments.path_patching import PathConfig, path_patch, plan
from layerscope.experiments.path_patching.config import receivers_named, senders_named
from layerscope.interventions.patching import PromptPair
from support.loaded import loaded


def pair(key, clean, corrupt, answer, foil):
    sentence = "The capital of {} is called simply"
    return PromptPair(
        key=key,
        clean=sentence.format(clean),
        corrupt=sentence.format(corrupt),
        answers=(answer,),
        foils=(foil,),
    )


PAIRS = [
    pair("fr", "France", "Italy", "Paris", "Rome"),
    pair("de", "Germany", "Italy", "Berlin", "Tokyo"),
]


def test_names_stand_for_parts_of_the_model():
    model = loaded("llama")  # three blocks of four query heads on two key-value heads
    heads, layers = model.n_heads, model.n_layers
    assert [str(one) for one in senders_named(model, ["embed", "1.2", "mlp.0", "1.2"])] == [
        "embed",
        "1.2",
        "mlp.0",
    ]
    assert len(senders_named(model, ["all"])) == 1 + layers * (heads + 1)
    assert len(senders_named(model, ["attns", "mlps"])) == 2 * layers
    named = receivers_named(model, ["logits", "1.3.q", "1.1.k", "2.v", "mlp.1", "1.mlp", "attn.2"])
    assert [str(one) for one in named] == [
        "logits", "1.3.q", "1.1.k", "2.v", "1.mlp", "2.attn",
    ]  # fmt: skip
    assert len(receivers_named(model, ["q"])) == layers * heads
    assert len(receivers_named(model, ["k"])) == layers * model.n_kv_heads
    every = receivers_named(model, ["all"])
    assert len(every) == 1 + layers * (heads + 2 * model.n_kv_heads + 1)
    for names, said in (
        (["1.99"], "heads 0 to 3"),
        (["9.0"], "layers 0 to"),
        (["head 3"], "unknown sender 'head 3'; use embed"),
    ):
        with pytest.raises(SiteError, match=said):
            senders_named(model, names)
    for names, said in ((["1.2.k"], "heads 0 to 1"), (["1.1.z"], "unknown receiver")):
        with pytest.raises(SiteError, match=said):
            receivers_named(model, names)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt_neox"))
def test_every_edge_equals_two_full_passes_with_all_else_frozen(family):
    config = PathConfig(
        receivers=("logits", "1.0.q", "2.0.k", "2.0.v", "mlp.2", "2.attn"),
        metrics=("logit_diff", "kl"),
        keep_wrong=True,
        verify=10**6,
    )
    outcome = path_patch(loaded(family), PAIRS[:1], config)
    checked = outcome.summary["verified"]
    edges = outcome.tables["edges"]
    assert checked["cells"] == edges.height / 2 > 30
    assert checked["worst_error"] <= 2e-5 * checked["scale"]
    live = edges.filter((pl.col("metric") == "logit_diff") & (pl.col("value") != pl.col("base")))
    assert live.height > 20


def test_a_sender_at_each_position_is_exact_and_shared_beginnings_say_nothing():
    model = loaded("llama")
    settings = {"senders": ("0.1", "mlp.0"), "receivers": ("1.0.k", "2.0.q"), "keep_wrong": True}
    config = PathConfig(positions="each", verify=10**6, **settings)
    outcome = path_patch(model, PAIRS[:1], config)
    edges = outcome.tables["edges"]
    width = len(model.tokenize([PAIRS[0].clean]).row_ids(0))
    assert edges.height == 4 * width
    assert outcome.summary["verified"]["worst_error"] < 1e-4
    same = plan(model, PAIRS[:1], config).chosen.used[0].same
    before = edges.filter(pl.col("position") < same)
    assert same > 1 and before["value"].equals(before["base"].alias("value"))
    last = path_patch(model, PAIRS[:1], PathConfig(positions="last", **settings)).tables["edges"]
    expected = edges.filter(pl.col("place") == "last")["value"].to_list()
    assert last["value"].to_list() == pytest.approx(expected, abs=1e-5)


def test_the_control_lets_another_pair_speak():
    model = loaded("llama")
    config = PathConfig(keep_wrong=True)
    outcome = path_patch(model, PAIRS, config)
    control = outcome.tables["control"]
    assert dict(control.select("pair", "other").unique().iter_rows()) == {"fr": "de", "de": "fr"}
    # What the other pair says, read as this pair's answer: the pair's own run of those two prompts.
    crossed = PromptPair(
        key="crossed",
        clean=PAIRS[1].clean,
        corrupt=PAIRS[0].corrupt,
        answers=PAIRS[0].answers,
        foils=PAIRS[0].foils,
    )
    alone = path_patch(model, [crossed], config).tables["edges"]
    values = {(row["sender"], row["receiver"]): row["value"] for row in alone.to_dicts()}
    for row in control.filter(pl.col("pair") == "fr").to_dicts():
        assert row["value"] == pytest.approx(values[row["sender"], row["receiver"]], abs=1e-4)
    assert all(row["control"] is not None for row in outcome.summary["top"])
    single = path_patch(model, PAIRS[:1], config).summary
    assert any("no control" in line for line in single["cautions"])
    none = path_patch(model, PAIRS, PathConfig(keep_wrong=True, control=False))
    assert none.tables["control"].is_empty()


def test_bad_requests_are_refused_before_anything_runs():
    model = loaded("llama")

    def refused(error, match, pairs=PAIRS, **settings):
        with pytest.raises(error, match=match):
            plan(model, pairs, PathConfig(keep_wrong=True, **settings))

    refused(SiteError, "writes before a receiver", senders=("mlp.2",), receivers=("1.0.q",))
    refused(ConfigError, "positions='first'", positions="first")
    refused(ConfigError, "would take about", max_seconds=1e-9)
    longer = PromptPair(**{**PAIRS[0].__dict__, "corrupt": "The capital of all Italy is called"})
    labelled = PromptPair(**{**longer.__dict__, "labels": {"country": ("France", "Italy")}})
    refused(PromptError, "place by place, so reword one", pairs=[labelled])


def test_the_command_prints_its_plan_and_keeps_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("path", "check"))
    pairs = tmp_path / "pairs.json"
    sentences = [
        {**one.to_dict(), "clean": one.clean[:-14], "corrupt": one.corrupt[:-14]} for one in PAIRS
    ]
    pairs.write_text(json.dumps(sentences))
    command = ["path", str(model_path()), "--pairs", str(pairs), "--device", "cpu"]
    out = ["--out", str(tmp_path / "runs")]
    assert run([*command, "--from", "heads", "--to", "logits", "--to", "6.q", *out]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 pairs, " in printed.err and "computed again by full passes" in printed.out
    page = Path(tmp_path / "runs" / "run-latest" / "report.html").read_text("utf-8")
    more = "; the 40 of 48 senders that move most"
    for text in ("Path patching", "Strongest edges", "senders by receivers", "France", more):
        assert text in page
    assert run([*command, "--plan", "--json", *out]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] > 0
    assert run([*command, "--to", "6.k.1"]) == 2
    assert "unknown receiver '6.k.1'" in capsys.readouterr().err
