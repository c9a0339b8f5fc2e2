"""Failed checks of the model become reasons; every listed gate, both ways."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from layerscope.measures import guidance_diagnostics, guidance_lenses
from layerscope.measures.guidance import RANK
from layerscope.measures.guidance_diagnostics import (
    GATES,
    OTHER_LENS_NOT_FINITE,
    gates_of,
    preferred_lens,
)
from layerscope.measures.summary import summarise
from measures.test_guidance import codes, sound_table


def guidance(diagnostics: dict[str, Any]) -> dict[str, Any]:
    return summarise(sound_table(), diagnostics=diagnostics).to_dict()["measurement_guidance"]


def section(gate: str, holds: bool | None) -> dict[str, Any]:
    return {
        "status": "ok",
        "gates": {gate: holds},
        "thresholds": {"limit": 0.5},
        "warnings": ["row 3 does something"],
        "measured": 0.25,
        "per_row": [1, 2],
    }


NAMED = {"finite": "finite.norm", "last_row_exact": "last_row_exact.tuned"}


@pytest.mark.parametrize(("name", "gate"), GATES)
def test_every_gate_gives_its_reason_when_it_fails_and_only_then(name: str, gate: str) -> None:
    meaning, full = GATES[name, gate], NAMED.get(gate, gate)
    assert guidance({name: section(full, True)})["reasons"] == []
    result = guidance({name: section(full, False)})
    [reason] = result["reasons"]
    assert (reason["code"], reason["severity"]) == (meaning.code, meaning.severity)
    assert reason["evidence"] == {
        "gates": [full],
        "measured": 0.25,
        "thresholds": {"limit": 0.5},
        "warnings": ["row 3 does something"],
    }
    assert reason["message"].endswith(".") and reason["action"].endswith(".")
    assert reason["message"][0].isupper()
    assert result["trust"] == {"high": "low", "medium": "medium", "low": "high"}[meaning.severity]
    undecided = guidance({name: section(full, None)})
    assert undecided["reasons"] == []
    assert undecided["not_checked"] == {f"{name}: {full}": "could not be decided"}


def test_the_numbers_of_a_failed_check_are_those_of_a_prompt_that_fails() -> None:
    gate = "position_window_stable"
    passes = [
        {"fact_key": key, "prompt_index": n, "rank1_frac": share, "gate": {gate: share >= 0.5}}
        for n, (key, share) in enumerate([("one", 0.9), ("two", 0.25), ("three", 0.4)])
    ]
    found = {**section(gate, False), **passes[0], "passes": passes, "rank1_frac": 0.9}
    [reason] = guidance({"position_window": found})["reasons"]
    assert reason["evidence"]["rank1_frac"] == 0.25
    assert reason["evidence"]["prompts_that_fail"] == "2 of 3"
    assert reason["evidence"]["first"] == "two"


def test_a_gate_that_no_one_listed_is_not_silent() -> None:
    result = guidance({"new_check": section("odd_thing.norm", False)})
    [reason] = result["reasons"]
    assert (reason["code"], reason["severity"]) == ("odd_thing", "medium")
    assert "'odd thing: norm' of new check failed" in reason["message"]


def test_gates_of_one_meaning_are_one_reason() -> None:
    both = section("repeatable.precision", False)
    both["gates"] |= {"repeatable.attention": False, "repeatable.padded_batch": True}
    [reason] = guidance({"repeatability": both})["reasons"]
    assert reason["evidence"]["gates"] == ["repeatable.precision", "repeatable.attention"]


def test_the_most_severe_of_equal_codes_is_kept() -> None:
    mask = section("answers_not_masked", False)
    mask["gates"]["rows_judged_by_this_mask"] = False
    assert codes(guidance({"copy_mask": mask})) == ["copy_mask_error"]


def test_reasons_come_by_severity() -> None:
    result = guidance(
        {
            "position_window": section("position_window_stable", False),
            "repeatability_forward": section("repeatability_forward_pass", False),
            "decoding_point": section("decoding_point_consistent", False),
        }
    )
    ranks = [RANK[reason["severity"]] for reason in result["reasons"]]
    assert ranks == sorted(ranks) == [0, 1, 2]


def test_nan_under_another_lens_weighs_less() -> None:
    [reason] = guidance({"numeric_health": section("finite.raw", False)})["reasons"]
    assert (reason["code"], reason["severity"]) == ("numeric_health_other_lens", "low")


def test_what_was_not_checked_is_listed() -> None:
    assert guidance({})["not_checked"] == {"diagnostics": "the model was not looked at again"}
    skipped = {"status": "skipped", "reason": "no tuned lens"}
    result = guidance({"tuned_audit": skipped, "layer_map": section("rows_are_the_models", True)})
    assert result["not_checked"] == {"tuned_audit": "no tuned lens"}
    assert result["reasons"] == []


def test_both_spellings_of_gates_are_read() -> None:
    assert gates_of({"gate": {"a": True}, "gates": {"b": False}}) == {"a": True, "b": False}
    assert gates_of({"gate": True}) == {}
    [reason] = guidance({"decoding_point": {"gate": {"decoding_point_consistent": False}}})[
        "reasons"
    ]
    assert reason["code"] == "decoding_point_sensitive"


def test_an_audit_without_gates_speaks_by_its_flags() -> None:
    audit = {"status": "ok", "tuned_is_calibration_only": True, "rotation_vs_temperature": {"x": 1}}
    [reason] = guidance({"tuned_audit": audit})["reasons"]
    assert (reason["code"], reason["evidence"]) == ("tuned_is_calibration_only", {"x": 1})
    assert guidance({"tuned_audit": audit | {"tuned_is_calibration_only": False}})["reasons"] == []
    skips = {
        "status": "ok",
        "tuned_lens_regression": True,
        "tuned_lens_skip_warning": 0.31,
        "m=2": 0.31,
    }
    [reason] = guidance({"skip_layers_sanity": skips})["reasons"]
    assert reason["code"] == "tuned_lens_no_stand_in" and "31%" in reason["message"]
    # Without a fitted lens the figures are the norm lens's.
    assert guidance({"skip_layers_sanity": skips | {"lens": "norm"}})["reasons"] == []


TUNED = {"lens": "tuned", "hint": "tuned", "reason": "nearer"}


@pytest.mark.parametrize(
    ("diagnostics", "lens", "hint"),
    [
        ({}, "tuned", "tuned"),
        ({"tuned_audit": section("tuned_gains_on_text", True)}, "tuned", "tuned"),
        ({"tuned_audit": section("tuned_gains_on_text", False)}, "norm", "norm"),
        ({"tuned_audit": section("tuned_last_row_is_head", False)}, "norm", "norm"),
        (
            {"tuned_audit": section("tuned_is_more_than_calibration", False)},
            "norm",
            "tuned_for_calibration_only",
        ),
        (
            {"tuned_audit": {"status": "ok", "tuned_is_calibration_only": True}},
            "norm",
            "tuned_for_calibration_only",
        ),
        ({"skip_layers_sanity": section("no_worse_than_norm.tuned", False)}, "norm", "norm"),
        ({"skip_layers_sanity": section("no_worse_than_norm.prism", False)}, "tuned", "tuned"),
        ({"tuned_audit": {"status": "skipped", "reason": "x"}}, "tuned", "tuned"),
    ],
)
def test_which_lens_to_report(diagnostics: dict[str, Any], lens: str, hint: str) -> None:
    sections = {"primary_lens": "norm", "preferred_lens": TUNED, "diagnostics": diagnostics}
    found = preferred_lens(sections)
    assert (found["lens"], found["hint"]) == (lens, hint)
    assert preferred_lens({"primary_lens": "raw"})["lens"] == "raw"
    kept = {"lens": "norm", "hint": "norm", "reason": "not nearer"}
    assert preferred_lens(sections | {"preferred_lens": kept}) == kept


def test_the_onset_to_quote() -> None:
    [first, *rest] = guidance({})["confirmed_milestones"]
    assert first == {
        "fact_key": "Germany→Berlin",
        "prompt_index": 0,
        "L_semantic": 8,
        "stable": 8,
        "L_semantic_confirmed": 8,
        "confirmed_source": "raw",
        "preferred": {"name": "L_semantic_strong_run2", "layer": 8},
    }
    assert len(rest) == 4


def test_every_code_is_defined() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "definitions.md"
    text = page.read_text("utf-8").split("| Code from a check |")[1].split("\n\n")[0]
    written = set(re.findall(r"`(\w+)`", text))
    known = {gate.code for gate in GATES.values()} | {OTHER_LENS_NOT_FINITE.code}
    for module in (guidance_diagnostics, guidance_lenses):
        known |= set(re.findall(r'Reason\(\s*"(\w+)"', inspect.getsource(module)))
    sections = {name for name, _ in GATES}
    assert written - sections == known
