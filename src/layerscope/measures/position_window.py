"""Does the onset hold at other positions than the last? (Layer-lens reference, 2.16.)

The gold token of a position is the one that the model itself puts first there, so that every
position has one; the rank of that token in a row says whether the lens has found it by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig

GRID = (0.20, 0.40, 0.60, 0.80, 0.92, 0.96, 0.98, 1.0)


def position_grid(length: int, fractions: Sequence[float] = GRID) -> dict[float, int]:
    """Return the position of every grid fraction in a sequence of `length` tokens.

    Position = fraction * (length - 1), rounded (halves to the even one); of fractions that meet the
    same position the first is kept. Raises TableError for an empty sequence.
    """
    if length < 1:
        raise TableError("a sequence without tokens has no positions; give at least one token")
    found: dict[float, int] = {}
    for fraction in fractions:
        position = round(fraction * (length - 1))
        if position not in found.values():
            found[fraction] = position
    return found


def position_window(
    gold_ranks: Mapping[float, Mapping[int, int | None]],
    *,
    semantic: int | None,
    strong_run2: int | None = None,
    gold: str = "model_top1",
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return the share of grid positions where the gold token is first at the onset row.

    `gold_ranks` maps a grid fraction to the gold token's rank per row. Positions whose rank is not
    known are counted in `n_positions` and not in the shares, which are null without any known one.
    The gate passes from a share of one half on; with fewer than two known positions, which say
    nothing of others, it is null. Raises TableError for an empty grid.
    """
    config = config or MeasureConfig()
    if not gold_ranks:
        raise TableError("no positions were measured; give the ranks of at least one")
    share, known = _share(gold_ranks, semantic)
    run2, _ = _share(gold_ranks, strong_run2)
    return {
        "status": "ok",
        "gold": gold,
        "grid": list(gold_ranks),
        "L_semantic_norm": semantic,
        "rank1_frac": share,
        "n_positions": len(gold_ranks),
        "n_known": known,
        "rank1_frac_strong_run2": run2,
        "gate": {
            "position_window_stable": None
            if share is None or known < 2
            else share >= config.position_share
        },
    }


def _share(
    gold_ranks: Mapping[float, Mapping[int, int | None]], layer: int | None
) -> tuple[float | None, int]:
    ranks = [by_layer.get(layer) for by_layer in gold_ranks.values()] if layer is not None else []
    known = [rank for rank in ranks if rank is not None]
    return (sum(rank == 1 for rank in known) / len(known) if known else None), len(known)
