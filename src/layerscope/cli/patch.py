"""``layerscope patch``: which activations carry the answer, by exact patching over prompt pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from layerscope.experiments.patching import PatchPlan


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def patch(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[str, typer.Argument(help="Hugging Face id or local folder.")],
        pairs: Annotated[
            Path,
            typer.Option(
                "--pairs", help="YAML, CSV or JSON of prompt pairs; see docs/patching.md."
            ),
        ],
        sites: Annotated[
            list[str] | None,
            typer.Option(
                "--sites",
                help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, heads, neurons, q, k, "
                "v, pattern; may be repeated. Default: resid_pre.",
            ),
        ] = None,
        metric: Annotated[
            list[str] | None,
            typer.Option(
                "--metric",
                help="logit_diff, logit, prob, prob_diff, logprob, kl, rank; may be repeated, the "
                "first is ranked. Default: logit_diff.",
            ),
        ] = None,
        positions: Annotated[
            str | None,
            typer.Option(
                "--positions",
                help="each, last or all. Default: last for heads and neurons, else each.",
            ),
        ] = None,
        noise: Annotated[
            bool, typer.Option("--noise", help="Put corrupt values into the clean run instead.")
        ] = False,
        limit: Annotated[
            int | None, typer.Option("--limit", help="Take only the first so many pairs.")
        ] = None,
        keep_wrong: Annotated[
            bool, typer.Option("--keep-wrong", help="Keep pairs that the model does not answer.")
        ] = False,
        products: Annotated[
            str, typer.Option("--products", help="default, or checked: the fastest exact product.")
        ] = "default",
        max_seconds: Annotated[
            float | None,
            typer.Option("--max-seconds", help="Refuse a sweep predicted to take longer."),
        ] = None,
        max_memory: Annotated[
            int | None,
            typer.Option("--max-memory", help="Refuse a sweep predicted to take more MiB."),
        ] = None,
        plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
        out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: Annotated[bool, typer.Option("--html/--no-html", help="Write a page.")] = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Patch activations of one prompt's run into another's, cell by cell, exactly.

        Prints what the sweep will cost before it starts. A killed run goes on where it stopped.

        - `layerscope patch gpt2 --pairs pairs.yaml --sites resid_pre --sites heads`
        - `layerscope patch ./my-model --pairs ioi.csv --metric logit_diff --metric prob --plan`
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.patching import PatchConfig, execute, plan, read_pairs
        from layerscope.models import load
        from layerscope.reports.patching import write_patching

        options: dict[str, Any] = {
            "sites": tuple(sites or ("resid_pre",)),
            "metrics": tuple(metric or ("logit_diff",)),
            "positions": positions,
            "direction": "noise" if noise else "denoise",
            "keep_wrong": keep_wrong,
            "products": products,
            "max_seconds": max_seconds,
            "max_bytes": None if max_memory is None else max_memory * 2**20,
        }
        config = PatchConfig(**options)
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_pairs(pairs, model=opened, limit=limit)
        planned = plan(opened, given, config)
        console(stderr=True).print(planned.describe(), highlight=False, soft_wrap=True)
        if plan_only:
            if as_json:
                emit_json({**planned.cost.to_dict(), "seconds": planned.seconds})
            return
        kept = keep(
            "patch",
            config=config.to_dict(),
            model=opened.provenance(),
            prompts=[pair.to_dict() for pair in given],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_patching,
            options=KeepOptions(out=out, store=store, html=html),
            unit="cells",
        )
        if as_json:
            emit_json(kept.to_dict())
            return
        _show(kept.outcome.summary, planned)
        for path in [*kept.files, *([kept.report] if kept.report else [])]:
            console().print(str(path), highlight=False, soft_wrap=True)


def _show(summary: dict[str, Any], planned: PatchPlan) -> None:
    """Print the ranking, and what was left out."""
    from rich.table import Table

    screen = console()
    table = Table(title=f"mean recovery of {summary['metric']}", title_justify="left")
    for name in ("site", "place", "token", "recovery", "pairs"):
        table.add_column(name)
    for row in summary["top"][:12]:
        share = row["mean_recovery"]
        site = row["site"] if row["unit"] is None else f"{row['site']}[{row['unit']}]"
        cells = (site, row["place"], repr(row["token"]) if row["token"] else "")
        table.add_row(*cells, "-" if share is None else f"{share:.3f}", str(row["pairs"]))
    screen.print(table)
    left = summary["pairs"]["left_out"]
    if left:
        screen.print(f"{len(left)} of {len(planned.given)} pairs left out:", highlight=False)
        for row in left[:5]:
            line = f"  {row['pair']}: {row['reason']}"
            screen.print(line, markup=False, highlight=False, soft_wrap=True)
    for caution in summary["cautions"]:
        screen.print(f"caution: {caution}", highlight=False, soft_wrap=True)
    checked = summary["verified"]
    if checked.get("worst_error") is not None:
        screen.print(
            f"{checked['cells']} cells computed again by full passes: largest difference "
            f"{checked['worst_error']:.1e}",
            highlight=False,
        )
