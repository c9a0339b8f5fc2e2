"""Lens against lens, from hand-made rows whose every figure is known."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.lens_compare import preferred_lens
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from support.compared_lenses import FACTS
from support.compared_lenses import compared_summary as summary
from support.compared_lenses import compared_table as table


def test_divergences_are_medians_over_facts_at_rows_rounded_to_even() -> None:
    found = summary()["lens_comparison"]
    assert found["depths"] == {"p25": 2, "p50": 3, "p75": 4}
    assert found["facts"] == FACTS
    assert found["kl_to_final_bits"]["tuned"] == {"p25": 3.0, "p50": 3.0, "p75": 3.0}  # 2, 3, 4
    assert found["kl_from_final_bits"]["tuned"]["p50"] == 6.0
    assert found["kl_to_final_bits"]["norm_temp"]["p50"] == 7.0
    assert list(found["kl_to_final_bits"])[:3] == ["norm_temp", "norm", "raw"]
    assert found["not_run"] == {"jacobian": {"status": "missing", "reason": "no folder"}}


def test_milestones_of_every_lens_with_the_facts_that_never_reach_them() -> None:
    made = table()
    never = pl.when((pl.col("lens") == "prism") & (pl.col("fact_index") == 0))
    rows = made.rows.with_columns(never.then(40).otherwise("answer_rank").alias("answer_rank"))
    found = summarise(LayersTable(rows, made.meta)).to_dict()["lens_comparison"]
    assert found["milestones"]["prism"]["L_semantic"]["missing"] == 1
    assert found["milestones"]["norm"]["L_semantic"]["missing"] == 0
    assert found["onset_spread"]["facts"] == FACTS


def test_how_far_apart_the_lenses_are() -> None:
    made = table(lenses=("norm", "tuned"))
    layer, tuned = pl.col("layer"), pl.col("lens") == "tuned"
    rank = pl.when(layer >= pl.when(tuned).then(2).otherwise(5)).then(1).otherwise(9)
    found = summarise(LayersTable(made.rows.with_columns(answer_rank=rank), made.meta)).to_dict()
    assert found["lens_comparison"]["onset_spread"] == {"median": 3.0, "max": 3, "facts": FACTS}
    metrics = found["tuned_lens"]["metrics"]["rank_milestones"]
    assert metrics["baseline"]["le_1"] == 5 and metrics["delta"]["le_1"] == -3


@pytest.mark.parametrize(
    ("options", "explained", "lens"),
    [
        ({}, "rotation", "tuned"),
        ({"tuned": 9.0}, "nothing", "norm"),
        ({"tuned": 5.9, "temperature": 6.0}, "calibration", "norm"),
        ({"tuned": 4.9, "bias": 5.0, "temperature": 7.5}, "bias", "tuned"),
        ({"tuned": 4.9, "temperature": None}, "bias", "norm"),
        ({"tuned": 2.0, "temperature": None}, "not_separated", "norm"),
        ({"lenses": ("norm", "tuned")}, "not_separated", "tuned"),
        ({"warnings": ("tuned does not improve on norm at 25% depth",)}, "rotation", "norm"),
    ],
)
def test_what_a_gain_is_owed_to_decides_the_lens(
    options: dict[str, Any], explained: str, lens: str
) -> None:
    found = summary(**options)
    assert found["tuned_lens"]["attribution"]["explained_by"] == explained
    assert found["preferred_lens"]["lens"] == lens
    assert found["preferred_lens"]["reason"]


def test_gains_of_each_part_and_what_is_left() -> None:
    gains = summary()["tuned_lens"]["attribution"]["gains"]["kl_to_final_bits"]["p50"]
    assert gains == {
        "tuned": 6.0, "temperature": 2.0, "bias": 3.0,
        "beyond_temperature": 4.0, "beyond_bias": 3.0, "beyond_both": 3.0,
    }  # fmt: skip
    # A temperature that only harms explains nothing: what is left is measured from the norm lens.
    worse = summary(temperature=30.0, bias=30.0)["tuned_lens"]["attribution"]["gains"]
    assert worse["kl_to_final_bits"]["p50"]["beyond_both"] == 6.0
    assert worse["kl_from_final_bits"]["p50"]["tuned"] == 12.0


def test_a_lens_that_loses_on_the_prompts_and_gains_on_its_own_text_is_said_to() -> None:
    held_out = {"norm": [9.0] * 7, "tuned": [1.0] * 7, "temperature": [5.0] * 7, "bias": [4.0] * 7}
    found = summary(tuned=9.0, held_out=held_out)
    held = found["tuned_lens"]["attribution"]["held_out"]
    assert held["p50"]["tuned"] == 8.0 and held["p50"]["beyond_both"] == 3.0
    assert "unlike that text" in found["preferred_lens"]["reason"]
    assert "unlike" not in summary(tuned=9.0)["preferred_lens"]["reason"]


def other_text(tuned: float, fitted: float | None) -> list[dict[str, Any]]:
    held_out = None if fitted is None else {"norm": [9.0] * 7, "tuned": [fitted] * 7}
    reasons = summary(tuned=tuned, held_out=held_out)["measurement_guidance"]["reasons"]
    return [entry for entry in reasons if entry["code"] == "lens_fitted_on_other_text"]


def test_a_lens_whose_text_was_unlike_the_prompts_is_a_reason_and_no_other_is() -> None:
    [reason] = other_text(9.0, 1.0)
    gains = {"on_its_text": 8.0, "on_these_prompts": -2.0}  # KL both ways of 9 + 1 and 8 + 1, twice
    assert reason["evidence"] == {"bits_gained": {"tuned": gains}, "row": 3}
    assert reason["severity"] == "low" and "by 8.00 bits" in reason["message"]
    assert not other_text(8.04, 1.0) and not other_text(9.0, 8.95)  # by chance
    # Nearer here too; no better there either; nothing known of its text.
    assert not other_text(2.0, 1.0) and not other_text(9.0, 10.0) and not other_text(9.0, None)


def test_what_was_not_run_says_so() -> None:
    found = summary(lenses=("raw", "norm"))
    assert found["tuned_lens"]["attribution"]["status"] == "skipped"
    assert found["prism_summary"] == {"status": "skipped", "reason": "the prism lens was not run"}
    assert found["preferred_lens"]["lens"] == "norm"
    alone = summary(lenses=("raw",), temperature=None)
    assert alone["preferred_lens"]["lens"] == "raw"
    assert alone["tau_norm_per_layer"]["status"] == "skipped"
    assert summary()["tau_norm_per_layer"]["values"][0] == 2.0


def test_preferring_needs_most_facts() -> None:
    made = table()
    few = pl.when((pl.col("lens") == "tuned") & (pl.col("fact_index") > 0))
    rows = made.rows.with_columns(
        few.then(pl.col("kl_to_final_bits") + 5.95)
        .otherwise("kl_to_final_bits")
        .alias("kl_to_final_bits")
    )
    found = summarise(LayersTable(rows, made.meta), MeasureConfig()).to_dict()
    attribution = found["tuned_lens"]["attribution"]
    assert attribution["facts_that_prefer_tuned"] == 1 and not attribution["prefer_tuned"]
    assert preferred_lens(attribution, made.meta, "norm")["lens"] == "norm"
