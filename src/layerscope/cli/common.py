"""What every command shares: consoles, machine-readable output, common options."""

from __future__ import annotations

import json
import sys
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
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16. Default: float32 on a CPU."),
]


def console(*, stderr: bool = False) -> Console:
    """Return a rich console; on stderr for progress and notes, on stdout for results."""
    from rich.console import Console

    return Console(stderr=stderr)


def emit_json(value: Any) -> None:
    """Write one JSON document to stdout; NaN and infinity are refused rather than written."""
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=False, indent=2)
    sys.stdout.write("\n")
