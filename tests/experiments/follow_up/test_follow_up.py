"""The causal follow-up on planted facts, whose onsets, heads and directions are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import polars as pl
import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.experiments.battery import BatteryConfig
from layerscope.experiments.follow_up import FollowUpConfig, execute, plan
from layerscope.experiments.follow_up.directions import (
    CONCEPT,
    Direction,
    Pair,
    Trial,
    dose,
    fit,
    mediate,
    without,
)
from layerscope.experiments.follow_up.slots import Slot, run_at
from layerscope.experiments.units import Outcome
from layerscope.files import canonical_json, sha256_text
from layerscope.models import LanguageModel
from layerscope.reports.follow_up import write_follow_up
from support.toy_facts import (
    ANSWER_LOGIT,
    HEAD,
    LOOKED_UP_ROW,
    MOVED_ROW,
    N_SUBJECTS,
    QUESTIONS,
    battery_of,
    fact_model,
    prompt,
    rows,
)

CONFIG = FollowUpConfig(alphas=(-1.0, 1.0), random_directions=2, facts_per_unit=4)


class Units:
    """Keeps units in memory; may die when it has kept so many."""

    def __init__(self, most: int | None = None) -> None:
        self.kept: dict[str, tuple[pl.DataFrame, dict[str, Any]]] = {}
        self.most = most

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any]] | None:
        return self.kept.get(key)

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        if self.most is not None and len(self.kept) >= self.most:
            raise KeyboardInterrupt
        self.kept[key] = (frame, payload)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return fact_model()


@pytest.fixture(scope="module")
def outcome(model: LanguageModel) -> Outcome:
    return execute(plan(model, battery_of(rows("one", "two", "eins")), CONFIG))


def test_onsets_are_where_they_were_planted(outcome: Outcome) -> None:
    items = outcome.tables["items"]
    assert items.height == 3 * N_SUBJECTS
    expected = {
        "observed": LOOKED_UP_ROW,
        "onset_attn_out": MOVED_ROW,
        "onset_resid_mid": MOVED_ROW,
        "onset_resid_post": MOVED_ROW,
        "onset_mlp_out": LOOKED_UP_ROW,
        "causal": MOVED_ROW,
        "difference": MOVED_ROW - LOOKED_UP_ROW,
    }
    for column, row in expected.items():
        assert set(items[column]) == {row}, column
    assert items["mlp_by_then"].all() and items["controlled"].all()
    assert items["control"].null_count() == items.height
    found = outcome.summary["onsets"]["all"]
    assert (found["within_one"], found["control"]["share"]) == (1.0, 0.0)
    assert "1 row before the observed one" in outcome.summary["verdict"]


def test_the_provenance_has_the_hash_of_all_tokens_that_were_read(
    model: LanguageModel, outcome: Outcome
) -> None:
    planned = plan(model, battery_of(rows("one", "two", "eins")), CONFIG)
    plain = [model.tokenize(p.item.prompts["orig"]).row_ids(0) for p in planned.prompts]
    assert [list(ids) for ids in plain] == [list(p.ids) for p in planned.read()[: len(plain)]]
    ids = [[int(token) for token in each.ids] for each in planned.read()]
    reworded = sum(len(some) for some in planned.paraphrases.values())
    assert reworded and len(ids) == 3 * N_SUBJECTS + len(planned.contrasts) + reworded
    assert outcome.provenance["tokens_sha256"] == sha256_text(canonical_json(ids))


def test_a_patched_block_gives_all_of_the_gap(outcome: Outcome) -> None:
    patches = outcome.tables["patches"].filter(pl.col("donor") == "clean")
    gaps = dict(outcome.tables["items"].select("item", "bits_between").iter_rows())
    after = patches.filter((pl.col("site") == "resid_post") & (pl.col("row") >= MOVED_ROW))
    for item, bits, diff, flip in after.select("item", "bits", "logit_diff", "flip").iter_rows():
        assert bits == pytest.approx(gaps[item], abs=1e-5)
        assert diff == pytest.approx(ANSWER_LOGIT) and flip
    before = patches.filter(pl.col("row") < MOVED_ROW)
    assert before.height and before["bits"].abs().max() == pytest.approx(0, abs=1e-5)
    third = outcome.tables["patches"].filter((pl.col("donor") == "third") & (pl.col("row") == 4))
    # The third subject's answer takes the place of the partner's: nothing for the fact's own.
    assert third["bits"].abs().max() == pytest.approx(0, abs=1e-5)


def test_the_head_that_moves_the_subject_stands_out(outcome: Outcome) -> None:
    scan = outcome.tables["heads"]
    assert set(scan["block"]) == {0, 1, 2, 3}
    gaps = dict(outcome.tables["items"].select("item", "bits_between").iter_rows())
    for item, block, head, ablated, patched, rank in scan.iter_rows():
        it_is = (block, head) == HEAD
        assert patched == pytest.approx(gaps[item] if it_is else 0, abs=1e-5)
        assert (ablated > 0.5) == it_is and (rank == 1) == it_is
    top = outcome.summary["heads"]["one/en"]["top"][0]
    assert (top["block"], top["head"]) == HEAD
    curve = outcome.tables["curve"]
    held_out = outcome.summary["fitted"]["one"]["held_out"]
    assert set(curve["item"].unique()) < set(outcome.tables["items"]["item"])
    assert (
        curve.filter((pl.col("relation") == "one") & (pl.col("language") == "en"))[
            "item"
        ].n_unique()
        == held_out
    )
    assert (curve.filter(which="top")["patch_bits"] > 5).all()
    assert curve.filter(which="random")["patch_bits"].abs().max() == pytest.approx(0, abs=1e-5)


def slot(subject: int, question: str, *, asks: str | None = None) -> Slot:
    ids = tuple(int(word[1:]) for word in prompt(subject, question).split())
    return Slot(f"s{subject}", ids, QUESTIONS[asks or question][1] + subject)


@pytest.fixture(scope="module")
def fitted(model: LanguageModel) -> Direction:
    """Return the direction of "one" against "two" before the look-up, where it is exact."""
    own = [slot(subject, "one") for subject in range(4)]
    others = [[slot(subject, "two")] for subject in range(4)]
    return fit(model, own, others, MOVED_ROW - 1, CONFIG)


def test_a_direction_holds_what_is_asked_and_not_of_whom(
    model: LanguageModel, fitted: Direction
) -> None:
    expected = torch.zeros_like(fitted.vector)
    expected[QUESTIONS["one"][0]], expected[QUESTIONS["two"][0]] = 1.0, -1.0
    torch.testing.assert_close(fitted.vector, expected)
    assert fitted.split_half == pytest.approx(1.0)
    trials = [Trial("other", "two", slot(5, "two", asks="one")), Trial("own", "", slot(5, "one"))]
    table = dose(model, "one", trials, fitted, CONFIG).rows
    added = table.filter((pl.col("direction") == CONCEPT) & (pl.col("alpha") == 1.0))
    other, own = added.iter_rows(named=True)
    # The question has become the other one: its answer comes, and nothing else.
    asked = run_at(model, [slot(5, "one")], lambda _number, _recording, _row: [])[0].plain
    assert other["rank"] == 1 < other["rank_before"]
    assert other["log2p"] == pytest.approx(asked.log2p, abs=1e-5)
    assert other["index"] == pytest.approx(other["bits"] / other["moved"])
    # More of the same makes the neuron stronger, so there is little to gain and nothing to lose.
    assert own["rank"] == 1 and 0 <= own["bits"] < 0.01
    removed = table.filter((pl.col("direction") == CONCEPT) & (pl.col("set") == "own"))
    cut = removed.filter(operation="project").row(0, named=True)
    minus = removed.filter(alpha=-1.0).row(0, named=True)
    assert cut["bits"] < -0.5 and minus["rank"] > 1


def test_the_moved_mass_is_that_of_the_other_top_tokens(
    model: LanguageModel, fitted: Direction
) -> None:
    trial = Trial("other", "", slot(5, "two", asks="one"))
    config = dataclasses.replace(CONFIG, top_tokens=3)
    row = dose(model, "one", [trial], fitted, config).rows.filter(
        (pl.col("direction") == CONCEPT) & (pl.col("alpha") == 1.0)
    )
    logits = [model.run([list(s.ids)], logits="last").logits for s in (trial.slot, slot(5, "one"))]
    before, after = (found[0, -1].double().softmax(-1) for found in logits if found is not None)
    order = [int(t) for t in before.argsort(descending=True, stable=True)]
    top = [token for token in order[:4] if token != trial.slot.answer][:3]
    expected = float((after - before)[top].abs().sum())
    assert row["moved"].item() == pytest.approx(expected, abs=1e-5)


def test_mediation_is_whole_for_the_question_and_nil_for_the_subject(
    model: LanguageModel, fitted: Direction
) -> None:
    pairs = [
        Pair("relation", slot(5, "two", asks="one"), slot(5, "one")),
        Pair(
            "subject",
            dataclasses.replace(slot(4, "one"), answer=slot(5, "one").answer),
            slot(5, "one"),
        ),
    ]
    table = mediate(model, "one", pairs, fitted, CONFIG).rows.filter(direction=CONCEPT)
    relation, subject = table.iter_rows(named=True)
    assert relation["through_bits"] == pytest.approx(relation["total_bits"], abs=1e-5)
    assert relation["around_bits"] == pytest.approx(0, abs=1e-5) and relation["total_bits"] > 5
    assert subject["through_bits"] == pytest.approx(0, abs=1e-5)
    assert subject["around_bits"] == pytest.approx(subject["total_bits"], abs=1e-5)


def test_projection_leaves_nothing_along_the_direction() -> None:
    h, v = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    left = without(h, v)
    assert float(left @ v) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(left, (torch.eye(8) - torch.outer(v, v) / (v @ v)) @ h)


def test_values_of_one_language_do_not_translate_themselves(outcome: Outcome) -> None:
    crossed = outcome.tables["languages"]
    assert set(crossed["language"]) == {"de"} and crossed["answered"].all()
    assert not crossed["same_token"].any()
    at = crossed.filter(pl.col("row") == LOOKED_UP_ROW)
    assert at.filter(donor="own")["flip"].all()
    assert not at.filter(donor="source")["flip"].any()
    assert (at.filter(donor="source")["bits"] < 0.1).all()
    summary = {row["donor"]: row["flip"] for row in outcome.summary["languages"]}
    assert summary == {"own": 1.0, "source": 0.0, "other": 0.0}


def test_whatever_is_left_out_is_listed_with_its_reason(model: LanguageModel) -> None:
    entries = rows("one", "two", fillers={0: 1})
    unknown = {"relation": "one", "language": "en", "variant": "orig"}
    entries.append(unknown | {"subject": "x", "answer": "t39", "prompt": "t3 t41"})
    entries.append(unknown | {"subject": "y", "answer": "t41", "prompt": "t3 t41"})
    found = execute(plan(model, battery_of(entries), CONFIG))
    excluded = found.tables["excluded"]
    stages = {(row["item"], row["stage"]): row["reason"] for row in excluded.iter_rows(named=True)}
    assert "rank" in stages["one/en/x", "not_answered"]
    assert ("one/en/y", "in_prompt") in stages
    assert "has a prompt of 3 tokens" in stages["one/en/s0", "no_partner"]
    assert "one/en/s0" not in set(found.tables["items"]["item"])
    counts = found.summary["counts"]
    assert sum(counts["excluded"].values()) == excluded.height
    left = {item for item, stage in stages if stage in ("not_answered", "no_partner", "no_onset")}
    assert counts["followed"] + len(left) == counts["asked"]


def test_too_few_facts_give_no_direction_and_say_so(model: LanguageModel) -> None:
    entries = [row for row in rows("one") if row["subject"] in ("s0", "s1")]
    found = execute(plan(model, battery_of(entries), CONFIG))
    assert found.summary["fitted"] == {} and found.tables["directions"].is_empty()
    stages = set(found.tables["excluded"]["stage"])
    assert "direction" in stages and found.summary["counts"]["followed"] == 2
    assert not found.tables["items"]["controlled"].any()  # there is no third subject


def test_relations_left_out_still_serve_as_contrasts(model: LanguageModel) -> None:
    whole = battery_of(rows("one", "two"))
    alone = whole.select(relations=["one"])
    without_others = execute(plan(model, alone, CONFIG))
    assert without_others.summary["fitted"] == {}
    found = execute(plan(model, alone, CONFIG, contrasts=whole))
    assert list(found.summary["fitted"]) == ["one"]
    assert set(found.tables["items"]["relation"]) == {"one"}


def test_a_killed_run_ends_with_the_same_bytes(model: LanguageModel, outcome: Outcome) -> None:
    planned = plan(model, battery_of(rows("one", "two", "eins")), CONFIG)
    whole = Units()
    execute(planned, units=whole)
    for most in (2, len(whole.kept) // 2, len(whole.kept) - 1):
        units = Units(most)
        with pytest.raises(KeyboardInterrupt):
            execute(planned, units=units)
        units.most = None
        again = execute(planned, units=units)
        assert list(again.tables) == list(outcome.tables)
        for name, table in outcome.tables.items():
            assert again.tables[name].equals(table), name
        assert again.summary == outcome.summary


def test_the_page_shows_every_part(outcome: Outcome, tmp_path: Any) -> None:
    page = write_follow_up(outcome, tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("1 row before the observed one", "1.0", "Mediation", "de: median gain", "s3"):
        assert words in page
    assert "https://" not in page


def test_the_page_of_nothing(model: LanguageModel, tmp_path: Any) -> None:
    entry = {"relation": "one", "subject": "x", "answer": "t39", "prompt": "t3 t41"}
    found = execute(plan(model, battery_of([entry]), CONFIG))
    assert found.summary["verdict"] == "No fact could be followed up."
    page = write_follow_up(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not answered by the model" in page


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"alphas": (0.0,)}, "not 0"),
        ({"train_share": 1.0}, "between 0 and 1"),
        ({"min_bits": float("nan")}, "min_bits"),
        ({"curve": 0}, "at least 1"),
        ({"reach": -1}, "0 or more"),
        ({"battery": BatteryConfig(lenses=("raw",))}, "add norm"),
    ),
)
def test_bad_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FollowUpConfig(**options)


def test_a_language_that_the_battery_lacks_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="no item in 'fr'; set language to one of en"):
        plan(model, battery_of(rows("one")), dataclasses.replace(CONFIG, language="fr"))
