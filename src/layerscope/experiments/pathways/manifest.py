"""What was done with what: a record per stage, and chunks that survive a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.pathways.workspace import CHUNKS, Workspace, hash_path
from layerscope.experiments.units import work_key
from layerscope.files import atomic_path, canonical_json, sha256_text, write_json, write_text

MANIFEST = "manifest"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class StageResult:
    """What a stage found.

    Attributes:
        summary: JSON values without timings.
        outputs: names of the files it wrote, relative to the run's folder.
        exit_code: 0 good, 1 with warnings, 2 failed.
        notes: warnings, a line each.
    """

    summary: dict[str, Any]
    outputs: tuple[str, ...]
    exit_code: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageRecord:
    """A stage that was done: with which key, and what its outputs were."""

    stage: str
    key: str
    inputs: dict[str, Any]
    outputs: dict[str, str]
    summary: dict[str, Any]
    exit_code: int
    notes: tuple[str, ...] = field(default=())


def stage_key(stage: str, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Return the key of a stage: what decides its outputs, versions included."""
    from layerscope import __version__

    return work_key(f"pathways-{stage}", SCHEMA_VERSION, __version__, dict(config), dict(inputs))


def read_record(work: Workspace, stage: str) -> StageRecord | None:
    """Return the record of a stage, or None where it was not done or the record is damaged."""
    path = work.path(f"{MANIFEST}/{stage}.json")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema_version") != SCHEMA_VERSION:
            return None
        content["notes"] = tuple(content["notes"])
        return StageRecord(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_fresh(work: Workspace, stage: str, key: str) -> StageRecord | None:
    """Return the record of a stage that was done with this key, if its outputs are untouched."""
    record = read_record(work, stage)
    if record is None or record.key != key:
        return None
    same = all(hash_path(work.path(name)) == value for name, value in record.outputs.items())
    return record if same else None


def write_record(
    work: Workspace, stage: str, key: str, inputs: Mapping[str, Any], result: StageResult
) -> StageRecord:
    """Note a finished stage; its outputs are on the disk already."""
    record = StageRecord(
        stage=stage,
        key=key,
        inputs=dict(inputs),
        outputs={name: hash_path(work.path(name)) for name in result.outputs},
        summary=result.summary,
        exit_code=result.exit_code,
        notes=result.notes,
    )
    content = {name: getattr(record, name) for name in record.__dataclass_fields__}
    write_json(work.path(f"{MANIFEST}/{stage}.json"), {"schema_version": SCHEMA_VERSION, **content})
    return record


def forget(work: Workspace, stage: str) -> None:
    """Remove a stage's record and chunks, so that it is done anew."""
    work.path(f"{MANIFEST}/{stage}.json").unlink(missing_ok=True)
    Chunks(work.path(f"{CHUNKS}/{stage}")).clear()


class Chunks:
    """Finished work units as files, complete or absent; see `UnitStore`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any] | None] | None:
        """Return a finished unit's rows and payload, or None."""
        rows, rest = self._paths(key)
        if not rest.is_file() or not rows.is_file():
            return None
        try:
            payload = json.loads(rest.read_text(encoding="utf-8"))
            return pl.read_parquet(rows), payload
        except (OSError, ValueError, pl.exceptions.PolarsError):
            return None  # damaged: it is done again

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        """Keep a finished unit: the rows first, then the note that makes it count."""
        rows, rest = self._paths(key)
        write_parquet(rows, frame)
        write_json(rest, payload, indent=None)

    def clear(self) -> None:
        """Forget all units."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.parquet", self.folder / f"{key}.json"


def write_parquet(path: Path, table: pl.DataFrame) -> Path:
    """Write a table atomically, compressed with zstd."""
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="zstd")
    return path


def write_partitions(folder: Path, table: pl.DataFrame, by: str) -> None:
    """Write one file per value of a column as ``by=value/part.parquet``; others are removed."""
    wanted: set[Path] = set()
    for value in sorted(table[by].unique().to_list()):
        path = folder / f"{by}={value}" / "part.parquet"
        write_parquet(path, table.filter(pl.col(by) == value))
        wanted.add(path)
    if not wanted:  # no rows: the columns are kept all the same
        wanted.add(write_parquet(folder / "part.parquet", table))
    for path in list(folder.rglob("*.parquet")):
        if path not in wanted:
            path.unlink()


def read_partitions(folder: Path) -> pl.DataFrame:
    """Read what `write_partitions` wrote, in order of the partitions' values."""
    parts = [pl.read_parquet(path) for path in sorted(folder.rglob("*.parquet"), key=_value)]
    return pl.concat(parts)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, atomically; NaN and infinity become null."""
    return write_text(path, "".join(f"{canonical_json(dict(row))}\n" for row in rows))


def inputs_hash(inputs: Mapping[str, Any]) -> str:
    """Return one hash of many inputs."""
    return sha256_text(canonical_json(dict(inputs)))


def _value(path: Path) -> tuple[int, str]:
    text = path.parent.name.rpartition("=")[2]
    return (int(text), "") if text.lstrip("-").isdigit() else (0, text)
