"""``layerscope ablate``: what an answer needs, by taking activations away."""

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
    numbers,
    say_files,
    say_left_out,
    say_warnings,
)
from layerscope.cli.pairs import (
    KeepWrongOption,
    LimitOption,
    PromptsOption,
    carry_out,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def ablate(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        prompts: PromptsOption,
        sites: Annotated[
            list[str] | None,
            typer.Option(
                "--sites",
                help="heads, mlp_out, attn_out, resid_pre, resid_mid, resid_post, neurons, q, k, "
                "v; may be repeated. Default: heads.",
            ),
        ] = None,
        how: Annotated[
            list[str] | None,
            typer.Option(
                "--how",
                help="What is put in place: zero, mean, position_mean, resample (another prompt's "
                "values) or noise; may be repeated. Default: mean.",
            ),
        ] = None,
        reference: Annotated[
            Path | None,
            typer.Option(
                "--reference",
                help="Prompts that means, spreads and other values come from: a file as for "
                "--prompts, or a .txt with one per line. Default: the prompts themselves.",
            ),
        ] = None,
        positions: Annotated[
            str, typer.Option("--positions", help="all at once, each by itself, or the last.")
        ] = "all",
        metric: Annotated[
            list[str] | None,
            typer.Option(
                "--metric",
                help="As for patch; may be repeated, the first is ranked. Default: logit_diff and "
                "kl, or logprob and kl where a prompt has no foil.",
            ),
        ] = None,
        noise_factor: Annotated[
            float,
            typer.Option("--noise-factor", help="Of the noise, in standard deviations."),
        ] = 1.0,
        draws: Annotated[
            int,
            typer.Option("--draws", help="Random disturbances, and random sets, as controls."),
        ] = 3,
        sets: Annotated[
            str, typer.Option("--sets", help="Sizes of top sets that are ablated together.")
        ] = "2,5,10",
        verify: Annotated[
            int, typer.Option("--verify", help="Ablations of a prompt computed again in full.")
        ] = 1,
        seed: Annotated[int, typer.Option("--seed", help="Of every draw.")] = 0,
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
        """Ablate parts of a model and see what its answers lose.

        Every part is taken away by itself; the strongest then stand beside random changes of the
        same size, and are taken away together beside random others. A BOS is never touched. Prints
        what the run will cost before it starts. A killed run goes on where it stopped.

        - `layerscope ablate ./my-model --prompts prompts.yaml --how mean --how resample`
        - `layerscope ablate ./my-model --prompts pairs.yaml --sites mlp_out --positions each`
        """
        from layerscope.cli.keep import KeepOptions, load_quietly
        from layerscope.experiments.ablation import AblationConfig, execute, plan
        from layerscope.experiments.ablation.run import NAME
        from layerscope.experiments.patching.questions import read_questions, read_texts
        from layerscope.models import load
        from layerscope.reports.ablation import write_ablation

        options: dict[str, Any] = {
            "how": tuple(how or ("mean",)),
            "positions": positions,
            "products": products,
        }
        config = AblationConfig(
            sites=tuple(sites or ("heads",)),
            metrics=tuple(metric) if metric else None,
            noise_factor=noise_factor,
            draws=draws,
            sets=tuple(int(size) for size in numbers(sets, "--sets")),
            keep_wrong=keep_wrong,
            verify=verify,
            seed=seed,
            max_seconds=max_seconds,
            max_bytes=None if max_memory is None else max_memory * 2**20,
            **options,
        )
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        given = read_questions(prompts, model=opened, limit=limit)
        texts = None if reference is None else read_texts(reference, model=opened)
        planned = plan(opened, given, config, reference=texts)
        kept = carry_out(
            NAME,
            planned,
            execute,
            prompts=[
                *(one.to_dict() for one in given),
                *(
                    {"key": f"reference {at}", "prompt": text}
                    for at, text in enumerate(texts or ())
                ),
            ],
            page=write_ablation,
            unit="sweeps",
            options=KeepOptions(out=out, store=store, html=html),
            plan_only=plan_only,
            as_json=as_json,
        )
        if kept is not None:
            _show(kept.outcome.summary)
            say_files([*kept.files, kept.report])


def _show(summary: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"mean effect on {summary['metric']}, {summary['base']:.3g} without ablation"
    table = Table(title=title, title_justify="left")
    for name in ("site", "at", "how", "effect", "size", "random change", "prompts"):
        table.add_column(name)
    for row in summary["top"][:12]:
        site = row["site"] if row["unit"] is None else f"{row['site']}[{row['unit']}]"
        figures = (row["mean_effect"], row["size"], row["control_size"])
        shown = ("-" if value is None else f"{value:.3g}" for value in figures)
        table.add_row(site, row["place"], row["how"], *shown, str(row["prompts"]))
    screen = console()
    screen.print(table)
    for row in summary["sets"]:
        beside = "" if row["random"] is None else f"; random ones {row['random']:.3g}"
        screen.print(
            f"top {row['size']} {row['kind']} together ({row['how']}): {row['effect']:.3g}{beside}",
            highlight=False,
            soft_wrap=True,
        )
    say_left_out(summary["prompts"]["left_out"], summary["prompts"]["given"], "prompt")
    say_warnings(summary["cautions"])
    checked = summary["verified"]
    if checked.get("worst_error") is not None:
        screen.print(
            f"{checked['cells']} ablations computed again by full passes: largest difference "
            f"{checked['worst_error']:.1e}",
            highlight=False,
        )
