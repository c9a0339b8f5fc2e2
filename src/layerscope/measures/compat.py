"""A summary under the names and in the shapes that the earlier system published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope.measures.sections import ran, skipped, why_not

AUDIT_ROWS = ("variants", "positions")  # of the audit: tables, written to files of their own

# Sections that we keep per fact and that were published for the first fact only.
PER_FACT = (
    "confirmed_semantics",
    "raw_lens_check",
    "raw_lens_window",
    "raw_lens_full",
    "ablation_summary",
)
SHARED = (
    "control_summary",
    "norm_trajectory",
    "numeric_health",
    "micro_suite",
    "unembed_bias",
    "copy_mask",
    "measurement_guidance",
)


def published_fields(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the baseline's fields and checks, flat, under their published names.

    `summary` is what `Summary.to_dict` returned. Corrected values stand under the published names.
    """
    base: dict[str, Any] = summary["passes"][summary["baseline"]]
    key: str = base["fact_key"] or f"prompt {base['prompt_index']}"
    fields = dict(base)
    for name in PER_FACT:
        fields[name] = summary[name].get(key)
    for name in SHARED:
        fields[name] = summary[name]
    fields["last_layer_consistency"] = next(
        (
            entry
            for entry in summary["last_layer_consistency"]
            if entry["prompt_index"] == base["prompt_index"]
        ),
        None,
    )
    alignment = summary["gold_alignment"]
    fields["gold_alignment_rate"] = alignment["rate"]
    return fields | _configs(summary["config"])


def published_document(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return one document: published names at the top, every pass and every fact below.

    What the earlier system published for its first fact stands at the top level in the published
    shape; `passes`, `per_fact` and `per_prompt` hold the same for all.
    """
    shown = set(PER_FACT) | set(SHARED) | {"last_layer_consistency"}
    rest = {name: value for name, value in summary.items() if name not in shown}
    return {
        **published_fields(summary),
        **rest,
        **other_lenses(summary),
        "per_fact": {name: summary[name] for name in PER_FACT},
        "per_prompt": {"last_layer_consistency": summary["last_layer_consistency"]},
    }


def other_lenses(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the tuned lens and of other positions, in the published shape.

    What did not run is {status, reason}.
    """
    sections: Mapping[str, Any] = summary.get("diagnostics") or {}
    tuned: dict[str, Any] = dict(summary.get("tuned_lens") or skipped("no tuned lens was run"))
    audit, window = ran(sections, "tuned_audit"), ran(sections, "position_window")
    if tuned.get("status") == "ok":
        tuned |= {"status": "loaded", "summary": {"metrics": tuned["metrics"]}}
    tuned["audit_summary"] = (
        why_not(sections, "tuned_audit", "the tuned lens was not audited")
        if audit is None
        else {name: value for name, value in audit.items() if name not in AUDIT_ROWS}
    )
    return {
        "tuned_lens": tuned,
        "position_window": dict(window)
        if window is not None
        else why_not(sections, "position_window", "the ranks at other positions are not known"),
    }


def _configs(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "surface_diagnostics_config": {
            "delta": config["surface_delta"],
            "gamma": config["geom_gamma"],
            "K": config["topk_decay_k"],
            "tau": config["topk_decay_tau"],
            "semantic_margin": {"delta_abs": config["semantic_margin"]},
            "semantic_gate": {"delta_top2_logit": config["semantic_gap"]},
        },
        "copy_soft_config": {
            "threshold": config["copy_soft_threshold"],
            "window_ks": config["copy_soft_window_ks"],
            "extra_thresholds": config["copy_soft_extra_thresholds"],
        },
        "answer_margin_unit": "logit",
    }
