"""Are the numbers themselves sound: NaN, infinity, extreme logits, vanishing probabilities."""

from __future__ import annotations

from typing import Any

import polars as pl

from layerscope.measures.detectors import percentile
from layerscope.measures.table import LayersTable


def numeric_health(table: LayersTable, *, lens: str) -> dict[str, Any]:
    """Return the health of every row of one lens, at all positions and passes.

    `max_abs_logit_p99` is the 99th percentile of the rows' largest |logit|, `min_prob_p01` the 1st
    of their smallest probability; both are null for a table that does not hold them.
    """
    rows = table.rows.filter(pl.col("lens") == lens)
    flagged = rows.filter(pl.col("nonfinite").fill_null(False))["layer"].unique().sort()

    def column(name: str) -> pl.Series:
        return rows[name].cast(pl.Float64).fill_nan(None).drop_nulls()

    return {
        "any_nonfinite": len(flagged) > 0,
        "max_abs_logit_p99": percentile(column("max_abs_logit").to_numpy(), 0.99),
        "min_prob_p01": percentile(column("min_prob").to_numpy(), 0.01),
        "layers_flagged": flagged.to_list(),
        "checked": rows["nonfinite"].null_count() < rows.height,
    }


def health_caution(health: dict[str, Any], *, copy: int | None, semantic: int | None) -> bool:
    """Say whether a flagged row lies at or before a milestone (or anywhere, when there is none)."""
    flagged: list[int] = health["layers_flagged"]
    known = [layer for layer in (copy, semantic) if layer is not None]
    return any(layer <= max(known) for layer in flagged) if known else bool(flagged)
