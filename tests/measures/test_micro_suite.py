from __future__ import annotations

from typing import Any

import pytest

from layerscope.measures.micro_suite import fact_entry, micro_suite


def entry(
    semantic: int | None,
    *,
    copy: int | None = None,
    soft: dict[str, int | None] | None = None,
    n_layers: int = 32,
    index: int = 0,
) -> dict[str, Any]:
    summary = {
        "fact_key": f"fact {index}",
        "fact_index": index,
        "L_copy": copy,
        "L_copy_soft": soft or {"1": None, "2": None},
        "L_semantic": semantic,
        "L_semantic_margin_ok": None,
    }
    return fact_entry(summary, confirmed=semantic, row_index=index, n_layers=n_layers)


def test_delta_hat_prefers_strict_copy_then_the_earliest_soft() -> None:
    assert entry(24, copy=0, soft={"1": 8, "2": 8})["delta_hat"] == 0.75
    assert entry(24, soft={"1": 16, "2": 8})["delta_hat"] == 0.5
    assert entry(24)["delta_hat"] is None
    assert entry(None, copy=0)["delta_hat"] is None
    assert entry(0, copy=0, n_layers=0)["delta_hat"] is None
    assert entry(1, copy=0, n_layers=1)["delta_hat"] == 1.0


def test_first_soft_window_need_not_be_there() -> None:
    assert entry(24, soft={"2": 8})["L_copy_soft_k1"] is None


def test_aggregates() -> None:
    layers = [25, 24, None, 22, 32]
    suite = micro_suite([entry(layer, index=i) for i, layer in enumerate(layers)])
    aggregates = suite["aggregates"]
    assert aggregates["n"] == 5
    assert aggregates["n_missing"] == 1
    assert aggregates["L_semantic_norm_median"] == 24  # 24.5, to the even
    assert aggregates["L_semantic_norm_iqr"] == [24, 27]  # 23.5 and 26.75
    assert aggregates["L_copy_strict_median"] is None
    assert aggregates["delta_hat_median"] is None
    assert suite["citations"]["fact_rows"] == {f"fact {i}": i for i in range(5)}


def test_delta_hat_median_has_four_decimals() -> None:
    suite = micro_suite([entry(31, copy=29, n_layers=36)])
    assert suite["aggregates"]["delta_hat_median"] == pytest.approx(0.0556, abs=0)


def test_no_facts() -> None:
    aggregates = micro_suite([])["aggregates"]
    assert (aggregates["n"], aggregates["L_semantic_norm_iqr"]) == (0, [None, None])
