"""``layerscope measures``: every milestone and check, recomputed from a table of rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerscope.cli.common import JsonOption, console, emit_json

if TYPE_CHECKING:
    from layerscope.measures.config import MeasureConfig
    from layerscope.measures.table import LayersTable

HELP = """Recompute every milestone and check from a table of per-layer rows; no model is needed.

TABLE is one of two kinds:

- `output-MODEL-layers.parquet`: what a run wrote
- `output-MODEL-pure-next-token.csv`: a table of the earlier system. Its companions for other
  lenses and for the audit of the tuned lens go with `--rawlens`, `--tuned`, `--prism`,
  `--variants` and `--positions`, or all that lie beside it with `--companions`

A milestone says at which layer a condition was first true, from which one on it stays true, and
where it was lost. Layer 0 is the embedding, layer k the residual after k blocks. The main ones:

- `L_copy`: top-1 repeats the prompt with p above the threshold and a clear margin
- `L_semantic`: the answer is top-1
- `L_semantic_margin_ok`: ... with a probability clearly above chance
- `L_semantic_strong`: ... and a gap of half a logit or more to the runner-up
- `L_semantic_confirmed`: `L_semantic`, where a second lens agrees within two layers
- `first_kl_below_1.0`: at most 1 bit away from the model's own distribution

With `--json` the top level carries the first fact's numbers under their published names; `passes`
and `per_fact` hold all others.
"""

# Milestones of the overview, in the order in which they are reached as a rule.
OVERVIEW = (
    ("L_copy", "echoes the prompt"),
    ("L_copy_H", "entropy at most 1 bit"),
    ("first_rank_le_10", "answer among the top 10"),
    ("first_rank_le_5", "answer among the top 5"),
    ("L_semantic", "answer on top"),
    ("L_semantic_run2", "... on two layers in a row"),
    ("L_semantic_top2_ok", "... ahead by 0.5 logits"),
    ("L_semantic_margin_ok", "... clearly above chance"),
    ("L_semantic_strong", "... both"),
    ("L_semantic_strong_run2", "... both, on two layers in a row"),
    ("L_surface_to_meaning", "answer outweighs the prompt's words"),
    ("L_geom", "residual points to the answer"),
    ("first_kl_below_1.0", "within 1 bit of the output"),
    ("first_kl_below_0.5", "within 0.5 bits of the output"),
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("measures", help=HELP)(measures)


def measures(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="Parquet of a run, or a published CSV.")
    ],
    rawlens: Annotated[
        Path | None,
        typer.Option(
            "--rawlens", metavar="TABLE", help="Published raw-lens CSV that belongs to TABLE."
        ),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            "--tuned", metavar="TABLE", help="Published tuned-lens CSV that belongs to TABLE."
        ),
    ] = None,
    prism: Annotated[
        Path | None,
        typer.Option(
            "--prism", metavar="TABLE", help="Published prism-lens CSV that belongs to TABLE."
        ),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option("--variants", metavar="TABLE", help="Published ...-tuned-variants.csv."),
    ] = None,
    positions: Annotated[
        Path | None,
        typer.Option(
            "--positions", metavar="TABLE", help="Published ...-positions-tuned-audit.csv"
        ),
    ] = None,
    with_companions: Annotated[
        bool,
        typer.Option("--companions", help="Take every published companion that lies beside TABLE."),
    ] = False,
    compat: Annotated[
        Path | None,
        typer.Option(
            "--compat",
            metavar="FOLDER",
            help="Write the earlier system's set of files, values corrected, to FOLDER.",
        ),
    ] = None,
    copy_threshold: Annotated[
        float | None, typer.Option(help="Probability above which an echo is strict. [0.95]")
    ] = None,
    copy_margin: Annotated[
        float | None, typer.Option(help="Margin over the runner-up of a strict echo. [0.10]")
    ] = None,
    copy_soft_thresh: Annotated[
        float | None, typer.Option(help="Probability above which an echo is soft. [0.50]")
    ] = None,
    copy_soft_window_ks: Annotated[
        str | None, typer.Option(help="Lengths of soft windows, separated by commas. [1,2,3]")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Read the table, measure it, print."""
    from layerscope.measures.compat import published_document
    from layerscope.measures.summary import summarise

    config = _config(copy_threshold, copy_margin, copy_soft_thresh, copy_soft_window_ks)
    given = {"rawlens": rawlens, "tuned": tuned, "prism": prism}
    given |= {"variants": variants, "positions": positions}
    files = {name: path for name, path in given.items() if path is not None}
    source, sections = _read(table, files, all_of_them=with_companions, config=config)
    summary = summarise(source, config, diagnostics=sections).to_dict()
    written = [] if compat is None else _write(source, summary, compat)
    if as_json:
        emit_json(published_document(summary))
    else:
        _print(summary, source)
        for path in written:
            console().print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _config(
    threshold: float | None, margin: float | None, soft: float | None, windows: str | None
) -> MeasureConfig:
    from layerscope.errors import ConfigError
    from layerscope.measures.config import MeasureConfig

    changes: dict[str, float | tuple[int, ...]] = {}
    given = {"copy_threshold": threshold, "copy_margin": margin, "copy_soft_threshold": soft}
    changes |= {name: value for name, value in given.items() if value is not None}
    if windows is not None:
        try:
            changes["copy_soft_window_ks"] = tuple(int(word) for word in windows.split(","))
        except ValueError:
            raise ConfigError(
                f"--copy-soft-window-ks {windows!r} is not a list of whole numbers; give e.g. 1,2,3"
            ) from None
    return MeasureConfig(**changes)  # pyright: ignore[reportArgumentType]  # one type per name


def _read(
    table: Path, files: dict[str, Path], *, all_of_them: bool, config: MeasureConfig
) -> tuple[LayersTable, dict[str, Any]]:
    """Return the table and the diagnostic sections that its companions hold."""
    from layerscope.errors import TableError
    from layerscope.measures.published import is_published, read_published
    from layerscope.measures.published_audit import (
        companions,
        published_sections,
        read_positions,
        read_variants,
    )
    from layerscope.measures.table import LayersTable

    for path in (table, *files.values()):
        if not path.is_file():
            raise TableError(f"{path} is not a file; give a Parquet table or a published CSV")
    if not is_published(table):
        named = [f"--{name}" for name in files] + ["--companions"] * all_of_them
        if named:
            raise TableError(
                f"{named[0]} goes with a published CSV; a Parquet table holds all lenses of its run"
            )
        return LayersTable.read_parquet(table), {}
    if all_of_them:
        files = companions(table) | files
    others = {lens: files[lens] for lens in ("tuned", "prism") if lens in files}
    source = read_published(table, rawlens=files.get("rawlens"), others=others)
    variants, positions = files.get("variants"), files.get("positions")
    sections = published_sections(
        source,
        variants=None if variants is None else read_variants(variants),
        positions=None if positions is None else read_positions(positions),
        config=config,
    )
    return source, sections


def _write(source: LayersTable, summary: dict[str, Any], folder: Path) -> list[Path]:
    """Write the files; what the table does not hold of its run's provenance is left out."""
    from layerscope.reports.files import write_run_files

    return write_run_files(source, summary, source.meta.provenance, folder)


def _print(summary: dict[str, object], source: LayersTable) -> None:
    from layerscope.cli.measures_view import print_milestones
    from layerscope.reports.terminal import print_summary

    out = console()
    print_summary(summary, source, out)
    print_milestones(summary, OVERVIEW, out)
