"""Rank agreement against its definitions, and scipy where scipy has the measure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from layerscope.errors import TableError
from layerscope.measures.agreement import (
    average_ranks,
    jaccard,
    kendall_tau_b,
    list_agreement,
    rank_biased_overlap,
    spearman,
)


def test_ranks_with_ties_are_averaged() -> None:
    assert average_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize("levels", [3, 8, 1000])
def test_correlations_equal_scipy_with_and_without_ties(levels: int) -> None:
    random = np.random.default_rng(levels)
    a, b = (random.integers(0, levels, 40).astype(float).tolist() for _ in range(2))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert kendall_tau_b(a, b) == pytest.approx(kendalltau(a, b, variant="b").statistic, abs=1e-12)


def test_correlations_that_do_not_exist() -> None:
    assert spearman([1.0], [2.0]) is None
    assert kendall_tau_b([], []) is None
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert kendall_tau_b([1.0, 2.0], [5.0, 5.0]) is None
    with pytest.raises(TableError, match="cannot correlate 2 values with 1"):
        spearman([1.0, 2.0], [1.0])


def test_spearman_depends_on_order_alone() -> None:
    # The rank of one token deep in the vocabulary must not decide the correlation.
    assert spearman([1, 2, 3, 4], [1, 2, 3, 100_000]) == pytest.approx(1.0)
    near = list_agreement([1, 2, 3, 4], [1, 2], ranks_in_second=[2, 1, 3, 4])
    far = list_agreement([1, 2, 3, 4], [1, 2], ranks_in_second=[2, 1, 30, 90_000])
    assert near["spearman_top50"] == far["spearman_top50"] == pytest.approx(0.8)


def test_overlap_of_sets() -> None:
    assert jaccard([1, 2, 3], [3, 4]) == 0.25
    assert (jaccard([], []), jaccard([], [1])) == (1.0, 0.0)


def test_rank_biased_overlap_by_hand() -> None:
    # Overlaps 0, 1, 2 at depths 1, 2, 3; the last agreement, 2/3, is extrapolated.
    p = 0.9
    weighted = (1 - p) / p * (0 * p + 1 / 2 * p**2 + 2 / 3 * p**3)
    expected = 2 / 3 * p**3 + weighted
    assert rank_biased_overlap([1, 2, 3], [2, 4, 1], p=p) == pytest.approx(expected, abs=1e-12)
    assert rank_biased_overlap([5, 6], [5, 6]) == pytest.approx(1.0)
    assert rank_biased_overlap([5, 6], [7, 8]) == 0.0
    assert rank_biased_overlap([], [7]) is None
    assert rank_biased_overlap([1, 2, 9], [1, 2]) == pytest.approx(1.0)  # to the shorter's depth


def test_ties_are_the_mean_over_all_ways_to_break_them() -> None:
    first, second = [1, 2, 3, 4], [3, 1, 5, 2]
    scores = [9.0, 7.0, 7.0, 7.0]
    ways = [rank_biased_overlap([1, *rest], second) for rest in itertools.permutations([2, 3, 4])]
    tied = rank_biased_overlap(first, second, first_scores=scores)
    assert tied == pytest.approx(float(np.mean([way for way in ways if way is not None])))
    assert tied != pytest.approx(rank_biased_overlap(first, second))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": [1, 1], "second": [1, 2]}, "names an item twice"),
        ({"first": [1, 2], "second": [1, 2], "p": 1.0}, "persistence is 1.0"),
        ({"first": [1, 2], "second": [1, 2], "first_scores": [1.0]}, "1 scores for 2 items"),
    ],
)
def test_lists_that_cannot_be_compared(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TableError, match=message):
        rank_biased_overlap(**arguments)  # type: ignore[arg-type]


def test_lists_agree_by_overlap_order_and_depth() -> None:
    same = list_agreement(range(50), range(50))
    assert same == {
        "jaccard@10": 1.0,
        "jaccard@50": 1.0,
        "spearman_top50": pytest.approx(1.0),
        "kendall_top50": pytest.approx(1.0),
        "rbo": pytest.approx(1.0),
    }
    turned = list_agreement(range(50), range(50)[::-1])
    assert turned["jaccard@50"] == 1.0
    assert turned["jaccard@10"] == 0.0
    assert turned["kendall_top50"] == pytest.approx(-1.0)
    # Missing tokens tie for the rank after the end: 1, 2 against 2, 3 and tied third places.
    assert list_agreement([1, 2], [2, 3])["spearman_top50"] == spearman([1, 2, 3], [3, 1, 2])
    with pytest.raises(TableError, match="1 ranks for 2 tokens"):
        list_agreement([1, 2], [1, 2], ranks_in_second=[1])
