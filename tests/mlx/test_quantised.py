"""Weights that mlx-lm quantised: the same identities, sites and edits, within their rounding."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import layerscope
from layerscope.errors import ModelError
from layerscope.models import Apply, ZeroAblate
from support.loaded import SEQUENCES, batch_of
from support.mlx_models import folder, mlx, native, state_of
from support.tiny_models import tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@cache
def quantised_folder(family, bits):
    mlx()
    from mlx_lm import utils

    source = folder(family, **({"hidden_size": 64} if family == "gpt2" else WIDE))
    model = layerscope.load(source, backend="mlx")
    config = json.loads((source / "config.json").read_text())
    made, config = utils.quantize_model(native(model), config, group_size=32, bits=bits)
    path = source.parent / f"{source.name}-{bits}bit"
    path.mkdir()
    utils.save_model(path, made)
    utils.save_config(config, path / "config.json")
    tiny_tokenizer().save_pretrained(path)
    return path


@cache
def quantised(family, bits):
    return layerscope.load(quantised_folder(family, bits), backend="mlx")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", (4, 8))
def test_a_quantised_model_passes_its_identities_and_says_what_it_is(family, bits):
    model = quantised(family, bits)
    assert model.identities is not None and not model.identities.failures
    found = model.provenance()["quantisation"]
    assert (found["bits"], found["group_size"]) == (bits, 32)
    head = model.unembedding
    assert head.weight.dtype == torch.float32 and head.weight.shape == (384, 64)
    result = model.run(batch_of(0), capture="final_norm")
    torch.testing.assert_close(
        head.logits(result["final_norm"][0]), result.logits[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", (4, 8))
def test_sites_edits_padding_and_caches_hold(family, bits):
    model, batch = quantised(family, bits), batch_of(side="left")
    before = state_of(native(model))
    plain = model.run(batch, capture=model.sites())
    heads = model.run(batch, capture="attn.1.head.*.out")
    total = sum(heads[f"attn.1.head.{head}.out"] for head in range(4))
    bias = native(model).layers[1].attn.c_proj.bias if family == "gpt2" else None
    total = total if bias is None else total + torch.tensor(bias.tolist())
    torch.testing.assert_close(total, plain["attn.1.out"], rtol=1e-4, atol=1e-4)
    same = model.run(batch, edits=[Apply("attn.1.pattern", lambda x, _: x)])
    assert torch.equal(same.logits, plain.logits)
    zeroed = model.run(batch, edits=[ZeroAblate("attn.1.head.0.z", rows=0)]).logits
    assert torch.equal(zeroed[1:], plain.logits[1:])
    assert not torch.allclose(zeroed[0], plain.logits[0])
    alone = model.run(batch_of(1)).logits[0]
    real = batch.attention_mask[1]
    torch.testing.assert_close(plain.logits[1][real], alone, rtol=1e-3, atol=1e-3)
    start = model.run(batch, keep_cache=True, logits=None)
    later = model.run([[5], [6], [7]], cache=start.cache, logits="last").logits
    longer = [[*row, 5 + index] for index, row in enumerate(SEQUENCES)]
    expected = model.run(longer, logits="last").logits
    torch.testing.assert_close(later, expected, rtol=1e-3, atol=1e-3)
    assert state_of(native(model)) == before


def test_eight_bits_are_nearer_to_the_model_than_four():
    whole = layerscope.load(folder("llama", **WIDE), backend="mlx").run(batch_of(0)).logits
    errors = [
        float((quantised("llama", bits).run(batch_of(0)).logits - whole).norm() / whole.norm())
        for bits in (4, 8)
    ]
    assert 0.01 < errors[0] < 1 and errors[1] < errors[0] / 4


def test_the_hugging_face_backend_names_this_one():
    with pytest.raises(ModelError, match="backend='mlx'"):
        layerscope.load(quantised_folder("llama", 4))
