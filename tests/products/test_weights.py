"""What is made of weights is made once in a scope, and never outlives a change."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from layerscope.products import weights
from layerscope.products.weights import keeps, kept, weights_kept


@dataclass
class _Made:
    parts: Tensor


def _counting(made: list[int]) -> _Made:
    made.append(1)
    return _Made(torch.empty(16, dtype=torch.uint8))


def test_a_weight_is_taken_apart_once_in_a_scope() -> None:
    weight, made = torch.nn.Parameter(torch.randn(4, 3)), list[int]()
    kept(weight.T, 0, lambda: _counting(made))
    assert not keeps()
    with weights_kept():
        assert keeps()
        first = kept(weight.T, 0, lambda: _counting(made))
        with weights_kept():
            assert kept(weight.T, 0, lambda: _counting(made)) is first
        assert kept(weight.T, 1, lambda: _counting(made)) is not first
        assert kept(weight, 0, lambda: _counting(made)) is not first
    kept(weight.T, 0, lambda: _counting(made))
    assert len(made) == 5


def test_a_weight_that_changes_and_what_is_no_weight_are_taken_apart_again() -> None:
    weight, made = torch.nn.Parameter(torch.randn(4, 3)), list[int]()
    plain = torch.randn(4, 3)
    with weights_kept():
        kept(weight, 0, lambda: _counting(made))
        with torch.no_grad():
            weight.add_(1.0)
        kept(weight, 0, lambda: _counting(made))
        for _ in range(2):
            kept(plain, 0, lambda: _counting(made))
    assert len(made) == 4


def test_no_more_is_kept_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_BYTES", 20)
    one, other = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    made: list[int] = []
    with weights_kept():
        for _ in range(2):
            for each in (one, other):
                kept(each, 0, lambda: _counting(made))
    assert len(made) == 3
