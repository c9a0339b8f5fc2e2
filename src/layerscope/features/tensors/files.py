"""One face for three containers: names, shapes and dtypes from the header, values by mapping.

Nothing is read before it is asked for. A view is a tensor on the mapped file: indexing its rows
touches only their pages. The mapping is private, so a file can never be written through it.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import DictionaryError, nearest

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its name.
        dtype: of the values.
        shape: of the tensor.
        offset: first byte in the file; None where it is compressed and cannot be mapped.
        stride: in elements, where it is not contiguous.
        column_major: the first axis varies fastest (numpy's Fortran order).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None
    stride: tuple[int, ...] | None = None
    column_major: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A file of named tensors; make one with `open_tensors`.

    Attributes:
        path: the file.
        entries: what it holds, by name.
        values: other values stored beside the tensors (torch archives hold numbers and words).
        metadata: words of a safetensors header.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        *,
        values: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.entries = dict(entries)
        self.values = dict(values or {})
        self.metadata = dict(metadata or {})
        self._map: mmap.mmap | None = None

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.entries)

    def entry(self, *names: str) -> Entry:
        """Return the first of these tensors that is there.

        Raises:
            DictionaryError: none is; names the nearest ones.
        """
        for name in names:
            if name in self.entries:
                return self.entries[name]
        raise DictionaryError(
            f"{self.path} has no tensor '{names[0]}'{nearest(names[0], self.entries)}; it has "
            f"{', '.join(list(self.entries)[:12]) or 'none'}"
        )

    def view(self, name: str) -> Tensor:
        """Return a tensor on the mapped file; do not write to it.

        Raises:
            DictionaryError: there is no such tensor, or it cannot be read.
        """
        entry = self.entry(name)
        if entry.offset is None:
            return self._decompress(entry)
        if prod(entry.shape) == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = prod(entry.shape)
        if entry.stride is not None:
            count = 1 + sum((n - 1) * s for n, s in zip(entry.shape, entry.stride, strict=True))
        flat = torch.frombuffer(self._mapped(), dtype=entry.dtype, count=count, offset=entry.offset)
        if entry.stride is not None:
            return flat.as_strided(entry.shape, entry.stride)
        if entry.column_major:
            return flat.view(entry.shape[::-1]).permute(*range(len(entry.shape) - 1, -1, -1))
        return flat.view(entry.shape)

    def close(self) -> None:
        """Forget the mapping; views that exist keep it alive."""
        self._map = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                with self.path.open("rb") as stream:
                    self._map = _private_map(stream.fileno())
            except (OSError, ValueError) as error:
                raise DictionaryError(f"{self.path} cannot be read: {error}") from error
        return self._map

    def _decompress(self, entry: Entry) -> Tensor:
        from layerscope.features.tensors.npz import decompress

        return decompress(self.path, entry)


def _private_map(descriptor: int) -> mmap.mmap:
    if sys.platform == "linux":
        # Without a reservation, so that a file larger than the memory can be mapped.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def open_tensors(path: str | Path) -> TensorFile:
    """Read the header of a safetensors, npz or torch file; no tensor is read.

    Raises:
        DictionaryError: the file is missing, of another kind, truncated, or its header lies.
    """
    path = Path(path)
    if not path.is_file():
        raise DictionaryError(f"there is no file {path}")
    from layerscope.features.tensors import npz, pickles, safetensors

    readers = {
        ".safetensors": safetensors.read,
        ".npz": npz.read,
        ".pt": pickles.read,
        ".pth": pickles.read,
    }
    if path.suffix not in readers:
        raise DictionaryError(
            f"{path} is no tensor file that layerscope reads; give one of {', '.join(SUFFIXES)}"
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise DictionaryError(f"{path} cannot be read: {error}") from error
