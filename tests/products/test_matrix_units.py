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
from layerscope.products.digits import MOST_DEPTH
from layerscope.products.matrix_units import (
    DIGITS,
    HALVES,
    Columns,
    Kind,
    Rows,
    Slices,
    bound,
    bound_of_digits,
    product,
)
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


def _even_pair(m: int, k: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors that suit digits, whose rows and columns are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(*shape, generator=generator) - 0.5 for shape in ((m, k), (k, n)))
    sizes = [2.0 ** torch.randint(-20, 20, (count,), generator=generator) for count in (m, n)]
    return a * sizes[0][:, None], b * sizes[1]


def _check_digits(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    exact = a.double() @ b.double()
    lengths = a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)
    if bias is not None:
        exact, lengths = exact + bias, lengths + bias.abs()
    assert ((found - exact).abs() <= bound_of_digits(a.shape[1]) * lengths).all()


def _check(found: Tensor, a: Tensor, b: Tensor, *, least: float = 1.0) -> None:
    exact, absolute = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((found - exact).abs() <= least * bound(a.shape[1]) * absolute).all()


LAYOUTS = list(itertools.product((False, True), repeat=2))


def _turned(factor: Tensor, turn: bool) -> Tensor:
    return factor.T.contiguous().T if turn else factor


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_and_layout_is_within_the_bound(
    m: int, k: int, n: int, layout: tuple[bool, bool]
) -> None:
    a, b = (_turned(*each) for each in zip(_pair(m, k, n), layout, strict=True))
    _check(product(a, b), a, b)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_digits_of_every_shape_and_layout_are_within_their_bound(
    m: int, k: int, n: int, layout: tuple[bool, bool]
) -> None:
    a, b = (_turned(*each) for each in zip(_even_pair(m, k, n), layout, strict=True))
    bias = torch.randn(n)
    for packed, other in (
        (Columns.of(b, kind=DIGITS).multiply, a),
        (Rows.of(a, kind=DIGITS).multiply, b),
    ):
        out = torch.full((m, n + 5), 7.0)
        packed(other, out[:, 2 : n + 2], bias=bias)
        written = out[:, 2 : n + 2]
        fits = written.isfinite()
        if k >= 100:
            assert fits.all()
        _check_digits(torch.where(fits, written, a @ b + bias), a, b, bias)
        assert (out[:, :2] == 7).all()
        assert (out[:, n + 2 :] == 7).all()


def _ways(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return a list that every product adds to: how it goes, and of how many rows and columns."""
    ran: list[tuple[str, int, int]] = []
    plain = matrix_units._write_product  # pyright: ignore[reportPrivateUsage]

    def counted(
        a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, kind: Kind
    ) -> tuple[Tensor | None, Tensor | None]:
        ran.append(("digits" if kind is DIGITS else "halves", len(a), b.shape[1]))
        return plain(a, b, bias, out, kind)

    monkeypatch.setattr(matrix_units, "_write_product", counted)
    return ran


@pytest.mark.parametrize("bias", [False, True])
def test_uneven_rows_and_columns_are_computed_by_halves(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 256, generator=generator), torch.randn(256, 400, generator=generator)
    added = torch.randn(400, generator=generator) if bias else None
    clean = product(a, b, added)
    uneven, columns = torch.arange(40, 80), torch.arange(100, 140)
    a[uneven, 3] = 1e6  # meets nothing: in integers of 24 bits the others would be lost
    a[7] = 0.0
    b[3] = 0.0
    b[9, columns] = 1e5
    a[:, 9] = 0.0
    ran = _ways(monkeypatch)
    found = product(a, b, added)
    assert ran == [("digits", 500, 400), ("halves", 40, 400), ("halves", 500, 40)]
    _check(found if added is None else (found.double() - added).float(), a, b, least=8.0)
    assert torch.equal(found[7], torch.zeros(400) if added is None else added)
    a, b = torch.randn(500, 256, generator=generator), torch.randn(256, 400, generator=generator)
    whole = product(a, b, added)
    a[uneven, 3] = 1e6
    rest = [row for row in range(500) if row not in uneven.tolist()]
    assert torch.equal(product(a, b, added)[rest], whole[rest])
    assert clean.isfinite().all()


def test_few_uneven_rows_go_to_torch_and_many_to_halves_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 256, generator=generator), torch.randn(256, 200, generator=generator)
    ran = _ways(monkeypatch)
    a[20, 5] = 1e4
    _check(product(a, b), a, b)
    assert ran == [("digits", 300, 200)]
    a[:, 5] = 1e4
    _check(product(a, b), a, b)
    assert ran[1:] == [("halves", 300, 200)]
    ran.clear()
    _check(product(b.T, a.T), b.T, a.T)
    assert ran == [("halves", 200, 300)]


def test_sums_of_digits_hold_the_deepest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _ways(monkeypatch)
    # The last two digits of this number are as negative as digits can be.
    value = (126 * 2**16 - 128 * 2**8 - 128) / 8355000
    row = torch.full((MOST_DEPTH,), value)
    row[0] = 1.0
    found = product(row.expand(40, -1), row[:, None].expand(-1, 40))
    expected = row.double().square().sum()
    assert ((found - expected).abs() <= 1e-6 * expected).all()
    deeper = torch.ones(40, MOST_DEPTH + 1)
    assert (product(deeper, deeper.T) == MOST_DEPTH + 1).all()
    assert [way for way, _, _ in ran] == ["digits", "halves"]


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("d", [128, 768, 3072])
def test_digits_are_as_accurate_as_torch(d: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(d)
    # With a spread the largest entry is often a tenth of a row, as behind a gate.
    a, b = torch.randn(300, d, generator=generator), torch.randn(d, 200, generator=generator)
    a = a * torch.exp(spread * torch.randn(300, d, generator=generator))
    exact = a.double() @ b.double()
    errors = [(found - exact).square().mean().sqrt() for found in (product(a, b), a @ b)]
    assert errors[0] <= 4 * errors[1]


def test_every_pair_of_digits_counts() -> None:
    a, b = torch.full((32, 256), 1.0), torch.full((256, 32), 1.0)
    a[:, 1:], b[1:] = 0.3, 0.7  # each of three digits of both is large
    one, other = torch.empty(32, 32), torch.empty(32, 32)
    Columns.of(b, kind=DIGITS).multiply(a, one)
    Rows.of(a, kind=DIGITS).multiply(b, other)
    for found in (one, other):
        torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=2e-7, atol=0)


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


@pytest.mark.parametrize("kind", [HALVES, DIGITS], ids=["halves", "digits"])
def test_threads_and_other_rows_change_no_bit(kind: Kind) -> None:
    a, b = _even_pair(500, 800, 130) if kind is DIGITS else _pair(500, 800, 130)
    columns = Columns.of(b, kind=kind)
    one, two, few = (torch.empty(n, 130) for n in (500, 500, 37))
    columns.multiply(a, one)
    Columns.of(b, threads=2, kind=kind).multiply(a, two, threads=2)
    columns.multiply(a[100:137], few)
    assert torch.equal(one, two)
    assert torch.equal(one[100:137], few)
    rows = Rows.of(a, threads=2, kind=kind)
    for threads in (1, 2):
        rows.multiply(b, two.zero_(), threads=threads)
        assert torch.equal(one, two)
    if kind is HALVES:
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
    pairs = [_pair(m, 100, n), _even_pair(m, 100, n)]
    ran = _ways(monkeypatch)
    wholes = [product(a, b.T.contiguous().T) for a, b in pairs]
    assert [way for way, _, _ in ran] == ["halves", "digits"]
    monkeypatch.setattr(matrix_units, "_PARTS_BYTES", 3 * 100 * 50)
    for (a, b), whole in zip(pairs, wholes, strict=True):
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


@pytest.mark.parametrize("uneven", [0, 3, 40])
def test_slices_of_a_weight_with_uneven_rows(uneven: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 128, generator=generator)
    weight = torch.randn(300, 128, generator=generator)
    vectors[50 : 50 + uneven, 3] = 1e6
    weight[60 : 60 + uneven, 7] = 1e5
    weight[:, 3] = 0.0
    vectors[:, 7] = 0.0
    slices, out = Slices(vectors, weight), torch.full((100, 300), torch.nan)
    for first in range(0, 300, 130):
        tokens = slice(first, first + 130)
        slices.multiply(weight[tokens], out[:, tokens])
    if uneven:
        _check(out, vectors, weight.T, least=2.0)
    else:
        _check_digits(out, vectors, weight.T)


def test_a_readout_of_many_rows_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(130, 64, generator=generator)
    unembedding = Unembedding(torch.randn(900, 64, generator=generator))
    reference = Reference(index=torch.arange(130) % 10, hidden=hidden[:10])
    choice.choose("checked")  # measures once per process, with products that do not count here
    ran: list[int] = []
    plain = Slices.multiply

    def counted(self: Slices, part: Tensor, out: Tensor) -> None:
        ran.append(len(part))
        plain(self, part, out)

    monkeypatch.setattr(Slices, "multiply", counted)
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
