"""One run of an experiment on the command line: started, resumed, written, reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from layerscope.cli.common import DEFAULT_FOLDER, console
from layerscope.experiments.units import Outcome, Progress, UnitStore
from layerscope.files import atomic_path, canonical_json, sha256_text, write_json
from layerscope.store import RunHandle, Store, close_run_dir, open_run_dir

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")

SUMMARY, PROVENANCE, REPORT = "summary.json", "provenance.json", "report.html"

Execute = Callable[[UnitStore, "Progress | None"], Outcome]
Page = Callable[[Outcome, Path], Path]


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """Where a run is kept: its folder, its database, and whether a page is written."""

    out: Path = DEFAULT_FOLDER
    store: str | None = None
    html: bool = True


@dataclass(frozen=True)
class Kept:
    """A run that is finished and kept: its outcome, and its files."""

    run_id: str
    run_dir: Path
    store: str
    outcome: Outcome
    files: list[Path] = field(default_factory=lambda: [])
    report: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        return {
            "run_id": self.run_id,
            "run_dir": str(self.run_dir),
            "store": self.store,
            "files": [str(path) for path in self.files],
            "report": str(self.report) if self.report else None,
            "summary": self.outcome.summary,
            "provenance": self.outcome.provenance,
        }


def keep(
    experiment: str,
    *,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    execute: Execute,
    page: Page | None = None,
    options: KeepOptions | None = None,
    unit: str = "units",
) -> Kept:
    """Carry out one experiment inside the store, and write its tables, summary and page.

    A killed run goes on where it stopped when it is given again; a finished one of the same content
    in an unfinished folder is read back. Tables become ``<name>.parquet``.

    Args:
        experiment: name under which the store knows it ("patch", "steer", ...).
        config: everything that decides the result, JSON-able; part of the run's content key.
        model: provenance of the model, with its ``name``.
        prompts: what was asked, JSON-able.
        execute: does the work; given where units are kept, and whom to tell of progress.
        page: writes the HTML page of the outcome to a path.
        options: folder, database, page or not.
        unit: what progress counts.
    """
    options = options or KeepOptions()
    key = sha256_text(canonical_json([experiment, dict(config), dict(model), list(prompts)]))
    url = options.store or str(options.out / "layerscope.db")
    with Store.open(url) as store:
        folder = open_run_dir(options.out, key=key)
        with store.start(
            experiment=experiment,
            config=dict(config),
            model=dict(model),
            prompts=[dict(prompt) for prompt in prompts],
            out_dir=folder.path,
            reuse_finished=folder.resumed,
        ) as run:
            if run.finished:
                outcome = _read_back(store, run)
            else:
                with show_progress(experiment, unit) as progress:
                    outcome = execute(run, progress)
                _finish(run, outcome, folder.path)
        files = _files(folder.path, outcome)
        report = None
        if options.html and page is not None:
            report = page(outcome, folder.path / REPORT)
        close_run_dir(folder.path)
        return Kept(run.id, folder.path, store.name, outcome, files, report)


def load_quietly(do: Callable[[], T], name: str) -> T:
    """Load a model (and check what it is for) under a spinner; warnings become a line each."""
    from rich.markup import escape

    screen = console(stderr=True)
    with screen.status(f"loading {escape(name)}"), warnings.catch_warnings(record=True) as notes:
        loaded = do()
    for note in notes:  # a line each, without the place in our code
        screen.print(f"note: {note.message}", markup=False, highlight=False, soft_wrap=True)
    return loaded


@contextmanager
def show_progress(name: str, unit: str) -> Generator[Progress | None]:
    """Show a bar with the time left on a terminal; stay quiet in a pipe."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _finish(run: RunHandle, outcome: Outcome, folder: Path) -> None:
    for name, table in outcome.tables.items():
        path = folder / f"{name}.parquet"
        with atomic_path(path) as temporary:
            table.write_parquet(temporary, compression="zstd")
        run.add_artifact(name, path)
    for name, value in ((SUMMARY, outcome.summary), (PROVENANCE, outcome.provenance)):
        write_json(folder / name, value)
        run.add_artifact(name, folder / name)
    run.save_result("summary", outcome.summary)
    run.save_result("tables", list(outcome.tables))
    run.finish(outcome.provenance)
    run.cleanup_units()


def _read_back(store: Store, run: RunHandle) -> Outcome:
    run.cleanup_units()  # a kill between the end of the run and its tidying left them
    info = store.run(run.id)
    tables: dict[str, pl.DataFrame] = {}
    for name in store.result(run.id, "tables"):
        path = run.artifact(name)
        assert path is not None
        tables[name] = pl.read_parquet(path)
    return Outcome(tables, store.result(run.id, "summary"), dict(info.provenance or {}))


def _files(folder: Path, outcome: Outcome) -> list[Path]:
    return [
        *(folder / f"{name}.parquet" for name in outcome.tables),
        folder / SUMMARY,
        folder / PROVENANCE,
    ]
