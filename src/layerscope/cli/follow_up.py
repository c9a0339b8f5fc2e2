"""``layerscope follow-up``: where patches, heads and directions cause the facts of a battery."""

from __future__ import annotations

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
    RevisionOption,
    StoreOption,
    console,
    emit_json,
    names,
    numbers,
)

if TYPE_CHECKING:
    from layerscope.cli.keep import Kept

HELP = """Test by interventions where a model gets the facts of a battery from.

Each fact is first read through the lenses, as `layerscope battery` does. Those that the model
answers and whose onset another lens confirms are followed up at the answer slot, the last token:

- patches: clean values into the same question about another subject, at every block, so that the
  causal onset stands beside the observed one; a third subject's values are the control
- heads within two blocks of the onset, ablated and patched one by one, then the top ones together,
  beside random others
- a direction per relation, fitted on some facts, added and projected out on others, on rewordings
  and on other languages, beside random directions; and what runs through it
- English MLP outputs in other languages' prompts (name them with `--languages`)

What cannot be followed is listed in `excluded.parquet` with its reason. Results land in
OUT/run-latest, with `report.html`. A run that was interrupted or killed goes on when the same
command is given again.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("follow-up", help=HELP)(follow_up)


def follow_up(
    model: ModelArgument,
    source: Annotated[
        str, typer.Option("--battery", help="builtin, or a CSV or YAML file of facts.")
    ] = "builtin",
    relations: Annotated[
        str | None, typer.Option(help="Relations, separated by commas. Default: all.")
    ] = None,
    languages: Annotated[
        str | None,
        typer.Option(help="Languages, separated by commas, or all. Default: --language alone."),
    ] = None,
    language: Annotated[
        str, typer.Option("--language", help="The one that directions are fitted in.")
    ] = "en",
    limit: Annotated[
        int | None, typer.Option(help="Most subjects per relation, evenly from the strata.")
    ] = None,
    lens: Annotated[
        str,
        typer.Option("--lens", help="Lenses that read and confirm onsets, separated by commas."),
    ] = "raw,norm",
    prompt_format: Annotated[
        str, typer.Option("--format", help="raw, chat, or auto (chat for an instruct model).")
    ] = "auto",
    alphas: Annotated[
        str | None,
        typer.Option("--alphas", help="Strengths of the directions. Default: -2,-1,-0.5,0.5,1,2,4"),
    ] = None,
    random: Annotated[
        int, typer.Option("--random", help="Random directions beside each fitted one.")
    ] = 3,
    paraphrases: Annotated[
        int, typer.Option(help="Rewordings of each held-out fact that directions are tried on.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of partners, splits and all that is random.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    out: OutOption = DEFAULT_FOLDER,
    store: StoreOption = None,
    html: HtmlOption = True,
    as_json: JsonOption = False,
) -> None:
    """Run the experiment, and print what came out."""
    from layerscope.cli.keep import KeepOptions, keep, load_quietly
    from layerscope.cli.layers import parse_lenses
    from layerscope.experiments.battery import Battery, BatteryConfig
    from layerscope.experiments.follow_up import FollowUpConfig, execute, plan
    from layerscope.models import load
    from layerscope.reports.follow_up import write_follow_up

    lenses, artifacts = parse_lenses(lens)
    more: dict[str, Any] = {} if alphas is None else {"alphas": numbers(alphas, "--alphas")}
    config = FollowUpConfig(
        battery=BatteryConfig(
            lenses=lenses,
            artifacts=artifacts,
            parts=(),
            format=prompt_format,  # pyright: ignore[reportArgumentType]  # checked by the config
            seed=seed,
        ),
        language=language,
        random_directions=random,
        paraphrases=paraphrases,
        seed=seed,
        **more,
    )
    whole = Battery.builtin() if source == "builtin" else Battery.from_file(source)
    spoken = None if languages == "all" else names(languages) or [language]
    chosen = whole.select(relations=names(relations), languages=spoken, limit=limit)
    planned = load_quietly(
        lambda: plan(
            load(model, device=device, dtype=dtype, revision=revision),
            chosen,
            config,
            contrasts=whole,
        ),
        model,
    )
    kept = keep(
        "follow-up",
        config={**config.content(), "lens_identity": planned.observed.identity["lenses"]},
        model={"name": planned.model.name, **planned.model.provenance()},
        prompts=planned.content(),
        execute=lambda units, progress: execute(planned, units=units, progress=progress),
        page=write_follow_up,
        options=KeepOptions(out=out, store=store, html=html),
        unit="percent",
    )
    if as_json:
        emit_json(kept.to_dict())
    else:
        _show(kept)


def _show(kept: Kept) -> None:
    """Print the onsets, what was left out, and where the files are."""
    from rich.table import Table

    summary, screen = kept.outcome.summary, console()
    counts = summary["counts"]
    table = Table(
        title=f"{summary['model']}: {counts['followed']} of {counts['asked']} facts followed up"
    )
    for name in ("facts of", "number", "observed", "causal", "within a row", "MLP", "control"):
        table.add_column(name)
    for group, found in summary["onsets"].items():
        table.add_row(
            group,
            str(found["facts"]),
            _figure(found["observed"]),
            _figure(found["causal"]),
            _percent(found["within_one"]),
            _percent(found["mlp_by_then"]),
            _percent(found["control"]["share"]),
        )
    screen.print(table)
    lines = [summary["verdict"], *summary["warnings"]]
    lines += [
        f"left out, {stage}: {number} (listed in excluded.parquet)"
        for stage, number in counts["excluded"].items()
    ]
    for name, place in {"files": kept.run_dir, "page": kept.report, "store": kept.store}.items():
        if place is not None:
            lines.append(f"{name}: {place}")
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "never" if value is None else f"row {value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
