"""Credit of input tokens: complete, equal to the obvious computation, and honest where linear."""

from __future__ import annotations

import polars as pl
import pytest
import torch

import layerscope
from layerscope import demo
from layerscope.features import open_set
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.drivers import TOLERANCE, drivers, logit_weights
from layerscope.models import LanguageModel

TEXT = "Balance: $40. Goal: $300. Bet: $5-$100. Last spins: win, loss, loss."

pytestmark = pytest.mark.skipif(
    not (demo.model_path() / "model.safetensors").exists(), reason="the embedded model is absent"
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(demo.model_path(), device="cpu")


@pytest.fixture(scope="module")
def dictionary() -> SparseDictionary:
    return open_set(demo.dictionaries_path(), layers=[2])[2]


def test_credit_adds_up_and_leaving_out_is_a_real_change(
    model: LanguageModel, dictionary: SparseDictionary
) -> None:
    batch = model.tokenize(TEXT)
    with torch.no_grad():
        stream = model.run(batch, capture=["resid_pre.0", "resid_post.2"], logits=None)
    feature = int(dictionary.encode(stream["resid_post.2"][0, -1]).argmax())
    found = drivers(model, batch, dictionary, feature, leave_out=3)
    assert found.complete and found.gap <= TOLERANCE
    total = found.table["integrated"].sum()
    assert total == pytest.approx(found.value - found.baseline, rel=TOLERANCE)
    expected = dictionary.pre_activations(stream["resid_post.2"][0, -1], [feature])
    assert found.value == pytest.approx(float(expected), rel=1e-4)
    assert found.table["integrated"][0] == 0.0  # BOS is its own baseline
    left = found.table.filter(pl.col("left_out").is_not_null())
    assert left.height == 3
    # The foremost token, left out by an edit of the whole model.
    at = left.sort(pl.col("integrated").abs(), descending=True)["position"][0]
    entering = stream["resid_pre.0"].clone()
    entering[0, at] = entering[0, 1:].mean(0)
    with torch.no_grad():
        start = layerscope.models.Start(0, entering)
        after = model.run(batch, start=start, capture="resid_post.2", logits=None)
    change = float(expected) - float(
        dictionary.pre_activations(after["resid_post.2"][0, -1], [feature])
    )
    assert left.filter(pl.col("position") == at)["left_out"][0] == pytest.approx(change, abs=1e-3)


def test_logit_weights_are_products_with_the_head(
    model: LanguageModel, dictionary: SparseDictionary
) -> None:
    direction = dictionary.write_directions([5])
    found = logit_weights(model, direction, top=4)[0]
    gain = dict(model.backend.model.named_parameters())["model.norm.weight"]  # type: ignore[attr-defined]
    raw = (model.unembedding.weight @ (gain * direction[0])).detach()
    z = (raw - raw.mean()) / raw.std()
    assert [token for token, _ in found["top"]] == z.topk(4).indices.tolist()
    assert [value for _, value in found["bottom"]] == pytest.approx(
        z.topk(4, largest=False).values.tolist(), rel=1e-3
    )
