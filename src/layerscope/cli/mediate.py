"""``layerscope mediate``: how much of an effect goes through a part of a model, and past it."""

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
    def mediate(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[str, typer.Argument(help="Hugging Face id or local folder.")],
        pairs: Annotated[
            Path, typer.Option("--pairs", help="File of clean and corrupt prompts with answers.")
        ],
        sites: Annotated[
            str,
            typer.Option(
                "--sites",
                help="residual, attn_out, mlp_out, heads, neurons, or sites; split by commas.",
            ),
        ] = "attn_out,mlp_out",
        positions: Annotated[
            str, typer.Option("--positions", help="all together, the last, or each.")
        ] = "all",
        method: Annotated[
            str, typer.Option("--method", help="patch (exact), atp or ig (predicted).")
        ] = "patch",
        metric: Annotated[
            str, typer.Option("--metric", help="logit_diff, logit, logprob or prob.")
        ] = "logit_diff",
        direction: Annotated[
            str,
            typer.Option(
                "--direction",
                help="noise: from clean to corrupt prompts; denoise: the other way about.",
            ),
        ] = "noise",
        steps: Annotated[int, typer.Option("--steps", help="Passes along a path (ig).")] = 10,
        limit: Annotated[
            int | None, typer.Option("--limit", help="Take only the first pairs.")
        ] = None,
        keep_wrong: Annotated[
            bool,
            typer.Option("--keep-wrong", help="Keep pairs whose clean prompt is answered wrong."),
        ] = False,
        seed: Annotated[int, typer.Option("--seed", help="Of the intervals.")] = 0,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder of runs.")] = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")] = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Split the effect of a changed prompt into direct and indirect ones, with intervals."""
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.mediation.run import NAME, MediationConfig, execute, plan
        from layerscope.experiments.patching.files import read_pairs
        from layerscope.models import load
        from layerscope.reports.mediation import write_mediation

        options: dict[str, Any] = {
            "positions": positions,
            "method": method,
            "metric": metric,
            "direction": direction,
        }
        config = MediationConfig(
            sites=tuple(part.strip() for part in sites.split(",") if part.strip()),
            steps=steps,
            keep_wrong=keep_wrong,
            seed=seed,
            **options,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_pairs(pairs, model=opened, limit=limit)
        planned = plan(opened, given, config)
        kept = keep(
            NAME,
            config=config.to_dict(),
            model=opened.provenance(),
            prompts=[{"key": pair.key, "prompt": pair.clean, **pair.to_dict()} for pair in given],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_mediation,
            options=KeepOptions(out=out, store=store, html=html),
            unit="pairs",
        )
        if as_json:
            emit_json(kept.to_dict())
        else:
            _show(kept.outcome.summary, kept.report or kept.run_dir)


def _show(summary: dict[str, Any], where: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    screen = console()
    used = summary["pairs"]
    table = Table(
        title=f"{used['used']} of {used['given']} pairs; total effect "
        f"{summary['total_effect']:.3g} ({summary['metric']}, {summary['direction']})",
        title_justify="left",
    )
    table.add_column("mediator")
    for name in ("indirect", "direct", "recovery"):
        table.add_column(name, justify="right")
    for row in summary["top"]:
        recovery = "" if row["recovery"] is None else f"{row['recovery']:.0%}"
        cells = (f"{row['indirect']:.3g}", f"{row['direct']:.3g}", recovery)
        table.add_row(row["mediator"], *cells)
    screen.print(table)
    for line in summary["warnings"]:
        screen.print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True, highlight=False)
    screen.print(escape(str(where)), soft_wrap=True, highlight=False)
