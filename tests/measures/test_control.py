from __future__ import annotations

from layerscope.measures.config import MeasureConfig
from layerscope.measures.control import control_summary
from support.hand_made import hand_made_pass

CONFIG = MeasureConfig()


def test_first_positive_margin_may_be_noise() -> None:
    part = hand_made_pass(
        control_margin=[0.0, 1e-6, 0.05, -0.1, 0.6, 0.5],
        answer_logit_gap=[None, 0.5, None, None, 0.4, 1.5],
        prompt={"prompt_id": "ctl", "answer": "Paris", "foil": "Berlin"},
    )
    result = control_summary(part, CONFIG)
    assert result["first_control_margin_pos"] == 1
    assert result["max_control_margin"] == 0.6
    assert result["first_control_strong_pos"] == 1
    assert result["max_control_top2_logit_gap"] == 1.5
    assert (result["control_margin_first"], result["control_margin_stable"]) == (2, 4)
    assert result["control_margin_lost"] == [3]
    assert (result["answer"], result["foil"]) == ("Paris", "Berlin")


def test_a_large_gap_without_a_positive_margin_is_not_strong() -> None:
    part = hand_made_pass(control_margin=[-0.2, 0.0], answer_logit_gap=[2.0, 2.0])
    result = control_summary(part, CONFIG)
    assert result["first_control_strong_pos"] is None
    assert result["control_margin_stable"] is None


def test_without_a_foil_nothing_is_known() -> None:
    result = control_summary(hand_made_pass(control_margin=[None, None]), CONFIG)
    assert result["max_control_margin"] is None
    assert result["control_margin_last_row"] is None
    assert result["first_control_margin_pos"] is None
