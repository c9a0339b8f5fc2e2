"""What holds for every readout, whatever the numbers."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerscope.readout import Divergences, Reference, Request, TokenSets, Unembedding, fused
from layerscope.readout import readout as any_readout

HAS_NUMBA = importlib.util.find_spec("numba") is not None
KERNELS = pytest.mark.parametrize(
    "kernels",
    ["plain", pytest.param("fused", marks=pytest.mark.skipif(not HAS_NUMBA, reason="no numba"))],
)
SEEDS = st.integers(0, 100_000)
TOLERANCE = 1e-4


def _rows(seed: int, rows: int, vocab: int, spread: float) -> tuple[Tensor, Unembedding]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 12, generator=generator) * spread
    return hidden, Unembedding(torch.randn(vocab, 12, generator=generator))


def _reference(result: Divergences | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert result is not None
    columns = (result.kl_to_bits, result.kl_from_bits, result.js_bits, result.l1)
    first, second, third, fourth = columns
    assert first is not None
    assert second is not None
    assert third is not None
    assert fourth is not None
    return first, second, third, fourth


@KERNELS
@given(seed=SEEDS, vocab=st.integers(2, 400), spread=st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_bounds_and_inequalities(
    seed: int, vocab: int, spread: float, kernels: fused.Kernels
) -> None:
    readout = functools.partial(any_readout, kernels=kernels)
    hidden, head = _rows(seed, 6, vocab, spread)
    result = readout(hidden, head, reference=Reference(index=torch.full((6,), 5)))
    assert result.entropy_bits is not None
    assert result.entropy_bits.min() >= 0
    assert result.entropy_bits.max() <= math.log2(vocab) + TOLERANCE
    kl_to, kl_from, js, l1 = _reference(result.reference)
    for divergence in (kl_to, kl_from, js, l1):
        assert divergence.min() >= 0
    assert js.max() <= 1
    assert l1.max() <= 2
    assert (js <= l1 / 2 + TOLERANCE).all()  # Lin (1991)
    for divergence in (kl_to, kl_from):  # Pinsker, in bits
        assert (l1.square() / (2 * math.log(2)) <= divergence + TOLERANCE).all()
    assert (js <= (kl_to + kl_from) / 4 + TOLERANCE).all()


@KERNELS
@given(seed=SEEDS, shift=st.floats(-200, 200), spread=st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_a_constant_added_to_all_logits_changes_no_distribution(
    seed: int, shift: float, spread: float, kernels: fused.Kernels
) -> None:
    readout = functools.partial(any_readout, kernels=kernels)
    hidden, head = _rows(seed, 5, 120, spread)
    moved = Unembedding(head.weight, bias=torch.full((120,), shift))
    reference = Reference(index=torch.full((5,), 4))
    plain, other = (readout(hidden, one, reference=reference) for one in (head, moved))
    assert plain.entropy_bits is not None
    assert other.entropy_bits is not None
    torch.testing.assert_close(plain.entropy_bits, other.entropy_bits, atol=1e-3, rtol=1e-3)
    for left, right in zip(_reference(plain.reference), _reference(other.reference), strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(plain.logsumexp + shift, other.logsumexp, atol=1e-3, rtol=1e-5)


@KERNELS
@given(seed=SEEDS, vocab=st.integers(3, 300))
@settings(max_examples=30, deadline=None)
def test_masses_ranks_and_lists_agree_with_each_other(
    seed: int, vocab: int, kernels: fused.Kernels
) -> None:
    readout = functools.partial(any_readout, kernels=kernels)
    hidden, head = _rows(seed, 4, vocab, 1.0)
    k = min(20, vocab)
    everything = TokenSets.of([range(vocab)], torch.zeros(4, 1, dtype=torch.long))
    first = readout(hidden, head, request=Request(top_k=k), token_sets=everything)
    assert first.top_ids is not None
    assert first.set_mass is not None
    torch.testing.assert_close(first.set_mass, torch.ones(4, 1), atol=1e-5, rtol=0)
    second = readout(hidden, head, request=Request(top_k=k), tokens=first.top_ids)
    assert second.token_rank is not None
    assert second.token_rank.tolist() == [list(range(1, k + 1))] * 4  # no ties in random logits
    torch.testing.assert_close(second.token_log2p, first.top_log2p)


@KERNELS
@given(seed=SEEDS, order=st.permutations(range(8)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(
    seed: int, order: list[int], kernels: fused.Kernels
) -> None:
    readout = functools.partial(any_readout, kernels=kernels)
    hidden, head = _rows(seed, 8, 90, 1.0)
    to = torch.tensor(order)
    target = readout(hidden, head, reference=Reference(index=torch.full((8,), 7)))
    moved = readout(hidden[to], head, reference=Reference(index=torch.full((8,), order.index(7))))
    for left, right in zip(_reference(target.reference), _reference(moved.reference), strict=True):
        torch.testing.assert_close(left[to], right, atol=TOLERANCE, rtol=TOLERANCE)
