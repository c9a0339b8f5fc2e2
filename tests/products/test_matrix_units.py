"""Products on the matrix units, against float64 and their own bound, and in torch's place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from layerscope.products.hardware import has_matrix_units
from layerscope.readout import Reference, Unembedding, fused, readout

if not has_matrix_units():
    pytest.skip("this machine has no matrix units (AMX), or no numba", allow_module_level=True)

from layerscope.products import choice, matrix_units, replacing
from layerscope.products.matrix_units import Columns, Rows, bound, product
from layerscope.products.weights import weights_kept

SHAPES = [
    *((1, 1, 1), (5, 7, 3), (16, 32, 16), (17, 33, 19), (32, 64, 32), (33, 65, 31)),
    *((70, 767, 300), (64, 768, 129), (90, 769, 40), (65, 1600, 70), (300, 100, 600)),
]


def _pair(m: int, k: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of very different sizes, entry by entry, whose sums cancel."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    return a * 2.0 ** torch.randint(-20, 20, (k,), generator=generator), b


def _check(found: Tensor, a: Tensor, b: Tensor, *, least: float = 1.0) -> None:
    exact, absolute = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((found - exact).abs() <= least * bound(a.shape[1]) * absolute).all()


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("layout", list(itertools.product((False, True), repeat=2)))
def test_every_shape_and_layout_is_within_the_bound(
    m: int, k: int, n: int, layout: tuple[bool, bool]
) -> None:
    a, b = _pair(m, k, n)
    if layout[0]:
        a = a.T.contiguous().T
    if layout[1]:
        b = b.T.contiguous().T
    _check(product(a, b), a, b)


def test_errors_are_those_of_float32_and_bfloat16_would_be_noticed() -> None:
    a, b = (part.clone() for part in (torch.randn(64, 700), torch.randn(700, 90)))
    exact = a.double() @ b.double()
    error, plain = ((found - exact).abs().max() for found in (product(a, b), a @ b))
    assert error <= 4 * plain
    with pytest.raises(AssertionError):
        _check(product(a.bfloat16().float(), b), a, b)
    # Without the smallest parts it would not be float32 either.
    cut = (a.view(torch.int32) & ~0xFF).view(torch.float32)
    assert (product(cut, b) - exact).abs().max() > 4 * plain


def test_views_with_other_strides() -> None:
    a, b = _pair(140, 96, 200)
    wide, tall = torch.full((140, 200), torch.nan), torch.full((200, 400), torch.nan)
    wide[:, 3:99], tall[:96, ::2] = a, b
    _check(product(wide[:, 3:99], tall[:96, ::2]), a, b)  # the second has no stride of 1
    out = torch.full((140, 300), 7.0)
    Columns.of(b).multiply(a, out[:, 50:250])
    _check(out[:, 50:250], a, b)
    assert (out[:, :50] == 7).all()
    assert (out[:, 250:] == 7).all()


def test_threads_and_other_rows_change_no_bit() -> None:
    a, b = _pair(500, 800, 130)
    columns = Columns.of(b)
    one, two, few = (torch.empty(n, 130) for n in (500, 500, 37))
    columns.multiply(a, one)
    Columns.of(b, threads=2).multiply(a, two, threads=2)
    columns.multiply(a[100:137], few)
    assert torch.equal(one, two)
    assert torch.equal(one[100:137], few)
    rows = Rows.of(a, threads=2)
    for threads in (1, 2):
        rows.multiply(b, two.zero_(), threads=threads)
        assert torch.equal(one, two)
    turned = torch.empty(130, 500)
    columns.multiply(a, turned.T)
    assert torch.equal(one, turned.T)
    bias = torch.randn(130)
    columns.multiply(a, one, bias=bias)
    columns.multiply(a[100:137], few, bias=bias)
    assert torch.equal(one[100:137], few)


@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 300)])
def test_a_factor_is_packed_piece_by_piece_where_it_is_large(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int
) -> None:
    a, b = _pair(m, 64, n)
    whole = product(a, b.T.contiguous().T)
    monkeypatch.setattr(matrix_units, "_PARTS_BYTES", 6 * 64 * 50)
    assert torch.equal(product(a, b.T.contiguous().T), whole)


@pytest.mark.parametrize(("m", "k", "n"), [(40, 70, 50), (90, 1600, 33), (33, 800, 400)])
def test_a_bias_is_added_once_to_every_row(m: int, k: int, n: int) -> None:
    a, b = _pair(m, k, n)
    bias = torch.randn(n)
    expected = (product(a, b).double() + bias).float()
    for found in (product(a, b, bias), product(a, b.T.contiguous().T, bias)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * a.abs().max().item())
    packed = (Columns.of(b).multiply, a), (Rows.of(a).multiply, b)
    for multiply, other in packed:
        wide = torch.full((m, n + 5), 7.0)
        multiply(other, wide[:, 2 : n + 2], bias=bias)
        torch.testing.assert_close(
            wide[:, 2 : n + 2], expected, rtol=1e-5, atol=1e-5 * a.abs().max().item()
        )
        assert (wide[:, :2] == 7).all()
        assert (wide[:, n + 2 :] == 7).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_touches_only_its_row(value: float) -> None:
    a, b = _pair(70, 100, 80)
    clean = product(a, b)
    a[3, 17] = value
    found = product(a, b)
    assert not found[3].isfinite().any()
    rest = torch.arange(70) != 3
    assert torch.equal(found[rest], clean[rest])
    payload = torch.full((70, 100), -1, dtype=torch.int32).view(torch.float32)
    assert product(payload, b).isnan().all()


def test_zeros_and_the_smallest_numbers() -> None:
    a, b = torch.zeros(64, 64), torch.randn(64, 64)
    assert (product(a, b) == 0).all()
    tiny = product(torch.full((64, 64), 1e-40), b)  # counts as zero
    assert tiny.abs().max() < 1e-37


def test_torch_in_a_scope_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, ...]] = []

    def counted(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        ran.append((*a.shape, b.shape[1]))
        return product(a, b, bias)

    monkeypatch.setattr(replacing.matrix_units, "product", counted)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(192, 1024)
    x = torch.randn(2, 200, 192, generator=generator, requires_grad=True)
    plain = layer(x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    with replacing.matrix_unit_products():
        mine = layer(x)
        (found,) = torch.autograd.grad(mine.square().sum(), x)
        with torch.inference_mode():
            inferred = layer(x)
        small = layer(x[0, :3])
    assert ran == [(400, 192, 1024), (400, 1024, 192), (400, 192, 1024)]
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inferred, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small, plain[0, :3], rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), plain)  # nothing is left of the scope
    assert len(ran) == 3


def test_a_batch_of_cotangents_is_pulled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Linear(256, 1024), torch.randn(64, 256, requires_grad=True)
    cotangents = torch.randn(5, 64, 1024)
    made = layer(x)
    (expected,) = torch.autograd.grad(made, x, cotangents, is_grads_batched=True, retain_graph=True)
    ran: list[int] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        ran.append(len(a))
        return product(a, b)

    monkeypatch.setattr(replacing.matrix_units, "product", counted)
    with replacing.matrix_unit_products():
        (found,) = torch.autograd.grad(made, x, cotangents, is_grads_batched=True)
    assert ran == [5 * 64]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scopes_nest_and_end_with_exceptions() -> None:
    a = torch.randn(420, 420)
    plain = a @ a
    with pytest.raises(ZeroDivisionError), replacing.matrix_unit_products():
        with replacing.matrix_unit_products():
            inner = a @ a
        assert torch.equal(a @ a, inner)
        raise ZeroDivisionError
    assert torch.equal(a @ a, plain)
    assert not torch.equal(inner, plain)


def test_weights_that_are_kept_change_no_bit() -> None:
    layer, x = torch.nn.Linear(800, 300), torch.randn(400, 800)
    with torch.no_grad(), replacing.matrix_unit_products():
        expected = layer(x)
        with weights_kept():
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x), expected)
            layer.weight.mul_(2.0)
            torch.testing.assert_close(layer(x) - layer.bias, 2 * (expected - layer.bias))


def test_what_does_not_suit_is_left_to_torch() -> None:
    with replacing.matrix_unit_products():
        double = torch.randn(100, 100, dtype=torch.float64)
        assert torch.equal(double @ double, torch.mm(double, double))
        assert (torch.randn(100, 0) @ torch.randn(0, 100)).shape == (100, 100)
        few = torch.randn(3, 100)
        a, b, bias = torch.randn(90, 100), torch.randn(100, 80), torch.randn(80)
        scaled = torch.addmm(bias, a, b, beta=2.0, alpha=3.0)
        torch.testing.assert_close(scaled, 2 * bias + 3 * (a @ b), rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            a @ a
        torch.testing.assert_close(few @ few.T, (few[:, None] * few).sum(-1))


def test_a_readout_of_many_rows_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(130, 64, generator=generator)
    unembedding = Unembedding(torch.randn(900, 64, generator=generator))
    reference = Reference(index=torch.arange(130) % 10, hidden=hidden[:10])
    choice.choose("checked")  # measures once per process, with products that do not count here
    ran: list[int] = []
    plain = Columns.multiply

    def counted(self: Columns, a: Tensor, out: Tensor, *, threads: int = 1) -> None:
        ran.append(len(a))
        plain(self, a, out, threads=threads)

    monkeypatch.setattr(Columns, "multiply", counted)
    monkeypatch.setattr(fused, "FROM_LOGITS", 0)
    found, expected = (
        readout(hidden, unembedding, reference=reference, products=products)
        for products in ("checked", "default")
    )
    assert sum(ran) == 900
    assert found.entropy_bits is not None
    assert found.top_ids is not None
    torch.testing.assert_close(found.entropy_bits, expected.entropy_bits, rtol=1e-5, atol=1e-5)
    assert expected.top_ids is not None
    assert torch.equal(found.top_ids, expected.top_ids)


def test_it_is_what_checked_means_here() -> None:
    chosen = choice.choose("checked")
    assert chosen.precision == choice.MATRIX_UNITS
    assert chosen.max_error is not None
    assert chosen.reference_error is not None
    assert chosen.max_error <= 4 * chosen.reference_error
    assert choice.choose("checked", compiled=False).precision != choice.MATRIX_UNITS
