from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.trajectory import growth_spikes, norm_trajectory
from support.hand_made import hand_made_pass

CONFIG = MeasureConfig()


def trajectory(semantic: int | None = None, **columns: list[Any]) -> dict[str, Any]:
    return norm_trajectory(hand_made_pass(**columns), CONFIG, semantic=semantic)


def test_slope_and_fit_of_exponential_growth() -> None:
    result = trajectory(resid_norm=[2.0 * math.exp(0.3 * layer) for layer in range(6)])
    assert result["slope"] == pytest.approx(0.3)
    assert result["r2"] == pytest.approx(1.0)
    assert result["shape"] == result["growth_shape"] == "monotonic"
    assert result["sampled_layers"] == 6


def test_flat_and_ragged_shapes() -> None:
    part = hand_made_pass(resid_norm=[2.0] * 5)
    flat = MeasureConfig(plateau_slope=0.0)  # inclusive
    assert norm_trajectory(part, flat, semantic=None)["shape"] == "plateau"
    assert trajectory(resid_norm=[1.0, 9.0, 1.0, 9.0, 2.0, 9.0])["shape"] == "non_monotonic"


def test_published_spikes_are_strict_and_end_at_the_onset() -> None:
    columns = {
        "resid_norm_ratio": [3.0, 3.1, 1.0, 1.0, 9.0],
        "delta_resid_cos": [0.8, 0.9, 0.79, 0.9, None],
    }
    assert trajectory(**columns)["n_spikes"] == 3
    assert trajectory(semantic=2, **columns)["n_spikes"] == 2
    assert trajectory(semantic=0, **columns)["n_spikes"] == 0
    assert trajectory(**columns)["shape"] == "spike"


def test_early_rescaling_is_not_a_jump_of_the_residual() -> None:
    result = trajectory(
        resid_norm=[0.5 * 1.1**layer for layer in range(12)], resid_norm_ratio=[18.0] * 12
    )
    assert (result["shape"], result["growth_shape"]) == ("spike", "monotonic")
    assert result["growth_spikes"] == []


def test_jump_of_the_residual() -> None:
    lengths = np.array([1.0, 1.1, 1.2, 1.3, 40.0, 41.0, 43.0, 44.0, 46.0])
    assert growth_spikes(lengths, np.arange(9), CONFIG) == [4]
    assert growth_spikes(lengths[::-1], np.arange(9), CONFIG) == [5]


def test_a_jump_needs_size_and_rarity() -> None:
    even = np.array([3.5**i for i in range(8)])  # large, but the rule here
    assert growth_spikes(even, np.arange(8), CONFIG) == []
    small = np.array([1.0, 1.001, 1.002, 1.003, 2.5, 2.501, 2.502])  # rare, but under threefold
    assert growth_spikes(small, np.arange(7), CONFIG) == []


def test_a_lone_jump_in_an_otherwise_even_stack() -> None:
    assert growth_spikes(np.array([1.0, 1.0, 1.0, 9.0, 9.0]), np.arange(5), CONFIG) == [3]


def test_too_little_to_tell() -> None:
    assert growth_spikes(np.array([1.0, 1.0, 99.0]), np.arange(3), CONFIG) == []
    assert growth_spikes(np.array([1.0, 1.0, 1.0, 99.0]), np.arange(4), CONFIG) == [3]
    result = trajectory(resid_norm=[None, None])
    assert (result["slope"], result["r2"], result["shape"]) == (None, None, None)
    assert trajectory(resid_norm=[1.0, math.e])["slope"] == pytest.approx(1.0)
    assert trajectory(resid_norm=[5.0], n_layers=1)["slope"] is None  # type: ignore[arg-type]
