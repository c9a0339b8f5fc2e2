"""The page of a causal trace: where a clean state brings the answer back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.patching.trace import ROLES
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

SHOWN_FACTS = 6
NAMES = {
    "state": "single block states",
    "mlp": "windows of MLP outputs",
    "attn": "windows of attention outputs",
}


def write_tracing(outcome: Outcome, path: Path) -> Path:
    """Write the page of a tracing run and return its path."""
    summary, cells = outcome.summary, outcome.tables["cells"]
    sections = [_overview(summary, outcome.provenance)]
    sections += [
        _grids(restore, cells.filter(pl.col("restore") == restore), summary)
        for restore in cells["restore"].unique(maintain_order=True)
    ]
    sections.append(_facts(outcome.tables["facts"]))
    return write_page(
        path,
        title="Causal tracing",
        kicker=str(outcome.provenance["model_name"]),
        verdict=_verdict(summary),
        sections=sections,
        provenance=outcome.provenance,
    )


def _verdict(summary: dict[str, Any]) -> str:
    best = summary["top"][0]
    return (
        f"Noise on the subject costs {summary['total_effect']:.3g} of {summary['metric']}; most of "
        f"it comes back from {NAMES[best['restore']]} at the {best['role']}, layer "
        f"{best['layer']}: {best['indirect']:.3g}."
    )


def _overview(summary: dict[str, Any], provenance: dict[str, Any]) -> Section:
    facts, cost = summary["facts"], summary["cost"]
    saved = cost["naive_block_tokens"] / max(cost["block_tokens"], 1)
    parts: list[Part] = [
        Figures(
            [
                ("facts used", facts["used"], f"of {facts['given']}"),
                ("total effect", summary["total_effect"], f"{summary['metric']}, clean less noisy"),
                ("noise", summary["noise"], "standard deviation on the subject's embeddings"),
                ("computed", f"1/{saved:.1f}", "of one full pass per cell"),
            ]
        )
    ]
    text = provenance.get("plan", {}).get("text")
    if text:
        parts.append(Text([f"Plan: {text}."]))
    if summary["unmoved"]:
        parts.append(Text(["The noise changes nothing in: " + ", ".join(summary["unmoved"]) + "."]))
    return Section("What was done", parts)


def _grids(restore: str, cells: pl.DataFrame, summary: dict[str, Any]) -> Section:
    means = cells.group_by(["role", "layer"]).agg(
        pl.col("indirect").mean(), pl.col("fact").n_unique().alias("facts")
    )
    roles = [role for role in ROLES if role in set(means["role"].to_list())]
    parts: list[Part] = [_map(means, "role", roles, roles, f"{NAMES[restore]}, mean over facts")]
    small: list[HeatMap] = []
    for fact in cells["fact"].unique(maintain_order=True).to_list()[:SHOWN_FACTS]:
        own = cells.filter(pl.col("fact") == fact)
        positions = own["position"].unique(maintain_order=True).to_list()
        names = {row["position"]: f"{row['position']} {row['token']}" for row in own.to_dicts()}
        small.append(_map(own, "position", positions, [names[at] for at in positions], fact))
    parts.append(Multiples(small))
    lead = f"Indirect effect: what a restoration adds to the noisy run's {summary['metric']}."
    return Section(NAMES[restore][0].upper() + NAMES[restore][1:], parts, lead)


def _map(cells: pl.DataFrame, key: str, rows: list[Any], names: list[str], caption: str) -> HeatMap:
    layers = sorted(cells["layer"].unique().to_list())
    found = {(row[key], row["layer"]): row["indirect"] for row in cells.to_dicts()}
    values = [[found.get((row, layer)) for layer in layers] for row in rows]
    hover = [
        [
            "" if value is None else f"{name}, layer {layer}: {value:.4g}"
            for layer, value in zip(layers, line, strict=True)
        ]
        for name, line in zip(names, values, strict=True)
    ]
    return HeatMap(
        values,
        names,
        [str(layer) for layer in layers],
        caption,
        unit="indirect effect",
        diverging=True,
        hover=hover,
        column_title="layer",
    )


def _facts(facts: pl.DataFrame) -> Section:
    columns = ("key", "prompt", "subject", "answer", "used", "reason")
    rows = [tuple(row[name] for name in columns) for row in facts.to_dicts()]
    return Section("Facts", [Table(columns, rows, "Every fact given.", folded=len(rows) > 20)])
