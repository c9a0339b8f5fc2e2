"""Does the reading of a milestone row hold at other positions of the prompt?"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import polars as pl

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result, skipped
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.measures import position_window as measure


def position_window(material: Material) -> Section:
    """Ask at eight positions of the prompt whether the milestone row says what the model will say.

    The gold token of a position is the one that the model itself puts first there. Needs nothing
    but the table.
    """
    per_pass: list[dict[str, Any]] = []
    without: list[int] = []
    for item in material.passes:
        found = material.milestones(item)
        semantic, run2 = found["L_semantic"], found["L_semantic_strong_run2"]
        if semantic is None:
            without.append(item.source.index)
            continue
        section = measure.position_window(
            _ranks(material, item),
            semantic=semantic,
            strong_run2=run2,
            config=material.config.measures,
        )
        per_pass.append({**material.describe(item), **section})
    if not per_pass:
        return skipped("the answer is top-1 in no row of any pass, so there is no row to look at")
    gate = all_hold([entry["gate"]["position_window_stable"] for entry in per_pass])
    warnings = [
        f"{entry['fact_key']}: at row {entry['L_semantic_norm']} the lens has the model's own "
        f"top-1 at only {entry['rank1_frac']:.0%} of {entry['n_known']} positions"
        for entry in per_pass
        if entry["gate"]["position_window_stable"] is False
    ]
    return result(
        {"position_window_stable": gate},
        thresholds={"share": material.config.measures.position_share},
        warnings=warnings,
        **per_pass[0],
        passes=per_pass,
        prompt_indices_without_milestone=without,
        **material.scope,
    )


def _ranks(material: Material, item: PreparedPass) -> dict[float, dict[int, int | None]]:
    """Return, by grid fraction and row, the norm lens's rank of the model's own top-1."""
    grid = measure.position_grid(item.length)
    rows = material.table.rows.filter(
        (pl.col("prompt_index") == item.source.index)
        & (pl.col("lens") == "norm")
        & pl.col("pos").is_in(list(grid.values()))
    ).select("pos", "layer", "final_top1_rank")
    by_position: dict[int, dict[int, int | None]] = defaultdict(dict)
    for position, layer, rank in rows.iter_rows():
        by_position[position][layer] = rank
    return {fraction: by_position[position] for fraction, position in grid.items()}
