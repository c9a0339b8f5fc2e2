"""``layerscope features``: look at sparse dictionaries, check them on a model, train new ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import DeviceOption, DtypeOption, JsonOption, console, emit_json

if TYPE_CHECKING:
    from rich.table import Table

HELP = "Sparse dictionaries: what a folder holds, whether they fit a model, and training new ones."

INSPECT_HELP = """Say what dictionaries a folder, file or hub repository holds, by headers alone.

No weight is read. All thirteen formats of docs/features.md are recognised.

- `layerscope features inspect ./gemma-scope-2b-pt-res`
- `layerscope features inspect ./my-dictionaries --convention`

Exit code 2 when a file is damaged; it is named, and the others are listed all the same.
"""

CHECK_HELP = """Check dictionaries on what a model computes on text, and name what is wrong.

Explained variance and L0 tell when the layer, hook or convention is wrong. What each common mistake
would have done is tried: a transposed decoder, a gate without the decoder norm, > for >=, a skipped
pre-bias, another layer or hook, a normalisation folded twice.

- `layerscope features check gpt2 ./gpt2-dictionaries --text stories.jsonl`

Exit code 0 when every dictionary fits, 2 when one raised an alarm.
"""

TRAIN_HELP = """Train dictionaries of a model on text: autoencoders of sites, transcoders of MLPs.

Each is stored as a SAELens folder with its figures on held-out text. A run that was killed goes on
where it stopped when it is given again, with the same result.

- `layerscope features train ./my-model --text stories.jsonl --site resid_post.2 --k 16`
- `layerscope features train gpt2 --text wiki.txt --site 'resid_post.4:8' --kind jumprelu`
- `layerscope features train ./my-model --text stories.jsonl --transcoder --k 16`
"""

DEFAULT_FOLDER = Path("layerscope-dictionaries")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id or local folder.")
]
PathArgument = Annotated[
    str, typer.Argument(metavar="DICTIONARIES", help="Folder, file, or OWNER/REPOSITORY[/FOLDER].")
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="F1 to F13, or its name. Default: found out.")
]
TextOption = Annotated[
    str, typer.Option("--text", help="Plain text, .jsonl, .parquet, or a Hugging Face dataset.")
]
FieldOption = Annotated[str, typer.Option("--field", help="Field of a record that is the text.")]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a Hugging Face dataset.")]
ContextOption = Annotated[
    int | None, typer.Option("--context", min=2, help="Tokens of a row. Default: at most 256.")
]


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
    group.command("inspect", help=INSPECT_HELP)(_inspect)
    group.command("check", help=CHECK_HELP)(_check)
    group.command("train", help=TRAIN_HELP)(_train)
    app.add_typer(group, name="features", help=HELP)


def _inspect(
    path: PathArgument,
    format: FormatOption = None,
    convention: Annotated[
        bool,
        typer.Option("--convention", help="Read biases too, and print how each is understood."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    from layerscope.features.hub import fetch
    from layerscope.features.inspect import inspect

    headers = inspect(fetch(path, format=format), format=format)
    lines: list[str | None] = [None] * len(headers)
    if convention:
        lines = [_convention(header) for header in headers]
    if as_json:
        emit_json(
            [
                {**header.to_dict(), "convention": line}
                for header, line in zip(headers, lines, strict=True)
            ]
        )
    else:
        _show_headers(headers, lines)
    return 2 if any(header.problem for header in headers) else 0


def _convention(header: Any) -> str:
    from layerscope.errors import DictionaryError
    from layerscope.features.formats import LoadOptions, format_of

    if header.problem:
        return header.problem
    try:
        raw = format_of(header.found.format).read(header.found, LoadOptions())
        return raw.fold().convention
    except DictionaryError as error:
        return str(error)


def _show_headers(headers: list[Any], lines: list[str | None]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from layerscope.features.inspect import titles
    from layerscope.models.memory import show_bytes

    out = console()
    named = titles()
    codes = sorted({header.found.format for header in headers})
    table = Table(
        title=f"{len(headers)} dictionaries: {', '.join(named[code] for code in codes)}",
        title_justify="left",
    )
    for heading in ("layer", "features", "bytes", "dtype"):
        table.add_column(heading, justify="right")
    table.add_column("where")
    for header in headers:
        file = header.file
        large = max(file.entries.values(), key=lambda entry: entry.nbytes) if file else None
        table.add_row(
            "?" if header.found.layer is None else str(header.found.layer),
            "?" if header.features is None else f"{header.features:,}",
            show_bytes(header.nbytes),
            str(large.dtype).removeprefix("torch.") if large else "?",
            escape(header.found.label or header.found.path.name),
        )
    out.print(table)
    for header, line in zip(headers, lines, strict=True):
        if header.problem:
            out.print(f"[red]damaged[/]: {escape(header.problem)}", soft_wrap=True, highlight=False)
        elif line:
            out.print(
                escape(f"layer {header.found.layer}: {line}"), soft_wrap=True, highlight=False
            )


def _check(
    model: ModelArgument,
    dictionaries: PathArgument,
    text: TextOption,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", help="Only this layer; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens to judge by.")] = 4096,
    hook: Annotated[
        str | None, typer.Option("--hook", help="Site that is read, where the file is silent.")
    ] = None,
    activation_scale: Annotated[
        float | None, typer.Option("--activation-scale", help="Scale that was not folded yet.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Of a TopK without k.")] = None,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Accept a model of another name.")
    ] = False,
    format: FormatOption = None,
    context: ContextOption = None,
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> int:
    from layerscope.cli.keep import load_quietly
    from layerscope.features import open_set
    from layerscope.features.check import check_on_model
    from layerscope.features.staging import plan_stages, stages
    from layerscope.features.texts import read_batches
    from layerscope.lenses.fitting.text import TextSource
    from layerscope.models import load

    opened = open_set(
        dictionaries, layers=layers, format=format, hook=hook,
        activation_scale=activation_scale, k=k,
    )  # fmt: skip
    language_model = load_quietly(lambda: load(model, device=device, dtype=dtype), model)
    source = TextSource(text, field=field, split=split)
    batches = read_batches(language_model, source, tokens=tokens, context=context).train
    reports = {
        dictionary.layer: check_on_model(
            dictionary, language_model, batches, other_model=other_model
        )
        for dictionary in stages(opened, plan_stages(opened))
    }
    if as_json:
        emit_json({str(layer): report.to_dict() for layer, report in reports.items()})
    else:
        _show_reports(reports)
    return 0 if all(report.passed for report in reports.values()) else 2


def _show_reports(reports: dict[int, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    rows = next(iter(reports.values())).figures.rows
    table = Table(title=f"on {rows:,} tokens", title_justify="left")
    for heading in ("layer", "FVU", "L0", "silent", "cosine"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for layer, report in reports.items():
        found = report.figures
        verdict = "[green]fits[/]" if report.passed else f"[red]{report.alarms[0].code}[/]"
        table.add_row(
            str(layer), f"{found.fvu:.3f}", f"{found.l0:.1f}", f"{found.dead:.1%}",
            f"{found.cosine:.3f}", verdict,
        )  # fmt: skip
    out.print(table)
    for layer, report in reports.items():
        out.print(escape(f"layer {layer}: {report.convention}"), soft_wrap=True, highlight=False)
        for alarm in report.alarms:
            line = f"[red]alarm[/] layer {layer}: {escape(alarm.text)}"
            out.print(line, soft_wrap=True, highlight=False)


def _train(
    model: ModelArgument,
    text: TextOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"Folder. Default: {DEFAULT_FOLDER}/MODEL."),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            help="Site or pattern; may be repeated. Default: resid_post.*, of transcoders mlp_in.*",
        ),
    ] = None,
    transcoder: Annotated[
        bool,
        typer.Option("--transcoder", help="Explain what MLPs write from what they read (mlp_in)."),
    ] = False,
    affine: Annotated[
        bool, typer.Option("--affine", help="A skip transcoder: add a linear map of what is read.")
    ] = False,
    kind: Annotated[str, typer.Option("--kind", help="batchtopk or jumprelu.")] = "batchtopk",
    expansion: Annotated[
        float, typer.Option("--expansion", help="Features per dimension of the site.")
    ] = 8.0,
    k: Annotated[int, typer.Option("--k", min=1, help="Features active per token.")] = 32,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the optimiser.")] = 2000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Tokens of a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of Adam.")] = 1e-3,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to train on.")] = 262_144,
    held_out: Annotated[
        int, typer.Option("--held-out", min=64, help="Tokens held out for the figures.")
    ] = 16_384,
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="First positions of a row that are left out.")
    ] = 1,
    half: Annotated[bool, typer.Option("--half", help="Store the matrices in float16.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of start and order.")] = 0,
    context: ContextOption = None,
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    import torch

    from layerscope.cli.keep import show_progress
    from layerscope.features.texts import read_batches
    from layerscope.features.training import TrainOptions, train_dictionaries
    from layerscope.files import safe_name
    from layerscope.lenses.fitting.text import TextSource
    from layerscope.models import load
    from layerscope.models.sites import expand

    chosen: Any = kind
    options = TrainOptions(
        kind=chosen, expansion=expansion, k=k, steps=steps, batch=batch,
        learning_rate=learning_rate, seed=seed, transcoder=transcoder, affine=affine,
    )  # fmt: skip
    opened = load(model, device=device, dtype=dtype)
    wanted = expand(
        sites or ["mlp_in.*" if transcoder else "resid_post.*"],
        n_layers=opened.n_layers, n_heads=opened.n_heads, n_kv_heads=opened.n_kv_heads,
    )  # fmt: skip
    source = TextSource(text, field=field, split=split)
    read = read_batches(opened, source, tokens=tokens, held_out=held_out, context=context)
    folder = out or DEFAULT_FOLDER / safe_name(model)
    with show_progress("features train", "steps") as show:

        def tell(site: Any, state: Any) -> None:
            if show is not None:
                show(wanted.index(site) * options.steps + state.step, len(wanted) * options.steps)

        trained = train_dictionaries(
            opened, read.train, read.held_out, wanted, folder,
            options=options, skip=skip, store_dtype=torch.float16 if half else torch.float32,
            progress=tell,
        )  # fmt: skip
    if as_json:
        emit_json(
            [{"site": str(one.site), "folder": str(one.folder), **one.figures} for one in trained]
        )
    else:
        out_screen = console()
        out_screen.print(_trained_table(trained))
        out_screen.print(f"stored in {folder}", markup=False, soft_wrap=True, highlight=False)


def _trained_table(trained: list[Any]) -> Table:
    from rich.table import Table

    rows = trained[0].figures["rows"]
    table = Table(title=f"on {rows:,} held-out tokens", title_justify="left")
    table.add_column("site")
    for heading in ("FVU", "L0", "silent", "loss", "model's own", "recovered"):
        table.add_column(heading, justify="right")
    for one in trained:
        found, loss = one.figures, one.figures["loss"]
        table.add_row(
            str(one.site), f"{found['fvu']:.3f}", f"{found['l0']:.1f}", f"{found['dead']:.1%}",
            f"{loss['reconstructed']:.3f}", f"{loss['clean']:.3f}", f"{loss['recovered']:.1%}",
        )  # fmt: skip
    return table
