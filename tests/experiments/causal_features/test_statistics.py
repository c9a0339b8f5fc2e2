"""Effect sizes, tests and power against scipy, hand-made numbers and simulation."""

from __future__ import annotations

from math import gamma, sqrt
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from layerscope.experiments.causal_features.statistics import (
    Sums,
    contrast,
    detectable,
    hedges_factor,
    paired,
    paired_power,
    q_values,
)


def sums(values: np.ndarray, chunk: int = 7) -> Sums:
    found = Sums.empty(values.shape[1])
    for first in range(0, len(values), chunk):
        found.add(values[first : first + chunk])
    return found


def test_sums_give_what_whole_columns_give() -> None:
    rng = np.random.default_rng(0)
    safe = np.maximum(rng.normal(0.3, 1.0, (41, 50)), 0)
    risky = np.maximum(rng.normal(0.5, 2.0, (23, 50)), 0)
    found = contrast(sums(safe), sums(risky))
    expected: Any = stats.ttest_ind(risky, safe, equal_var=False)
    np.testing.assert_allclose(found["t"].to_numpy(), expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(found["p"].to_numpy(), expected.pvalue, rtol=1e-8)
    np.testing.assert_allclose(found["df"].to_numpy(), expected.df, rtol=1e-10)
    pooled = np.sqrt((40 * safe.var(0, ddof=1) + 22 * risky.var(0, ddof=1)) / 62)
    d = (risky.mean(0) - safe.mean(0)) / pooled
    np.testing.assert_allclose(found["cohen_d"].to_numpy(), d, rtol=1e-10)
    np.testing.assert_allclose(found["safe_active"].to_numpy(), (safe > 0).mean(0))


def test_a_difference_worked_out_by_hand() -> None:
    found = contrast(sums(np.array([[1.0], [2.0], [3.0]])), sums(np.array([[3.0], [5.0], [7.0]])))
    row = found.row(0, named=True)
    assert row["cohen_d"] == pytest.approx(3 / sqrt(2.5))
    assert row["t"] == pytest.approx(3 / sqrt(1 / 3 + 4 / 3))
    assert row["df"] == pytest.approx((5 / 3) ** 2 / ((1 / 9 + 16 / 9) / 2))
    exact = gamma(2.0) / (sqrt(2.0) * gamma(1.5))
    assert hedges_factor(4) == pytest.approx(exact)
    assert row["hedges_g"] == pytest.approx(row["cohen_d"] * exact)


def test_what_is_dead_or_constant_has_no_test() -> None:
    safe = np.array([[0.0, 2.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 0.0]])
    risky = np.array([[0.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    found = contrast(sums(safe), sums(risky))
    assert found["dead"].to_list() == [True, False, False]
    assert found["p"].is_null().to_list() == [True, True, False]
    assert found["cohen_d"].is_null().to_list() == [True, True, False]
    assert not any(found[name].is_nan().any() for name in found.columns if name != "dead")


def test_a_large_mean_does_not_eat_the_variance() -> None:
    rng = np.random.default_rng(1)
    values = (1000.0 + rng.normal(0, 1e-3, (200, 1))).astype(np.float32)
    expected = values.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(sums(values).variance, expected, rtol=1e-3)


def test_a_planted_null_gives_few_discoveries_and_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(2)
    safe, risky = rng.normal(size=(60, 4000)), rng.normal(size=(60, 4000))
    null = contrast(sums(safe), sums(risky))
    assert (q_values(null["p"]) < 0.05).sum() <= 10
    assert (null["p"] < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    risky[:, :40] += 1.5
    found = contrast(sums(safe), sums(risky))
    told = (q_values(found["p"]) < 0.05).to_numpy()
    assert told[:40].all()
    assert told[40:].sum() <= 10


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    p = pl.Series("p", [0.01, None, 0.04, 0.03, 0.5])
    expected = [0.04, None, 0.16 / 3, 0.16 / 3, 0.5]
    for value, wanted in zip(q_values(p).to_list(), expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted))


def test_pairs_are_tested_exactly_and_invalid_ones_left_out() -> None:
    before = [False] * 8 + [True, True, None, True]
    after = [True] * 6 + [False, False, False, True, True, None]
    found = paired(before, after)
    assert (found.n, found.gained, found.lost) == (10, 6, 1)
    assert found.effect == pytest.approx(0.5)
    assert found.p == pytest.approx(stats.binomtest(1, 7).pvalue)
    assert found.low is not None and found.high is not None and found.effect is not None
    assert found.low < found.effect < found.high
    assert paired([None], [True]).p is None
    assert paired([True, False], [True, False]).p == 1.0


def test_power_is_what_simulation_gives() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(2000):
        draws = rng.choice(3, size=60, p=[0.18, 0.05, 0.77])
        up, down = int((draws == 0).sum()), int((draws == 1).sum())
        hits += up + down > 0 and stats.binomtest(up, up + down).pvalue <= 0.05
    assert paired_power(60, 0.18, 0.05) == pytest.approx(hits / 2000, abs=0.04)
    least = detectable(60)
    assert least is not None
    assert paired_power(60, least) >= 0.8 > paired_power(60, least - 0.002)
    assert detectable(4) is None
