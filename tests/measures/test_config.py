from __future__ import annotations

import json
from typing import Any

import pytest

from layerscope.errors import ConfigError
from layerscope.measures.config import MeasureConfig, trimmed


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
    ("value", "decimals", "text"),
    [
        (0.70, 2, "0.7"),
        (0.95, 6, "0.95"),
        (0.123456789, 6, "0.123457"),
        (1.0, 2, "1"),
        (0.0, 2, "0"),
    ],
)
def test_labels_are_trimmed(value: float, decimals: int, text: str) -> None:
    assert trimmed(value, decimals=decimals) == text
