"""The gate on the choice of norm: agreement is the same truth, not twice first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerscope.errors import TableError
from layerscope.measures.decoding_point import Decoded, decoding_point, targets_of

TOP = tuple(range(50))
FIRST = Decoded(top_ids=TOP, p_top1=0.3, answer_rank=1, p_answer=0.3)
LATER = replace(FIRST, answer_rank=3, p_answer=0.1)


def test_targets_hold_both_rows_of_a_run() -> None:
    found = targets_of({"L_semantic": 5, "L_semantic_strong_run2": 7, "first_rank_le_5": 4})
    assert found == [
        ("L_semantic", 5),
        ("L_semantic_strong_run2", 7),
        ("L_semantic_strong_run2+1", 8),
        ("first_rank_le_5", 4),
    ]


def test_a_reading_that_does_not_depend_on_the_norm() -> None:
    rows = {5: FIRST, 4: LATER}
    found = decoding_point(
        [("L_semantic", 5), ("first_rank_le_5", 4)],
        {"final": rows, "next_norm": rows},
        arch="pre_norm",
        missing={"same_norm": "no norm before the MLP"},
        preferred=("L_semantic", 5),
    )
    # At first_rank_le_5 the answer is first under neither: they agree.
    assert [entry["rank1_agree"] for entry in found["per_target"]] == [True, True]
    assert found["gate"] == {"decoding_point_consistent": True}
    assert found["tested"] and found["not_available"] == {"same_norm": "no norm before the MLP"}
    entry = found["per_target"][1]
    assert (entry["answer_rank_final"], entry["p_answer_next_norm"]) == (3, 0.1)
    assert (entry["delta_answer_rank"], entry["jaccard@50"], entry["rbo"]) == (0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("other", "consistent"),
    [
        (FIRST, True),
        (LATER, False),
        (replace(FIRST, top_ids=tuple(range(3, 53))), True),
        (replace(FIRST, top_ids=tuple(range(4, 54))), False),
    ],
)
def test_the_gate(other: Decoded, consistent: bool) -> None:
    found = decoding_point([("L_semantic", 5)], {"final": {5: FIRST}, "same_norm": {5: other}})
    assert found["gate"] == {"decoding_point_consistent": consistent}


def test_what_was_not_decoded() -> None:
    found = decoding_point([("L_semantic", 5)], {"final": {5: FIRST}, "next_norm": {}})
    assert found["per_target"][0]["status"] == "missing_residual"
    assert found["gate"] == {"decoding_point_consistent": None}
    assert not found["tested"]
    found = decoding_point([("L_semantic", 5)], {"final": {}, "next_norm": {5: FIRST}})
    assert found["per_target"][0]["status"] == "missing_baseline_logits"
    with pytest.raises(TableError, match="no choice of norm"):
        decoding_point([], {})
