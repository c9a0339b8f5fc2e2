"""``layerscope compare``: runs of several models side by side, and what must not be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import JsonOption, StoreOption, console, emit_json

if TYPE_CHECKING:
    from layerscope.measures.cross_model import CrossModel

HELP = """Compare finished runs of layers or battery, of one model or of several.

RUN is an id, any beginning of one that no other run shares, `latest`, a folder of a run, or the
Parquet table that a layers run wrote.

Depths are row / layers; compared are ranks, thresholds and confirmed onsets, over the facts that
all runs may be compared on. Everything else is listed with the reason: another norm, dtype or
wording, an answer that begins with another token, a lens fitted on other text, and so on.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", help=HELP)(compare)


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Two or more finished runs.")
    ],
    lens: Annotated[
        str | None, typer.Option("--lens", help="Lens whose facts are shown. Default: norm.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to this file.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the runs, compare them, print or write what came out."""
    from layerscope.measures import cross_model
    from layerscope.reports.compare import write_compare
    from layerscope.reports.compare_text import verdict
    from layerscope.store.readings import open_readings

    with _store(store) as opened:
        readings = open_readings(runs, opened)
    found = cross_model.compare(readings, lens=lens, seed=seed)
    page = write_compare(found, html) if html is not None else None
    if as_json:
        emit_json(
            {"verdict": verdict(found), **found.to_dict(), "page": str(page) if page else None}
        )
        return
    _show(found)
    if page is not None:
        console().print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)


def _store(place: str | None) -> Any:
    """Open the store if there is one; folders and tables need none."""
    from contextlib import nullcontext

    from layerscope.errors import StoreError
    from layerscope.store import DEFAULT_STORE, Store

    chosen = place or DEFAULT_STORE
    if "://" in chosen or Path(chosen).expanduser().is_file():
        return Store.open(chosen)
    if place is not None:
        raise StoreError(f"there is no runs database {place}; name the one that the runs are in")
    return nullcontext(None)


def _show(found: CrossModel) -> None:
    from rich.table import Table
    from rich.text import Text

    from layerscope.measures.runs_described import changed
    from layerscope.reports.compare_text import depth_text, verdict
    from layerscope.reports.glossary import label
    from layerscope.reports.text import visible

    screen = console()
    screen.print(Text(verdict(found), style="bold"))
    names = [visible(reading.label, keep_spaces=True) for reading in found.readings]
    for change in changed(found.readings):
        for option, values in change.options:
            told = "; ".join(
                f"{names[run]} {value}" for run, value in zip(change.runs, values, strict=True)
            )
            screen.print(Text(f"changed: {option}: {told}"))
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in (f"median depth, {found.lens} lens", *names, "facts"):
        grid.add_column(Text(column), overflow="fold")
    for name, entry in found.by_lens[found.lens].items():
        cells = [
            Text(
                f"({depth_text(one)})" if one.refused else depth_text(one),
                "dim" * bool(one.refused),
            )
            for one in entry.runs
        ]
        grid.add_row(Text(label(name)), *cells, Text(str(len(entry.facts))))
    screen.print()
    screen.print(grid)
    _show_refusals(found, names)


def _show_refusals(found: CrossModel, names: list[str]) -> None:
    from rich.text import Text

    from layerscope.reports.text import visible

    counted: dict[tuple[int, str], tuple[str, str, int]] = {}
    elsewhere = 0
    for entry in found.refusals:
        if entry.lens not in (None, found.lens):
            elsewhere += 1
            continue
        place = (entry.run, entry.code)
        reason, action, facts = counted.get(place, (entry.reason, entry.action, 0))
        counted[place] = (reason, action, facts + (entry.fact is not None))
    if not counted and not elsewhere:
        return
    screen = console()
    screen.print()
    screen.print(Text("Not compared (in brackets above)", style="bold"))
    for (run, _), (reason, action, facts) in counted.items():
        many = f" ({facts} facts)" if facts > 1 else ""
        line = Text(f"{names[run]}{many}: ").append(visible(reason, keep_spaces=True))
        screen.print(line.append(f" → {action}", style="italic"))
    if elsewhere:
        screen.print(Text(f"and {elsewhere} more about other lenses (--html or --json)", "dim"))
