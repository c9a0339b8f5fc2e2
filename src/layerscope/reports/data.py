"""The one data block of the page: every pass of a table, small enough for hundreds of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.reports.curves import curves_payload, marks
from layerscope.reports.grid import grid_bytes, grid_payload, grid_size
from layerscope.reports.strings import StringTable
from layerscope.reports.text import rounded, visible
from layerscope.reports.verdict import milestones_of, pass_entry

TOP_K_CHOICES = (10, 5, 3, 1)  # tokens per grid cell, as many as the budget allows
CURVES_SHARE = 0.8  # of the budget; what the curves leave goes to the grids
Frames = dict[tuple[int, str], pl.DataFrame]


@dataclass(frozen=True)
class ModelData:
    """The data of one table: the JSON-able payload and what was left out of it, in words."""

    payload: dict[str, Any]
    omitted: tuple[str, ...]


def model_data(table: LayersTable, summary: Mapping[str, Any], *, budget_bytes: int) -> ModelData:
    """Return the data block of one table within a budget of JSON bytes.

    When the budget is short, first the number of tokens per grid cell shrinks, then the last
    prompts lose their grid, then the last prompts are left out; the full numbers stay in the table.
    """
    frames = _frames(table)
    strings = StringTable()
    omitted: list[str] = []
    prompts = list(table.passes())
    passes: list[dict[str, Any]] = []
    used = 0
    for prompt in prompts:
        before = strings.bytes
        entry = _pass(table, prompt, frames, summary, strings)
        size = _json_bytes(entry) + strings.bytes - before
        if passes and used + size > CURVES_SHARE * budget_bytes:
            omitted.append(
                f"This page shows the first {len(passes)} of {len(prompts)} prompts to stay small; "
                "the table holds all of them."
            )
            break
        used += size
        passes.append(entry)
    shown = prompts[: len(passes)]
    omitted += _add_grids(
        passes, shown, frames, table.lenses, strings, budget_bytes=budget_bytes - used
    )
    payload = {
        "model": table.meta.model,
        "n_layers": table.meta.n_layers,
        "d_vocab": table.meta.d_vocab,
        "lenses": table.lenses,
        "passes": passes,
        "strings": strings.texts,
    }
    return ModelData(payload=payload, omitted=tuple(omitted))


def _json_bytes(value: Any) -> int:
    """Return the size in the data block, as near as needed (escapes of ``<`` are not counted)."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _frames(table: LayersTable) -> Frames:
    parts = table.rows.partition_by("prompt_index", "lens", as_dict=True)
    return {(int(key[0]), str(key[1])): frame for key, frame in parts.items()}


def kind(prompt: PromptInfo) -> str:
    """Return "fact", "ablation" or "control"."""
    if prompt.prompt_id == "ctl":
        return "control"
    return "fact" if prompt.prompt_variant == "orig" else "ablation"


def title(prompt: PromptInfo) -> str:
    """Return the name of a pass for the prompt selector."""
    name = prompt.fact_key or f"prompt {prompt.prompt_index}"
    names = {"fact": name, "ablation": f"{name} · without filler", "control": f"control · {name}"}
    if prompt.prompt_id == "ctl" and prompt.fact_key is None:
        return f"control · {prompt.answer}" if prompt.answer else "control"
    return visible(names[kind(prompt)], keep_spaces=True)


def family(prompt: PromptInfo, prompts: Sequence[PromptInfo]) -> dict[str, int]:
    """Return the passes that belong beside one: prompt_index by kind, its own kind excluded.

    A control without a fact of its own serves every fact; that control's family is the first fact.
    """
    own = kind(prompt)
    key = prompt.fact_key
    if own == "control" and key is None:
        key = next((other.fact_key for other in prompts if kind(other) == "fact"), None)
    others = [other for other in prompts if kind(other) != own]
    found: dict[str, int] = {}
    for other in others:
        if key is not None and other.fact_key == key:
            found.setdefault(kind(other), other.prompt_index)
    for other in others:
        if kind(other) == "control" and other.fact_key is None:
            found.setdefault("control", other.prompt_index)
    return found


ABSENT_COMPANION = {
    "fact": "There is no original wording of this prompt to set beside it.",
    "ablation": "This prompt was not run without its filler, so no ablation curve is beside it.",
    "control": "This run has no control prompt, so no control curve is beside this one.",
}


def _pass(
    table: LayersTable,
    prompt: PromptInfo,
    frames: Frames,
    summary: Mapping[str, Any],
    strings: StringTable,
) -> dict[str, Any]:
    index = prompt.prompt_index
    lenses: dict[str, Any] = {}
    for lens in table.lenses:
        frame = frames.get((index, lens))
        if frame is None:
            continue
        entry = milestones_of(pass_entry(summary, index, lens))
        lenses[lens] = {"curves": curves_payload(frame, strings), "marks": marks(entry)}
    beside = family(prompt, list(table.passes()))
    own = kind(prompt)
    return {
        "index": index,
        "title": title(prompt),
        "kind": own,
        "text": visible(prompt.text, keep_spaces=True) if prompt.text else "",
        "tokens": strings.add_all(prompt.tokens),
        "answer": visible(prompt.answer) if prompt.answer else None,
        "answer_note": _answer_note(prompt),
        "head": _head(prompt, strings),
        "last_rows": [_last_row(prompt, lens, summary) for lens in lenses],
        "beside": beside,
        "lenses": lenses,
        "absent": {
            "beside": [
                ABSENT_COMPANION[other]
                for other in ("fact", "ablation", "control")
                if other != own and other not in beside
            ],
            **_absent(prompt, lenses),
        },
    }


def _answer_note(prompt: PromptInfo) -> str | None:
    if prompt.alignment_status != "ok":
        return f"the answer could not be aligned with tokens: {prompt.alignment_status}"
    if len(prompt.answer_pieces) > 1:
        pieces = " ".join(visible(piece) for piece in prompt.answer_pieces)
        return f"the answer has several tokens ({pieces}); ranks and curves follow the first"
    return None


def _absent(prompt: PromptInfo, lenses: Mapping[str, Any]) -> dict[str, str]:
    """Say for every figure of a pass that cannot be drawn why it cannot."""
    absent: dict[str, str] = {}
    curves = {name: entry["curves"] for name, entry in lenses.items()}

    def missing(column: str) -> bool:
        return not any(entry[column] is not None for entry in curves.values())

    if missing("entropy"):
        absent["entropy"] = "The table holds no entropies for this prompt."
    if missing("kl"):
        absent["kl"] = "The table holds no divergence from the final prediction for this prompt."
    if missing("rank"):
        why = prompt.alignment_status if prompt.alignment_status != "ok" else "no answer was given"
        absent["rank"] = f"There is no answer rank for this prompt: {why}."
    if "raw" not in lenses or "norm" not in lenses:
        absent["raw"] = (
            "The raw and the norm lens are not both in this table, so they cannot be compared."
        )
    elif all(missing(name) for name in ("kl_raw", "js_raw", "jaccard_raw")):
        absent["raw"] = "The table holds no comparison of the raw and the norm lens."
    if prompt.head is None:
        absent["head"] = "The model's own prediction was not recorded for this prompt."
    return absent


def _head(prompt: PromptInfo, strings: StringTable) -> dict[str, Any] | None:
    head = prompt.head
    if head is None:
        return None
    first = prompt.answer_ids[0] if prompt.answer_ids else None
    top_ids = head.top_ids[:10]
    return {
        "entropy": rounded(head.entropy_bits),
        "answer_at": top_ids.index(first) if first in top_ids else None,
        "tokens": strings.add_all(head.top_tokens[:10]),
        "probs": [rounded(value) for value in head.top_probs[:10]],
        "answer_rank": head.answer_rank,
        "p_answer": rounded(head.p_answer),
    }


def _last_row(prompt: PromptInfo, lens: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the last row compares with the model's head: as recorded, else as measured."""
    for row in prompt.last_rows:
        if row.lens == lens:
            return {
                "lens": lens,
                "kl": rounded(row.kl_to_final_bits),
                "top1_agree": row.top1_agree,
                "kl_after_temp": rounded(row.kl_after_temp_bits),
                "temp": rounded(row.temp_est),
            }
    for entry in summary.get("last_layer_consistency") or ():
        if entry.get("prompt_index") == prompt.prompt_index and entry.get("lens") == lens:
            return {
                "lens": lens,
                "kl": rounded(entry.get("kl_to_final_bits")),
                "top1_agree": entry.get("top1_agree"),
                "kl_after_temp": rounded(entry.get("kl_after_temp_bits")),
                "temp": rounded(entry.get("temp_est")),
            }
    return {"lens": lens, "kl": None}


def _add_grids(
    passes: list[dict[str, Any]],
    prompts: Sequence[PromptInfo],
    frames: Frames,
    lenses: Sequence[str],
    strings: StringTable,
    *,
    budget_bytes: int,
) -> list[str]:
    """Add the grids in order while they fit; return sentences on what was left out."""
    wanted = [
        [
            (lens, frame)
            for lens in lenses
            if (frame := frames.get((prompt.prompt_index, lens))) is not None
        ]
        for prompt in prompts
    ]
    sizes = [sum(grid_size(frame) for _, frame in entry) for entry in wanted]
    total = sum(sizes)
    top_k = next((k for k in TOP_K_CHOICES if grid_bytes(total, k) <= budget_bytes), 1)
    room = budget_bytes
    for position, (entry, parts) in enumerate(zip(passes, wanted, strict=True)):
        before = strings.bytes
        grids = {lens: grid_payload(frame, strings, top_k=top_k) for lens, frame in parts}
        room -= _json_bytes(grids) + strings.bytes - before
        if room < 0:
            note = (
                f"The grid is drawn for the first {position} of {len(passes)} prompts to keep this "
                "page small; the table holds every position."
            )
            for later in passes[position:]:
                later["absent"]["grid"] = note
            return [note]
        for lens, grid in grids.items():
            entry["lenses"][lens]["grid"] = grid
    return []
