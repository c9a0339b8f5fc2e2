"""Runs to compare, from wherever they lie: ids in the store, folders of runs, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from layerscope.errors import StoreError, TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.readings import Reading, read_battery, read_layers, with_labels
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.store.info import RunInfo
from layerscope.store.rundir import LATEST

if TYPE_CHECKING:
    from layerscope.store.store import Store

TABLES = "*-layers.parquet"
BATTERY_TABLES = ("rows", "prompts", "items", "rollup", "excluded")


def open_readings(names: Sequence[str], store: Store | None) -> list[Reading]:
    """Return the runs of ids, beginnings of ids, folders and Parquet tables, in that order.

    A folder holds a battery run, or one layers run per table in it. Of a folder or a table the
    summary is computed anew; what the checks of the model found is read where it was written.

    Raises:
        StoreError: no such run, file or folder; a run that is not finished, or is named twice; an
            experiment that has no milestones.
        TableError: a file is no table of a run.
    """
    found: list[Reading] = []
    for name in names:
        found += _open(name, store)
    for reading in found:
        if sum(other.run == reading.run for other in found) > 1:
            raise StoreError(f"run {reading.run} is named twice; name each run once")
    return with_labels(found)


def _open(name: str, store: Store | None) -> list[Reading]:
    path = Path(name).expanduser()
    if path.is_file():
        return [_of_table(path)]
    if path.is_dir():
        return _of_folder(path)
    if store is None:
        raise StoreError(
            f"{name} is neither a folder nor a file, and there is no runs database to look in; "
            "pass --store"
        )
    return [_of_run(store.run(name), store)]


def _of_run(info: RunInfo, store: Store) -> Reading:
    if info.experiment not in ("layers", "battery"):
        raise StoreError(
            f"run {info.id} is of the experiment {info.experiment}, which has no milestones by "
            "depth; name runs of layers or battery"
        )
    if info.status != "finished":
        raise StoreError(f"run {info.id} is {info.status}; give its command again to finish it")
    summary, provenance = store.result(info.id, "summary"), dict(info.provenance or {})
    if info.experiment == "battery":
        tables = {
            entry.kind: pl.read_parquet(_there(info, entry.path))
            for entry in info.artifacts
            if entry.kind in BATTERY_TABLES
        }
        return read_battery(tables, summary, provenance, run=info.id)
    path = next((entry.path for entry in info.artifacts if entry.path.endswith(".parquet")), None)
    if path is None:
        raise StoreError(f"run {info.id} has no table; run it again")
    table = LayersTable.read_parquet(_there(info, path))
    return read_layers(table, summary, provenance, run=info.id)


def _there(info: RunInfo, path: str) -> Path:
    place = Path(info.dir or info.out_dir) / path
    if not place.is_file():
        raise StoreError(f"run {info.id} has lost its file {place}; run it again")
    return place


def _of_folder(folder: Path) -> list[Reading]:
    """Read what lies in a run's folder, or in the latest run of the folder given with --out."""
    places = [folder, folder / LATEST]
    for place in places:
        if (place / "summary.json").is_file() and (place / "rollup.parquet").is_file():
            return [_of_battery(place)]
        tables = sorted(place.glob(TABLES))
        if tables:
            return [_of_table(path) for path in tables]
    raise StoreError(
        f"{folder} holds no layers or battery run; name a folder with a {TABLES[2:]} table"
    )


def _of_battery(folder: Path) -> Reading:
    tables = {
        name: pl.read_parquet(folder / f"{name}.parquet")
        for name in BATTERY_TABLES
        if (folder / f"{name}.parquet").is_file()
    }
    summary, provenance = (_json(folder / name) for name in ("summary.json", "provenance.json"))
    return read_battery(tables, summary, provenance, run=str(folder))


def _of_table(path: Path) -> Reading:
    """Read one table, with what the run's JSON file beside it says of checks and provenance."""
    table = LayersTable.read_parquet(path)
    document = _json(path.with_name(path.name.replace("-layers.parquet", ".json")))
    if document.get("provenance") is None:
        return read_layers(table, summarise(table).to_dict(), table.meta.provenance, run=str(path))
    checks: Mapping[str, Any] = document.get("diagnostics") or {}
    summary = summarise(table, _thresholds(document["provenance"])).to_dict()
    guidance: Mapping[str, Any] = document.get("measurement_guidance") or {}
    if guidance.get("reason_details") is not None:
        summary["measurement_guidance"] = {**guidance, "reasons": guidance["reason_details"]}
    summary["diagnostics"] = {
        name: checks[name]
        for name in ("repeatability",)
        if isinstance(checks.get(name), Mapping) and checks[name].get("status", "ok") == "ok"
    }
    return read_layers(table, summary, document["provenance"], run=str(path))


def _thresholds(provenance: Mapping[str, Any]) -> MeasureConfig:
    """Return the thresholds that a run was measured with."""
    written: Mapping[str, Any] = (provenance.get("config") or {}).get("measures") or {}
    known = {entry.name for entry in fields(MeasureConfig)}
    options: dict[str, Any] = {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in written.items()
        if name in known
    }
    return MeasureConfig(**options)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} is not readable JSON: {error}; run it again") from error
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
