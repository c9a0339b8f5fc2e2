"""The two CSV files of the tuned lens's audit: its parts by layer, and its gain by position.

The earlier system wrote the rows of the last fact; these are the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.measures.sections import ran
from layerscope.measures.tuned_audit import POSITION_COLUMNS, VARIANT_COLUMNS
from layerscope.reports.files.view import View

_FILES = {
    "tuned_variants_csv": ("pure-next-token-tuned-variants", "variants", VARIANT_COLUMNS),
    "positions_audit_csv": ("positions-tuned-audit", "positions", POSITION_COLUMNS),
}
_COUNTS = ("layer", "pos_index", "answer_rank", "rank_shift")


def audit_frames(view: View) -> dict[str, tuple[str, pl.DataFrame]]:
    """Return, by the name of the file in the JSON, the ending of its name and its rows.

    Empty without an audit, or without rows of the baseline's. A tuned lens has no row 0 here.
    """
    section = ran(view.sections, "tuned_audit")
    if section is None:
        return {}
    found: dict[str, tuple[str, pl.DataFrame]] = {}
    for name, (end, key, columns) in _FILES.items():
        rows: Sequence[Mapping[str, Any]] = section.get(key) or ()
        # A section about one fact says so once; one about several says so in every row.
        owner = section.get("prompt_index")
        own = [
            row
            for row in rows
            if row["layer"] > 0 and row.get("prompt_index", owner) == view.baseline["prompt_index"]
        ]
        if own:
            found[name] = (end, _frame(own, columns))
    return found


def _frame(rows: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> pl.DataFrame:
    schema = {name: pl.Int64() if name.startswith(_COUNTS) else pl.Float64() for name in columns}
    return pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=schema)
