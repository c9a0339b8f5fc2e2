"""``layerscope trace``: causal tracing of facts, by noise on the subject and restored states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerscope.cli.common import (
    DEFAULT_FOLDER,
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    MaxMemoryOption,
    MaxSecondsOption,
    ModelArgument,
    OutOption,
    PlanOption,
    ProductsOption,
    StoreOption,
    console,
    say_files,
    say_left_out,
)
from layerscope.cli.pairs import (
    KeepWrongOption,
    LimitOption,
    carry_out,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def trace(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
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
        limit: LimitOption = None,
        keep_wrong: KeepWrongOption = False,
        products: ProductsOption = "default",
        max_seconds: MaxSecondsOption = None,
        max_memory: MaxMemoryOption = None,
        plan_only: PlanOption = False,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find where a model keeps a fact: noise on the subject, clean states put back.

        Facts that the model does not answer are counted and left out. A killed run goes on where it
        stopped.

        - `layerscope trace gpt2 --facts known_1000.json --limit 20`
        """
        from layerscope.cli.keep import KeepOptions, load_quietly
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
            "max_seconds": max_seconds,
            "max_bytes": None if max_memory is None else max_memory * 2**20,
        }
        config = TraceConfig(**options)
        given = read_facts(facts, limit=limit)
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        planned = plan_trace(opened, given, config)
        kept = carry_out(
            "trace",
            planned,
            execute_trace,
            prompts=[fact.to_dict() for fact in given],
            page=write_tracing,
            unit="cells",
            options=KeepOptions(out=out, store=store, html=html),
            plan_only=plan_only,
            as_json=as_json,
        )
        if kept is not None:
            _show(kept.outcome.summary)
            say_files([*kept.files, kept.report])


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
    say_left_out(summary["facts"]["left_out"], summary["facts"]["given"], "fact")
