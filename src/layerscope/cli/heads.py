"""``layerscope heads``: what every attention head does on repeated random tokens."""

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
    ModelArgument,
    OutOption,
    StoreOption,
    console,
    emit_json,
    say_files,
    say_warnings,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def heads(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        sequences: Annotated[
            int, typer.Option("--sequences", help="Sequences of random tokens.")
        ] = 8,
        length: Annotated[
            int | None,
            typer.Option("--length", help="Tokens before they repeat; by default 25, if they fit."),
        ] = None,
        threshold: Annotated[
            float, typer.Option("--threshold", help="Induction score of an induction head.")
        ] = 0.3,
        ablation: Annotated[
            str,
            typer.Option("--ablation", help="mean, zero or resample (another sequence's values)."),
        ] = "mean",
        alone: Annotated[
            bool,
            typer.Option("--alone/--no-alone", help="Also ablate every head by itself."),
        ] = True,
        controls: Annotated[
            int, typer.Option("--controls", help="Draws of as many random heads.")
        ] = 10,
        seed: Annotated[int, typer.Option("--seed", help="Of tokens and draws.")] = 0,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Score all attention heads: induction, previous token, duplicate token, copying.

        The tokens are random and come twice. Heads above the threshold are then ablated together,
        beside as many random heads, and what that does to copying is measured.
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.heads.run import NAME, HeadsConfig, execute, plan
        from layerscope.models import load
        from layerscope.reports.heads import write_heads

        config = HeadsConfig(
            sequences=sequences,
            length=length,
            threshold=threshold,
            kind=ablation,  # type: ignore[arg-type]
            alone=alone,
            controls=controls,
            seed=seed,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        planned = plan(opened, config)
        kept = keep(
            NAME,
            config=config.to_dict(),
            model=opened.provenance(),
            prompts=[{"key": "repeated", "prompt": "seeded random tokens, twice"}],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_heads,
            options=KeepOptions(out=out, store=store, html=html),
            unit="stages",
        )
        if as_json:
            emit_json(kept.to_dict())
        else:
            _show(kept.outcome.summary, kept.report or kept.run_dir)


def _show(summary: dict[str, Any], where: Path) -> None:
    from rich.table import Table

    screen = console()
    found = ", ".join(summary["induction_heads"]) or "none"
    table = Table(title=f"induction heads: {found}", title_justify="left")
    table.add_column("score")
    table.add_column("strongest heads (layer.head)")
    for kind, rows in summary["top"].items():
        cells = "  ".join(f"{row['head']} {row['score']:.2f}" for row in rows)
        table.add_row(kind.replace("_", " "), cells)
    screen.print(table)
    ablation = summary["ablation"]
    if "status" in ablation:
        screen.print(f"no ablation: {ablation['reason']}", soft_wrap=True, highlight=False)
    else:
        ratio = ablation["ratio"]
        times = "" if ratio is None else f", {ratio:.1f} times the mean of random heads"
        screen.print(
            f"without them copying falls by {ablation['drop']:.2f} nats per token{times}; accuracy "
            f"{ablation['accuracy']:.0%} to {ablation['accuracy_without']:.0%}",
            soft_wrap=True,
            highlight=False,
        )
    for row in summary["agreement"]:
        if row["spearman"] is not None:
            pair = f"{row['first']} and {row['second']}".replace("_", " ")
            screen.print(
                f"{pair}: rank correlation {row['spearman']:.2f}, {row['shared']} of the top "
                f"{row['top']} shared",
                soft_wrap=True,
                highlight=False,
            )
    say_warnings(summary["warnings"])
    say_files([where])
