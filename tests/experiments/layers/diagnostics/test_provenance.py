"""Checks of what a run rests on: norms, head bias, numbers, rows, masks."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch

import layerscope
from layerscope.experiments.layers import Fact
from layerscope.experiments.layers.diagnostics.head_bias import unembed_bias
from layerscope.experiments.layers.diagnostics.health import numbers
from layerscope.experiments.layers.diagnostics.ignored import copy_mask
from layerscope.experiments.layers.diagnostics.layout import layer_map
from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.normalisation import normalisation_provenance
from layerscope.experiments.layers.diagnostics.norms import facts_of
from support.diagnosed import FACTS, demo, demo_copy, material
from support.loaded import hf, loaded
from support.tiny_models import tiny, tiny_tokenizer

ROME = (Fact(key="rome", prompt="The capital of Italy is", answer="Rome"),)


def changed(run: Material, *columns: pl.Expr) -> Material:
    run.table = replace(run.table, rows=run.table.rows.with_columns(*columns))
    run.__dict__.pop("parts", None)
    return run


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "rms_norm"), ("gemma2", "rms_norm"), ("gpt2", "layer_norm"), ("opt", "layer_norm")],
)
def test_norms_are_recognised_and_are_their_formula(family: str, kind: str) -> None:
    section = normalisation_provenance(material(loaded(family), ROME))
    assert section["gates"] == {"norm_is_its_formula": True, "norm_is_the_one_used": True}
    assert {entry["kind"] for entry in section["modules"]} == {kind}
    assert all(entry["eps"] > 0 for entry in section["modules"])


def test_a_gain_that_is_stored_as_an_offset_is_read_as_one() -> None:
    model = loaded("gemma2")
    name, norm = model.norm_at(model.n_layers, "final")
    stored = hf(model).get_submodule(name).weight
    gain = facts_of(model, name, norm).gain
    assert gain is not None
    torch.testing.assert_close(gain, 1.0 + stored.detach().double())


def test_a_norm_that_does_something_else_fails() -> None:
    model = demo_copy()
    hf(model).get_submodule("model.norm").register_forward_hook(
        lambda _module, _inputs, output: output + 0.3 * output.roll(1, dims=-1)
    )
    section = normalisation_provenance(material(model))
    assert section["gates"]["norm_is_its_formula"] is False
    assert "is not what its kind" in section["warnings"][0]


def test_the_norm_of_another_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    run = material(model, ROME)
    honest = model.norm_at

    def mistaken(row: int, choice: str) -> object:
        if choice == "next_norm" and row == 1:
            return honest(0, "next_norm")
        return honest(row, choice)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "norm_at", mistaken)
    section = normalisation_provenance(run)
    assert section["gates"] == {"norm_is_its_formula": True, "norm_is_the_one_used": False}


def test_a_head_without_bias_owes_nothing_to_one() -> None:
    section = unembed_bias(material(demo()))
    assert section["gates"] == {"reading_owes_nothing_to_bias": True}
    assert section["constant_logits"] == {"present": False}


@pytest.mark.parametrize("where", ["head", "norm"])
def test_an_answer_that_the_constant_part_of_the_head_gives_is_found(where: str) -> None:
    """The bias of the head, or that of the norm before it: both speak without any input."""
    family = {"head": "gptj", "norm": "gpt2"}[where]
    module = tiny(family)
    model = layerscope.load(module, tokenizer=tiny_tokenizer())
    rome = material(model, ROME).passes[0].alignment.first_id
    with torch.no_grad():
        if where == "head":
            module.lm_head.bias[rome] += 100.0
        else:
            row = module.lm_head.weight[rome]
            module.transformer.ln_f.bias.add_(60.0 * row / row.square().sum())
    section = unembed_bias(material(model, ROME))
    assert section["gates"] == {"reading_owes_nothing_to_bias": False}
    assert section["passes"][0]["answer_top1_only_with_bias"]
    top = section["constant_logits"]["top"][0]["token"]
    assert top == model.token_strings()[rome]


def test_numbers_are_sound_until_they_are_not() -> None:
    run = material(demo())
    good = numbers(run)
    assert all(good["gates"].values())
    assert good["gates"].keys() == {"finite.norm", "finite.raw", "no_overflow"}
    broken = (pl.col("layer") == 1) & (pl.col("lens") == "raw")
    flagged = numbers(changed(run, (pl.col("nonfinite") | broken).alias("nonfinite")))
    assert flagged["gates"]["finite.raw"] is False and flagged["gates"]["finite.norm"] is True
    assert any("raw lens at row(s) 1" in line for line in flagged["warnings"])


def test_a_residual_near_the_end_of_its_dtype_is_found() -> None:
    run = material(demo())
    run.__dict__["captured"] = replace(
        run.captured,
        residual=(run.captured.residual / run.captured.residual.abs().max()).half() * 4e4,
    )
    section = numbers(run)
    assert section["gates"]["no_overflow"] is False
    assert any("float16" in line for line in section["warnings"])


def test_rows_carry_the_norm_that_the_model_names() -> None:
    run = material(demo())
    section = layer_map(run)
    assert section["gates"] == {"rows_are_the_models": True}
    assert [row["site"] for row in section["rows"][:2]] == ["resid_pre.0", "resid_post.0"]
    assert section["rows"][-1]["stream"] == "unembed_head"
    assert section["rows"][1]["block_has"]["attention"] is True
    wrong = pl.when(pl.col("layer") == 3).then(pl.lit("model.other")).otherwise("norm_module")
    assert layer_map(changed(run, wrong.alias("norm_module")))["gates"] == {
        "rows_are_the_models": False
    }


def test_the_mask_is_shown_and_an_answer_behind_it_is_found() -> None:
    section = copy_mask(material(demo()))
    assert section["gates"] == {"answers_not_masked": True, "rows_judged_by_this_mask": True}
    assert section["size"] == len(section["ignored_token_ids"]) > 10
    assert sum(section["categories"].values()) == section["size"]
    assert section["in_prompts"][0]["ignored"] == [",", "."]
    dot = Fact(key="dot", prompt="The capital of Italy is Rome", answer=".")
    assert copy_mask(material(demo(), [dot]))["gates"]["answers_not_masked"] is False


def test_rows_that_were_judged_by_another_mask_are_found() -> None:
    run = changed(material(demo()), (~pl.col("top1_ignorable")).alias("top1_ignorable"))
    section = copy_mask(run)
    assert section["gates"]["rows_judged_by_this_mask"] is False
    assert section["rows"]["disagree"] == section["rows"]["rows"] == 2 * 9 * len(FACTS)
