"""A planted machine: what decides is found, what only differs is not; runs resume and repeat."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from layerscope.errors import ConfigError, EditError, PromptError
from layerscope.experiments.causal_features import CausalConfig, Game, Task, demo_task, read_task
from layerscope.experiments.causal_features.files import write_data
from layerscope.experiments.causal_features.run import causal_features, plan
from layerscope.experiments.pathways import PathwaysConfig
from layerscope.experiments.pathways.audit import Universe, audit
from layerscope.experiments.units import Outcome
from layerscope.features.row_edits import RowPatch, patch_rows
from layerscope.files import canonical_json, sha256_text
from layerscope.reports.causal_features import write_causal_features
from support.slot_machine import DECIDES, DIFFERS, machine, task

CONFIG = CausalConfig(top_per_layer=2, trials=60, controls=3, max_new_tokens=1)


class Kept:
    """A store of units that dies after a number of them."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.units: dict[str, tuple[pl.DataFrame, dict[str, Any]]] = {}
        self._left = dies_after

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any]] | None:
        return self.units.get(key)

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left = None if self._left is None else self._left - 1
        self.units[key] = (frame, payload)


@cache
def outcome() -> Outcome:
    return causal_features(*machine(), task(), CONFIG)


def test_the_planted_feature_is_causal_and_the_one_that_only_differs_is_not() -> None:
    features = outcome().tables["features"]
    assert set(features["feature_id"].to_list()) == {DECIDES, DIFFERS}
    verdicts = dict(features.select("feature_id", "verdict").iter_rows())
    assert verdicts == {DECIDES: "mixed", DIFFERS: "none"}
    decides = features.row(by_predicate=pl.col("feature_id") == DECIDES, named=True)
    assert decides["cohen_d"] < -5
    # logit(stop) - logit(bet) = 2 x - 2.6: from x = 0.75 to 2.15 and back
    assert decides["safe_effect"] == pytest.approx(0.85 - 0.25, abs=0.2)
    assert decides["risky_effect"] == pytest.approx(0.85 - 0.25, abs=0.2)
    differs = features.row(by_predicate=pl.col("feature_id") == DIFFERS, named=True)
    assert differs["cohen_d"] > 5
    assert differs["safe_effect"] == differs["risky_effect"] == 0.0


def test_the_provenance_has_the_hash_of_all_tokens_that_were_read() -> None:
    model, asked = machine()[0], task()
    texts = [
        game.prompt
        for part in (asked.contrast, asked.patched)
        for side in ("safe", "risky")
        for game in part[side]
    ]
    ids = [list(model.tokenize(text).row_ids(0)) for text in texts]
    assert outcome().provenance["tokens_sha256"] == sha256_text(canonical_json(ids))


def test_random_controls_and_identity_edits_change_nothing() -> None:
    summary = outcome().summary
    assert summary["controls"]["n"] == 2 * 2 * 3
    assert summary["controls"]["discoveries"] == 0
    assert summary["identity"] == {"compared": 12, "differing": 0}
    assert summary["dead"] == 1 and summary["features"] == 12
    assert summary["baselines"]["safe_baseline"]["stop_rate"] > 0.7
    assert summary["baselines"]["risky_baseline"]["stop_rate"] < 0.5


def test_a_patch_to_the_value_a_group_has_leaves_it_as_it_is() -> None:
    responses = outcome().tables["responses"].filter(pl.col("kind") != "control")
    base = responses.filter(condition="safe_baseline")["action"].to_list()
    idle = responses.filter(condition="safe_with_risky_patch", feature_id=DIFFERS)
    assert idle["action"].to_list() == base
    assert base != ["stop"] * 60


def test_equal_features_give_no_causal_verdict() -> None:
    """Groups that differ in nothing that is read: the contrast finds, patching refuses."""
    found = causal_features(*machine(reads=0.0), task(), CONFIG)
    assert set(found.tables["features"]["verdict"].to_list()) == {"none"}
    assert any("no single feature" in line for line in found.summary["warnings"])


def test_the_batch_size_changes_nothing() -> None:
    small = causal_features(*machine(), task(), replace(CONFIG, batch_rows=7))
    for name, table in outcome().tables.items():
        assert small.tables[name].equals(table), name


@pytest.mark.parametrize("units", (0, 1, 3))
def test_a_killed_run_goes_on_to_the_same_tables(units: int) -> None:
    store = Kept(dies_after=units)
    with pytest.raises(KeyboardInterrupt):
        causal_features(*machine(), task(), CONFIG, units=store)
    assert len(store.units) == units
    again = Kept()
    again.units = store.units
    found = causal_features(*machine(), task(), CONFIG, units=again)
    for name, table in outcome().tables.items():
        assert found.tables[name].equals(table), name
    assert found.summary == outcome().summary


def test_the_files_pass_the_audit_and_are_the_same_twice(tmp_path: Path) -> None:
    paths = write_data(outcome(), tmp_path / "a")
    assert [path.read_bytes() for path in paths] == [
        path.read_bytes() for path in write_data(outcome(), tmp_path / "b")
    ]
    found = audit(
        PathwaysConfig(data=str(tmp_path / "a"), model="GPT2LMHeadModel", dictionaries="d"),
        Universe("machine:resid_post", {0: 12}, 16, "GPT2LMHeadModel"),
    )
    assert not found.findings.of("error"), found.findings.of("error")
    codes = {each["code"] for each in found.findings.of("warning")}
    assert not codes & {
        "missing_condition",
        "incomplete_conditions",
        "few_trials",
        "repeated_trials",
    }
    rows = found.features.filter(pl.col("is_causal"))
    assert rows.select("layer", "feature_id").rows() == [(0, DECIDES)]
    checkpoint = json.loads(paths[0].read_text("utf-8"))
    assert paths[0].name.startswith("checkpoint_L0_0_0_")
    assert checkpoint["results"][0]["causality"].keys() >= {"safe_p_value", "interpretation"}
    log = json.loads(paths[1].read_text("utf-8"))
    assert len(log) == 60 * (2 + 2 * 4)
    prompts = json.loads((tmp_path / "a" / "prompts.json").read_text("utf-8"))["prompts"]
    assert [each["id"] for each in prompts][:2] == ["safe-0", "safe-1"]


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = write_causal_features(outcome(), tmp_path / "page.html").read_text("utf-8")
    assert "of 2 that were patched, 1 change decisions" in page
    assert "L0-0" in page and "McNemar" in page


def test_greedy_replicates_and_mixed_up_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="copies of one another"):
        CausalConfig(temperature=0.0)
    games = tuple(Game(f"p{i}") for i in range(4))
    others = {"safe": (Game("x"),), "risky": (Game("y"),)}
    with pytest.raises(PromptError, match="safe and risky"):
        Task("t", {"safe": games, "risky": games}, others)
    good = {"safe": games[:2], "risky": games[2:]}
    with pytest.raises(PromptError, match="chosen on"):
        Task("t", good, {"safe": games[:1], "risky": (Game("y"),)})
    with pytest.raises(PromptError, match="two prompts or more"):
        Task("t", {"safe": games[:1], "risky": games[2:]}, others)


def test_groups_that_do_not_differ_are_refused() -> None:
    model, dictionaries = machine()
    same = (
        tuple(Game(f"w{i} s{i % 20}") for i in range(4)),
        tuple(Game(f"w{i + 4} s{i % 20}") for i in range(4)),
    )
    alike = Task("alike", {"safe": same[0], "risky": same[1]}, task().patched)
    with pytest.raises(ConfigError, match="no feature differs"):
        causal_features(model, dictionaries, alike, CONFIG)


def test_a_task_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(
        "safe: [a, b, {prompt: c, low: 5, high: 100}, d]\nrisky: [e, f, g, h]\n", "utf-8"
    )
    found = read_task(path)
    assert found.contrast["safe"][2] == Game("c", 5.0, 100.0)
    assert found.patched["risky"] == (Game("h"),)
    for text in ("safe: [a]", "safe: a\nrisky: b", "safe: [{low: 1}]\nrisky: [b]", ": ["):
        path.write_text(text, "utf-8")
        with pytest.raises(PromptError, match="task"):
            read_task(path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_task(tmp_path / "none.yaml")


def test_the_embedded_task_keeps_its_prompts_apart() -> None:
    found = demo_task(contrast=20, patched=3)
    texts = [game.prompt for part in (found.contrast, found.patched) for side in part.values()
             for game in side]  # fmt: skip
    assert len(set(texts)) == len(texts) == 46
    assert demo_task(contrast=20, patched=3) == found
    assert {game.high for game in found.contrast["risky"]} == {10.0, 100.0}


def test_the_identity_of_a_plan_knows_its_dictionaries_but_not_the_batch() -> None:
    model, dictionaries = machine()
    first = plan(model, dictionaries, task(), CONFIG).identity
    assert plan(model, dictionaries, task(), replace(CONFIG, batch_rows=3)).identity == first
    dictionaries[0].bias[5] = 0.25
    assert plan(model, dictionaries, task(), CONFIG).identity != first


def test_rows_get_their_own_features_and_controls_their_length() -> None:
    _, dictionaries = machine()
    dictionary = dictionaries[0]
    dictionary.decoders[0].tensor()[4] *= 0.5
    x = torch.rand(3, 2, 16, dtype=torch.float64) + 0.5
    edit = patch_rows(dictionary, [RowPatch(0, 2, 3.0, 2), RowPatch(2, 2, 3.0, 4)])
    moved = edit.transform(x, None) - x  # type: ignore[arg-type]
    assert torch.equal(moved[1], torch.zeros_like(moved[1]))
    assert torch.allclose(moved[0, :, 2], 3.0 - x[0, :, 2])
    assert moved[0].count_nonzero() == 2
    assert torch.allclose(moved[2, :, 4], 3.0 - x[2, :, 2])  # as long as feature 2's own change
    assert moved[2].count_nonzero() == 2
    with pytest.raises(EditError, match="one for each row"):
        patch_rows(dictionary, [RowPatch(0, 1, 1.0, 1), RowPatch(0, 2, 1.0, 2)])
