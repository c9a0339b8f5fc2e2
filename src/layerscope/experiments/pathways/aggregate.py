"""From edges of single prompts to pathways between features: what holds over prompts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import polars as pl

from layerscope.features.pathways import verdicts
from layerscope.features.pathways.verdicts import bh

PAIR = ("space", "source_layer", "source_id", "target_layer", "target_id")
_EXACT = 12  # prompts up to which all flips of signs are gone through
_FLIPS = 10_000
_EDGE = (
    "prompt_id",
    "source_layer",
    "source_id",
    "source_position",
    "target_layer",
    "target_id",
    "target_position",
)


def settle(edges: pl.DataFrame, doses: pl.DataFrame, *, fdr: float) -> pl.DataFrame:
    """Return edges with q-values over all of them, and the verdicts that follow.

    Chunks are judged one by one; Benjamini and Hochberg must see every edge of the run at once.

    Args:
        edges: judged chunks. doses: all doses of theirs. fdr: level of q.
    """
    agree = (
        doses.filter(pl.col("dose") != 1.0)
        .group_by(_EDGE)
        .agg(signs=(pl.col("predicted") * pl.col("actual") > 0).all())
    )
    table = edges.join(agree, on=list(_EDGE), how="left", maintain_order="left")
    return verdicts.settle(table, fdr=fdr).drop("signs")


def over_prompts(edges: pl.DataFrame, *, dedup: str = "sum", seed: int = 0) -> pl.DataFrame:
    """Return one row per pair of features: what its edges are over all prompts.

    Positions of one prompt become one attribution (their sum, or the largest). Then: the median
    over the prompts in which the edge was found, how often its sign agrees, and p from flips of
    signs of whole prompts, two-sided; q after Benjamini and Hochberg over the pairs of two prompts
    or more. A pair seen in one prompt is labelled so, and has no p.

    Args:
        edges: settled edges. dedup: "sum" or "max". seed: of the flips beyond 12 prompts.
    """
    largest = pl.col("attribution").sort_by(pl.col("attribution").abs(), descending=True).first()
    merged = pl.col("attribution").sum() if dedup == "sum" else largest
    each = (
        edges.sort("source_position")
        .group_by(*PAIR, "prompt_id", maintain_order=True)
        .agg(
            attribution=merged,
            actual=pl.col("actual").sum() if dedup == "sum" else pl.col("actual").first(),
            share=pl.col("share").sum(),
            supported=pl.col("verdict").is_in(["confirmed", "nonlinear"]).any(),
            verdicts=pl.col("verdict"),
        )
    )
    grouped = each.sort("prompt_id").group_by(*PAIR, maintain_order=True)
    found = grouped.agg(
        n_prompts=pl.len(),
        n_supported=pl.col("supported").sum(),
        prompts=pl.col("prompt_id"),
        attribution=pl.col("attribution").median(),
        attributions=pl.col("attribution"),
        share=pl.col("share").median(),
        actual=pl.col("actual").median(),
        sign_consistency=pl.max_horizontal(
            (pl.col("attribution") > 0).mean(), (pl.col("attribution") < 0).mean()
        ),
        verdicts=pl.col("verdicts").explode().sort().value_counts(sort=True),
    )
    p = [_flips(values, seed) for values in found["attributions"].to_list()]
    ties = ["confirmed", "nonlinear", "refuted", "undetermined"]
    majority = [
        min(counts, key=lambda one: (-one["count"], ties.index(one["verdicts"])))["verdicts"]
        for counts in found["verdicts"].to_list()
    ]
    return (
        found.with_columns(
            single_prompt=pl.col("n_prompts") == 1,
            p=pl.Series(p, dtype=pl.Float64),
            q=pl.Series(bh(p), dtype=pl.Float64),
            verdict=pl.Series(majority, dtype=pl.String),
        )
        .drop("verdicts", "attributions")
        .sort(*PAIR)
    )


def _flips(values: list[float], seed: int) -> float | None:
    """Return the two-sided p of a mean under flips of signs; None for a single value."""
    if len(values) < 2:
        return None
    x = np.asarray(values, dtype=np.float64)
    observed = abs(x.sum())
    if len(x) <= _EXACT:
        signs: Any = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
        return float((np.abs(signs @ x) >= observed * (1 - 1e-12)).mean())
    generator = np.random.default_rng(seed)
    signs = generator.choice((1.0, -1.0), size=(_FLIPS, len(x)))
    return float((1 + (np.abs(signs @ x) >= observed * (1 - 1e-12)).sum()) / (1 + _FLIPS))
