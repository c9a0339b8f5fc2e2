"""``layerscope attribute``: which nodes and edges carry an effect, predicted and then verified."""

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
    def attribute(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        pairs: PairsOption,
        sites: Annotated[
            str,
            typer.Option(
                "--sites",
                help="residual, attn_out, mlp_out, heads, neurons, queries, keys, values, or "
                "sites; split by commas.",
            ),
        ] = "heads,mlp_out",
        method: Annotated[
            str, typer.Option("--method", help="atp, ig, ig-activations or atp-star.")
        ] = "atp",
        metric: MetricOption = "logit_diff",
        direction: DirectionOption = "noise",
        rule: Annotated[
            str, typer.Option("--rule", help="left, right, midpoint or gauss-legendre.")
        ] = "midpoint",
        steps: Annotated[int, typer.Option("--steps", help="Passes along a path.")] = 5,
        positions: Annotated[
            bool, typer.Option("--positions", help="Score nodes at every position.")
        ] = False,
        verify: Annotated[
            int, typer.Option("--verify", help="Strongest nodes that are patched exactly.")
        ] = 20,
        sample: Annotated[
            int, typer.Option("--sample", help="Random others that are patched exactly.")
        ] = 20,
        edges: Annotated[
            bool, typer.Option("--edges/--no-edges", help="Also score edges and run circuits.")
        ] = True,
        edge_rule: Annotated[
            str | None,
            typer.Option("--edge-rule", help="Average the gradients of edges by a rule (EAP-IG)."),
        ] = None,
        qk: Annotated[
            str,
            typer.Option("--qk", help="Edges into queries and keys: linear or recomputed softmax."),
        ] = "linear",
        circuit: Annotated[
            int, typer.Option("--circuit", help="Edges of the circuit that is drawn.")
        ] = 50,
        limit: LimitOption = None,
        keep_wrong: KeepWrongOption = False,
        seed: Annotated[int, typer.Option("--seed", help="Of the sample.")] = 0,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Predict every patch from gradients, verify the strongest, and draw a circuit.

        A file of pairs is YAML, CSV or JSON with clean, corrupt, answer and foil.
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.attribution import AttributionConfig
        from layerscope.experiments.attribution.run import NAME, execute, plan
        from layerscope.experiments.patching.files import read_pairs
        from layerscope.models import load
        from layerscope.reports.attribution import write_attribution

        options: dict[str, Any] = {
            "method": method,
            "metric": metric,
            "direction": direction,
            "rule": rule,
            "edge_rule": edge_rule,
            "qk": qk,
        }
        config = AttributionConfig(
            sites=tuple(names(sites) or ()),
            steps=steps,
            positions=positions,
            verify=verify,
            sample=sample,
            edges=edges,
            circuit=circuit,
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
            page=write_attribution,
            options=KeepOptions(out=out, store=store, html=html),
            unit="pairs",
        )
        if as_json:
            emit_json(kept.to_dict())
        else:
            _show(kept.outcome, kept.report or kept.run_dir)


def _show(outcome: Any, where: Path) -> None:
    from rich.table import Table

    screen, summary = console(), outcome.summary
    used = summary["pairs"]
    table = Table(
        title=f"{used['used']} of {used['given']} pairs; whole effect "
        f"{summary['total_effect']:.3g} ({summary['metric']}, {summary['direction']})",
        title_justify="left",
    )
    table.add_column("node")
    for name in ("predicted", "exact"):
        table.add_column(name, justify="right")
    strongest = outcome.tables["verified"].filter(top=True).head(12)
    for row in strongest.iter_rows(named=True):
        table.add_row(row["node"], f"{row['predicted']:.3g}", f"{row['exact']:.3g}")
    screen.print(table)
    check = summary["verification"]
    if check["spearman"] is not None:
        screen.print(f"rank correlation with exact patching: {check['spearman']:.2f}")
    areas = summary.get("areas")
    if areas and areas["CPR"] is not None:
        screen.print(f"CPR {areas['CPR']:.3f}, CMD {areas['CMD']:.3f}")
    say_warnings(summary["warnings"])
    say_files([where])
