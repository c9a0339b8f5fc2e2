"""``layerscope pathways``: from causal features to proven edges and the tokens behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import DeviceOption, DtypeOption, JsonOption, console, emit_json

if TYPE_CHECKING:
    from layerscope.experiments.pathways import StageRun, Workspace

HELP = "Feature pathways: audit causal features, find what drives them, prove it, name the tokens."

RUN_HELP = """Run all stages: audit, select, prototype, discover, replay, tokens, integrate.

Stages that are fresh (same inputs, same options) are skipped, a failed one stops the run, and a
killed one goes on after its last finished chunk with the same result. Results lie in OUT/results.

- `layerscope pathways run --config pathways.yaml`
- `layerscope pathways run --data DATA --model MODEL --dictionaries DIR --dry-run`

Exit code 0: all good, 1: with warnings, 2: errors.
"""

STAGE_HELP = {
    "audit": "Check checkpoints and response logs; every fault is named with file and record.",
    "select": "Choose the causal features with the largest effects per layer, and the prompts.",
    "prototype": "Try one target on one prompt: does it fit into memory, does it find anything?",
    "discover": "Find the upstream features of every target by gradient, on every prompt.",
    "replay": "Carry out every edge at several doses, against random edits; give verdicts.",
    "tokens": "Associate tokens with features, trace their input tokens, and what they write for.",
    "integrate": "Join everything by feature id; write the graph as JSON, GraphML and for viewers.",
}
_CODES = "Exit code 0: good, 1: with warnings, 2: errors. Skipped when fresh."

REPORT_HELP = """Write the HTML page of a run: audit, ranked edges, replay, graph.

- `layerscope pathways report pathways-run`
"""

DEFAULT_OUT = Path("pathways-run")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file; options given here replace its fields.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Folder of checkpoints and response logs.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Hugging Face id or folder.")]
DictionariesOption = Annotated[
    str | None, typer.Option("--dictionaries", help="Folder, or OWNER/REPOSITORY[/FOLDER].")
]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="Prompts file. Default: prompts.json of the data.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the configuration."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of samples, nulls and shuffles.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Skip fresh stages and finished chunks, or do anew."),
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the memory and time plan; compute nothing.")
]
CompatOption = Annotated[
    bool,
    typer.Option(
        "--source-compat",
        help="Rules and names of earlier work: last token, |gradient| > 0.1, candidates by "
        "activation, no block 0, JSON files of its names.",
    ),
]
PositionsOption = Annotated[
    str | None, typer.Option("--positions", help="Sources at `all` earlier positions, or `last`.")
]
VariantOption = Annotated[
    str | None, typer.Option("--variant", help="`total`, `frozen` or `linear` gradients.")
]
ErrorOption = Annotated[
    str | None, typer.Option("--error", help="Dictionary error: `passthrough` or `frozen`.")
]
GradientOption = Annotated[
    float | None, typer.Option("--raw-gradient", help="Least |gradient| of an edge.")
]
SampleOption = Annotated[
    int | None, typer.Option("--sample", min=1, help="Audit only so many files of each kind.")
]
MismatchOption = Annotated[
    bool, typer.Option("--allow-mismatch", help="Accept data of another model; stamps results.")
]


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    for name, text in STAGE_HELP.items():
        group.command(name, help=f"{text}\n\n{_CODES}")(_command(name))
    group.command("run", help=RUN_HELP)(_command(None))
    group.command("report", help=REPORT_HELP)(_report)
    app.add_typer(group, name="pathways", help=HELP)


def _command(stage: str | None) -> Callable[..., int]:
    """Return the command of one stage, or of all."""

    def command(
        config: ConfigOption = None,
        data: DataOption = None,
        model: ModelOption = None,
        dictionaries: DictionariesOption = None,
        prompts: PromptsOption = None,
        out: OutOption = DEFAULT_OUT,
        positions: PositionsOption = None,
        variant: VariantOption = None,
        error: ErrorOption = None,
        raw_gradient: GradientOption = None,
        sample: SampleOption = None,
        setting: SetOption = None,
        source_compat: CompatOption = False,
        allow_mismatch: MismatchOption = False,
        seed: SeedOption = None,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        resume: ResumeOption = True,
        dry_run: DryOption = False,
        as_json: JsonOption = False,
    ) -> int:
        from layerscope.experiments.pathways import Workspace, read_config

        given: dict[str, Any] = {
            "data": data,
            "model": model,
            "dictionaries": dictionaries,
            "prompts": prompts,
            "positions": positions,
            "variant": variant,
            "error": error,
            "gradient_threshold": raw_gradient,
            "sample": sample,
            "source_compat": source_compat or None,
            "allow_mismatch": allow_mismatch or None,
            "seed": seed,
            "device": device,
            "dtype": dtype,
        }
        work = Workspace(read_config(config, **{**_settings(setting), **_named(given)}), out)
        if dry_run:
            return _dry_run(work, as_json=as_json)
        return _run(work, stage, resume=resume, as_json=as_json)

    return command


def _named(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _settings(items: list[str] | None) -> dict[str, Any]:
    """Read FIELD=VALUE pairs; values as in YAML."""
    import yaml

    from layerscope.errors import ConfigError

    found: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item}: write FIELD=VALUE, such as --set top_n_per_layer=20")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item}: the value cannot be read") from None
    return found


def _dry_run(work: Workspace, *, as_json: bool) -> int:
    from layerscope.experiments.pathways import plan
    from layerscope.models.memory import show_bytes

    found = plan(work)
    if as_json:
        emit_json(found)
        return 0 if found["fits"] else 2
    out = console()
    out.print(f"dictionaries  {found['staging']}", markup=False, highlight=False)
    out.print(f"model         {show_bytes(found['model_bytes'])}", highlight=False)
    limit = show_bytes(found["memory_limit_bytes"])
    fits = "fits" if found["fits"] else "does not fit"
    out.print(
        f"peak          {show_bytes(found['peak_bytes'])} of {limit}: {fits}", highlight=False
    )
    out.print(
        f"work          {found['targets']} targets at most on {found['prompts']} prompts of up to "
        f"{found['tokens_per_prompt']} tokens, {found['edges_at_most']:,} edges at most",
        highlight=False,
    )
    times = ", ".join(f"{t:,.1f} s at {rate}" for rate, t in found["seconds_by_rate"].items())
    out.print(f"gradients     {found['flops']:.2g} FLOPs: {times}", highlight=False)
    return 0 if found["fits"] else 2


def _run(work: Workspace, stage: str | None, *, resume: bool, as_json: bool) -> int:
    from layerscope.cli.keep import show_progress
    from layerscope.experiments.pathways import NAMES, run_stage
    from layerscope.experiments.pathways.workspace import RUN

    done: dict[str, StageRun] = {}
    worst = 0
    for name in NAMES if stage is None else (stage,):
        with _logged(), show_progress(name, "pieces") as progress:
            done[name] = run_stage(work, name, resume=resume, progress=progress)
        worst = max(worst, done[name].record.exit_code)
        if not as_json:
            _show(name, done[name])
        if done[name].record.exit_code >= 2:
            break
    if as_json:
        emit_json(
            {
                "exit_code": worst,
                "out": str(work.out),
                "stages": {name: _json(run) for name, run in done.items()},
            }
        )
    else:
        console().print(f"{work.path(RUN)}", markup=False, highlight=False, soft_wrap=True)
    return worst


def _json(run: StageRun) -> dict[str, Any]:
    return {
        "exit_code": run.record.exit_code,
        "skipped": run.skipped,
        "seconds": round(run.seconds, 3),
        "peak_memory_bytes": run.peak_memory_bytes,
        "notes": list(run.record.notes),
        "summary": run.record.summary,
    }


def _show(name: str, run: StageRun) -> None:
    from rich.markup import escape

    from layerscope.models.memory import show_bytes

    words = {0: "[green]good[/]", 1: "[yellow]warnings[/]", 2: "[red]failed[/]"}
    out = console()
    if run.skipped:
        what = "fresh, skipped"
    else:
        peak = (
            "" if run.peak_memory_bytes is None else f", peak {show_bytes(run.peak_memory_bytes)}"
        )
        what = f"{run.seconds:.1f} s{peak}"
    out.print(f"{name:<10} {words[run.record.exit_code]:<10} {what}", highlight=False)
    for note in run.record.notes:
        out.print(f"           {escape(note)}", highlight=False, soft_wrap=True)


class _logged:
    """Warnings and errors of the pipeline's loggers go to stderr while a stage runs."""

    def __enter__(self) -> None:
        import logging

        self._handler = logging.StreamHandler()
        self._handler.setLevel(logging.WARNING)
        logging.getLogger("layerscope.experiments.pathways").addHandler(self._handler)

    def __exit__(self, *_: object) -> None:
        import logging

        logging.getLogger("layerscope.experiments.pathways").removeHandler(self._handler)


def _report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run.")] = DEFAULT_OUT,
    html: Annotated[
        Path | None, typer.Option("--html", help="Where to. Default: OUT/report.html.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    from layerscope.experiments.pathways import open_results
    from layerscope.reports.pathways import write_pathways

    results = open_results(folder)
    path = write_pathways(results, html or folder / "report.html")
    if as_json:
        emit_json({"report": str(path), "stages": results.run["stages"]})
    else:
        console().print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0
