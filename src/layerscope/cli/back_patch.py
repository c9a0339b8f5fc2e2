"""``layerscope back-patch``: would the answer come if a later state were read earlier?"""

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
    LimitOption,
    PromptsOption,
    carry_out,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command("back-patch")
    def back_patch(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        prompts: PromptsOption,
        positions: Annotated[
            str,
            typer.Option(
                "--positions",
                help="The last token, or each: every label, without labels every token.",
            ),
        ] = "last",
        source: Annotated[
            list[int] | None,
            typer.Option(
                "--source", help="Block whose input is taken; may be repeated. Default: all."
            ),
        ] = None,
        target: Annotated[
            list[int] | None,
            typer.Option(
                "--target", help="Earlier block that reads it; may be repeated. Default: all."
            ),
        ] = None,
        metric: Annotated[
            str, typer.Option("--metric", help="Beside the rank: logprob, prob, logit, kl, ...")
        ] = "logprob",
        max_new_tokens: Annotated[
            int, typer.Option("--max-new-tokens", "-n", help="Of the texts with the best cell.")
        ] = 8,
        verify: Annotated[
            int, typer.Option("--verify", help="Patches of a prompt computed again in full.")
        ] = 1,
        seed: Annotated[int, typer.Option("--seed", help="Of both controls.")] = 0,
        limit: LimitOption = None,
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
        """Put what later blocks read where earlier ones read: the whole grid (Biran et al. 2024).

        Says which cells set wrong answers right and which spoil right ones, beside the same number
        of patches from random positions and from random layers, and what the model then writes.
        Prints what the run will cost before it starts. A killed run goes on where it stopped.

        - `layerscope back-patch ./my-model --prompts two-hop.yaml`
        - `layerscope back-patch ./my-model --prompts two-hop.yaml --positions each`
        """
        from layerscope.cli.keep import KeepOptions, load_quietly
        from layerscope.experiments.back_patching import BackPatchConfig, execute, plan
        from layerscope.experiments.back_patching.run import NAME
        from layerscope.experiments.patching.questions import read_questions
        from layerscope.models import load
        from layerscope.reports.back_patching import write_back_patching

        options: dict[str, Any] = {"positions": positions, "products": products}
        config = BackPatchConfig(
            sources=tuple(source) if source else None,
            targets=tuple(target) if target else None,
            metric=metric,
            max_new_tokens=max_new_tokens,
            verify=verify,
            seed=seed,
            max_seconds=max_seconds,
            max_bytes=None if max_memory is None else max_memory * 2**20,
            **options,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_questions(prompts, model=opened, limit=limit)
        planned = plan(opened, given, config)
        kept = carry_out(
            NAME,
            planned,
            execute,
            prompts=[one.to_dict() for one in given],
            page=write_back_patching,
            unit="prompts",
            options=KeepOptions(out=out, store=store, html=html),
            plan_only=plan_only,
            as_json=as_json,
        )
        if kept is not None:
            _show(kept.outcome.summary)
            say_files([*kept.files, kept.report])


def _show(summary: dict[str, Any]) -> None:
    from rich.table import Table

    screen, best, prompts = console(), summary["best"], summary["prompts"]
    screen.print(
        f"{prompts['right']} of {prompts['used']} prompts answered; best cell: block "
        f"{best['source']} read at block {best['target']}, {best['place']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for name in ("", "set right", "kept right", f"change of {summary['metric']}", "some cell"):
        table.add_column(name, justify="left" if not name else "right")
    for which, share in summary["any_cell"].items():
        row = best.get(which) or {"corrected": None, "kept": None, "mean_change": None}
        change = "-" if row["mean_change"] is None else f"{row['mean_change']:.3g}"
        shares = (_share(row["corrected"]), _share(row["kept"]))
        table.add_row(which, *shares, change, _share(share))
    screen.print(table)
    texts = summary["texts"]
    screen.print(
        f"whole answers: {texts['plain_exact']} as it is, {texts['patched_exact']} with the best "
        f"cell ({texts['corrected']} set right, {texts['spoilt']} spoilt)",
        highlight=False,
        soft_wrap=True,
    )
    say_left_out(prompts["left_out"], prompts["given"], "prompt")
    say_warnings(summary["cautions"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
