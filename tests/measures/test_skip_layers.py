"""Leaving out blocks: the relative increase of perplexity."""

from __future__ import annotations

import math

import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.skip_layers import skip_layers


def test_increase_of_perplexity() -> None:
    found = skip_layers(3.0, {4: 3.5, 2: 3.0 + math.log(1.04)}, tokens=1000)
    assert (found["m=2"], found["m=4"]) == (pytest.approx(0.04), pytest.approx(math.exp(0.5) - 1))
    assert [name for name in found if name.startswith("m=")] == ["m=2", "m=4"]
    # Only the smallest number of blocks decides.
    assert found["tuned_lens_regression"] is False
    assert found["tuned_lens_skip_warning"] is None


def test_a_lens_that_cannot_stand_in() -> None:
    found = skip_layers(3.0, {2: 3.0 + math.log(1.06)}, tokens=1000)
    assert found["tuned_lens_regression"] is True
    assert found["tuned_lens_skip_warning"] == pytest.approx(0.06)
    patient = MeasureConfig(skip_increase=0.1)
    found = skip_layers(3.0, {2: 3.05}, tokens=9, config=patient)
    assert found["tuned_lens_regression"] is False
    for nothing in ({}, {2: 3.0}):
        with pytest.raises(TableError, match="no held-out tokens"):
            skip_layers(3.0, nothing, tokens=0)
