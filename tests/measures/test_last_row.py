from __future__ import annotations

from typing import Any

import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.last_row import last_row_consistency, last_row_warns
from layerscope.measures.table import HeadInfo, LastRowInfo
from support.hand_made import hand_made_table, one_pass

CONFIG = MeasureConfig()
INFO: dict[str, Any] = {
    "lens": "norm",
    "kl_to_final_bits": 0.2,
    "top1_agree": True,
    "p_top1_lens": 0.6,
    "p_top1_model": 0.5,
    "p_answer_lens": 0.6,
    "answer_rank_lens": 1,
    "temp_est": 1.5,
    "kl_after_temp_bits": 0.1,
}


@pytest.mark.parametrize(
    ("kl", "after", "warns"),
    [
        (0.25, 0.25, True),
        (0.249, 0.0, False),
        (0.25, None, True),
        (0.249, None, False),
        (0.0, -0.25, True),  # what temperature removes counts on its own
        (None, None, False),
    ],
)
def test_gate_is_inclusive(kl: float | None, after: float | None, warns: bool) -> None:
    assert last_row_warns(kl, after, CONFIG) is warns


def test_recorded_row_is_used() -> None:
    table = hand_made_table(
        {"norm": {"kl_to_final_bits": [9.0, 9.0]}},
        prompt={"last_rows": (LastRowInfo(**(INFO | {"lens": "raw"})), LastRowInfo(**INFO))},
    )
    result = last_row_consistency(one_pass(table), table.meta, CONFIG)
    assert {name: result[name] for name in INFO} == INFO
    assert result["warn_high_last_layer_kl"] is False
    assert result["gates"]["delta_kl_temp_bits"] == pytest.approx(0.1)
    assert result["cfg_transform"] == {"scale": None, "softcap": None}


def test_without_a_record_the_last_row_itself_speaks() -> None:
    table = hand_made_table(
        {
            "norm": {
                "kl_to_final_bits": [0.1, 0.7],
                "p_top1": [0.1, 0.9],
                "p_answer": [0.1, 0.8],
                "answer_rank": [7, 2],
            }
        },
        prompt={"head": HeadInfo(1.0, (5,), (" x",), (0.4,))},
    )
    result = last_row_consistency(one_pass(table), table.meta, CONFIG)
    assert (result["kl_to_final_bits"], result["answer_rank_lens"]) == (0.7, 2)
    assert (result["p_top1_lens"], result["p_top1_model"]) == (0.9, 0.4)
    assert result["warn_high_last_layer_kl"] is True
    assert result["temp_est"] is None
    assert result["gates"]["delta_kl_temp_bits"] is None


def test_a_table_that_stops_early_has_no_last_row() -> None:
    table = hand_made_table({"norm": {"kl_to_final_bits": [0.7]}}, n_layers=4)
    assert last_row_consistency(one_pass(table), table.meta, CONFIG)["kl_to_final_bits"] is None
