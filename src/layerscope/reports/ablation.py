"""The page of an ablation run: maps of what answers lose, a ranking beside random changes, sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.ablation.summary import grouped
from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Part,
    Section,
    Table,
    Text,
    write_page,
)

_MANY_UNITS = 64


def write_ablation(outcome: Outcome, path: Path) -> Path:
    """Write the page of an ablation run and return its path."""
    summary, provenance = outcome.summary, outcome.provenance
    cells = outcome.tables["cells"].filter(pl.col("metric") == summary["metric"])
    sections = [_overview(summary, provenance), _ranking(summary)]
    if summary["sets"]:
        sections.append(_sets(summary))
    for (kind, how), part in cells.group_by(["kind", "how"], maintain_order=True):
        sections.append(_sweep(str(kind), str(how), part, summary["metric"]))
    sections.append(prompt_section(outcome.tables["prompts"]))
    return write_page(
        path,
        title="Ablation",
        kicker=str(provenance["model_name"]),
        verdict=_verdict(summary),
        sections=sections,
        provenance=provenance,
    )


def _verdict(summary: dict[str, Any]) -> str:
    best = next((row for row in summary["top"] if row["mean_effect"] is not None), None)
    if best is None:
        return "No prompt could be measured."
    beside = ""
    if best["control_size"] is not None:
        beside = f"; a random change of the same size moves it by {best['control_size']:.2g}"
    return (
        f"Without {_name(best)} ({best['how']}), {summary['metric']} changes by "
        f"{best['mean_effect']:.3g} on average, from {summary['base']:.3g}{beside}."
    )


def _overview(summary: dict[str, Any], provenance: dict[str, Any]) -> Section:
    prompts, cost, checked = summary["prompts"], summary["cost"], summary["verified"]
    error = checked.get("worst_error")
    figures: list[tuple[str, Any, str]] = [
        ("prompts used", prompts["used"], f"of {prompts['given']}"),
        ("not answered", prompts["not_answered"], "by the untouched model"),
        ("ablations", cost["cells"], f"values from {provenance['reference_prompts']} prompts"),
        (summary["metric"], summary["base"], "without ablation, mean over prompts"),
        (
            "worst error",
            "not checked" if error is None else f"{error:.1e}",
            f"{checked['cells']} ablations computed again by full passes",
        ),
    ]
    parts: list[Part] = [Figures(figures)]
    parts.append(Text([f"Plan: {provenance['plan']['text']}."]))
    if summary["cautions"]:
        parts.append(Text([f"Caution: {caution}." for caution in summary["cautions"]]))
    lead = "An effect is the metric with the ablation less that without it. A BOS is not touched."
    return Section("What was done", parts, lead)


def _ranking(summary: dict[str, Any]) -> Section:
    columns = ("what", "at", "how", "mean effect", "deviation", "size", "random change", "prompts")
    rows = [
        (
            _name(row, place=False),
            _at(row),
            row["how"],
            row["mean_effect"],
            row["std_effect"],
            row["size"],
            row["control_size"],
            row["prompts"],
        )
        for row in summary["top"]
    ]
    lead = (
        "Size is the mean absolute effect, and stands beside that of random changes: the own "
        "value, moved as far in a random direction. Where these are alike, the disturbance counts, "
        "not what was taken away."
    )
    return Section("Strongest", [Table(columns, rows, "Largest mean effect first.")], lead)


def _sets(summary: dict[str, Any]) -> Section:
    columns = (
        "kind", "how", "together", "effect", "members' own, added", "random sets", "largest random",
    )  # fmt: skip
    rows = [
        (
            row["kind"],
            row["how"],
            row["size"],
            row["effect"],
            row["sum_of_members"],
            row["random"],
            row["largest_random"],
        )
        for row in summary["sets"]
    ]
    parts: list[Part] = [Table(columns, rows, "The strongest ablated together.")]
    names = [f"{row['kind']}, {row['how']}, {row['size']}" for row in summary["sets"]]
    labels = [f"{name}: {which}" for name in names for which in ("top", "random")]
    values = [row[key] for row in summary["sets"] for key in ("effect", "random")]
    parts.append(Bars(labels, values, "Top sets beside random ones.", unit=summary["metric"]))
    lead = "More than the members' own effects added means that they stand in for one another."
    return Section("Together", parts, lead)


def _sweep(kind: str, how: str, cells: pl.DataFrame, metric: str) -> Section:
    means = grouped(cells)
    by_unit = means["unit"].null_count() < means.height
    parts: list[Part] = []
    if by_unit and means["unit"].n_unique() > _MANY_UNITS:
        best = means.sort(
            pl.col("mean_effect").abs(), descending=True, nulls_last=True, maintain_order=True
        ).head(50)
        rows = [(_name(row), row["mean_effect"], row["prompts"]) for row in best.to_dicts()]
        parts.append(Table(("what", "mean effect", "prompts"), rows, "The 50 largest."))
    elif by_unit:
        for place in means["place"].unique(maintain_order=True):
            part = means.filter(pl.col("place") == place)
            parts.append(_map(part, "unit", f"{kind}, {how}, {place} positions", metric))
    else:
        parts.append(_map(means, "place", f"{kind}, {how}", metric))
    return Section(f"Sweep: {kind}, {how}", parts, f"Mean effect on {metric} over prompts.")


def _map(means: pl.DataFrame, across: str, caption: str, metric: str) -> HeatMap:
    layers = sorted(means["layer"].unique().to_list(), reverse=True)
    columns = means[across].unique(maintain_order=True).to_list()
    found = {(row["layer"], row[across]): row for row in means.to_dicts()}
    cells = [[found.get((layer, column)) for column in columns] for layer in layers]
    return HeatMap(
        [[None if cell is None else cell["mean_effect"] for cell in line] for line in cells],
        [str(layer) for layer in layers],
        [str(column) for column in columns],
        caption,
        unit=metric,
        diverging=True,
        hover=[
            [
                ""
                if cell is None
                else f"{_name(cell)}: value {cell['mean_value']:.4g}, {cell['prompts']} prompts"
                for cell in line
            ]
            for line in cells
        ],
        row_title="layer",
        column_title="head" if across == "unit" else "position",
    )


def prompt_section(prompts: pl.DataFrame) -> Section:
    """Return the list of prompts, with the reasons of those that were left out."""
    columns = ("prompt", "text", "answers", "foils", "answer_rank", "used", "reason")
    rows = [
        tuple("" if row[name] is None else row[name] for name in columns)
        for row in prompts.to_dicts()
    ]
    left_out = prompts.height - int(prompts["used"].sum())
    return Section(
        "Prompts",
        [Table(columns, rows, "Every prompt that was given.", folded=len(rows) > 20)],
        f"{left_out} of {len(rows)} were left out; the reason is in the last column.",
    )


def _at(row: dict[str, Any]) -> str:
    if row["place"] == "all":
        return "all positions"
    return f"{row['place']} {row['token'] or ''}".strip()


def _name(row: dict[str, Any], *, place: bool = True) -> str:
    name = row["site"] if row["unit"] is None else f"{row['site']}[{row['unit']}]"
    return f"{name} at {_at(row)}" if place else name
