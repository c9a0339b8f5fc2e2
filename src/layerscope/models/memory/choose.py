"""Where a model goes: every placement that comes into question, held against what is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from layerscope.models.devices import Device, dtype_name
from layerscope.models.memory.estimate import (
    EIGHT_BIT,
    FORMATS,
    FOUR_BIT,
    GIB,
    Estimate,
    Workload,
    estimate,
    format_of,
    show_bytes,
)
from layerscope.models.memory.sizes import Sizes

Verdict = Literal["fits", "tight", "no"]

# What should stay free beside the model: the driver's context and kernels, other programs, and on a
# machine whose memory is shared with the CPU the system itself.
RESERVE = {"cuda": round(1.5 * GIB), "mps": round(3.5 * GIB), "cpu": 4 * GIB}
# From this size on a CPU runs bfloat16 even where float32 would fit.
CPU_HALF_FROM = 30_000_000_000
_SHORTEST = 16


@dataclass(frozen=True)
class Candidate:
    """One way to hold a model: on one device, or split over several by blocks.

    Attributes:
        devices: one device, or several of a device map.
        estimate: what it needs there.
        reason: why this dtype.
    """

    devices: tuple[Device, ...]
    estimate: Estimate
    reason: str

    @property
    def where(self) -> str:
        """The device's name; of several, joined by ``+``."""
        return "+".join(device.name for device in self.devices)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that are not packed."""
        return self.estimate.format.dtype

    @property
    def offered(self) -> bool:
        """False for weights that would be packed on loading, elsewhere than on CUDA devices."""
        if self.estimate.format not in (EIGHT_BIT, FOUR_BIT):
            return True
        return all(device.kind == "cuda" for device in self.devices)

    @property
    def free(self) -> int:
        """Bytes that are free on its devices."""
        return sum(device.free for device in self.devices)

    @property
    def needed(self) -> int:
        """Bytes that it needs; over several devices each holds a readout's tiles and logits."""
        extra = (len(self.devices) - 1) * (self.estimate.readout + (self.estimate.activations or 0))
        return self.estimate.total + extra

    @property
    def missing(self) -> int:
        """Bytes that are short; 0 when there are enough."""
        return max(0, self.needed - self.free)

    @property
    def verdict(self) -> Verdict:
        """``fits`` with the reserve left over, ``tight`` without it, else ``no``."""
        reserve = sum(RESERVE[device.kind] for device in self.devices)
        # On a small device the whole reserve would leave nothing to use.
        if self.needed + min(reserve, self.free // 2) < self.free:
            return "fits"
        return "no" if self.missing else "tight"

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate and its figures in bytes, ready for JSON."""
        return {
            "device": self.where,
            "format": self.estimate.format.name,
            "needed": self.needed,
            "free": self.free,
            "missing": self.missing,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Decision:
    """The order in which placements are tried, and those that were passed over.

    Attributes:
        tried: to be loaded in turn; empty when nothing fits.
        skipped: held too large, with the reason.
    """

    tried: tuple[Candidate, ...]
    skipped: tuple[tuple[Candidate, str], ...] = ()


def choose(
    sizes: Sizes,
    devices: Sequence[Device],
    *,
    dtype: torch.dtype | None = None,
    workload: Workload | None = None,
    several: bool = True,
) -> Decision:
    """Order the placements of a model: comfortable ones first, then tight ones, by device.

    Args:
        sizes: the model.
        devices: where it may go, most wanted first.
        dtype: the only one allowed; None takes each device's own, and on a CPU where float32 does
            not fit, bfloat16.
        workload: what will be run.
        several: it may be split over CUDA devices.
    """
    workload = workload or Workload(cache=False)
    fitting: dict[Verdict, list[Candidate]] = {"fits": [], "tight": [], "no": []}
    for candidate in placements(sizes, devices, dtype=dtype, workload=workload, several=several):
        fitting[candidate.verdict].append(candidate)
    skipped = tuple(
        (candidate, f"needs {show_bytes(candidate.needed)}, more than is free")
        for candidate in fitting["no"]
    )
    return Decision((*fitting["fits"], *fitting["tight"]), skipped)


def placements(
    sizes: Sizes,
    devices: Sequence[Device],
    *,
    dtype: torch.dtype | None = None,
    workload: Workload,
    several: bool = True,
) -> list[Candidate]:
    """Return every placement that the policy allows, whether it fits or not."""
    found = [
        _candidate(sizes, (device,), chosen, reason, workload)
        for device in devices
        if device.kind != "cpu"
        for chosen, reason in (_own(device, dtype),)
    ]
    cards = tuple(device for device in devices if device.kind == "cuda")
    if several and len(cards) > 1:
        halves = all(card.dtype == torch.bfloat16 for card in cards)
        common, reason = _own(cards[0] if halves else _oldest(cards), dtype)
        found.insert(len(cards), _candidate(sizes, cards, common, reason, workload))
    for device in devices:
        if device.kind == "cpu":
            found += _on_cpu(sizes, device, dtype, workload)
    return found


def fitting_placements(
    sizes: Sizes, devices: Sequence[Device], workload: Workload
) -> list[Candidate]:
    """Return what would fit in any format, best precision first; at most one per device."""
    best: dict[str, Candidate] = {}
    cards = tuple(device for device in devices if device.kind == "cuda")
    groups = [(device,) for device in devices] + ([cards] if len(cards) > 1 else [])
    for known in FORMATS:
        for group in groups:
            form = known
            if sizes.packed_bytes is not None:
                form = format_of(torch.bfloat16, sizes, group[0].kind)
            candidate = Candidate(group, estimate(sizes, form, workload), "")
            if candidate.offered and candidate.verdict != "no":
                best.setdefault(candidate.where, candidate)
    return list(best.values())


def longest_positions(candidate: Candidate, sizes: Sizes, workload: Workload) -> int | None:
    """Return how many positions fit where `workload` does not; None when not even 16 do."""
    low, high = _SHORTEST, workload.positions

    def fits(positions: int) -> bool:
        shorter = replace(workload, positions=positions)
        return not replace(
            candidate, estimate=estimate(sizes, candidate.estimate.format, shorter)
        ).missing

    if low >= high or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(
    sizes: Sizes, nearest: Candidate, devices: Sequence[Device], workload: Workload
) -> list[str]:
    """Return what would fit where the nearest placement does not, each with its figures."""
    ways = [
        f"{_how(found)} ({show_bytes(found.needed)} of {show_bytes(found.free)})"
        for found in fitting_placements(sizes, devices, workload)
    ]
    positions = longest_positions(nearest, sizes, workload)
    if positions is not None:
        ways.append(
            f"{workload.batch} x {positions} positions in {nearest.estimate.format.name} on "
            f"{nearest.where}"
        )
    return ways


def _how(candidate: Candidate) -> str:
    form = candidate.estimate.format
    name = f"dtype {form.name!r}" if form.packed is None else form.name
    if len(candidate.devices) > 1:
        return f"{name} over {candidate.where} with device_map='auto'"
    return f"{name} on {candidate.where}"


def _candidate(
    sizes: Sizes,
    devices: tuple[Device, ...],
    dtype: torch.dtype,
    reason: str,
    workload: Workload,
) -> Candidate:
    form = format_of(dtype, sizes, devices[0].kind)
    return Candidate(devices, estimate(sizes, form, workload), reason)


def _own(device: Device, dtype: torch.dtype | None) -> tuple[torch.dtype, str]:
    if dtype is not None:
        return dtype, "asked for"
    name = dtype_name(device.dtype)
    if device.dtype == torch.float16:
        return device.dtype, f"policy: {name}, since this {device.kind} device has no bfloat16"
    return device.dtype, f"policy: {name}, which this {device.kind} device supports"


def _oldest(cards: Sequence[Device]) -> Device:
    return next(card for card in cards if card.dtype != torch.bfloat16)


def _on_cpu(
    sizes: Sizes, device: Device, dtype: torch.dtype | None, workload: Workload
) -> list[Candidate]:
    if dtype is not None:
        return [_candidate(sizes, (device,), dtype, "asked for", workload)]
    whole = _candidate(sizes, (device,), torch.float32, "policy: float32 on CPU", workload)
    reason = "policy: bfloat16 on CPU, since float32 does not fit"
    if sizes.parameters >= CPU_HALF_FROM:
        reason = "policy: bfloat16 on CPU from 30 billion parameters on"
        return [_candidate(sizes, (device,), torch.bfloat16, reason, workload)]
    if whole.verdict == "fits":
        return [whole]
    return [whole, _candidate(sizes, (device,), torch.bfloat16, reason, workload)]
