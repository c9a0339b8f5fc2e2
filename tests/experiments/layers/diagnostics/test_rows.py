"""Checks of milestone rows: which norm, which scale, which lens, which position."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

import layerscope
from layerscope.experiments.layers import LayersConfig
from layerscope.experiments.layers.diagnostics.decoding_point import decoding_point
from layerscope.experiments.layers.diagnostics.gate_stability import gate_stability
from layerscope.experiments.layers.diagnostics.lens_consistency import lens_consistency
from layerscope.experiments.layers.diagnostics.norms import norm_for
from layerscope.experiments.layers.diagnostics.position_window import position_window
from layerscope.measures.config import MeasureConfig
from layerscope.measures.table import LayersTable
from support.diagnosed import FACTS, Changed, demo, demo_copy, material
from support.loaded import loaded
from support.tiny_models import tiny, tiny_tokenizer


def test_the_milestones_of_the_embedded_model_hang_on_no_norm() -> None:
    section = decoding_point(material(demo()))
    assert section["gates"] == {"decoding_point_consistent": True}
    assert section["strategies"] == ["final", "next_norm", "same_norm"]
    compared = {entry["choice"] for entry in section["per_target"] if entry["status"] == "ok"}
    assert compared == {"next_norm", "same_norm"}


def test_a_norm_that_reads_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo_copy()
    run = material(model)
    honest = model.norm_at

    def negated(row: int, choice: str) -> tuple[str, object]:
        name, norm = honest(row, choice)  # type: ignore[arg-type]
        if choice == "next_norm" and row < model.n_layers:
            return name, lambda residual: -norm(residual)
        return name, norm

    monkeypatch.setattr(model, "norm_at", negated)
    section = decoding_point(run)
    assert section["gates"] == {"decoding_point_consistent": False}
    assert any("only one of final and next_norm" in line for line in section["warnings"])
    assert not any("same_norm" in line for line in section["warnings"])


def test_families_say_which_norm_they_lack() -> None:
    olmo = layerscope.load(tiny("olmo2"), tokenizer=tiny_tokenizer())
    assert norm_for(olmo, "next_norm", 1) is None
    neox = loaded("gpt_neox")
    section = decoding_point(material(neox, FACTS[:1]))
    assert section["status"] == "skipped" and "never among" in section["reason"]


def test_same_norm_is_the_norm_before_the_mlp_of_the_block_that_wrote_the_row() -> None:
    model = loaded("llama")
    found = norm_for(model, "same_norm", 2)
    assert found is not None and found[0] == "model.layers.1.post_attention_layernorm"
    assert norm_for(model, "same_norm", 0) is None
    result = model.run([[1, 5, 9]], capture=["resid_mid.1", "mlp_in.1"])
    assert found[1](result["resid_mid.1"]).equal(result["mlp_in.1"])


def test_gates_with_room_are_stable_and_those_without_are_not() -> None:
    good = gate_stability(material(demo(), FACTS[:1]))
    assert good["gates"] == {"gate_stable_under_rescaling": True}
    assert good["min_both_gates_pass_frac"] == 1.0
    run = material(demo(), FACTS[:1])
    rows = run.part(run.passes[0]).frame
    lead = rows["answer_logit_gap"].drop_nulls().max()
    assert isinstance(lead, float)
    # A gap that the best row just reaches: any smaller scale loses it.
    config = LayersConfig(measures=MeasureConfig(semantic_gap=lead * 0.999))
    bad = gate_stability(material(demo(), FACTS[:1], config=config))
    assert bad["gates"] == {"gate_stable_under_rescaling": False}
    assert bad["per_target"]["L_semantic_strong"]["top2_gap_pass_frac"] == 0.5


def test_lenses_that_rank_alike_agree_and_others_do_not() -> None:
    opposite = Changed(demo(), lambda hidden, _: -hidden)
    same = Changed(demo(), lambda hidden, _: 3.0 * hidden, name="prism")
    section = lens_consistency(material(demo(), lenses=[opposite, same]))
    assert section["gates"] == {
        "lenses_agree.norm_raw": True,
        "lenses_agree.norm_tuned": False,
        "lenses_agree.norm_prism": True,
    }
    first = section["norm_vs_prism"]["at_targets"][0]
    assert first["jaccard@50"] == 1.0 and first["spearman_top50"] == pytest.approx(1.0)
    assert section["norm_vs_tuned"]["at_targets"][0]["spearman_top50"] < 0
    assert len(section["warnings"]) == 1 and "norm and tuned" in section["warnings"][0]


def with_column(table: LayersTable, values: pl.Expr) -> LayersTable:
    return replace(table, rows=table.rows.with_columns(values))


def test_a_milestone_that_holds_at_the_last_position_only_is_found() -> None:
    run = material(demo())
    assert position_window(run)["gates"] == {"position_window_stable": True}
    only = pl.when(pl.col("is_last")).then(pl.col("final_top1_rank")).otherwise(7)
    run.table = with_column(run.table, only.alias("final_top1_rank"))
    section = position_window(run)
    assert section["gates"] == {"position_window_stable": False}
    assert section["rank1_frac"] == pytest.approx(1 / section["n_known"])


def test_every_position_of_the_window_has_a_gold() -> None:
    section = position_window(material(demo()))
    assert all(entry["n_known"] == entry["n_positions"] > 4 for entry in section["passes"])
