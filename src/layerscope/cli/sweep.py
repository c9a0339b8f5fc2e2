"""One command over one or several models: run, keep, report; a failure stays with its model."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerscope.cli.common import DEFAULT_FOLDER, console
from layerscope.cli.keep import load_quietly, show_progress
from layerscope.errors import LayerscopeError
from layerscope.experiments.layers import LayersConfig, LayersResult, Plan, PromptSet, execute, plan
from layerscope.files import canonical_json, sha256_file, sha256_text
from layerscope.measures.table import LayersTable
from layerscope.models import load
from layerscope.reports.files import write_failure, write_run_files
from layerscope.reports.html import write_html
from layerscope.store import RunDir, Store, close_run_dir, open_run_dir

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Where a sweep reads its models and writes its results."""

    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    instruct: bool | None = None
    out: Path = DEFAULT_FOLDER
    store: str | None = None
    html: bool = True


@dataclass
class ModelOutcome:
    """What became of one model: a result with its files, or the line that says why not."""

    model: str
    status: str
    run_id: str | None = None
    error: str | None = None
    result: LayersResult | None = None
    files: list[Path] = field(default_factory=lambda: [])

    @property
    def complete(self) -> bool:
        """Whether the model was read, on every prompt that was given."""
        return self.result is not None and not self.result.left_out

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values; published field names stand at its top level."""
        summary = self.result.summary if self.result else {}
        baseline: Mapping[str, Any] = {}
        if summary and summary.get("baseline") is not None:
            baseline = summary["passes"][summary["baseline"]]
        return {
            **baseline,
            "model": self.model,
            "status": self.status,
            "error": self.error,
            "run_id": self.run_id,
            "files": [str(path) for path in self.files],
            "summary": summary,
            "provenance": self.result.provenance if self.result else {},
        }


@dataclass
class Sweep:
    """All outcomes of one command and the folder that holds their files."""

    run_dir: Path
    store: str
    outcomes: list[ModelOutcome]
    report: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as JSON values; with one model its fields stand at the top level too."""
        entries = [outcome.to_dict() for outcome in self.outcomes]
        return {
            **(entries[0] if len(entries) == 1 else {}),
            "run_dir": str(self.run_dir),
            "store": self.store,
            "report": str(self.report) if self.report else None,
            "models": entries,
        }


def run_sweep(
    models: Sequence[str], prompts: PromptSet, config: LayersConfig, options: SweepOptions
) -> Sweep:
    """Run the layers experiment on every model, keep results, write files and the HTML page.

    With one model, whatever is wrong with it or with the prompts is raised before anything is
    written. With several, a model's failure becomes its recorded status and the others go on.
    """
    first = _prepare(models[0], prompts, config, options) if len(models) == 1 else None
    key = sha256_text(
        canonical_json([list(models), config.to_dict(), prompts.digest(), _how(options)])
    )
    url = options.store or str(options.out / "layerscope.db")
    with Store.open(url) as store:
        folder = open_run_dir(options.out, key=key)
        outcomes: list[ModelOutcome] = []
        for model in models:
            try:
                planned = first or _prepare(model, prompts, config, options)
                outcomes.append(_run_one(store, folder, model, planned))
                _say_left_out(model, planned)
            except LayerscopeError as error:
                if len(models) == 1:
                    raise
                outcomes.append(_record_failure(store, folder, model, prompts, config, error))
            first = None
            gc.collect()
        sweep = Sweep(folder.path, store.name, outcomes)
        finished = [outcome.result for outcome in outcomes if outcome.result is not None]
        if options.html and finished:
            pages = [(result.table, result.summary, result.provenance) for result in finished]
            sweep.report = write_html(folder.path / REPORT, pages)
        close_run_dir(folder.path)
    return sweep


def _record_failure(
    store: Store,
    folder: RunDir,
    model: str,
    prompts: PromptSet,
    config: LayersConfig,
    error: LayerscopeError,
) -> ModelOutcome:
    """Keep the line that says why a model has no result, in the folder and in the database."""
    console(stderr=True).print(f"{model} failed: {error}", markup=False, soft_wrap=True)
    path = write_failure(model, str(error), folder.path)
    run = store.start(
        experiment="layers",
        config=config.to_dict(),
        model={"name": model},
        prompts=[asdict(entry) for entry in prompts.passes()],
        out_dir=folder.path,
    )
    run.fail(str(error))
    return ModelOutcome(model, "failed", run_id=run.id, error=str(error), files=[path])


def _say_left_out(model: str, planned: Plan) -> None:
    """Say on stderr why the exit code is not 0; which prompts is in the summary."""
    found = planned.asked.left_out
    if found:
        count = f"{len(found)} of {len(found) + len(planned.asked.passes)}"
        line = f"{model}: {count} prompts left out; mend them or drop them (the summary says why)"
        console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _how(options: SweepOptions) -> list[Any]:
    return [options.device, options.dtype, options.revision, options.instruct]


def _prepare(model: str, prompts: PromptSet, config: LayersConfig, options: SweepOptions) -> Plan:
    """Load one model and check every prompt against it; nothing is written."""

    def prepared() -> Plan:
        loaded = load(
            model,
            device=options.device,
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            instruct=options.instruct,
        )
        return plan(loaded, prompts, config)

    return load_quietly(prepared, model)


def _text_sha256(config: LayersConfig) -> str | None:
    path = Path(config.text or "")
    return sha256_file(path) if path.is_file() else None


def _run_one(store: Store, folder: RunDir, model: str, planned: Plan) -> ModelOutcome:
    """Execute one plan inside the store, and write its files."""
    with store.start(
        experiment="layers",
        # A folder may hold another lens than last time, a file other text: what is in them is part
        # of the run.
        config={
            **planned.config.to_dict(),
            "lens_identity": planned.identity["lenses"],
            "text_sha256": _text_sha256(planned.config),
        },
        model={"name": planned.model.name, **planned.model.provenance()},
        prompts=[
            {**asdict(item.source), "prompt_sha256": item.prompt_sha256}
            for unit in planned.units
            for item in unit.passes
        ],
        out_dir=folder.path,
        reuse_finished=folder.resumed,
    ) as run:
        table = run.artifact("table") if run.finished else None
        if table is not None:
            run.cleanup_units()  # a kill between the end of the run and its tidying left them
            info = store.run(run.id)
            result = LayersResult(
                LayersTable.read_parquet(table),
                store.result(run.id, "summary"),
                dict(info.provenance or {}),
            )
            return ModelOutcome(model, "finished", run_id=run.id, result=result)
        with show_progress(planned.model.name, "prompts") as progress:
            result = execute(planned, units=run, progress=progress)
        files = write_run_files(result.table, result.summary, result.provenance, folder.path)
        for path in files:
            run.add_artifact("table" if path.suffix == ".parquet" else path.name, path)
        run.save_result("summary", result.summary)
        run.finish(result.provenance)
        run.cleanup_units()
        return ModelOutcome(model, "finished", run_id=run.id, result=result, files=files)
