"""What the page is made of: visible tokens, numbers, marks, sentences, companions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from layerscope.measures.table import LayersTable
from layerscope.reports.curves import marks
from layerscope.reports.data import family, kind, model_data, title
from layerscope.reports.grid import MAX_POSITIONS, grid_payload
from layerscope.reports.sections import find, milestone_cell, model_sections
from layerscope.reports.strings import StringTable
from layerscope.reports.text import json_block, number, rounded, visible
from layerscope.reports.verdict import advice, milestones_of, reading, reasons, trust
from support.summaries import many_passes, small_summary
from support.tables import synthetic_table


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(n_layers=6, n_facts=2)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Berlin", "·Berlin"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("", "∅"),
        (None, "∅"),
        ("\u200f", "‹U+200F›"),
        ("a\u2028b", "a‹U+2028›b"),
        ("\u00a0in", "‹U+00A0›in"),
        ("\x00", "‹U+0000›"),
        ("\ud800", "‹U+D800›"),
        ("東京", "東京"),
        ("<b>", "<b>"),
    ],
)
def test_every_token_can_be_seen(token: str | None, shown: str) -> None:
    assert visible(token) == shown


def test_prompts_keep_their_spaces() -> None:
    assert visible("a b\nc", keep_spaces=True) == "a b↵c"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (0.123456, 0.1235),
        (123456.0, 123500),
        (3.0, 3),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        (1.23456e-7, 1.235e-7),
    ],
)
def test_numbers_are_rounded_to_four_digits(value: float | None, kept: float | None) -> None:
    assert rounded(value) == kept


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (128256, "128,256"),
        (0.5813953, "0.581"),
        (7.8e-6, "7.80e-06"),
        (float("nan"), "not finite"),
        (1234.5, "1,234"),
        (0.0, "0"),
        ("next_norm", "next_norm"),
    ],
)
def test_numbers_are_written_for_reading(value: Any, text: str) -> None:
    assert number(value) == text


def test_json_block_cannot_end_a_script_and_reads_back() -> None:
    value = {"a": "</script><!--&\u2028\u2029"}
    block = json_block(value)
    assert not set("<>&\u2028\u2029") & set(block)
    assert json.loads(block) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        json_block({"a": float("nan")})


def test_marks_follow_the_reading_order_and_skip_what_was_not_reached() -> None:
    found = milestones_of(
        {
            "milestones": {
                "L_copy": {"first": 0, "stable": None},
                "first_kl_below_0.5": {"first": 6, "stable": 6},
                "L_semantic": {"first": 4, "stable": None},
                "L_semantic_strong": {"first": None, "stable": None},
            },
            "L_semantic_confirmed": 4,
        }
    )
    assert marks(found) == [
        ["L_semantic", 4, None],
        ["L_semantic_confirmed", 4, 4],
        ["first_kl_below_0.5", 6, 6],
        ["L_copy", 0, 0],  # an echo is not expected to last
    ]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (None, "–"),
        ({"first": None, "stable": None}, "–"),
        ({"first": 3}, "3"),
        ({"first": 3, "stable": 3}, "3"),
        ({"first": 3, "stable": 5}, "3 → 5"),
        ({"first": 3, "stable": None}, "3 ✕"),
    ],
)
def test_milestone_cells(entry: dict[str, Any] | None, text: str) -> None:
    assert milestone_cell(entry)[0] == text


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            {"first": 4, "stable": 4},
            "“Berlin” becomes the top prediction at layer 4 of 6 and stays",
        ),
        ({"first": 3, "stable": 5}, "is lost again, and stays only from layer 5"),
        ({"first": 3, "stable": None}, "the model's last layer prefers another token"),
        ({"first": None, "stable": None}, "never becomes the top prediction"),
        ({"first": 6, "stable": 6}, "only at the last layer, 6"),
    ],
)
def test_verdict_sentence(table: LayersTable, found: dict[str, Any], sentence: str) -> None:
    summary = {
        "n_layers": 6,
        "baseline": 0,
        "passes": [{"prompt_index": 0, "lens": "norm", "milestones": {"L_semantic": found}}],
    }
    assert sentence in reading(summary, table.meta.prompts[0])


def test_verdict_without_an_aligned_answer(table: LayersTable) -> None:
    prompt = replace(table.meta.prompts[0], alignment_status="answer starts inside a token")
    said = reading(small_summary(table), prompt)
    assert "answer starts inside a token" in said


def test_trust_names_the_first_reason(table: LayersTable) -> None:
    summary = small_summary(table)
    assert trust(summary) == (
        "medium",
        "In 1 layer only the norm lens puts the answer on top. (1 more below.)",
    )
    summary["measurement_guidance"]["reasons"] = []
    assert trust(summary)[1] == "No check found a reason for doubt."
    assert trust({})[0] is None
    assert "Report ranks and thresholds." in advice(summary)


def test_evidence_of_any_shape_is_written() -> None:
    evidence = {"rows": list(range(12)), "by fact": {"a": 1, "b": None}, "share": 0.12345}
    summary = {"measurement_guidance": {"reasons": [{"code": "x", "evidence": evidence}]}}
    assert reasons(summary)[0].evidence == (
        ("rows", "0, 1, 2, 3, 4, 5, 6, 7, … (12 in all)"),
        ("by fact", "a 1, b –"),
        ("share", "0.123"),
    )


def test_each_fact_has_its_own_control_when_it_was_given_one(table: LayersTable) -> None:
    fact, ablation, *_, control = table.meta.prompts
    own = replace(control, prompt_index=9, fact_key=fact.fact_key)
    prompts = [fact, ablation, control, own]
    assert family(fact, prompts) == {"ablation": 1, "control": 9}
    assert family(own, prompts) == {"fact": 0, "ablation": 1}
    assert [kind(entry) for entry in prompts] == ["fact", "ablation", "control", "control"]
    assert title(own) == "control · Germany→Berlin"


def test_a_long_prompt_shows_its_last_positions(table: LayersTable) -> None:
    import polars as pl

    rows = table.rows.filter((pl.col("prompt_index") == 0) & (pl.col("lens") == "norm"))
    one = rows.filter(pl.col("pos") == 0)
    long = pl.concat(
        [one.with_columns(pl.lit(i, pl.Int32()).alias("pos")) for i in range(MAX_POSITIONS + 5)]
    )
    grid = grid_payload(long, StringTable(), top_k=2)
    assert grid["hidden"] == 5
    assert grid["pos"][0] == 5
    assert len(grid["h"]) == MAX_POSITIONS * 7


def test_cells_that_were_not_decoded_are_null(table: LayersTable) -> None:
    import polars as pl

    rows = table.rows.filter((pl.col("prompt_index") == 0) & (pl.col("lens") == "norm"))
    holed = rows.filter(~((pl.col("layer") == 0) & (pl.col("pos") == 0)))
    grid = grid_payload(holed, StringTable(), top_k=2)
    assert grid["t"][:2] == [-1, -1]
    assert grid["h"][0] is None


def test_budget_first_takes_tokens_then_grids_then_prompts() -> None:
    table = many_passes(synthetic_table(n_layers=6, n_facts=1), 20)
    summary = small_summary(table)

    def built(budget: int) -> tuple[int, int, int]:
        data = model_data(table, summary, budget_bytes=budget)
        passes = data.payload["passes"]
        grids = [entry["lenses"]["norm"].get("grid") for entry in passes]
        drawn = [grid for grid in grids if grid]
        assert len(json_block(data.payload).encode()) < 1.15 * budget
        assert bool(data.omitted) == (len(drawn) < 20)
        return len(passes), len(drawn), drawn[0]["k"] if drawn else 0

    assert built(1_000_000) == (20, 20, 10)
    passes, drawn, top_k = built(220_000)
    assert (passes, drawn) == (20, 20)
    assert top_k < 10
    passes, drawn, _ = built(90_000)
    assert passes == 20
    assert 0 < drawn < 20
    assert built(30_000)[0] < 20


def test_provenance_is_searched_shallow_first() -> None:
    tree = {"model": {"dtype": "bfloat16", "inner": {"device": "cpu"}}, "date": "2026-01-02"}
    assert find(tree, ("dtype",)) == "bfloat16"
    assert find(tree, ("device",)) == "cpu"
    assert find(tree, ("absent",)) is None


def test_header_names_device_dtype_and_date(table: LayersTable) -> None:
    sections = model_sections(
        table,
        small_summary(table),
        {"dtype": "bfloat16", "finished_at": "2026-11-21T06:30:00.5+00:00"},
    )
    chips = dict(sections.chips)
    assert chips["dtype"] == "bfloat16"
    assert chips["device"] == "cpu"  # of the table, where the run says nothing
    assert chips["run"] == "2026-11-21 06:30 UTC"
    assert chips["prompts"] == "5 (2 facts)"
    assert sections.facts[0].name == "Germany→Berlin"
