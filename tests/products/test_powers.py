"""Powers of two against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("numba")

from layerscope.products.powers import exp2

F = np.float32


def test_powers_of_two_are_as_accurate_as_float32_over_the_whole_range() -> None:
    x = np.concatenate([np.linspace(-126, 60, 40_001), np.linspace(-0.6, 0.6, 2001)]).astype(F)
    found = np.array([exp2(value) for value in x], dtype=np.float64)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 1.5e-7
    below = [exp2(F(value)) for value in (-126.01, -149, -1e4, -3e38, -math.inf)]
    assert below == [0.0] * 5
    assert exp2(F(0)) == 1
    assert exp2(F(math.inf)) == math.inf
    assert math.isnan(exp2(F(math.nan)))
