"""What ``layerscope fit`` says: sizes, needs, devices, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerscope.models.devices import (
    Device,
    DeviceLike,
    DtypeLike,
    dtype_name,
    parse_device,
    parse_dtype,
    present,
)
from layerscope.models.memory.choose import (
    Candidate,
    choose,
    placements,
    remedies,
)
from layerscope.models.memory.estimate import (
    FORMATS,
    Format,
    Workload,
    estimate,
    format_of,
    show_bytes,
)
from layerscope.models.memory.sizes import Sizes

_ORIGINS = {
    "files": "counted from config.json and the headers of its files",
    "configuration": "counted from config.json; there are no weights to look into",
    "name": "an estimate from its name alone",
}


@dataclass(frozen=True)
class FitReport:
    """The estimate of one model for one workload on the devices here.

    Attributes:
        devices: those that come into question.
        rows: for every format, what it takes on each device.
        recommended: where `load` would put it; None when nothing fits.
        nearest: the placement that lacks least.
        ways: what would fit when nothing does that was allowed.
    """

    sizes: Sizes
    workload: Workload
    devices: tuple[Device, ...]
    rows: tuple[tuple[Candidate, ...], ...]
    recommended: Candidate | None
    nearest: Candidate
    ways: tuple[str, ...]

    @staticmethod
    def of(
        sizes: Sizes,
        workload: Workload,
        *,
        device: DeviceLike | None = None,
        dtype: DtypeLike | None = None,
        devices: Sequence[Device] | None = None,
    ) -> FitReport:
        """Hold a model's sizes against the devices.

        Raises:
            ConfigError: the device or dtype is unknown or absent.
        """
        here = tuple(present() if devices is None else devices)
        wanted = here
        if device is not None and device != "auto":
            parsed = parse_device(device)
            name = f"cuda:{parsed.index or 0}" if parsed.type == "cuda" else parsed.type
            wanted = tuple(found for found in here if found.name == name)
        chosen = None if dtype is None or dtype == "auto" else parse_dtype(dtype)
        decision = choose(sizes, wanted, dtype=chosen, workload=workload)
        every = placements(sizes, wanted, dtype=chosen, workload=workload)
        nearest = min(every, key=lambda candidate: candidate.missing)
        return FitReport(
            sizes=sizes,
            workload=workload,
            devices=wanted,
            rows=tuple(
                tuple(Candidate((found,), estimate(sizes, form, workload), "") for found in wanted)
                for form in _formats(sizes, chosen)
            ),
            recommended=decision.tried[0] if decision.tried else None,
            nearest=nearest,
            ways=() if decision.tried else tuple(remedies(sizes, nearest, here, workload)),
        )

    def summary(self) -> list[str]:
        """Return the model's sizes in words."""
        sizes = self.sizes
        about = "" if sizes.exact else "about "
        lines = [f"{sizes.name}: {about}{_count(sizes)} parameters, {_ORIGINS[sizes.origin]}"]
        if sizes.embedding is not None:
            head = "there is none"
            if sizes.tied:
                head = "the same matrix (tied, counted once)"
            elif sizes.unembedding is not None:
                head = f"{sizes.unembedding:,}"
            lines.append(f"embedding {sizes.embedding:,}; unembedding {head}")
        if sizes.n_experts or sizes.active != sizes.parameters:
            each = f", {sizes.experts_per_token} of {sizes.n_experts}" if sizes.n_experts else ""
            lines.append(
                f"experts{each} per token: {sizes.active:,} parameters active; all are held"
            )
        if sizes.stored:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sizes.stored.items())
            quantised = f", quantised ({sizes.scheme})" if sizes.scheme else ""
            lines.append(f"in the files: {kinds}{quantised}")
        return [*lines, *sizes.notes]

    def advice(self) -> list[str]:
        """Return the recommendation, or what is missing and what would fit."""
        best = self.recommended
        if best is None:
            near = self.nearest
            line = (
                f"does not fit: {near.estimate.format.name} on {near.where} needs "
                f"{show_bytes(near.needed)}, {show_bytes(near.missing)} more than is free"
            )
            ways = [f"would fit: {way}" for way in self.ways]
            return [line, *(ways or ["nothing here would hold it: use a machine with more memory"])]
        tight = ", tightly" if best.verdict == "tight" else ""
        lines = [
            f"recommended: {best.estimate.format.name} on {best.where}: needs "
            f"{show_bytes(best.needed)} of {show_bytes(best.free)} free{tight} ({best.reason})"
        ]
        if len(best.devices) > 1:
            lines.append("split over several devices (device_map='auto'; needs accelerate)")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return everything in bytes and parameters, ready for JSON."""
        sizes, best = self.sizes, self.recommended
        return {
            "model": sizes.name,
            "origin": sizes.origin,
            "parameters": {
                "total": sizes.parameters,
                "active": sizes.active,
                "embedding": sizes.embedding,
                "unembedding": sizes.unembedding,
                "tied": sizes.tied,
                "experts": sizes.experts,
                "n_experts": sizes.n_experts,
                "experts_per_token": sizes.experts_per_token,
                "stored": dict(sizes.stored),
                "quantised": sizes.scheme,
            },
            "workload": {"batch": self.workload.batch, "positions": self.workload.positions},
            "needs": [row[0].estimate.to_dict() for row in self.rows],
            "devices": [
                {
                    "name": device.name,
                    "title": device.title,
                    "total": device.total,
                    "free": device.free,
                    "dtype": dtype_name(device.dtype),
                }
                for device in self.devices
            ],
            "placements": [found.to_dict() for row in self.rows for found in row if found.offered],
            "recommended": None if best is None else {**best.to_dict(), "reason": best.reason},
            "would_fit": list(self.ways),
            "notes": list(sizes.notes),
        }


def _formats(sizes: Sizes, dtype: torch.dtype | None) -> list[Format]:
    if sizes.packed_bytes is not None:
        packed = format_of(dtype or torch.bfloat16, sizes)
        return [packed, Format("bfloat16 (unpacked)", torch.bfloat16)]
    forms = [*FORMATS]
    if dtype is not None and all(form.dtype != dtype for form in forms):
        forms.insert(0, Format(dtype_name(dtype), dtype))
    return forms


def _count(sizes: Sizes) -> str:
    if sizes.exact:
        return f"{sizes.parameters:,}"
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if sizes.parameters >= size:
            return f"{sizes.parameters / size:.4g} {unit}"
    return f"{sizes.parameters:,}"
