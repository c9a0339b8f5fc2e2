"""The last-position curves of one pass and lens, as compact columns for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from layerscope.reports.glossary import MARKED, canonical, lasts
from layerscope.reports.strings import StringTable
from layerscope.reports.text import rounded

TOP_K = 3  # tokens kept per layer for the hover text of the curves
CURVES: dict[str, str] = {
    "entropy": "entropy_bits",
    "kl": "kl_to_final_bits",
    "rank": "answer_rank",
    "p_answer": "p_answer",
    "kl_raw": "kl_norm_vs_raw_bits",
    "js_raw": "js_norm_raw_bits",
    "jaccard_raw": "topk_jaccard_raw_norm",
}


def curves_payload(rows: pl.DataFrame, strings: StringTable) -> dict[str, Any]:
    """Return one column per curve over the layers of the last position; absent columns are null."""
    last = rows.filter(pl.col("is_last")).sort("layer")
    payload: dict[str, Any] = {"layer": last["layer"].to_list()}
    for name, column in CURVES.items():
        values = last[column].to_list() if column in last.columns else []
        known = any(value is not None for value in values)
        payload[name] = [rounded(value) for value in values] if known else None
    payload["top"] = [strings.add_all(tokens[:TOP_K]) for tokens in _lists(last, "top_tokens")]
    payload["top_p"] = [
        [rounded(value) for value in probs[:TOP_K]] for probs in _lists(last, "top_probs")
    ]
    return payload


def _lists(rows: pl.DataFrame, column: str) -> list[list[Any]]:
    if column not in rows.columns:
        return [[] for _ in range(rows.height)]
    return [values or [] for values in rows[column].to_list()]


def marks(milestones: Mapping[str, Any] | None, names: Iterable[str] = MARKED) -> list[list[Any]]:
    """Return ``[name, first, stable]`` of the milestones that were reached, in reading order.

    ``stable`` is null when a lasting milestone is not true at the last layer.
    """
    found = {canonical(name): entry for name, entry in (milestones or {}).items()}
    reached: list[list[Any]] = []
    for name in names:
        entry = found.get(name)
        if entry and entry.get("first") is not None:
            first = entry["first"]
            stable = entry.get("stable", first) if lasts(name) else first
            reached.append([name, first, stable])
    return reached
