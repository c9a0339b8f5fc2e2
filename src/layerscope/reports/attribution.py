"""The page of an attribution run: predictions, what verification found, and the circuit."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Figures,
    HeatMap,
    Lines,
    Part,
    Section,
    Table,
    Text,
    Widget,
    write_page,
)

_SHOWN = 40


def write_attribution(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run and return its path."""
    summary = outcome.summary
    sections = [Section("Can it be believed?", _verified(outcome), _lead(summary))]
    sections.append(Section("Nodes", _nodes(outcome.tables["nodes"])))
    if "edges" in outcome.tables:
        sections.append(Section("Circuit", _circuit(outcome), _circuit_lead(summary)))
        sections.append(Section("Edges", [_edges(outcome.tables["edges"])]))
    pairs = outcome.tables["pairs"]
    columns = ["pair", "clean", "corrupt", "answers", "foils", "used", "reason"]
    rows = pairs.select(columns).rows()
    sections.append(Section("Pairs", [Table(columns, rows, "Pairs", folded=len(rows) > 12)]))
    if summary["warnings"]:
        sections.insert(0, Section("Take care", [Text(summary["warnings"])]))
    return write_page(
        path,
        title=f"Attribution in {outcome.provenance['model'].get('name', '')}",
        kicker=f"{summary['method']}, {summary['metric']}, {summary['direction']}",
        verdict=_verdict(outcome),
        sections=sections,
        provenance=outcome.provenance,
    )


def _verdict(outcome: Outcome) -> str:
    summary, verified = outcome.summary, outcome.tables["verified"]
    strongest = verified.sort(pl.col("exact").abs(), descending=True).row(0, named=True)
    words = f"Whole effect {summary['total_effect']:.3g}. Exactly patched, {strongest['node']} "
    words += f"does {strongest['exact']:.3g}"
    words += f" (predicted {strongest['predicted']:.3g})."
    if summary["verification"]["blind"]:
        return f"{words} Gradients are blind here: read the warnings first."
    return words


def _lead(summary: dict[str, Any]) -> str:
    check = summary["verification"]
    words = f"{check['verified']} nodes were patched exactly"
    if check["spearman"] is not None:
        words += f"; rank correlation of sizes {check['spearman']:.2f}"
    if check["missed_bound"] is not None and check["others"]:
        words += (
            f"; with 95% confidence at most {check['missed_bound']:.0%} of the {check['others']} "
            "others are stronger than the weakest of the strongest"
        )
    return words + "."


def _verified(outcome: Outcome) -> list[Part]:
    summary, table = outcome.summary, outcome.tables["verified"]
    ends = [*table["predicted"], *table["exact"]]
    low, high = min(ends), max(ends)
    dots = {
        name: list(table.filter(top=top).select("exact", "predicted").iter_rows())
        for name, top in (("strongest", True), ("random others", False))
    }
    series = {name: points for name, points in dots.items() if points}
    return [
        Figures(
            [
                ("pairs", summary["pairs"]["used"], f"of {summary['pairs']['given']}"),
                ("before", summary["pairs"]["base_metric"], summary["metric"]),
                ("after", summary["pairs"]["donor_metric"], summary["metric"]),
                ("strongest together", summary["verification"]["joint"], "exact"),
            ]
        ),
        Lines(
            {**series, "equal": [(low, low), (high, high)]},
            "exact effect",
            "predicted effect",
            "Prediction against exact patching: a good one lies on the diagonal",
            points=True,
        ),
        Table(
            ["node", "predicted", "exact", "strongest", "seen"],
            table.select("node", "predicted", "exact", "top", "seen").rows(),
            "Verified nodes",
        ),
    ]


def _nodes(table: pl.DataFrame) -> list[Part]:
    parts: list[Part] = []
    for kind in table["kind"].unique(maintain_order=True):
        rows = table.filter(pl.col("kind") == kind)
        across = "position" if rows["position"].null_count() == 0 else "unit"
        flat = across == "position" and rows["unit"].n_unique() > 1
        if flat or rows[across].null_count() or rows[across].n_unique() > 64:
            continue
        layers, columns = sorted(rows["layer"].unique()), sorted(rows[across].unique())
        cells = rows.select("layer", across, "score").iter_rows()
        values = {(layer, column): score for layer, column, score in cells}
        parts.append(
            HeatMap(
                [[values.get((layer, column)) for column in columns] for layer in layers],
                rows=[str(layer) for layer in layers],
                columns=[str(column) for column in columns],
                caption=f"{kind}: predicted effect",
                diverging=True,
                row_title="layer",
                column_title=across,
            )
        )
    strongest = table.sort(pl.col("score").abs(), descending=True, maintain_order=True)
    columns = ["node", "score", "score_sd", "error"]
    rows = strongest.select(columns).head(_SHOWN).rows()
    parts.append(Table(["node", "score", "spread", "error"], rows, f"The strongest {len(rows)}"))
    return parts


def _edges(table: pl.DataFrame) -> Table:
    rows = table.head(200).rows()
    return Table(["writer", "receiver", "score"], rows, "The strongest edges", folded=True)


def _circuit_lead(summary: dict[str, Any]) -> str:
    circuit = summary["circuit"]
    return (
        f"{circuit['n_edges']} of {circuit['n_all']} edges, those on no path from the embedding to "
        "the logits left out. Blue edges lower the metric when they are exchanged, red ones raise "
        "it."
    )


def _circuit(outcome: Outcome) -> list[Part]:
    summary, curves = outcome.summary, outcome.tables["curves"]
    areas, words = summary["areas"], summary["definitions"]
    parts: list[Part] = [_drawing(summary["circuit"])]
    parts.append(
        Figures([(name, areas[name], words[name].partition(";")[2].strip()) for name in areas])
    )
    series = {
        f"ranked by {ranking} score": list(
            curves.filter(ranking=ranking).select("fraction", "faithfulness").iter_rows()
        )
        for ranking in ("signed", "magnitude")
    }
    parts.append(Lines(series, "share of edges kept", "faithfulness", "Circuits of growing size"))
    parts.append(Text([f"{name}: {text}." for name, text in words.items()]))
    return parts


def _drawing(circuit: dict[str, Any]) -> Widget:
    """Return the circuit as an SVG: the embedding at the bottom, the logits at the top."""
    nodes = circuit["nodes"]
    if not nodes:
        return Widget(id="circuit", data=circuit, script="", html="<p>No edge is left.</p>")
    heights = sorted({node["y"] for node in nodes})
    width = max(600, 110 * (1 + max(sum(n["y"] == y for n in nodes) for y in heights)))
    step = 56
    places = {
        node["name"]: (
            width / 2 + node["x"] * 104,
            (len(heights) - heights.index(node["y"])) * step,
        )
        for node in nodes
    }
    most = max((abs(edge["score"]) for edge in circuit["edges"]), default=0.0) or 1.0
    lines: list[str] = []
    for edge in circuit["edges"]:
        for target in edge["to"]:
            (x1, y1), (x2, y2) = places[edge["from"]], places[target]
            colour = "#c0392b" if edge["score"] > 0 else "#2364aa"
            strength = abs(edge["score"]) / most
            title = escape(f"{edge['source']} → {edge['target']}: {edge['score']:.3g}")
            lines.append(
                f'<line x1="{x1:.0f}" y1="{y1 - 12:.0f}" x2="{x2:.0f}" y2="{y2 + 12:.0f}" '
                f'stroke="{colour}" stroke-width="{0.6 + 3.4 * strength:.2f}" '
                f'stroke-opacity="{0.25 + 0.7 * strength:.2f}"><title>{title}</title></line>'
            )
    boxes = [
        f'<g><rect x="{x - 48:.0f}" y="{y - 12:.0f}" width="96" height="24" rx="6" '
        f'fill="#fff" stroke="#889"/><text x="{x:.0f}" y="{y + 4:.0f}" font-size="11" '
        f'text-anchor="middle">{escape(_short(name))}</text></g>'
        for name, (x, y) in places.items()
    ]
    height = (len(heights) + 1) * step
    svg = (
        f'<svg role="img" aria-label="circuit" viewBox="0 0 {width:.0f} {height}" '
        f'style="width:100%;max-width:{width:.0f}px">{"".join(lines)}{"".join(boxes)}</svg>'
    )
    return Widget(id="circuit", data=circuit, script="", html=svg)


def _short(name: str) -> str:
    return name.replace("attn.", "a").replace(".head.", ".").replace("mlp.", "mlp ")
