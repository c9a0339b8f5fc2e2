"""What a path patching run comes to: the strongest edges beside their control, and its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.patching.control import doubts
from layerscope.experiments.patching.summary import (
    TOP,
    cautions,
    pair_counts,
    zero_denominators,
)
from layerscope.experiments.patching.twice import verified
from layerscope.experiments.path_patching.config import PathConfig
from layerscope.interventions.patching import Cost

EDGE_KEYS = ("sender", "receiver", "place")
EdgeKey = tuple[str, str, str]


def strongest(edges: pl.DataFrame, metric: str) -> list[EdgeKey]:
    """Return the edges of largest mean recovery, by size, as (sender, receiver, place)."""
    means = _ranked(grouped(edges.filter(pl.col("metric") == metric)))
    return list(means.head(TOP).select(EDGE_KEYS).rows())  # type: ignore[arg-type]


def grouped(edges: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over pairs of every edge's recovery and value, in the order of the run."""
    return edges.group_by(EDGE_KEYS, maintain_order=True).agg(
        pl.col("recovery").mean().alias("mean_recovery"),
        pl.col("recovery").std().alias("std_recovery"),
        pl.col("value").mean().alias("mean_value"),
        pl.col("recovery").count().alias("pairs"),
    )


def summarise(
    edges: pl.DataFrame,
    control: pl.DataFrame,
    pairs: pl.DataFrame,
    cost: Cost,
    checks: Sequence[Mapping[str, Any]],
    config: PathConfig,
) -> dict[str, Any]:
    """Return the summary as JSON values; recovery is averaged over the pairs in which it exists."""
    main = config.metrics[0]
    chosen = edges.filter(pl.col("metric") == main)
    beside = control.group_by(EDGE_KEYS, maintain_order=True).agg(
        pl.col("recovery").mean().alias("control"),
        pl.col("recovery").count().alias("control_pairs"),
    )
    ranked = _ranked(grouped(chosen)).head(TOP)
    top = ranked.join(beside, on=EDGE_KEYS, how="left", maintain_order="left").to_dicts()
    found = cautions(chosen, main)
    if config.control and top:
        names = [f"{row['sender']} to {row['receiver']}" for row in top]
        effects = [(row["mean_recovery"], row["control"]) for row in top]
        found += doubts([(name, *pair) for name, pair in zip(names, effects, strict=True)])
    return {
        "metric": main,
        "direction": config.direction,
        "pairs": pair_counts(pairs),
        "zero_denominator": zero_denominators(chosen),
        "top": top,
        "verified": verified(checks),
        "cautions": found,
        "cost": cost.to_dict(),
    }


def _ranked(means: pl.DataFrame) -> pl.DataFrame:
    size = pl.col("mean_recovery").abs()
    return means.sort(size, descending=True, nulls_last=True, maintain_order=True)
