"""Dictionaries in raw units: identities, gradients, precision, widths, ids."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from planted import random_dictionary

from layerscope.errors import DictionaryError
from layerscope.features import FeatureId, join, residual_coordinates
from layerscope.features.architectures import BatchTopK, Gated, Relu, TopK
from layerscope.features.architectures.base import Gate
from layerscope.models import Site
from support.loaded import loaded

GATES: dict[str, Gate | None] = {
    "jumprelu": None,
    "relu": Relu(),
    "topk": TopK(5),
    "gated": Gated(torch.linspace(0.5, 2, 40), torch.linspace(-0.2, 0.2, 40)),
}


@pytest.mark.parametrize("gate", GATES)
def test_activations_are_a_sum_of_directions_bias_and_error(gate: str) -> None:
    it = random_dictionary(gate=GATES[gate], centered=True)
    x = torch.randn(30, 16)
    f = it.encode(x)
    total = f @ it.write_directions(range(40)) + it.decoder_bias + it.error(x)
    torch.testing.assert_close(total, x, rtol=1e-5, atol=1e-5)
    pre = x @ it.read_rows(range(40)).T + it.read_bias(range(40))
    torch.testing.assert_close(pre, it.pre_activations(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_some_features_equal_all_of_them(gate: str) -> None:
    it = random_dictionary(gate=GATES[gate])
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(it.encode(x, [9, 2]), it.encode(x)[..., [9, 2]])
    torch.testing.assert_close(it.pre_activations(x, [9]), it.pre_activations(x)[..., [9]])


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_finite_differences(gate: str) -> None:
    it = random_dictionary(gate=GATES[gate], dtype=torch.float64, centered=True)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(it.encode, (x,))
    assert torch.autograd.gradcheck(it.reconstruct, (x,))
    # An inactive feature passes nothing, an active one its read row.
    f = it.encode(x)
    for feature in range(40):
        (gradient,) = torch.autograd.grad(f[0, feature], x, retain_graph=True)
        active = float(f[0, feature].detach()) > 0
        assert bool(gradient[0].any()) == active


def test_half_precision_is_summed_in_float32() -> None:
    it = random_dictionary(60, 512, seed=3)
    x = torch.randn(5, 512).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pre = it.pre_activations(x)
        made = it.reconstruct(x)
    assert pre.dtype == made.dtype == torch.float32
    exact = x.double() @ it.encoder.tensor().double().T + it.bias.double()
    assert float((pre - exact).abs().max()) < 1e-5


def test_batch_topk_shares_its_budget() -> None:
    it = random_dictionary(gate=BatchTopK(3))
    x = torch.cat((0.01 * torch.randn(4, 16), torch.randn(4, 16)))
    f = it.encode(x)
    assert int((f > 0).sum()) <= 24
    assert "depends on the batch" in it.gate.describe()


def test_another_width_or_dtype_is_refused() -> None:
    it = random_dictionary()
    for wrong in (torch.zeros(3, 15), torch.zeros(3, 16, dtype=torch.int64)):
        with pytest.raises(DictionaryError, match=r"width 15|floats"):
            it.encode(wrong)
    with pytest.raises(DictionaryError, match="dictionary has 40"):
        it.decode(torch.zeros(3, 41))
    with pytest.raises(DictionaryError, match="there is no feature 40"):
        it.encode(torch.zeros(3, 16), [40])
    with pytest.raises(DictionaryError, match="NaN"):
        it.but(bias=torch.full((40,), float("nan")))


def test_a_dictionary_knows_its_model() -> None:
    model = loaded("llama")
    site = Site("resid_post", 1)
    it = random_dictionary(40, model.d_model, site="resid_post.1")
    it.require_model(model)
    with pytest.raises(DictionaryError, match="width 16"):
        random_dictionary(40, 16).require_model(model)
    with pytest.raises(DictionaryError, match="does not have"):
        random_dictionary(40, model.d_model, site="resid_post.99").require_model(model)
    named = it.but(facts={"model_name": "meta-llama/Llama-3.1-8B"})
    with pytest.raises(DictionaryError, match=r"made for meta-llama/Llama-3\.1-8B"):
        named.require_model(model)
    named.require_model(model, other_model=True)
    assert it.reads == site


def test_ids_are_typed_and_joins_notice_another_space() -> None:
    it = random_dictionary()
    one = it.id(7)
    assert one == FeatureId("dictionary:resid_post", 1, 7) and FeatureId.parse(str(one)) == one
    with pytest.raises(DictionaryError, match="features 0 to 39, not 40"):
        it.id(40)
    with pytest.raises(DictionaryError, match="is no feature id"):
        FeatureId.parse("7")
    with pytest.raises(AttributeError):
        one.layer = 3  # type: ignore[misc]
    table = pl.DataFrame({"space": [one.space] * 2, "layer": [1, 1], "feature_id": [7, 8]})
    left = table.with_columns(a=pl.lit(1))
    assert join(left, table.head(1)).height == 1
    coordinates = residual_coordinates(16, 2)
    other = table.with_columns(space=pl.lit(coordinates.name))
    with pytest.raises(DictionaryError, match="'residual-coordinates'"):
        join(left, other)
    with pytest.raises(DictionaryError, match="space is missing"):
        join(left.drop("space"), table)
    with pytest.raises(DictionaryError, match="belongs to the space"):
        it.space.require([coordinates.id(1, 3)])
