"""The JSON of one model: the earlier system's key tree, from whatever lenses and checks were run.

Added to it: "schema_version", "status", "model", "files", "given" and "left_out" under "prompts",
and under "passes" every milestone of every pass with its first, stable and lost rows (null when it
was not reached). A stage that this version does not have is `{"status": "skipped", "reason": ...}`,
never a silent null. Names that earlier plans and code put in different places ("summary" and
"diagnostics") are in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerscope.measures.compat import other_lenses
from layerscope.measures.config import decimal
from layerscope.measures.copy import flag_columns
from layerscope.measures.guidance_diagnostics import gates_of
from layerscope.measures.sections import skipped
from layerscope.measures.table import PromptInfo
from layerscope.reports.files.diagnostics import check, diagnostics, gold_alignment, last_row
from layerscope.reports.files.view import View, soft_copy

SCHEMA_VERSION = 1
FINAL_TOP = 20
_LABELS = (
    "prompt_index",
    "fact_key",
    "fact_index",
    "prompt_id",
    "prompt_variant",
    "prompt_sha256",
    "lens",
)


def failure(model: str, error: str) -> dict[str, Any]:
    """Return the document of a model that could not be run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "failed",
        "model": model,
        "error": " ".join(error.split()),
    }


def document(
    view: View, provenance: Mapping[str, Any], *, identity: str, files: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document of a finished model; `files` maps what was written to file names."""
    entry, prompt = view.baseline, view.baseline_prompt
    details = diagnostics(view, provenance, identity=identity)
    summary = _summary(view, details)
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "ok",
        "model": identity,
        "files": dict(files),
        "prompt": _prompt(prompt),
        "test_prompts": skipped("fixed test prompts are not part of this experiment"),
        "temperature_exploration": skipped("no temperatures other than 1 are explored"),
        "final_prediction": _final_prediction(prompt),
        "model_stats": _model_stats(view),
        "raw_lens_check": dict(view.of_baseline("raw_lens_check"))
        or skipped("the raw or the norm lens was not run"),
        "prompts": {
            "facts_micro_suite": list(
                dict.fromkeys(
                    item.fact_key for item in view.table.passes() if item.fact_key is not None
                )
            ),
            **(view.summary.get("prompts") or {}),
        },
        "provenance": {**provenance, "env": _environment(provenance)},
        "copy_flag_columns": flag_columns(view.config),
        "gold_answer": _gold(prompt),
        "control_prompt": _control(view),
        "control_summary": view.summary.get("control_summary")
        or skipped("the prompts hold no control"),
        "ablation_summary": dict(view.of_baseline("ablation_summary"))
        or skipped("the baseline prompt has no ablated wording"),
        "diagnostics": details,
        "tuned_lens": _tuned(view),
        "summary": summary,
        "micro_suite": _micro_suite(view),
        "measurement_guidance": _guidance(view),
        "evaluation_pack": _evaluation_pack(view, files),
        "lens": entry["lens"],
        "passes": [_pass(item) for item in view.summary["passes"]],
    }


def _prompt(prompt: PromptInfo | None) -> dict[str, Any]:
    return {
        "type": "prompt",
        "context_prompt": prompt.text if prompt else None,
        "ground_truth": prompt.answer if prompt else None,
        "fact_key": prompt.fact_key if prompt else None,
        "fact_index": prompt.fact_index if prompt else None,
    }


def _final_prediction(prompt: PromptInfo | None) -> dict[str, Any]:
    head = prompt.head if prompt else None
    if head is None:
        return {"type": "final_prediction", **skipped("the table does not hold the model's head")}
    pairs = zip(head.top_tokens, head.top_probs, strict=False)
    return {
        "type": "final_prediction",
        "entropy": head.entropy_bits,
        "topk": [[token, probability] for token, probability in pairs][:FINAL_TOP],
    }


def _model_stats(view: View) -> dict[str, Any]:
    meta = view.table.meta
    return {
        "type": "model_stats",
        "num_layers": meta.n_layers,
        "d_model": meta.d_model,
        "n_heads": meta.n_heads,
        "d_vocab": meta.d_vocab,
        "n_ctx": meta.n_ctx,
        "architecture": meta.architecture,
    }


def _environment(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the earlier system's names for the provenance; unknown values are left out."""
    versions: Mapping[str, Any] = provenance.get("versions") or {}
    machine: Mapping[str, Any] = provenance.get("machine") or {}
    model: Any = provenance.get("model")
    model = model if isinstance(model, Mapping) else {}
    config: Mapping[str, Any] = provenance.get("config") or {}
    found: dict[str, Any] = {
        "torch_version": versions.get("torch"),
        "python": versions.get("python"),
        "platform": machine.get("platform"),
        "cuda_version": machine.get("cuda_version"),
        "deterministic_algorithms": machine.get("deterministic_algorithms"),
        "device": model.get("device"),
        "dtype_compute": model.get("dtype"),
        "seed": config.get("seed"),
    }
    env: Mapping[str, Any] = provenance.get("env") or {}
    return {name: value for name, value in found.items() if value is not None} | dict(env)


def _gold(prompt: PromptInfo | None) -> dict[str, Any]:
    if prompt is None:
        return skipped("the table does not hold the prompt")
    return {
        "string": prompt.answer,
        "pieces": list(prompt.answer_pieces),
        "first_id": prompt.answer_ids[0] if prompt.answer_ids else None,
        "answer_ids": list(prompt.answer_ids),
        "variant": prompt.answer_variant,
    }


def _control(view: View) -> dict[str, Any]:
    control = next((item for item in view.table.passes() if item.prompt_id == "ctl"), None)
    if control is None:
        return skipped("the prompts hold no control")
    return {
        "context_prompt": control.text,
        "gold_answer": _gold(control),
        "gold_alignment": gold_alignment(control),
        "foil": control.foil,
    }


def _micro_suite(view: View) -> dict[str, Any]:
    suite: Mapping[str, Any] = view.summary.get("micro_suite") or {}
    return {"facts": suite.get("facts", []), "aggregates": suite.get("aggregates", {})}


def _summary(view: View, details: Mapping[str, Any]) -> dict[str, Any]:
    entry = view.baseline
    names = ("semantic_margin", "semantic_gate", "cos_milestones", "depth_fractions")
    return {
        **{name: entry.get(name) for name in (*names, "copy_thresholds")},
        "confirmed_semantics": dict(view.confirmed),
        "entropy": _entropy(entry),
        "micro_suite": _micro_suite(view)["aggregates"],
        "position_window": details["position_window"],
    }


def _entropy(entry: Mapping[str, Any]) -> dict[str, Any]:
    percentiles: Mapping[str, Any] = entry.get("entropy_gap_bits_percentiles") or {}
    return {f"entropy_gap_bits_{name}": percentiles.get(name) for name in ("p25", "p50", "p75")}


def _guidance(view: View) -> dict[str, Any]:
    """Return the guidance; `reasons` are codes as before, `reason_details` says the rest."""
    guidance: Mapping[str, Any] = view.summary.get("measurement_guidance") or {}
    reasons: Sequence[Mapping[str, Any]] = guidance.get("reasons") or ()
    return {
        **guidance,
        "reasons": [reason["code"] for reason in reasons],
        "reason_details": [dict(reason) for reason in reasons],
        "notes": guidance.get("notes", ""),
        "notes_append": "",
    }


def _evaluation_pack(view: View, files: Mapping[str, str]) -> dict[str, Any]:
    guidance: Mapping[str, Any] = view.summary.get("measurement_guidance") or {}
    alignment: Mapping[str, Any] = view.summary.get("gold_alignment") or {}
    suite: Mapping[str, Any] = view.summary.get("micro_suite") or {}
    prompt = view.baseline_prompt
    return {
        "model": view.table.meta.model,
        "n_layers": view.table.meta.n_layers,
        "preferred_lens_for_reporting": guidance.get("preferred_lens_for_reporting"),
        "use_confirmed_semantics": guidance.get("use_confirmed_semantics"),
        "milestones": _pack_milestones(view),
        "artifact": _pack_artifact(view),
        "repeatability": _repeatability(view),
        "alignment": {
            "gold_alignment_rate": alignment.get("rate"),
            "variant": prompt.answer_variant if prompt else None,
        },
        "norm_trajectory": view.summary.get("norm_trajectory"),
        "entropy": _entropy(view.baseline),
        "last_layer_consistency": last_row(view),
        "tuned_audit": _picked(
            check(view, "tuned_audit"),
            (
                *("rotation_vs_temperature", "positional", "head_mismatch"),
                *("tuned_is_calibration_only", "preferred_semantics_lens_hint"),
            ),
        ),
        "citations": {"layers": _cited_rows(view), "files": dict(files)},
        "micro_suite": {
            **_micro_suite(view),
            "citations": suite.get("citations", {}),
        },
    }


def _picked(section: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return some fields of a check, or why it did not run."""
    if section.get("status", "ok") != "ok":
        return dict(section)
    return {name: section.get(name) for name in names}


def _repeatability(view: View) -> dict[str, Any]:
    """Return how far first tokens moved; the flag is up when a gate of the check fails.

    The check's gates look at clear first tokens only, its figures at all rows.
    """
    section = check(view, "repeatability")
    found = _picked(section, ("max_rank_dev", "p95_rank_dev", "top1_flip_rate", "flag"))
    gates = gates_of(section)
    if gates:
        failed = any(holds is False for holds in gates.values())
        found["flag"] = "repeatability_variance_high" if failed else "ok"
    return found


def _tuned(view: View) -> dict[str, Any]:
    """Return the tuned lens in the published shape, with how it was made."""
    found: dict[str, Any] = other_lenses(view.summary)["tuned_lens"]
    made: Mapping[str, Any] = view.table.meta.lenses.get("tuned") or {}
    return found | ({"provenance": dict(made)} if made and found["status"] == "loaded" else {})


def _pack_milestones(view: View) -> dict[str, Any]:
    entry, confirmed = view.baseline, view.confirmed
    k, layer = soft_copy(entry)
    facts: Sequence[Mapping[str, Any]] = (view.summary.get("micro_suite") or {}).get("facts") or ()
    own = next((fact for fact in facts if fact["fact_key"] == entry["fact_key"]), {})
    fractions: Mapping[str, Any] = entry.get("depth_fractions") or {}
    return {
        "L_copy_strict": entry.get("L_copy"),
        "L_copy_soft": {"k": k, "layer": layer},
        "L_semantic_norm": entry.get("L_semantic"),
        "L_semantic_confirmed": {
            "layer": confirmed.get("L_semantic_confirmed"),
            "source": confirmed.get("confirmed_source"),
        },
        "depth_fractions": {
            "copy_strict_frac": fractions.get("L_copy_strict_frac"),
            "semantic_frac": fractions.get("L_semantic_frac"),
            "delta_hat": own.get("delta_hat"),
        },
    }


def _pack_artifact(view: View) -> dict[str, Any]:
    full = view.of_baseline("raw_lens_full")
    if not full:
        return skipped("the raw or the norm lens was not run")
    score, overlap = full.get("score") or {}, full.get("topk_overlap") or {}
    high = decimal(view.config.raw_kl_high_bits)
    return {
        "lens_artifact_score": score.get("lens_artifact_score"),
        "lens_artifact_score_v2": score.get("lens_artifact_score_v2"),
        "js_divergence_p50": (full.get("js_divergence_percentiles") or {}).get("p50"),
        "l1_prob_diff_p50": (full.get("l1_prob_diff_percentiles") or {}).get("p50"),
        **_labelled(full, "first_js_le_", "first_l1_le_"),
        "jaccard_raw_norm_p50": overlap.get("jaccard_raw_norm_p50"),
        **_labelled(overlap, "first_jaccard_raw_norm_ge_"),
        f"pct_layers_kl_ge_{high}": full.get(f"pct_layers_kl_ge_{high}"),
        "n_norm_only_semantics_layers": full.get("n_norm_only_semantics_layers"),
        "earliest_norm_only_semantic": full.get("earliest_norm_only_semantic"),
        "risk_tier": score.get("tier"),
    }


def _labelled(fields: Mapping[str, Any], *stems: str) -> dict[str, Any]:
    """Return the fields whose names end with their threshold, whatever that is."""
    return {name: value for name, value in fields.items() if name.startswith(stems)}


def _cited_rows(view: View) -> dict[str, Any]:
    """Return the data rows of the pure-next-token file where the baseline's milestones lie."""
    entry = view.baseline
    return {
        "L_copy_strict_row": view.cite(entry.get("L_copy")),
        "L_copy_soft_row": view.cite(soft_copy(entry)[1]),
        "L_semantic_norm_row": view.cite(entry.get("L_semantic")),
        "L_semantic_confirmed_row": view.cite(view.confirmed.get("L_semantic_confirmed")),
    }


def _pass(entry: Mapping[str, Any]) -> dict[str, Any]:
    found: Mapping[str, Mapping[str, Any]] = entry.get("milestones") or {}
    reached = {name: dict(item) for name, item in found.items() if item["first"] is not None}
    return {
        **{name: entry.get(name) for name in _LABELS},
        "milestones": dict.fromkeys(found) | reached,
    }
