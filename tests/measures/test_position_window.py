"""The share of positions at which the onset row has found the gold token."""

from __future__ import annotations

import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.position_window import position_grid, position_window


def test_the_grid_keeps_the_first_of_equal_positions() -> None:
    # The published grid of a prompt of 17 tokens.
    assert position_grid(17) == {0.2: 3, 0.4: 6, 0.6: 10, 0.8: 13, 0.92: 15, 0.98: 16}
    assert position_grid(1) == {0.2: 0}
    assert position_grid(6) == {0.2: 1, 0.4: 2, 0.6: 3, 0.8: 4, 0.92: 5}
    with pytest.raises(TableError, match="at least one token"):
        position_grid(0)


@pytest.mark.parametrize(
    ("ranks", "share", "stable"),
    [((1, 1, 2, 1), 0.75, True), ((1, 2, 1, 5), 0.5, True), ((1, 2, 3, 4), 0.25, False)],
)
def test_the_share_and_its_gate(ranks: tuple[int, ...], share: float, stable: bool) -> None:
    gold = {i / 4: {7: rank, 8: 1} for i, rank in enumerate(ranks)}
    found = position_window(gold, semantic=7, strong_run2=8)
    assert (found["rank1_frac"], found["rank1_frac_strong_run2"]) == (share, 1.0)
    assert (found["n_positions"], found["n_known"]) == (4, 4)
    assert found["gate"] == {"position_window_stable": stable}


def test_unknown_ranks_are_not_failures() -> None:
    gold = {0.2: {7: None}, 0.5: {}, 1.0: {7: 1}}
    found = position_window(gold, semantic=7)
    assert (found["rank1_frac"], found["n_positions"], found["n_known"]) == (1.0, 3, 1)
    assert found["gate"] == {"position_window_stable": None}  # one position says nothing of others
    found = position_window(gold, semantic=None)
    assert found["rank1_frac"] is None
    assert found["gate"] == {"position_window_stable": None}
    strict = position_window({0.1: {7: 1}, 0.9: {7: 2}}, semantic=7)
    assert strict["gate"]["position_window_stable"] is True
    config = MeasureConfig(position_share=0.6)
    stricter = position_window({0.1: {7: 1}, 0.9: {7: 2}}, semantic=7, config=config)
    assert stricter["gate"]["position_window_stable"] is False
    with pytest.raises(TableError, match="no positions"):
        position_window({}, semantic=7)
