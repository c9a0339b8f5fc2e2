"""What a run writes says the same when it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from golden.published_case import leaves, same
from layerscope.measures.published import read_published
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.reports.files import write_run_files
from support.tables import synthetic_table

# Known to the run, but not part of the published tables.
NOT_PUBLISHED = (
    "numeric_health",
    "copy_mask",
    "norm_trajectory",
    "unembed_bias",
    "last_layer_consistency",
    "measurement_guidance",
    "norm_choice",
)


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(n_layers=8, n_facts=3, seed=4)


@pytest.fixture(scope="module")
def folder(table: LayersTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run_files(table, summarise(table).to_dict(), {}, path)
    return path


def test_typed_table(table: LayersTable, folder: Path) -> None:
    again = LayersTable.read_parquet(next(folder.glob("*-layers.parquet")))
    assert again.rows.equals(table.rows)
    assert again.meta == table.meta
    assert summarise(again).to_dict() == summarise(table).to_dict()


def test_published_tables(table: LayersTable, folder: Path) -> None:
    pure = next(folder.glob("*-pure-next-token.csv"))
    rawlens = next(folder.glob("*-pure-next-token-rawlens.csv"))
    again = read_published(pure, rawlens=rawlens)
    assert again.meta.d_vocab == table.meta.d_vocab
    ours, theirs = _comparable(table), _comparable(again)
    assert ours.keys() <= theirs.keys()
    different = {name: (ours[name], theirs[name]) for name in ours}
    different = {name: pair for name, pair in different.items() if not same(*pair)}
    assert not different
    assert len(ours) > 1500


def _comparable(table: LayersTable) -> dict[str, Any]:
    """Return the values of a summary that follow from the published tables, by path."""
    summary = {k: v for k, v in summarise(table).to_dict().items() if k not in NOT_PUBLISHED}
    summary["passes"] = {p["prompt_index"]: p for p in summary["passes"] if p["lens"] == "norm"}
    texts = ("answer", "foil")  # of the control, known to the run only
    # The published tables hold one divergence, and little of the lens that does not normalise.
    parts = ("kl_from_final_bits/", "kl_to_final_bits/raw/", "milestones/raw/")
    elsewhere = tuple(f"lens_comparison/{part}" for part in parts)
    return {
        path: value
        for path, value in leaves(summary)
        if not path.endswith(texts) and not path.startswith(elsewhere)
    } | {"passes": len(summary["passes"])}
