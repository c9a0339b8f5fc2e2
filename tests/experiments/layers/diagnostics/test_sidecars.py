"""Fitted lenses beside the norm lens, read off the table: which of them help, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sidecars import (
    prism_summary,
    tau_norm_per_layer,
    tuned_attribution,
)
from layerscope.lenses.fitted import TemperatureLens
from support.diagnosed import FACTS, demo, material

KL = "kl_to_final_bits"


def beside_norm(name: str, change: pl.Expr) -> Material:
    """Return a run whose table holds the norm lens twice, the second time with another KL."""
    run = material(demo(), FACTS[:2])
    norm = run.table.rows.filter(pl.col("lens") == "norm")
    other = norm.with_columns(change.alias(KL), pl.lit(name).alias("lens"))
    run.table = replace(run.table, rows=pl.concat([run.table.rows, other]))
    return run


@pytest.mark.parametrize(
    ("change", "holds", "says"),
    [
        (pl.col(KL) - 0.5, True, []),
        (pl.col(KL) + 0.5, False, ["25%", "50%", "75%"]),
        # Far better early does not make up for worse late.
        (pl.col(KL) + pl.when(pl.col("layer") < 5).then(-8.0).otherwise(0.5), False, ["75%"]),
        (pl.lit(None, pl.Float64), None, ["nothing was compared"]),
    ],
)
def test_a_prism_must_be_nearer_to_the_model_at_every_depth(
    change: pl.Expr, holds: bool | None, says: list[str]
) -> None:
    section = prism_summary(beside_norm("prism", change))
    assert section["gates"] == {"prism_beats_norm": holds}
    assert len(section["warnings"]) == len(says)
    assert all(word in line for word, line in zip(says, section["warnings"], strict=True))


def tempered(inverse: list[float]) -> dict[str, Any]:
    lens = TemperatureLens(demo(), {"inverse_temperature": torch.tensor(inverse)})
    return tau_norm_per_layer(material(demo(), FACTS[:1], lenses=[lens]))


@pytest.mark.parametrize("endless", [0.0, 1e26])
def test_temperatures_are_settled_unless_one_has_no_end(endless: float) -> None:
    good = tempered([0.5] * 8)
    assert good["gates"] == {"temperatures_settled": True} and good["warnings"] == []
    assert good["tau"] == [2.0] * 8 + [1.0]
    bad = tempered([0.5] * 3 + [endless] + [0.5] * 4)
    assert bad["gates"] == {"temperatures_settled": False}
    assert bad["warnings"] == ["at row(s) 3 no finite temperature is best"]


def test_the_gain_of_a_tuned_lens_is_that_of_the_table() -> None:
    section = tuned_attribution(beside_norm("tuned", pl.col(KL) - 0.5))
    gains = [part["ΔKL_tuned"] for part in section["percentiles"].values()]
    assert gains == pytest.approx([0.5] * 3)
    assert len(section["passes"]) == 2
