"""Headers of safetensors files, checked before anything believes them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from layerscope.errors import DictionaryError
from layerscope.features.tensors.files import Entry, TensorFile

LARGEST_HEADER = 100_000_000  # the limit of the safetensors library too
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


def read(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        DictionaryError: the header is too long, no JSON, or its tensors overlap, leave gaps or lie
            outside the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise DictionaryError(
                f"{path} is truncated or no safetensors file: its header claims {length:,} bytes, "
                f"the file has {size:,}; download it again"
            )
        if length > LARGEST_HEADER:
            raise DictionaryError(
                f"{path} claims a header of {length:,} bytes; none is beyond {LARGEST_HEADER:,}"
            )
        text = stream.read(length)
    try:
        header: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DictionaryError(f"{path} has a damaged header ({error}); download it again") from None
    if not isinstance(header, dict):
        raise DictionaryError(f"{path} has a damaged header; download it again")
    found = cast("dict[str, Any]", header)
    metadata = found.pop("__metadata__", None) or {}
    entries = {name: _entry(path, name, about, 8 + length) for name, about in found.items()}
    _check_layout(path, list(entries.values()), 8 + length, size)
    return TensorFile(path, entries, metadata=metadata)


def _entry(path: Path, name: str, about: Any, start: int) -> Entry:
    try:
        kind, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        numbers = [begin, end, *shape]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DictionaryError(f"{path}: the header describes '{name}' wrongly") from None
    if kind not in DTYPES:
        raise DictionaryError(
            f"{path}: '{name}' has the dtype {kind}, which layerscope cannot read"
        )
    entry = Entry(name, DTYPES[kind], tuple(shape), start + begin)
    if end - begin != entry.nbytes:
        raise DictionaryError(
            f"{path}: '{name}' is {kind} of shape {list(shape)}, {entry.nbytes:,} bytes, but the "
            f"header gives it {end - begin:,}; the file is damaged"
        )
    return entry


def _check_layout(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """Tensors must fill the file from the header's end, one after the other, up to its end."""
    place = start
    for entry in sorted(entries, key=lambda entry: (entry.offset or 0, prod(entry.shape))):
        assert entry.offset is not None
        if entry.offset < place:
            raise DictionaryError(f"{path}: '{entry.name}' overlaps another tensor; it is damaged")
        if entry.offset > place:
            raise DictionaryError(f"{path}: there is a gap before '{entry.name}'; it is damaged")
        place += entry.nbytes
    if place != size:
        what = "truncated" if place > size else "too long"
        raise DictionaryError(
            f"{path} is {what}: its tensors end at byte {place:,}, the file at {size:,}; download "
            "it again"
        )
