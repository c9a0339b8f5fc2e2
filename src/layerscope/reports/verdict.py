"""One sentence that says what was read, and how far it may be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.reports.glossary import canonical
from layerscope.reports.text import number, quoted, visible

NO_GUIDANCE = "The summary holds no measurement guidance, so nothing is said about trust."


@dataclass(frozen=True)
class Reason:
    """One reason to doubt a reading, ready for display."""

    code: str
    severity: str
    message: str
    evidence: tuple[tuple[str, str], ...]
    action: str


@dataclass(frozen=True)
class LeftOut:
    """The prompts that could not be asked: a line that counts them, and (name, reason) of each."""

    line: str
    entries: tuple[tuple[str, str], ...]


def left_out(summary: Mapping[str, Any]) -> LeftOut | None:
    """Return the prompts of a run that were left out, or None where there are none."""
    prompts: Mapping[str, Any] = summary.get("prompts") or {}
    found: Sequence[Mapping[str, Any]] = prompts.get("left_out") or ()
    if not found:
        return None
    return LeftOut(
        f"{len(found)} of {prompts['given']} prompts left out:",
        tuple(
            (
                visible(f"{entry['prompt']} ({entry['variant']})", keep_spaces=True),
                visible(entry["reason"], keep_spaces=True),
            )
            for entry in found
        ),
    )


def milestones_of(entry: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the milestones of one pass of the summary under the report's names."""
    found: Mapping[str, Any] = (entry or {}).get("milestones") or {}
    named = {canonical(name): dict(value) for name, value in found.items() if value}
    confirmed = (entry or {}).get("L_semantic_confirmed")
    if confirmed is not None:  # a test of one layer: it is reached, it cannot be lost
        named.setdefault("L_semantic_confirmed", {"first": confirmed})
    return named


def primary_lens(summary: Mapping[str, Any]) -> str:
    """Return the lens whose milestones are quoted."""
    return str(summary.get("primary_lens") or "norm")


def pass_entry(
    summary: Mapping[str, Any], prompt_index: int, lens: str
) -> Mapping[str, Any] | None:
    """Return the summary of one pass under one lens, or None when it was not measured."""
    for entry in summary.get("passes") or ():
        if entry.get("prompt_index") == prompt_index and entry.get("lens") == lens:
            return entry
    return None


def baseline_entry(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the pass that the summary calls its baseline, or the first measured one."""
    passes: Sequence[Mapping[str, Any]] = summary.get("passes") or ()
    index = summary.get("baseline")
    if isinstance(index, int) and 0 <= index < len(passes):
        return passes[index]
    return passes[0] if passes else None


def baseline_prompt(table: LayersTable | None, summary: Mapping[str, Any]) -> PromptInfo | None:
    """Return the prompt of the baseline pass."""
    entry = baseline_entry(summary)
    prompts = list(table.passes()) if table else []
    if entry is not None:
        for prompt in prompts:
            if prompt.prompt_index == entry.get("prompt_index"):
                return prompt
    return prompts[0] if prompts else None


def reading(summary: Mapping[str, Any], prompt: PromptInfo | None) -> str:
    """Say in one sentence at which layer the baseline's answer becomes the top prediction."""
    entry = baseline_entry(summary)
    n_layers = summary.get("n_layers")
    if entry is None:
        return "No prompt was measured."
    answer = _answer(prompt)
    if prompt is not None and prompt.alignment_status != "ok":
        return (
            "The baseline prompt has no answer token that could be aligned "
            f"({prompt.alignment_status}), so its answer cannot be followed through the layers."
        )
    found = milestones_of(entry).get("L_semantic") or {"first": entry.get("L_semantic")}
    first, stable = found.get("first"), found.get("stable")
    if first is None:
        return f"{answer} never becomes the top prediction in any of the {n_layers} layers."
    if first == stable == n_layers:
        return f"{answer} becomes the top prediction only at the last layer, {first}."
    if first == stable:
        return f"{answer} becomes the top prediction at layer {first} of {n_layers} and stays."
    if stable is None and "stable" not in found:
        return f"{answer} first becomes the top prediction at layer {first} of {n_layers}."
    if stable is None:
        return (
            f"{answer} becomes the top prediction at layer {first} of {n_layers}, "
            "but the model's last layer prefers another token."
        )
    return (
        f"{answer} first becomes the top prediction at layer {first} of {n_layers}, "
        f"is lost again, and stays only from layer {stable}."
    )


def _answer(prompt: PromptInfo | None) -> str:
    """Name the answer for the start of a sentence; ranks follow its first token."""
    if prompt is None or not prompt.answer:
        return "The answer"
    start = "The first token of the answer" if len(prompt.answer_ids) > 1 else "The answer"
    return f"{start} {quoted(prompt.answer)}"


def trust(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the level of trust (high, medium, low or None) and one sentence that says why."""
    guidance: Mapping[str, Any] = summary.get("measurement_guidance") or {}
    level = guidance.get("trust")
    if level is None:
        return None, NO_GUIDANCE
    found = reasons(summary)
    if not found:
        return level, "No check found a reason for doubt."
    more = f" ({len(found) - 1} more below.)" if len(found) > 1 else ""
    return level, found[0].message + more


def reasons(summary: Mapping[str, Any]) -> list[Reason]:
    """Return the guidance's reasons in its own order, most serious first."""
    guidance: Mapping[str, Any] = summary.get("measurement_guidance") or {}
    return [
        Reason(
            code=str(entry.get("code", "")),
            severity=str(entry.get("severity", "low")),
            message=str(entry.get("message", "")),
            evidence=_evidence(entry.get("evidence")),
            action=str(entry.get("action") or ""),
        )
        for entry in guidance.get("reasons") or ()
    ]


def _evidence(evidence: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(evidence, Mapping):
        return ()
    # Warnings and thresholds stand where the checks are listed. Where there are no numbers, the
    # first warning says more than the name of its gate.
    shown = {k: v for k, v in evidence.items() if k not in ("warnings", "thresholds")}
    warnings = evidence.get("warnings")
    if set(shown) == {"gates"} and isinstance(warnings, list) and warnings:
        shown = {"for instance": warnings[0]}
    return tuple((str(name), _written(value)) for name, value in shown.items())


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_written(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        shown = ", ".join(_written(entry) for entry in value[:8])
        return shown + (f", … ({len(value)} in all)" if len(value) > 8 else "")
    return number(value)


def advice(summary: Mapping[str, Any]) -> list[str]:
    """Return what the guidance says about how to report the numbers, in plain words."""
    guidance: Mapping[str, Any] = summary.get("measurement_guidance") or {}
    lines: list[str] = [str(guidance["notes"])] if guidance.get("notes") else []
    if guidance.get("prefer_ranks"):
        lines.append("Report ranks and thresholds.")
    if guidance.get("suppress_abs_probs"):
        lines.append("Do not compare absolute probabilities with other models.")
    if guidance.get("preferred_lens_for_reporting"):
        lines.append(f"Preferred lens: {guidance['preferred_lens_for_reporting']}.")
    if guidance.get("use_confirmed_semantics"):
        lines.append("Use the milestone that a second lens confirmed.")
    return lines
