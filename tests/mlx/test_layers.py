"""The layers experiment on one set of weights in two backends: the same table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import layerscope
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, analyze
from support.loaded import batch_of
from support.mlx_models import FOUR, folder, in_hugging_face, in_mlx, mlx
from support.shared import shared_path


def fact(key, prompt, answer):
    return Fact(key=key, prompt=prompt, answer=answer)


FACTS = PromptSet(
    "capitals",
    (
        fact("Germany", "The capital of Germany is called simply", "Berlin"),
        fact("France", "The capital of France is called simply", "Paris"),
    ),
)
KEYS = ("fact_key", "lens", "layer", "position")


def tables(expected, found, **config):
    results = [analyze(model, FACTS, LayersConfig(**config)) for model in (expected, found)]
    return [result.table.rows for result in results]


def same(expected, found):
    keys = [name for name in KEYS if name in expected.columns]
    expected, found = expected.sort(keys), found.sort(keys)
    assert expected.select(keys).equals(found.select(keys))
    ranks = [name for name in expected.columns if "rank" in name]
    compared = 0
    for name, kind in expected.schema.items():
        if not kind.is_float():
            continue
        a, b = (table[name].to_numpy().astype(float) for table in (expected, found))
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        if "log2p" in name:
            a, b = np.exp2(a), np.exp2(b)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4, err_msg=name)
        compared += 1
    assert compared > 5
    for name in ranks:
        if expected[name].dtype.is_integer():
            differ = (expected[name] - found[name]).abs().drop_nulls()
            assert (differ > 1).sum() == 0, name
            assert (differ > 0).mean() < 0.01, name


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("norm_choice", ("final", "next_norm"))
def test_the_same_table_as_hugging_face(family, norm_choice):
    same(*tables(in_hugging_face(family), in_mlx(family), norm_choice=norm_choice))


@pytest.mark.real_model
@pytest.mark.parametrize("name", ("stories260K", "babyllama-tok105"))
def test_the_same_table_of_a_trained_model(name):
    path = shared_path("models", name)
    mlx()
    hf, model = layerscope.load(path), layerscope.load(path, backend="mlx")
    facts = PromptSet(
        "girl",
        (
            fact("Lily", "Once upon a time, there was a little girl named Lily.", "She"),
            fact("Tom", "Once upon a time, there was a little boy named Tom.", "He"),
        ),
    )
    same(*(analyze(each, facts).table.rows for each in (hf, model)))
    prompts = ["Once upon a time", "The little dog ran to the"]
    sites = ["attn.*.pattern", "resid_post.*"]
    batch = hf.tokenize(prompts, padding_side="left")
    a, b = hf.run(batch, capture=sites), model.run(batch, capture=sites)
    for site in a:
        x, y = (r[site].movedim(site.pos_axis, 1)[batch.attention_mask] for r in (a, b))
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", (*FOUR, "mistral", "phi3", "gpt_neox"))
@pytest.mark.parametrize("side", ("right", "left"))
def test_patterns_are_those_of_eager_attention(family, side):
    from transformers import AutoModelForCausalLM

    mlx()
    eager = AutoModelForCausalLM.from_pretrained(folder(family), attn_implementation="eager")
    batch = batch_of(side=side)
    with torch.no_grad():
        expected = eager(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids(),
            output_attentions=True,
        ).attentions
    found = in_mlx(family).run(batch, capture="attn.*.pattern")
    for layer, pattern in enumerate(expected):
        for row in range(len(batch)):
            real = batch.attention_mask[row]
            a, b = (x[row][:, real][:, :, real] for x in (found[f"attn.{layer}.pattern"], pattern))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert bool((found[f"attn.{layer}.pattern"][row][:, real][:, :, ~real] == 0).all())
