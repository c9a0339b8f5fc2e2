"""Every reason for doubt on figures made to give it, and none on sound ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

import layerscope
from layerscope.experiments.battery import BatteryConfig, execute, plan
from layerscope.experiments.battery.decode import kernels_for
from layerscope.experiments.battery.guidance import guidance
from layerscope.experiments.battery.milestones import _gaps
from layerscope.measures.detectors import percentile
from support.planted_battery import battery
from support.tiny_models import tiny, tiny_tokenizer

SOUND: dict[str, Any] = {
    "lenses": ["raw", "norm"],
    "languages": [{"language": "en", "alignment_rate": 0.98}],
    "by_lens": {
        "norm": {
            "items": 100,
            "nonfinite_items": 0,
            "shares": {
                "answer_first_in_model": {"share": 0.95},
                "reached": {"share": 0.97},
                "paraphrase_stable": {"share": 0.8},
                "first_token_shared": {"share": 0.01},
                "onset_lost_comma": {"share": 0.05},
            },
            "tiers": {"low": 80, "high": 20},
            "confirmed_by": {"raw": 90, "none": 7},
            "permuted_rank_le_10_at_onset": {"share": 0.1, "low": 0.05, "chance": 0.003},
        }
    },
}
MARGINS = {"control_margin_max": 0.6, "negation_margin_max": 0.3}
Change = Callable[[dict[str, Any]], Any]


def told(change: Change | None = None, onset: int | None = 4, **margins: float) -> dict[str, str]:
    summary = copy.deepcopy(SOUND)
    if change is not None:
        change(summary)
    items = pl.DataFrame(
        {"lens": ["norm"], "invented": [False], "L_semantic": [onset]} | MARGINS | margins
    )
    found = guidance(summary, items)
    return {entry["code"]: entry["severity"] for entry in found["reasons"]}


def norm(**values: Any) -> Change:
    return lambda summary: summary["by_lens"]["norm"].update(values)


def share(name: str, value: float) -> Change:
    return lambda summary: summary["by_lens"]["norm"]["shares"].update({name: {"share": value}})


def test_sound_figures_give_no_reason() -> None:
    assert told() == {}


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        (norm(nonfinite_items=1), "numeric_health_caution", "high"),
        (share("answer_first_in_model", 0.7), "answer_not_final_top1", "medium"),
        (share("answer_first_in_model", 0.3), "answer_not_final_top1", "high"),
        (share("reached", 0.4), "onset_of_the_few", "medium"),
        (norm(tiers={"low": 40, "high": 60}), "high_lens_artifact_score", "medium"),
        (norm(confirmed_by={"raw": 40, "none": 57}), "semantics_unconfirmed", "medium"),
        (norm(confirmed_by={"none": 97}), "semantics_unconfirmed", "high"),
        (share("paraphrase_stable", 0.4), "wording_sensitive", "medium"),
        (share("onset_lost_comma", 0.3), "onset_lost_by_form", "low"),
        (share("onset_lost_comma", 0.6), "onset_lost_by_form", "medium"),
        (share("first_token_shared", 0.3), "first_token_shared", "low"),
        (norm(items=12), "few_facts", "low"),
        (
            norm(permuted_rank_le_10_at_onset={"share": 0.6, "low": 0.5, "chance": 0.003}),
            "other_answers_close",
            "low",
        ),
        (
            lambda summary: summary["languages"][0].update(alignment_rate=0.7),
            "gold_alignment_partial",
            "medium",
        ),
        (
            lambda summary: (
                summary.update(lenses=["norm"]) or norm(confirmed_by={})(summary)  # type: ignore[func-returns-value]
            ),
            "no_second_lens",
            "medium",
        ),
    ],
)
def test_each_figure_gives_its_reason_and_no_other(
    change: Change, code: str, severity: str
) -> None:
    assert told(change) == {code: severity}


def test_margins_that_no_fact_keeps_are_reasons() -> None:
    assert told(control_margin_max=0.01) == {"control_not_separated": "high"}
    assert told(negation_margin_max=0.01) == {"negation_ignored": "low"}
    # An answer that never comes up cannot be taken back.
    assert told(onset=None, negation_margin_max=0.01) == {}


def test_the_pack_cites_the_rows_that_hold_its_figures() -> None:
    model = layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())
    found = execute(plan(model, battery(), BatteryConfig(resamples=50)))
    pack, tables = found.summary["evaluation_pack"], found.tables
    assert (
        pack["lens"] == "norm" and pack["trust"] == found.summary["measurement_guidance"]["trust"]
    )
    for name, row in pack["citations"]["rollup"].items():
        cited = tables["rollup"].row(row, named=True)
        assert (cited["lens"], cited["by"], cited["measure"]) == ("norm", "all", name)
        assert cited["median"] == pack["figures"][name]["median"]
    for entry in pack["citations"]["items"]:
        item = tables["items"].row(entry["items_row"], named=True)
        at = tables["rows"].row(entry["rows_row"], named=True)
        assert item["item"] == at["item"] == entry["item"] and at["lens"] == "norm"
        assert item["L_semantic"] == at["layer"] == entry["L_semantic"]
        assert at["answer_rank"] == 1 and at["variant"] == "orig"


def test_quartiles_of_many_questions_are_those_of_each() -> None:
    values = np.random.default_rng(0).normal(size=(7, 9))
    values[1, 4:], values[2], values[3, 0] = np.nan, np.nan, np.nan
    found = _gaps(values.ravel(), values.shape)
    for q in (0.25, 0.5, 0.75):
        each = [percentile(row, q) for row in values]
        wanted = [np.nan if value is None else value for value in each]
        np.testing.assert_array_equal(found[f"entropy_gap_bits_p{round(100 * q)}"], wanted)


def test_compiled_passes_are_for_large_batteries_alone() -> None:
    model = layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())
    assert kernels_for(5, model, n_lenses=2) == "plain"
    assert kernels_for(10**9, model, n_lenses=2) in ("plain", "fused")
