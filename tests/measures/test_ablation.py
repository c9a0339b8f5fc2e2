from __future__ import annotations

from layerscope.measures.ablation import ablation_summary
from layerscope.measures.detectors import Milestone


def _at(layer: int | None) -> Milestone:
    return Milestone(first=layer, stable=layer, lost=(), fraction=None)


def test_deltas_are_ablated_minus_original() -> None:
    result = ablation_summary(
        {"L_copy": _at(0), "L_semantic": _at(25)}, {"L_copy": _at(3), "L_semantic": _at(24)}
    )
    assert (result["delta_L_copy"], result["delta_L_sem"]) == (3, -1)
    assert (result["L_sem_orig"], result["L_sem_nf"]) == (25, 24)


def test_a_missing_side_gives_no_delta() -> None:
    result = ablation_summary(
        {"L_copy": _at(None), "L_semantic": _at(25)}, {"L_copy": _at(0), "L_semantic": _at(None)}
    )
    assert (result["delta_L_copy"], result["delta_L_sem"]) == (None, None)
