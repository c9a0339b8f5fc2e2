"""Packing rows into tiles: every row once, with its reference, inside the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope.errors import ConfigError
from layerscope.readout import plan as module
from layerscope.readout.plan import SCRATCH, Budget, Tile, plan


def _budget(rows: int, *, workers: int = 1) -> Budget:
    return Budget.of(4 * 1000 * rows, d_vocab=1000, d_model=8, converted=False, workers=workers)


def _bytes(tile: Tile, budget: Budget) -> int:
    n_groups, n_slots = tile.slots.shape
    worked_on = n_slots * min(budget.worked_on(n_slots), n_groups)
    return 4 * budget.d_vocab * (tile.slots.numel() + SCRATCH * worked_on * budget.workers)


@given(
    n_rows=st.integers(1, 60),
    seed=st.integers(0, 1000),
    rows=st.integers(20, 300),
    workers=st.integers(1, 4),
    form=st.sampled_from(["none", "own", "separate"]),
    paired=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once_with_its_partners(
    n_rows: int, seed: int, rows: int, workers: int, form: str, paired: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_references = 4 if form == "separate" else None
    limit = n_references or n_rows
    index = None
    if form != "none":
        index = torch.randint(-1, limit, (n_rows,), generator=generator)
    budget = _budget(rows, workers=workers)
    tiles = plan(
        n_rows=n_rows, index=index, n_references=n_references, paired=paired, budget=budget
    )
    seen: list[int] = []
    for tile in tiles:
        assert _bytes(tile, budget) <= 4 * 1000 * rows
        n = tile.n_out
        for slots in tile.slots.tolist():
            seen += slots[:n]
            if paired:
                assert slots[n : 2 * n] == [n_rows + (n_references or 0) + row for row in slots[:n]]
            targets = {-1 if index is None else int(index[row]) for row in slots[:n]}
            if tile.reference is None:
                assert targets == {-1}
            else:
                offset = n_rows if n_references else 0
                assert {slots[tile.reference] - offset} == targets
    assert sorted(seen) == list(range(n_rows))


def test_a_reference_among_the_rows_takes_no_slot_of_its_own() -> None:
    index = torch.tensor([4, 4, 4, 4, 4])
    (tile,) = plan(n_rows=5, index=index, n_references=None, paired=False, budget=_budget(1000))
    assert tile.own_reference
    assert tile.slots.tolist() == [[0, 1, 2, 3, 4]]


def test_a_large_job_stays_within_its_budget() -> None:
    """32 blocks x 2,048 positions x 128,256 tokens in 256 MiB."""
    bytes_allowed = 256 * 2**20
    n_rows = 33 * 2048
    budget = Budget.of(bytes_allowed, d_vocab=128_256, d_model=1024, converted=False, workers=2)
    tiles = plan(
        n_rows=n_rows,
        index=32 * 2048 + torch.arange(2048).repeat(33),
        n_references=None,
        paired=False,
        budget=budget,
    )
    assert max(_bytes(tile, budget) for tile in tiles) <= bytes_allowed
    assert sum(tile.slots.numel() for tile in tiles) == n_rows  # no row is computed twice
    assert tiles[0].slots.numel() >= 128  # and products stay large


def test_the_scratch_of_all_workers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKING_SET", 10 * 1000)
    budget = _budget(1000, workers=4)
    assert budget.workers == 4
    tiles = plan(n_rows=3000, index=None, n_references=None, paired=False, budget=budget)
    assert max(_bytes(tile, budget) for tile in tiles) == 4 * 1000 * 1000  # spent, not overspent


@pytest.mark.parametrize("mib", [8, 64, 256])
def test_converted_weights_stay_within_their_share(mib: int) -> None:
    budget = Budget.of(mib * 2**20, d_vocab=50_000, d_model=2048, converted=True)
    assert 4 * 2048 * budget.slice <= mib * 2**20 // 4
    assert budget.slice < 50_000
    assert 4 * 50_000 * budget.rows + 4 * 2048 * budget.slice <= mib * 2**20


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match="pass at least") as caught:
        Budget.of(1000, d_vocab=1000, d_model=8, converted=False)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    assert Budget.of(enough, d_vocab=1000, d_model=8, converted=False).group >= 4
    assert Budget.of(enough, d_vocab=1000, d_model=8, converted=True).group >= 4
