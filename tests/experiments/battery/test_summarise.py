"""Aggregates of one item, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from layerscope.experiments.battery.summarise import items_table, with_margins
from support.planted_battery import prompts_frame

CONTROLS = {"item": pl.String, "lens": pl.String, "layer": pl.Int32}
CONTROLS |= {"p_control": pl.Float64, "p_item": pl.Float64}


def rows_frame(p_answer: dict[int, list[float]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"prompt_index": index, "lens": "norm", "layer": layer, "p_answer": value}
            for index, values in p_answer.items()
            for layer, value in enumerate(values)
        ],
        schema_overrides={"prompt_index": pl.Int32, "layer": pl.Int32},
    )


def summarised(variants: dict[str, int | None], **more: Any) -> dict[str, Any]:
    """Summarise one item of an 8-layer model, given the onset row of each variant."""
    prompts = prompts_frame(
        [{"item": "a", "variant": name, "L_semantic": row} for name, row in variants.items()]
    )
    p_answer = more.get("p_answer", {0: [0.0] * 9})
    controls = pl.DataFrame(more.get("controls", []), schema=CONTROLS)
    rows = with_margins(rows_frame(p_answer), prompts, controls)
    (found,) = items_table(prompts, rows, n_layers=8).iter_rows(named=True)
    return found


def test_shifts_are_variant_minus_plain_and_a_lost_onset_is_not_a_shift() -> None:
    found = summarised({"orig": 4, "no_filler": 3, "shift_7": 6, "comma": None})
    assert found["onset_shift_no_filler"] == -1
    assert found["onset_shift_shift_7"] == 2
    assert found["onset_shift_comma"] is None and found["onset_lost_comma"] is True
    assert found["onset_lost_no_filler"] is False
    assert found["onset_lost_colon"] is None  # was not asked


def test_asymmetry_is_positive_where_the_wrong_way_round_comes_earlier() -> None:
    found = summarised({"orig": 6, "reversed": 4, "wrong_role": 8})
    assert found["asymmetry_reversed"] == pytest.approx(2 / 8)
    assert found["asymmetry_wrong_role"] == pytest.approx(-2 / 8)


def test_dispersion_of_paraphrases() -> None:
    rows = {"p01": 2, "p02": 3, "p03": 4, "p04": 8, "p05": None}
    found = summarised({"orig": 4, **rows})
    # Sorted 2 3 4 8: quartiles at ranks 0.75 and 2.25, so 2.75 and 5.0 rows.
    assert found["paraphrases"] == 5 and found["paraphrases_with_onset"] == 4
    assert found["paraphrase_iqr"] == pytest.approx((5.0 - 2.75) / 8)
    assert found["paraphrase_range"] == pytest.approx(6 / 8)
    assert found["invariance_index"] == pytest.approx(1 - 2.25 / 8)
    assert found["paraphrase_stable"] is False
    assert found["paraphrase_onset_median"] == pytest.approx(3.5 / 8)


def test_two_onsets_say_nothing_of_the_spread() -> None:
    found = summarised({"orig": 4, "p01": 2, "p02": 3, "p03": None})
    assert found["paraphrase_iqr"] is None and found["paraphrase_stable"] is None
    assert found["paraphrases_with_onset"] == 2


def test_equal_onsets_are_stable() -> None:
    found = summarised({"orig": 4, "p01": 5, "p02": 5, "p03": 5})
    assert found["paraphrase_iqr"] == 0.0 and found["paraphrase_stable"] is True


def test_negation_margin_by_row() -> None:
    found = summarised(
        {"orig": 2, "no_filler": 2, "negated": 2},
        p_answer={0: [0.9] * 3, 1: [0.1, 0.2, 0.7], 2: [0.1, 0.3, 0.2]},
    )
    assert found["negation_margin_first_positive"] == 2
    assert found["negation_margin_max"] == pytest.approx(0.5)


def test_control_margin_at_the_onset_and_its_first_positive_row() -> None:
    controls = [
        {"item": "a", "lens": "norm", "layer": layer, "p_control": p, "p_item": q}
        for layer, (p, q) in enumerate([(0.1, 0.2), (0.3, 0.2), (0.9, 0.1)])
    ]
    found = summarised({"orig": 1}, p_answer={0: [0.0] * 3}, controls=controls)
    assert found["control_margin_first_positive"] == 1
    assert found["control_margin_at_onset"] == pytest.approx(0.1)
    assert found["control_margin_max"] == pytest.approx(0.8)
    assert summarised({"orig": None}, controls=controls)["control_margin_at_onset"] is None


def test_an_invented_item_is_described_by_its_own_variant() -> None:
    assert summarised({"novel": 7})["L_semantic"] == 7
