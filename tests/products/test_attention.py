"""Attention of many short rows in one call, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

pytest.importorskip("numba")

from layerscope.products import attention
from layerscope.products.attention import causal_attention

if not attention.suits(torch.zeros(1)):
    pytest.skip("this machine has no wide vectors (AVX-512)", allow_module_level=True)

# Heads, heads of keys, widths of keys and of values, columns: none needs to be a round number.
SHAPES = [(12, 4, 64, 64, 16), (4, 4, 16, 16, 9), (4, 2, 20, 12, 9), (3, 1, 7, 5, 40)]
SHAPES += [(2, 2, 33, 64, 70), (1, 1, 1, 1, 1), (6, 2, 128, 96, 33)]


def _rows(n_columns: int) -> Tensor:
    """Return rows of many beginnings, of which some end before the last column."""
    found: list[tuple[int, int, int, int]] = []
    begin = 0
    for column in sorted({0, n_columns // 3, n_columns // 2, n_columns - 1}):
        for row in (0, 1, 0):
            width = max(1, n_columns - column - (row == 1))
            found.append((begin, column, width, row))
            begin += width
    return torch.tensor(found)


def _given(
    heads: int, kv_heads: int, d: int, d_value: int, n_columns: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(heads + d)
    rows = _rows(n_columns)
    n_tokens = int(rows[:, 2].sum())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Heads of a token lie side by side, as projections leave them.
    query, key, value = (
        draw(n_tokens, n, width).transpose(0, 1)
        for n, width in ((heads, d), (kv_heads, d), (kv_heads, d_value))
    )
    past = draw(2, kv_heads, n_columns, d), draw(2, kv_heads, n_columns, d_value)
    return query, key, value, past, rows


def _expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    rows: Tensor,
    scale: float,
) -> Float[Tensor, "token head d_value"]:
    sharing = len(query) // len(key)
    found: list[Tensor] = []
    for begin, column, width, row in rows.tolist():
        own = slice(begin, begin + width)
        keys, values = (
            torch.cat([stored[row, :, :column], fresh[:, own]], dim=1)
            .double()
            .repeat_interleave(sharing, 0)
            for stored, fresh in zip(past, (key, value), strict=True)
        )
        scores = query[:, own].double() @ keys.mT * scale
        hidden = torch.ones(width, column + width, dtype=torch.bool).triu(column + 1)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
        found.append(mixed.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_it_is_the_formula(shape: tuple[int, int, int, int, int], scale: float) -> None:
    query, key, value, past, rows = _given(*shape)
    expected = _expected(query, key, value, past, rows, scale)
    found = causal_attention(query, key, value, past, rows, scale=scale)
    # A score is a sum of d products; the softmax raises its error to a relative one.
    bound = 2e-6 * (1 + scale * shape[2] ** 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * 4)
    ends = (rows[:, 0] + rows[:, 2] - 1).tolist()
    last = causal_attention(query, key, value, past, rows, scale=scale, ends=True)
    assert torch.equal(last[ends], found[ends])
    rest = [at for at in range(len(found)) if at not in ends]
    assert not last[rest].any()


def test_other_rows_threads_and_layouts_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, past, rows = _given(12, 4, 64, 64, 16)
    whole = causal_attention(query, key, value, past, rows, scale=0.125)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(causal_attention(query, key, value, past, rows, scale=0.125), whole)
    packed = [part.contiguous() for part in (query, key, value)]
    assert torch.equal(causal_attention(*packed, past, rows, scale=0.125), whole)
    for begin, column, width, row in rows.tolist():
        own = slice(begin, begin + width)
        parts = [part[:, own] for part in (query, key, value)]
        alone = torch.tensor([[0, column, width, row]])
        assert torch.equal(causal_attention(*parts, past, alone, scale=0.125), whole[own])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    query, key, values, past, rows = _given(4, 2, 16, 16, 12)
    clean = causal_attention(query, key, values, past, rows, scale=0.25)
    begin, _, width, _ = rows[4].tolist()
    query[1, begin] = value
    found = causal_attention(query, key, values, past, rows, scale=0.25)
    assert found[begin, 1].isnan().all()
    rest = [at for at in range(len(found)) if not begin <= at < begin + width]
    assert torch.equal(found[rest], clean[rest])


def test_scores_far_apart_leave_one() -> None:
    query, key, value, past, rows = _given(2, 2, 8, 8, 6)
    found = causal_attention(1e6 * query, key, value, past, rows, scale=1.0)
    expected = _expected(1e6 * query, key, value, past, rows, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_nothing_outside_is_read() -> None:
    query, key, value, past, rows = _given(2, 2, 8, 8, 6)
    for place, wrong in ((0, 99), (0, -1), (1, 7), (1, -1), (2, 3), (3, 2), (3, -1)):
        bad = rows.clone()
        bad[1, place] = wrong
        with pytest.raises(AssertionError):
            causal_attention(query, key, value, past, bad, scale=1.0)
    smaller = past[0][:, :1], past[1]
    with pytest.raises(AssertionError):
        causal_attention(query, key, value, smaller, rows, scale=1.0)
