"""Every reason is given on a table that calls for it, and on no sound table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import polars as pl
import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.evidence import Reason
from layerscope.measures.guidance import rank, trust_of
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from support.tables import synthetic_table

N = 12
NORM, RAW = pl.col("lens") == "norm", pl.col("lens") == "raw"
LAST = pl.col("layer") == N
FACT = pl.col("prompt_id") == "pos"
CONTROL = pl.col("prompt_id") == "ctl"
ORIGINAL = pl.col("prompt_variant") == "orig"

Change = Callable[[LayersTable], LayersTable]


@cache
def sound_table() -> LayersTable:
    """Return a table that gives no reason for doubt: agreeing lenses, no echo, clear answers."""
    table = synthetic_table(n_layers=N, n_facts=5)
    onset = pl.col("layer") >= 8
    rows = table.rows.with_columns(
        pl.when(onset).then(1).otherwise(50).cast(pl.Int32).alias("answer_rank"),
        pl.when(onset).then(0.6).otherwise(0.001).alias("p_answer"),
        pl.when(onset).then(2.0).otherwise(None).alias("answer_logit_gap"),
        pl.when(CONTROL).then(pl.when(onset).then(0.5).otherwise(0.0)).alias("control_margin"),
        pl.lit(0.1).alias("kl_norm_vs_raw_bits"),
        pl.lit([0.4, 0.2]).alias("top_probs"),
    )
    return LayersTable(rows=rows, meta=table.meta)


def guidance(change: Change | None = None, config: MeasureConfig | None = None) -> dict[str, Any]:
    table = sound_table()
    summary = summarise(change(table) if change else table, config).to_dict()
    return summary["measurement_guidance"]


def codes(result: dict[str, Any]) -> list[str]:
    return [entry["code"] for entry in result["reasons"]]


def reason(code: str, change: Change) -> dict[str, Any]:
    found = {entry["code"]: entry for entry in guidance(change)["reasons"]}
    assert code in found, sorted(found)
    entry = found[code]
    assert not entry["message"][0].islower()
    assert entry["message"].endswith(".")
    assert entry["action"].endswith(".")
    return entry


def where(condition: pl.Expr, **values: Any) -> Change:
    """Return a change that sets columns where a condition holds."""

    def apply(table: LayersTable) -> LayersTable:
        columns = [
            pl.when(condition)
            .then(value if isinstance(value, pl.Expr) else pl.lit(value))
            .otherwise(pl.col(name))
            .alias(name)
            for name, value in values.items()
        ]
        return replace(table, rows=table.rows.with_columns(columns))

    return apply


def about(**values: Any) -> Change:
    return lambda table: replace(table, meta=replace(table.meta, **values))


def prompts(**values: Any) -> Change:
    """Return a change to every prompt's description."""
    return lambda table: replace(
        table,
        meta=replace(table.meta, prompts=tuple(replace(p, **values) for p in table.meta.prompts)),
    )


def test_a_sound_table_gives_no_reason() -> None:
    result = guidance()
    assert result["reasons"] == []
    assert result["trust"] == "high"
    assert (result["prefer_ranks"], result["suppress_abs_probs"]) == (False, False)
    assert result["use_confirmed_semantics"] is True
    assert result["preferred_lens_for_reporting"] == "norm"


def test_numbers_that_are_not_finite() -> None:
    early = where(NORM & (pl.col("layer") == 3), nonfinite=True)
    entry = reason("numeric_health_caution", early)
    assert entry["severity"] == "high"
    assert entry["evidence"]["layers_flagged"] == [3]
    late = where(NORM & (pl.col("layer") == 11), nonfinite=True)
    assert reason("numeric_health_caution", late)["severity"] == "medium"
    assert guidance(where(RAW, nonfinite=True))["reasons"] == []


def last_row_kl(kl: float) -> Change:
    def apply(table: LayersTable) -> LayersTable:
        changed = tuple(
            replace(p, last_rows=tuple(replace(row, kl_to_final_bits=kl) for row in p.last_rows))
            for p in table.meta.prompts
        )
        return replace(table, meta=replace(table.meta, prompts=changed))

    return apply


def test_last_row_that_is_not_the_head() -> None:
    entry = reason("warn_high_last_layer_kl", last_row_kl(0.3))
    assert (entry["severity"], entry["evidence"]["prompts"]) == ("high", 11)
    result = guidance(last_row_kl(0.3))
    assert result["trust"] == "low"
    assert (result["prefer_ranks"], result["suppress_abs_probs"]) == (True, True)
    assert reason("last_row_inexact", last_row_kl(0.011))["severity"] == "low"
    assert guidance(last_row_kl(0.01))["reasons"] == []
    assert guidance(last_row_kl(0.0007))["reasons"] == []  # rounding of a bf16 head


def test_answers_that_could_not_be_aligned() -> None:
    def some(count: int) -> Change:
        def apply(table: LayersTable) -> LayersTable:
            changed = [
                replace(p, alignment_status="inside a token") if p.prompt_index < count else p
                for p in table.meta.prompts
            ]
            return replace(table, meta=replace(table.meta, prompts=tuple(changed)))

        return apply

    entry = reason("gold_alignment_partial", some(2))
    assert entry["severity"] == "medium"
    assert entry["evidence"]["statuses"] == ["inside a token"]
    assert reason("gold_alignment_partial", some(3))["severity"] == "high"


def test_answers_that_begin_with_a_bare_space() -> None:
    def blank(facts: int, *pieces: str, variant: str = "orig") -> Change:
        def apply(table: LayersTable) -> LayersTable:
            changed = [
                replace(p, answer_pieces=pieces)
                if p.prompt_id == "pos"
                and p.prompt_variant == variant
                and p.prompt_index < 2 * facts
                else p
                for p in table.meta.prompts
            ]
            return replace(table, meta=replace(table.meta, prompts=tuple(changed)))

        return apply

    entry = reason("answer_blank_first", blank(2, "▁", "Paris"))
    assert (entry["severity"], entry["evidence"]["prompts"], entry["evidence"]["facts"]) == (
        "medium",
        2,
        2,
    )
    assert reason("answer_blank_first", blank(3, " ", "1"))["severity"] == "high"
    ablated = reason("answer_blank_first", blank(5, "Ġ", "1", variant="no_filler"))
    assert (ablated["severity"], ablated["evidence"]["facts"]) == ("medium", 0)
    half = reason("answer_blank_first", lambda table: blank(1, "▁", "x")(first_facts(2)(table)))
    assert half["severity"] == "high"
    assert guidance(blank(5, "▁"))["reasons"] == []  # the answer is that space
    assert guidance(blank(5, "▁Par", "is"))["reasons"] == []


def test_a_model_that_does_not_answer() -> None:
    def wrong(count: int) -> Change:
        def apply(table: LayersTable) -> LayersTable:
            changed = [
                replace(p, head=replace(p.head, answer_rank=4))
                if p.head is not None and p.prompt_variant == "orig" and p.prompt_index < 2 * count
                else p
                for p in table.meta.prompts
            ]
            return replace(table, meta=replace(table.meta, prompts=tuple(changed)))

        return apply

    entry = reason("answer_not_final_top1", wrong(1))
    assert (entry["severity"], entry["evidence"]["final_answer_rank"]) == (
        "medium",
        {"Germany→Berlin": 4},
    )
    assert reason("answer_not_final_top1", wrong(3))["severity"] == "high"
    half = reason("answer_not_final_top1", lambda table: wrong(1)(first_facts(2)(table)))
    assert half["severity"] == "high"


def test_without_a_recorded_head_the_last_row_says_what_the_model_answers() -> None:
    def apply(table: LayersTable) -> LayersTable:
        return where(NORM & LAST & FACT, answer_rank=2)(prompts(head=None)(table))

    assert reason("answer_not_final_top1", apply)["evidence"]["facts"] == 5


def test_onset_that_no_other_lens_sees() -> None:
    entry = reason("semantics_unconfirmed", where(RAW, answer_rank=9))
    assert (entry["severity"], entry["evidence"]["unconfirmed"]) == ("high", 5)
    one = where(RAW & (pl.col("fact_index") == 1), answer_rank=9)
    assert reason("semantics_unconfirmed", one)["severity"] == "medium"
    assert not guidance(where(RAW, answer_rank=9))["use_confirmed_semantics"]


def test_onset_row_that_only_the_norm_lens_has() -> None:
    change = where(RAW & (pl.col("layer") == 8), answer_rank=2)
    entry = reason("norm_only_semantics_window", change)
    assert (entry["severity"], entry["evidence"]["n_facts"]) == ("low", 5)
    assert codes(guidance(change)) == ["norm_only_semantics_window"]


def test_a_single_lens() -> None:
    def only(lens: str) -> Change:
        return lambda table: replace(table, rows=table.rows.filter(pl.col("lens") == lens))

    assert reason("no_second_lens", only("norm"))["severity"] == "medium"


def test_lenses_that_disagree_along_the_depth() -> None:
    half = where(NORM & (pl.col("layer") < 11), kl_norm_vs_raw_bits=2.0)
    entry = reason("high_lens_artifact_score", half)
    assert entry["severity"] == "medium"
    assert entry["evidence"]["median_score"] > 0.5
    few = where(NORM & (pl.col("layer") < 3), kl_norm_vs_raw_bits=2.0)
    assert guidance(few)["reasons"] == []
    # A score of exactly one half is the middle tier still.
    weights = MeasureConfig(score_weights=(0.5, 0.0, 0.0))
    assert guidance(where(NORM, kl_norm_vs_raw_bits=2.0), weights)["reasons"] == []


def test_shares_follow_their_threshold() -> None:
    config = MeasureConfig(raw_kl_high_bits=1.5)
    result = guidance(where(NORM, kl_norm_vs_raw_bits=2.0), config)
    (entry,) = (e for e in result["reasons"] if e["code"] == "high_lens_artifact_score")
    assert "1.5 bits or more on 100%" in entry["message"]


def test_an_answer_that_leads_near_chance() -> None:
    def weak(facts: int) -> Change:
        return where(FACT & (pl.col("fact_index") < facts) & ~LAST, p_answer=0.0065)

    entry = reason("rank_only_near_uniform", weak(3))
    assert entry["severity"] == "medium"
    assert entry["evidence"]["L_semantic"] == [8, 8, 8]
    assert entry["evidence"]["L_semantic_margin_ok"] == [12, 12, 12]
    assert reason("rank_only_near_uniform", weak(1))["severity"] == "low"
    result = guidance(weak(3))
    assert (result["prefer_ranks"], result["suppress_abs_probs"]) == (True, False)


def test_an_answer_that_is_lost_again() -> None:
    change = where(FACT & NORM & (pl.col("layer") == 9), answer_rank=2)
    entry = reason("semantics_not_stable", change)
    assert entry["severity"] == "medium"
    assert (entry["evidence"]["first"][0], entry["evidence"]["stable"][0]) == (8, 10)


def test_a_control_that_does_not_get_its_answer() -> None:
    entry = reason("control_not_separated", where(CONTROL & LAST, control_margin=0.04))
    assert (entry["severity"], entry["evidence"]["last_row_margin"]) == ("high", [0.04])
    # A foil that could not be aligned leaves the margin unknown: nothing is claimed.
    assert guidance(where(CONTROL, control_margin=pl.lit(None, pl.Float64)))["reasons"] == []


def test_no_control() -> None:
    def apply(table: LayersTable) -> LayersTable:
        kept = tuple(p for p in table.meta.prompts if p.prompt_id == "pos")
        return replace(table, meta=replace(table.meta, prompts=kept))

    assert reason("no_control", apply)["severity"] == "low"


def test_an_onset_that_depends_on_the_wording() -> None:
    ablated = FACT & ~ORIGINAL & (pl.col("fact_index") < 3)
    change = where(ablated & (pl.col("layer") >= 6), answer_rank=1)
    entry = reason("wording_sensitive", change)
    assert (entry["severity"], entry["evidence"]["tolerance"]) == ("medium", 2)
    assert entry["evidence"]["with_and_without"]["Germany→Berlin"] == [8, 6]
    assert guidance(where(ablated & (pl.col("layer") == 7), answer_rank=1))["reasons"] == []
    gone = where(FACT & ~ORIGINAL & (pl.col("fact_index") == 0), answer_rank=7)
    assert reason("wording_sensitive", gone)["severity"] == "low"


def test_facts_that_disagree() -> None:
    early = FACT & (pl.col("fact_index") < 2) & (pl.col("layer") >= 2)
    change = where(early, answer_rank=1, p_answer=0.6)
    entry = reason("onset_varies", change)
    assert entry["evidence"]["iqr"] == [2, 8]
    # A quarter of the depth (3 of 12 layers) is not wide.
    narrow = where(
        FACT & (pl.col("fact_index") < 2) & (pl.col("layer") >= 5), answer_rank=1, p_answer=0.6
    )
    assert guidance(narrow)["reasons"] == []


def first_facts(count: int) -> Change:
    def apply(table: LayersTable) -> LayersTable:
        kept = tuple(
            p for p in table.meta.prompts if p.prompt_id == "ctl" or (p.fact_index or 0) < count
        )
        return replace(table, meta=replace(table.meta, prompts=kept))

    return apply


def test_too_few_facts() -> None:
    assert reason("few_facts", first_facts(2))["evidence"] == {"facts": 2}
    assert guidance(first_facts(3))["reasons"] == []


def test_echo_of_the_prompt() -> None:
    def apply(table: LayersTable) -> LayersTable:
        word = table.meta.prompts[0].prompt_ids[0]
        first = FACT & ORIGINAL & (pl.col("layer") == 0)
        return where(first, top_ids=pl.lit([word, 1]), top_probs=pl.lit([0.99, 0.0]))(table)

    entry = reason("prompt_echo", apply)
    assert (entry["severity"], entry["evidence"]["L_copy"]) == ("low", [0] * 5)


def test_residual_that_jumps() -> None:
    change = where(pl.col("layer") >= 5, resid_norm=pl.col("resid_norm") * 50)
    assert reason("normalization_spike", change)["evidence"]["layers"] == [5]


def test_next_norm_is_named() -> None:
    entry = reason("norm_choice_next_norm", about(norm_choice="next_norm"))
    assert entry["severity"] == "low"
    assert guidance(about(norm_choice="next_norm"))["suppress_abs_probs"] is True


@pytest.mark.parametrize(
    ("severities", "trust"),
    [((), "high"), (("low",), "high"), (("low", "medium"), "medium"), (("medium", "high"), "low")],
)
def test_trust_follows_the_severest(severities: tuple[Any, ...], trust: str) -> None:
    reasons = [Reason(f"code {s}", s, "Text.", {}, "Act.") for s in severities]
    assert trust_of(reasons) == trust


def test_reasons_are_ranked() -> None:
    change = where(FACT & NORM & (pl.col("layer") == 9), answer_rank=2)
    table = last_row_kl(0.3)(change(about(norm_choice="next_norm")(sound_table())))
    found = summarise(table).to_dict()["measurement_guidance"]["reasons"]
    assert [entry["severity"] for entry in found] == ["high", "medium", "low"]
    assert rank([]) == []
