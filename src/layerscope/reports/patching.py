"""The page of a patching run: maps of what recovers the answer, a ranking, what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.patching.summary import grouped
from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Figures,
    HeatMap,
    Multiples,
    Part,
    Section,
    Table,
    Text,
    write_page,
)

SHOWN_PAIRS = 6
_MANY_UNITS = 64


def write_patching(outcome: Outcome, path: Path) -> Path:
    """Write the page of a patching run and return its path."""
    summary, provenance = outcome.summary, outcome.provenance
    cells = outcome.tables["cells"].filter(pl.col("metric") == summary["metric"])
    toward = "clean" if summary["direction"] == "denoise" else "corrupt"
    sections = [
        Section(
            "What was done",
            checked_figures(summary, provenance),
            "Recovery is 0 where a patch changes nothing and 1 where it gives the other run's "
            "number.",
        )
    ]
    sections += [
        _sweep(kind, cells.filter(pl.col("kind") == kind), summary, toward)
        for kind in cells["kind"].unique(maintain_order=True)
    ]
    sections.append(_ranking(summary))
    sections.append(pair_section(outcome.tables["pairs"], summary))
    return write_page(
        path,
        title="Activation patching",
        kicker=str(provenance["model_name"]),
        verdict=_verdict(summary, toward),
        sections=sections,
        provenance=provenance,
    )


def _verdict(summary: dict[str, Any], toward: str) -> str:
    best = summary["top"][0]
    share = best["mean_recovery"]
    if share is None:
        return "No recovery exists: both runs give the same number in every pair."
    return (
        f"Patching {_name(best)} moves {summary['metric']} by {share:.0%} of the way to the "
        f"{toward} run, on average over {_count(best['pairs'], 'pair')}."
    )


def checked_figures(
    summary: dict[str, Any], provenance: dict[str, Any], what: str = "cells"
) -> list[Part]:
    """Return what was used, left out, saved and computed twice, with all cautions.

    Args:
        what: the cells of this run are called.
    """
    pairs, cost, checked = summary["pairs"], summary["cost"], summary["verified"]
    plan = provenance.get("plan", {})
    error = checked.get("worst_error")
    share, of = "nothing", "beyond the plain runs"
    if cost["block_tokens"]:
        share = f"1/{cost['naive_block_tokens'] / cost['block_tokens']:.1f}"
        of = "of one full pass each"
    figures: list[tuple[str, Any, str]] = [
        ("pairs used", pairs["used"], f"of {pairs['given']}"),
        ("not answered", pairs["not_answered"], "clean prompts"),
        ("refused", pairs["refused"], "see the list of pairs"),
        (what, cost["cells"], f"{cost['idle']} of them cannot have an effect"),
        ("computed", share, of),
        (
            "worst error",
            "not checked" if error is None else f"{error:.1e}",
            f"{checked['cells']} {what} computed again by full passes",
        ),
    ]
    parts: list[Part] = [Figures(figures)]
    if plan.get("text"):
        parts.append(Text([f"Plan: {plan['text']}."]))
    if summary["cautions"]:
        parts.append(Text([f"Caution: {caution}." for caution in summary["cautions"]]))
    if summary["zero_denominator"]:
        names = ", ".join(summary["zero_denominator"])
        line = "Both runs give the same number, so that nothing can be recovered, in: "
        parts.append(Text([f"{line}{names}."]))
    return parts


def _sweep(kind: str, cells: pl.DataFrame, summary: dict[str, Any], toward: str) -> Section:
    means = grouped(cells)
    by_unit = means["unit"].null_count() < means.height
    n_units = means["unit"].n_unique()
    parts: list[Part] = []
    if by_unit and n_units > _MANY_UNITS:
        best = means.sort("mean_recovery", descending=True, nulls_last=True).head(50)
        parts.append(_table(best, "The 50 units that recover most."))
    elif by_unit:
        for place in means["place"].unique(maintain_order=True):
            part = means.filter(pl.col("place") == place)
            parts.append(_map(part, "unit", f"{kind}, {place} position, mean over pairs"))
    else:
        lengths = cells.group_by("pair").agg(pl.col("place").n_unique().alias("n"))["n"]
        if lengths.n_unique() == 1:
            parts.append(_map(means, "place", f"{kind}, mean over pairs"))
        shown = cells["pair"].unique(maintain_order=True).to_list()[:SHOWN_PAIRS]
        maps = [
            _map(grouped(cells.filter(pl.col("pair") == pair)), "place", pair) for pair in shown
        ]
        if len(maps) > 1 or not parts:
            parts.append(Multiples(maps))
    lead = f"Share of the way to the {toward} run's {summary['metric']} that each patch covers."
    return Section(f"Sweep: {kind}", parts, lead)


def _map(cells: pl.DataFrame, across: str, caption: str) -> HeatMap:
    layers = sorted(cells["layer"].unique().to_list(), reverse=True)
    columns = cells[across].unique(maintain_order=True).to_list()
    found = {(row["layer"], row[across]): row for row in cells.to_dicts()}
    tokens = {row[across]: row["token"] for row in cells.to_dicts()}
    names = [
        f"{column} {tokens[column]}" if across == "place" and tokens[column] else str(column)
        for column in columns
    ]
    values: list[list[float | None]] = []
    hover: list[list[str]] = []
    for layer in layers:
        rows = [found.get((layer, column)) for column in columns]
        values.append([None if row is None else row["mean_recovery"] for row in rows])
        hover.append(
            [
                ""
                if row is None
                else f"{_name(row)}: value {row['mean_value']:.4g}, {_count(row['pairs'], 'pair')}"
                for row in rows
            ]
        )
    return HeatMap(
        values,
        [str(layer) for layer in layers],
        names,
        caption,
        unit="recovery",
        diverging=True,
        hover=hover,
        row_title="layer",
        column_title="head" if across == "unit" else "position",
    )


def _ranking(summary: dict[str, Any]) -> Section:
    table = pl.DataFrame(summary["top"], infer_schema_length=None)
    parts: list[Part] = [_table(table, "Most recovered first.")]
    lead = (
        "All kinds of sites together, mean over pairs. Control: the same patch with another "
        "pair's values. About half is to be expected, since the patched run's own answer is gone; "
        "where it recovers as much, the patch says nothing of this pair."
    )
    return Section("Ranking", parts, lead)


def _table(rows: pl.DataFrame, caption: str) -> Table:
    return Table(
        ("what", "place", "token", "mean recovery", "control", "deviation", "mean value", "pairs"),
        [
            (
                _unit_name(row),
                row["place"],
                row["token"] or "",
                row["mean_recovery"],
                row.get("control"),
                row["std_recovery"],
                row["mean_value"],
                row["pairs"],
            )
            for row in rows.to_dicts()
        ],
        caption,
    )


def pair_section(pairs: pl.DataFrame, summary: dict[str, Any]) -> Section:
    """Return the list of pairs, with the reasons of those that were left out."""
    columns = ("pair", "clean", "corrupt", "answers", "foils", "answer_rank", "used", "reason")
    rows = [
        tuple("" if row[name] is None else row[name] for name in columns)
        for row in pairs.to_dicts()
    ]
    left_out = len(summary["pairs"]["left_out"])
    return Section(
        "Pairs",
        [Table(columns, rows, "Every pair that was given.", folded=len(rows) > 20)],
        f"{left_out} of {len(rows)} were left out; the reason is in the last column.",
    )


def _unit_name(row: dict[str, Any]) -> str:
    return row["site"] if row["unit"] is None else f"{row['site']}[{row['unit']}]"


def _name(row: dict[str, Any]) -> str:
    token = f" ({row['token'].strip()})" if row["token"] else ""
    return f"{_unit_name(row)} at {row['place']}{token}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
