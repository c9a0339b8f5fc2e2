"""``layerscope layers``: the layers experiment on one or several models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from layerscope.cli.sweep import Sweep

HELP = """Read every layer of a causal language model: where the answer appears, and how surely.

Every prompt goes through the model once; each layer is decoded through the lenses at every
position. Without --prompts the built-in suite runs: five capitals, each with and without a filler
word, and a control prompt.

A prompt file is CSV, or YAML with a list of mappings. Its columns:

- `key`: a unique name
- `prompt`: the text before the answer
- `answer`: what should follow
- `foil` (optional): a wrong answer of the same kind
- `control` (optional): the same question about something else, whose right answer is the foil
- `ablated` (optional): the prompt without a word that should not matter

Results land in OUT/run-latest; an earlier one is renamed, never overwritten:

- `report.html`: open it in a browser; it needs no network
- `output-MODEL-layers.parquet`: the typed table, from which `layerscope measures` recomputes all
- `output-MODEL.json` and CSV files: summary and tables

A prompt whose answer does not follow it in whole tokens, or that is too long, is listed with the
reason and left out; the others are read all the same, and the exit code is 2.

A run that was interrupted or killed goes on when the same command is given again.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("layers", help=HELP)(layers)


def layers(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Hugging Face ids or local folders.")
    ],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="CSV or YAML file. Default: built-in suite.")
    ] = None,
    lens: Annotated[
        str,
        typer.Option(
            "--lens",
            help="Lenses, separated by commas: raw, norm, and the fitted ones temperature, bias, "
            "prism, tuned, jacobian. NAME=FOLDER reads a fitted lens from a folder, NAME alone "
            "from where `layerscope fit` put it. auto: raw, norm and every fitted one there is.",
        ),
    ] = "raw,norm",
    norm: Annotated[
        str,
        typer.Option(
            "--norm",
            help="final: the final norm at every layer, as in the literature. next_norm: the "
            "input norm of the next block, to compare with earlier published tables.",
        ),
    ] = "final",
    compat: Annotated[
        bool,
        typer.Option(
            "--compat",
            help="Read layers as the earlier system did: short for --norm next_norm. Names, "
            "columns and order of the files are that system's in any case.",
        ),
    ] = False,
    prompt_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="raw: prompts as they stand. chat: inside the model's own chat template. "
            "auto: chat for an instruct model, raw for a base model.",
        ),
    ] = "auto",
    system: Annotated[str | None, typer.Option("--system", help="System message of a chat.")] = (
        None
    ),
    task: Annotated[
        str,
        typer.Option("--task", help="Task template for the prompts: completion or qa, or an id."),
    ] = "completion",
    diagnostics: Annotated[
        str,
        typer.Option(
            "--diagnostics",
            help="Checks that need the model again (precision, batches, norms, positions, skipped "
            "blocks, what a tuned lens does): none, standard or full.",
        ),
    ] = "standard",
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Held-out text for these checks: a plain file, .jsonl, .parquet, or a Hugging "
            "Face dataset. Default: a page of prose, or, where the model does not read it, its own "
            "continuations of the prompts.",
        ),
    ] = None,
    instruct: Annotated[
        bool | None,
        typer.Option(
            "--instruct/--base",
            help="Whether MODEL was tuned on its chat template. Default: decided by its name and "
            "tokenizer.",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    products: Annotated[
        str,
        typer.Option(
            "--products",
            help="Matrix products of the forward passes. default: torch as found, bit-equal to "
            "Hugging Face. checked: the fastest that is float32-accurate on this machine.",
        ),
    ] = "default",
    out: Annotated[Path, typer.Option("--out", help="Folder that holds run-latest.")] = (
        DEFAULT_FOLDER
    ),
    store: StoreOption = None,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Run the experiment, print the summary, return the exit code."""
    from layerscope.cli.sweep import SweepOptions, run_sweep
    from layerscope.errors import ConfigError
    from layerscope.experiments.layers import LayersConfig, PromptSet

    if products not in ("default", "checked"):
        raise ConfigError(f"unknown --products {products!r}; use default or checked")
    if len(set(models)) < len(models):
        raise ConfigError("a model is named twice; name each once")
    lenses, artifacts = parse_lenses(lens)
    config = LayersConfig(
        lenses=lenses,
        artifacts=artifacts,
        norm_choice="next_norm" if compat else norm,  # pyright: ignore[reportArgumentType]  # checked by the config itself
        format=prompt_format,  # pyright: ignore[reportArgumentType]  # checked by the config itself
        system=system,
        task=task,
        diagnostics=diagnostics,  # pyright: ignore[reportArgumentType]  # checked by the config
        text=text,
        run_products=products,
    )
    chosen = PromptSet.builtin() if prompts is None else PromptSet.from_file(prompts)
    options = SweepOptions(
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        instruct=instruct,
        out=out,
        store=store,
        html=html,
    )
    sweep = run_sweep(models, chosen, config, options)
    show(sweep, as_json=as_json)
    return 0 if all(outcome.complete for outcome in sweep.outcomes) else 2


def parse_lenses(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names in a list such as ``raw,norm,tuned=FOLDER``, and the folders by name."""
    from layerscope.errors import ConfigError

    names: list[str] = []
    folders: dict[str, str] = {}
    for part in (piece.strip() for piece in text.split(",")):
        name, equals, folder = (piece.strip() for piece in part.partition("="))
        if not part:
            continue
        names.append(name)
        if equals and not folder:
            raise ConfigError(f"--lens {part} names no folder; write {name}=FOLDER, or {name}")
        if folder:
            folders[name] = folder
    return tuple(names), folders


def show(sweep: Sweep, *, as_json: bool) -> None:
    """Print what came out: JSON, or a summary per model and where the files are."""
    if as_json:
        emit_json(sweep.to_dict())
        return
    from layerscope.reports.terminal import print_summary

    screen = console()
    for outcome in sweep.outcomes:
        if outcome.result is not None:
            print_summary(outcome.result.summary, outcome.result.table, screen)
            used = outcome.result.provenance.get("prompts") or {}
            if "format" in used:
                line = f"prompt format: {used['format']} ({used['format_reason']})"
                screen.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            screen.print(f"{outcome.model}: failed: {outcome.error}", markup=False)
    places = {"files": sweep.run_dir, "page": sweep.report, "store": sweep.store}
    screen.print()
    for name, place in places.items():
        if place is not None:
            screen.print(f"{name}: {place}", markup=False, highlight=False, soft_wrap=True)
