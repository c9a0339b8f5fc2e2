"""``layerscope steer``: make a steering vector from contrasts, measure it, write steered text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    numbers,
    say_files,
    say_warnings,
)

if TYPE_CHECKING:
    from layerscope.interventions.steering.contrasts import ContrastSet


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def steer(  # pyright: ignore[reportUnusedFunction]
        model: ModelArgument,
        contrast: Annotated[
            str,
            typer.Option("--contrast", help="JSON, YAML or CSV of contrasts; or demo:reviews."),
        ],
        against: Annotated[
            str | None, typer.Option("--against", help="The other side, for lists of texts.")
        ] = None,
        positive: Annotated[
            str | None, typer.Option("--positive", help="Template with {text}, for lists of texts.")
        ] = None,
        negative: Annotated[
            str | None, typer.Option("--negative", help="The other template.")
        ] = None,
        evaluate: Annotated[
            str | None,
            typer.Option("--evaluate", help="Contrasts to measure on. Default: a held-out part."),
        ] = None,
        prompts: Annotated[
            list[str] | None,
            typer.Option("--prompt", help="To be continued at every strength; may be repeated."),
        ] = None,
        alphas: Annotated[
            str, typer.Option("--alpha", help="Strengths in typical residual lengths.")
        ] = "-0.5,-0.25,-0.1,0,0.1,0.25,0.5",
        method: Annotated[
            str,
            typer.Option("--method", help="mean_difference, pca_centred, pca_pairwise or probe."),
        ] = "mean_difference",
        read_at: Annotated[
            str, typer.Option("--read", help="Where states are read: last, mean or label.")
        ] = "last",
        layer: Annotated[
            list[int] | None, typer.Option("--layer", help="Block; may be repeated. Default: all.")
        ] = None,
        mode: Annotated[str, typer.Option("--mode", help="add or norm_preserving.")] = "add",
        scope: Annotated[
            str, typer.Option("--scope", help="all, prompt, after_prompt, last_k:K, ...")
        ] = "all",
        random_directions: Annotated[
            int, typer.Option("--random", help="Random directions, as control.")
        ] = 20,
        kl: Annotated[
            float | None,
            typer.Option(
                "--kl",
                help="Also find the strength that changes neutral texts by so many bits per token.",
            ),
        ] = None,
        neutral: Annotated[
            Path | None,
            typer.Option("--neutral", help="Neutral texts, one a line. Default: ten sentences."),
        ] = None,
        max_new_tokens: Annotated[
            int, typer.Option("--max-new-tokens", "-n", help="Of texts.")
        ] = 40,
        temperature: Annotated[
            float, typer.Option("--temperature", help="Of texts; 0 takes the likeliest token.")
        ] = 0.0,
        seed: Annotated[int, typer.Option("--seed", help="Of every draw.")] = 0,
        save: Annotated[Path | None, typer.Option("--save", help="Folder for the vector.")] = None,
        out: OutOption = DEFAULT_FOLDER,
        store: StoreOption = None,
        html: HtmlOption = True,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Steer a model along a direction between contrasting texts, beside its controls.

        Chooses the layer on held-out contrasts, measures dose and response on others, beside random
        directions and prompting, and writes texts at every strength with their coherence.

        - `layerscope steer ./my-model --contrast pairs.yaml --prompt "The film" --alpha=-1,1`
        - `layerscope steer ./my-model --contrast pairs.yaml --kl 0.2` and a strength to use
        - `layerscope steer DEMO --contrast demo:reviews` with the embedded model
        """
        from layerscope.cli.keep import KeepOptions, keep, load_quietly
        from layerscope.experiments.steering import SteeringConfig
        from layerscope.experiments.steering.builtin import DEMO, NEUTRAL, demo_openings
        from layerscope.experiments.steering.run import NAME, execute, plan
        from layerscope.interventions.steering.contrasts import read_contrasts
        from layerscope.models import load
        from layerscope.reports.steering import write_steering

        found = _contrasts(contrast, against, positive, negative)
        asked = tuple(prompts or (demo_openings() if contrast == DEMO else ()))
        config = SteeringConfig(
            method=method,  # type: ignore[arg-type]
            read_at=read_at,  # type: ignore[arg-type]
            alphas=numbers(alphas, "--alpha"),
            layers=None if not layer else tuple(layer),
            mode=mode,  # type: ignore[arg-type]
            scope=scope,
            random_directions=random_directions,
            neutral=NEUTRAL if neutral is None else _lines(neutral),
            kl_bits=kl,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        measured = None if evaluate is None else read_contrasts(evaluate)
        opened = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
        planned = plan(opened, found, asked, config, evaluate=measured)
        whole = [found] if measured is None else [found, measured]
        kept = keep(
            NAME,
            config=config.to_dict(),
            model={"name": opened.name, **opened.provenance()},
            prompts=[
                *({"key": f"text {n}", "prompt": text} for n, text in enumerate(asked)),
                *(
                    {"key": f"{each.name} {n}", "prompt": c.prompt, "texts": list(c.texts)}
                    for each in whole
                    for n, c in enumerate(each.contrasts)
                ),
            ],
            execute=lambda units, progress: execute(planned, units=units, progress=progress),
            page=write_steering,
            options=KeepOptions(out=out, store=store, html=html),
            unit="units",
        )
        if save is not None:
            _save(opened, kept.outcome, save)
        if as_json:
            emit_json(kept.to_dict())
        else:
            _show(kept.outcome, kept.report or kept.run_dir)


def _lines(path: Path) -> tuple[str, ...]:
    from layerscope.errors import PromptError

    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as lines of text: {error}") from None
    return tuple(line for line in lines if line)


def _contrasts(
    name: str, against: str | None, positive: str | None, negative: str | None
) -> ContrastSet:
    from layerscope.experiments.steering.builtin import DEMO, demo_reviews
    from layerscope.interventions.steering.contrasts import read_contrasts

    if name == DEMO:
        return demo_reviews()
    return read_contrasts(name, against=against, positive=positive, negative=negative)


def _save(model: Any, outcome: Any, folder: Path) -> None:
    import torch

    from layerscope.interventions.steering.vector import SteeringVector, save_vector

    summary, config = outcome.summary, outcome.provenance["config"]
    vector = SteeringVector(
        f"resid_post.{summary['layer']}",
        torch.tensor(outcome.tables["vector"]["value"].to_list(), dtype=torch.float32),
        summary["typical_norm"],
        config["method"],
        {
            "contrasts": outcome.provenance["contrasts"],
            "config": config,
            "cosines": summary["cosines"],
            "cone_degrees": summary["cone_degrees"],
            "response": summary["response"],
            "warnings": summary["warnings"],
        },
    )
    save_vector(vector, folder, model)


def _show(outcome: Any, where: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    screen, summary = console(), outcome.summary
    fit, random, moved = summary["response"], summary["random"], summary["propensity"]
    screen.print(
        f"{summary['contrasts']}: added after block {summary['layer']}; log P(positive) - "
        f"log P(negative) in nats, {fit['examples']} test examples",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table()
    table.add_column("condition")
    table.add_column("mean", justify="right")
    table.add_column("neutral texts, bits per token", justify="right")
    for alpha, value in moved["by_alpha"].items():
        bits = summary["neutral"]["bits_by_alpha"][alpha]
        table.add_row(f"vector, alpha {alpha}", f"{value:.2f}", f"{bits:.3f}")
    for key in ("after_negative_texts", "after_positive_texts"):
        table.add_row(key.replace("_", " "), f"{moved[key]:.2f}")
    screen.print(table)
    strength = summary["calibration"]
    if strength is not None and strength["alpha"] is not None:
        screen.print(
            f"alpha {strength['alpha']:.3g} changes neutral texts by {strength['bits']:.3g} bits "
            f"per token ({strength['target_bits']:g} asked for)",
            highlight=False,
            soft_wrap=True,
        )
    screen.print(
        f"slope {fit['mean_slope']:.2f} nats per typical residual length ({fit['low']:.2f} to "
        f"{fit['high']:.2f}); {fit['anti_steerable']:.0%} of examples move the other way; random "
        f"directions: at most {random['largest_absolute_slope']:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    for row in outcome.tables["texts"].filter(kind="vector").iter_rows(named=True):
        line = f"{row['alpha']:g}: {escape(row['prompt'])}[bold]{escape(row['text'])}[/]"
        screen.print(line, highlight=False, soft_wrap=True)
    say_warnings(summary["warnings"])
    say_files([where])
