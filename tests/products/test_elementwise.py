"""Gates and activations in one pass, against the same formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

pytest.importorskip("numba")

from layerscope.products import elementwise

Formula = Callable[[Tensor, Tensor], Tensor]
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "gelu": (lambda x, _y: elementwise.gelu(x), lambda x, _y: gelu(x, approximate="tanh")),
    "gelu_gate": (elementwise.gelu_gate, lambda x, y: gelu(x, approximate="tanh") * y),
    "silu_gate": (elementwise.silu_gate, lambda x, y: silu(x) * y),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (1, 4, 4096), (70, 1000)])
def test_each_is_its_formula_to_a_few_roundings(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=generator) * 8, torch.randn(shape, generator=generator)
    mine, exact = FORMULAS[name]
    expected = exact(x.double(), y.double())
    unit = 2.0**-24
    # Where the sigmoid is tiny, its power of two has the rounding of an exponent of up to 126.
    bound = 8 * unit * expected.abs() + 64 * unit * torch.exp2(-x.double().abs())
    bound = bound * y.double().abs().clamp_min(1) + 1e-30
    assert ((mine(x, y) - expected).abs() <= bound).all()
    assert not ((mine(x.bfloat16().float(), y) - expected).abs() <= bound).all() or x.numel() == 1


@pytest.mark.parametrize("name", FORMULAS)
def test_threads_change_no_bit(name: str) -> None:
    x, y = torch.randn(3, 40_001), torch.randn(3, 40_001)
    mine = FORMULAS[name][0]
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(mine(x, y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_not_finite_stays_so_and_far_tails_vanish(name: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 300.0, -300.0, 0.0, 1e12, -1e12])
    found = FORMULAS[name][0](x, torch.ones(8))
    assert not found[:3].isfinite().any()
    torch.testing.assert_close(found[3:], x[3:].clamp_min(0.0), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 70, 768), (40_001, 3)])
def test_a_norm_is_its_formula_to_a_few_roundings(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 8
    gain = torch.randn(shape[-1], generator=generator)
    wide = x.double()
    exact = gain.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = elementwise.rms_norm(x, gain, 1e-5)
    bound = (8 + shape[-1] / 16) * 2.0**-24 * exact.abs()
    assert ((found - exact).abs() <= bound).all()
    assert not ((elementwise.rms_norm(x, gain, 1e-2) - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 8), (700, 12, 64)])
def test_a_rotary_embedding_is_torchs_bit_for_bit(shape: tuple[int, int, int]) -> None:
    x, (cos, sin) = torch.randn(shape), torch.randn(2, shape[0], shape[2])
    half = shape[2] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    expected = x * cos[:, None] + turned * sin[:, None]
    assert torch.equal(elementwise.rotate(x, cos, sin), expected)


def test_what_does_not_suit_is_said() -> None:
    x = torch.randn(4, 6)
    assert elementwise.suits(x) == elementwise.openmp.available()
    assert not elementwise.suits(x.T)
    assert not elementwise.suits(x, x.double())
