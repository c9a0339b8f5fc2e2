"""The page of a path patching run: maps of senders and receivers, a ranking with its control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.path_patching.summary import EDGE_KEYS, grouped
from layerscope.experiments.units import Outcome
from layerscope.reports.page import Bars, HeatMap, Part, Section, Table, write_page
from layerscope.reports.patching import checked_figures, pair_section

SHOWN_EDGES = 200
_MOST_COLUMNS = 64
_MOST_ROWS = 40


def write_paths(outcome: Outcome, path: Path) -> Path:
    """Write the page of a path patching run and return its path."""
    summary, provenance = outcome.summary, outcome.provenance
    edges = outcome.tables["edges"].filter(pl.col("metric") == summary["metric"])
    toward = "clean" if summary["direction"] == "denoise" else "corrupt"
    sections = [
        Section(
            "What was done",
            checked_figures(summary, provenance, "edges"),
            "Along an edge one receiver alone hears what one sender says in the other run; every "
            "other sender keeps what it said. Recovery is 0 where that changes nothing and 1 "
            "where it gives the other run's number.",
        ),
        _ranking(summary),
        _maps(edges, summary, toward),
        _all_edges(edges),
        pair_section(outcome.tables["pairs"], summary),
    ]
    return write_page(
        path,
        title="Path patching",
        kicker=str(provenance["model_name"]),
        verdict=_verdict(summary, toward),
        sections=sections,
        provenance=provenance,
    )


def _verdict(summary: dict[str, Any], toward: str) -> str:
    best = summary["top"][0]
    if best["mean_recovery"] is None:
        return "No recovery exists: both runs give the same number in every pair."
    control = best["control"]
    beside = "" if control is None else f"; another pair's values move it by {control:.0%}"
    return (
        f"What {_sender(best['sender'])} says to {_receiver(best['receiver'])} moves "
        f"{summary['metric']} by {best['mean_recovery']:.0%} of the way to the {toward} "
        f"run{beside}."
    )


def _sender(name: str) -> str:
    return f"head {name}" if name[0].isdigit() else name


def _receiver(name: str) -> str:
    if name == "logits":
        return "the logits"
    return f"head {name}" if name.count(".") == 2 else name


def _ranking(summary: dict[str, Any]) -> Section:
    rows = [
        (
            row["sender"],
            row["receiver"],
            row["place"],
            row["mean_recovery"],
            row["std_recovery"],
            row["control"],
            row["pairs"],
        )
        for row in summary["top"]
    ]
    columns = ("sender", "receiver", "at", "mean recovery", "deviation", "control", "pairs")
    parts: list[Part] = [Table(columns, rows, "Largest first, either way.")]
    lead = (
        "Control: the same edge, with what another pair's prompt of as many tokens says. About "
        "half is to be expected, since the patched run's own answer is gone; where it moves as "
        "much, the edge says nothing of this pair."
    )
    return Section("Strongest edges", parts, lead)


def _maps(edges: pl.DataFrame, summary: dict[str, Any], toward: str) -> Section:
    means = grouped(edges)
    parts: list[Part] = []
    by_receiver = means["receiver"].n_unique() > 1
    if by_receiver:
        for place in means["place"].unique(maintain_order=True):
            part = means.filter(pl.col("place") == place)
            parts.append(_receivers(part, place))
    else:
        receiver = means["receiver"][0] if means.height else ""
        if means["place"].n_unique() > 1:
            parts.append(_grid(means, "place", f"to {receiver}", "position"))
        heads = means.filter(pl.col("sender").str.contains(r"^\d+\.\d+$"))
        if heads.height and means["place"].n_unique() == 1:
            split = heads.with_columns(
                pl.col("sender").str.split(".").list.get(0).cast(pl.Int64).alias("layer"),
                pl.col("sender").str.split(".").list.get(1).cast(pl.Int64).alias("head"),
            )
            parts.append(_heads(split, f"heads to {receiver}"))
        others = means.filter(~pl.col("sender").str.contains(r"^\d+\.\d+$"))
        if others.height and means["place"].n_unique() == 1:
            names, values = (others[name].to_list() for name in ("sender", "mean_recovery"))
            parts.append(Bars(names, values, f"others to {receiver}", unit="recovery"))
    lead = f"Share of the way to the {toward} run's {summary['metric']}, mean over pairs."
    return Section("Edges", parts, lead)


def _receivers(means: pl.DataFrame, place: str) -> HeatMap:
    kept, more = _strongest(means, "receiver", _MOST_COLUMNS)
    caption = f"senders by receivers, {place} positions" if place == "all" else f"at {place}"
    return _grid(kept, "receiver", caption + more, "receiver")


def _grid(means: pl.DataFrame, across: str, caption: str, title: str) -> HeatMap:
    means, more = _strongest(means, "sender", _MOST_ROWS)
    senders = means["sender"].unique(maintain_order=True).to_list()[::-1]
    columns = means[across].unique(maintain_order=True).to_list()
    return _map(means, senders, columns, ("sender", across), caption + more, ("sender", title))


def _strongest(means: pl.DataFrame, column: str, most: int) -> tuple[pl.DataFrame, str]:
    """Return the rows of those that move most, in their order, and a note where that is not all."""
    sizes = means.group_by(column, maintain_order=True).agg(
        pl.col("mean_recovery").abs().max().alias("size")
    )
    if sizes.height <= most:
        return means, ""
    ranked = sizes.sort("size", descending=True, nulls_last=True, maintain_order=True)
    kept = means.filter(pl.col(column).is_in(ranked[column].head(most).implode()))
    return kept, f"; the {most} of {sizes.height} {column}s that move most"


def _heads(means: pl.DataFrame, caption: str) -> HeatMap:
    layers = sorted(means["layer"].unique().to_list(), reverse=True)
    heads = sorted(means["head"].unique().to_list())
    return _map(means, layers, heads, ("layer", "head"), caption, ("layer", "head"))


def _map(
    means: pl.DataFrame,
    rows: list[Any],
    columns: list[Any],
    keys: tuple[str, str],
    caption: str,
    titles: tuple[str, str],
) -> HeatMap:
    found = {(row[keys[0]], row[keys[1]]): row for row in means.to_dicts()}
    cells = [[found.get((row, column)) for column in columns] for row in rows]
    return HeatMap(
        [[None if cell is None else cell["mean_recovery"] for cell in line] for line in cells],
        [str(row) for row in rows],
        [str(column) for column in columns],
        caption,
        unit="recovery",
        diverging=True,
        hover=[
            [
                ""
                if cell is None
                else f"{cell['sender']} to {cell['receiver']}: value {cell['mean_value']:.4g}"
                for cell in line
            ]
            for line in cells
        ],
        row_title=titles[0],
        column_title=titles[1],
    )


def _all_edges(edges: pl.DataFrame) -> Section:
    means = grouped(edges).sort(
        pl.col("mean_recovery").abs(), descending=True, nulls_last=True, maintain_order=True
    )
    shown = means.head(SHOWN_EDGES)
    columns = (*EDGE_KEYS, "mean_recovery", "std_recovery", "mean_value", "pairs")
    caption = "Every edge." if shown.height == means.height else f"The first {SHOWN_EDGES}."
    rows = [tuple(row) for row in shown.select(columns).rows()]
    lead = f"{means.height} edges; all of them, by pair, are in edges.parquet."
    return Section("All edges", [Table(columns, rows, caption, folded=True)], lead)
