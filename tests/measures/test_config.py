from __future__ import annotations

import json
from typing import Any

import pytest

from layerscope.errors import ConfigError
from layerscope.measures.config import MeasureConfig, decimal, trimmed


def test_to_dict_holds_every_threshold() -> None:
    values = json.loads(json.dumps(MeasureConfig(copy_threshold=0.9).to_dict(), allow_nan=False))
    assert values["copy_threshold"] == 0.9
    assert values["copy_soft_window_ks"] == [1, 2, 3]
    assert values.keys() == MeasureConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"copy_threshold": 1.5},
        {"copy_margin": -0.1},
        {"copy_thresholds": (0.5, 7.0)},
        {"copy_soft_window_ks": ()},
        {"copy_soft_window_ks": (0, 1)},
        {"copy_window_k": 0},
        {"window_radius": -1},
        {"copy_threshold": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MeasureConfig(**change)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.70, "0.7"), (0.95, "0.95"), (0.123456789, "0.123457"), (1.0, "1"), (0.0, "0"), (10, "10")],
)
def test_labels_are_trimmed(value: float, text: str) -> None:
    assert trimmed(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (1.0, "1.0"), (0.25, "0.25"), (2, "2.0"), (10.0, "10.0")]
)
def test_milestone_labels_keep_one_decimal(value: float, text: str) -> None:
    assert decimal(value) == text


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"score_weights": (1.0,)}, "3 numbers"),
        ({"score_weights": (1.0, 0.0, float("nan"))}, "3 numbers"),
        ({"score_tiers": (0.2, 0.5, 0.7)}, "2 numbers"),
        ({"score_tiers": (0.5, 0.2)}, "lower one first"),
        ({"score_v2_addends": ()}, "2 numbers"),
        ({"js_threshold_bits": 0}, "above 0"),
        ({"l1_threshold": 0.0}, "above 0"),
        ({"l1_threshold": float("nan")}, "above 0"),
        ({"growth_factor": 0.0}, "above 0"),
        ({"raw_kl_medium_bits": 2.0}, "at most raw_kl_high_bits"),
        ({"topk_decay_k": 10}, "50 most likely"),
        ({"rank_thresholds": (0,)}, "ranks begin at 1"),
        ({"kl_thresholds_bits": (0.5, 0.5)}, "once"),
        ({"gap_thresholds": (1.0, 1.00000001)}, "once"),
        ({"rank_thresholds": (5, 5)}, "once"),
        ({"cos_thresholds": (0.2, 0.2)}, "once"),
        ({"copy_thresholds": (0.7, 0.7)}, "once"),
        ({"copy_soft_extra_thresholds": (0.3, 0.3)}, "once"),
        ({"copy_soft_window_ks": (2, 2)}, "once"),
        ({"kl_thresholds_bits": (float("inf"),)}, "finite"),
    ],
)
def test_what_is_needed_is_named(change: dict[str, Any], need: str) -> None:
    with pytest.raises(ConfigError, match=need) as caught:
        MeasureConfig(**change)
    assert next(iter(change)) in str(caught.value)
