"""``layerscope trace``: causal tracing of facts, by noise on the subject and restored states."""

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


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def trace(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[str, typer.Argument(help="Hugging Face id or local folder.")],
        facts: Annotated[
            Path,
            typer.Option("--facts", help="YAML, CSV or JSON of facts: prompt, subject, answer."),
        ],
        restore: Annotated[
            list[str] | None,
            typer.Option("--restore", help="state, mlp or attn; may be repeated. Default: all."),
        ] = None,
        window: Annotated[int, typer.Option("--window", help="Layers of a window.")] = 10,
        noise: Annotated[
            float | None,
            typer.Option("--noise", help="Standard deviation; default: 3x the embeddings'."),
        ] = None,
        seeds: Annotated[int, typer.Option("--seeds", help="Noisy runs per fact.")] = 10,
        metric: Annotated[str, typer.Option("--metric", help="prob, logit, logprob.")] = "prob",
        limit: Annotated[
            int | None, typer.Option("--limit", help="Take only the first so many facts.")
        ] = None,
        keep_wrong: Annotated[
            bool, typer.Option("--keep-wrong", help="Keep facts that the model does not answer.")
        ] = False,
        products: Annotated[
            str, typer.Option("--products", help="default, or checked: the fastest exact product.")
        ] = "default",
        plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
        out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: Annotated[bool, typer.Option("--html/--no-html", help="Write a page.")] = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find where a model keeps a fact: noise on the subject, clean states put back.

        Facts that the model does not answer are counted and left out. A killed run goes on where it
        stopped.

        - `layerscope trace gpt2 --facts known_1000.json --limit 20`
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.patching import (
            TraceConfig,
            execute_trace,
            plan_trace,
            read_facts,
        )
        from layerscope.models import load
        from layerscope.reports.tracing import write_tracing

        options: dict[str, Any] = {
            "restore": tuple(restore or ("state", "mlp", "attn")),
            "window": window,
            "noise": noise,
            "seeds": seeds,
            "metric": metric,
            "keep_wrong": keep_wrong,
            "products": products,
        }
        config = TraceConfig(**options)
        given = read_facts(facts, limit=limit)
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        planned = plan_trace(opened, given, config)
        console(stderr=True).print(planned.describe(), highlight=False, soft_wrap=True)
        if plan_only:
            if as_json:
                emit_json(planned.cost.to_dict())
            return
        kept = keep(
            "trace",
            config=config.to_dict(),
            model=opened.provenance(),
            prompts=[fact.to_dict() for fact in given],
            execute=lambda units, progress: execute_trace(planned, units=units, progress=progress),
            page=write_tracing,
            options=KeepOptions(out=out, store=store, html=html),
            unit="cells",
        )
        if as_json:
            emit_json(kept.to_dict())
            return
        _show(kept.outcome.summary)
        for path in [*kept.files, *([kept.report] if kept.report else [])]:
            console().print(str(path), highlight=False, soft_wrap=True)


def _show(summary: dict[str, Any]) -> None:
    """Print where most comes back, and what was left out."""
    from rich.table import Table

    screen = console()
    table = Table(title=f"mean indirect effect on {summary['metric']}", title_justify="left")
    for name in ("restored", "at", "layer", "effect", "facts"):
        table.add_column(name)
    for row in summary["top"][:12]:
        effect = f"{row['indirect']:.4g}"
        table.add_row(row["restore"], row["role"], str(row["layer"]), effect, str(row["facts"]))
    screen.print(table)
    left = summary["facts"]["left_out"]
    if left:
        screen.print(f"{len(left)} of {summary['facts']['given']} facts left out:", highlight=False)
        for row in left[:5]:
            line = f"  {row['fact']}: {row['reason']}"
            screen.print(line, markup=False, highlight=False, soft_wrap=True)
