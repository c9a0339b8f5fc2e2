"""Where a model runs and in which precision.

The policy: float32 on CPU; bfloat16 on accelerators that support it, because float16 overflows on
residual streams of some families; float16 elsewhere. What is free on a device is measured, never
taken from a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from layerscope.errors import ConfigError, nearest

DeviceLike = str | torch.device
DtypeLike = str | torch.dtype

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True)
class Placement:
    """A device, a dtype, and why these."""

    device: torch.device
    dtype: torch.dtype
    reason: str


@dataclass(frozen=True)
class Device:
    """A device that is here, with its memory in bytes."""

    name: str
    """``cpu``, ``mps`` or ``cuda:N``."""
    total: int
    free: int
    dtype: torch.dtype
    """What the policy runs here."""
    title: str = ""
    """The maker's name of the device."""

    @property
    def kind(self) -> str:
        """``cpu``, ``cuda`` or ``mps``."""
        return self.name.partition(":")[0]


def present() -> tuple[Device, ...]:
    """Measure every device here, in the order of preference: CUDA devices, MPS, the CPU."""
    found = [_cuda(index) for index in range(_cuda_count())]
    if torch.backends.mps.is_available():
        found.append(_mps())
    return (*found, _cpu())


def place(device: DeviceLike | None = None, dtype: DtypeLike | None = None) -> Placement:
    """Choose the device and dtype of a model; None and ``"auto"`` mean the policy of this module.

    Raises:
        ConfigError: the device or dtype is unknown, or the device is not present here.
    """
    where = parse_device(device)
    if dtype is None or dtype == "auto":
        return Placement(where, *default_dtype(where))
    return Placement(where, parse_dtype(dtype), "asked for")


def parse_device(device: DeviceLike | None = None) -> torch.device:
    """Return the device meant; None and ``"auto"`` take the first present of cuda, mps, cpu.

    Raises:
        ConfigError: the device is unknown or not present.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {device!r}; use 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"
        ) from error
    if parsed.type == "cuda":
        count = _cuda_count()
        if (parsed.index or 0) >= count:
            raise ConfigError(f"device {str(parsed)!r} is not here ({count} CUDA devices); use cpu")
    elif parsed.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device 'mps' is not here; use 'cpu' or 'auto'")
    elif parsed.type != "cpu":
        raise ConfigError(f"device {str(parsed)!r} is not supported; use cpu, cuda or mps")
    return parsed


def parse_dtype(dtype: DtypeLike) -> torch.dtype:
    """Return the floating-point dtype meant by a name such as ``"bf16"`` or ``"torch.float32"``.

    Raises:
        ConfigError: the name is unknown, or the dtype is not one a model can run in.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES.values():
            raise ConfigError(f"a model cannot run in {dtype}; use {_known_dtypes()}")
        return dtype
    name = dtype.lower().removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            f"unknown dtype {dtype!r}{nearest(name, _DTYPES)} (use {_known_dtypes()}, or 'auto')"
        )
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plain name of a dtype, e.g. ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def default_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the policy's dtype for a device, and why."""
    if device.type == "cpu":
        return torch.float32, "policy: float32 on CPU"
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.backends.mps.is_macos_or_newer(14, 0)
    if supported:
        return torch.bfloat16, f"policy: bfloat16, which this {device.type} device supports"
    return torch.float16, f"policy: float16, since this {device.type} device has no bfloat16"


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cuda(index: int) -> Device:
    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(device)
    # What this process holds in torch's cache without using it can be taken again.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    dtype, _ = default_dtype(device)
    return Device(f"cuda:{index}", total, free, dtype, torch.cuda.get_device_name(device))


def _mps() -> Device:
    # Memory is shared with the CPU: what is free is the smaller of both views.
    total = torch.mps.recommended_max_memory()
    free = min(total - torch.mps.driver_allocated_memory(), psutil.virtual_memory().available)
    return Device("mps", total, max(0, free), default_dtype(torch.device("mps"))[0])


def _cpu() -> Device:
    """Measure the memory of the machine, or of the container where that has less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _control_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Device("cpu", total, free, torch.float32)


def _control_groups(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, use) in bytes of the Linux control groups around this process.

    Pages of files that have not been used lately do not count: the kernel gives them back first.
    """
    try:
        lines = membership.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == base.parent:
                break
            try:
                limit = int((folder / names[0]).read_text("utf-8"))
                used = int((folder / names[1]).read_text("utf-8"))
                statistics = (folder / "memory.stat").read_text("utf-8").split()
                pairs = dict(zip(statistics[::2], statistics[1::2], strict=True))
                yield limit, used - int(pairs.get(names[2], 0))
            except (OSError, ValueError):  # no limit ("max"), or not ours to read
                continue


def _known_dtypes() -> str:
    return ", ".join(sorted({dtype_name(dtype) for dtype in _DTYPES.values()}))
