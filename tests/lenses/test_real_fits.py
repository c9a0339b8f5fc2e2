"""On a trained model, lenses fitted on real text beat their baselines on text they never saw."""

from __future__ import annotations

from pathlib import Path

import pytest

import layerscope
from layerscope.lenses import load_lens
from layerscope.lenses.fitting import DataConfig, TunedOptions, fit_lens
from layerscope.lenses.fitting.evaluate import depth_rows
from support.shared import shared_path

pytestmark = pytest.mark.real_model
DATA = DataConfig(tokens=65_536, evaluation_tokens=8192)


@pytest.mark.parametrize("rank", [None, 16])
def test_tuned_beats_norm_and_bias_at_every_depth(rank: int | None, tmp_path: Path) -> None:
    model = layerscope.load(shared_path("models", "stories260K"), device="cpu")
    text = shared_path("data", "tinystories_merged", "tinystories_cased.jsonl")
    options = TunedOptions(rank=rank, epochs=3)
    result = fit_lens("tuned", model, text, tmp_path, data=DATA, options=options)
    assert result.verdict["improves"], result.warnings
    for row in depth_rows(model.n_layers).values():
        assert result.kl_bits["tuned"][row] < 0.9 * result.kl_bits["bias"][row]
        assert result.kl_bits["tuned"][row] < 0.9 * result.kl_bits["norm"][row]
    assert load_lens(tmp_path, model).name == "tuned"


def test_prism_improves_half_way_and_says_where_it_does_not() -> None:
    model = layerscope.load(shared_path("models", "stories260K"), device="cpu")
    text = shared_path("data", "tinystories_merged", "tinystories_cased.jsonl")
    result = fit_lens("prism", model, text, data=DATA)
    rows = depth_rows(model.n_layers)
    for depth in ("25%", "50%"):
        assert result.kl_bits["prism"][rows[depth]] < 0.7 * result.kl_bits["norm"][rows[depth]]
    beaten = result.kl_bits["prism"][rows["75%"]] >= result.kl_bits["norm"][rows["75%"]]
    assert any("at 75% depth" in line for line in result.warnings) is beaten
