"""The choice of the float32 product: measured, scoped, restored."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.models import language_model
from layerscope.products import ProductChoice, Products, choose, products
from layerscope.products import choice as module
from support.loaded import loaded

MKLDNN: Any = torch.backends.mkldnn.matmul
CUDA: Any = torch.backends.cuda.matmul
FORCED = ProductChoice("checked", "medium", 1e-6, 1e-6, "for a test")


def _state() -> tuple[str, str, str]:
    try:
        word = torch.get_float32_matmul_precision()
    except RuntimeError:
        word = "contradicts a backend"
    return word, MKLDNN.fp32_precision, CUDA.fp32_precision


@pytest.fixture(autouse=True)
def _leave_torch_as_found() -> Iterator[None]:
    before = _state()
    yield
    torch.set_float32_matmul_precision(before[0])
    MKLDNN.fp32_precision, CUDA.fp32_precision = before[1:]


def test_the_checked_product_is_float32_accurate() -> None:
    choice = choose("checked")
    left = torch.randn(40, 1500, generator=torch.Generator().manual_seed(1))
    right = torch.randn(300, 1500, generator=torch.Generator().manual_seed(2))
    exact = left.double() @ right.double().T
    plain = (left @ right.T).double()
    with products(choice):
        fast = (left @ right.T).double()
    assert (fast - exact).abs().max() <= 8 * (plain - exact).abs().max()
    assert choice.max_error is not None
    assert choice.reference_error is not None
    assert 0 < choice.max_error <= 4 * choice.reference_error
    assert choice.reference_error < 1e-4


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({"highest": 1e-6, "medium": 3e-6, "high": 1e-6}, "medium"),
        ({"highest": 1e-6, "medium": 1e-2, "high": 1e-6}, "high"),
        ({"highest": 1e-6, "medium": 1e-2, "high": 1e-3}, "highest"),
        ({"highest": 1e-6, "medium": float("inf"), "high": 5e-6}, "highest"),
        ({"matrix units": 2e-6, "highest": 1e-6, "medium": 1e-6}, "matrix units"),
        ({"matrix units": 1e-2, "highest": 1e-6, "medium": 3e-6}, "medium"),
    ],
)
def test_what_rounds_operands_is_rejected(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, float], expected: str
) -> None:
    # One product in which all are alike, and one in which they differ.
    monkeypatch.setattr(module, "_relative_errors", lambda name: [1e-5, errors[name]])
    monkeypatch.setattr(module, "has_matrix_units", lambda: "matrix units" in errors)
    monkeypatch.setattr(module, "_compiles", lambda: True)
    module._checked_on_cpu.cache_clear()
    try:
        choice = choose("checked")
    finally:
        module._checked_on_cpu.cache_clear()
    assert choice.precision == expected
    assert choice.max_error == max(1e-5, errors[expected])
    if max(errors["medium"], errors.get("matrix units", 0.0)) > 4e-6:
        assert "rejected" in choice.reason


def test_a_broken_numba_leaves_torch_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_matrix_units", lambda: True)
    monkeypatch.setitem(sys.modules, "layerscope.products.matrix_units", None)
    module._checked_on_cpu.cache_clear()
    try:
        assert choose("checked").precision in ("highest", "high", "medium")
    finally:
        module._checked_on_cpu.cache_clear()


def test_a_bfloat16_product_would_be_rejected() -> None:
    left = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
    exact = left.double() @ left.double().T
    rounded = (left.bfloat16() @ left.bfloat16().T).float()
    assert module._error(rounded, exact) > 100 * module._error(left @ left.T, exact)


def test_the_check_runs_once() -> None:
    assert choose("checked") is choose("checked")


def test_default_leaves_torch_alone() -> None:
    before = _state()
    with products("default") as choice:
        assert _state() == before
    assert choice.precision == "unchanged"


def test_away_from_the_cpu_full_float32_is_kept() -> None:
    choice = choose("checked", device="cuda")
    assert choice.precision == "highest"
    assert "TF32" in choice.reason
    with products("checked", device="cuda") as scope:
        assert scope == choice
        assert _state()[0] == "highest"


def test_a_model_asks_for_products_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def noted(requested: Products, *, device: torch.device) -> None:
        raise Asked(requested, device)

    model = loaded("llama")
    monkeypatch.setattr(language_model, "matrix_products", noted)
    monkeypatch.setattr(type(model.backend), "device", torch.device("cuda"))
    with pytest.raises(Asked) as found:
        model.run([[1, 5, 9]], products="checked")
    assert found.value.args == ("checked", torch.device("cuda"))


def test_low_precision_operands_are_not_concerned() -> None:
    assert choose("checked", dtype=torch.bfloat16).precision == "unchanged"


@pytest.mark.parametrize("word", ["highest", "high", "medium"])
@pytest.mark.parametrize("mkldnn", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("cuda", ["none", "ieee", "tf32"])
def test_whatever_was_set_before_is_restored(word: str, mkldnn: str, cuda: str) -> None:
    torch.set_float32_matmul_precision(word)
    MKLDNN.fp32_precision, CUDA.fp32_precision = mkldnn, cuda
    before = _state()
    with products(FORCED):
        assert torch.get_float32_matmul_precision() == "medium"  # reading it does not raise
        with products(ProductChoice("checked", "highest", None, None, "nested")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    assert _state() == before
    MKLDNN.fp32_precision, CUDA.fp32_precision = "none", "none"
    torch.set_float32_matmul_precision(word)


def test_restored_after_an_exception() -> None:
    before = _state()
    with pytest.raises(ZeroDivisionError), products(FORCED):
        raise ZeroDivisionError
    assert _state() == before


def test_the_choice_is_provenance() -> None:
    record = json.loads(json.dumps(choose("checked").to_dict(), allow_nan=False))
    assert record["requested"] == "checked"
    assert set(record) == {"requested", "precision", "max_error", "reference_error", "reason"}


def test_unknown_request() -> None:
    with pytest.raises(ConfigError, match="did you mean 'checked'"):
        choose("cheked")  # pyright: ignore[reportArgumentType]
