"""What the page cites: rows that are right in the files, onsets as guidance has them, the audit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.reports.evidence import evidence
from layerscope.reports.files import write_run_files
from layerscope.reports.html import layers_page
from support.tables import synthetic_table

AUDIT = {
    "status": "ok",
    "gates": {"tuned_gains_on_text": False},
    "thresholds": {"rotation_bits": 0.2},
    "warnings": ["it gains nothing"],
    "prompt_index": 0,
    "flag": "low",
    "places": 145,
    "calibration_only": True,
    "rotation_vs_temperature": {"delta_kl_tuned_p50": -1.25, "delta_kl_rot_p50": None},
    "on_text": {"rotation_vs_temperature": {"delta_kl_tuned_p50": 2.0, "delta_kl_bias_p50": 0.5}},
}
SKIPPED = {"status": "skipped", "reason": "no <b>tuned</b> lens"}


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(n_layers=6, n_facts=3)


@pytest.fixture(scope="module")
def summary(table: LayersTable) -> dict[str, Any]:
    checks = {"tuned_audit": AUDIT, "skip_layers_sanity": SKIPPED}
    return summarise(table, diagnostics=checks).to_dict()


def test_a_cited_row_is_that_row_of_the_file(
    table: LayersTable, summary: dict[str, Any], tmp_path: Path
) -> None:
    write_run_files(table, summary, {}, tmp_path)
    (path,) = tmp_path.glob("*-pure-next-token.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cited = evidence(table, summary).citations
    assert {entry.milestone for entry in cited} >= {"top-1", "top-5"}
    baseline = summary["passes"][summary["baseline"]]
    for entry in cited:
        row = rows[entry.row]
        assert int(row["layer"]) == entry.layer
        assert row["answer_rank"] == entry.rank
        assert row["fact_key"] == baseline["fact_key"] and row["prompt_variant"] == "orig"


def test_onsets_are_those_of_the_guidance(table: LayersTable, summary: dict[str, Any]) -> None:
    given = summary["measurement_guidance"]["confirmed_milestones"]
    found = evidence(table, summary).onsets
    assert [entry.fact for entry in found] == [entry["fact_key"] for entry in given]
    for entry, told in zip(found, given, strict=True):
        layer = told["preferred"]["layer"]
        assert entry.layer == str(layer) and entry.depth == f"{layer / 6:.2f}"
        if told["confirmed_source"] == "raw":
            assert entry.confirmed == f"layer {told['L_semantic_confirmed']}, by raw"


def test_a_fact_without_an_onset_is_said_to_have_none(table: LayersTable) -> None:
    entry = {"fact_key": None, "prompt_index": 3, "stable": None, "preferred": None}
    guidance = {"confirmed_milestones": [entry | {"L_semantic_confirmed": None}]}
    (onset,) = evidence(table, {"passes": [], "measurement_guidance": guidance}).onsets
    assert (onset.fact, onset.milestone, onset.layer) == ("prompt 3", "never top-1", "–")
    assert (onset.depth, onset.stable, onset.confirmed) == ("–", "–", "–")


def test_figures_are_numbers_and_skipped_checks_have_none(
    table: LayersTable, summary: dict[str, Any]
) -> None:
    figures = evidence(table, summary).figures
    assert figures["skip_layers_sanity"] == ()
    assert figures["tuned_audit"] == (
        ("thresholds: rotation_bits", "0.2"),
        ("places", "145"),
        ("rotation_vs_temperature: delta_kl_tuned_p50", "-1.25"),
    )


def test_the_audit_tells_text_from_prompts(table: LayersTable, summary: dict[str, Any]) -> None:
    audit = evidence(table, summary).audit
    assert audit is not None
    assert audit.rows == (
        ("held-out text", ("+2.00", "–", "–", "+0.50")),
        ("the first fact", ("-1.25", "–", "–", "–")),
    )
    assert evidence(table, summarise(table).to_dict()).audit is None


def test_the_page_shows_all_of_it_escaped(table: LayersTable, summary: dict[str, Any]) -> None:
    page = layers_page((table, summary, {}))
    for words in ("Preferred milestones", "Rows behind the milestones", "Not checked", "+2.00"):
        assert words in page
    assert "no &lt;b&gt;tuned&lt;/b&gt; lens" in page and "no <b>tuned" not in page
