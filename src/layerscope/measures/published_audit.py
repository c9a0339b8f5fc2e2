"""The earlier system's audit of its tuned lens.

Published beside the main table: `*-tuned-variants.csv` (one row per layer), and
`*-positions-tuned-audit.csv` (one row per grid position and layer). Both came from the last fact of
the run and were shown as those of the first, so the fact is found again from the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import first_true
from layerscope.measures.position_window import position_window
from layerscope.measures.published import read_numbers
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.sections import skipped
from layerscope.measures.semantics import is_answer
from layerscope.measures.table import LayersTable
from layerscope.measures.tuned_audit import POSITION_COLUMNS, VARIANT_COLUMNS, tuned_audit

COMPANIONS = {
    "rawlens": "rawlens",
    "tuned": "tuned",
    "prism": "prism",
    "variants": "tuned-variants",
}
POSITIONS = "positions-tuned-audit"


def companions(path: Path) -> dict[str, Path]:
    """Return the files of the same run that lie beside a published main table, by what they hold.

    The names are rawlens, tuned, prism, variants and positions; what is not there is left out.
    Raises TableError when the table's own name does not end in -pure-next-token.csv.
    """
    ending = "-pure-next-token.csv"
    if not path.name.endswith(ending):
        raise TableError(
            f"{path.name} does not end in {ending}, so its companions have no known names; name "
            "them one by one"
        )
    stem = path.name.removesuffix(ending)
    names = {name: f"{stem}-pure-next-token-{end}.csv" for name, end in COMPANIONS.items()}
    names["positions"] = f"{stem}-{POSITIONS}.csv"
    found = {name: path.with_name(file) for name, file in names.items()}
    return {name: file for name, file in found.items() if file.is_file()}


def read_variants(path: Path) -> pl.DataFrame:
    """Read a `*-tuned-variants.csv`; raises TableError naming missing columns."""
    return read_numbers(path, VARIANT_COLUMNS)


def read_positions(path: Path) -> pl.DataFrame:
    """Read a `*-positions-tuned-audit.csv`; raises TableError naming missing columns."""
    return read_numbers(path, POSITION_COLUMNS)


def published_sections(
    table: LayersTable,
    *,
    variants: pl.DataFrame | None = None,
    positions: pl.DataFrame | None = None,
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return the diagnostic sections that follow from the published audit of a table's run.

    They carry the number and the key of the fact that they really describe.
    """
    config = config or MeasureConfig()
    if variants is None:
        reason = "the table of the audit was not given, so the fact of the positions is unknown"
        return {} if positions is None else {"position_window": skipped(reason)}
    owner = audited_pass(variants, pass_rows(table))
    sections = {"tuned_audit": _audit(variants, positions, owner, config)}
    if positions is not None:
        sections["position_window"] = _window(positions, owner, config)
    return sections


def audited_pass(
    variants: pl.DataFrame, parts: Mapping[tuple[int, str], PassRows]
) -> PassRows | None:
    """Return the pass whose norm rows have the audit's baseline divergences, None if none has."""
    audit = dict(variants.select("layer", "kl_bits_baseline").iter_rows())
    for (_, lens), part in parts.items():
        if lens != "norm" or part.prompt.prompt_id != "pos":
            continue
        known = [part.at("kl_to_final_bits", int(layer)) for layer in audit]
        values = np.array([np.nan if value is None else value for value in known])
        if np.allclose(values, np.array(list(audit.values()), dtype=float), rtol=1e-9, atol=1e-12):
            return part
    return None


def _audit(
    variants: pl.DataFrame,
    positions: pl.DataFrame | None,
    owner: PassRows | None,
    config: MeasureConfig,
) -> dict[str, Any]:
    prompt = None if owner is None else owner.prompt
    return {
        **tuned_audit(variants, positions, config=config),
        "prompt_index": None if prompt is None else prompt.prompt_index,
        "fact_key": None if prompt is None else prompt.fact_key,
        "variants": variants.to_dicts(),
        "positions": None if positions is None else positions.to_dicts(),
    }


def _window(
    positions: pl.DataFrame, owner: PassRows | None, config: MeasureConfig
) -> dict[str, Any]:
    if owner is None:
        return skipped("the positions belong to none of the table's passes")
    ranks: dict[float, dict[int, int | None]] = {}
    columns = ("pos_frac", "layer", "answer_rank_baseline")
    for fraction, layer, rank in positions.select(columns).iter_rows():
        ranks.setdefault(fraction, {})[int(layer)] = None if rank is None else int(rank)
    onset = first_true(is_answer(owner), owner.layers)
    prompt = owner.prompt
    return {
        **position_window(ranks, semantic=onset, gold="answer", config=config),
        "prompt_index": prompt.prompt_index,
        "fact_key": prompt.fact_key,
    }
