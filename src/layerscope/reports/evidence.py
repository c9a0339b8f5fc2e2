"""What the page cites: onsets to quote, rows behind them, figures of the checks, the tuned lens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerscope.measures.table import LayersTable
from layerscope.reports.files.view import View
from layerscope.reports.glossary import label
from layerscope.reports.text import number, visible
from layerscope.reports.verdict import baseline_entry, milestones_of

CITED = (
    "L_copy",
    "first_rank_le_5",
    "L_semantic",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "first_kl_below_1.0",
    "first_kl_below_0.5",
)
# Fields of a check that are not figures of what it found.
_LABELS = ("prompt_index", "passes_left_out", "d_vocab", "n_layers")


@dataclass(frozen=True)
class Onset:
    """The onset to quote of one fact: which milestone, where, and who confirms it."""

    fact: str
    prompt_index: int
    milestone: str
    layer: str
    depth: str
    stable: str
    confirmed: str


@dataclass(frozen=True)
class Citation:
    """A milestone of the baseline prompt and the data row it rests on; `row` counts from 0."""

    milestone: str
    layer: int
    row: int
    rank: str
    kl_bits: str
    entropy_bits: str
    p_answer: str


@dataclass(frozen=True)
class Audit:
    """What a tuned lens gains over the norm lens (bits), by part; one row per text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Evidence:
    """All of it, ready for display."""

    onsets: tuple[Onset, ...]
    not_checked: tuple[tuple[str, str], ...]
    citations: tuple[Citation, ...]
    cited_lens: str
    figures: Mapping[str, tuple[tuple[str, str], ...]]
    audit: Audit | None


def evidence(table: LayersTable, summary: Mapping[str, Any]) -> Evidence:
    """Return what the page cites; all strings are plain text, not HTML."""
    guidance: Mapping[str, Any] = summary.get("measurement_guidance") or {}
    entry = baseline_entry(summary)
    return Evidence(
        onsets=_onsets(guidance, table.meta.n_layers),
        not_checked=tuple(
            (visible(str(name), keep_spaces=True), visible(str(why), keep_spaces=True))
            for name, why in (guidance.get("not_checked") or {}).items()
        ),
        citations=_citations(table, summary),
        cited_lens=str(entry["lens"]) if entry is not None else "norm",
        figures={
            name: _figures(section) for name, section in (summary.get("diagnostics") or {}).items()
        },
        audit=_audit((summary.get("diagnostics") or {}).get("tuned_audit") or {}),
    )


def _onsets(guidance: Mapping[str, Any], n_layers: int) -> tuple[Onset, ...]:
    found: list[Onset] = []
    for entry in guidance.get("confirmed_milestones") or ():
        preferred: Mapping[str, Any] = entry.get("preferred") or {}
        layer = preferred.get("layer")
        source = entry.get("confirmed_source")
        confirmed = entry.get("L_semantic_confirmed")
        name = entry.get("fact_key") or f"prompt {entry['prompt_index']}"
        found.append(
            Onset(
                fact=visible(name, keep_spaces=True),
                prompt_index=entry["prompt_index"],
                milestone=label(preferred["name"]) if preferred else "never top-1",
                layer=number(layer),
                depth="–" if layer is None else f"{layer / n_layers:.2f}",
                stable=number(entry.get("stable")),
                confirmed="–"
                if confirmed is None
                else f"layer {confirmed}, by {'raw and tuned' if source == 'both' else source}",
            )
        )
    return tuple(found)


def _citations(table: LayersTable, summary: Mapping[str, Any]) -> tuple[Citation, ...]:
    entry = baseline_entry(summary)
    if entry is None:
        return ()
    view, found = View(table, summary), milestones_of(entry)
    cited: list[Citation] = []
    for name in CITED:
        layer = (found.get(name) or {}).get("first")
        if layer is None or layer not in view.baseline_rows:
            continue
        row = view.baseline_rows[layer]
        cited.append(
            Citation(
                milestone=label(name),
                layer=layer,
                row=row["csv_row_index"],
                rank=number(row["answer_rank"]),
                kl_bits=number(row["kl_to_final_bits"]),
                entropy_bits=number(row["entropy_bits"]),
                p_answer=number(row["p_answer"]),
            )
        )
    return tuple(cited)


def _figures(section: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the plain numbers of a check and of the parts one level below, by name."""
    if section.get("status", "ok") != "ok":
        return ()
    found: list[tuple[str, str]] = []
    for name, value in section.items():
        if name in ("gates", "warnings", *_LABELS):
            continue
        if isinstance(value, Mapping):
            found += [
                (f"{name}: {inner}", number(entry))
                for inner, entry in value.items()
                if _is_number(entry)
            ]
        elif _is_number(value):
            found.append((name, number(value)))
    return tuple((visible(name, keep_spaces=True), value) for name, value in found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _audit(section: Mapping[str, Any]) -> Audit | None:
    """Return the gains at the median row, on held-out text and on the first fact of the run."""
    sources = (
        ("held-out text", section.get("on_text") or {}),
        ("the first fact", section),
    )
    parts = ("tuned", "rot", "temp", "bias")
    rows: list[tuple[str, tuple[str, ...]]] = []
    for name, source in sources:
        found: Mapping[str, Any] = source.get("rotation_vs_temperature") or {}
        if found:
            gains = (found.get(f"delta_kl_{part}_p50") for part in parts)
            rows.append((name, tuple("–" if gain is None else f"{gain:+.2f}" for gain in gains)))
    columns = ("whole lens", "rotation and bias", "temperature alone", "bias alone")
    return Audit(columns, tuple(rows)) if rows else None
