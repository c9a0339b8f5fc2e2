"""Headers of npz archives: a zip of .npy members, mapped where they are stored uncompressed."""

from __future__ import annotations

import io
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.tensors.files import Entry, TensorFile

LARGEST_HEADER = 10_000
DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|b1": torch.bool,
    "|u1": torch.uint8,
    "|i1": torch.int8,
}


def read(path: Path) -> TensorFile:
    """Read the headers of an npz archive's members.

    Raises:
        DictionaryError: it is no archive, is truncated, or a member is no plain array.
    """
    entries: dict[str, Entry] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    entry = _member(path, archive, member)
                    entries[entry.name] = entry
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DictionaryError(f"{path} is truncated or no npz file ({error})") from None
    return TensorFile(path, entries)


def data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where the data of an uncompressed member begins in the archive."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DictionaryError(f"{path}: '{member.filename}' is damaged; download it again")
        name, extra = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + name + extra


def decompress(path: Path, entry: Entry) -> Tensor:
    """Read a compressed member whole."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{entry.name}.npy") as stream:
            array = npy.read_array(stream, allow_pickle=False, max_header_size=LARGEST_HEADER)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise DictionaryError(f"{path}: '{entry.name}' cannot be read ({error})") from None
    # Which makes one axis of none.
    return torch.from_numpy(np.ascontiguousarray(array)).view(entry.shape)


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as stream:
        shape, column_major, dtype, header = _header(path, name, stream)
    if dtype not in DTYPES:
        raise DictionaryError(
            f"{path}: '{name}' has the dtype {dtype}, which layerscope cannot read"
        )
    offset = None
    if member.compress_type == zipfile.ZIP_STORED:
        offset = data_offset(path, member) + header
    entry = Entry(name, DTYPES[dtype], shape, offset, column_major=column_major)
    if header + entry.nbytes != member.file_size:
        raise DictionaryError(
            f"{path}: '{name}' of shape {list(shape)} needs {header + entry.nbytes:,} bytes, the "
            f"archive holds {member.file_size:,}; the file is damaged"
        )
    return entry


def _header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, str, int]:
    start = io.BytesIO(stream.read(LARGEST_HEADER + 12))
    try:
        version = npy.read_magic(start)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, column_major, dtype = reader(start, max_header_size=LARGEST_HEADER)
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DictionaryError(f"{path}: '{name}' is no plain array ({reason})") from None
    if any(number < 0 for number in shape) or prod(shape) > 2**48:
        raise DictionaryError(f"{path}: '{name}' has the shape {list(shape)}; it is damaged")
    return tuple(shape), bool(column_major), dtype.str, start.tell()
