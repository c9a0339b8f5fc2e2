"""Agreement of two lenses at the milestones, and the flag on the onset family."""

from __future__ import annotations

import pytest

from layerscope.errors import TableError
from layerscope.measures.lens_consistency import LensRow, lens_consistency

TOP = tuple(range(50))
GOOD = LensRow(reference=TOP, other=TOP, ranks=TOP)
FEW = LensRow(reference=TOP, other=(*range(4), *range(100, 146)), ranks=TOP)
TURNED = LensRow(reference=TOP, other=TOP[::-1], ranks=TOP[::-1])
TARGETS = {"first_rank_le_5": 6, "L_semantic": 7, "L_semantic_strong": None}


def test_lenses_that_agree() -> None:
    found = lens_consistency(TARGETS, {"raw": {6: FEW, 7: GOOD}})
    assert found["targets"] == ["first_rank_le_5", "L_semantic"]
    # Below the limit, but not at a milestone of the onset.
    assert found["norm_vs_raw"]["at_targets"][0]["jaccard@10"] == 4 / 16
    assert not found["low_at_semantic"] and found["low"] == []
    assert found["norm_vs_raw"]["p50"]["jaccard@10"] == (4 / 16 + 1.0) / 2


@pytest.mark.parametrize("row", [FEW, TURNED])
def test_lenses_that_disagree_at_the_onset(row: LensRow) -> None:
    found = lens_consistency(TARGETS, {"raw": {7: GOOD}, "tuned": {7: row}})
    assert found["low_at_semantic"]
    assert [(entry["lens"], entry["name"]) for entry in found["low"]] == [("tuned", "L_semantic")]
    assert list(found["norm_vs_tuned"]["p50"]) == [
        *("jaccard@10", "jaccard@50", "spearman_top50", "kendall_top50", "rbo")
    ]


def test_nothing_to_compare() -> None:
    assert lens_consistency(TARGETS, {"raw": {}})["norm_vs_raw"] == {"at_targets": [], "p50": {}}
    with pytest.raises(TableError, match="no other lens"):
        lens_consistency(TARGETS, {})
