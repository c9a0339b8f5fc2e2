"""Files that are either complete or absent: atomic writes, hashes, canonical JSON.

Everything layerscope leaves on disk goes through here. A file is written under a temporary name
beside its target, flushed to the disk, and renamed; a reader never sees half of one, and a
process killed at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from layerscope.errors import OutputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY_SUFFIX = ".layerscope-tmp"
_CHUNK_BYTES = 1 << 20


def output_error(path: Path, error: BaseException) -> OutputError:
    """Return the one-line error for a failed write to `path`."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno in _NO_SPACE) or "No space left" in text:
        return OutputError(f"no space left writing {path}; free space or choose another --out")
    if isinstance(error, PermissionError):
        return OutputError(f"no permission to write {path}; choose another --out")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else text
    return OutputError(f"cannot write {path}: {reason}; choose another --out")


def _is_write_failure(error: BaseException) -> bool:
    # Libraries in native code (polars) report a full disk as their own kind of exception.
    return isinstance(error, OSError) or "os error" in str(error)


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`.

    Parent folders are created. When the body raises, the temporary file is removed and `path`
    stays as it was.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    temporary = path.with_name(f".{path.name[:100]}.{unique}{_TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - the one call that everything here rests on
        _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, Exception) and _is_write_failure(error):
            raise output_error(path, error) from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder; that costs durability of the name, not content.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path` atomically; raises OutputError."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(data)
    return path


def write_text(path: Path, text: str) -> Path:
    r"""Write `text` to `path` atomically as UTF-8 with ``\n`` line ends; raises OutputError."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> Path:
    """Write `value` to `path` atomically as strict JSON: non-finite floats become null."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """Return `value` with containers as dict and list, and each NaN or infinity as None."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): finite(entry) for key, entry in items}
    if isinstance(value, list | tuple | set | frozenset):
        entries = cast("list[Any]", sorted(value) if isinstance(value, set | frozenset) else value)
        return [finite(entry) for entry in entries]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a numpy scalar
        return finite(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, non-finite floats as null."""
    return json.dumps(
        finite(value), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )


def sha256_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of the UTF-8 bytes of `text`."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content; raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remove_temporaries(folder: Path) -> int:
    """Remove what processes of this host that were killed left under `folder`; return how many."""
    import psutil  # here, because reading this module must stay cheap

    removed = 0
    for path in folder.rglob(f".*{_TEMPORARY_SUFFIX}"):
        pid = path.name.removesuffix(_TEMPORARY_SUFFIX).rsplit(".", 1)[-1].split("-")[0]
        if pid.isdigit() and psutil.pid_exists(int(pid)):
            continue
        with suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def safe_name(text: str) -> str:
    """Return the text after the last ``/`` with characters no file system dislikes.

    Letters, digits, ``.``, ``_`` and ``-`` stay; anything else becomes ``_``.
    """
    last = text.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(char if char.isalnum() or char in "._-" else "_" for char in last)
    name = name.strip(".")[:120]
    return name or "model"
