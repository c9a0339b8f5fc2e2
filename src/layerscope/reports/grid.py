"""The layers x positions grid of one pass and lens, as compact columns for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from layerscope.reports.strings import StringTable
from layerscope.reports.text import rounded

MAX_POSITIONS = 64  # the last ones; a longer prompt would make neither a readable nor a small grid
DIGITS = 3  # significant ones, as many as the hover text shows
CELL_BYTES = 16  # measured: entropy, KL and rank of one cell, without its tokens
TOKEN_BYTES = 14  # measured: one token number with its probability, and its share of new texts


def grid_size(rows: pl.DataFrame) -> int:
    """Return how many cells the grid of these rows has, after the limit on positions."""
    positions = min(rows["pos"].n_unique(), MAX_POSITIONS)
    return positions * rows["layer"].n_unique()


def grid_bytes(cells: int, top_k: int) -> int:
    """Estimate the size of ``cells`` cells with ``top_k`` tokens each, in bytes of JSON."""
    return cells * (CELL_BYTES + top_k * TOKEN_BYTES)


def grid_payload(rows: pl.DataFrame, strings: StringTable, *, top_k: int) -> dict[str, Any]:
    """Return the cells of one pass and lens, layer by layer and position by position.

    ``t`` and ``p`` hold ``k`` token numbers and probabilities per cell, ``h`` the entropy (bits),
    ``d`` the KL to final (bits), ``r`` the rank of the model's own top-1. Cells that were not
    decoded are -1 and null. ``hidden`` counts the leading positions that were left out.
    """
    positions: list[int] = rows["pos"].unique().sort().to_list()
    hidden = max(0, len(positions) - MAX_POSITIONS)
    positions = positions[hidden:]
    layers: list[int] = rows["layer"].unique().sort().to_list()
    cells = {(row["layer"], row["pos"]): row for row in rows.iter_rows(named=True)}
    known = (len(row.get("top_tokens") or ()) for row in cells.values())
    width = min(top_k, max(known, default=0))
    payload: dict[str, Any] = {"pos": positions, "layers": layers, "k": width, "hidden": hidden}
    for name in ("t", "p", "h", "d", "r"):
        payload[name] = []
    for layer in layers:
        for position in positions:
            _add_cell(payload, cells.get((layer, position), {}), strings, width)
    return payload


def _add_cell(
    payload: dict[str, Any], row: Mapping[str, Any], strings: StringTable, width: int
) -> None:
    tokens = strings.add_all((row.get("top_tokens") or ())[:width])
    probs = [rounded(value, DIGITS) for value in (row.get("top_probs") or ())[:width]]
    payload["t"].extend(tokens + [-1] * (width - len(tokens)))
    payload["p"].extend(probs + [None] * (width - len(probs)))
    payload["h"].append(rounded(row.get("entropy_bits"), DIGITS))
    payload["d"].append(rounded(row.get("kl_to_final_bits"), DIGITS))
    payload["r"].append(row.get("final_top1_rank"))
