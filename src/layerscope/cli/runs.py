"""``layerscope runs``: what was run, with what result; side by side; taken away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import JsonOption, StoreOption, console, emit_json

if TYPE_CHECKING:
    from layerscope.store import RunInfo, Store

HELP = """What was run, and what came out.

RUN is an id, any beginning of one that no other run shares, or `latest`.

- `layerscope runs list`: latest first
- `layerscope runs show RUN`: one run, its options, files and milestones
- `layerscope runs compare RUN RUN`: milestones side by side
- `layerscope runs export RUN PATH`: files and a manifest, to a folder or a .zip
- `layerscope runs delete RUN`: forget a run; its files stay
"""

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Id, unique beginning of an id, or `latest`.")
]
_STATUS_STYLE = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "interrupted": "yellow",
}
# Milestones shown by default, most asked for first; --all shows every one.
_MAIN_MILESTONES = (
    "L_copy",
    "L_semantic",
    "L_semantic_strong",
    "first_kl_below_0.5",
)
_ID_CHARS = 10
_WIDE = 110  # columns of a terminal that has room for folders


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    runs = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown")
    runs.command("list")(list_runs)
    runs.command("show")(show)
    runs.command("compare")(compare)
    runs.command("export")(export)
    runs.command("delete")(delete)
    app.add_typer(runs, name="runs")


def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 20,
    model: Annotated[
        str | None, typer.Option("--model", help="Only models whose name contains this.")
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="finished, running, failed or interrupted.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List runs, latest first."""
    with _open(store) as opened:
        found = opened.runs(limit=limit, model=model, status=status)
        name = opened.name
    if as_json:
        emit_json([_brief(run) for run in found])
        return
    if not found:
        which = "no such runs" if model or status else "no runs yet"
        console().print(f"{which} in {name}", markup=False, highlight=False, soft_wrap=True)
        return
    screen = console()
    screen.print(_list_table(found, wide=screen.width >= _WIDE))


def show(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one run: what was asked, what it wrote, and where the milestones lie."""
    with _open(store) as opened:
        found = opened.run(run)
        summary: dict[str, Any] = (
            opened.result(found.id, "summary") if "summary" in found.results else {}
        )
    if as_json:
        emit_json({**found.to_dict(), "summary": summary})
        return
    screen = console()
    facts = _table("run", found.id)
    for name, value in _facts(found):
        facts.add_row(name, _text(value))
    screen.print(facts)
    if found.artifacts:
        files = _table("file", "size", "sha256")
        for entry in found.artifacts:
            files.add_row(_text(entry.path), f"{entry.n_bytes:,} B", entry.sha256[:12])
        screen.print(files)
    if summary.get("passes"):
        screen.print(_milestone_table(summary))


def compare(
    a: Annotated[str, typer.Argument(metavar="RUN_A", help="Id, beginning of one, or `latest`.")],
    b: Annotated[str, typer.Argument(metavar="RUN_B", help="Id, beginning of one, or `latest`.")],
    every: Annotated[
        bool, typer.Option("--all", help="Every milestone of every lens, equal ones too.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put two runs side by side: what was asked differently, and which milestones moved.

    Runs of models with different depths are compared by the fraction of the depth.
    """
    with _open(store) as opened:
        found = opened.compare(a, b)
    if as_json:
        emit_json(found)
        return
    screen = console()
    screen.print(_sides(found))
    rows, n_equal = _differences(found, every=every)
    if rows.row_count:
        screen.print(rows)
    if not every:
        screen.print(f"{n_equal} main milestones are equal (--all shows everything)")
    for side in ("a", "b"):
        alone = found[f"only_{side}"]
        if alone:
            names = ", ".join(_pass_name(entry) for entry in alone)
            screen.print(f"only in {side}: {names}", markup=False, highlight=False)


def export(
    run: RunArgument,
    path: Annotated[Path, typer.Argument(help="A new folder, or a new file that ends in .zip.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy what a run wrote, with a manifest of SHA-256 sums; nothing is overwritten."""
    with _open(store) as opened:
        found = opened.run(run)
        written = opened.export(found.id, path)
    if as_json:
        emit_json({"run": found.id, "path": str(written), "files": len(found.artifacts)})
        return
    line = f"{len(found.artifacts)} files and a manifest in {written}"
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def delete(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a run. The files it wrote stay where they are."""
    with _open(store) as opened:
        found = opened.run(run)
        if not yes:
            question = f"Forget run {found.id} ({found.model}, {found.status})?"
            typer.confirm(question, abort=True, err=True)
        opened.delete(found.id)
    if as_json:
        emit_json({"deleted": found.id, "folder": found.dir})
        return
    line = f"forgot run {found.id}; its files stay in {found.dir or 'no folder that is left'}"
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def _open(store: str | None) -> Store:
    """Open a store that exists; looking for runs must not create an empty one."""
    from layerscope.errors import StoreError
    from layerscope.store import DEFAULT_STORE, Store

    place = store or DEFAULT_STORE
    if "://" not in place and not Path(place).expanduser().is_file():
        raise StoreError(f"there is no runs database {place}; run something first or pass --store")
    return Store.open(place)


def _brief(run: RunInfo) -> dict[str, Any]:
    names = (
        *("id", "experiment", "model", "status", "created_at", "started_at", "finished_at"),
        *("attempts", "dir", "n_prompts", "n_units", "error"),
    )
    return {name: getattr(run, name) for name in names}


def _facts(run: RunInfo) -> list[tuple[str, str]]:
    facts = [
        ("model", run.model),
        ("experiment", run.experiment),
        ("status", run.status),
        ("started", _time(run.started_at)),
        ("finished", _time(run.finished_at)),
        ("attempts", str(run.attempts)),
        ("prompts", str(run.n_prompts)),
        ("folder", run.dir or f"{run.out_dir} (gone)"),
    ]
    if run.error:
        facts.append(("error", run.error))
    if run.n_units:
        facts.append(("units kept", str(run.n_units)))
    skip = ("name", "versions")
    identity = {key: value for key, value in run.model_identity.items() if key not in skip}
    facts += [(f"model {key}", str(value)) for key, value in identity.items() if _plain(value)]
    facts += [(f"option {key}", str(value)) for key, value in run.config.items() if _plain(value)]
    facts += [(f"version {key}", str(value)) for key, value in run.versions.items()]
    return facts


def _plain(value: Any) -> bool:
    return value is not None and not isinstance(value, dict)


def _list_table(found: list[RunInfo], *, wide: bool) -> Any:
    columns = ["run", "model", "status", "started (UTC)", "prompts"]
    table = _table(*columns, *(["experiment", "folder"] if wide else []))
    for run in found:
        cells = [run.id, _text(run.model), _status(run), _time(run.started_at)[:16]]
        cells.append(str(run.n_prompts))
        if wide:
            cells += [_text(run.experiment), _text(run.dir or "gone")]
        table.add_row(*cells)
    return table


def _milestone_table(summary: dict[str, Any]) -> Any:
    lens = summary.get("primary_lens") or summary["passes"][0]["lens"]
    passes = [entry for entry in summary["passes"] if entry["lens"] == lens]
    names = [name for name in _MAIN_MILESTONES if name in passes[0].get("milestones", {})]
    title = f"milestones of the {lens} lens: first row (row from which it stays, or lost)"
    table = _table("prompt", *(_folded(name) for name in names), title=title)
    table.columns[0].min_width = min(26, max(len(_pass_name(entry)) for entry in passes))
    for entry in passes:
        moments = entry.get("milestones", {})
        cells = [_moment(moments.get(name) or {}) for name in names]
        table.add_row(_text(_pass_name(entry)), *cells)
    return table


def _folded(name: str) -> str:
    """Break a long column name at the underscore nearest its middle."""
    if len(name) <= _ID_CHARS:
        return name
    breaks = [index for index, char in enumerate(name) if char == "_"]
    middle = min(breaks, key=lambda index: abs(index - len(name) / 2))
    return f"{name[:middle]}\n{name[middle:]}"


def _moment(moment: dict[str, Any]) -> str:
    first, stable = moment.get("first"), moment.get("stable")
    if first is None:
        return "-"
    if stable == first:
        return str(first)
    return f"{first} ({'lost' if stable is None else stable})"


def _sides(found: dict[str, Any]) -> Any:
    table = _table("", "a", "b")
    a, b = found["a"], found["b"]
    for name in a:
        table.add_row(name, _text(a[name]), _text(b[name]))
    for entry in found["config"]:
        table.add_row(_text(entry["option"]), _text(entry["a"]), _text(entry["b"]))
    return table


def _differences(found: dict[str, Any], *, every: bool) -> tuple[Any, int]:
    """Return a table of milestones that differ (or all), and how many were left out as equal."""
    same_depth = found["a"]["n_layers"] == found["b"]["n_layers"]
    moment = "first" if same_depth else "fraction"
    title = f"milestones: {'first row' if same_depth else 'fraction of the depth'}"
    table = _table("prompt", "lens", "milestone", "a", "b", "b - a", title=title)
    n_equal = 0
    for entry in found["passes"]:
        label = _pass_name(entry)
        for name, moments in entry["milestones"].items():
            values = moments[moment]
            if not every and (entry["lens"] != "norm" or name not in _MAIN_MILESTONES):
                continue
            if not every and values["a"] == values["b"]:
                n_equal += 1
                continue
            cells = [_number(values[side]) for side in ("a", "b")]
            delta = values["delta"]
            change = "-" if delta is None else "=" if delta == 0 else f"{delta:+.3g}"
            table.add_row(_text(label), _text(entry["lens"]), name, *cells, change)
            label = ""
    return table, n_equal


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _pass_name(entry: dict[str, Any]) -> str:
    name = entry.get("fact_key") or ("control" if entry.get("prompt_id") == "ctl" else "prompt")
    variant = entry.get("prompt_variant")
    again = f" #{entry['occurrence'] + 1}" if entry.get("occurrence") else ""
    return f"{name}{again}" if variant in (None, "orig") else f"{name}{again}, {variant}"


def _status(run: RunInfo) -> Any:
    from rich.text import Text

    return Text(run.status, style=_STATUS_STYLE.get(run.status, ""))


def _text(value: Any) -> Any:
    """Return a cell that rich takes literally, brackets and all."""
    from rich.text import Text

    return Text("-" if value is None else str(value), overflow="fold")


def _time(stamp: str | None) -> str:
    return "-" if stamp is None else stamp[:19].replace("T", " ")


def _table(*columns: str, title: str | None = None) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for column in columns:
        # Ids and times are there to be read and copied, so they are never wrapped or cut.
        table.add_column(column, no_wrap=column in ("started (UTC)", "sha256", "size", "status"))
    if columns[0] == "run" and len(columns) > 2:
        table.columns[0].no_wrap = True
    return table
