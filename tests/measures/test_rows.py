from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from layerscope.errors import TableError
from layerscope.measures.rows import pass_rows
from layerscope.measures.table import IDENTITY, LayersTable
from support.hand_made import hand_made_pass
from support.tables import synthetic_table


def test_passes_in_order_last_position_only() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    parts = pass_rows(table)
    assert list(parts) == [(i, lens) for i in range(3) for lens in ("norm", "raw")]
    assert all(part.layers.tolist() == [0, 1, 2, 3] for part in parts.values())


def test_order_of_rows_does_not_matter() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    mixed = LayersTable(table.rows.sample(fraction=1.0, shuffle=True, seed=1), table.meta)
    assert pass_rows(mixed)[1, "norm"].frame.equals(pass_rows(table)[1, "norm"].frame)


def test_columns_that_are_absent_are_unknown() -> None:
    part = hand_made_pass(p_top1=[0.5, None])
    assert np.isnan(part.floats("no_such_column")).all()
    assert not part.true("no_such_column").any()
    assert not part.known("no_such_column").any()
    assert not part.has("no_such_column")
    assert not part.has("p_answer")
    assert part.has("p_top1")
    assert part.known("p_top1").tolist() == [True, False]


def test_value_at_a_layer() -> None:
    part = hand_made_pass(layers=[2, 3], p_top1=[0.5, None], top1_ignorable=[True, None])
    assert part.at("p_top1", 2) == 0.5
    assert part.at("p_top1", 3) is None
    assert part.at("p_top1", 9) is None
    assert part.at("p_top1", None) is None


def test_a_table_with_identity_columns_only_can_be_measured() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    bare = LayersTable(table.rows.select(list(IDENTITY)), table.meta)
    assert np.isnan(pass_rows(bare)[0, "norm"].floats("p_answer")).all()


def test_rows_that_occur_twice_are_refused() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    with pytest.raises(TableError, match="two last-position rows"):
        pass_rows(LayersTable(pl.concat([table.rows, table.rows]), table.meta))


def test_values_of_the_wrong_kind_are_refused() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    rows = table.rows.with_columns(pl.lit("much").alias("p_top1"))
    with pytest.raises(TableError, match="does not fit"):
        pass_rows(LayersTable(rows, table.meta))


def test_passes_that_the_metadata_lack_are_left_out() -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    fewer = replace(table.meta, prompts=table.meta.prompts[:1])
    assert {index for index, _ in pass_rows(LayersTable(table.rows, fewer))} == {0}
