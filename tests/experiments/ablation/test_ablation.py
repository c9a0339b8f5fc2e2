"""Ablation as an experiment: every cell against edits of whole runs, references, controls, sets."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError, SiteError
from layerscope.experiments.ablation import AblationConfig, ablate, plan
from layerscope.experiments.ablation.summary import chosen_sets
from layerscope.experiments.patching.questions import Question, read_questions, read_texts
from layerscope.models import Replace, Site
from support.loaded import loaded


def question(key, country, *answers, foil="Rome"):
    return Question(
        key=key,
        prompt=f"The capital of {country} is called simply",
        answers=answers,
        foils=(foil,) if foil else (),
    )


# Of these, the first three have as many tokens.
QUESTIONS = [
    question("fr", "France", "Paris"),
    question("de", "Germany", "Berlin"),
    question("it", "Italy", "Tokyo"),
    question("jp", "Japan", "Tokyo"),
]
EVERY = ("zero", "mean", "position_mean", "resample")


def config(**settings):
    return AblationConfig(**{"keep_wrong": True, "sets": (), "draws": 1, **settings})


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_cells_are_what_edits_of_the_whole_run_give(family):
    model = loaded(family)
    settings = config(sites=("heads", "mlp_out"), how=EVERY, metrics=("logit_diff",), verify=4)
    outcome = ablate(model, QUESTIONS[:3], settings)
    assert outcome.summary["verified"]["worst_error"] < 1e-4
    assert outcome.summary["verified"]["cells"] == 3 * 2 * 4
    ids = [model.tokenize([one.prompt]).row_ids(0) for one in QUESTIONS[:3]]
    assert len({len(row) for row in ids}) == 1 and ids[0][0] == model.tokenizer.bos_token_id
    stored = model.run([list(row) for row in ids], capture=["attn.1.z", "mlp_out.1"])
    cells = outcome.tables["cells"].filter(prompt="fr", layer=1)
    wanted = [model.tokenize([f"{QUESTIONS[0].prompt} {word}"]).row_ids(0)[len(ids[0])]
              for word in ("Paris", "Rome")]  # fmt: skip
    places = list(range(1, len(ids[0])))  # all but the BOS
    for site, unit in ((Site("mlp_out", 1), None), (Site("attn.z", 1), 2)):
        values = stored[site] if unit is None else stored[site][:, :, unit]
        put = {
            "zero": torch.zeros_like(values[0, 1:]),
            "mean": values[:, 1:].flatten(0, 1).mean(0),
            "position_mean": values[1:, 1:].mean(0),  # of the others alone
        }
        name = str(site) if unit is None else f"attn.1.head.{unit}.z"
        part = cells.filter(site=str(site))
        part = part if unit is None else part.filter(unit=unit)
        found = {row["how"]: row for row in part.to_dicts()}

        def difference(value, name=name):
            edit = Replace(name, value=value, positions=places)
            row = model.run([list(ids[0])], edits=[edit], logits="last").logits[0, -1]
            return float(row[wanted[0]] - row[wanted[1]])

        for how, value in put.items():
            assert found[how]["value"] == pytest.approx(difference(value), abs=1e-4), how
        drawn = [difference(values[other, 1:]) for other in (1, 2)]
        assert any(found["resample"]["value"] == pytest.approx(one, abs=1e-4) for one in drawn)
        plain = model.run([list(ids[0])], logits="last").logits[0, -1]
        base = float(plain[wanted[0]] - plain[wanted[1]])
        assert found["zero"]["base"] == pytest.approx(base, abs=1e-4)
        assert found["zero"]["effect"] == pytest.approx(found["zero"]["value"] - base, abs=1e-4)


def test_positions_by_themselves_leave_the_bos_alone_and_last_is_one_of_them():
    model = loaded("llama")
    settings = {"sites": ("mlp_out",), "how": ("zero",), "metrics": ("prob",)}
    each = ablate(model, QUESTIONS[:1], config(positions="each", **settings)).tables["cells"]
    last = ablate(model, QUESTIONS[:1], config(positions="last", **settings)).tables["cells"]
    width = len(model.tokenize([QUESTIONS[0].prompt]).row_ids(0))
    assert sorted(each["position"].unique()) == list(range(1, width))
    own = each.filter(pl.col("position") == width - 1)
    assert own["value"].to_list() == pytest.approx(last["value"].to_list(), abs=1e-6)
    assert set(last["place"]) == {"last"} and each.height == model.n_layers * (width - 1)


def test_the_control_moves_as_far_in_a_random_direction_and_draws_repeat():
    model = loaded("llama")
    settings = config(sites=("mlp_out", "neurons"), layers=(1,), draws=3, metrics=("logit_diff",))
    first, again = (ablate(model, QUESTIONS[:2], settings) for _ in range(2))
    control = first.tables["control"]
    assert control.equals(again.tables["control"])
    assert control["draw"].n_unique() == 3
    spread = control.group_by("prompt", "site", "unit").agg(pl.col("value").n_unique())
    assert spread.filter(pl.col("value") > 1).height > 0
    top = first.summary["top"]
    assert all(row["control_size"] is not None for row in top)
    # A direction drawn anew: as large as the ablation, but not the ablation.
    cells = first.tables["cells"].filter(metric="logit_diff", site="mlp_out.1", prompt="fr")
    drawn = control.filter(site="mlp_out.1", prompt="fr")["value"]
    assert not any(abs(value - cells["value"][0]) < 1e-6 for value in drawn)


def test_sets_are_ablated_together_beside_random_ones():
    model = loaded("llama")
    settings = config(sets=(2, 5), draws=4, metrics=("logit_diff",))
    outcome = ablate(model, QUESTIONS[:2], settings)
    sets = outcome.tables["sets"]
    assert sets.filter(set="top")["size"].unique().sort().to_list() == [2, 5]
    assert sets.filter(set="random")["draw"].n_unique() == 4
    cells = outcome.tables["cells"].filter(metric="logit_diff")
    (kind, how, which, _, members), *_ = chosen_sets(cells, "logit_diff", settings)
    assert (kind, how, which, len(members)) == ("heads", "mean", "top", 2)
    ids = [model.tokenize([one.prompt]).row_ids(0) for one in QUESTIONS[:2]]
    stored = model.run([list(row) for row in ids], capture=[f"attn.{at}.z" for at in range(3)])
    edits = []
    for _, site, unit, _, _ in members:
        mean = stored[site][:, 1:, unit].flatten(0, 1).mean(0)
        name = f"{site[:-2]}.head.{unit}.z"
        edits.append(Replace(name, value=mean, positions=list(range(1, len(ids[0])))))
    row = model.run([list(ids[0])], edits=edits, logits="last").logits[0, -1]
    answers = [model.tokenize([f"{QUESTIONS[0].prompt} {word}"]).row_ids(0)[len(ids[0])]
               for word in ("Paris", "Rome")]  # fmt: skip
    value = sets.filter(prompt="fr", set="top", size=2)["value"][0]
    assert value == pytest.approx(float(row[answers[0]] - row[answers[1]]), abs=1e-4)
    summary = outcome.summary["sets"][0]
    assert summary["size"] == 2 and summary["random"] is not None


def test_references_are_prompts_of_the_same_length_or_said_to_lack():
    model = loaded("llama")
    settings = config(how=("resample",), metrics=("logprob",))
    outcome = ablate(model, QUESTIONS, settings)  # no other prompt is as short as Japan's
    assert outcome.summary["prompts"]["used"] == 3
    (left,) = outcome.summary["prompts"]["left_out"]
    assert left["prompt"] == "jp" and "no other reference prompt has 9 tokens" in left["reason"]
    with pytest.raises(PromptError, match="use mean or zero"):
        plan(model, QUESTIONS[3:], settings)
    others = [f"The capital of {name} is called simply" for name in ("Japan", "Italy")]
    found = plan(model, QUESTIONS[:1], settings, reference=others)
    assert [len(row) for row in found.references.ids] == [9, 10]
    # Without foils the default metric needs none.
    bare = [question("fr", "France", "Paris", foil="")]
    assert plan(model, bare, config()).metrics == ("logprob", "kl")
    assert plan(model, QUESTIONS, config()).metrics == ("logit_diff", "kl")


def test_bad_requests_are_refused_before_anything_runs():
    def refused(error, match, **settings):
        with pytest.raises(error, match=match):
            plan(loaded("llama"), QUESTIONS, config(**settings))

    refused(ConfigError, "unknown ablation 'meen'; did you mean 'mean'", how=("meen",))
    refused(SiteError, "unknown kind of site 'head'", sites=("head",))
    refused(ConfigError, "ablate heads", sites=("pattern",))
    refused(ConfigError, "units 0 to 3, not 9", units=(9,))
    refused(ConfigError, "positions='first'", positions="first")
    refused(ConfigError, "would take about", max_seconds=1e-9)
    refused(ConfigError, "a set is of 2 or more", sets=(1,))
    with pytest.raises(PromptError, match="answers none of 4 prompts"):
        plan(loaded("llama"), QUESTIONS, AblationConfig(answered="top1"))


def test_files_of_prompts_and_of_pairs_are_read(tmp_path):
    prompts, pairs, texts = (tmp_path / name for name in ("a.json", "b.json", "c.txt"))
    prompts.write_text(
        json.dumps([{"prompt": "One two", "answer": "three", "labels": {"n": "two"}}])
    )
    (one,) = read_questions(prompts)
    assert one == Question(key="0001", prompt="One two", answers=("three",), labels={"n": "two"})
    pairs.write_text(json.dumps([{"clean": "A b", "corrupt": "A c", "answer": "d", "foil": "e"}]))
    (one,) = read_questions(pairs)
    assert (one.prompt, one.answers, one.foils) == ("A b", ("d",), ("e",))
    texts.write_text("One two\n\nthree four\n")
    assert read_texts(texts) == ["One two", "three four"] and read_texts(prompts) == ["One two"]
    prompts.write_text(json.dumps([{"prompt": "x"}, {"answer": "y"}]))
    with pytest.raises(PromptError, match="entry 2: prompt is missing"):
        read_questions(prompts)
    with pytest.raises(PromptError, match="does not exist"):
        read_texts(tmp_path / "no.txt")


def test_the_command_prints_its_plan_and_keeps_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("ablate", "check"))
    prompts = tmp_path / "prompts.json"
    rows = [{"prompt": f"The capital of {country} is", "answer": answer, "foil": "Rome"}
            for country, answer in (("France", "Paris"), ("Japan", "Tokyo"))]  # fmt: skip
    prompts.write_text(json.dumps(rows))
    command = ["ablate", str(model_path()), "--prompts", str(prompts), "--device", "cpu"]
    out = ["--out", str(tmp_path / "runs")]
    assert run([*command, "--how", "mean", "--how", "resample", *out]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 prompts, " in printed.err and "computed again by full passes" in printed.out
    assert "together (mean)" in printed.out
    page = Path(tmp_path / "runs" / "run-latest" / "report.html").read_text("utf-8")
    for text in ("Ablation", "Sweep: heads, resample", "random change", "Together", "France"):
        assert text in page
    assert run([*command, "--plan", "--json", *out]) == 0
    assert (
        json.loads(capsys.readouterr().out)["cells"] == 2 * 8 * 6
    )  # heads of all blocks, for each prompt
    assert run([*command, "--how", "media"]) == 2
    assert "unknown ablation 'media'" in capsys.readouterr().err
