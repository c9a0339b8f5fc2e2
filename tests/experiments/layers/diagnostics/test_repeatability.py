from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerscope
from layerscope.experiments.layers import Fact
from layerscope.experiments.layers.diagnostics.repeatability import (
    MAKERS,
    repeatability,
    repeatability_forward,
)
from support.diagnosed import demo, demo_copy, material, spoilt
from support.loaded import hf
from support.tiny_models import tiny, tiny_tokenizer

Change = Callable[[Tensor, nn.Module], Tensor]


def elsewhere(output: Tensor) -> Tensor:
    """Return another vector of the same size: no reading survives it."""
    return output.roll(1, dims=-1)


def alone(output: Tensor, _module: nn.Module) -> Tensor:
    return elsewhere(output) if len(output) == 1 else output


def wide(output: Tensor, _module: nn.Module) -> Tensor:
    return elsewhere(output) if output.shape[1] > 20 else output


def eager(output: Tensor, module: Any) -> Tensor:
    return elsewhere(output) if module.config._attn_implementation == "eager" else output


def cast(output: Tensor, _module: nn.Module) -> Tensor:
    return elsewhere(output) if torch.is_autocast_enabled("cpu") else output


def test_the_embedded_model_repeats_itself() -> None:
    run = material(demo())
    section, forward = repeatability(run), repeatability_forward(run)
    assert section["gates"] == {f"repeatable.{name}": True for name in MAKERS}
    assert forward["gates"] == {"repeatability_forward_pass": True, "bit_equal": True}
    # bfloat16 did run: it is far from float32, and yet the reading holds.
    found = {entry["condition"]: entry for entry in section["conditions"]}
    assert found["precision"]["max_abs_logit_difference"] > 1e-3
    assert found["attention"]["max_abs_logit_difference"] < 1e-3
    assert section["warnings"] == []


@pytest.mark.parametrize(
    ("change", "condition"),
    [
        (alone, "batch_of_one"),
        (wide, "padded_batch"),
        (eager, "attention"),
        (cast, "precision"),
    ],
)
def test_what_depends_on_one_condition_fails_that_condition_alone(
    change: Change, condition: str
) -> None:
    run = material(spoilt(change))
    section, forward = repeatability(run), repeatability_forward(run)
    failed = [name for name, holds in section["gates"].items() if holds is False]
    assert failed == [f"repeatable.{condition}"]
    assert section["flag"] == "repeatability_variance_high"
    assert forward["gates"] == {"repeatability_forward_pass": False, "bit_equal": True}
    assert any("top-1" in line for line in section["warnings"])


def test_a_model_that_is_not_deterministic_is_found() -> None:
    calls = count(1)

    def another(output: Tensor, _module: nn.Module) -> Tensor:
        return output.roll(next(calls), dims=-1)

    run = material(spoilt(another))
    section, forward = repeatability(run), repeatability_forward(run)
    assert section["gates"]["repeatable.second_pass"] is False
    assert forward["gates"]["bit_equal"] is False
    assert any("not deterministic" in line for line in forward["warnings"])


def test_attention_is_put_back_and_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo_copy()
    module: Any = hf(model)
    repeatability(material(model))
    assert module.config._attn_implementation == "sdpa"

    def refuse(_name: str) -> None:
        raise ValueError("this family has one kernel")

    monkeypatch.setattr(module, "set_attn_implementation", refuse)
    section = repeatability(material(model))
    assert section["gates"]["repeatable.attention"] is None
    assert "one kernel" in section["not_compared"]["attention"]
    assert any("one kernel" in line for line in section["warnings"])


def test_low_precision_is_compared_with_float32_weights() -> None:
    model = layerscope.load(
        tiny("llama", dtype=torch.bfloat16), tokenizer=tiny_tokenizer(), dtype="bfloat16"
    )
    section = repeatability(material(model, [Fact(key="a", prompt="one two", answer="three")]))
    found = {entry["condition"]: entry for entry in section["conditions"]}
    assert "bfloat16 weights" in found["precision"]["what"]
    assert found["precision"]["max_relative_residual_difference"] > 1e-4
    assert "batch_of_one" in section["not_compared"]  # one prompt alone
