"""Tables in which every lens has one divergence, so that every comparison is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from support.tables import synthetic_table

N_LAYERS = 6  # rows at 25, 50 and 75% of the depth: 2 (1.5 to even), 3, 4 (4.5 to even)
LENSES = ("raw", "norm", "bias", "tuned", "prism")
FACTS = 3


def compared_table(
    *,
    norm: float = 8.0,
    tuned: float = 2.0,
    temperature: float | None = 6.0,
    bias: float = 5.0,
    warnings: tuple[str, ...] = (),
    lenses: tuple[str, ...] = LENSES,
    held_out: dict[str, list[float]] | None = None,
) -> LayersTable:
    """Return a table in which every row of a lens has one KL, both ways, plus the fact's index."""
    made = synthetic_table(n_layers=N_LAYERS, n_facts=FACTS, lenses=lenses)
    bits = {"norm": norm, "tuned": tuned, "bias": bias, "prism": 9.0, "raw": 20.0}
    shift = pl.col("fact_index").fill_null(0).cast(pl.Float64)
    kl = pl.col("lens").replace_strict(bits, return_dtype=pl.Float64) + shift
    on_norm = pl.when(pl.col("lens") == "norm")
    rows = made.rows.with_columns(
        kl.alias("kl_to_final_bits"),
        (2 * kl).alias("kl_from_final_bits"),
        on_norm.then(None if temperature is None else temperature + shift).alias(
            "kl_to_final_bits_norm_temp"
        ),
        on_norm.then(None if temperature is None else 2 * (temperature + shift)).alias(
            "kl_from_final_bits_norm_temp"
        ),
    )
    entry: dict[str, Any] = {"status": "ready", "warnings": list(warnings)}
    if held_out is not None:
        entry["held_out"] = {"positions": 10, "kl_bits": held_out}
    tau = {"source": "in_run", "prompts": [0], "tau": [2.0] * N_LAYERS + [1.0]}
    meta = replace(
        made.meta,
        lenses={"tuned": entry, "jacobian": {"status": "missing", "reason": "no folder"}},
        norm_temperature=None if temperature is None else tau,
    )
    return LayersTable(rows, meta)


def compared_summary(**options: Any) -> dict[str, Any]:
    """Return the summary of such a table."""
    return summarise(compared_table(**options)).to_dict()
