"""Opening the runs database, and turning its failures into one line that names the fix."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from layerscope.errors import OutputError, StoreError
from layerscope.files import output_error
from layerscope.store.schema import SCHEMA_VERSION, Base, StoreInfo

_WRITES = "layerscope_writes"
_VERSION = "schema_version"


def parse_url(url_or_path: str | os.PathLike[str]) -> URL:
    """Return a database URL; anything without ``://`` is the path of an SQLite file.

    Raises:
        StoreError: the text is neither a path nor a URL that SQLAlchemy understands.
    """
    text = os.fspath(url_or_path)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser().resolve()))
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise StoreError(
            f"{text.split('://')[0]}://... is not a database URL; pass a file or "
            "postgresql+psycopg://user@host/name"
        ) from error
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        url = url.set(database=str(Path(str(url.database)).expanduser().resolve()))
    return url


class Database:
    """An engine with the pragmas, transactions and error messages that a store needs."""

    def __init__(self, url_or_path: str | os.PathLike[str], *, busy_timeout_s: float = 10.0):
        self.url = parse_url(url_or_path)
        self.name = self.url.render_as_string(hide_password=True).removeprefix("sqlite:///")
        with self._translated():
            self._engine = self._create_engine(busy_timeout_s)
        self._writing = self._engine.execution_options(**{_WRITES: True})
        self._prepare()

    def _create_engine(self, busy_timeout_s: float) -> Engine:
        try:
            if self.url.get_backend_name() != "sqlite":
                return create_engine(self.url, pool_pre_ping=True)
            if self.url.database not in (None, "", ":memory:"):
                Path(str(self.url.database)).parent.mkdir(parents=True, exist_ok=True)
            engine = create_engine(self.url, connect_args={"timeout": busy_timeout_s})
        except (NoSuchModuleError, ImportError) as error:
            raise StoreError(
                f"no driver for {self.url.drivername} databases is installed ({error}); "
                "install one, for example `pip install psycopg`, or pass a file"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot create the folder of {self.name}: {error}") from error
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
        return engine

    def _prepare(self) -> None:
        """Create the tables of a new database; refuse one that is newer or somebody else's."""
        with self._translated():
            # Looked at without the write lock first, so that reading a store never waits for it.
            with self._engine.connect() as connection:
                ready = self._check_version(connection)
            if ready:
                return
            with self._writing.begin() as connection:
                if self._check_version(connection):  # another process was faster
                    return
                Base.metadata.create_all(connection)
                connection.execute(
                    StoreInfo.__table__.insert(),  # pyright: ignore[reportAttributeAccessIssue]
                    {"name": _VERSION, "value": str(SCHEMA_VERSION)},
                )

    def _check_version(self, connection: Connection) -> bool:
        tables = set(inspect(connection).get_table_names())
        if StoreInfo.__tablename__ not in tables:
            ours = tables & set(Base.metadata.tables)
            if ours or (tables and self.url.get_backend_name() == "sqlite"):
                raise StoreError(
                    f"{self.name} is a database of another program; pass another --store"
                )
            return False
        row = connection.exec_driver_sql(
            f"SELECT value FROM store_info WHERE name = '{_VERSION}'"
        ).scalar()
        if row is None:
            return False
        if int(row) > SCHEMA_VERSION:
            raise StoreError(
                f"{self.name} was written by a newer layerscope (schema {row}, this one knows "
                f"{SCHEMA_VERSION}); upgrade layerscope or pass another --store"
            )
        return True

    @contextmanager
    def reading(self) -> Generator[Session]:
        """Open a session that only reads; it never waits for a writer."""
        with self._translated(), Session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Generator[Session]:
        """Open one write transaction: all of it is recorded, or nothing."""
        with self._translated(), Session(self._writing) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise self._explain(error) from error
        except sqlite3.Error as error:  # from the pragmas, before SQLAlchemy is in charge
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> StoreError | OutputError:
        text = str(getattr(error, "orig", None) or error)
        name = self.name
        if "is locked" in text:
            return StoreError(
                f"the runs database {name} is locked by another program; wait for it or close it, "
                "or pass another --store"
            )
        if "is full" in text:
            return output_error(Path(name), OSError("No space left on device"))
        if "readonly" in text or "read-only" in text:
            return StoreError(
                f"the runs database {name} is read-only; change its permissions or pass another "
                "--store"
            )
        if "unable to open" in text:
            return StoreError(
                f"cannot open the runs database {name}; check that its folder exists and can be "
                "written, or pass another --store"
            )
        if "not a database" in text or "malformed" in text or "disk I/O error" in text:
            return StoreError(
                f"{name} is damaged or not a runs database; restore a copy, move it away, or pass "
                "another --store"
            )
        first_line = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return StoreError(f"the runs database {name} failed: {first_line}")


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver's own implicit BEGIN is switched off: transactions begin in `_on_begin`.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    # A writer takes the lock at once; upgrading a read lock later could fail without waiting.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
