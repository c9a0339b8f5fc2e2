"""The page of a function-vector run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    HeatMap,
    Lines,
    Reasons,
    Section,
    Table,
    write_page,
)

SHOWN_HEADS = 12


def write_function_vectors(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run; raises OutputError when it cannot be written."""
    summary = outcome.summary
    return write_page(
        path,
        title=f"Function vector: {summary['task']}",
        kicker=str(outcome.provenance["model_name"]),
        verdict=_verdict(summary),
        sections=[_headline(summary), _heads(outcome), _layers(outcome), _queries(outcome)],
        provenance=outcome.provenance,
    )


def _verdict(summary: Mapping[str, Any]) -> str:
    zero, chosen = summary["test_top1"]["zero_shot"], summary["chosen"]
    count = len(chosen["heads"])
    heads = "head" if count == 1 else "heads"
    transfer = summary["transfer"]
    beside = "" if zero["random_mean"] is None else f"; random heads: {zero['random_mean']:.0%}"
    return (
        f"Without examples {zero['none']:.0%} of {summary['test_queries']} test queries are "
        f"answered, with the vector of {count} {heads} after block {chosen['layer']} "
        f"{zero['vector']:.0%}{beside}. Transfer {transfer['verdict']}: {transfer['reason']}."
    )


def _headline(summary: Mapping[str, Any]) -> Section:
    test = summary["test_top1"]
    columns = ("prompt", "no vector", "vector", "random heads", "heads in place", "random in place")
    keys = ("none", "vector", "random_mean", "in_place", "in_place_random_mean")
    rows = [
        [name, *(test[setting].get(key) for key in keys)]
        for name, setting in (
            ("query alone", "zero_shot"),
            ("shuffled examples", "shuffled"),
            ("examples", "clean"),
        )
    ]
    rows += [
        [row["text"], row["none"], row["vector"], row["random_mean"], None, None]
        for row in summary["texts"]
    ]
    notes = [
        {"severity": "warn", "message": message, "action": ""} for message in summary["warnings"]
    ]
    return Section(
        "What the vector does",
        [
            Table(columns, rows, "Top-1 accuracy on the test queries"),
            *([Reasons(notes)] if notes else []),
        ],
        "Size and layer were chosen on other queries. In place: every head gives its mean at its "
        "own layer.",
    )


def _heads(outcome: Outcome) -> Section:
    heads = outcome.tables["heads"]
    layers = heads["layer"].unique(maintain_order=True).to_list()
    count = int(heads["head"].max()) + 1  # type: ignore[arg-type]
    grid: list[list[float | None]] = []
    hover: list[list[str]] = []
    cells = {(row["layer"], row["head"]): row for row in heads.iter_rows(named=True)}
    for layer in layers:
        line = [cells.get((layer, head)) for head in range(count)]
        grid.append([None if cell is None else cell["aie"] for cell in line])
        hover.append(
            [
                ""
                if cell is None
                else f"{cell['low']:.4f} to {cell['high']:.4f}; control {cell['control']:.4f}"
                for cell in line
            ]
        )
    best = heads.sort("rank").head(SHOWN_HEADS)
    names = [f"{row['layer']}.{row['head']}" for row in best.iter_rows(named=True)]
    shown = "prompts without examples"
    if outcome.summary["corruption"] == "shuffled":
        shown = "prompts whose examples were shuffled"
    return Section(
        "Which heads carry the task",
        [
            HeatMap(
                grid,
                [str(layer) for layer in layers],
                [str(head) for head in range(count)],
                "Average indirect effect by layer (rows) and head (columns)",
                unit="probability",
                diverging=True,
                hover=hover,
                row_title="layer",
                column_title="head",
            ),
            Bars(
                names,
                best["aie"].to_list(),
                f"The {len(names)} largest, with 95% intervals over prompts",
                unit="probability",
                errors=list(zip(best["low"].to_list(), best["high"].to_list(), strict=True)),
            ),
            Table(
                ("layer", "head", "effect", "low", "high", "control"),
                heads.sort("rank").select("layer", "head", "aie", "low", "high", "control").rows(),
                "All heads; control: the mean over shuffled prompts in place of the head",
                folded=True,
            ),
        ],
        f"How much more likely the answer becomes in {shown} when the head gives its mean output "
        "over prompts with examples.",
    )


def _layers(outcome: Outcome) -> Section:
    test = outcome.tables["sweep"].filter(part="test", setting="zero_shot")
    size = len(outcome.summary["chosen"]["heads"])
    series: dict[str, list[tuple[float, float | None]]] = {}
    for kind, name in (("vector", "vector"), ("random", "random heads, mean")):
        of = (
            test.filter(kind=kind, heads=size)
            .group_by("layer", maintain_order=True)
            .agg(pl.col("top1").mean())
            .sort("layer")
        )
        if len(of):
            series[name] = list(of.select("layer", "top1").rows())
    none = test.filter(kind="none")["top1"].item()
    last = max(x for x, _ in next(iter(series.values())))
    series["no vector"] = [(0.0, none), (float(last), none)]
    sizes = test.filter(kind="vector").pivot("layer", index="heads", values="top1").sort("heads")
    columns = [name for name in sizes.columns if name != "heads"]
    return Section(
        "Where it is added",
        [
            Lines(series, "block", "top-1 accuracy", f"Vector of {size} heads, query alone"),
            HeatMap(
                sizes.select(columns).rows(),
                [str(count) for count in sizes["heads"].to_list()],
                columns,
                "Top-1 accuracy by number of heads (rows) and block (columns)",
                row_title="heads",
                column_title="block",
            ),
        ],
    )


def _queries(outcome: Outcome) -> Section:
    chosen = outcome.summary["chosen"]
    of = outcome.tables["queries"].filter(part="test", setting="zero_shot")
    without = of.filter(kind="none").select("query", "answer", "predicted")
    vector = of.filter(kind="vector", heads=len(chosen["heads"]), layer=chosen["layer"])
    rows = [
        (*before, after, chance)
        for before, after, chance in zip(
            without.rows(),
            vector["predicted"].to_list(),
            vector["probability"].to_list(),
            strict=True,
        )
    ]
    columns = ("query", "answer", "without", "with the vector", "P(answer)")
    return Section("What was answered", [Table(columns, rows, "Test queries, asked alone")])
