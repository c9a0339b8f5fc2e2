"""The most likely tokens, found through block maxima, against a plain sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerscope.readout import ranking


def _plain(logits: Tensor, k: int) -> list[list[int]]:
    return [
        sorted(range(len(row)), key=lambda token: (-row[token], token))[:k]
        for row in logits.tolist()
    ]


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two rows at a time, joined."""
    maxima = ranking.block_maxima(logits, ranking.block_length(logits.shape[1], k))
    pairs = zip(logits.split(2), maxima.split(2), strict=True)
    return ranking.Candidates.join([ranking.candidates(*pair, k) for pair in pairs]).largest(k)


def _check(logits: Tensor, k: int) -> None:
    values, ids = _top(logits, k)
    assert ids.tolist() == _plain(logits, k)
    assert torch.equal(values, logits.gather(1, ids))


@pytest.mark.parametrize("vocab", [7, 100, 333, 4096, 4100, 20_011])
@pytest.mark.parametrize("k", [1, 5, 7, 20])
def test_random_rows(vocab: int, k: int) -> None:
    if k <= vocab:
        _check(torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab + k)), k)


@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 3000),
    k=st.integers(1, 30),
    levels=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_rows_full_of_ties(seed: int, vocab: int, k: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, vocab), generator=generator).float()
    _check(logits, min(k, vocab))


def test_likely_tokens_that_are_all_neighbours() -> None:
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    logits[:, 640:1280] += 20
    _check(logits, 20)


def test_rows_of_equal_logits_beside_an_ordinary_one() -> None:
    logits = torch.zeros(3, 5000)
    logits[1] = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    _check(logits, 10)


def test_a_row_with_nan_gives_valid_ids_and_leaves_the_others() -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    expected = _plain(logits, 10)
    logits[1, 77] = torch.nan
    _, ids = _top(logits, 10)
    assert ids[[0, 2]].tolist() == [expected[0], expected[2]]
    assert ids[1].min() >= 0
    assert ids[1].max() < 5000


def test_jaccard() -> None:
    left, right = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[3, 4, 1], [3, 2, 1]])
    assert ranking.jaccard(left, right).tolist() == [0.5, 1.0]
