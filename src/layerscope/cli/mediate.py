"""``layerscope mediate``: how much of an effect goes through a part of a model, and past it."""

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
    names,
    say_files,
    say_warnings,
)
from layerscope.cli.pairs import (
    DirectionOption,
    KeepWrongOption,
    LimitOption,
    MetricOption,
    PairsOption,
    asked,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def mediate(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        pairs: PairsOption,
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
        metric: MetricOption = "logit_diff",
        direction: DirectionOption = "noise",
        steps: Annotated[int, typer.Option("--steps", help="Passes along a path (ig).")] = 10,
        limit: LimitOption = None,
        keep_wrong: KeepWrongOption = False,
        seed: Annotated[int, typer.Option("--seed", help="Of the intervals.")] = 0,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
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
            sites=tuple(names(sites) or ()),
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
            prompts=asked(given),
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
    say_warnings(summary["warnings"])
    say_files([where])
