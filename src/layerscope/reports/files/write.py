"""Writing all files of one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerscope.files import atomic_path, safe_name, write_json
from layerscope.measures.table import LayersTable
from layerscope.reports.files.audit import audit_frames
from layerscope.reports.files.baseline import artifact_audit, milestones
from layerscope.reports.files.dialect import write_csv
from layerscope.reports.files.document import document, failure
from layerscope.reports.files.rows import pure_next_token, raw_against_norm, raw_window, records
from layerscope.reports.files.view import View


def write_run_files(
    table: LayersTable,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    out_dir: Path,
) -> list[Path]:
    """Write the typed table, the CSV files and the JSON of one model; return their paths.

    `summary` is what `summarise(table).to_dict()` returns. The table comes first and the JSON last,
    so a JSON file says that the files it names are there.

    Raises:
        OutputError: the disk is full or `out_dir` cannot be written; files written before stay.
    """
    view = View(table, summary)
    identity = _identity(table.meta.model, provenance)
    stem = _stem(out_dir, table.meta.model, identity)
    parquet = out_dir / f"{stem}-layers.parquet"
    with atomic_path(parquet) as temporary:
        table.write_parquet(temporary)
    files = {"table": parquet}
    if view.has("norm"):
        pure = pure_next_token(table, view.config)
        files["records"] = write_csv(out_dir / f"{stem}-records.csv", records(table))
        files["pure_csv"] = write_csv(out_dir / f"{stem}-pure-next-token.csv", pure)
        files["milestones_csv"] = write_csv(out_dir / f"{stem}-milestones.csv", milestones(view))
    for lens in ("prism", "tuned"):
        if view.has("norm", lens):
            files |= _lens_files(view, lens, out_dir / stem)
    if view.has("norm", "raw"):
        both = raw_against_norm(table)
        files["rawlens_full_csv"] = write_csv(out_dir / f"{stem}-pure-next-token-rawlens.csv", both)
        window = raw_window(table, view.checked_layers())
        if window.height:
            files["rawlens_window_csv"] = write_csv(
                out_dir / f"{stem}-pure-next-token-rawlens-window.csv", window
            )
        files["artifact_audit_csv"] = write_csv(
            out_dir / f"{stem}-artifact-audit.csv", artifact_audit(view)
        )
    for name, (end, frame) in audit_frames(view).items():
        files[name] = write_csv(out_dir / f"{stem}-{end}.csv", frame)
    names = {name: path.name for name, path in files.items()}
    value = document(view, provenance, identity=identity, files=names)
    return [*files.values(), write_json(out_dir / f"{stem}.json", value)]


def _lens_files(view: View, lens: str, stem: Path) -> dict[str, Path]:
    pure = pure_next_token(view.table, view.config, lens)
    return {
        f"{lens}_records": write_csv(
            stem.with_name(f"{stem.name}-records-{lens}.csv"), records(view.table, lens)
        ),
        f"{lens}_pure_csv": write_csv(
            stem.with_name(f"{stem.name}-pure-next-token-{lens}.csv"), pure
        ),
    }


def write_failure(model: str, error: str, out_dir: Path) -> Path:
    """Write the JSON of a model that could not be run: valid, with status "failed" and the reason.

    Raises:
        OutputError: the disk is full or `out_dir` cannot be written.
    """
    return write_json(out_dir / f"{_stem(out_dir, model, model)}.json", failure(model, error))


def _identity(name: str, provenance: Mapping[str, Any]) -> str:
    """Return the full id of the model, of which a file name holds the last part."""
    model: Any = provenance.get("model")
    if isinstance(model, Mapping):
        for key in ("id", "path", "name"):
            if isinstance(model.get(key), str):
                return model[key]
    return model if isinstance(model, str) else name


def _stem(out_dir: Path, model: str, identity: str) -> str:
    """Return `output-NAME`, with a number where another model of the same NAME has written."""
    stem = f"output-{safe_name(model)}"
    candidate, number = stem, 2
    while _writer(out_dir / f"{candidate}.json") not in (None, identity):
        candidate = f"{stem}-{number}"
        number += 1
    return candidate


def _writer(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        return None
