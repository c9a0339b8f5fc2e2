"""Decide where a model is loaded, before anything of it is read, and refuse what cannot fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from layerscope.errors import ConfigError, ModelError
from layerscope.models.backends.huggingface.quantised import missing
from layerscope.models.devices import (
    Device,
    DeviceLike,
    DtypeLike,
    parse_device,
    parse_dtype,
)
from layerscope.models.memory.choose import (
    Decision,
    choose,
    placements,
    remedies,
)
from layerscope.models.memory.estimate import Workload, show_bytes
from layerscope.models.memory.sizes import Sizes

DeviceMap: TypeAlias = str | Mapping[str, int | str | torch.device]
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

# What a model must at least be able to run where it is loaded.
LOAD_WORKLOAD = Workload(batch=1, positions=512, cache=False)


@dataclass(frozen=True)
class Request:
    """Where a caller wants a model; everything known is checked before anything is read.

    Attributes:
        devices: names of the devices that come into question; empty for the policy's choice.
        dtype: None for the policy's choice.
        device_map: a name of `MAPS` or modules by device; None for one device.
    """

    devices: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    device_map: str | dict[str, str] | None = None

    @staticmethod
    def of(
        device: DeviceLike | None, dtype: DtypeLike | None, device_map: DeviceMap | None = None
    ) -> Request:
        """Read what a caller passed.

        Raises:
            ConfigError: a device or dtype is unknown or absent; or a device and a map are given.
            ModelError: a map needs accelerate, or offloads weights.
        """
        chosen = None if dtype is None or dtype == "auto" else parse_dtype(dtype)
        if device_map is not None:
            if device is not None:
                raise ConfigError("pass device or device_map, not both")
            return _mapped(device_map, chosen)
        if device is None or device == "auto":
            return Request(dtype=chosen)
        return Request((_name(parse_device(device)),), chosen)


def decide(sizes: Sizes, request: Request, devices: Sequence[Device]) -> Decision:
    """Return what to try, in order.

    Raises:
        ModelError: nothing fits; says how much is missing and what would fit.
    """
    wanted = [device for device in devices if not request.devices or device.name in request.devices]
    if request.device_map is not None:
        cards = tuple(device for device in wanted if device.kind != "cpu") or tuple(wanted)
        found = placements(sizes, cards, dtype=request.dtype, workload=LOAD_WORKLOAD)
        split = [candidate for candidate in found if len(candidate.devices) == len(cards)]
        tried = tuple(candidate for candidate in split if candidate.verdict != "no")
        decision = Decision(tried)
    else:
        several = not request.devices and not missing(["accelerate"])
        decision = choose(
            sizes, wanted, dtype=request.dtype, workload=LOAD_WORKLOAD, several=several
        )
    if not decision.tried:
        raise ModelError(refusal(sizes, request, wanted, devices, LOAD_WORKLOAD))
    return decision


def refusal(
    sizes: Sizes,
    request: Request,
    wanted: Sequence[Device],
    devices: Sequence[Device],
    workload: Workload,
) -> str:
    """Return the line that says how much is missing and what would fit."""
    nearest = min(
        placements(sizes, wanted, dtype=request.dtype, workload=workload),
        key=lambda candidate: candidate.missing,
    )
    line = (
        f"{sizes.name} needs {show_bytes(nearest.needed)} in {nearest.estimate.format.name} on "
        f"{nearest.where}, where {show_bytes(nearest.free)} are free: "
        f"{show_bytes(nearest.missing)} are missing"
    )
    ways = remedies(sizes, nearest, devices, workload)
    if not ways:
        return f"{line}; nothing here holds it: free memory, or use a machine with more"
    return f"{line}; what would fit: {', or '.join(ways)}"


def _mapped(device_map: DeviceMap, dtype: torch.dtype | None) -> Request:
    if isinstance(device_map, str):
        if device_map not in MAPS:
            return Request((_name(parse_device(device_map)),), dtype)
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards < 2:  # nothing to split over
            return Request(dtype=dtype)
        _require_accelerate()
        return Request(tuple(f"cuda:{index}" for index in range(cards)), dtype, device_map)
    if not device_map:
        raise ConfigError("device_map is empty; name devices by module, or pass 'auto'")
    if "disk" in device_map.values():
        raise ModelError(_offloaded("disk"))
    names = {
        module: _name(parse_device(f"cuda:{where}" if isinstance(where, int) else where))
        for module, where in device_map.items()
    }
    distinct = tuple(sorted(set(names.values())))
    if len(distinct) == 1:
        return Request(distinct, dtype)
    if "cpu" in distinct:
        raise ModelError(_offloaded("the CPU beside an accelerator"))
    _require_accelerate()
    return Request(distinct, dtype, names)


def _offloaded(where: str) -> str:
    return (
        f"device_map puts modules on {where}, from where accelerate brings weights only for the "
        "moment of use, so that lenses cannot read them: map them to accelerators, or use "
        "device='cpu' for all"
    )


def _require_accelerate() -> None:
    if missing(["accelerate"]):
        raise ModelError("device_map over several devices needs accelerate: pip install accelerate")


def _name(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
