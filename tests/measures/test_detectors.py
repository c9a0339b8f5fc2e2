from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope.measures.detectors import (
    Milestone,
    depth_fraction,
    difference,
    earliest,
    first_true,
    median,
    milestone,
    percentile,
    percentile_row,
    quartiles,
    run_of_two,
)


def found(*values: int, layers: list[int] | None = None, n_layers: int | None = None) -> Milestone:
    index = np.array(layers if layers is not None else range(len(values)), dtype=int)
    n = n_layers if n_layers is not None else max(1, len(values) - 1)
    return milestone(np.array(values, dtype=bool), index, n_layers=n)


def test_never_true() -> None:
    assert found(0, 0, 0) == Milestone(first=None, stable=None, lost=(), fraction=None)


def test_no_rows() -> None:
    assert found(n_layers=4) == Milestone(first=None, stable=None, lost=(), fraction=None)


def test_always_true_is_stable_from_the_first_row() -> None:
    assert found(1, 1, 1) == Milestone(first=0, stable=0, lost=(), fraction=0.0)


def test_true_at_the_end_only() -> None:
    assert found(0, 0, 0, 1) == Milestone(first=3, stable=3, lost=(), fraction=1.0)


def test_lost_and_found_again() -> None:
    assert found(0, 1, 0, 1, 1) == Milestone(first=1, stable=3, lost=(2,), fraction=0.25)


def test_lost_for_good() -> None:
    assert found(0, 1, 1, 0) == Milestone(first=1, stable=None, lost=(3,), fraction=0.333)


def test_lost_twice() -> None:
    assert found(1, 0, 1, 0, 1).lost == (1, 3)


def test_one_row() -> None:
    assert found(1, n_layers=1) == Milestone(first=0, stable=0, lost=(), fraction=0.0)
    assert found(0, n_layers=1).first is None


def test_layers_need_not_start_at_zero() -> None:
    assert found(0, 1, 1, layers=[1, 2, 3], n_layers=3) == Milestone(2, 2, (), 0.667)


def test_to_dict_is_json_able() -> None:
    assert found(1, 0, 1).to_dict() == {"first": 0, "stable": 2, "lost": [1], "fraction": 0.0}


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_milestone_agrees_with_its_definition(values: list[bool]) -> None:
    result = found(*map(int, values))
    rows = range(len(values))
    assert result.first == next((i for i in rows if values[i]), None)
    assert result.stable == next((i for i in rows if all(values[i:])), None)
    assert result.lost == tuple(i for i in rows if i and values[i - 1] and not values[i])


def test_first_true_returns_a_layer_not_an_index() -> None:
    assert first_true(np.array([False, True]), np.array([5, 9])) == 9


def test_run_of_two() -> None:
    runs = run_of_two(np.array([True, False, True, True, True]))
    np.testing.assert_array_equal(runs, [False, False, True, True])
    assert run_of_two(np.array([True])).size == 0


def test_depth_fraction() -> None:
    assert depth_fraction(26, 32) == 0.812
    assert depth_fraction(None, 32) is None
    assert depth_fraction(0, 0) is None


def test_difference_and_earliest() -> None:
    assert difference(5, 3) == 2
    assert difference(None, 3) is None
    assert difference(3, None) is None
    assert difference(3, 0) == 3
    assert earliest([None, 4, 0, 7]) == 0
    assert earliest([None]) is None


def test_percentile_interpolates_between_ranks() -> None:
    values = np.array([4.0, 1.0, 3.0, 2.0])
    assert percentile(values, 0.25) == pytest.approx(1.75)
    assert percentile(values, 0.0) == 1.0
    assert percentile(values, 1.0) == 4.0
    assert quartiles(np.array([1.0, 2.0, 3.0])) == {"p25": 1.5, "p50": 2.0, "p75": 2.5}


def test_percentile_leaves_out_what_is_not_known() -> None:
    assert percentile(np.array([np.nan, 2.0]), 0.5) == 2.0
    assert percentile(np.array([np.nan]), 0.5) is None
    assert percentile(np.array([]), 0.5) is None
    assert median([None, 3, 1]) == 2.0
    assert median([None]) is None


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0]),
)
def test_percentile_equals_numpys_linear_one(values: list[float], q: float) -> None:
    array = np.array(values)
    assert percentile(array, q) == pytest.approx(float(np.quantile(array, q)), abs=1e-6)


@pytest.mark.parametrize(
    ("n_layers", "q", "row"), [(46, 0.25, 12), (42, 0.25, 10), (32, 0.75, 24), (5, 0.5, 2)]
)
def test_percentile_row_rounds_halves_to_even(n_layers: int, q: float, row: int) -> None:
    assert percentile_row(n_layers, q) == row
