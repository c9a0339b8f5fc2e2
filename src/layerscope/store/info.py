"""What one can know about a run without opening the database again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerscope.store.owner import Owner
from layerscope.store.rundir import locate
from layerscope.store.schema import Run

STATUSES = ("running", "finished", "failed", "interrupted")


@dataclass(frozen=True)
class ArtifactInfo:
    """A file of a run and the hash it had when the run wrote it."""

    kind: str
    path: str  # relative to the run's folder where it lies inside
    sha256: str
    n_bytes: int


@dataclass(frozen=True)
class RunInfo:
    """One run as it is now; times are ISO 8601 in UTC."""

    id: str
    experiment: str
    model: str
    status: str  # one of STATUSES
    created_at: str
    started_at: str
    finished_at: str | None
    attempts: int
    out_dir: str  # where it was asked to write
    dir: str | None  # where its folder is now; None when it is gone
    key: str
    config: Mapping[str, Any]
    model_identity: Mapping[str, Any]
    versions: Mapping[str, Any]
    provenance: Mapping[str, Any] | None
    error: str | None
    n_prompts: int
    n_units: int
    results: tuple[str, ...]
    artifacts: tuple[ArtifactInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return asdict(self)


def describe(run: Run, n_units: int) -> RunInfo:
    """Return what is known about a run; one whose process died without a word is interrupted."""
    status = run.status
    if status == "running" and Owner(run.host, run.pid, run.process_started).is_dead():
        status = "interrupted"
    folder = locate(Path(run.out_dir), run.dir_id)
    return RunInfo(
        id=run.id,
        experiment=run.experiment.name,
        model=run.model.name,
        status=status,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at if status != "running" else None,
        attempts=run.attempts,
        out_dir=run.out_dir,
        dir=None if folder is None else str(folder),
        key=run.key,
        config=run.config,
        model_identity=run.model.identity,
        versions=run.versions,
        provenance=run.provenance,
        error=run.error,
        n_prompts=len(run.prompts),
        n_units=n_units,
        results=tuple(sorted(result.name for result in run.results)),
        artifacts=tuple(
            ArtifactInfo(entry.kind, entry.path, entry.sha256, entry.n_bytes)
            for entry in sorted(run.artifacts, key=lambda entry: entry.path)
        ),
    )
