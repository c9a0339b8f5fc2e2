"""From rows to figures: onsets beside onsets, heads, directions, languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.follow_up import head_scan
from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.directions import ADD, CONCEPT
from layerscope.experiments.follow_up.facts import Fact
from layerscope.experiments.follow_up.patches import CLEAN, KINDS

NEAR = 1  # rows; what counts as the same onset
WANTED_BITS, WANTED_INDEX = 0.5, 1.5  # of a direction that does what it is for, and little else


def items_table(
    facts: Sequence[Fact],
    plain: Mapping[str, Mapping[str, Any]],
    onsets: pl.DataFrame,
    patched: pl.DataFrame,
) -> pl.DataFrame:
    """Return one row per fact: the observed onset beside the causal ones, in rows of depth.

    ``difference`` is causal less observed. ``mlp_by_then``: an MLP patch at or before the observed
    row gives rank 1. ``onset_for_heads``: the causal onset, else the observed one.
    """
    rows: list[dict[str, Any]] = []
    for fact in facts:
        item = fact.clean.item
        clean, corrupted = plain[fact.key]["clean"], plain[fact.key]["corrupted"]
        rows.append(
            {
                "item": fact.key,
                "relation": item.relation,
                "language": item.language,
                "subject": item.subject,
                "answer": item.answer,
                "partner": fact.partner.item.subject,
                "partner_answer": fact.partner.item.answer,
                "tokens": len(fact.clean.ids),
                "observed": fact.onset.row,
                "confirmed_source": fact.onset.source,
                "logit_diff_clean": clean[0],
                "logit_diff_corrupted": corrupted[0],
                "log2p_clean": clean[1],
                "log2p_corrupted": corrupted[1],
                "rank_corrupted": corrupted[2],
                "bits_between": clean[1] - corrupted[1],
            }
        )
    table = pl.DataFrame(rows, schema=_ITEM_SCHEMA)
    table = table.join(onsets, on="item", how="left", maintain_order="left")
    mlp = patched.filter(
        (pl.col("donor") == CLEAN) & (pl.col("site") == "mlp_out") & (pl.col("rank") == 1)
    )
    first = mlp.group_by("item").agg(pl.col("row").min().alias("_first"))
    table = table.join(first, on="item", how="left", maintain_order="left")
    return table.with_columns(
        (pl.col("causal") - pl.col("observed")).alias("difference"),
        (pl.col("_first") <= pl.col("observed")).fill_null(value=False).alias("mlp_by_then"),
        pl.coalesce("causal", "observed").alias("onset_for_heads"),
    ).drop("_first")


_ITEM_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("item", "relation", "language", "subject", "answer"), pl.String),
    **dict.fromkeys(("partner", "partner_answer"), pl.String),
    "tokens": pl.Int32,
    "observed": pl.Int32,
    "confirmed_source": pl.String,
    **dict.fromkeys(("logit_diff_clean", "logit_diff_corrupted"), pl.Float64),
    **dict.fromkeys(("log2p_clean", "log2p_corrupted"), pl.Float64),
    "rank_corrupted": pl.Int64,
    "bits_between": pl.Float64,
}


def summary_of(tables: Mapping[str, pl.DataFrame], config: FollowUpConfig) -> dict[str, Any]:
    """Return the figures of all parts."""
    items = tables["items"]
    groups: dict[str, Any] = {"all": _onsets(items)}
    for (relation, language), own in items.group_by("relation", "language", maintain_order=True):
        groups[f"{relation}/{language}"] = _onsets(own)
    return {
        "onsets": groups,
        "heads": _heads(items, tables["heads"], tables["curve"], config),
        "directions": _directions(tables["directions"]),
        "mediation": _mediation(tables["mediation"]),
        "languages": _languages(tables["languages"]),
    }


def _onsets(items: pl.DataFrame) -> dict[str, Any]:
    """Compare onsets: medians over the facts that have one, shares over all of them."""
    count, difference = items.height, items["difference"]
    near = difference.is_not_null() & (difference.abs() <= NEAR)
    controlled = items.filter("controlled")
    return {
        "facts": count,
        "observed": _median(items["observed"]),
        "causal": _median(items["causal"]),
        "without_causal": int(items["causal"].null_count()),
        "difference": _median(difference),
        "within_one": _share(int(near.sum()), count),
        "mlp_by_then": _share(int(items["mlp_by_then"].sum()), count),
        "sites": {
            kind: {
                "median": _median(items[f"onset_{kind}"]),
                "share": _share(count - items[f"onset_{kind}"].null_count(), count),
            }
            for kind in KINDS
        },
        "control": {
            "facts": controlled.height,
            "share": _share(
                controlled.height - controlled["control"].null_count(), controlled.height
            ),
        },
    }


def _heads(
    items: pl.DataFrame, scan: pl.DataFrame, curve: pl.DataFrame, config: FollowUpConfig
) -> dict[str, Any]:
    """Return the strongest heads of each relation, and the curve of the first k together."""
    found: dict[str, Any] = {}
    named = scan.join(items.select("item", "relation", "language"), on="item", how="inner")
    for (relation, language), own in named.group_by("relation", "language", maintain_order=True):
        means = (
            own.group_by("block", "head")
            .agg(
                pl.col("patch_bits").mean(),
                pl.col("ablate_bits").mean(),
                pl.len().alias("facts"),
            )
            .sort(["patch_bits", "block", "head"], descending=[True, False, False])
        )
        mine = curve.filter((pl.col("relation") == relation) & (pl.col("language") == language))
        points = (
            mine.group_by("which", "k")
            .agg(pl.col("patch_bits").median(), pl.col("ablate_bits").median())
            .sort("which", "k")
        )
        found[f"{relation}/{language}"] = {
            "top": means.head(config.curve).to_dicts(),
            "held_out": mine["item"].n_unique(),
            "curve": {
                which: points.filter(which=which).drop("which").to_dicts()
                for which in (head_scan.TOP, head_scan.RANDOM)
            },
        }
    return found


def _directions(doses: pl.DataFrame) -> list[dict[str, Any]]:
    """Return medians per relation, set of prompts, operation, strength and kind of direction.

    The index is null where it is known of less than half of the prompts.
    """
    keys = ["relation", "set", "operation", "alpha", "direction"]
    table = doses.group_by(keys, maintain_order=True).agg(
        pl.col("bits").median(),
        pl.col("moved").median(),
        pl.col("index").median(),
        pl.col("index").is_not_null().sum().alias("index_known"),
        pl.col("log2p_before").median(),
        pl.col("log2p").median(),
        (pl.col("rank_before") == 1).mean().alias("rank1_before"),
        (pl.col("rank") == 1).mean().alias("rank1"),
        pl.len().alias("prompts"),
    )
    rows = table.to_dicts()
    for row in rows:
        if 2 * row["index_known"] < row["prompts"]:
            row["index"] = None
        row["as_wanted"] = (
            row["direction"] == CONCEPT
            and row["operation"] == ADD
            and row["bits"] >= WANTED_BITS
            and row["index"] is not None
            and row["index"] >= WANTED_INDEX
        )
    return rows


def _mediation(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Return median bits: of the whole residual, through the direction alone, around it.

    ``share`` is the ratio of the medians, null where the whole gives less than half a bit.
    """
    keys = ["relation", "pair", "direction"]
    rows = (
        table.group_by(keys, maintain_order=True)
        .agg(
            pl.col("total_bits").median(),
            pl.col("through_bits").median(),
            pl.col("around_bits").median(),
            (pl.col("rank_whole") == 1).mean().alias("rank1_whole"),
            (pl.col("rank_through") == 1).mean().alias("rank1_through"),
            pl.len().alias("pairs"),
        )
        .to_dicts()
    )
    for row in rows:
        enough = row["total_bits"] >= WANTED_BITS
        row["share"] = row["through_bits"] / row["total_bits"] if enough else None
    return rows


def _languages(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Return, per language and donor, the best block for the median fact, and how many flip.

    Facts that the model does not answer in the language itself stand apart: nothing follows from
    them.
    """
    keys = ["language", "answered", "donor"]
    best = table.group_by([*keys, "item"], maintain_order=True).agg(
        pl.col("bits").max(), pl.col("flip").any(), pl.col("same_token").first()
    )
    return (
        best.group_by(keys, maintain_order=True)
        .agg(
            pl.col("bits").median(),
            pl.col("flip").mean(),
            pl.col("same_token").mean(),
            pl.len().alias("facts"),
        )
        .sort(keys)
        .to_dicts()
    )


def _median(values: pl.Series) -> float | None:
    found = values.drop_nulls().median()
    return None if found is None else float(found)  # pyright: ignore[reportArgumentType]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
