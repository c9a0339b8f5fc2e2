"""Read safetensors a small piece at a time, straight into their final dtype and device.

transformers maps the files and casts from there. When the file's dtype is another one, the mapped
pages stay in memory until everything is loaded (three times the weights for float32 files loaded as
bfloat16), and a model for an accelerator is first built whole on the CPU. Here a tensor that asks
for its values reads them through a buffer of a mebibyte.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

_BUFFER_BYTES = 2**20
# Transfers to an accelerator are worth larger pieces; they take no room there.
_BUFFER_BYTES_MOVED = 2**24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, as its header describes it."""

    file: Path
    kind: str
    """The header's word for the dtype, e.g. ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    bytes: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_headers(files: Sequence[Path]) -> dict[str, Entry]:
    """Return what whole safetensors files hold, from their headers alone."""
    found: dict[str, Entry] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int(struct.unpack("<Q", stream.read(8))[0])
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                shape = tuple(entry["shape"])
                found[name] = Entry(file, entry["dtype"], shape, 8 + length + first, last - first)
    return found


def readable(entries: Mapping[str, Entry]) -> bool:
    """Say whether every tensor is of a dtype that can be read here."""
    return all(entry.kind in DTYPES for entry in entries.values())


class Unread:
    """A tensor that is still in its file; ``[...]`` gives itself, ``to`` reads it.

    It stands where transformers expects a slice of a safetensors file: it is asked for ``[...]``,
    then for ``to(device=..., dtype=...)``. `device`, where given, is taken in place of the one that
    is asked for, so that no copy is made on the CPU.
    """

    def __init__(self, entry: Entry, device: torch.device | None = None) -> None:
        self._entry, self._device = entry, device
        self.shape = torch.Size(entry.shape)
        self.dtype = DTYPES[entry.kind]

    def __getitem__(self, key: EllipsisType) -> Unread:
        if key is not Ellipsis:
            raise IndexError("only the whole tensor can be read")
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Read the values into a tensor of `dtype` (the file's own by default)."""
        where = self._device or torch.device(device or "cpu")
        values = torch.empty(self._entry.numel, dtype=dtype or self.dtype, device=where)
        with self._entry.file.open("rb", buffering=0) as stream:
            stream.seek(self._entry.start)
            if where.type == "cpu" and values.dtype == self.dtype:
                _fill(stream, values.view(torch.uint8))
            else:
                self._convert(stream, values)
        return values.view(self.shape)

    def _convert(self, stream: Any, values: Tensor) -> None:
        size = _BUFFER_BYTES if values.device.type == "cpu" else _BUFFER_BYTES_MOVED
        buffer = _buffer(size).view(self.dtype)
        step = len(buffer)
        for first in range(0, len(values), step):
            part = buffer[: len(values) - first]
            _fill(stream, part.view(torch.uint8))
            values[first : first + step].copy_(part)


def _buffer(size: int) -> Tensor:
    """Return this thread's buffer of `size` bytes.

    Mapped, and kept as long as the thread: buffers that come and go between the weights leave holes
    in the allocator's heap, which cost far more than the buffers.
    """
    buffer: Tensor | None = getattr(_buffers, "tensor", None)
    if buffer is None or len(buffer) != size:
        buffer = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        _buffers.tensor = buffer
    return buffer


_buffers = threading.local()


def _fill(stream: Any, raw: Tensor) -> None:
    """Read exactly as many bytes as a uint8 tensor on the CPU holds."""
    room = raw.numpy().data
    while room:
        count = stream.readinto(room)
        if not count:
            raise EOFError(f"{stream.name} ended early")
        room = room[count:]
