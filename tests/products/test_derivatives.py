"""Backward passes in one go, against torch's in float64, for one cotangent and for many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("numba")

from layerscope.products import derivatives

if not derivatives.openmp.available():
    pytest.skip("torch's threads cannot be asked here", allow_module_level=True)

UNIT = 2.0**-24
Function = Callable[..., Tensor]


def gradients(
    function: Function, inputs: tuple[Tensor, ...], cotangents: Tensor
) -> tuple[Tensor, ...]:
    """Pull every cotangent back by `torch.vmap`."""
    leaves = [value.detach().clone().requires_grad_(True) for value in inputs]
    made = function(*leaves)

    def one(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(made, leaves, cotangent, retain_graph=True)

    return torch.vmap(one)(cotangents)


def one_by_one(
    function: Function, inputs: tuple[Tensor, ...], cotangents: Tensor
) -> tuple[Tensor, ...]:
    leaves = [value.detach().clone().requires_grad_(True) for value in inputs]
    made = function(*leaves)
    found = [torch.autograd.grad(made, leaves, each, retain_graph=True) for each in cotangents]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def check(
    mine: Function, plain: Function, inputs: tuple[Tensor, ...], n: int, bound: float
) -> None:
    """Compare with the plain function in float64, in units of the largest of each gradient."""
    generator = torch.Generator().manual_seed(1)
    made = mine(*inputs)
    cotangents = torch.randn((n, *made.shape), generator=generator)
    wide = tuple(value.double() for value in inputs)
    exact = one_by_one(plain, wide, cotangents.double())
    for found in (
        gradients(mine, inputs, cotangents),
        one_by_one(mine, inputs, cotangents),
        # As a transposed product hands them on.
        gradients(mine, inputs, cotangents.transpose(0, -2).contiguous().transpose(0, -2)),
    ):
        for value, expected in zip(found, exact, strict=True):
            assert value.shape == expected.shape
            assert (value - expected).abs().max() <= bound * UNIT * expected.abs().max()


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain.to(x) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x)[:, None] + turned * sin.to(x)[:, None]


@pytest.mark.parametrize("shape", [(3, 17), (1, 70, 768), (2, 5, 3, 8)])
def test_a_norm_passes_the_gradient_of_its_formula(shape: tuple[int, ...]) -> None:
    x, gain = torch.randn(shape) * 8, torch.randn(shape[-1])
    check(
        lambda values: derivatives.rms_norm(values, gain, 1e-5),
        lambda values: plain_norm(values, gain),
        (x,),
        n=5,
        bound=16,
    )


@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 8), (70, 12, 64)])
def test_a_rotary_embedding_passes_the_gradient_of_its_formula(shape: tuple[int, ...]) -> None:
    x, (cos, sin) = torch.randn(shape), torch.randn(2, shape[0], shape[2])
    check(
        lambda values: derivatives.rotate(values, cos, sin),
        lambda values: plain_rotation(values, cos, sin),
        (x,),
        n=5,
        bound=4,
    )


def attention_of(*, causal: bool, mine: bool) -> Function:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def kernel() -> Tensor:
            return scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=0.3, enable_gqa=True
            )

        if not mine:
            return kernel()
        return derivatives.attention(kernel, query, key, value, scale=0.3, causal=causal)

    return function


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "n_rows"), [(4, 4, 1), (6, 2, 1), (4, 1, 3)])
@pytest.mark.parametrize("most", [2**24, 900])
def test_attention_passes_the_gradient_of_its_formula(
    heads: int,
    kv_heads: int,
    n_rows: int,
    causal: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(derivatives, "MOST_SCORES", most)  # the second: in two parts or more
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n_rows, heads, 9, 8, generator=generator)
    key = torch.randn(n_rows, kv_heads, 9, 8, generator=generator)
    value = torch.randn(n_rows, kv_heads, 9, 8, generator=generator)
    mine, plain = (attention_of(causal=causal, mine=way) for way in (True, False))
    assert torch.equal(mine(query, key, value), plain(query, key, value))
    check(mine, plain, (query, key, value), n=5, bound=32)


def test_values_may_be_wider_than_keys() -> None:
    query, key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 6)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.3).softmax(-1) @ value

    check(attention_of(causal=False, mine=True), plain, (query, key, value), n=3, bound=32)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_may_be_fewer_than_keys(causal: bool) -> None:
    query, (key, value) = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 7, 8)
    mine, plain = (attention_of(causal=causal, mine=way) for way in (True, False))
    check(mine, plain, (query, key, value), n=3, bound=32)


def test_threads_change_no_bit() -> None:
    x, gain = torch.randn(1, 300, 96), torch.randn(96)
    cotangents = torch.randn(7, 1, 300, 96)
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found += gradients(lambda v: derivatives.rms_norm(v, gain, 1e-5), (x,), cotangents)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    made = derivatives.rms_norm(x, torch.ones(8), 1e-5)
    (slope,) = torch.autograd.grad(made.square().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(slope.sum(), x)


def test_what_attention_takes() -> None:
    def heads(n: int, length: int = 5) -> Tensor:
        return torch.randn(1, n, length, 8)

    assert derivatives.takes(heads(4), heads(2), heads(2))
    assert not derivatives.takes(heads(4), heads(3), heads(3))
    assert not derivatives.takes(heads(4).double(), heads(4).double(), heads(4).double())
    assert not derivatives.takes(heads(4)[0], heads(4)[0], heads(4)[0])
    long = torch.empty(1, 1, 1, 8).expand(1, 8, 2048, 8)
    assert not derivatives.takes(long, long, long)
