"""What an attribution run found, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from layerscope.experiments.attribution.config import AttributionConfig
from layerscope.interventions.attribution import Contrast, EdgeScores
from layerscope.interventions.attribution.verify import Verification
from layerscope.interventions.circuits import Faithfulness, keep_edges

CURVE_SCHEMA = {
    "pair": pl.String,
    "ranking": pl.String,
    "fraction": pl.Float64,
    "edges": pl.Int64,
    "metric": pl.Float64,
}
DEFINITIONS = {
    "faithfulness": "(m(C) - m(none)) / (m(all) - m(none)), m the mean metric over pairs; none: "
    "every edge carries the donor's run, all: every edge carries the base run",
    "CPR": "integral of faithfulness over the share of edges (trapezoid), edges ranked by signed "
    "score; more is better",
    "CMD": "integral of |1 - faithfulness| over the share of edges (trapezoid), edges ranked by "
    "the size of their score; less is better",
}


def curves(rows: pl.DataFrame, contrast: Contrast) -> pl.DataFrame:
    """Return one row per ranking and share: edges, mean metric, faithfulness."""
    base, donor = (float(end.double().mean()) for end in contrast.ends)
    gap = base - donor
    alike = abs(gap) <= 1e-9 * max(abs(base), abs(donor), 1.0)
    means = rows.group_by("ranking", "fraction", "edges", maintain_order=True).agg(
        pl.col("metric").mean()
    )
    faithful = pl.lit(None, dtype=pl.Float64) if alike else (pl.col("metric") - donor) / gap
    return means.with_columns(faithful.alias("faithfulness"))


def summarise(
    verification: Verification,
    tables: Mapping[str, pl.DataFrame],
    edges: EdgeScores | None,
    config: AttributionConfig,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return counts, the verdict on the prediction, and the circuit with its areas."""
    found: dict[str, Any] = {
        "pairs": dict(notes["pairs"]),
        "total_effect": verification.total,
        "method": config.method,
        "metric": config.metric,
        "direction": config.direction,
        "verification": {
            "verified": len(verification.nodes),
            "others": verification.n_others,
            "spearman": verification.spearman,
            "wrong_signs": [str(node) for node in verification.wrong_signs],
            "blind": [str(node) for node in verification.blind],
            "unconfirmed": [str(node) for node in verification.unconfirmed],
            "missed": [str(node) for node in verification.missed],
            "missed_bound": verification.missed_bound,
            "joint": verification.joint,
        },
        "warnings": [*notes["left_out"], *verification.warnings],
    }
    if edges is None:
        found["circuit"] = {"status": "skipped", "reason": "edges were not asked for"}
        return found
    count = min(config.circuit, keep_edges(edges, 0).n_all)
    circuit = keep_edges(edges, count)
    found["circuit"] = circuit.to_dict()
    found["cancelling"] = [str(writer) for writer in edges.cancelling()]
    found["edge_remainder"] = notes["edge_remainder"]
    found["areas"] = {
        name: _area(tables["curves"], ranking)
        for name, ranking in (("CPR", "signed"), ("CMD", "magnitude"))
    }
    found["definitions"] = DEFINITIONS
    if found["cancelling"]:
        names = ", ".join(found["cancelling"][:5])
        found["warnings"].append(
            f"cancelling: edges of {names} pull in opposite directions, so their total effect "
            "hides what they do"
        )
    return found


def _area(curve: pl.DataFrame, ranking: str) -> float | None:
    rows = curve.filter(ranking=ranking)
    return Faithfulness(
        "signed" if ranking == "signed" else "magnitude",
        tuple(rows["fraction"]),
        tuple(rows["edges"]),
        tuple(rows["metric"]),
        tuple(rows["faithfulness"]),
        0.0,
        0.0,
    ).area
