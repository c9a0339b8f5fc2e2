"""``layerscope patch``: which activations carry the answer, by exact patching over prompt pairs."""

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
    def patch(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        pairs: PairsOption,
        sites: Annotated[
            list[str] | None,
            typer.Option(
                "--sites",
                help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, heads, neurons, q, k, "
                "v, pattern; may be repeated. Default: resid_pre.",
            ),
        ] = None,
        metric: MetricsOption = None,
        positions: Annotated[
            str | None,
            typer.Option(
                "--positions",
                help="each, last or all. Default: last for heads and neurons, else each.",
            ),
        ] = None,
        noise: NoiseOption = False,
        control: Annotated[
            bool,
            typer.Option(
                "--control/--no-control",
                help="Also patch the strongest cells with another pair's values.",
            ),
        ] = True,
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
        """Patch activations of one prompt's run into another's, cell by cell, exactly.

        Prints what the sweep will cost before it starts. A killed run goes on where it stopped.

        - `layerscope patch gpt2 --pairs pairs.yaml --sites resid_pre --sites heads`
        - `layerscope patch ./my-model --pairs ioi.csv --metric logit_diff --metric prob --plan`
        """
        from layerscope.cli.keep import KeepOptions, load_quietly
        from layerscope.experiments.patching import PatchConfig, execute, plan, read_pairs
        from layerscope.models import load
        from layerscope.reports.patching import write_patching

        options: dict[str, Any] = {
            "sites": tuple(sites or ("resid_pre",)),
            "metrics": tuple(metric or ("logit_diff",)),
            "positions": positions,
            "direction": "noise" if noise else "denoise",
            "keep_wrong": keep_wrong,
            "control": control,
            "products": products,
            "max_seconds": max_seconds,
            "max_bytes": None if max_memory is None else max_memory * 2**20,
        }
        config = PatchConfig(**options)
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_pairs(pairs, model=opened, limit=limit)
        planned = plan(opened, given, config)
        kept = carry_out(
            "patch",
            planned,
            execute,
            prompts=asked(given),
            page=write_patching,
            unit="cells",
            options=KeepOptions(out=out, store=store, html=html),
            plan_only=plan_only,
            as_json=as_json,
        )
        if kept is not None:
            _show(kept.outcome.summary)
            say_files([*kept.files, kept.report])


def _show(summary: dict[str, Any]) -> None:
    """Print the ranking, and what was left out."""
    from rich.table import Table

    screen = console()
    table = Table(title=f"mean recovery of {summary['metric']}", title_justify="left")
    for name in ("site", "place", "token", "recovery", "control", "pairs"):
        table.add_column(name)
    for row in summary["top"][:12]:
        shares = (row["mean_recovery"], row["control"])
        site = row["site"] if row["unit"] is None else f"{row['site']}[{row['unit']}]"
        cells = (site, row["place"], repr(row["token"]) if row["token"] else "")
        shown = ("-" if share is None else f"{share:.3f}" for share in shares)
        table.add_row(*cells, *shown, str(row["pairs"]))
    screen.print(table)
    say_left_out(summary["pairs"]["left_out"], summary["pairs"]["given"], "pair")
    say_warnings(summary["cautions"])
    checked = summary["verified"]
    if checked.get("worst_error") is not None:
        screen.print(
            f"{checked['cells']} cells computed again by full passes: largest difference "
            f"{checked['worst_error']:.1e}",
            highlight=False,
        )
