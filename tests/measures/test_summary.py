from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.errors import TableError
from layerscope.measures.compat import published_document
from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import with_copy_flags
from layerscope.measures.summary import summarise
from layerscope.measures.table import IDENTITY, HeadInfo, LastRowInfo, LayersTable
from support.hand_made import hand_made_table
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


def test_near_thresholds_have_names_of_their_own(table: LayersTable) -> None:
    config = MeasureConfig(kl_thresholds_bits=(0.21, 0.25), gap_thresholds=(0.21, 0.25, 1.0))
    entry = summarise(table, config).to_dict()["passes"][0]
    assert {"first_kl_below_0.21", "first_kl_below_0.25"} <= entry["milestones"].keys()
    assert list(entry["answer_margin_thresholds"]) == ["gap_ge_0.21", "gap_ge_0.25", "gap_ge_1.0"]


def test_window_looks_at_the_loosest_convergence() -> None:
    # Nothing else happens at layers 1 and 4: no echo, no answer.
    table = hand_made_table(
        {
            "norm": {"answer_rank": [50] * 6, "kl_to_final_bits": [9, 3, 3, 3, 0.4, 0.4]},
            "raw": {"answer_rank": [50] * 6},
        }
    )

    def centers(*thresholds: float) -> list[int]:
        summary = summarise(table, MeasureConfig(kl_thresholds_bits=thresholds)).to_dict()
        return summary["raw_lens_window"]["Germany→Berlin"]["center_layers"]

    assert centers(3.0, 0.5) == [1]
    assert centers(0.5) == [4]
    assert centers() == []


def test_a_wide_window_of_radius_zero_is_one() -> None:
    # The norm lens echoes at layer 1, the raw lens at layer 2; a spot check is at high risk.
    sure = {"top_probs": [[0.99, 0.0]] * 3, "top1_ignorable": [False] * 3}
    table = hand_made_table(
        {
            "norm": sure | {"top_ids": [[9], [7], [9]], "kl_norm_vs_raw_bits": [5.0] * 3},
            "raw": sure | {"top_ids": [[9], [9], [7]]},
        },
        prompt={"prompt_ids": (7,)},
    )

    def flag(radius: int) -> bool:
        config = MeasureConfig(window_radius=2, window_radius_high=radius)
        sweep = summarise(table, config).to_dict()["passes"][0]["copy_thresholds"]
        assert sweep["L_copy_strict"]["0.95"] == 1
        return sweep["norm_only_flags"]["0.95"]

    assert (flag(0), flag(1)) == (True, False)


def rows_lost(table: LayersTable, layer: int) -> LayersTable:
    """Return the table of a run that overflowed from a layer on: all that follows is null."""
    kept = [*IDENTITY, "nonfinite"]
    lost = pl.col("layer") >= layer
    rows = table.rows.with_columns(
        (lost | pl.col("nonfinite")).alias("nonfinite"),
        *(
            pl.when(~lost).then(pl.col(name)).alias(name)
            for name in table.rows.columns
            if name not in kept
        ),
    )
    nothing = HeadInfo(entropy_bits=None, top_ids=(), top_tokens=(), top_probs=())
    prompts = tuple(
        replace(
            prompt,
            head=nothing,
            last_rows=tuple(LastRowInfo(row.lens, *([None] * 8)) for row in prompt.last_rows),
        )
        for prompt in table.meta.prompts
    )
    return LayersTable(rows, replace(table.meta, prompts=prompts))


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_a_run_that_overflowed_can_be_measured_and_read_back(
    table: LayersTable, layer: int, tmp_path: Path
) -> None:
    broken = rows_lost(table, layer)
    result = summarise(with_copy_flags(broken)).to_dict()
    json.dumps(published_document(result), allow_nan=False)
    guidance = result["measurement_guidance"]
    codes = [reason["code"] for reason in guidance["reasons"]]
    assert "numeric_health_caution" in codes
    claims = {"warn_high_last_layer_kl", "answer_not_final_top1", "semantics_not_stable"}
    assert not (claims | {"control_not_separated"}) & set(codes)
    assert result["last_layer_consistency"][0]["kl_to_final_bits"] is None
    path = tmp_path / "x.parquet"
    broken.write_parquet(path)
    assert summarise(LayersTable.read_parquet(path)).to_dict() == summarise(broken).to_dict()


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
