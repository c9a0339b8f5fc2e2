"""``layerscope causal-features``: features that differ between groups, and change decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerscope.cli.common import (
    DEFAULT_FOLDER,
    DeviceOption,
    DtypeOption,
    JsonOption,
    StoreOption,
    console,
    emit_json,
)

DATA = "data"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("causal-features")
    def causal_features(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[
            str | None,
            typer.Argument(help="Hugging Face id or local folder. Default: the embedded model."),
        ] = None,
        dictionaries: Annotated[
            str | None,
            typer.Option("--dictionaries", "-d", help="Folder or repository of dictionaries."),
        ] = None,
        task: Annotated[
            str, typer.Option("--task", help="YAML or JSON of prompts; or demo:slot-machine.")
        ] = "demo:slot-machine",
        layer: Annotated[
            list[int] | None, typer.Option("--layer", help="Block; may be repeated. Default: all.")
        ] = None,
        top: Annotated[int, typer.Option("--top", help="Features patched per layer.")] = 3,
        trials: Annotated[int, typer.Option("--trials", help="Answers per condition.")] = 100,
        controls: Annotated[
            int, typer.Option("--controls", help="Random features per patched one.")
        ] = 1,
        temperature: Annotated[
            float, typer.Option("--temperature", help="Of the answers; above 0.")
        ] = 1.0,
        max_new_tokens: Annotated[
            int, typer.Option("--max-new-tokens", "-n", help="Of an answer.")
        ] = 12,
        stop: Annotated[
            list[str] | None, typer.Option("--stop", help="String that ends an answer.")
        ] = None,
        scope: Annotated[
            str, typer.Option("--scope", help="Tokens patched: last_k:1, prompt, all, ...")
        ] = "last_k:1",
        min_effect: Annotated[
            float, typer.Option("--min-effect", help="Smallest change of a rate that counts.")
        ] = 0.05,
        high_bet: Annotated[
            float | None, typer.Option("--high-bet", help="Count bets above this sum alone.")
        ] = None,
        batch: Annotated[int, typer.Option("--batch", help="Answers side by side.")] = 256,
        seed: Annotated[int, typer.Option("--seed", help="Of every draw.")] = 0,
        data: Annotated[
            Path | None,
            typer.Option("--data", help="Folder for what `pathways` reads. Default: of the run."),
        ] = None,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder of runs.")] = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")] = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find features that differ between safe and risky prompts, and change decisions.

        Compares every dictionary feature between two groups of prompts, then patches the strongest
        to either group's mean while the model answers, beside random features moved as far. Writes
        the checkpoints and response logs that `layerscope pathways` audits.

        - `layerscope causal-features` with the embedded model and its slot machine
        - `layerscope causal-features ./my-model -d ./dictionaries --task prompts.yaml`
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.demo import dictionaries_path, model_path
        from layerscope.experiments.causal_features import (
            CausalConfig,
            demo_task,
            read_task,
        )
        from layerscope.experiments.causal_features.files import write_data
        from layerscope.experiments.causal_features.run import NAME, execute, plan
        from layerscope.experiments.causal_features.task import DEMO
        from layerscope.features import open_set
        from layerscope.models import load
        from layerscope.reports.causal_features import write_causal_features

        config = CausalConfig(
            layers=None if not layer else tuple(layer),
            top_per_layer=top,
            trials=trials,
            controls=controls,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop=tuple(stop or ()),
            scope=scope,
            min_effect=min_effect,
            high_bet=high_bet,
            batch_rows=batch,
            seed=seed,
        )
        prompts = demo_task(seed=seed) if task == DEMO else read_task(task)
        source = dictionaries if dictionaries is not None else _shipped(model, dictionaries_path())
        opened_set = open_set(source)
        name = str(model_path()) if model is None else model
        opened = load_quietly(lambda: load(name, device=device, dtype=dtype), name)
        planned = plan(opened, opened_set, prompts, config)
        kept = keep(
            NAME,
            config=planned.identity,
            model={"name": opened.name, **opened.provenance()},
            prompts=[{"key": task, **prompts.to_dict()}],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_causal_features,
            options=KeepOptions(out=out, store=store, html=html),
            unit="units",
        )
        written = write_data(kept.outcome, data if data is not None else kept.run_dir / DATA)
        if as_json:
            emit_json({**kept.to_dict(), "data": [str(path) for path in written]})
        else:
            _show(kept.outcome, kept.report or kept.run_dir, written[0].parent)


def _shipped(model: str | None, shipped: Path) -> Path:
    from layerscope.demo import model_path
    from layerscope.errors import ConfigError

    if model is not None and Path(model).resolve() != model_path():
        raise ConfigError("name the model's dictionaries with --dictionaries")
    return shipped


def _show(outcome: Any, where: Path, data: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    screen, summary = console(), outcome.summary
    screen.print(
        f"{summary['task']}: {summary['different']} of {summary['tested']} living features differ "
        f"between the groups (q < 0.05; {summary['dead']} of {summary['features']} were never "
        f"active); {summary['patched']} were patched, {summary['trials']} answers per condition",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("feature", "d", "stops, risky to safe", "q", "bets, safe to risky", "q"):
        table.add_column(column, justify="left" if column == "feature" else "right")
    table.add_column("verdict")
    for row in outcome.tables["features"].iter_rows(named=True):
        table.add_row(
            f"L{row['layer']}-{row['feature_id']}",
            f"{row['cohen_d']:.2f}",
            *(
                "" if value is None else f"{value:{form}}"
                for value, form in (
                    (row["safe_effect"], "+.2f"),
                    (row["safe_q"], ".2g"),
                    (row["risky_effect"], "+.2f"),
                    (row["risky_q"], ".2g"),
                )
            ),
            row["verdict"],
        )
    screen.print(table)
    for line in summary["warnings"]:
        screen.print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True, highlight=False)
    screen.print(escape(f"for layerscope pathways: {data}"), soft_wrap=True, highlight=False)
    screen.print(escape(str(where)), soft_wrap=True, highlight=False)
