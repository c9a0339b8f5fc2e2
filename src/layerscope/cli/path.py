"""``layerscope path``: which parts speak to which, by path patching over prompt pairs."""

from __future__ import annotations

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
    say_warnings,
)
from layerscope.cli.pairs import (
    KeepWrongOption,
    LimitOption,
    MetricsOption,
    NoiseOption,
    PairsOption,
    asked,
    carry_out,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def path(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        pairs: PairsOption,
        senders: Annotated[
            list[str] | None,
            typer.Option(
                "--from",
                help="Who speaks: embed, 3.5 (layer.head), attn.3, mlp.3, or a group: heads, "
                "attns, mlps, all; may be repeated. Default: all.",
            ),
        ] = None,
        receivers: Annotated[
            list[str] | None,
            typer.Option(
                "--to",
                help="Who listens: logits (the direct path), 3.5.q (a head's queries; also k, v), "
                "3.q (all heads of a layer), attn.3, mlp.3, or a group: q, k, v, attns, mlps, all; "
                "may be repeated. Default: logits.",
            ),
        ] = None,
        positions: Annotated[
            str,
            typer.Option(
                "--positions", help="The sender's change at all positions, at the last, or each."
            ),
        ] = "all",
        metric: MetricsOption = None,
        noise: NoiseOption = False,
        control: Annotated[
            bool,
            typer.Option(
                "--control/--no-control",
                help="Also let another pair speak along the strongest edges.",
            ),
        ] = True,
        verify: Annotated[
            int, typer.Option("--verify", help="Edges of a pair computed again by full passes.")
        ] = 1,
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
        """Patch paths: what each sender says to one receiver, all else as it was.

        Prints what the run will cost before it starts. A killed run goes on where it stopped.

        - `layerscope path ./my-model --pairs pairs.yaml` for the direct paths to the logits
        - `layerscope path ./my-model --pairs pairs.yaml --from heads --to 5.1.k --to 5.1.q`
        """
        from layerscope.cli.keep import KeepOptions, load_quietly
        from layerscope.experiments.patching import read_pairs
        from layerscope.experiments.path_patching import PathConfig, execute, plan
        from layerscope.experiments.path_patching.run import NAME
        from layerscope.models import load
        from layerscope.reports.path_patching import write_paths

        options: dict[str, Any] = {
            "positions": positions,
            "direction": "noise" if noise else "denoise",
            "products": products,
        }
        config = PathConfig(
            senders=tuple(senders or ("all",)),
            receivers=tuple(receivers or ("logits",)),
            metrics=tuple(metric or ("logit_diff",)),
            keep_wrong=keep_wrong,
            verify=verify,
            control=control,
            max_seconds=max_seconds,
            max_bytes=None if max_memory is None else max_memory * 2**20,
            **options,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_pairs(pairs, model=opened, limit=limit)
        planned = plan(opened, given, config)
        kept = carry_out(
            NAME,
            planned,
            execute,
            prompts=asked(given),
            page=write_paths,
            unit="pairs",
            options=KeepOptions(out=out, store=store, html=html),
            plan_only=plan_only,
            as_json=as_json,
        )
        if kept is not None:
            _show(kept.outcome.summary)
            say_files([*kept.files, kept.report])


def _show(summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"mean recovery of {summary['metric']}", title_justify="left")
    for name in ("sender", "receiver", "at", "recovery", "control", "pairs"):
        table.add_column(name)
    for row in summary["top"][:12]:
        shares = (
            "-" if row[at] is None else f"{row[at]:.3f}" for at in ("mean_recovery", "control")
        )
        table.add_row(row["sender"], row["receiver"], row["place"], *shares, str(row["pairs"]))
    console().print(table)
    say_left_out(summary["pairs"]["left_out"], summary["pairs"]["given"], "pair")
    say_warnings(summary["cautions"])
    checked = summary["verified"]
    if checked.get("worst_error") is not None:
        console().print(
            f"{checked['cells']} edges computed again by full passes: largest difference "
            f"{checked['worst_error']:.1e}",
            highlight=False,
        )
