"""Torch archives without running what they say: a whitelist unpickler and mapped storages.

A ``.pt`` file is a zip of ``data.pkl`` and raw storages. The pickle may only build dictionaries,
lists, numbers, words and tensors; anything else in it is refused by name, and nothing is imported.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from layerscope.errors import DictionaryError
from layerscope.features.tensors.files import Entry, TensorFile
from layerscope.features.tensors.npz import data_offset

LARGEST_PICKLE = 50_000_000
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Stored:
    """A tensor as the pickle describes it; the numbers are elements, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read(path: Path) -> TensorFile:
    """Read the pickle of a torch archive with the whitelist; tensors stay in the file.

    Nested dictionaries give dotted names; numbers and words are kept as `values`.

    Raises:
        DictionaryError: the archive is of the old kind, truncated, compressed, or its pickle asks
            for anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickled = [name for name in members if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise DictionaryError(f"{path} is no torch archive: it has no data.pkl")
            if members[pickled[0]].file_size > LARGEST_PICKLE:
                raise DictionaryError(f"{path} has a pickle beyond {LARGEST_PICKLE:,} bytes")
            root = pickled[0].removesuffix("data.pkl")
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(order).strip() != b"little":
                raise DictionaryError(f"{path} was written big-endian; save it again")
            with archive.open(pickled[0]) as stream:
                content = _Reader(stream, path).load()
    except zipfile.BadZipFile:
        raise DictionaryError(
            f"{path} is truncated, or a pickle of the old kind, which can run code when read; load "
            "it where you trust it and save it as safetensors"
        ) from None
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
        raise DictionaryError(f"{path} has a damaged pickle ({error})") from None
    found: dict[str, Any] = {}
    _flatten(path, "", content, found)
    entries: dict[str, Entry] = {}
    values: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, _Stored):
            entries[name] = _entry(path, name, value, members, root)
        else:
            values[name] = value
    return TensorFile(path, entries, values=values)


def _entry(
    path: Path, name: str, value: _Stored, members: Mapping[str, zipfile.ZipInfo], root: str
) -> Entry:
    member = members.get(f"{root}data/{value.storage.key}")
    if member is None or member.compress_type != zipfile.ZIP_STORED:
        raise DictionaryError(f"{path}: the values of '{name}' are missing or compressed")
    size = value.storage.dtype.itemsize
    last = value.offset
    if 0 not in value.shape:
        last += 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
    if last * size > member.file_size or min((value.offset, *value.shape, *value.stride)) < 0:
        raise DictionaryError(f"{path}: '{name}' reaches beyond its storage; the file is damaged")
    offset = data_offset(path, member) + value.offset * size
    return Entry(name, value.storage.dtype, value.shape, offset, stride=value.stride)


def _flatten(path: Path, prefix: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[Any, Any]", value).items():
            if not isinstance(key, str):
                raise DictionaryError(f"{path} has a key that is no word: {key!r}")
            _flatten(path, f"{prefix}.{key}" if prefix else key, inner, found)
    elif isinstance(value, _Stored):
        found[prefix or "tensor"] = value
    elif (
        isinstance(value, list | tuple)
        or value is None
        or isinstance(value, str | int | float | bool)
    ):
        found[prefix] = value
    else:
        raise DictionaryError(f"{path} holds a {type(value).__name__} at '{prefix}'; save tensors")


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *others: Any) -> _Stored:
    del others  # requires_grad, hooks, metadata: of no use here
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Stored(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _rebuild_parameter(data: Any, *others: Any) -> Any:
    del others
    return data


_ALLOWED: dict[tuple[str, str], Callable[..., Any] | type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
}


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return one of a few harmless constructors, or refuse."""
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise DictionaryError(
                f"{self._path} asks for {module_name}.{global_name} when it is read, which could "
                "run code; only plain tensors are read from pickles: save it as safetensors"
            )
        return allowed

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage; no value is read."""
        if not isinstance(pid, tuple):
            raise pickle.UnpicklingError("an unknown persistent id")
        parts = cast("tuple[Any, ...]", pid)
        if len(parts) != 5 or parts[0] != "storage" or not isinstance(parts[1], torch.dtype):
            raise pickle.UnpicklingError("an unknown persistent id")
        return _Storage(parts[1], str(parts[2]), int(parts[4]))
