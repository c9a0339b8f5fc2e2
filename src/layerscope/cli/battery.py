"""``layerscope battery``: hundreds of facts, each asked in many ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
)

if TYPE_CHECKING:
    from layerscope.cli.keep import Kept

HELP = """Ask a model hundreds of facts, each in many ways, and say at which layer it knows them.

The shipped battery (`--battery builtin`) holds capital, currency and official language of 193
countries, in English, German, French, Spanish and simplified Chinese. Every fact is asked plainly
and with its controls: without a filler word, in ten other wordings, negated, with other
punctuation, moved by 1, 3 and 7 tokens, the other way round and in the wrong role, about an
invented country, about France, and against another country's answer.

A battery file is CSV, or YAML with a list of mappings. Its columns:

- `relation`, `subject`, `answer`: the fact. For capital, currency and language the wordings are
  there; for other relations give a `prompt`, or `wordings` in YAML
- `language` (optional): en, de, fr, es or zh
- `of` (optional): the subject after "of" (`of the Netherlands`, `du Japon`)
- `prompt`, `variant` (optional): your own text, which ends where the answer begins. One row named
  `orig` per subject; rows named p01, p02, ... are its paraphrases
- `foil`, `frequency`, `entity` (optional): a wrong answer, a stratum, a name across languages

Facts whose answer cannot be aligned with the model's tokens are listed, counted and left out.
Results land in OUT/run-latest: `items.parquet` (one row per fact and lens), `rows.parquet` (every
layer), `prompts.parquet`, `rollup.parquet`, `excluded.parquet`, `summary.json`, `report.html`. A
run that was interrupted or killed goes on when the same command is given again.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("battery", help=HELP)(battery)


def battery(
    model: ModelArgument,
    source: Annotated[
        str, typer.Option("--battery", help="builtin, or a CSV or YAML file.")
    ] = "builtin",
    relations: Annotated[
        str | None, typer.Option(help="Relations, separated by commas. Default: all.")
    ] = None,
    languages: Annotated[
        str | None,
        typer.Option(
            help="Languages, separated by commas, or all. Default: en for the shipped battery, all "
            "for a file."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Most subjects per relation, evenly from the strata of frequency."),
    ] = None,
    parts: Annotated[
        str,
        typer.Option(
            help="Controls, separated by commas, all or none: wording, paraphrases, negation, "
            "position, punctuation, roles, novelty, control, permuted."
        ),
    ] = "all",
    lens: Annotated[
        str,
        typer.Option(
            "--lens",
            help="Lenses, separated by commas: raw, norm, and fitted ones (tuned, prism=FOLDER).",
        ),
    ] = "raw,norm",
    norm: Annotated[
        str, typer.Option("--norm", help="final, or next_norm to compare with published tables.")
    ] = "final",
    prompt_format: Annotated[
        str, typer.Option("--format", help="raw, chat, or auto (chat for an instruct model).")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the permuted answers and the bootstrap.")] = 0,
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
    from layerscope.experiments.battery import PARTS, Battery, BatteryConfig, execute, plan
    from layerscope.models import load
    from layerscope.reports.battery import write_battery

    lenses, artifacts = parse_lenses(lens)
    config = BatteryConfig(
        lenses=lenses,
        artifacts=artifacts,
        parts=PARTS if parts == "all" else () if parts == "none" else tuple(names(parts) or ()),
        norm_choice=norm,  # pyright: ignore[reportArgumentType]  # checked by the config itself
        format=prompt_format,  # pyright: ignore[reportArgumentType]  # checked by the config itself
        seed=seed,
    )
    shipped = source == "builtin"
    chosen = Battery.builtin() if shipped else Battery.from_file(source)
    spoken = None if languages == "all" else names(languages)
    if languages is None and shipped:
        spoken = ["en"]
    chosen = chosen.select(relations=names(relations), languages=spoken, limit=limit)
    planned = load_quietly(
        lambda: plan(load(model, device=device, dtype=dtype, revision=revision), chosen, config),
        model,
    )
    kept = keep(
        "battery",
        config={**config.content(), "lens_identity": planned.identity["lenses"]},
        model={"name": planned.model.name, **planned.model.provenance()},
        prompts=planned.prompts(),
        execute=lambda units, progress: execute(planned, units=units, progress=progress),
        page=write_battery,
        options=KeepOptions(out=out, store=store, html=html),
        unit="prompts",
    )
    if as_json:
        emit_json(kept.to_dict())
    else:
        _show(kept)


def _show(kept: Kept) -> None:
    """Print the main figures, what was left out, and where the files are."""
    from rich.table import Table

    summary, screen = kept.outcome.summary, console()
    counts = summary["counts"]
    table = Table(title=f"{summary['model']}: {counts['items']} facts, {counts['prompts']} prompts")
    for name in ("lens", "answer reached", "onset row (median)", "95%", "IQR", "paraphrase IQR"):
        table.add_column(name)
    for lens, found in summary["by_lens"].items():
        onset = found["medians"].get("L_semantic", {})
        wording = found["medians"].get("paraphrase_iqr", {})
        reached = found["shares"]["reached"]["share"]
        table.add_row(
            lens,
            "-" if reached is None else f"{reached:.0%} of {found['items']}",
            f"{_figure(onset.get('median'))} of {summary['n_layers']}",
            f"{_figure(onset.get('median_low'))} to {_figure(onset.get('median_high'))}",
            _figure(onset.get("iqr")),
            _figure(wording.get("median")),
        )
    screen.print(table)
    advice = summary["measurement_guidance"]
    screen.print(f"trust: {advice['trust']}", highlight=False)
    for entry in advice["reasons"]:
        line = f"{entry['severity']}: {entry['message']} {entry['action']}"
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    for stage, number in counts["excluded"].items():
        line = f"left out, {stage}: {number} (listed in excluded.parquet)"
        screen.print(line, markup=False, highlight=False)
    for name, place in {"files": kept.run_dir, "page": kept.report, "store": kept.store}.items():
        if place is not None:
            screen.print(f"{name}: {place}", markup=False, highlight=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"
