"""The page of a mediation run: every mediator's effects with their intervals."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import Bars, Figures, HeatMap, Part, Section, Table, Text, write_page

_SHOWN = 25


def write_mediation(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run and return its path."""
    summary, table = outcome.summary, outcome.tables["mediation"]
    sections = [
        Section("Effects", _effects(outcome), "Mean over pairs, with 95% intervals over pairs."),
        Section("Every mediator", [_table(table)], "A click on a column's head sorts by it."),
        Section("Pairs", [_pairs(outcome.tables["pairs"])]),
    ]
    grid = _grid(table)
    if grid is not None:
        sections.insert(1, Section("By place", [grid]))
    if summary["warnings"]:
        sections.insert(0, Section("Take care", [Text(summary["warnings"])]))
    best = summary["top"][0] if summary["top"] else None
    verdict = f"Total effect {summary['total_effect']:.3g}."
    if best is not None and best["recovery"] is not None:
        verdict += f" {best['recovery']:.0%} of it goes through {best['mediator']}."
    return write_page(
        path,
        title=f"Mediation in {outcome.provenance['model'].get('name', '')}",
        kicker=f"{summary['method']}, {summary['metric']}, {summary['direction']}",
        verdict=verdict,
        sections=sections,
        provenance=outcome.provenance,
    )


def _effects(outcome: Outcome) -> list[Part]:
    summary, table = outcome.summary, outcome.tables["mediation"]
    strongest = table.sort(pl.col("indirect").abs(), descending=True, maintain_order=True)
    strongest = strongest.head(_SHOWN)
    parts: list[Part] = [
        Figures(
            [
                ("pairs", summary["pairs"]["used"], f"of {summary['pairs']['given']}"),
                ("before", summary["base_metric"], summary["metric"]),
                ("after", summary["donor_metric"], summary["metric"]),
                ("total effect", summary["total_effect"], ""),
            ]
        )
    ]
    for kind, words in (("indirect", "through the mediator"), ("direct", "past the mediator")):
        ends = zip(strongest[f"{kind}_low"], strongest[f"{kind}_high"], strict=True)
        parts.append(
            Bars(
                strongest["mediator"].to_list(),
                strongest[kind].to_list(),
                f"{kind} effect: {words}",
                errors=[None if low is None else (low, high) for low, high in ends],
            )
        )
    return parts


def _grid(table: pl.DataFrame) -> HeatMap | None:
    """Return layers by positions (or by units), where mediators form such a grid."""
    rows = table.filter(pl.col("layer").is_not_null())
    across = "position" if rows["position"].n_unique() > 1 else "unit"
    if rows["kind"].n_unique() != 1 or rows[across].n_unique() < 2:
        return None
    if across == "position" and rows["unit"].n_unique() > 1:
        return None
    layers, columns = sorted(rows["layer"].unique()), sorted(rows[across].unique())
    values = {
        (layer, column): value
        for layer, column, value in rows.select("layer", across, "indirect").iter_rows()
    }
    return HeatMap(
        [[values.get((layer, column)) for column in columns] for layer in layers],
        rows=[str(layer) for layer in layers],
        columns=[str(column) for column in columns],
        caption=f"Indirect effect by layer and {across}",
        diverging=True,
        row_title="layer",
        column_title=across,
    )


def _table(table: pl.DataFrame) -> Table:
    columns = [
        "mediator",
        "indirect",
        "indirect_low",
        "indirect_high",
        "direct",
        "interaction",
        "recovery",
        "recovery_low",
        "recovery_high",
    ]
    rows = table.select(columns).rows()
    return Table([name.replace("_", " ") for name in columns], rows, "All mediators")


def _pairs(table: pl.DataFrame) -> Table:
    columns = ["pair", "clean", "corrupt", "answers", "foils", "used", "reason"]
    return Table(columns, table.select(columns).rows(), "Pairs", folded=table.height > 12)
