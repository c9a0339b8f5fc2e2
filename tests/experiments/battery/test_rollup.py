"""Medians, intervals and shares against hand-worked and brute-force references."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope.experiments.battery.rollup import (
    describe,
    generator,
    median_interval,
    median_with_never,
    rollup_table,
    share,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_describe_counts_the_missing_apart() -> None:
    found = describe(pl.Series([1.0, 2.0, 3.0, 4.0, None]), rng=rng(), resamples=200)
    assert (found["n"], found["found"], found["missing"]) == (5, 4, 1)
    assert found["median"] == 2.5
    assert (found["p25"], found["p75"], found["iqr"]) == (1.75, 3.25, 1.5)
    assert (found["p10"], found["p90"]) == (pytest.approx(1.3), pytest.approx(3.7))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, None], 3.0),  # 1, 3, never
        ([3.0, 1.0, None, None], None),
        ([3.0, 1.0, 2.0, None], 2.5),
        ([None], None),
        ([], None),
    ],
)
def test_median_with_the_missing_counted_as_never(
    values: list[float | None], expected: float | None
) -> None:
    assert median_with_never(pl.Series(values, dtype=pl.Float64)) == expected


@pytest.mark.parametrize("n", [1, 2, 5, 24, 101])
def test_interval_is_the_bootstrap_of_the_median(n: int) -> None:
    values = np.sort(np.random.default_rng(n).normal(size=n))
    draws = np.random.default_rng(1).integers(0, n, (40_000, n))
    brute = np.median(values[draws], axis=1)
    low, high = median_interval(values, rng=rng(), resamples=40_000)
    scale = max(np.ptp(values), 1e-9)
    assert low == pytest.approx(np.quantile(brute, 0.025), abs=0.04 * scale)
    assert high == pytest.approx(np.quantile(brute, 0.975), abs=0.04 * scale)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=80))
def test_interval_lies_within_the_values(values: list[int]) -> None:
    known = np.sort(np.array(values, dtype=float))
    low, high = median_interval(known, rng=rng(), resamples=50)
    assert low is not None and high is not None
    assert known[0] <= low <= high <= known[-1]


def test_no_value_no_interval() -> None:
    assert median_interval(np.array([]), rng=rng(), resamples=10) == (None, None)


def test_share_of_the_known() -> None:
    found = share(pl.Series([True, False, None, True, True]), rng=rng(), resamples=4000)
    assert found["n"] == 4 and found["share"] == 0.75
    assert found["low"] == 0.25 and found["high"] == 1.0  # 2.5% of Bin(4, 3/4) / 4
    assert share(pl.Series([None], dtype=pl.Boolean), rng=rng(), resamples=5)["share"] is None


def test_draws_depend_on_name_and_seed() -> None:
    def draw(seed: int, *name: str) -> float:
        return float(generator(seed, *name).random())

    assert draw(0, "a", "b") == draw(0, "a", "b")
    assert len({draw(0, "a", "b"), draw(1, "a", "b"), draw(0, "ab")}) == 3


def test_rollup_groups_and_keeps_invented_items_apart() -> None:
    items = pl.DataFrame(
        {
            "item": ["a", "b", "c", "z"],
            "lens": ["norm"] * 4,
            "relation": ["capital", "capital", "currency", "capital"],
            "language": ["en"] * 4,
            "frequency": ["high", "low", "high", "invented"],
            "name_length": ["short"] * 4,
            "invented": [False, False, False, True],
            "L_semantic": [4, 6, None, 1],
            "onset": [0.5, 0.75, None, 0.125],
        }
    )
    table = rollup_table(items, seed=0, resamples=50)

    def at(by: str, group: str, name: str = "L_semantic") -> dict[str, float]:
        (row,) = table.filter(by=by, group=group, measure=name).iter_rows(named=True)
        return row

    assert (at("all", "all")["n"], at("all", "all")["missing"]) == (3, 1)
    assert at("all", "all")["median"] == 5.0 and at("all", "all")["median_all"] == 6.0
    assert at("relation", "capital")["n"] == 2
    assert at("relation", "currency")["median"] is None
    assert at("frequency", "high")["found"] == 1
    assert at("relation/language", "capital/en")["median"] == 5.0
    assert at("novelty", "invented")["median"] == 1.0
    assert "invented" not in table.filter(by="frequency")["group"].to_list()
