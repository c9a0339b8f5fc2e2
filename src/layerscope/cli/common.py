"""What every command shares: consoles, machine-readable output, common options."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_FOLDER = Path("layerscope-runs")

JsonOption = Annotated[
    bool, typer.Option("--json", help="Machine-readable JSON on stdout, nothing else there.")
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Runs database: a SQLite file or a database URL. Default: layerscope.db in the "
        f"folder of --out, that is {DEFAULT_FOLDER / 'layerscope.db'} unless --out was given.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Hugging Face id or local folder.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder that holds run-latest.")]
HtmlOption = Annotated[bool, typer.Option("--html/--no-html", help="Write report.html.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16. Default: float32 on a CPU."),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")
]
ProductsOption = Annotated[
    str, typer.Option("--products", help="default, or checked: the fastest exact product.")
]
PlanOption = Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")]
MaxSecondsOption = Annotated[
    float | None, typer.Option("--max-seconds", help="Refuse a run predicted to take longer.")
]
MaxMemoryOption = Annotated[
    int | None, typer.Option("--max-memory", help="Refuse a run predicted to take more MiB.")
]


def console(*, stderr: bool = False) -> Console:
    """Return a rich console; on stderr for progress and notes, on stdout for results."""
    from rich.console import Console

    return Console(stderr=stderr)


def emit_json(value: Any) -> None:
    """Write one JSON document to stdout; NaN and infinity are refused rather than written."""
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=False, indent=2)
    sys.stdout.write("\n")


def names(text: str | None) -> list[str] | None:
    """Return the names in a text, split by commas; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers in a text, split by commas.

    Raises:
        ConfigError: something else; names the option.
    """
    from layerscope.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"{option} takes numbers split by commas, not {text!r}; give {option}=-1,0.5,2"
        ) from None


def say_left_out(left: Sequence[Mapping[str, Any]], given: int, what: str) -> None:
    """Print how many of the given things were left out, and the first reasons."""
    if not left:
        return
    screen = console()
    screen.print(f"{len(left)} of {given} {what}s left out:", highlight=False)
    for row in left[:5]:
        line = f"  {row[what]}: {row['reason']}"
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def say_warnings(lines: Sequence[str]) -> None:
    """Print what to be careful with, a line each."""
    from rich.markup import escape

    for line in lines:
        console().print(f"[yellow]warning[/]: {escape(line)}", soft_wrap=True, highlight=False)


def say_files(paths: Sequence[Path | None]) -> None:
    """Print where files are, one whole line each, however wide the terminal is."""
    for path in paths:
        if path is not None:
            console().print(str(path), markup=False, highlight=False, soft_wrap=True)
