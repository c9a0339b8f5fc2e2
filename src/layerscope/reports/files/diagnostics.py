"""The "diagnostics" block of the JSON: the baseline pass and every check of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope.measures.guidance_diagnostics import about_tuned
from layerscope.measures.normalisation import layer_map, normalisation_provenance
from layerscope.measures.sections import ran, skipped, why_not
from layerscope.measures.table import PromptInfo
from layerscope.reports.files.view import View

# Checks that need the model again, and why a run without them has none.
_AGAIN = "the run made no checks that need the model again"
_CHECKS = (
    *("skip_layers_sanity", "gate_stability_small_scale", "repeatability", "repeatability_forward"),
    *("decoding_point", "lens_consistency", "position_window"),
)
_ROWS = ("variants", "positions")  # of the tuned audit: in files of their own
_NOT_BASELINE = ("prompt_index", "fact_key", "fact_index", "prompt_id", "prompt_variant", "lens")
_RAW_KEYS = ("raw_lens_window", "raw_lens_full")


def diagnostics(view: View, provenance: Mapping[str, Any], *, identity: str) -> dict[str, Any]:
    """Return the block; fields of the baseline pass stand at its top level, as before."""
    summary, config, prompt = view.summary, view.config, view.baseline_prompt
    baseline = {name: value for name, value in view.baseline.items() if name not in _NOT_BASELINE}
    alignment: Mapping[str, Any] = summary.get("gold_alignment") or {}
    model: Any = provenance.get("model")
    model = model if isinstance(model, Mapping) else {}
    raw = {
        name: dict(view.of_baseline(name)) or skipped("the raw or the norm lens was not run")
        for name in _RAW_KEYS
    }
    overlap = raw["raw_lens_full"].get("topk_overlap")
    return {
        "type": "diagnostics",
        "model": identity,
        "device": model.get("device"),
        "use_norm_lens": view.has("norm"),
        "unembed_dtype": model.get("dtype"),
        "norm_choice": view.table.meta.norm_choice,
        "context_prompt": prompt.text if prompt else None,
        "target_prediction": prompt.answer if prompt else None,
        "surface_diagnostics_config": {
            "delta": config.surface_delta,
            "gamma": config.geom_gamma,
            "K": config.topk_decay_k,
            "tau": config.topk_decay_tau,
            "semantic_margin": {"delta_abs": config.semantic_margin},
            "semantic_gate": {"delta_top2_logit": config.semantic_gap},
        },
        "answer_margin_unit": "logit",
        "unembed_bias": summary.get("unembed_bias")
        or skipped("the table does not describe the unembedding bias"),
        "flags": _flags(summary),
        "copy_soft_config": {
            "threshold": config.copy_soft_threshold,
            "window_ks": list(config.copy_soft_window_ks),
            "extra_thresholds": list(config.copy_soft_extra_thresholds),
        },
        "copy_mask": ran(view.sections, "copy_mask") or summary.get("copy_mask"),
        **baseline,
        **_tuned_fields(view),
        **raw,
        "topk_overlap": overlap or skipped("the raw or the norm lens was not run"),
        "config": {"lens_artifact_score": _score_config(view), "measures": summary.get("config")},
        "normalization_provenance": ran(view.sections, "normalization_provenance")
        or normalisation_provenance(
            view.baseline_part,
            arch=view.table.meta.architecture,
            strategy=view.table.meta.norm_choice,
        ),
        "layer_map": layer_map(view.baseline_part),
        "numeric_health": _health(summary),
        "gold_alignment": gold_alignment(prompt) if prompt else skipped("no prompt is known"),
        "gold_alignment_rate": alignment.get("rate"),
        "gold_alignment_prompts": [
            {
                "prompt_id": item.prompt_id,
                "prompt_variant": item.prompt_variant,
                **gold_alignment(item),
                "string": item.answer,
                "fact_key": item.fact_key,
                "fact_index": item.fact_index,
            }
            for item in view.table.passes()
        ],
        "last_layer_consistency": last_row(view),
        "confirmed_semantics": dict(view.confirmed),
        "L_semantic_confirmed": view.confirmed.get("L_semantic_confirmed"),
        "micro_suite": summary.get("micro_suite"),
        "norm_trajectory": summary.get("norm_trajectory"),
        **_other_lenses(view),
        **{name: check(view, name) for name in _CHECKS},
    }


def check(view: View, name: str) -> dict[str, Any]:
    """Return a check of the model that ran, or {status, reason}; its tables are left out."""
    section = ran(view.sections, name)
    if section is None:
        return why_not(view.sections, name, _AGAIN)
    return {key: value for key, value in section.items() if key not in _ROWS}


def _other_lenses(view: View) -> dict[str, Any]:
    """Return what is known of the prism, tuned and temperature lenses."""
    summary = view.summary
    skips = ran(view.sections, "skip_layers_sanity") or {}
    tau: Mapping[str, Any] = summary.get("tau_norm_per_layer") or {}
    tuned: Mapping[str, Any] = summary.get("tuned_lens") or skipped("no tuned lens was run")
    found = {
        "prism_summary": dict(summary.get("prism_summary") or skipped("no prism lens was run")),
        "tuned_lens": {name: tuned[name] for name in ("status", "reason") if name in tuned},
        "tau_norm_per_layer": tau.get("values")
        or skipped(str(tau.get("reason") or "no temperature per row was fitted")),
    }
    if about_tuned(skips):
        flags = ("tuned_lens_regression", "tuned_lens_skip_warning")
        found |= {name: skips[name] for name in flags if name in skips}
    return found


def _tuned_fields(view: View) -> dict[str, Any]:
    """Return the baseline's fields under the tuned lens that carry its name."""
    index = view.baseline["prompt_index"]
    entry: Mapping[str, Any] = next(
        (
            item
            for item in view.summary["passes"]
            if item["lens"] == "tuned" and item["prompt_index"] == index
        ),
        {},
    )
    return {name: value for name, value in entry.items() if name.endswith("_tuned")}


def gold_alignment(prompt: PromptInfo) -> dict[str, Any]:
    """Return how the answer of a prompt was aligned with its tokens."""
    return {
        "ok": prompt.alignment_status == "ok",
        "status": prompt.alignment_status,
        "variant": prompt.answer_variant,
        "first_id": prompt.answer_ids[0] if prompt.answer_ids else None,
        "answer_ids": list(prompt.answer_ids),
        "pieces": list(prompt.answer_pieces),
    }


def last_row(view: View) -> dict[str, Any]:
    """Return how the last row of the baseline pass compares with the model's head."""
    index = view.baseline["prompt_index"]
    entries: list[Mapping[str, Any]] = view.summary.get("last_layer_consistency") or []
    found = next((entry for entry in entries if entry["prompt_index"] == index), None)
    if found is None:
        return skipped("the last row was not compared with the head")
    heads: Mapping[str, Any] = ran(view.sections, "head_transforms") or {}
    rows: list[Mapping[str, Any]] = heads.get("at") or []
    after = [
        row["kl_after_transform_bits"]
        for row in rows
        if (row["prompt_index"], row["lens"]) == (index, view.baseline["lens"])
    ]
    nothing = dict.fromkeys(("scale", "softcap", "scale_then_softcap"))
    return {**found, "kl_after_transform_bits": after[0] if after else nothing}


def _flags(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the guidance reasons as flags that are true."""
    guidance: Mapping[str, Any] = summary.get("measurement_guidance") or {}
    return {reason["code"]: True for reason in guidance.get("reasons") or ()}


def _score_config(view: View) -> dict[str, Any]:
    config = view.config
    names = ("pct_ge_1.0", "norm_only", "max_kl_scaled")
    return {
        "weights": dict(zip(names, config.score_weights, strict=True)),
        "thresholds": dict(zip(("low", "high"), config.score_tiers, strict=True)),
        "v2_addends": dict(zip(("js_p50", "l1_p50"), config.score_v2_addends, strict=True)),
    }


def _health(summary: Mapping[str, Any]) -> dict[str, Any]:
    health: dict[str, Any] = dict(summary.get("numeric_health") or {})
    # NaN and infinity are counted together; where there is neither, both old names are known.
    separate = None if health.get("any_nonfinite") or not health.get("checked") else False
    return {"any_nan": separate, "any_inf": separate, **health}
