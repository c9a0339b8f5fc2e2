"""The two small CSV files about the baseline prompt: its milestones and its artefact audit."""

from __future__ import annotations

from typing import Any

import polars as pl

from layerscope.measures.detectors import percentile
from layerscope.measures.table import LayersTable
from layerscope.reports.files.rows import raw_against_norm
from layerscope.reports.files.view import View, soft_copy

_AUDIT = ("js_divergence", "kl_raw_to_norm_bits", "l1_prob_diff", "topk_jaccard_raw_norm@50")
_COPIED = ("csv_row_index", "answer_rank", "p_answer", "kl_to_final_bits", "entropy_bits")
_MILESTONES: dict[str, pl.DataType] = {
    "layer": pl.Int32(),
    "csv_row_index": pl.Int32(),
    "is_copy_strict": pl.Boolean(),
    "is_copy_soft_k": pl.Int32(),
    "is_semantic_norm": pl.Boolean(),
    "is_semantic_confirmed": pl.Boolean(),
    "answer_rank": pl.Int32(),
    "p_answer": pl.Float64(),
    "kl_to_final_bits": pl.Float64(),
    "entropy_bits": pl.Float64(),
    "lens": pl.String(),
}


def milestones(view: View) -> pl.DataFrame:
    """Return four rows: strict copy, earliest soft copy, onset, confirmed onset.

    `csv_row_index` counts the data rows of the pure-next-token file from 0. A milestone that was
    not reached has empty cells and its flag False.
    """
    entry, confirmed = view.baseline, view.confirmed
    k, soft = soft_copy(entry)
    source = confirmed.get("confirmed_source") or "none"
    rows = [
        _milestone(view, entry.get("L_copy"), flag="is_copy_strict"),
        _milestone(view, soft, window=k),
        _milestone(view, entry.get("L_semantic"), flag="is_semantic_norm"),
        _milestone(
            view,
            confirmed.get("L_semantic_confirmed"),
            flag="is_semantic_confirmed",
            lens=source,
        ),
    ]
    return pl.DataFrame(rows, schema=_MILESTONES)


def _milestone(
    view: View,
    layer: int | None,
    *,
    flag: str | None = None,
    window: int | None = None,
    lens: str = "norm",
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": layer,
        "is_copy_strict": False,
        "is_copy_soft_k": window,
        "is_semantic_norm": False,
        "is_semantic_confirmed": False,
        "lens": lens,
    }
    if layer is None:
        return row
    row |= {name: view.baseline_rows[layer][name] for name in _COPIED}
    return row if flag is None else row | {flag: True}


def artifact_audit(view: View) -> pl.DataFrame:
    """Return raw against norm of the baseline prompt per layer; first a row of medians."""
    index = view.baseline["prompt_index"]
    own = LayersTable(view.table.rows.filter(pl.col("prompt_index") == index), view.table.meta)
    rows = raw_against_norm(own).select(pl.col("layer").cast(pl.String), *_AUDIT)
    score = view.of_baseline("raw_lens_full").get("score") or {}
    summary = pl.DataFrame(
        {
            "layer": ["_summary"],
            **{name: [percentile(rows[name].drop_nulls().to_numpy(), 0.5)] for name in _AUDIT},
            "lens_artifact_score_v2": [score.get("lens_artifact_score_v2")],
            "risk_tier": [score.get("tier")],
        },
        schema_overrides=dict.fromkeys((*_AUDIT, "lens_artifact_score_v2"), pl.Float64),
    )
    return pl.concat([summary, rows], how="diagonal")
