"""The identities hold for every family, and each of them can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import layerscope
from layerscope.errors import IdentityError, ModelError
from layerscope.models import Site, identities
from layerscope.models.backends.huggingface.backend import HuggingFaceBackend
from layerscope.models.backends.huggingface.families import FAMILIES as TABLE
from layerscope.models.backends.huggingface.structure import bind
from support.loaded import EVERY, LISTED, batch_of, hf, loaded
from support.tiny_models import UNLISTED, tiny, tiny_tokenizer

SEQUENTIAL = {"embedding", "stream", "attention_sum", "residual_sum", "final_norm", "unembedding"}


@pytest.mark.parametrize("family", EVERY)
def test_every_identity_holds(family):
    model = loaded(family)
    report = model.check()
    names = {identity.name for identity in report.identities}
    assert report.passed and model.identities.passed
    assert all(identity.error <= 1e-5 for identity in report.identities)
    parallel = model.backend.why_not(Site("resid_mid", 0)) is not None
    assert (SEQUENTIAL - {"attention_sum"} if parallel else SEQUENTIAL) <= names
    assert ("next_norm" in names) == (model.architecture == "pre_norm")
    assert {"causality", "resumption"} <= names


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "gpt_neox", "olmo2", "granite"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_identities_know_the_rounding_of_other_dtypes(family, dtype):
    model = layerscope.load(tiny(family, dtype=dtype), tokenizer=tiny_tokenizer())
    assert model.dtype == dtype and model.identities.passed


@pytest.mark.parametrize("family", LISTED)
def test_listed_families_are_found_in_the_table(family):
    model = loaded(family)
    assert model.family in {row.name for row in TABLE}
    assert model.sites() == list(dict.fromkeys(model.sites()))


def test_what_is_said_of_a_family():
    assert {loaded(family).n_kv_heads for family in ("gpt2", "gpt_neox")} == {4}
    assert {loaded(family).n_kv_heads for family in ("llama", "gemma2", "olmo2")} == {2}
    assert loaded("olmo2").architecture == "post_norm"
    assert {loaded(family).architecture for family in ("llama", "gpt_neox")} == {"pre_norm"}
    for family in ("gpt_neox", "cohere", "phi", "gptj"):
        assert "in parallel" in loaded(family).backend.why_not(Site("resid_mid", 0))


@pytest.mark.parametrize("family", tuple(UNLISTED))
def test_unlisted_families_are_resolved_from_their_structure(family):
    assert loaded(family).family == f"structure:{UNLISTED[family]['model_type']}"


def test_layouts_of_listed_families_are_found_without_the_table(monkeypatch):
    from layerscope.models.backends.huggingface import structure

    monkeypatch.setattr(structure, "family_of", lambda _: None)
    for family in ("llama", "gemma2", "olmo2", "gpt_neox_sequential"):
        model = layerscope.load(tiny(family), tokenizer=tiny_tokenizer())
        table = loaded(family).backend.structure
        assert model.family.startswith("structure:")
        for found, named in zip(model.backend.structure.blocks, table.blocks, strict=True):
            assert (found.attention_out.name, found.mlp_out.name) == (
                named.attention_out.name,
                named.mlp_out.name,
            )


WRONG = [
    ("gemma2", {"softcap": None}, "unembedding"),
    ("gemma2", {"embedding_scale": None}, "embedding"),
    ("gemma2", {"attention_out": None}, "attention_sum"),
    ("gemma2", {"mlp_out": None}, "residual_sum"),
    ("gemma2", {"mlp_norm": "post_feedforward_layernorm"}, "attention_sum"),
    ("gpt2", {"position_embedding": None}, "embedding"),
    ("gpt2", {"input_norm": "ln_2"}, "next_norm"),
    ("gpt_neox", {"parallel": False}, "attention_sum"),
    ("llama", {"final_norm": "model.layers.2.input_layernorm"}, "unembedding"),
    ("llama", {"final_norm": "model.layers.2.input_layernorm"}, "final_norm"),
    ("llama", {"input_norm": "post_attention_layernorm"}, "next_norm"),
]


@pytest.mark.parametrize(("family", "mistake", "identity"), WRONG)
def test_each_identity_catches_a_wrong_row(family, mistake, identity):
    model = hf(loaded(family))
    row = next(row for row in TABLE if model.config.model_type in row.model_types)
    report = identities.check(HuggingFaceBackend(model, bind(model, replace(row, **mistake))))
    failures = {failure.name: failure for failure in report.failures}
    assert identity in failures
    assert failures[identity].error > 100 * failures[identity].bound
    assert not report.to_dict()["passed"]
    with pytest.raises(IdentityError, match=rf"is refused: .*{identity} .* off by .* bound 1e-05"):
        report.require("tiny")


def test_a_block_that_changes_the_stream_between_blocks_is_caught():
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.01, *args[1:]))
    with pytest.raises(IdentityError, match="stream"):
        layerscope.load(model, tokenizer=tiny_tokenizer())


def test_a_model_with_a_side_channel_past_the_residual_is_caught():
    """What a resumed pass cannot know: here the last block reads what an MLP left elsewhere."""
    model = tiny("helium")
    kept = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: kept.append(output))
    model.model.layers[2].mlp.register_forward_hook(
        lambda _, args, output: output + (kept.pop() if kept else 0)
    )
    with pytest.raises(IdentityError, match="resumption"):
        layerscope.load(model, tokenizer=tiny_tokenizer())


def test_a_model_that_sees_later_tokens_is_caught():
    model = tiny("llama")
    mix = lambda _, args, output: output + output.flip(1)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(IdentityError, match="causality"):
        layerscope.load(model, tokenizer=tiny_tokenizer())


def test_not_a_number_never_passes():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(IdentityError, match="off by nan"):
        layerscope.load(model, tokenizer=tiny_tokenizer())
    opened = layerscope.load(model, tokenizer=tiny_tokenizer(), verify=False)
    broken = [entry for entry in opened.check().to_dict()["identities"] if not entry["passed"]]
    assert broken and all(entry["error"] is None for entry in broken)


def test_an_unlisted_model_is_proved_even_without_verify():
    model = tiny("helium")
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output + args[0])
    block = model.model.layers[0]
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5
    with pytest.raises(IdentityError, match="'helium' is not in the family table"):
        layerscope.load(model, tokenizer=tiny_tokenizer(), verify=False)


def test_training_mode_is_refused():
    model = layerscope.load(tiny("gpt2"), tokenizer=tiny_tokenizer())
    hf(model).train()
    with pytest.raises(ModelError, match=r"training mode.*model.eval\(\)"):
        model.run(batch_of(0))


@pytest.mark.parametrize("family", EVERY)
def test_the_norm_of_each_row_is_the_real_module(family):
    model, batch = loaded(family), batch_of(0)
    result = model.run(batch, capture=["resid_pre.*", "resid_post.-1", "attn_in.*", "final_norm"])
    n = model.n_layers
    name, norm = model.norm_at(n, "next_norm")
    assert name == model.norm_at(0, "final")[0]
    assert torch.equal(norm(result["resid_post.-1"]), result["final_norm"])
    for row in range(n):
        name, norm = model.norm_at(row, "next_norm")
        if model.architecture == "post_norm":
            assert name == model.norm_at(row, "final")[0]
            continue
        assert f".{row}." in name
        assert torch.equal(norm(result[f"resid_pre.{row}"]), result[f"attn_in.{row}"])
