"""What a back-patching run comes to: what is set right, what is spoilt, and by chance as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.back_patching.config import BackPatchConfig
from layerscope.experiments.patching.questions import QuestionSet
from layerscope.experiments.patching.twice import verified
from layerscope.interventions.patching import Cost

KEYS = ("source", "target", "place")
CellKey = tuple[int, int, str]
FEW = 4
REAL = "back-patch"


def shares(cells: pl.DataFrame) -> pl.DataFrame:
    """Return for every cell and control the shares over prompts, in the order of the grid.

    ``corrected``: of the wrong prompts, those whose answer becomes the likeliest. ``kept``: of the
    right ones, those whose answer still is. Null where there are none.
    """
    wrong, right = pl.col("base_rank") > 1, pl.col("base_rank") == 1
    hit = (pl.col("rank") == 1).cast(pl.Float64)
    return cells.group_by([*KEYS, "which"], maintain_order=True).agg(
        hit.filter(wrong).mean().alias("corrected"),
        hit.filter(right).mean().alias("kept"),
        (pl.col("value") - pl.col("base")).mean().alias("mean_change"),
        (pl.col("value") - pl.col("base")).filter(wrong).mean().alias("change_of_wrong"),
        wrong.sum().alias("wrong"),
        right.sum().alias("right"),
    )


def best_cell(cells: pl.DataFrame) -> CellKey:
    """Return the cell that corrects most, then the one that helps wrong prompts (or any) most."""
    found = shares(cells.filter(which=REAL)).with_columns(
        pl.col("change_of_wrong").fill_null(pl.col("mean_change"))
    )
    order = found.sort(
        pl.col("corrected").fill_null(0),
        "change_of_wrong",
        descending=True,
        nulls_last=True,
        maintain_order=True,
    )
    source, target, place = order.select(KEYS).row(0)
    return source, target, place


def summarise(
    tables: Mapping[str, pl.DataFrame],
    chosen: QuestionSet,
    best: CellKey,
    cost: Cost,
    checks: Sequence[Mapping[str, Any]],
    config: BackPatchConfig,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return the summary as JSON values, and the grid of shares."""
    cells, texts = tables["cells"], tables["texts"]
    grid = shares(cells)
    ends = cells.unique("prompt", maintain_order=True)
    wrong = int((ends["base_rank"] > 1).sum())
    chosen_rows = {row["which"]: row for row in _at(grid, best).to_dicts()}
    any_cell = _any(cells)
    held_out = _held_out(cells)
    return {
        "metric": config.metric,
        "prompts": {**chosen.counts(), "right": ends.height - wrong, "wrong": wrong},
        "best": {
            **dict(zip(KEYS, best, strict=True)),
            **{which: _figures(row) for which, row in chosen_rows.items()},
        },
        "any_cell": any_cell,
        "held_out": held_out,
        "texts": {
            "plain_exact": int(texts["plain_exact"].sum()),
            "patched_exact": int(texts["patched_exact"].sum()),
            "corrected": texts.filter(~pl.col("plain_exact") & pl.col("patched_exact")).height,
            "spoilt": texts.filter(pl.col("plain_exact") & ~pl.col("patched_exact")).height,
        },
        "verified": verified(checks),
        "cautions": _cautions(wrong, any_cell, held_out),
        "cost": cost.to_dict(),
    }, grid


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("corrected", "kept", "mean_change")}


def _at(grid: pl.DataFrame, cell: CellKey) -> pl.DataFrame:
    return grid.filter(**dict(zip(KEYS, cell, strict=True)))


def _any(cells: pl.DataFrame) -> dict[str, float | None]:
    """Return the share of wrong prompts that some cell sets right, and some random position.

    None for random layers: those above a target are other cells of the same grid.
    """
    wrong = cells.filter(pl.col("base_rank") > 1)
    hits = wrong.group_by("which", "prompt", maintain_order=True).agg((pl.col("rank") == 1).any())
    found = dict(hits.group_by("which", maintain_order=True).agg(pl.col("rank").mean()).rows())
    found["random layer"] = None
    return {which: found.get(which) for which in cells["which"].unique(maintain_order=True)}


def _held_out(cells: pl.DataFrame) -> dict[str, Any] | None:
    """Choose the best cell on half of the wrong prompts and measure it on the other half.

    None where there are too few, or the halves share no place.
    """
    wrong = cells.filter(pl.col("base_rank") > 1)
    names = wrong["prompt"].unique(maintain_order=True).to_list()
    if len(names) < FEW:
        return None
    best = best_cell(wrong.filter(pl.col("prompt").is_in(names[::2])))
    rows = _at(shares(wrong.filter(pl.col("prompt").is_in(names[1::2]))), best).to_dicts()
    if not rows:
        return None
    return {
        **dict(zip(KEYS, best, strict=True)),
        "prompts": rows[0]["wrong"],
        **{row["which"]: row["corrected"] for row in rows},
    }


def _cautions(
    wrong: int, any_cell: Mapping[str, float | None], held_out: Mapping[str, Any] | None
) -> list[str]:
    found: list[str] = []
    if not wrong:
        found.append(
            "the model answers every prompt: nothing can be set right; kept says what is spoilt"
        )
    elif held_out is None:
        found.append(
            f"with {wrong} wrong prompts the best cell cannot be tried on others than it was "
            f"chosen on; give {FEW} or more"
        )
    real = any_cell.get(REAL)
    chance = any_cell.get("random position")
    if real is not None and chance is not None and chance >= real > 0:
        found.append(
            f"trying as many random positions sets {chance:.0%} of the wrong prompts "
            f"right by some cell, back-patching {real:.0%}: many tries are what helps"
        )
    return found
