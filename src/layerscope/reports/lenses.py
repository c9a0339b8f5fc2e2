"""Lens against lens: one row per lens, and what the comparison says in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerscope.reports.glossary import label
from layerscope.reports.text import number, visible

TEMPERED = "norm_temp"
MILESTONES = ("first_rank_le_5", "L_semantic", "L_semantic_strong", "first_kl_below_1.0")
_NAMES = {TEMPERED: "norm / τ"}


@dataclass(frozen=True)
class LensRow:
    """One lens: its name, KL (bits) by depth, and median milestones as (text, explanation)."""

    name: str
    bits: tuple[str, ...]
    milestones: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LensTable:
    """Every lens beside the others, medians over facts; no rows where there is only one."""

    depths: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[LensRow, ...]
    notes: tuple[str, ...]
    facts: int


def lens_table(summary: Mapping[str, Any]) -> LensTable:
    """Return the comparison of a summary, ready for display."""
    found: Mapping[str, Any] = summary.get("lens_comparison") or {}
    kl: Mapping[str, Any] = found.get("kl_to_final_bits") or {}
    depths: Mapping[str, int] = found.get("depths") or {}
    layers: Mapping[str, Any] = found.get("milestones") or {}
    facts = int(found.get("facts") or 0)
    names = [name for name in kl if name != TEMPERED]
    if TEMPERED in kl and "temperature" not in kl:  # beside the lens that it calibrates
        names.insert(names.index("norm") + 1 if "norm" in names else 0, TEMPERED)
    rows = tuple(
        LensRow(
            name=_NAMES.get(name, visible(name, keep_spaces=True)),
            bits=tuple(_bits(kl[name].get(depth)) for depth in depths),
            milestones=tuple(_median(layers.get(name), entry, facts) for entry in MILESTONES),
        )
        for name in names
    )
    return LensTable(
        depths=tuple(f"{depth[1:]}% (layer {row})" for depth, row in depths.items()),
        columns=tuple(label(name) for name in MILESTONES),
        rows=rows,
        notes=tuple(lens_notes(summary)),
        facts=facts,
    )


def lens_notes(summary: Mapping[str, Any]) -> list[str]:
    """Say in sentences which lens to report, what a tuned lens gains and why, and what is missing.

    What a lens's fit warns of, and why a lens was not run, come last.
    """
    found: Mapping[str, Any] = summary.get("lens_comparison") or {}
    notes = [
        note
        for note in (_preferred(summary), _gain(summary), _held_out(summary), _spread(found))
        if note
    ]
    tau: Mapping[str, Any] = summary.get("tau_norm_per_layer") or {}
    if tau.get("source") == "in_run":
        count = len(tau.get("prompts") or ())
        notes.append(
            f"norm / τ: one temperature per layer, fitted on {_count(count, 'prompt')} of this run "
            "(in KL(model ‖ lens)), which flatters it; a temperature lens is fitted on other text."
        )
    for lens, lines in (found.get("warnings") or {}).items():
        notes += [f"{lens}: its fit warns: {line}." for line in lines]
    for lens, entry in (found.get("not_run") or {}).items():
        notes.append(f"Without the {lens} lens: {entry['reason']}.")
    return [visible(note, keep_spaces=True) for note in notes]


def _preferred(summary: Mapping[str, Any]) -> str | None:
    found: Mapping[str, Any] = summary.get("preferred_lens") or {}
    if (_attribution(summary)).get("status") != "ok" or not found:
        return None
    return f"Report the {found['lens']} lens: {found['reason']}."


def _gain(summary: Mapping[str, Any]) -> str | None:
    found = _attribution(summary)
    if found.get("status") != "ok":
        return None
    at: Mapping[str, float | None] = found["gains"]["kl_to_final_bits"]["p50"]
    if at["tuned"] is None:
        return None
    where = f"At half the depth the tuned lens is {_nearer(at['tuned'])} than the norm lens"
    return f"{where} (median of {_count(found['facts'], 'fact')}); {_shares(at)}."


def _held_out(summary: Mapping[str, Any]) -> str | None:
    found: Mapping[str, Any] = _attribution(summary).get("held_out") or {}
    if found.get("status") != "ok" or found["p50"]["tuned"] is None:
        return None
    at: Mapping[str, float | None] = found["p50"]
    return (
        f"On text held out by its fit ({number(found['positions'])} positions, KL(model ‖ lens)) "
        f"it is {_nearer(at['tuned'] or 0.0)} there; {_shares(at)}."
    )


def _attribution(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    tuned: Mapping[str, Any] = summary.get("tuned_lens") or {}
    return tuned.get("attribution") or {}


def _nearer(bits: float) -> str:
    return f"{abs(bits):.2f} bits {'nearer to' if bits > 0 else 'farther from'} the model"


def _shares(at: Mapping[str, float | None]) -> str:
    parts = [
        f"{what} alone {at[name]:+.2f}"
        for name, what in (("temperature", "one temperature per layer"), ("bias", "a bias"))
        if at[name] is not None
    ]
    if at["beyond_both"] is not None:
        parts.append(f"beyond both {at['beyond_both']:+.2f}")
    elif at["beyond_temperature"] is not None:
        parts.append(f"beyond it {at['beyond_temperature']:+.2f}")
    return ", ".join(parts) or "what that is owed to is not known"


def _spread(found: Mapping[str, Any]) -> str | None:
    spread: Mapping[str, Any] | None = found.get("onset_spread")
    if not spread or not spread["max"]:
        return None
    return (
        f"The lenses first put the answer on top up to {_count(spread['max'], 'layer')} apart "
        f"(median {number(spread['median'])} over {_count(spread['facts'], 'fact')})."
    )


def _count(count: int, what: str) -> str:
    return f"{number(count)} {what}{'' if count == 1 else 's'}"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _median(layers: Mapping[str, Any] | None, name: str, facts: int) -> tuple[str, str]:
    entry: Mapping[str, Any] | None = (layers or {}).get(name)
    if entry is None:
        return "–", "not measured"
    missing = entry["missing"]
    if entry["median"] is None:
        return "–", "never, in any fact"
    if not missing:
        return number(entry["median"]), "median over all facts"
    reached = f"{facts - missing}/{facts}"
    return f"{number(entry['median'])} ({reached})", f"median of the {reached} facts that reach it"
