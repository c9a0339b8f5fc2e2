"""Where a model runs and in which precision.

The policy: float32 on CPU; bfloat16 on accelerators that support it, because float16 overflows on
residual streams of some families; float16 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
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


def _known_dtypes() -> str:
    return ", ".join(sorted({dtype_name(dtype) for dtype in _DTYPES.values()}))
