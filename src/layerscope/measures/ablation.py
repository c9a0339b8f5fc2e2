"""What changes when a word that should not matter is left out of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope.measures.detectors import Milestone, difference


def ablation_summary(
    original: Mapping[str, Milestone], ablated: Mapping[str, Milestone]
) -> dict[str, Any]:
    """Compare copy and onset layers of one fact with and without the word (without - with)."""
    copy, semantic = original["L_copy"].first, original["L_semantic"].first
    copy_nf, semantic_nf = ablated["L_copy"].first, ablated["L_semantic"].first
    return {
        "L_copy_orig": copy,
        "L_sem_orig": semantic,
        "L_copy_nf": copy_nf,
        "L_sem_nf": semantic_nf,
        "delta_L_copy": difference(copy_nf, copy),
        "delta_L_sem": difference(semantic_nf, semantic),
    }
