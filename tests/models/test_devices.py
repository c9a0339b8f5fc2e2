from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.models.devices import default_dtype, dtype_name, parse_device, parse_dtype, place


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def has_cuda(monkeypatch: pytest.MonkeyPatch, *, bf16: bool, count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu")])
def test_cpu_is_float32(device: str | torch.device | None) -> None:
    placement = place(device)
    assert (placement.device.type, placement.dtype) == ("cpu", torch.float32)
    assert "policy" in placement.reason


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_prefers_bfloat16(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, dtype: torch.dtype
) -> None:
    has_cuda(monkeypatch, bf16=bf16)
    placement = place("auto")
    assert (placement.device.type, placement.dtype) == ("cuda", dtype)
    assert place("cpu").dtype == torch.float32


@pytest.mark.parametrize(("recent", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_mps_prefers_bfloat16(
    monkeypatch: pytest.MonkeyPatch, recent: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: recent)
    assert default_dtype(torch.device("mps"))[0] == dtype


def test_mps_comes_after_cuda(monkeypatch: pytest.MonkeyPatch, no_accelerator: None) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert parse_device("auto").type == "mps"
    has_cuda(monkeypatch, bf16=True)
    assert parse_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("torch.float32", torch.float32),
        ("BF16", torch.bfloat16),
        ("half", torch.float16),
        ("double", torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_names(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert parse_dtype(name) == dtype
    assert parse_dtype(dtype_name(dtype)) == dtype
    assert place("cpu", name).dtype == dtype


def test_auto_dtype_is_the_policy() -> None:
    assert place("cpu", "auto") == place("cpu")


@pytest.mark.parametrize("dtype", ["float33", "int8", "", torch.int64])
def test_unknown_dtypes(dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="float32"):
        parse_dtype(dtype)


def test_the_nearest_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        parse_dtype("bfloat61")


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1", "mps", "meta", "cuda:x"])
def test_absent_or_unknown_devices(device: str) -> None:
    with pytest.raises(ConfigError, match="use"):
        parse_device(device)


def test_a_cuda_index_beyond_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, bf16=True, count=2)
    assert parse_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="2 CUDA devices"):
        parse_device("cuda:2")
