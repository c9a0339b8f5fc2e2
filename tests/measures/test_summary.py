from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.summary import finite, summarise
from layerscope.measures.table import LayersTable
from support.tables import synthetic_table


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table()


@pytest.fixture(scope="module")
def summary(table: LayersTable) -> dict[str, Any]:
    return summarise(table).to_dict()


def test_is_json_without_nan(summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_one_entry_per_pass_and_lens(summary: dict[str, Any]) -> None:
    keys = [(entry["prompt_index"], entry["lens"]) for entry in summary["passes"]]
    assert sorted(keys) == sorted((i, lens) for i in range(5) for lens in ("norm", "raw"))


def test_baseline_is_the_first_fact_through_the_norm_lens(summary: dict[str, Any]) -> None:
    base = summary["passes"][summary["baseline"]]
    assert (base["fact_key"], base["prompt_variant"], base["lens"]) == (
        "Germany→Berlin",
        "orig",
        "norm",
    )
    assert base["confirmed_semantics"] == summary["confirmed_semantics"]["Germany→Berlin"]


def test_milestones_agree_with_the_fields(summary: dict[str, Any]) -> None:
    for entry in summary["passes"]:
        for name in ("L_copy", "L_copy_H", "L_semantic", "first_rank_le_5", "L_geom"):
            assert entry["milestones"][name]["first"] == entry[name]
        run2 = entry["semantic_gate"]["L_semantic_run2"]
        assert entry["milestones"]["L_semantic_run2"]["first"] == run2


def test_checks_are_per_fact(summary: dict[str, Any]) -> None:
    facts = ["Germany→Berlin", "France→Paris"]
    for name in ("confirmed_semantics", "raw_lens_check", "raw_lens_window", "raw_lens_full"):
        assert list(summary[name]) == facts, name
    assert list(summary["ablation_summary"]) == facts
    assert [fact["fact_key"] for fact in summary["micro_suite"]["facts"]] == facts
    assert len(summary["last_layer_consistency"]) == 5


def test_cited_rows_are_those_of_the_norm_table(
    table: LayersTable, summary: dict[str, Any]
) -> None:
    exported = table.last(lens="norm")
    for fact in summary["micro_suite"]["facts"]:
        row = exported.row(fact["row_index"], named=True)
        assert row["fact_key"] == fact["fact_key"]
        assert row["prompt_variant"] == "orig"
        assert row["layer"] == fact["L_semantic_norm"]


def test_preferred_milestone_is_the_most_demanding(summary: dict[str, Any]) -> None:
    base = summary["passes"][summary["baseline"]]
    strong = base["semantic_gate"]["L_semantic_strong_run2"]
    assert strong is not None
    assert base["preferred_milestone"] == {"name": "L_semantic_strong_run2", "layer": strong}


def test_thresholds_travel_with_the_summary(table: LayersTable) -> None:
    config = MeasureConfig(kl_thresholds_bits=(2.5,), rank_thresholds=(3,), surface_delta=0.5)
    entry = summarise(table, config).to_dict()
    assert entry["config"] == config.to_dict()
    base = entry["passes"][entry["baseline"]]
    assert "first_kl_below_2.5" in base
    assert "first_rank_le_3" in base
    assert base["surface_delta_norm"] == 0.5


def test_summary_does_not_change_the_table(table: LayersTable) -> None:
    before = table.rows.clone()
    summarise(table)
    assert table.rows.equals(before)


def test_order_of_rows_does_not_matter(table: LayersTable, summary: dict[str, Any]) -> None:
    shuffled = LayersTable(table.rows.sample(fraction=1, shuffle=True, seed=3), table.meta)
    found = summarise(shuffled).to_dict()

    def ordered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(entries, key=lambda entry: (entry["prompt_index"], entry["lens"]))

    assert ordered(found["passes"]) == ordered(summary["passes"])
    assert found["measurement_guidance"] == summary["measurement_guidance"]


def test_a_lens_of_another_name_alone(table: LayersTable) -> None:
    rows = table.rows.filter(pl.col("lens") == "raw")
    result = summarise(LayersTable(rows, table.meta)).to_dict()
    assert result["primary_lens"] == "raw"
    assert result["raw_lens_full"] == {}
    assert result["passes"][result["baseline"]]["lens"] == "raw"


def test_only_a_control(table: LayersTable) -> None:
    meta = replace(table.meta, prompts=table.meta.prompts[-1:])
    result = summarise(LayersTable(table.rows, meta)).to_dict()
    assert result["micro_suite"]["aggregates"]["n"] == 0
    assert result["control_summary"]["prompt_index"] == 4
    assert result["passes"][result["baseline"]]["prompt_id"] == "ctl"


def test_several_controls(table: LayersTable) -> None:
    last = table.meta.prompts[-1]
    more = replace(last, prompt_index=5, fact_key="France→Paris", fact_index=1)
    again = table.rows.filter(pl.col("prompt_index") == 4).with_columns(
        pl.lit(5, pl.Int32).alias("prompt_index")
    )
    both = LayersTable(
        pl.concat([table.rows, again]), replace(table.meta, prompts=(*table.meta.prompts, more))
    )
    controls = summarise(both).to_dict()["control_summary"]
    assert controls["fact_key"] is None
    assert [entry["fact_key"] for entry in controls["controls"]] == [None, "France→Paris"]


def test_unaligned_prompts_are_listed(table: LayersTable) -> None:
    first = replace(table.meta.prompts[0], alignment_status="unresolved")
    meta = replace(table.meta, prompts=(first, *table.meta.prompts[1:]))
    gold = summarise(LayersTable(table.rows, meta)).to_dict()["gold_alignment"]
    assert gold["rate"] == 0.8
    assert [entry["status"] for entry in gold["partial"]] == ["unresolved"]


def test_nothing_to_measure(table: LayersTable) -> None:
    with pytest.raises(TableError, match="nothing to measure"):
        summarise(LayersTable(table.rows.clear(), table.meta))
    with pytest.raises(TableError, match="nothing to measure"):
        summarise(LayersTable(table.rows, replace(table.meta, prompts=())))


def test_values_that_are_not_numbers_do_not_spread(table: LayersTable) -> None:
    broken = pl.when(pl.col("layer") == 2).then(float("nan"))
    rows = table.rows.with_columns(
        broken.otherwise(pl.col(name)).alias(name)
        for name in ("entropy_bits", "kl_to_final_bits", "p_answer", "resid_norm", "cos_to_final")
    )
    json.dumps(summarise(LayersTable(rows, table.meta)).to_dict(), allow_nan=False)


def test_finite() -> None:
    value = {"a": float("nan"), 1: (1.5, float("inf")), "c": [None, {"d": float("-inf")}]}
    assert finite(value) == {"a": None, "1": [1.5, None], "c": [None, {"d": None}]}
