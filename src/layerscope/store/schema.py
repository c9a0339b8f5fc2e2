"""The tables of the runs database (SQLAlchemy 2, typed)."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

SCHEMA_VERSION = 1


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {dict[str, Any]: JSON, Any: JSON}  # noqa: RUF012 - SQLAlchemy's own form


class StoreInfo(Base):
    """Facts about the database itself; `schema_version` is the one that matters."""

    __tablename__ = "store_info"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Experiment(Base):
    """A kind of experiment, such as "layers"."""

    __tablename__ = "experiments"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)


class Model(Base):
    """One model in one state: id, revision or weights hash, tokenizer hash, dtype, device."""

    __tablename__ = "models"
    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(256), index=True)
    identity: Mapped[dict[str, Any]] = mapped_column()


class Prompt(Base):
    """One prompt with its answer and labels, shared by all runs that used it."""

    __tablename__ = "prompts"
    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    content: Mapped[dict[str, Any]] = mapped_column()


class RunPrompt(Base):
    """Which prompts a run used, in which order."""

    __tablename__ = "run_prompts"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"), index=True)
    prompt: Mapped[Prompt] = relationship()


class Run(Base):
    """One execution of one experiment on one model, resumed as often as it took."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    experiment_id: Mapped[int] = mapped_column(ForeignKey("experiments.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    key: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16), index=True)
    out_dir: Mapped[str] = mapped_column(Text)  # where it was asked to write
    dir_id: Mapped[str] = mapped_column(String(32))  # finds that folder again after a rotation
    config: Mapped[dict[str, Any]] = mapped_column()
    versions: Mapped[dict[str, Any]] = mapped_column()
    provenance: Mapped[Any | None] = mapped_column()
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(String(40), index=True)  # ISO 8601, UTC
    started_at: Mapped[str] = mapped_column(String(40))  # of the latest attempt
    finished_at: Mapped[str | None] = mapped_column(String(40))
    attempts: Mapped[int] = mapped_column(default=1)
    # Who executes it: enough to tell a live process from a dead one whose id was used again.
    host: Mapped[str] = mapped_column(String(256))
    pid: Mapped[int] = mapped_column()
    process_started: Mapped[float] = mapped_column()  # seconds since the epoch

    experiment: Mapped[Experiment] = relationship()
    model: Mapped[Model] = relationship()
    prompts: Mapped[list[RunPrompt]] = relationship(
        order_by=RunPrompt.position, cascade="all, delete-orphan", passive_deletes=True
    )
    units: Mapped[list[WorkUnit]] = relationship(cascade="all, delete-orphan", passive_deletes=True)
    results: Mapped[list[Result]] = relationship(cascade="all, delete-orphan", passive_deletes=True)
    artifacts: Mapped[list[Artifact]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True
    )

    __table_args__ = (Index("ix_runs_key_status", "key", "status"),)


class WorkUnit(Base):
    """One finished piece of a run; its rows lie in a Parquet file whose hash is recorded here."""

    __tablename__ = "work_units"
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(256))
    path: Mapped[str] = mapped_column(Text)  # relative to the run's folder
    sha256: Mapped[str] = mapped_column(String(64))
    n_bytes: Mapped[int] = mapped_column()
    n_rows: Mapped[int] = mapped_column()
    created_at: Mapped[str] = mapped_column(String(40))

    __table_args__ = (UniqueConstraint("run_id", "key"),)


class Result(Base):
    """A named JSON result of a run, such as "summary"."""

    __tablename__ = "results"
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(128))
    value: Mapped[Any] = mapped_column()

    __table_args__ = (UniqueConstraint("run_id", "name"),)


class Artifact(Base):
    """A file that a run wrote, with the hash it had then."""

    __tablename__ = "artifacts"
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(Text)  # relative to the run's folder where it lies inside
    sha256: Mapped[str] = mapped_column(String(64))
    n_bytes: Mapped[int] = mapped_column()
    created_at: Mapped[str] = mapped_column(String(40))

    __table_args__ = (UniqueConstraint("run_id", "path"),)
