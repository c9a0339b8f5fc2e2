"""The page of a back-patching run: grids of what is set right and spoilt, and both controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.ablation import prompt_section
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

_SHOWN = 20
_MEASURES = {
    "corrected": "share of wrong prompts set right",
    "kept": "share of right prompts kept right",
    "mean_change": "mean change",
}


def write_back_patching(outcome: Outcome, path: Path) -> Path:
    """Write the page of a back-patching run and return its path."""
    summary, provenance, grid = outcome.summary, outcome.provenance, outcome.tables["grid"]
    places = grid["place"].unique(maintain_order=True).to_list()[:_SHOWN]
    sections = [
        _overview(summary, provenance),
        _best(summary),
        *(_grid(grid.filter(place=place), place, summary["metric"]) for place in places),
        _texts(outcome.tables["texts"], summary),
        prompt_section(outcome.tables["prompts"]),
    ]
    return write_page(
        path,
        title="Back-patching",
        kicker=str(provenance["model_name"]),
        verdict=_verdict(summary),
        sections=sections,
        provenance=provenance,
    )


def _verdict(summary: dict[str, Any]) -> str:
    best, prompts = summary["best"], summary["prompts"]
    if not prompts["wrong"]:
        return "The model answers every prompt, so nothing can be set right."
    real = best["back-patch"]["corrected"] or 0
    if not real:
        return f"No cell sets any of {prompts['wrong']} wrong answers right."
    beside = [
        f"{which} {row['corrected']:.0%}"
        for which, row in best.items()
        if isinstance(row, dict) and which != "back-patch" and row["corrected"] is not None
    ]
    others = f" ({', '.join(beside)})" if beside else ""
    return (
        f"The best cell, block {best['source']} read at block {best['target']}, sets {real:.0%} of "
        f"{prompts['wrong']} wrong answers right{others}."
    )


def _overview(summary: dict[str, Any], provenance: dict[str, Any]) -> Section:
    prompts, checked, texts = summary["prompts"], summary["verified"], summary["texts"]
    error = checked.get("worst_error")
    figures: list[tuple[str, Any, str]] = [
        ("prompts", prompts["used"], f"of {prompts['given']}"),
        ("answered", prompts["right"], "the answer's first token is the likeliest"),
        ("whole answers", texts["plain_exact"], "written by the untouched model"),
        ("with the best cell", texts["patched_exact"], f"{texts['spoilt']} spoilt"),
        (
            "worst error",
            "not checked" if error is None else f"{error:.1e}",
            f"{checked['cells']} patches computed again by full passes",
        ),
    ]
    parts: list[Part] = [Figures(figures), Text([f"Plan: {provenance['plan']['text']}."])]
    if summary["cautions"]:
        parts.append(Text([f"Caution: {caution}." for caution in summary["cautions"]]))
    lead = "What a later block reads is put where an earlier one reads, at the same position."
    return Section("What was done", parts, lead)


def _best(summary: dict[str, Any]) -> Section:
    best, held = summary["best"], summary["held_out"]
    rows: list[tuple[Any, ...]] = []
    for which, any_share in summary["any_cell"].items():
        row = best.get(which) or {"corrected": None, "kept": None, "mean_change": None}
        tried = None if held is None else held.get(which)
        rows.append((which, row["corrected"], row["kept"], row["mean_change"], tried, any_share))
    columns = (
        "what", "wrong set right", "right kept", f"change of {summary['metric']}",
        "on held-out prompts", "by some cell",
    )  # fmt: skip
    caption = f"Block {best['source']} read at block {best['target']}, {best['place']}."
    parts: list[Part] = [Table(columns, rows, caption)]
    if held is not None:
        parts.append(
            Text(
                [
                    f"Held out: chosen on half of the wrong prompts, block {held['source']} read "
                    f"at block {held['target']} was tried on the other {held['prompts']}."
                ]
            )
        )
    lead = (
        "Random position: what the same source reads elsewhere in the prompt. Random layer: what "
        "another block reads at the same place. By some cell: shares of prompts that at least one "
        "cell sets right; with many cells some do by chance: compare it with random positions."
    )
    return Section("Best cell, and chance", parts, lead)


def _grid(grid: pl.DataFrame, place: str, metric: str) -> Section:
    real = grid.filter(which="back-patch")
    maps: list[HeatMap] = []
    for name, caption in _MEASURES.items():
        if real[name].null_count() == real.height:
            continue
        unit = metric if name == "mean_change" else ""
        maps.append(_map(real, name, f"{caption}{f' of {metric}' if unit else ''}", unit))
    parts: list[Part] = [Multiples(maps)]
    name = "corrected" if real["corrected"].null_count() < real.height else "mean_change"
    controls = [
        _map(grid.filter(which=which), name, f"{which}: {_MEASURES[name]}", "")
        for which in ("random position", "random layer")
        if grid.filter(which=which).height
    ]
    if controls:
        parts.append(Multiples(controls))
    return Section(f"At {place}", parts, "Rows: the block that is read from; columns: read into.")


def _map(grid: pl.DataFrame, name: str, caption: str, unit: str) -> HeatMap:
    sources = sorted(grid["source"].unique().to_list(), reverse=True)
    targets = sorted(grid["target"].unique().to_list())
    found = {(row["source"], row["target"]): row for row in grid.to_dicts()}
    cells = [[found.get((source, target)) for target in targets] for source in sources]
    return HeatMap(
        [[None if cell is None else cell[name] for cell in line] for line in cells],
        [str(source) for source in sources],
        [str(target) for target in targets],
        caption,
        unit=unit,
        diverging=name == "mean_change",
        row_title="source",
        column_title="target",
    )


def _texts(texts: pl.DataFrame, summary: dict[str, Any]) -> Section:
    columns = ("prompt", "plain", "whole answer", "patched", "whole answer ")
    rows = [tuple("" if value is None else value for value in row) for row in texts.rows()]
    best = summary["best"]
    lead = f"Block {best['source']} read at block {best['target']}, {best['place']}."
    part = Table(columns, rows, "Likeliest continuations.", folded=len(rows) > _SHOWN)
    return Section("What the model writes", [part], lead)
