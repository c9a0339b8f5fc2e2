from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.models import devices
from layerscope.models.devices import (
    default_dtype,
    dtype_name,
    parse_device,
    parse_dtype,
    place,
    present,
)


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


def test_devices_are_measured_in_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda(monkeypatch, bf16=False, count=2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 + device.index, 10))
    # 2 bytes that torch holds without using them are as good as free.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    found = present()
    assert [device.name for device in found] == ["cuda:0", "cuda:1", "cpu"]
    assert [device.kind for device in found] == ["cuda", "cuda", "cpu"]
    assert [device.free for device in found[:2]] == [5, 6]
    assert [device.dtype for device in found] == [torch.float16, torch.float16, torch.float32]


@pytest.mark.usefixtures("no_accelerator")
def test_the_cpu_has_at_most_what_its_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = present()
    assert 0 < whole.free <= whole.total
    groups = [(2**40, 2**30), (10**9, 4 * 10**8)]
    monkeypatch.setattr(devices, "_control_groups", lambda *_: iter(groups))
    (limited,) = present()
    assert limited.total == 10**9
    assert limited.free == 6 * 10**8


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups(tmp_path: Path, version: int) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,memory:/job/task\n" if version == 1 else "0::/job/task\n")
    names = {
        1: ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("", "memory.max", "memory.current", "inactive_file"),
    }[version]
    for folder, limit in (("job/task", "max"), ("job", "1000")):
        group = tmp_path / f"{names[0]}{folder}"
        group.mkdir(parents=True, exist_ok=True)
        (group / names[1]).write_text(f"{limit}\n")
        (group / names[2]).write_text("600\n")
        (group / "memory.stat").write_text(f"anon 350\n{names[3]} 250\n")
    assert list(devices._control_groups(tmp_path, membership)) == [(1000, 350)]
    assert list(devices._control_groups(tmp_path, tmp_path / "absent")) == []
