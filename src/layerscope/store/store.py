"""The store: starting and resuming runs, and finding them again."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from layerscope.errors import StoreError, nearest
from layerscope.files import canonical_json, finite, output_error, remove_temporaries, sha256_text
from layerscope.store import compare as _compare
from layerscope.store import export as _export
from layerscope.store.database import Database
from layerscope.store.handle import UNITS, RunHandle, UtcClock, content_key, utc_now
from layerscope.store.info import STATUSES, RunInfo, describe
from layerscope.store.owner import Owner
from layerscope.store.rundir import identify, locate
from layerscope.store.schema import Experiment, Model, Prompt, Run, RunPrompt, WorkUnit

_BYTE_PACKAGES = ("layerscope", "torch", "transformers", "polars", "numpy")


def byte_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide the bytes of a table."""
    versions: dict[str, str | None] = {}
    for package in _BYTE_PACKAGES:
        versions[package] = None
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


class Store:
    """A runs database; `Store.open` makes one, a `with` block closes it."""

    def __init__(self, database: Database, *, clock: UtcClock = utc_now):
        self._database = database
        self._clock = clock

    @staticmethod
    def open(
        url_or_path: str | os.PathLike[str],
        *,
        busy_timeout_s: float = 10.0,
        clock: UtcClock = utc_now,
    ) -> Store:
        """Open a store, creating the database where there is none.

        `url_or_path` is the path of an SQLite file or a database URL.

        Raises:
            StoreError: the database is locked, damaged, newer than this program, or not ours.
        """
        return Store(Database(url_or_path, busy_timeout_s=busy_timeout_s), clock=clock)

    @property
    def name(self) -> str:
        """The path or URL of the database, without its password."""
        return self._database.name

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- executing ----------------------------------------------------------------------------

    def start(
        self,
        *,
        experiment: str = "layers",
        config: Mapping[str, Any],
        model: Mapping[str, Any],
        prompts: Sequence[Mapping[str, Any]],
        out_dir: Path,
        key: str | None = None,
        versions: Mapping[str, Any] | None = None,
        reuse_finished: bool = False,
    ) -> RunHandle:
        """Start a run that writes to `out_dir`, or resume the unfinished one of the same content.

        `model` needs a "name" and otherwise holds its identity (see `content_key`). `key` is the
        content key when the caller has computed it. A finished run of the same content makes way
        for a new one, unless `reuse_finished` and its files are still in `out_dir`: then its
        handle is returned with `.finished` set (for a sweep over several models that was killed
        and goes on in the same directory).

        Raises:
            StoreError: another live process of this host executes that run.
            OutputError: `out_dir` cannot be written.
        """
        prompt_dicts: list[dict[str, Any]] = [finite(prompt) for prompt in prompts]
        versions = byte_versions() if versions is None else versions
        key = key or content_key(
            experiment=experiment,
            config=config,
            model=model,
            prompts=prompt_dicts,
            versions=versions,
        )
        folder = out_dir.expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from error
        dir_id = identify(folder, key=key)
        with self._database.writing() as session:
            reusable = dir_id if reuse_finished else None
            run = _find_same(session, key, str(folder), reusable_in=reusable)
            resumed = run is not None
            if run is None:
                run = self._new_run(session, experiment, model, prompt_dicts)
                run.key, run.out_dir, run.dir_id = key, str(folder), dir_id
                run.config, run.versions = finite(config), finite(versions)
            finished = run.status == "finished"
            if not finished:
                _claim(run, self._now(), resumed=resumed)
                _bring_units(run, folder, dir_id)
            run_id = run.id
        if resumed:
            remove_temporaries(folder)
        return RunHandle(
            self._database,
            run_id=run_id,
            key=key,
            folder=folder,
            resumed=resumed,
            finished=finished,
            clock=self._clock,
        )

    def _new_run(
        self,
        session: Session,
        experiment: str,
        model: Mapping[str, Any],
        prompts: list[dict[str, Any]],
    ) -> Run:
        now = self._now()
        run = Run(
            id=_new_id(session),
            experiment=_experiment(session, experiment),
            model=_model(session, model),
            status="running",
            provenance=None,
            error=None,
            created_at=now,
            started_at=now,
            finished_at=None,
            attempts=1,
            host="",
            pid=0,
            process_started=0.0,
        )
        ids = _prompt_ids(session, prompts)
        run.prompts = [
            RunPrompt(position=position, prompt_id=prompt_id)
            for position, prompt_id in enumerate(ids)
        ]
        session.add(run)
        return run

    # -- finding ------------------------------------------------------------------------------

    def runs(
        self, limit: int | None = 50, model: str | None = None, status: str | None = None
    ) -> list[RunInfo]:
        """Return the latest runs first; `model` matches any part of the model's name.

        Raises:
            StoreError: no run can have that status.
        """
        if status is not None and status not in STATUSES:
            raise StoreError(
                f"unknown status {status!r}; use {', '.join(STATUSES)}{nearest(status, STATUSES)}"
            )
        query = select(Run).join(Run.model).order_by(Run.created_at.desc(), Run.id)
        if model:
            query = query.where(func.lower(Model.name).contains(model.lower(), autoescape=True))
        found: list[RunInfo] = []
        with self._database.reading() as session:
            for run in session.scalars(query):
                info = describe(run, _unit_count(session, run))
                # Whether a run is running or was interrupted is known only after a look at its
                # process, so the database cannot select by status.
                if status is None or info.status == status:
                    found.append(info)
                if limit is not None and len(found) >= limit:
                    break
        return found

    def run(self, id_or_prefix: str) -> RunInfo:
        """Return the run with that id, unique beginning of an id, or "latest".

        Raises:
            StoreError: no run, or more than one, fits.
        """
        with self._database.reading() as session:
            run = self._find(session, id_or_prefix)
            return describe(run, _unit_count(session, run))

    def result(self, id_or_prefix: str, name: str) -> Any:
        """Return a named result of a run.

        Raises:
            StoreError: there is no such run, or it has no such result.
        """
        with self._database.reading() as session:
            run = self._find(session, id_or_prefix)
            names = {result.name: result.value for result in run.results}
            if name not in names:
                raise StoreError(
                    f"run {run.id} has no result {name!r}; it has "
                    f"{', '.join(sorted(names)) or 'none'}{nearest(name, names)}"
                )
            return names[name]

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """Return two runs side by side: what was configured differently, and their milestones.

        Raises:
            StoreError: a run is unknown or has no saved "summary".
        """
        first, second = self.run(a), self.run(b)
        return _compare.compare_runs(
            first, self.result(first.id, "summary"), second, self.result(second.id, "summary")
        )

    def export(self, run: str, path: Path) -> Path:
        """Write a run's artifacts and a manifest with their SHA-256 to a folder or a `.zip`.

        Raises:
            StoreError: the run is unknown, or an artifact is missing or was changed.
            OutputError: `path` exists already, or cannot be written.
        """
        info = self.run(run)
        with self._database.reading() as session:
            results = {entry.name: entry.value for entry in self._find(session, info.id).results}
        return _export.export_run(info, results, path)

    def delete(self, id_or_prefix: str) -> RunInfo:
        """Forget a run; the files it wrote stay where they are.

        Raises:
            StoreError: the run is unknown, or is being executed.
        """
        with self._database.writing() as session:
            run = self._find(session, id_or_prefix)
            info = describe(run, _unit_count(session, run))
            if info.status == "running":
                raise StoreError(f"run {run.id} is being executed by process {run.pid}; stop it")
            session.execute(delete(Run).where(Run.id == run.id))
        return info

    def _find(self, session: Session, id_or_prefix: str) -> Run:
        latest = select(Run).order_by(Run.created_at.desc(), Run.id).limit(1)
        if id_or_prefix == "latest":
            run = session.scalars(latest).one_or_none()
            if run is None:
                raise StoreError(f"{self.name} holds no runs yet; start one first")
            return run
        query = select(Run).where(Run.id.startswith(id_or_prefix.lower(), autoescape=True))
        found = list(session.scalars(query.limit(4))) if id_or_prefix else []
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(run.id for run in found[:3])
            raise StoreError(
                f"{id_or_prefix!r} is the beginning of several runs ({names}, ...); give more of it"
            )
        recent = select(Run.id).order_by(Run.created_at.desc()).limit(500)
        known = list(session.scalars(recent))
        hint = nearest(id_or_prefix, [*known, "latest"]) or "; see `layerscope runs list`"
        raise StoreError(f"no run {id_or_prefix!r} in {self.name}{hint}")

    def _now(self) -> str:
        return self._clock().isoformat(timespec="milliseconds")


def _find_same(session: Session, key: str, folder: str, *, reusable_in: str | None) -> Run | None:
    usable = Run.status != "finished"
    if reusable_in is not None:
        usable |= Run.dir_id == reusable_in
    query = (
        select(Run)
        .where(Run.key == key, Run.out_dir == folder, usable)
        .order_by(Run.created_at.desc(), Run.id)
    )
    # The row lock is for servers; an SQLite writer holds the whole database already.
    return session.scalars(query.limit(1).with_for_update()).one_or_none()


def _claim(run: Run, now: str, *, resumed: bool) -> None:
    """Make this process the owner; refuse when another live process is."""
    if resumed:
        owner = Owner(run.host, run.pid, run.process_started)
        if run.status == "running" and owner.is_other_live_process():
            raise StoreError(
                f"run {run.id} is being executed by process {run.pid}; wait for it or stop it "
                "before starting the same run again"
            )
        run.attempts += 1
        run.started_at, run.finished_at, run.error = now, None, None
    owner = Owner.current()
    run.status = "running"
    run.host, run.pid, run.process_started = owner.host, owner.pid, owner.process_started


def _bring_units(run: Run, folder: Path, dir_id: str) -> None:
    """Fetch the finished units of a resumed run from a directory that was rotated meanwhile."""
    if run.dir_id == dir_id:
        return
    previous = locate(folder, run.dir_id)
    target = folder / UNITS / run.id
    if previous is not None and (previous / UNITS / run.id).is_dir() and not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            (previous / UNITS / run.id).rename(target)
        except OSError as error:
            raise output_error(target, error) from error
    run.dir_id = dir_id


def _new_id(session: Session) -> str:
    while True:
        run_id = uuid.uuid4().hex[:10]
        if session.get(Run, run_id) is None:
            return run_id


def _experiment(session: Session, name: str) -> Experiment:
    found = session.scalars(select(Experiment).where(Experiment.name == name)).one_or_none()
    return found or Experiment(name=name)


def _model(session: Session, identity: Mapping[str, Any]) -> Model:
    digest = sha256_text(canonical_json(identity))
    found = session.scalars(select(Model).where(Model.sha256 == digest)).one_or_none()
    name = str(identity.get("name") or identity.get("id") or "unnamed")
    return found or Model(sha256=digest, name=name, identity=finite(identity))


def _prompt_ids(session: Session, prompts: list[dict[str, Any]]) -> list[int]:
    digests = [sha256_text(canonical_json(prompt)) for prompt in prompts]
    ids: dict[str, int] = {}
    unique = list(dict.fromkeys(digests))
    for first in range(0, len(unique), 500):  # databases limit the parameters of a statement
        chunk = unique[first : first + 500]
        rows = session.execute(select(Prompt.sha256, Prompt.id).where(Prompt.sha256.in_(chunk)))
        ids.update((sha256, prompt_id) for sha256, prompt_id in rows)
    contents = dict(zip(digests, prompts, strict=True))
    new = [Prompt(sha256=sha, content=contents[sha]) for sha in unique if sha not in ids]
    session.add_all(new)
    session.flush()
    ids.update((prompt.sha256, prompt.id) for prompt in new)
    return [ids[digest] for digest in digests]


def _unit_count(session: Session, run: Run) -> int:
    query = select(func.count()).select_from(WorkUnit).where(WorkUnit.run_id == run.id)
    return session.scalar(query) or 0
