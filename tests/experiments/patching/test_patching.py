"""The patching and tracing experiments on the embedded model: tables, exclusions, resume, pages."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

import layerscope
from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.errors import AlignmentError, CapabilityError, ConfigError, PromptError, SiteError
from layerscope.experiments.patching import (
    Fact,
    PatchConfig,
    TraceConfig,
    execute,
    execute_trace,
    patch,
    plan,
    plan_trace,
)
from layerscope.interventions.patching import PromptPair, recovery, tokenize_pair
from layerscope.models import Replace
from layerscope.reports.patching import write_patching
from layerscope.reports.tracing import write_tracing
from support.loaded import loaded


@pytest.fixture(scope="module")
def model():
    return layerscope.load(model_path(), device="cpu")


def pair(key, clean, corrupt, answer, foil, **more):
    sentence = "The capital of {} is"
    return PromptPair(
        key=key,
        clean=sentence.format(clean),
        corrupt=sentence.format(corrupt),
        answers=(answer,),
        foils=(foil,),
        **more,
    )


PAIRS = [
    pair("fr", "France", "Japan", "Paris", "Tokyo"),
    pair("it", "Italy", "Germany", "Rome", "Berlin"),
]
WRONG = pair("wrong", "Spain", "Italy", "Rome", "Madrid")


class Units:
    """Keeps finished units in memory, as files would; dies after so many."""

    def __init__(self, kept=None, life=None):
        self.kept = {} if kept is None else kept
        self.life = life

    def get_unit(self, key):
        return self.kept.get(key)

    def put_unit(self, key, frame, payload):
        if self.life is not None and len(self.kept) >= self.life:
            raise KeyboardInterrupt
        self.kept[key] = (frame, payload)


def test_values_are_those_of_edited_runs_and_recovery_is_normalised(model):
    config = PatchConfig(sites=("resid_pre", "heads"), metrics=("logit_diff", "prob"))
    outcome = patch(model, PAIRS, config)
    cells = outcome.tables["cells"]
    assert cells.height == 2 * 2 * (8 * 6 + 8 * model.n_heads)
    assert outcome.summary["verified"]["worst_error"] < 1e-4
    clean, corrupt = (model.tokenize(text) for text in (PAIRS[0].clean, PAIRS[0].corrupt))
    targets = tokenize_pair(model, PAIRS[0]).targets
    donor = model.run(clean, capture="resid_pre.*")

    def difference(**options):
        row = model.run(corrupt, logits="last", **options).logits[0, -1]
        return float(row[list(targets.answers)].mean() - row[list(targets.foils)].mean())

    rows = cells.filter((pl.col("pair") == "fr") & (pl.col("metric") == "logit_diff"))
    base = difference()
    for row in rows.filter(pl.col("kind") == "resid_pre").to_dicts()[::7]:
        at = row["position"]
        edit = Replace(row["site"], value=donor[row["site"]][0, at], positions=at)
        assert row["value"] == pytest.approx(difference(edits=[edit]), abs=1e-4)
        assert row["base"] == pytest.approx(base, abs=1e-4)
        share = (row["value"] - row["base"]) / (row["donor"] - row["base"])
        assert row["recovery"] == pytest.approx(share)
    # The country itself restores everything at the bottom, the last token at the top.
    table = {(row["site"], row["position"]): row["recovery"] for row in rows.to_dicts()}
    assert table["resid_pre.0", 4] == pytest.approx(1, abs=1e-4)
    assert table["resid_pre.7", 5] == pytest.approx(1, abs=0.05)
    assert table["resid_pre.7", 4] == pytest.approx(0, abs=0.05)


def test_noising_is_denoising_the_other_way_about(model):
    pairs = [PAIRS[0]]
    noised = patch(model, pairs, PatchConfig(direction="noise")).tables["cells"]
    turned = PromptPair(
        key="fr",
        clean=pairs[0].corrupt,
        corrupt=pairs[0].clean,
        answers=pairs[0].answers,
        foils=pairs[0].foils,
    )
    denoised = patch(model, [turned], PatchConfig(keep_wrong=True)).tables["cells"]
    torch.testing.assert_close(
        torch.tensor(noised["value"].to_list()),
        torch.tensor(denoised["value"].to_list()),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_killed_run_goes_on_to_the_same_bytes(model, tmp_path):
    config = PatchConfig(sites=("resid_pre", "mlp_out"))
    planned = plan(model, PAIRS, config)
    whole = execute(planned)
    kept = {}
    with pytest.raises(KeyboardInterrupt):
        execute(planned, units=Units(kept, life=2))
    assert len(kept) == 2
    seen = []
    again = execute(planned, units=Units(kept), progress=lambda done, of: seen.append((done, of)))
    assert seen[-1][0] == seen[-1][1] == 2 * 2 * 8 * 6 + 2  # the cells, and a control per pair
    for name in whole.tables:
        paths = [tmp_path / f"{name}-{which}.parquet" for which in ("whole", "again")]
        for path, outcome in zip(paths, (whole, again), strict=True):
            outcome.tables[name].write_parquet(path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert json.dumps(whole.summary) == json.dumps(again.summary)


def test_the_control_is_the_same_patch_with_another_pairs_values(model):
    outcome = patch(model, PAIRS, PatchConfig(sites=("resid_pre", "heads"), metrics=("prob",)))
    control = outcome.tables["control"]
    assert dict(control.select("pair", "other").unique().rows()) == {"fr": "it", "it": "fr"}
    donor = model.run(model.tokenize(PAIRS[1].clean), capture="resid_pre.*")
    answer = list(tokenize_pair(model, PAIRS[0]).targets.answers)
    ends = outcome.tables["cells"].filter(pair="fr").row(0, named=True)
    rows = control.filter(pair="fr", kind="resid_pre").to_dicts()
    assert len(rows) > 5
    for row in rows[:5]:
        at = int(row["place"])
        edit = Replace(row["site"], value=donor[row["site"]][0, at], positions=at)
        logits = model.run(model.tokenize(PAIRS[0].corrupt), logits="last", edits=[edit]).logits
        value = float(logits[0, -1].softmax(-1)[answer].sum())
        assert row["value"] == pytest.approx(value, abs=1e-4)
        share = (value - ends["base"]) / (ends["donor"] - ends["base"])
        assert row["recovery"] == pytest.approx(share, abs=1e-3)
    top = outcome.summary["top"]
    assert top[0]["mean_recovery"] > 0.9 and abs(top[0]["control"]) < 0.1
    alone = patch(model, PAIRS[:1]).summary
    assert any("no control" in line for line in alone["cautions"])
    assert patch(model, PAIRS, PatchConfig(control=False)).tables["control"].is_empty()


def test_what_cannot_be_used_is_counted_and_said(model):
    longer = PromptPair(
        key="longer",
        clean="The capital of Spain is",
        corrupt="The big capital of Italy is",
        answers=("Madrid",),
        foils=("Rome",),
    )
    labelled = PromptPair(
        **{**longer.__dict__, "key": "labelled", "labels": {"country": ("Spain", "Italy")}}
    )
    outcome = patch(model, [*PAIRS, WRONG, longer, labelled])
    pairs = outcome.summary["pairs"]
    assert pairs["given"] == 5 and pairs["used"] == 3
    assert pairs["not_answered"] == 1 and pairs["refused"] == 1
    reasons = {row["pair"]: row["reason"] for row in pairs["left_out"]}
    assert reasons["wrong"] == "the model does not answer the clean prompt"
    assert "6 and 7 tokens" in reasons["longer"] and "' big'" in reasons["longer"]
    cells = outcome.tables["cells"].filter(pl.col("pair") == "labelled")
    assert cells["place"].unique(maintain_order=True).to_list() == ["country", "last"]
    table = {(row["site"], row["place"]): row["recovery"] for row in cells.to_dicts()}
    assert table["resid_pre.7", "last"] == pytest.approx(1, abs=0.05)
    kept = patch(model, [WRONG], PatchConfig(keep_wrong=True))
    assert kept.summary["pairs"]["used"] == 1
    with pytest.raises(PromptError, match="6 and 7 tokens"):
        patch(model, [longer])


def test_a_zero_denominator_is_reported_not_divided_by(model, tmp_path):
    ranked = PromptPair(
        key="ranked",
        clean="The capital of France is",
        corrupt="The capital of Japan is",
        answers=("Paris",),
        foils=("Tokyo",),
    )
    # The best of all cities is first in either run, so its rank cannot be recovered.
    cities = PromptPair(**{**ranked.__dict__, "key": "cities", "answers": ("Paris", "Tokyo")})
    cities = PromptPair(**{**cities.__dict__, "foils": ()})
    outcome = patch(model, [ranked, cities], PatchConfig(metrics=("rank",)))
    cells = outcome.tables["cells"]
    assert outcome.summary["zero_denominator"] == ["cities"]
    assert cells.filter(pl.col("pair") == "cities")["recovery"].null_count() == 8 * 6
    assert cells.filter(pl.col("pair") == "ranked")["recovery"].null_count() == 0
    assert any("saturates at 1" in caution for caution in outcome.summary["cautions"])
    assert any("same rank in 1 of 2 pairs (cities)" in line for line in outcome.summary["cautions"])
    alone = patch(model, [cities], PatchConfig(metrics=("rank",)))
    assert alone.summary["top"][0]["mean_recovery"] is None
    page = write_patching(alone, tmp_path / "page.html").read_text()
    assert "No recovery exists" in page and "in 1 of 1 pairs" in page
    assert recovery(torch.tensor([1.0]), 2.0, 2.0) is None
    assert recovery(torch.tensor([3.0]), 2.0, 2.0 + 1e-12) is None
    assert recovery(torch.tensor([3.0]), 2.0, 4.0).tolist() == [0.5]


def test_bad_requests_are_refused_before_anything_runs(model):
    def refused(error, match, pairs=PAIRS, **settings):
        with pytest.raises(error, match=match):
            plan(model, pairs, PatchConfig(**settings))

    refused(
        ConfigError, "unknown metric 'logit_dif'; did you mean 'logit_diff'", metrics=("logit_dif",)
    )
    refused(SiteError, "unknown kind of site 'head'; did you mean 'heads'", sites=("head",))
    refused(ConfigError, "direction='up'", direction="up")
    refused(ConfigError, "more than the 0 s allowed", max_seconds=1e-9)
    refused(ConfigError, "more than the 0 MiB allowed", max_bytes=1)
    bare = PromptPair(
        key="bare", clean=PAIRS[0].clean, corrupt=PAIRS[0].corrupt, answers=("Paris",)
    )
    refused(ConfigError, "needs a foil, and pair 'bare' has none", pairs=[bare])
    nothing = PromptPair(key="none", clean=bare.clean, corrupt=bare.corrupt)
    refused(
        ConfigError, "needs an answer, and pair 'none' has none", pairs=[nothing], metrics=("prob",)
    )
    equal = PromptPair(key="equal", clean=bare.clean, corrupt=bare.clean, answers=("Paris",))
    refused(PromptError, "the same tokens", pairs=[equal])
    twice = pair("twice", "France", "Japan", "Paris", "Paris")
    refused(AlignmentError.__mro__[1], "begin with the same token", pairs=[twice])
    with pytest.raises(CapabilityError, match="read the same residual in parallel; use resid_pre"):
        plan(loaded("gpt_neox"), PAIRS, PatchConfig(sites=("resid_mid",)))
    # Without answers, the distance to the clean run can still be measured.
    outcome = patch(model, [nothing], PatchConfig(metrics=("kl",)))
    rows = outcome.tables["cells"].filter(pl.col("site") == "resid_pre.0").to_dicts()
    assert rows[0]["donor"] == pytest.approx(0, abs=1e-6)
    assert rows[4]["value"] == pytest.approx(0, abs=1e-4) and rows[0]["value"] > 1


def test_the_plan_predicts_what_is_computed(model):
    planned = plan(model, PAIRS, PatchConfig())
    cost = planned.cost
    # Of six positions the first four are the same in both prompts.
    assert cost.cells == 2 * 8 * 6
    assert cost.idle == 2 * 8 * 4
    assert cost.naive_block_tokens == 2 * 8 * 6 * 8 * 6
    assert cost.block_tokens < cost.naive_block_tokens / 5
    assert planned.seconds > 0 and "times less computed" in planned.describe()


def test_pages_show_every_sweep_and_every_pair(model, tmp_path):
    config = PatchConfig(sites=("resid_pre", "heads", "neurons"), layers=(2, 5))
    outcome = patch(model, [*PAIRS, WRONG], config)
    page = write_patching(outcome, tmp_path / "page.html").read_text()
    for text in ("Sweep: resid_pre", "Sweep: heads", "Sweep: neurons", "does not answer", "France"):
        assert text in page


FACTS = [
    Fact(key="fr", prompt="The capital of France is", subject="France", answer="Paris"),
    Fact(key="it", prompt="The capital of Italy is", subject="Italy", answer="Rome"),
    Fact(key="wrong", prompt="The capital of Italy is", subject="Italy", answer="Paris"),
    Fact(key="absent", prompt="The capital of Italy is", subject="Peru", answer="Rome"),
]


def test_tracing_counts_what_it_leaves_out_and_resumes(model, tmp_path):
    config = TraceConfig(restore=("state", "mlp"), window=2, seeds=3)
    planned = plan_trace(model, FACTS, config)
    assert [fact.key for fact, _ in planned.facts] == ["fr", "it"]
    assert "answers ' Rome', not 'Paris'" in planned.left_out["wrong"]
    assert "'Peru'" in planned.left_out["absent"]
    kept = {}
    with pytest.raises(KeyboardInterrupt):
        execute_trace(planned, units=Units(kept, life=2))
    outcome, whole = execute_trace(planned, units=Units(kept)), execute_trace(planned)
    assert outcome.tables["cells"].equals(whole.tables["cells"])
    cells = whole.tables["cells"]
    assert cells.height == 2 * 2 * 8 * 6
    first = cells.filter((pl.col("fact") == "fr") & (pl.col("restore") == "state"))
    table = {(row["position"], row["layer"]): row for row in first.to_dicts()}
    assert table[0, 3]["indirect"] == 0.0 and table[0, 3]["role"] == "before"
    # The last token's last state is the clean answer.
    assert table[5, 7]["restored"] == pytest.approx(table[5, 7]["clean"], abs=1e-5)
    assert table[5, 7]["role"] == "last token" and table[4, 0]["role"] == "last subject"
    page = write_tracing(whole, tmp_path / "page.html").read_text()
    assert "single block states" in page.lower() and "Peru" in page


def test_the_commands_keep_their_runs(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layerscope.cli.app.COMMANDS", ("patch", "trace", "check"))
    pairs, facts = tmp_path / "pairs.json", tmp_path / "facts.json"
    pairs.write_text(json.dumps([one.to_dict() for one in [*PAIRS, WRONG]]))
    facts.write_text(json.dumps([one.to_dict() for one in FACTS]))
    common = ["--device", "cpu", "--out", str(tmp_path / "runs"), "--json"]
    command = ["patch", str(model_path()), "--pairs", str(pairs), "--sites", "heads"]
    assert run([*command, *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["summary"]["pairs"]["used"] == 2
    assert "<html" in Path(document["report"]).read_text()
    tracing = ["trace", str(model_path()), "--facts", str(facts), "--seeds", "2"]
    assert run([*tracing, *common]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["facts"]["used"] == 2
    assert run([*command, "--max-seconds", "0.0000001", "--device", "cpu"]) == 2
    assert "would take about" in capsys.readouterr().err
    pairs.write_text(json.dumps([WRONG.to_dict()]))
    assert run(command) == 2
    assert "answers the clean prompt of none of 1 pairs" in capsys.readouterr().err
    assert run([*command, "--limit", "0"]) == 2
    assert "'--limit'" in capsys.readouterr().err
