"""The run directory: `<out>/run-latest`, and the rotation of what was there before.

A marker file in every run directory carries an identifier, the content key of what runs there and
whether it is still open. The identifier finds a directory again after it was renamed; the key
tells an unfinished directory that is to be continued from one that has to make room.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from layerscope.errors import OutputError
from layerscope.files import output_error, remove_temporaries, write_json, write_text
from layerscope.store.owner import Owner

try:
    import fcntl
except ImportError:  # Windows: rotation works, two simultaneous starts are not kept apart
    fcntl = None

LATEST = "run-latest"
MARKER = ".layerscope-run.json"
_LOCK = ".layerscope.lock"
_NEW = ".layerscope-new-"
_STAMP = re.compile(r"\d{8}-\d{4}(\d{2})?")

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Marker:
    """What the marker file of a run directory says."""

    id: str
    key: str
    open: bool
    stamp: str  # local time of creation, YYYYMMDD-HHMMSS
    owner: Owner | None = None


@dataclass(frozen=True)
class RunDir:
    """A run directory that is ready for writing."""

    path: Path
    id: str
    resumed: bool  # an unfinished directory of the same content key was found
    rotated_to: Path | None = None  # where the previous directory went


def open_run_dir(out: Path, *, key: str, clock: Clock = datetime.now) -> RunDir:
    """Return `<out>/run-latest` for work with the content key `key`.

    An unfinished `run-latest` of the same key is continued. Anything else of that name, odd
    content included, is renamed to `run-<its stamp>` (or `run-<now>-rotated` without a stamp),
    with a number where that name is taken. The new directory appears complete or not at all.

    Raises:
        OutputError: `out` cannot be written, or another live process writes `run-latest`.
    """
    target = out / LATEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _exclusive(out):
            for leftover in out.glob(f"{_NEW}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            marker = read_marker(target)
            _refuse_live(target, marker)
            if marker is not None and marker.open and marker.key == key:
                remove_temporaries(target)
                _write_marker(target, replace(marker, owner=Owner.current()))
                return RunDir(path=target, id=marker.id, resumed=True)
            rotated = _rotate(target, marker, clock()) if os.path.lexists(target) else None
            created = _create(target, key, clock())
            return RunDir(path=target, id=created.id, resumed=False, rotated_to=rotated)
    except OSError as error:
        raise output_error(target, error) from error


def close_run_dir(path: Path) -> None:
    """Mark a run directory as finished, so that the next run rotates it."""
    marker = read_marker(path)
    if marker is not None:
        _write_marker(path, replace(marker, open=False, owner=None))


def identify(path: Path, *, key: str, clock: Clock = datetime.now) -> str:
    """Return the identifier of a folder, marking it as an open run directory where it has none."""
    marker = read_marker(path)
    return (marker or _mark(path, key, clock())).id


def locate(path: Path, dir_id: str) -> Path | None:
    """Return where the directory with that identifier is now, or None when it is gone.

    It is looked for at `path` and, as rotation renames it, among the `run-*` beside `path`.
    """
    siblings = sorted(path.parent.glob("run-*")) if path.parent.is_dir() else []
    for candidate in [path, *siblings]:
        marker = read_marker(candidate)
        if marker is not None and marker.id == dir_id:
            return candidate
    return None


def read_marker(path: Path) -> Marker | None:
    """Return the marker of a directory; None where there is none that can be read."""
    try:
        data: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
        owner = Owner(**data["owner"]) if data.get("owner") else None
        return Marker(
            id=str(data["id"]),
            key=str(data["key"]),
            open=bool(data["open"]),
            stamp=str(data["stamp"]),
            owner=owner,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_marker(path: Path, marker: Marker) -> None:
    write_json(path / MARKER, asdict(marker))


def _refuse_live(target: Path, marker: Marker | None) -> None:
    owner = marker.owner if marker is not None and marker.open else None
    if owner is not None and owner.is_other_live_process():
        raise OutputError(
            f"process {owner.pid} is writing {target}; wait for it, stop it, or choose another "
            "--out"
        )


def _rotate(target: Path, marker: Marker | None, now: datetime) -> Path:
    stamp = _stamp_of(target, marker)
    name = f"run-{stamp}" if stamp else f"run-{now:%Y%m%d-%H%M%S}-rotated"
    destination = target.with_name(name)
    number = 2
    while os.path.lexists(destination):
        destination = target.with_name(f"{name}-{number}")
        number += 1
    return target.rename(destination)


def _stamp_of(target: Path, marker: Marker | None) -> str | None:
    if marker is not None and _STAMP.fullmatch(marker.stamp):
        return marker.stamp
    if not target.is_dir():
        return None
    names = (path.name.removeprefix("timestamp-") for path in target.glob("timestamp-*"))
    return max((name for name in names if _STAMP.fullmatch(name)), default=None)


def _create(target: Path, key: str, now: datetime) -> Marker:
    new = target.with_name(f"{_NEW}{uuid.uuid4().hex}")
    new.mkdir()
    marker = _mark(new, key, now)
    new.rename(target)
    return marker


def _mark(path: Path, key: str, now: datetime) -> Marker:
    write_text(
        path / f"timestamp-{now:%Y%m%d-%H%M}", f"Experiment started: {now:%Y-%m-%d %H:%M:%S}\n"
    )
    marker = Marker(
        id=uuid.uuid4().hex,
        key=key,
        open=True,
        stamp=f"{now:%Y%m%d-%H%M%S}",
        owner=Owner.current(),
    )
    _write_marker(path, marker)
    return marker


@contextmanager
def _exclusive(folder: Path) -> Generator[None]:
    """Keep two starting processes apart; released by the system when a process dies."""
    if fcntl is None:
        yield
        return
    with (folder / _LOCK).open("a") as stream:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
