"""``layerscope fit prism|tuned|temperature|jacobian``: fit a lens on text and store it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import DeviceOption, DtypeOption, JsonOption, console, emit_json

if TYPE_CHECKING:
    from rich.table import Table

    from layerscope.lenses.fitting import FitResult, Kind, Progress

DEFAULT_FOLDER = "layerscope-lenses"

_ABOUT = """

Streams the text, packs it, samples positions, fits, and measures KL(model || lens) in bits on text
held out, beside the raw and norm lenses and other baselines. What it stores (lens.safetensors and
lens.json) is bound to the model's weights and tokenizer. A fit that was killed goes on where it
was when run again. Exit code 0 also where the lens is no better than a baseline; it says so.

"""

PRISM_HELP = (
    "Fit one decoder for all layers: whitening and an orthogonal map."
    + _ABOUT
    + "- `layerscope fit prism ./my-model --text stories.jsonl`"
)
TUNED_HELP = (
    "Fit an affine translator per layer, with a bias-only lens beside it."
    + _ABOUT
    + "- `layerscope fit tuned gpt2 --text wiki.txt --tokens 1000000 --rank 64`"
)
TEMPERATURE_HELP = (
    "Fit one temperature per layer to the norm lens."
    + _ABOUT
    + "- `layerscope fit temperature gpt2 --text wiki.txt`"
)
JACOBIAN_HELP = (
    "Average the Jacobian from every layer to the last."
    + _ABOUT
    + "- `layerscope fit jacobian gpt2 --text wiki.txt --sequences 64`"
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id or local folder.")
]
TextOption = Annotated[
    str,
    typer.Option(
        "--text",
        help="Plain text, .jsonl, .parquet, or a Hugging Face dataset. layerscope-demo: text like "
        "that of the embedded model's training.",
    ),
]
FieldOption = Annotated[str, typer.Option("--field", help="Field of a record that is the text.")]
SplitOption = Annotated[str, typer.Option("--split", help="Split of a Hugging Face dataset.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help=f"Folder of the lens. Default: {DEFAULT_FOLDER}/MODEL/LENS."),
]
TokensOption = Annotated[int, typer.Option("--tokens", min=1, help="Tokens to fit on.")]
HeldOutOption = Annotated[
    int,
    typer.Option(
        "--held-out", min=1, help="Tokens held out for the figures; as many to validate on."
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", min=2, help="Tokens of a sequence. Default: 256, or the model's."),
]
PositionsOption = Annotated[
    int, typer.Option("--positions", min=1, help="Positions sampled of every sequence.")
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Sequences run at once.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of order, positions and factors.")]
NormOption = Annotated[str, typer.Option("--norm", help="final or next_norm.")]


def register(group: typer.Typer) -> None:
    """Add the subcommands to the group ``fit``."""
    _add(group, "prism", PRISM_HELP, _prism)
    _add(group, "tuned", TUNED_HELP, _tuned)
    _add(group, "temperature", TEMPERATURE_HELP, _temperature)
    _add(group, "jacobian", JACOBIAN_HELP, _jacobian)


def _add(group: typer.Typer, name: str, text: str, function: Callable[..., None]) -> None:
    group.command(name, help=text)(function)


def _prism(
    model: ModelArgument,
    text: TextOption,
    out: OutOption = None,
    whitening: Annotated[str, typer.Option("--whitening", help="full or diagonal.")] = "full",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Directions kept. Default: what validates best."),
    ] = None,
    tokens: TokensOption = 262_144,
    held_out: HeldOutOption = 32_768,
    context: ContextOption = None,
    positions: PositionsOption = 128,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
    norm: NormOption = "final",
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    from layerscope.lenses.fitting import DataConfig, PrismOptions

    options: Any = {"whitening": whitening, "rank": rank or "auto"}
    data = DataConfig(
        tokens=tokens, evaluation_tokens=held_out, context=context, positions=positions,
        batch=batch, seed=seed,
    )  # fmt: skip
    where = {"field": field, "split": split, "device": device, "dtype": dtype}
    _fit("prism", model, text, out, data, PrismOptions(**options), norm, where, as_json)


def _tuned(
    model: ModelArgument,
    text: TextOption,
    out: OutOption = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of the translators. Default: full.")
    ] = None,
    temperature: Annotated[
        bool, typer.Option("--temperature", help="Train a temperature per layer as well.")
    ] = False,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Times through the text.")] = 2,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Peak rate of AdamW. Default: one a layer."),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Train a bias-only lens beside it.")
    ] = True,
    tokens: TokensOption = 262_144,
    held_out: HeldOutOption = 32_768,
    context: ContextOption = None,
    positions: PositionsOption = 128,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
    norm: NormOption = "final",
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    from layerscope.lenses.fitting import DataConfig, TunedOptions

    options = TunedOptions(
        rank=rank, temperature=temperature, epochs=epochs, learning_rate=learning_rate,
        baseline=baseline,
    )  # fmt: skip
    data = DataConfig(
        tokens=tokens, evaluation_tokens=held_out, context=context, positions=positions,
        batch=batch, seed=seed,
    )  # fmt: skip
    where = {"field": field, "split": split, "device": device, "dtype": dtype}
    _fit("tuned", model, text, out, data, options, norm, where, as_json)


def _temperature(
    model: ModelArgument,
    text: TextOption,
    out: OutOption = None,
    tokens: TokensOption = 32_768,
    held_out: HeldOutOption = 32_768,
    context: ContextOption = None,
    positions: PositionsOption = 128,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
    norm: NormOption = "final",
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    from layerscope.lenses.fitting import DataConfig

    data = DataConfig(
        tokens=tokens, evaluation_tokens=held_out, context=context, positions=positions,
        batch=batch, seed=seed,
    )  # fmt: skip
    where = {"field": field, "split": split, "device": device, "dtype": dtype}
    _fit("temperature", model, text, out, data, None, norm, where, as_json)


def _jacobian(
    model: ModelArgument,
    text: TextOption,
    out: OutOption = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="Sequences to average over.")
    ] = 64,
    gradient_batch: Annotated[
        int, typer.Option("--gradient-batch", min=1, help="Sequences differentiated at once.")
    ] = 8,
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="First positions of a sequence left out.")
    ] = 16,
    held_out: HeldOutOption = 32_768,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of a sequence.")
    ] = 128,
    positions: PositionsOption = 128,
    batch: BatchOption = 4,
    seed: SeedOption = 0,
    field: FieldOption = "text",
    split: SplitOption = "train",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    from layerscope.lenses.fitting import DataConfig, JacobianOptions

    options = JacobianOptions(sequences=sequences, skip=skip, batch=gradient_batch)
    data = DataConfig(
        tokens=sequences * (context or 256), evaluation_tokens=held_out, context=context,
        positions=positions, batch=batch, seed=seed,
    )  # fmt: skip
    where = {"field": field, "split": split, "device": device, "dtype": dtype}
    _fit("jacobian", model, text, out, data, options, "final", where, as_json)


def _fit(
    kind: Kind,
    model: str,
    text: str,
    out: Path | None,
    data: Any,
    options: Any,
    norm: Any,
    where: dict[str, Any],
    as_json: bool,
) -> None:
    from layerscope.lenses.find import default_folder
    from layerscope.lenses.fitting import TextSource, fit_lens
    from layerscope.models import load

    source = TextSource(text, field=where["field"], split=where["split"])
    opened = load(model, device=where["device"], dtype=where["dtype"])
    folder = out or default_folder(model, kind)
    with _progress(kind) as progress:
        result = fit_lens(
            kind, opened, source, folder, data=data, options=options, norm=norm, progress=progress
        )
    if as_json:
        emit_json({"folder": str(folder), "kind": kind, **result.details})
    else:
        _show(kind, folder, result)


@contextmanager
def _progress(kind: str) -> Generator[Callable[[Progress], object] | None]:
    """Show steps, the latest figure and the time left on stderr, where that is a terminal."""
    notes = console(stderr=True)
    if not notes.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}"),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(f"fit {kind}", total=None, eta="", note="")

        def show(progress: Progress) -> None:
            eta = "" if progress.eta is None else f"{progress.eta:.0f} s left"
            bar.update(
                task, total=progress.steps, completed=progress.step, eta=eta, note=progress.note
            )

        yield show


def _show(kind: str, folder: Path, result: FitResult) -> None:
    from rich.markup import escape

    out = console()
    if result.resumed:
        out.print(f"resumed after {result.resumed} steps", highlight=False)
    out.print(_table(result))
    for line in result.warnings:
        out.print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True, highlight=False)
    if not result.warnings:
        baselines = [name for name in next(iter(result.verdict["at"].values())) if name != kind]
        text = f"{kind} beats {', '.join(baselines)} at 25, 50 and 75% depth on held-out text"
        out.print(text, highlight=False)
    out.print(escape(f"stored in {folder}"), soft_wrap=True, highlight=False)


def _table(result: FitResult) -> Table:
    from rich.table import Table

    held_out = result.details["held_out"]
    depths = {row: depth for depth, row in held_out["depths"].items()}
    table = Table(
        title=f"KL(model || lens) in bits, {held_out['positions']:,} held-out positions",
        title_justify="left",
    )
    table.add_column("row", justify="right")
    table.add_column("depth", justify="right")
    for name in result.kl_bits:
        table.add_column(name, justify="right")
    n_rows = len(next(iter(result.kl_bits.values())))
    for row in range(n_rows):
        cells = [f"{found[row]:.3f}" for found in result.kl_bits.values()]
        table.add_row(str(row), depths.get(row, ""), *cells)
    return table
