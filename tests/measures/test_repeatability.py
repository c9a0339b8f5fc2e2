"""A reading that survives another arithmetic passes, one that does not fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.repeatability import Reading, repeatability, repeatability_forward

TOP = {8: tuple(range(10)), 9: tuple(range(10))}
REFERENCE = Reading(
    condition="float32",
    milestone="L_semantic_strong",
    layer=8,
    top_ids=TOP,
    reference_top1_ranks=(1,) * 13,
    p_answer=0.6,
)
SAME = replace(REFERENCE, condition="bfloat16", p_answer=0.59)


def test_a_reading_that_repeats() -> None:
    found = repeatability([SAME])
    assert (found["max_rank_dev"], found["p95_rank_dev"], found["top1_flip_rate"]) == (0, 0, 0)
    assert (found["flag"], found["layers_checked"]) == ("ok", 13)
    forward = repeatability_forward(REFERENCE, [SAME, replace(SAME, layer=9)])
    assert forward["gate"] == {"repeatability_forward_pass": True}
    assert forward["milestones"]["delta_layers"] == 1
    assert forward["conditions"][0]["delta_p_answer"] == pytest.approx(-0.01)


def test_first_tokens_that_move() -> None:
    far = replace(SAME, reference_top1_ranks=(1,) * 100 + (8,))
    found = repeatability([SAME, far])
    assert (found["flag"], found["max_rank_dev"]) == ("repeatability_variance_high", 7.0)
    assert [entry["flag"] for entry in found["conditions"]] == [
        "ok",
        "repeatability_variance_high",
    ]
    near = replace(SAME, reference_top1_ranks=(1,) * 98 + (2, 2))
    assert repeatability([near])["flag"] == "ok"
    assert repeatability([near])["p95_rank_dev"] == 0.0
    flipping = replace(SAME, reference_top1_ranks=(1,) * 97 + (2, 2, 2))
    assert repeatability([flipping])["flag"] == "repeatability_variance_high"
    patient = MeasureConfig(repeat_flip_rate=0.05)
    assert repeatability([flipping], patient)["flag"] == "ok"


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 10},
        {"milestone": "L_semantic"},
        {"milestone": None, "layer": None},
        {"top_ids": {8: tuple(range(4)) + tuple(range(20, 26))}},
    ],
)
def test_a_milestone_that_does_not_survive(change: dict[str, object]) -> None:
    bad = replace(SAME, **change)  # type: ignore[arg-type]
    found = repeatability_forward(REFERENCE, [SAME, bad])
    assert found["gate"] == {"repeatability_forward_pass": False}
    assert [entry["pass"] for entry in found["conditions"]] == [True, False]
    assert found["milestones"]["pass2"]["layer"] == bad.layer


def test_no_milestone_and_no_repeat() -> None:
    nothing = replace(REFERENCE, milestone=None, layer=None)
    assert repeatability_forward(nothing, [SAME])["gate"] == {"repeatability_forward_pass": None}
    for call in (lambda: repeatability([]), lambda: repeatability_forward(REFERENCE, [])):
        with pytest.raises(TableError, match="nothing was repeated"):
            call()
