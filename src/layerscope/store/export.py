"""Taking a run away: its artifacts, its results and a manifest with their hashes."""

from __future__ import annotations

import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from layerscope.errors import OutputError, StoreError
from layerscope.files import atomic_path, output_error, sha256_file, write_json
from layerscope.store.info import ArtifactInfo, RunInfo

MANIFEST = "manifest.json"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # a zip of the same run has the same bytes


def export_run(run: RunInfo, results: Mapping[str, Any], path: Path) -> Path:
    """Write artifacts, results and manifest of a run to `path`: a folder, or a zip by its suffix.

    Raises:
        StoreError: an artifact is missing or was changed since the run wrote it.
        OutputError: `path` exists already, or cannot be written.
    """
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already; export to another name or remove it first")
    files = _collect(run)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        staging.mkdir(parents=True)
        for name, (source, _entry) in files.items():
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        write_json(staging / MANIFEST, _manifest(run, results, files))
        if path.suffix.lower() == ".zip":
            _zip(staging, path)
        else:
            staging.rename(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _collect(run: RunInfo) -> dict[str, tuple[Path, ArtifactInfo]]:
    """Map names in the export to checked files."""
    files: dict[str, tuple[Path, ArtifactInfo]] = {}
    for entry in run.artifacts:
        source = Path(run.dir, entry.path) if run.dir is not None else Path(entry.path)
        try:
            digest = sha256_file(source)
        except OSError as error:
            raise StoreError(
                f"artifact {entry.path} of run {run.id} is missing; put it back, or run again"
            ) from error
        if digest != entry.sha256:
            raise StoreError(
                f"artifact {entry.path} of run {run.id} was changed since the run wrote it; "
                "restore it, or run again"
            )
        name = _free_name(entry.path, {MANIFEST, *files})
        files[name] = (source, entry)
    return files


def _free_name(path: str, taken: set[str]) -> str:
    # A file outside the run's folder goes to the top of the export under its own name.
    outside = Path(path).is_absolute()
    name = PurePosixPath(path).name if outside else path
    stem, suffix, number = name.removesuffix(Path(name).suffix), Path(name).suffix, 2
    while name in taken:
        name = f"{stem}-{number}{suffix}"
        number += 1
    return name


def _manifest(
    run: RunInfo,
    results: Mapping[str, Any],
    files: Mapping[str, tuple[Path, ArtifactInfo]],
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "run": {name: value for name, value in run.to_dict().items() if name != "artifacts"},
        "results": dict(results),
        "files": [
            {"name": name, "kind": entry.kind, "sha256": entry.sha256, "n_bytes": entry.n_bytes}
            for name, (_source, entry) in sorted(files.items())
        ],
    }


def _zip(folder: Path, path: Path) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for source in sorted(file for file in folder.rglob("*") if file.is_file()):
            entry = zipfile.ZipInfo(source.relative_to(folder).as_posix(), date_time=_ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with source.open("rb") as stream, archive.open(entry, "w") as target:
                shutil.copyfileobj(stream, target)
