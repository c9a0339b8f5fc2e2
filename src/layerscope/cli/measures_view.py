"""The milestones and checks of a summary as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_milestones(
    summary: Mapping[str, Any], overview: Sequence[tuple[str, str]], out: Console
) -> None:
    """Print the baseline's milestones (first, stable, lost) and the checks of the run."""
    base: dict[str, Any] = summary["passes"][summary["baseline"]]
    # Keys are the user's text, never markup.
    title = Text(f"Milestones of {_fact(base)}")
    table = Table(title=title, title_justify="left", show_edge=False)
    for header in ("milestone", "meaning"):
        table.add_column(header)
    for header in ("first", "stable", "lost at", "depth"):
        table.add_column(header, justify="right")
    for name, meaning in overview:
        found: dict[str, Any] | None = base["milestones"].get(name)
        if found is None:
            continue
        lost = ", ".join(str(layer) for layer in found["lost"][:4])
        more = " …" if len(found["lost"]) > 4 else ""
        cells = (name, meaning, _cell(found["first"]), _cell(found["stable"]), lost + more)
        table.add_row(*(Text(cell) for cell in cells), Text(_cell(found["fraction"])))
    out.print()
    out.print(table)
    out.print()
    checks = Table(title="Checks", title_justify="left", show_edge=False, show_header=False)
    checks.add_column()
    checks.add_column()
    for name, value in _checks(summary, base):
        checks.add_row(Text(name), Text(value))
    out.print(checks)


def _checks(summary: Mapping[str, Any], base: Mapping[str, Any]) -> list[tuple[str, str]]:
    key = _fact(base)
    lines: list[tuple[str, str]] = []
    confirmed = summary["confirmed_semantics"].get(key)
    if confirmed is not None:
        layer, source = confirmed["L_semantic_confirmed"], confirmed["confirmed_source"]
        lines.append(("onset confirmed by a second lens", f"layer {_cell(layer)} ({source})"))
    full = summary["raw_lens_full"].get(key)
    if full is not None:
        score = full["score"]
        text = f"{score['lens_artifact_score']:.3f} ({score['tier']}), largest KL "
        lines.append(("raw against norm: artefact score", text + _bits(full, "max_kl_norm_vs_raw")))
    lines += [
        ("last layer against the model", _bits(entry, "kl_to_final"))
        for entry in summary["last_layer_consistency"]
        if entry["prompt_index"] == base["prompt_index"]
    ]
    control = summary["control_summary"]
    if control is not None:
        stays = _cell(control["control_margin_stable"])
        text = (
            f"positive from layer {_cell(control['first_control_margin_pos'])}, stays from {stays}"
        )
        lines.append(("control: right answer ahead", text))
    ablation = summary["ablation_summary"].get(key)
    if ablation is not None:
        delta = ablation["delta_L_sem"]
        text = "unknown" if delta is None else f"{delta:+d} layers"
        lines.append(("onset without the filler word", text))
    aggregates = summary["micro_suite"]["aggregates"]
    low, high = aggregates["L_semantic_norm_iqr"]
    middle = _cell(aggregates["L_semantic_norm_median"])
    text = f"median {middle} (IQR {_cell(low)} to {_cell(high)}), {aggregates['n_missing']} missing"
    lines.append((f"onset over {aggregates['n']} facts", text))
    return lines


def _fact(base: Mapping[str, Any]) -> str:
    return base["fact_key"] or f"prompt {base['prompt_index']}"


def _bits(entry: Mapping[str, Any], stem: str) -> str:
    value: float | None = entry[f"{stem}_bits"]
    return "unknown" if value is None else f"{value:.3g} bits"


def _cell(value: float | int | None) -> str:
    return "–" if value is None else str(value)
