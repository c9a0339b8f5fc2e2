"""Reasons from the checks that looked at the model again.

Every gate of a diagnostic section that fails is a reason. `GATES` says which reason a gate belongs
to, how much it weighs and what to do; a gate that is not listed there still gives a reason, of
medium severity, so that no failed check is ever silent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from layerscope.measures.evidence import Evidence, Reason, Severity
from layerscope.measures.sections import ran

SHOWN = 4  # warnings quoted in the evidence of one reason


@dataclass(frozen=True)
class Gate:
    """What a failed gate means: the reason's code and weight, one sentence, and what to do."""

    code: str
    severity: Severity
    message: str
    action: str


# By section and gate; of a gate named "finite.norm" the part before the dot counts.
GATES: dict[tuple[str, str], Gate] = {
    ("layer_map", "rows_are_the_models"): Gate(
        "layer_map_mismatch",
        "high",
        "The table's rows were decoded with other norms than this model has at these layers.",
        "Run again with the model at hand; the table belongs to another one.",
    ),
    ("normalization_provenance", "norm_is_its_formula"): Gate(
        "norm_not_its_formula",
        "high",
        "A norm that decoded rows does not compute what its own formula says.",
        "Do not read this run; report the family, and check it with: layerscope check MODEL.",
    ),
    ("normalization_provenance", "norm_is_the_one_used"): Gate(
        "norm_not_the_models",
        "high",
        "The norm that decoded rows is not the one that the model itself applies there.",
        "Do not read this run; report the family, and check it with: layerscope check MODEL.",
    ),
    ("numeric_health", "finite"): Gate(
        "numeric_health_caution",
        "high",
        "NaN or infinity appeared at or before the milestones.",
        "Run again with --dtype float32, or bfloat16 instead of float16.",
    ),
    ("numeric_health", "no_overflow"): Gate(
        "near_overflow",
        "medium",
        "The residual comes close to the largest number of its dtype.",
        "Run again with --dtype bfloat16 or float32.",
    ),
    ("unembed_bias", "reading_owes_nothing_to_bias"): Gate(
        "reading_owed_to_bias",
        "medium",
        "The head's constant part, which no prompt moves, decides part of the reading.",
        "Quote the onset together with the one that is left without the constant part.",
    ),
    ("copy_mask", "answers_not_masked"): Gate(
        "copy_mask_error",
        "medium",
        "An answer is a token that the echo detectors ignore as punctuation or white space.",
        "Leave these facts out, or read them without L_copy.",
    ),
    ("copy_mask", "rows_judged_by_this_mask"): Gate(
        "copy_mask_error",
        "medium",
        "Rows of the table were judged by another set of ignored tokens than this version's.",
        "Run again, so that all rows are judged alike.",
    ),
    ("head_transforms", "last_row_exact"): Gate(
        "last_row_inexact",
        "low",
        "The last row of a lens is not exactly the model's own head.",
        "Rounding of a low-precision head explains less than 0.001 bits; try --dtype float32.",
    ),
    ("repeatability", "repeatable"): Gate(
        "repeatability_variance_high",
        "medium",
        "Clear first choices of a layer change when only the arithmetic does.",
        "Quote layers that agree across precisions, batch sizes and kernels; prefer --dtype "
        "float32.",
    ),
    ("repeatability_forward", "repeatability_forward_pass"): Gate(
        "repeatability_forward_disagreement",
        "high",
        "The onset moves, or vanishes, when only the arithmetic changes.",
        "Do not quote a single layer; give the range over the conditions that were compared.",
    ),
    ("repeatability_forward", "bit_equal"): Gate(
        "nondeterministic_env",
        "medium",
        "Two identical passes do not give the same bits.",
        "Turn on deterministic kernels, or run on a CPU, before comparing small differences.",
    ),
    ("decoding_point", "decoding_point_consistent"): Gate(
        "decoding_point_sensitive",
        "medium",
        "Whether the answer is first at the onset depends on which norm decodes the row.",
        "Name the norm with the layer, and give the onset under the others too.",
    ),
    ("gate_stability_small_scale", "gate_stable_under_rescaling"): Gate(
        "scale_sensitive_semantic_gate",
        "low",
        "The strong onset fails when all logits are scaled by 10% or less.",
        "Report L_semantic beside L_semantic_strong; the strong one lies at its thresholds.",
    ),
    ("lens_consistency", "lenses_agree"): Gate(
        "low_lens_consistency_at_semantic",
        "low",
        "At the onset another lens ranks other tokens first than the norm lens does.",
        "Name the lens with the layer; do not interpret the tokens below the first.",
    ),
    ("position_window", "position_window_stable"): Gate(
        "pos_window_low_stability",
        "low",
        "At the onset layer the model's choice is not yet first at most other positions.",
        "Do not generalise the layer from the last position to the rest of the text.",
    ),
    ("skip_layers_sanity", "no_worse_than_norm"): Gate(
        "tuned_lens_regression",
        "medium",
        "A fitted lens predicts held-out text worse than the norm lens where it replaces blocks.",
        "Report the norm lens; fit the other on more text.",
    ),
    ("tuned_audit", "tuned_gains_on_text"): Gate(
        "tuned_no_gain",
        "medium",
        "The tuned lens is no nearer to the model than the norm lens, on held-out text.",
        "Report the norm lens; fit the tuned one on more text.",
    ),
    ("tuned_audit", "tuned_gains_on_prompts"): Gate(
        "tuned_no_gain_on_prompts",
        "low",
        "On the prompts of this run the tuned lens is no nearer to the model than the norm lens.",
        "Report the norm lens for these prompts, or fit the tuned one on text like them.",
    ),
    ("tuned_audit", "tuned_is_more_than_calibration"): Gate(
        "tuned_is_calibration_only",
        "low",
        "What the tuned lens gains, one temperature per layer gains too.",
        "Use it for probabilities; do not count it as a second opinion on which token is first.",
    ),
    ("tuned_audit", "tuned_holds_at_later_positions"): Gate(
        "tuned_positions_ood",
        "low",
        "The tuned lens gains less at late positions, where it was not fitted.",
        "Fit it on positions up to the length of your prompts.",
    ),
    ("tuned_audit", "tuned_last_row_is_head"): Gate(
        "tuned_head_mismatch",
        "medium",
        "The tuned lens's last row is not the model's own head.",
        "Fit it again; its last translator must be the identity.",
    ),
    ("tau_norm_per_layer", "temperatures_settled"): Gate(
        "temperature_unsettled",
        "low",
        "At some layers no finite temperature is best: the lens says nothing of the model there.",
        "Do not read tempered probabilities at those layers.",
    ),
    ("prism_summary", "prism_beats_norm"): Gate(
        "prism_no_gain",
        "low",
        "The prism lens is no nearer to the model than the norm lens.",
        "Leave the prism lens out of conclusions, or fit it on more text.",
    ),
}

# Milestones rest on the primary lens, so NaN under another one says less.
OTHER_LENS_NOT_FINITE = Gate(
    "numeric_health_other_lens",
    "low",
    "NaN or infinity appeared under a lens that no milestone rests on.",
    "Do not compare with that lens at the layers named.",
)


def gates_of(section: Mapping[str, Any]) -> dict[str, bool | None]:
    """Return the gates of a section by name; both spellings, `gates` and `gate`, are read."""
    found: dict[str, bool | None] = {}
    for key in ("gate", "gates"):
        value = section.get(key)
        if isinstance(value, Mapping):
            found |= cast("Mapping[str, bool | None]", value)
    return found


def failed_gates(evidence: Evidence) -> Iterator[Reason]:
    """Every check of the model that failed, one reason per section and meaning."""
    for name in evidence.diagnostics:
        section = ran(evidence.diagnostics, name)
        if section is None:
            continue
        failed = [gate for gate, holds in gates_of(section).items() if holds is False]
        grouped: dict[Gate, list[str]] = {}
        for gate in failed:
            meaning = _meaning(name, gate, evidence.sections["primary_lens"])
            grouped.setdefault(meaning, []).append(gate)
        for meaning, gates in grouped.items():
            yield Reason(
                meaning.code,
                meaning.severity,
                meaning.message,
                {"gates": gates, **_behind(section), **_quoted(section)},
                meaning.action,
            )


def audit_flags(evidence: Evidence) -> Iterator[Reason]:
    """What an audit without gates says (published tables), in the words of its gates."""
    audit = ran(evidence.diagnostics, "tuned_audit")
    if audit is not None and not gates_of(audit) and audit.get("tuned_is_calibration_only"):
        meaning = GATES["tuned_audit", "tuned_is_more_than_calibration"]
        gains: Mapping[str, Any] = audit.get("rotation_vs_temperature") or {}
        yield Reason(meaning.code, meaning.severity, meaning.message, dict(gains), meaning.action)
    skipping = ran(evidence.diagnostics, "skip_layers_sanity")
    if skipping is not None and about_tuned(skipping) and skipping.get("tuned_lens_regression"):
        cost = cast("float", skipping["tuned_lens_skip_warning"])
        yield Reason(
            "tuned_lens_no_stand_in",
            "low",
            f"With the last blocks replaced by the tuned lens, perplexity rises by {cost:.0%}.",
            _numbers(skipping),
            "Read the tuned lens as a decoder of layers, not as a shorter model.",
        )


def about_tuned(skipping: Mapping[str, Any]) -> bool:
    """Say whether the figures of skipped layers are the tuned lens's; a run may have only norm."""
    return skipping.get("lens", "tuned") == "tuned"


def not_checked(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return what was not checked, by name, with the reason; failed checks are not among it."""
    diagnostics: Mapping[str, Any] = sections.get("diagnostics") or {}
    found: dict[str, str] = {}
    if not diagnostics:
        found["diagnostics"] = "the model was not looked at again"
    for name, section in diagnostics.items():
        if isinstance(section, Mapping):
            entry = cast("Mapping[str, Any]", section)
            if entry.get("status", "ok") != "ok":
                found[name] = str(entry.get("reason") or entry["status"])
                continue
            undecided = [gate for gate, holds in gates_of(entry).items() if holds is None]
            found |= {f"{name}: {gate}": "could not be decided" for gate in undecided}
    comparison: Mapping[str, Any] = sections.get("lens_comparison") or {}
    missing: Mapping[str, Any] = comparison.get("not_run") or {}
    for lens, entry in missing.items():
        found[f"{lens} lens"] = str(entry.get("reason") or entry.get("status") or "not run")
    return found


def preferred_lens(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return {lens, hint, reason} to report, after what the checks say of the tuned lens.

    A tuned lens is not reported when it only calibrates, does worse than the norm lens on held-out
    text, or does not end at the head.
    """
    primary: str = sections["primary_lens"]
    found: Mapping[str, str] = sections.get("preferred_lens") or {
        "lens": primary,
        "hint": primary,
        "reason": "no other lens was compared with it",
    }
    if found["lens"] != "tuned":
        return dict(found)
    diagnostics: Mapping[str, Any] = sections.get("diagnostics") or {}
    audit = ran(diagnostics, "tuned_audit") or {}
    skipping = ran(diagnostics, "skip_layers_sanity") or {}
    gates = gates_of(audit) | {
        gate: holds for gate, holds in gates_of(skipping).items() if gate.endswith(".tuned")
    }
    if (
        audit.get("tuned_is_calibration_only")
        or gates.get("tuned_is_more_than_calibration") is False
    ):
        hint, reason = "tuned_for_calibration_only", "the tuned lens only calibrates"
    elif gates.get("tuned_gains_on_text") is False:
        hint, reason = "norm", "the tuned lens is no nearer to the model on held-out text"
    elif gates.get("no_worse_than_norm.tuned") is False:
        hint, reason = "norm", "the tuned lens predicts held-out text worse than the norm lens"
    elif gates.get("tuned_last_row_is_head") is False:
        hint, reason = "norm", "the tuned lens does not end at the model's head"
    else:
        return dict(found)
    return {"lens": primary, "hint": hint, "reason": reason}


RULES = (failed_gates, audit_flags)


def _meaning(section: str, gate: str, primary: str) -> Gate:
    stem, _, lens = gate.partition(".")
    if (section, stem) == ("numeric_health", "finite") and lens != primary:
        return OTHER_LENS_NOT_FINITE
    return GATES.get((section, stem)) or _unlisted(section, gate)


def _unlisted(section: str, gate: str) -> Gate:
    words = gate.replace("_", " ").replace(".", ": ")
    return Gate(
        gate.split(".", 1)[0],
        "medium",
        f"The check '{words}' of {section.replace('_', ' ')} failed.",
        f"Look at {section} among the diagnostics of the summary before quoting this run.",
    )


def _behind(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers behind a failed gate.

    Where prompts are judged one by one, those of the first prompt that fails, and how many do: the
    section's own numbers are the first prompt's, which may well pass.
    """
    passes = cast("Sequence[Mapping[str, Any]]", section.get("passes") or ())
    failing = [entry for entry in passes if entry.get("gate") is False or _fails(entry)]
    if not failing:
        return _numbers(section)
    first = failing[0]
    named = {"prompts_that_fail": f"{len(failing)} of {len(passes)}", "first": first["fact_key"]}
    thresholds = section.get("thresholds")
    return named | _numbers(first) | ({"thresholds": thresholds} if thresholds else {})


def _fails(entry: Mapping[str, Any]) -> bool:
    return any(holds is False for holds in gates_of(entry).values())


def _numbers(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain numbers of a section's top level and its thresholds."""
    plain = {
        name: value
        for name, value in section.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in ("prompt_index", "passes_left_out", "d_vocab")
    }
    thresholds = section.get("thresholds")
    return plain | ({"thresholds": thresholds} if thresholds else {})


def _quoted(section: Mapping[str, Any]) -> dict[str, Any]:
    warnings = cast("Sequence[str]", section.get("warnings") or ())
    return {"warnings": list(warnings[:SHOWN])} if warnings else {}
