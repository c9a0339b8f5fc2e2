"""A run while it is executed: its finished units, its results, its artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from layerscope.errors import StoreError
from layerscope.files import atomic_path, canonical_json, finite, sha256_file, sha256_text
from layerscope.store.database import Database
from layerscope.store.schema import Artifact, Result, Run, WorkUnit

UNITS = ".units"
_PAYLOAD_KEY = "layerscope_unit"
_ROW_GROUP = 1 << 18  # fixed, so that the bytes of a file depend on its content alone

UtcClock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the time, with zone."""
    return datetime.now(UTC)


class RunHandle:
    """A started run.

    As a context manager it records how the block ended: an exception makes the run "failed", and
    Ctrl-C or another way out before `finish` makes it "interrupted". Either can be resumed.
    """

    def __init__(
        self,
        database: Database,
        *,
        run_id: str,
        key: str,
        folder: Path,
        resumed: bool,
        finished: bool = False,
        clock: UtcClock = utc_now,
    ):
        self.id = run_id
        self.key = key
        self.dir = folder
        self.resumed = resumed
        self.finished = finished
        self._database = database
        self._clock = clock

    # -- work units ---------------------------------------------------------------------------

    def put_unit(
        self, key: str, frame: pl.DataFrame, payload: Mapping[str, Any] | None = None
    ) -> None:
        """Keep the rows of a finished work unit and a JSON payload that goes with them.

        The file is complete on disk before the database knows of it, so a process killed between
        the two repeats the unit and nothing else. Putting the same unit again replaces it.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
            StoreError: the database cannot be written.
        """
        relative = self._unit_path(key)
        path = self.dir / relative
        metadata = {_PAYLOAD_KEY: json.dumps({"key": key, "payload": payload}, sort_keys=True)}
        with atomic_path(path) as temporary:
            frame.write_parquet(
                temporary,
                compression="zstd",
                compression_level=3,
                statistics=True,
                row_group_size=_ROW_GROUP,
                metadata=metadata,
            )
            digest, size = sha256_file(temporary), temporary.stat().st_size
        with self._database.writing() as session:
            unit = self._find_unit(session, key) or WorkUnit(run_id=self.id, key=key)
            unit.path, unit.sha256 = relative.as_posix(), digest
            unit.n_bytes, unit.n_rows = size, frame.height
            unit.created_at = self._now()
            session.add(unit)

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any] | None] | None:
        """Return the rows and the payload of a finished unit, or None when it has to be done.

        A file that is missing, or whose SHA-256 is not the recorded one, counts as not done.
        """
        path = self._verified_path(key)
        if path is None:
            return None
        try:
            frame = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError):
            return None
        return frame, self._read_payload(path)

    def unit_meta(self, key: str) -> dict[str, Any] | None:
        """Return the payload of a finished unit without its rows."""
        path = self._verified_path(key)
        return None if path is None else self._read_payload(path)

    def units_done(self) -> list[str]:
        """Return the keys of the recorded units, in the order in which they were first kept."""
        with self._database.reading() as session:
            query = select(WorkUnit.key).where(WorkUnit.run_id == self.id).order_by(WorkUnit.id)
            return list(session.scalars(query))

    def cleanup_units(self) -> None:
        """Remove the unit files of a finished run; its final table holds their rows.

        Raises:
            StoreError: the run is not finished, so its units are still needed.
        """
        if not self.finished:
            raise StoreError(f"run {self.id} is not finished; call finish() before cleanup_units()")
        with self._database.writing() as session:
            session.execute(delete(WorkUnit).where(WorkUnit.run_id == self.id))
        shutil.rmtree(self.dir / UNITS / self.id, ignore_errors=True)
        units = self.dir / UNITS
        if units.is_dir() and not any(units.iterdir()):
            units.rmdir()

    def _unit_path(self, key: str) -> Path:
        return Path(UNITS) / self.id / f"{sha256_text(key)[:24]}.parquet"

    def _find_unit(self, session: Session, key: str) -> WorkUnit | None:
        query = select(WorkUnit).where(WorkUnit.run_id == self.id, WorkUnit.key == key)
        return session.scalars(query).one_or_none()

    def _verified_path(self, key: str) -> Path | None:
        with self._database.reading() as session:
            unit = self._find_unit(session, key)
            if unit is None:
                return None
            path, digest = self.dir / unit.path, unit.sha256
        try:
            return path if sha256_file(path) == digest else None
        except OSError:
            return None

    def _read_payload(self, path: Path) -> dict[str, Any] | None:
        return json.loads(pl.read_parquet_metadata(path)[_PAYLOAD_KEY])["payload"]

    # -- results and artifacts ----------------------------------------------------------------

    def add_artifact(self, kind: str, path: Path) -> str:
        """Record a file that the run wrote, with its SHA-256, which is returned.

        Raises:
            StoreError: there is no such file.
        """
        absolute = path.resolve()
        folder = self.dir.resolve()
        inside = absolute.is_relative_to(folder)
        recorded = absolute.relative_to(folder).as_posix() if inside else str(absolute)
        try:
            digest, size = sha256_file(absolute), absolute.stat().st_size
        except OSError as error:
            raise StoreError(f"artifact {path} cannot be read; write it before it is added") from (
                error
            )
        with self._database.writing() as session:
            query = select(Artifact).where(Artifact.run_id == self.id, Artifact.path == recorded)
            artifact = session.scalars(query).one_or_none()
            artifact = artifact or Artifact(run_id=self.id, path=recorded)
            artifact.kind, artifact.sha256, artifact.n_bytes = kind, digest, size
            artifact.created_at = self._now()
            session.add(artifact)
        return digest

    def artifact(self, kind: str) -> Path | None:
        """Return the latest artifact of a kind; None when there is none or it was changed since."""
        with self._database.reading() as session:
            query = (
                select(Artifact.path, Artifact.sha256)
                .where(Artifact.run_id == self.id, Artifact.kind == kind)
                .order_by(Artifact.id.desc())
            )
            row = session.execute(query.limit(1)).one_or_none()
        if row is None:
            return None
        path = self.dir / row.path
        try:
            return path if sha256_file(path) == row.sha256 else None
        except OSError:
            return None

    def save_result(self, name: str, value: Any) -> None:
        """Keep a named JSON result; non-finite floats become null; the same name is replaced."""
        clean = finite(value)
        with self._database.writing() as session:
            query = select(Result).where(Result.run_id == self.id, Result.name == name)
            result = session.scalars(query).one_or_none() or Result(run_id=self.id, name=name)
            result.value = clean
            session.add(result)

    # -- how it ends --------------------------------------------------------------------------

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Record that everything is in place, with the provenance of the whole run."""
        self._set_status("finished", provenance=finite(provenance))
        self.finished = True

    def fail(self, error: str) -> None:
        """Record that the run failed, and why; its finished units stay."""
        self._set_status("failed", error=error)

    def interrupt(self) -> None:
        """Record that the run was stopped by its user; its finished units stay."""
        self._set_status("interrupted")

    def _set_status(self, status: str, **values: Any) -> None:
        now = self._now()
        with self._database.writing() as session:
            session.execute(
                update(Run)
                .where(Run.id == self.id)
                .values(status=status, finished_at=now, **values)
            )

    def _now(self) -> str:
        return self._clock().isoformat(timespec="milliseconds")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self.finished:
            return
        if isinstance(error, Exception):
            self.fail(f"{type(error).__name__}: {error}")
        else:
            self.interrupt()


def content_key(
    *,
    experiment: str,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    prompts: list[dict[str, Any]],
    versions: Mapping[str, Any],
) -> str:
    """Return the SHA-256 that two runs share exactly when they must give the same bytes.

    `model` holds what identifies the model and changes numbers (id, revision or weights hash,
    tokenizer hash, dtype, device), and nothing that varies between equal runs, such as timings.
    """
    return sha256_text(
        canonical_json(
            {
                "experiment": experiment,
                "config": config,
                "model": model,
                "prompts": sha256_text(canonical_json(prompts)),
                "versions": versions,
            }
        )
    )
