"""The summary of a layers run for the terminal; tokens are text, never markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.reports.checks import checks_line
from layerscope.reports.curves import marks
from layerscope.reports.glossary import label, lasts
from layerscope.reports.lenses import lens_table
from layerscope.reports.sections import milestone_cell
from layerscope.reports.text import number, visible
from layerscope.reports.verdict import (
    Reason,
    advice,
    baseline_entry,
    baseline_prompt,
    left_out,
    milestones_of,
    primary_lens,
    reading,
    reasons,
    trust,
)

WIDE = 110  # columns from which the wider tables are used
MAX_FACTS = 20
MAX_LAYERS = 21
MAX_LEFT_OUT = 20
_NARROW_MILESTONES = (
    "first_rank_le_5",
    "L_semantic",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "first_kl_below_0.5",
)
_WIDE_MILESTONES = (
    "L_copy",
    "first_rank_le_5",
    "L_semantic",
    "L_semantic_run2",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "L_surface_to_meaning",
    "first_kl_below_0.5",
)
_STYLES = {"high": "bold red", "medium": "yellow", "low": "cyan"}
_TRUST_STYLES = {"high": "bold green", "medium": "bold yellow", "low": "bold red"}


def print_summary(summary: Mapping[str, Any], table: LayersTable | None, console: Console) -> None:
    """Print verdict, facts, the baseline layer by layer, and the reasons for doubt.

    Without a table the milestones and the guidance of the summary alone are printed.
    """
    prompt = baseline_prompt(table, summary)
    console.print(_title(summary))
    console.print(Text(reading(summary, prompt), style="bold"))
    level, why = trust(summary)
    line = Text()
    if level is not None:
        line.append(f"trust: {level}", style=_TRUST_STYLES.get(level, "bold")).append("  ")
    console.print(line.append(why))
    _print_left_out(summary, console)
    _print_facts(summary, table, console)
    if table is not None and prompt is not None:
        _print_layers(summary, table, prompt, console)
    _print_lenses(summary, console)
    _print_reasons(summary, console)


def _title(summary: Mapping[str, Any]) -> Text:
    line = Text(visible(str(summary.get("model", "model")), keep_spaces=True), style="bold cyan")
    line.append(f"  {number(summary.get('n_layers'))} layers", style="dim")
    return line.append(f", vocabulary {number(summary.get('d_vocab'))}", style="dim")


def _print_left_out(summary: Mapping[str, Any], console: Console) -> None:
    found = left_out(summary)
    if found is None:
        return
    console.print(Text(found.line, style="yellow"))
    for name, why in found.entries[:MAX_LEFT_OUT]:
        console.print(Text(f"  {name}: {why}"), soft_wrap=True)
    if len(found.entries) > MAX_LEFT_OUT:
        console.print(Text(f"  … and {len(found.entries) - MAX_LEFT_OUT} more", style="dim"))


def _heading(console: Console, title: str, note: str = "") -> None:
    console.print()
    console.print(Text(title, style="bold").append(f"  {note}" if note else "", style="dim"))


def _grid() -> Table:
    return Table(box=None, padding=(0, 1, 0, 0), header_style="dim")


def _column(table: Table, header: str, *, right: bool = False, width: int | None = None) -> None:
    # A header is Text, as every cell is: brackets in it are never read as markup.
    table.add_column(
        Text(header),
        justify="right" if right else "left",
        no_wrap=True,
        overflow="ellipsis",
        max_width=width,
    )


def _print_facts(summary: Mapping[str, Any], table: LayersTable | None, console: Console) -> None:
    lens = primary_lens(summary)
    entries = [
        entry
        for entry in summary.get("passes") or ()
        if entry.get("lens") == lens
        and entry.get("prompt_id") == "pos"
        and entry.get("prompt_variant") == "orig"
    ]
    if not entries:
        return
    wide = console.width >= WIDE
    names = _WIDE_MILESTONES if wide else _NARROW_MILESTONES
    prompts = {prompt.prompt_index: prompt for prompt in table.passes()} if table else {}
    grid = _grid()
    _column(grid, "fact", width=32 if wide else 18)
    if any(prompt.head and prompt.head.top_tokens for prompt in prompts.values()):
        _column(grid, "model says", width=14)
        _column(grid, "rank", right=True)
    for name in names:
        _column(grid, label(name), right=True)
    for entry in entries[:MAX_FACTS]:
        found = milestones_of(entry)
        head = prompts[entry["prompt_index"]].head if entry["prompt_index"] in prompts else None
        cells = [milestone_cell(found.get(name), lasts=lasts(name))[0] for name in names]
        said: list[str] = []
        if len(grid.columns) > len(cells) + 1:
            said.append(visible(head.top_tokens[0]) if head and head.top_tokens else "–")
            said.append(number(head.answer_rank) if head else "–")
        name = visible(entry.get("fact_key"), keep_spaces=True)
        grid.add_row(*(Text(cell) for cell in (name, *said, *cells)))
    note = f"{lens} lens: first layer, → stable from, ✕ not at the last layer"
    _heading(console, "Facts", note)
    console.print(grid)
    if len(entries) > MAX_FACTS:
        console.print(Text(f"… and {len(entries) - MAX_FACTS} more facts", style="dim"))


def _print_layers(
    summary: Mapping[str, Any], table: LayersTable, prompt: PromptInfo, console: Console
) -> None:
    lenses = [name for name in ("norm", "raw") if name in table.lenses] or table.lenses[:1]
    rows = {
        lens: {
            row["layer"]: row
            for row in table.last(lens=lens, prompt_index=prompt.prompt_index).iter_rows(named=True)
        }
        for lens in lenses
    }
    layers = sorted({layer for entry in rows.values() for layer in entry})
    if not layers:
        return
    marked = {layer: names for layer, names in _marked(summary).items() if layer in set(layers)}
    wide = console.width >= WIDE
    grid = _grid()
    _column(grid, "layer", right=True)
    for lens in lenses:
        for header in (f"{lens}: top-1", "p", "H", "KL", "rank"):
            _column(
                grid,
                header,
                right=header in ("p", "H", "KL", "rank"),
                width=20 if wide else 13,
            )
    if wide:
        _column(grid, "milestones")
    for layer in sampled(layers, keep=set(marked))[::-1]:
        cells = [Text(str(layer), style="bold" if layer in marked else "")]
        for lens in lenses:
            cells += _layer_cells(rows[lens].get(layer), prompt)
        if wide:
            cells.append(Text(", ".join(marked.get(layer, ())), style="cyan"))
        grid.add_row(*cells)
    note = "last position; p of the top-1, entropy H and KL to final in bits"
    _heading(console, "Layer by layer", note)
    if prompt.text:
        console.print(Text(f"“{visible(prompt.text, keep_spaces=True)}”"))
    console.print(grid)
    if not wide and marked:
        text = "; ".join(f"{layer}: {', '.join(names)}" for layer, names in sorted(marked.items()))
        console.print(Text(f"Milestones by layer: {text}", style="cyan"))


def _print_lenses(summary: Mapping[str, Any], console: Console) -> None:
    """Print every lens beside the others; two lenses without a fitted one stand side by side above.

    Notes are printed in any case: a lens that is missing has to be said.
    """
    found = lens_table(summary)
    fitted = {"norm", "raw", "norm / τ"}.issuperset(row.name for row in found.rows)
    notes = (
        [note for note in found.notes if not note.startswith("norm / τ")] if fitted else found.notes
    )
    if not fitted:
        grid = _grid()
        _column(grid, "lens")
        for header in (*found.depths, *found.columns):
            _column(grid, header.replace(" (layer ", "@").rstrip(")"), right=True)
        for row in found.rows:
            cells = (row.name, *row.bits, *(text for text, _ in row.milestones))
            grid.add_row(*(Text(cell) for cell in cells))
        _heading(
            console,
            "Lens against lens",
            f"KL to final in bits, milestones; medians of {found.facts} facts",
        )
        console.print(grid)
    for note in notes:
        console.print(Text(note))


def _marked(summary: Mapping[str, Any]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, first, _ in marks(milestones_of(baseline_entry(summary))):
        found.setdefault(first, []).append(label(name))
    return found


def sampled(layers: Sequence[int], *, keep: set[int], limit: int = MAX_LAYERS) -> list[int]:
    """Return at most about ``limit`` layers, evenly spaced, with both ends and those to keep."""
    if len(layers) <= limit:
        return list(layers)
    step = -(-len(layers) // max(1, limit - len(keep)))
    spaced = {layers[i] for i in range(0, len(layers), step)}
    return sorted(spaced | {layers[0], layers[-1]} | (keep & set(layers)))


def _layer_cells(row: Mapping[str, Any] | None, prompt: PromptInfo) -> list[Text]:
    if row is None:
        return [Text("–")] * 5
    tokens = row["top_tokens"] or [None]
    is_answer = row["answer_rank"] == 1
    style = "bold green" if is_answer else ""
    p = row["p_top1"] if row["p_top1"] is not None else next(iter(row["top_probs"] or ()), None)
    return [
        Text(visible(tokens[0]) if tokens[0] is not None else "–", style=style),
        Text(_probability(p)),
        Text(_fixed(row["entropy_bits"])),
        Text(_fixed(row["kl_to_final_bits"])),
        Text(number(row["answer_rank"]), style=style),
    ]


def _probability(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value >= 0.005 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _print_reasons(summary: Mapping[str, Any], console: Console) -> None:
    found = reasons(summary)
    told = advice(summary)
    if not found and not told:
        return
    _heading(console, "How far to believe it")
    made = checks_line(summary)
    if made is not None:
        console.print(Text(made))
    if told:
        console.print(Text(" ".join(told)))
    for reason in found:
        _print_reason(reason, console)


def _print_reason(reason: Reason, console: Console) -> None:
    line = Text(f"{reason.severity:<7}", style=_STYLES.get(reason.severity, ""))
    body = Text(reason.message)
    if reason.evidence:
        numbers = ", ".join(f"{name} {value}" for name, value in reason.evidence)
        body.append(f" ({numbers})", style="dim")
    if reason.action:
        body.append(f"\n→ {reason.action}", style="italic")
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=7)
    grid.add_column(ratio=1)
    grid.add_row(line, body)
    console.print(grid)
