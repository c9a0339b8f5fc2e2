"""Shares of scales under which the onset's gates hold, against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.gate_stability import ScaledRow, gate_stability, scaled_row

SCALES = MeasureConfig().gate_scales


def test_one_row_of_logits() -> None:
    logits = np.random.default_rng(0).normal(size=30).astype(np.float32) * 3
    found = scaled_row(logits, 4, SCALES)
    for scale, p in zip(SCALES, found.p_answer, strict=True):
        z = np.exp(scale * logits.astype(float))
        assert p == pytest.approx(float(z[4] / z.sum()), rel=1e-12)
    others = np.delete(logits.astype(float), 4)
    assert found.lead == pytest.approx(float(logits[4] - others.max()), abs=1e-6)
    with pytest.raises(TableError, match="id 30 is outside the 30 logits"):
        scaled_row(logits, 30, SCALES)


def test_shares_of_the_gates() -> None:
    # 0.52 logits pass from a scale of 0.9615 on; the second probability fails at the last scale.
    rows = {
        3: ScaledRow(p_answer=(0.1, 0.1, 0.1, 0.011), lead=0.52),
        4: ScaledRow(p_answer=(0.1,) * 4, lead=2.0),
        6: ScaledRow(p_answer=(0.1,) * 4, lead=-1.0),
    }
    found = gate_stability(
        {
            "L_semantic": 3,
            "L_semantic_strong": 4,
            "L_semantic_strong_run2": 3,
            "none": None,
            "x": 9,
        },
        rows,
        d_vocab=100,
    )
    assert found["per_target"] == {
        "L_semantic": {
            "layer": 3,
            "uniform_margin_pass_frac": 0.75,
            "top2_gap_pass_frac": 0.5,
            "both_gates_pass_frac": 0.25,
        },
        "L_semantic_strong": {
            "layer": 4,
            "uniform_margin_pass_frac": 1.0,
            "top2_gap_pass_frac": 1.0,
            "both_gates_pass_frac": 1.0,
        },
        "L_semantic_strong_run2": {
            "layer": 3,
            "uniform_margin_pass_frac": None,
            "top2_gap_pass_frac": None,
            "both_gates_pass_frac": 0.25,
        },
    }
    assert found["min_both_gates_pass_frac"] == 0.25
    assert gate_stability({"L_semantic_strong_run2": 6}, rows, d_vocab=100)["per_target"] == {}
    assert gate_stability({}, rows, d_vocab=100)["min_both_gates_pass_frac"] is None


def test_scales_of_another_configuration() -> None:
    rows = {3: ScaledRow(p_answer=(0.1,) * 4, lead=1.0)}
    with pytest.raises(TableError, match="under 4 scales, the configuration has 2"):
        gate_stability({"x": 3}, rows, d_vocab=9, config=MeasureConfig(gate_scales=(0.9, 1.1)))
