"""What a patching run comes to: means over pairs, a ranking, what was left out, and its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.patching.config import PatchConfig
from layerscope.interventions.patching import Cost

TOP = 20
SATURATED = 0.99
# Recovery below which no single cell counts as an effect.
WEAK = 0.1


def summarise(
    cells: pl.DataFrame,
    pairs: pl.DataFrame,
    cost: Cost,
    checks: Sequence[Mapping[str, Any]],
    config: PatchConfig,
) -> dict[str, Any]:
    """Return the summary as JSON values.

    Recovery is averaged over the pairs in which it exists. Places are compared by their label: by
    position where all prompts of a run have positions that correspond.
    """
    main = config.metrics[0]
    chosen = cells.filter(pl.col("metric") == main)
    means = grouped(chosen)
    zero = (
        chosen.group_by("pair")
        .agg(pl.col("recovery").is_null().all().alias("none"))
        .filter(pl.col("none"))["pair"]
    )
    left_out = pairs.filter(~pl.col("used"))
    verified = {"cells": sum(int(check["cells"]) for check in checks)}
    if verified["cells"]:
        errors = [check["error"] for check in checks]
        scales = [check["scale"] for check in checks]
        known = [error for error in errors if error is not None]
        verified |= {
            "worst_error": max(known) if len(known) == len(errors) else None,
            "scale": max(scale for scale in scales if scale is not None) if known else None,
        }
    return {
        "metric": main,
        "direction": config.direction,
        "pairs": {
            "given": pairs.height,
            "used": int(pairs["used"].sum()),
            "not_answered": int((pairs["answered"] == False).sum()),  # noqa: E712
            "refused": int(pairs["answered"].is_null().sum()),
            "left_out": left_out.select("pair", "reason").to_dicts(),
        },
        "zero_denominator": sorted(zero.to_list()),
        "top": means.sort("mean_recovery", descending=True, nulls_last=True).head(TOP).to_dicts(),
        "bottom": means.sort("mean_recovery", nulls_last=True).head(5).to_dicts(),
        "verified": verified,
        "cautions": cautions(chosen, main),
        "cost": cost.to_dict(),
    }


def cautions(cells: pl.DataFrame, metric: str) -> list[str]:
    """Return what this way of measuring cannot see here, one sentence each."""
    found: list[str] = []
    ends = pl.concat([cells["base"], cells["donor"]]).drop_nulls()
    if metric in ("prob", "prob_diff") and bool((ends.abs() > SATURATED).any()):
        found.append(
            f"{metric} saturates: a run has more than {SATURATED}, where large changes of the "
            "logits hardly show; measure logit_diff too"
        )
    if metric == "rank" and bool((ends == 1).any()):
        found.append("rank saturates at 1: growing or shrinking leads do not show; add logit_diff")
    single = cells.filter(pl.col("place") != "all")
    if single.height and not bool((single["recovery"].abs() >= WEAK).any()):
        found.append(
            "no single cell matters: redundant parts (either suffices) and backups hide one "
            "another when patched one at a time; patch several together"
        )
    return found


def grouped(cells: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over pairs of each node's recovery and value, in the order of the sweep."""
    keys = ["kind", "site", "layer", "unit", "place"]
    return cells.group_by(keys, maintain_order=True).agg(
        pl.col("recovery").mean().alias("mean_recovery"),
        pl.col("recovery").std().alias("std_recovery"),
        pl.col("value").mean().alias("mean_value"),
        pl.col("recovery").count().alias("pairs"),
        pl.col("token").first().alias("token"),
    )
