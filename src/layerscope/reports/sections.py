"""The parts of the page that are written once per model: header, guidance, facts, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from layerscope.measures.config import decimal
from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.reports.checks import Check, checks, checks_line
from layerscope.reports.data import kind
from layerscope.reports.evidence import Evidence, evidence
from layerscope.reports.glossary import TABULATED, label, lasts, meaning
from layerscope.reports.lenses import LensTable, lens_table
from layerscope.reports.text import number, visible
from layerscope.reports.verdict import (
    LeftOut,
    Reason,
    advice,
    baseline_prompt,
    left_out,
    milestones_of,
    pass_entry,
    primary_lens,
    reading,
    reasons,
    trust,
)

MAX_PROVENANCE_CHARS = 60_000
DATE_KEYS = ("date", "finished_at", "finished", "started_at", "started", "created_at", "timestamp")


@dataclass(frozen=True)
class FactRow:
    """One fact in the table of facts; ``cells`` are (text, explanation) in TABULATED order."""

    prompt_index: int
    name: str
    answer: str
    top1: str
    p_answer: str
    rank: str
    cells: tuple[tuple[str, str], ...]
    wording: str  # how far the onset moves without the filler, in layers


@dataclass(frozen=True)
class ModelSections:
    """What the template needs to know of one model."""

    model: str
    chips: tuple[tuple[str, str], ...]
    verdict: str
    trust: str | None
    trust_why: str
    reasons: tuple[Reason, ...]
    advice: tuple[str, ...]
    omitted: tuple[str, ...]
    left_out: LeftOut | None
    raw_summary: tuple[str, ...]
    lenses: LensTable
    checks: tuple[Check, ...]
    checks_line: str | None
    evidence: Evidence
    columns: tuple[tuple[str, str], ...]
    facts: tuple[FactRow, ...]
    facts_notes: tuple[str, ...]
    facts_absent: str | None
    primary_lens: str
    provenance: str | None


def model_sections(
    table: LayersTable,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    omitted: Sequence[str] = (),
) -> ModelSections:
    """Prepare the server-side parts of one model; all strings are plain text, not HTML."""
    prompt = baseline_prompt(table, summary)
    level, why = trust(summary)
    facts = _facts(table, summary)
    return ModelSections(
        model=visible(table.meta.model, keep_spaces=True),
        chips=_chips(table, provenance),
        verdict=reading(summary, prompt),
        trust=level,
        trust_why=why,
        reasons=tuple(reasons(summary)),
        advice=tuple(advice(summary)),
        omitted=tuple(omitted),
        left_out=left_out(summary),
        raw_summary=_raw_summary(summary, prompt),
        lenses=lens_table(summary),
        checks=tuple(checks(summary)),
        checks_line=checks_line(summary),
        evidence=evidence(table, summary),
        columns=tuple((label(name), f"{name}: {meaning(name)}") for name in TABULATED),
        facts=facts,
        facts_notes=_facts_notes(summary),
        facts_absent=None if facts else "No fact was measured, so there are no milestones to list.",
        primary_lens=primary_lens(summary),
        provenance=_provenance(table, provenance),
    )


def find(tree: Any, names: Sequence[str]) -> Any:
    """Return the first value under one of ``names`` in nested mappings, shallow levels first."""
    level: list[Any] = [tree]
    while level:
        mappings = [entry for entry in level if isinstance(entry, Mapping)]
        for name in names:
            for entry in mappings:
                if entry.get(name) not in (None, "") and not isinstance(entry[name], Mapping):
                    return entry[name]
        level = [value for entry in mappings for value in entry.values()]
    return None


def _chips(table: LayersTable, provenance: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    meta = table.meta
    sources = {"run": provenance, "table": meta.provenance}
    prompts = list(table.passes())
    n_facts = sum(1 for prompt in prompts if kind(prompt) == "fact")
    chips: list[tuple[str, Any]] = [
        ("layers", meta.n_layers),
        ("vocabulary", meta.d_vocab),
        ("width", meta.d_model),
        ("prompts", f"{len(prompts)} ({n_facts} facts)" if n_facts else len(prompts)),
        ("prompt format", ", ".join(sorted({prompt.format for prompt in prompts}))),
        ("lenses", ", ".join(table.lenses)),
        ("norm", meta.norm_choice),
        ("device", find(sources, ("device",))),
        ("dtype", find(sources, ("dtype", "dtype_compute"))),
        ("run", _date(find(sources, DATE_KEYS))),
    ]
    return tuple((name, visible(number(value), keep_spaces=True)) for name, value in chips if value)


def _date(value: Any) -> str | None:
    """Write an ISO date and time to the minute; anything else stays as it is."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _raw_summary(summary: Mapping[str, Any], prompt: PromptInfo | None) -> tuple[str, ...]:
    """Say in sentences how far raw and norm lens agree on the baseline's fact."""
    full = _of_fact(summary.get("raw_lens_full"), prompt)
    if not full:
        return ("The summary holds no comparison of the raw and the norm lens over all layers.",)
    score: Mapping[str, Any] = full.get("score") or {}
    key = prompt.fact_key if prompt is not None else None
    where = f"{visible(key, keep_spaces=True)} over all layers: " if key else "Over all layers: "
    lines: list[str] = []
    if score.get("tier"):
        lines.append(
            f"{where}artefact tier {score['tier']} "
            f"(score {number(score.get('lens_artifact_score'))} of 1)."
        )
    bits = float((summary.get("config") or {}).get("raw_kl_high_bits", 1.0))
    share = full.get(f"pct_layers_kl_ge_{decimal(bits)}")
    if share is not None:
        unit = f"{bits:g} bit{'' if bits == 1 else 's'}"
        lines.append(
            f"In {100 * float(share):.0f}% of the layers the two lenses differ by {unit} or more; "
            f"at most {number(full.get('max_kl_norm_vs_raw_bits'))} bits."
        )
    count = full.get("n_norm_only_semantics_layers")
    if count is not None:
        lines.append(
            f"In {number(count)} layer{'s' if count > 1 else ''} only the norm lens puts the "
            "answer on top."
            if count
            else "In no layer is the answer on top under the norm lens alone."
        )
    return tuple(lines)


def _of_fact(block: Any, prompt: PromptInfo | None) -> Mapping[str, Any]:
    if not isinstance(block, Mapping) or not block:
        return {}
    key = prompt.fact_key if prompt is not None else None
    if key is not None and isinstance(block.get(key), Mapping):
        return block[key]
    first = next(iter(block.values()))
    return first if isinstance(first, Mapping) else block


def _facts(table: LayersTable, summary: Mapping[str, Any]) -> tuple[FactRow, ...]:
    rows: list[FactRow] = []
    lens = primary_lens(summary)
    ablations: Mapping[Any, Any] = summary.get("ablation_summary") or {}
    for prompt in table.passes():
        entry = pass_entry(summary, prompt.prompt_index, lens)
        if kind(prompt) != "fact" or entry is None:
            continue
        found = milestones_of(entry)
        head = prompt.head
        rows.append(
            FactRow(
                prompt_index=prompt.prompt_index,
                name=visible(prompt.fact_key or prompt.text, keep_spaces=True),
                answer=visible(prompt.answer) if prompt.answer else "–",
                top1=visible(head.top_tokens[0]) if head and head.top_tokens else "–",
                p_answer=number(head.p_answer) if head else "–",
                rank=number(head.answer_rank) if head else "–",
                cells=tuple(
                    milestone_cell(found.get(name), lasts=lasts(name)) for name in TABULATED
                ),
                wording=_signed((ablations.get(prompt.fact_key) or {}).get("delta_L_sem")),
            )
        )
    return tuple(rows)


def _signed(value: int | None) -> str:
    return "–" if value is None else f"{value:+d}" if value else "0"


def milestone_cell(entry: Mapping[str, Any] | None, *, lasts: bool = True) -> tuple[str, str]:
    """Return a milestone as a short text and an explanation: first, and stable when later."""
    first = (entry or {}).get("first")
    if entry is None or first is None:
        return "–", "never"
    if "stable" not in entry or not lasts:
        return str(first), f"first at layer {first}"
    stable = entry["stable"]
    if stable == first:
        return str(first), f"from layer {first} to the end"
    if stable is None:
        return f"{first} ✕", f"first at layer {first}, not true at the last layer"
    return f"{first} → {stable}", f"first at layer {first}, lost again, stable from layer {stable}"


def _facts_notes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Say in sentences what the facts have in common, and what the control shows."""
    notes: list[str] = []
    suite: Mapping[str, Any] = summary.get("micro_suite") or {}
    found: Mapping[str, Any] = suite.get("aggregates") or {}
    median = found.get("L_semantic_norm_median")
    if median is not None:
        text = f"Median onset over {number(found.get('n'))} facts: layer {number(median)}"
        low, high = found.get("L_semantic_norm_iqr") or (None, None)
        if low is not None and high is not None:
            text += f" (middle half: {number(low)} to {number(high)})"
        notes.append(f"{text}; without an onset: {number(found.get('n_missing'))}.")
    control: Mapping[str, Any] = summary.get("control_summary") or {}
    if "control_margin_stable" in control:
        layer = control["control_margin_stable"]
        margin = number(control.get("control_margin_last_row"))
        notes.append(
            "Control: the right answer is never ahead of the foil for good."
            if layer is None
            else f"Control: the right answer is ahead of the foil for good from layer {layer} "
            f"(by {margin} in probability at the last layer)."
        )
    return tuple(notes)


def _provenance(table: LayersTable, provenance: Mapping[str, Any]) -> str | None:
    tree = dict(provenance) or dict(table.meta.provenance)
    if not tree:
        return None
    text = json.dumps(tree, indent=2, ensure_ascii=False, default=str)
    text = "\n".join(visible(line, keep_spaces=True) for line in text.split("\n"))
    if len(text) > MAX_PROVENANCE_CHARS:
        text = text[:MAX_PROVENANCE_CHARS] + "\n… (shortened; the run's JSON file holds all of it)"
    return text
