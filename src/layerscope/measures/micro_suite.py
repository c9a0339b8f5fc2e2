"""All facts of a run side by side: milestones, medians, what is missing, and which row to cite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerscope.measures.detectors import difference, earliest, median, percentile


def fact_entry(
    summary: dict[str, Any], *, confirmed: int | None, row_index: int | None, n_layers: int
) -> dict[str, Any]:
    """Return one fact's line; delta_hat is (onset - copy) / depth, copy strict or else soft."""
    copy = summary["L_copy"]
    if copy is None:
        copy = earliest(list(summary["L_copy_soft"].values()))
    delta = difference(summary["L_semantic"], copy)
    return {
        "fact_key": summary["fact_key"],
        "fact_index": summary["fact_index"],
        "L_copy_strict": summary["L_copy"],
        "L_copy_soft_k1": summary["L_copy_soft"].get("1"),
        "L_semantic_norm": summary["L_semantic"],
        "L_semantic_confirmed": confirmed,
        "L_semantic_margin_ok_norm": summary["L_semantic_margin_ok"],
        "delta_hat": None if delta is None or n_layers < 1 else delta / n_layers,
        "row_index": row_index,
    }


def micro_suite(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts, their aggregates (medians are whole rows) and the row of each onset.

    `row_index` counts the data rows of the exported last-position table of the norm lens from 0.
    """
    onsets = [entry["L_semantic_norm"] for entry in entries]
    known = np.array([layer for layer in onsets if layer is not None], dtype=float)
    names = (
        "L_copy_strict",
        "L_copy_soft_k1",
        "L_semantic_norm",
        "L_semantic_confirmed",
        "L_semantic_margin_ok_norm",
    )
    delta = median([entry["delta_hat"] for entry in entries])
    aggregates: dict[str, Any] = {"n": len(entries)}
    for name in names:
        aggregates[f"{name}_median"] = _whole(median([entry[name] for entry in entries]))
    aggregates |= {
        "delta_hat_median": None if delta is None else round(delta, 4),
        "L_semantic_norm_iqr": [_whole(percentile(known, q)) for q in (0.25, 0.75)],
        "n_missing": sum(layer is None for layer in onsets),
    }
    return {
        "facts": list(entries),
        "aggregates": aggregates,
        "citations": {"fact_rows": {entry["fact_key"]: entry["row_index"] for entry in entries}},
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
