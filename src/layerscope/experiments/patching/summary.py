"""What a patching run comes to: means over pairs, a ranking, what was left out, and its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.patching.config import PatchConfig
from layerscope.experiments.patching.control import doubts
from layerscope.experiments.patching.twice import verified
from layerscope.interventions.patching import Cost

TOP = 20
SATURATED = 0.99
# Recovery below which no single cell counts as an effect.
WEAK = 0.1


NODE_KEYS = ("kind", "site", "unit", "place")
NodeKey = tuple[str, str, int | None, str]


def strongest(cells: pl.DataFrame, metric: str) -> list[NodeKey]:
    """Return the nodes that recover most on average, as (kind, site, unit, place)."""
    means = _ranked(grouped(cells.filter(pl.col("metric") == metric)))
    return list(means.head(TOP).select(NODE_KEYS).rows())  # type: ignore[arg-type]


def summarise(
    cells: pl.DataFrame,
    control: pl.DataFrame,
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
    beside = control.group_by(NODE_KEYS, maintain_order=True).agg(
        pl.col("recovery").mean().alias("control")
    )
    top = _ranked(means).head(TOP)
    top = top.join(beside, on=NODE_KEYS, how="left", maintain_order="left", nulls_equal=True)
    found = cautions(chosen, main)
    if config.control and top.height:
        rows = top.select("site", "unit", "place", "mean_recovery", "control").iter_rows()
        found += doubts(
            [
                (f"{site if unit is None else f'{site}[{unit}]'} at {place}", *shares)
                for site, unit, place, *shares in rows
            ]
        )
    return {
        "metric": main,
        "direction": config.direction,
        "pairs": pair_counts(pairs),
        "zero_denominator": zero_denominators(chosen),
        "top": top.to_dicts(),
        "bottom": means.sort("mean_recovery", nulls_last=True).head(5).to_dicts(),
        "verified": verified(checks),
        "cautions": found,
        "cost": cost.to_dict(),
    }


def _ranked(means: pl.DataFrame) -> pl.DataFrame:
    return means.sort("mean_recovery", descending=True, nulls_last=True, maintain_order=True)


def pair_counts(pairs: pl.DataFrame) -> dict[str, Any]:
    """Return how many pairs were given, used and left out, and why."""
    left_out = pairs.filter(~pl.col("used"))
    return {
        "given": pairs.height,
        "used": int(pairs["used"].sum()),
        "not_answered": int((pairs["answered"] == False).sum()),  # noqa: E712
        "refused": int(pairs["answered"].is_null().sum()),
        "left_out": left_out.select("pair", "reason").to_dicts(),
    }


def zero_denominators(cells: pl.DataFrame) -> list[str]:
    """Return the pairs whose two runs give the same number, so that no recovery exists."""
    none = cells.group_by("pair").agg(pl.col("recovery").is_null().all())
    return sorted(none.filter(pl.col("recovery"))["pair"].to_list())


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
    zero = zero_denominators(cells)
    if zero:
        found.append(
            f"both runs give the same {metric} in {len(zero)} of {cells['pair'].n_unique()} pairs "
            f"({', '.join(zero[:5])}), so that nothing can be recovered there: they count in no "
            "mean; measure something that differs"
        )
    single = cells.filter((pl.col("place") != "all") & pl.col("recovery").is_not_null())
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
