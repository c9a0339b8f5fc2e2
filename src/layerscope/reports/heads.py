"""The page of a heads run: a map of every score, and what the ablation showed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Multiples,
    Part,
    Section,
    Table,
    Text,
    write_page,
)

_WORDS = {
    "induction": "induction: weight on the token after the earlier occurrence",
    "previous_token": "previous token: weight on the token before",
    "duplicate_token": "duplicate token: weight on the earlier occurrence itself",
    "first_token": "first token: weight on the first position",
    "present_token": "present token: weight on its own position",
    "copying": "copying: eigenvalues of the value-output circuit, -1 to 1",
    "own_token_first": "own token first: share of tokens whose own logit is raised most",
    "direct": "direct: what the head itself adds to the logit of the token to copy",
    "drop_alone": "drop alone: fall of copying without this head, nats per token",
}


def write_heads(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run and return its path."""
    summary, table = outcome.summary, outcome.tables["heads"]
    sections = [
        Section("Every head", [_maps(table)], "Layers run downwards, heads across."),
        Section("The strongest", [_ranked(table)], "A click on a column's head sorts by it."),
        _ablation(summary),
    ]
    if summary["agreement"]:
        sections.append(_agreement(summary))
    if summary["warnings"]:
        sections.insert(0, Section("Take care", [Text(summary["warnings"])]))
    model = Path(str(outcome.provenance["model"]["id"])).name
    return write_page(
        path,
        title=f"Attention heads of {model}",
        kicker=f"{summary['sequences']} sequences of {summary['length']} random tokens, twice",
        verdict=_verdict(summary),
        sections=sections,
        provenance=outcome.provenance,
    )


def _verdict(summary: dict[str, Any]) -> str:
    found, ablation = summary["induction_heads"], summary["ablation"]
    if not found:
        return f"No head reaches an induction score of {summary['threshold']:g}."
    names = ", ".join(found)
    if "status" in ablation:
        return f"Induction heads: {names}. No ablation: {ablation['reason']}."
    ratio = ablation["ratio"]
    times = "" if ratio is None else f", {ratio:.1f} times as much as without random heads"
    return (
        f"Induction heads: {names}. Without them copying falls by {ablation['drop']:.2f} nats per "
        f"token{times}."
    )


def _maps(table: pl.DataFrame) -> Multiples:
    n_heads = table["head"].n_unique()
    layers = [str(layer) for layer in table["layer"].unique(maintain_order=True)]
    items = [
        HeatMap(
            [table[kind].slice(index * n_heads, n_heads).to_list() for index in range(len(layers))],
            rows=layers,
            columns=[str(head) for head in range(n_heads)],
            caption=words,
            diverging=kind in ("copying", "direct", "drop_alone"),
            row_title="layer",
            column_title="head",
        )
        for kind, words in _WORDS.items()
        if kind in table.columns and table[kind].null_count() < table.height
    ]
    return Multiples(items)


def _ranked(table: pl.DataFrame) -> Table:
    kinds = [kind for kind in _WORDS if kind in table.columns]
    rows = table.sort("induction", descending=True, nulls_last=True, maintain_order=True).head(40)
    return Table(
        ["head", *(kind.replace("_", " ") for kind in kinds)],
        [
            [f"{row['layer']}.{row['head']}", *(row[kind] for kind in kinds)]
            for row in rows.iter_rows(named=True)
        ],
        "Heads by induction score",
    )


def _agreement(summary: dict[str, Any]) -> Section:
    rows = [
        (
            f"{row['first'].replace('_', ' ')} and {row['second'].replace('_', ' ')}",
            row["spearman"],
            f"{row['shared']} of {row['top']}",
        )
        for row in summary["agreement"]
    ]
    part = Table(("measures", "rank correlation", "shared top heads"), rows, "Over all heads.")
    lead = (
        "Where a head looks (induction), what it writes itself (direct) and what is lost without "
        "it (drop alone) are three measures of one thing. Where they part, a head looks there for "
        "another reason, works through others, or is backed up."
    )
    return Section("Do the measures agree?", [part], lead)


def _ablation(summary: dict[str, Any]) -> Section:
    ablation = summary["ablation"]
    if "status" in ablation:
        return Section("Ablation", [Text([f"Skipped: {ablation['reason']}."])])
    parts: list[Part] = [
        Figures(
            [
                ("accuracy", ablation["accuracy"], "second half, untouched"),
                ("without", ablation["accuracy_without"], f"{ablation['kind']} ablation"),
                ("fall", ablation["drop"], "nats per token"),
                ("ratio", ablation["ratio"], "to the mean of random heads"),
                ("worst case", ablation["worst_ratio"], "to the most harmful random draw"),
            ]
        ),
        Bars(
            ["these heads", *(f"random {n}" for n in range(len(ablation["random_drops"])))],
            [ablation["drop"], *ablation["random_drops"]],
            "Fall of the log-probability of the token to copy",
            "nats",
        ),
    ]
    lead = "All induction heads together, and as many random other heads in each draw."
    return Section("Ablation", parts, lead)
