"""Published models through our measures: every milestone, equal or corrected, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from golden.published_case import MODELS, at, case, leaves, same

pytestmark = [pytest.mark.golden, pytest.mark.parametrize("model", MODELS)]

TAUS = ("0.7", "0.8", "0.9", "0.95")
PERCENTILES = ("p25", "p50", "p75")

# What the published rows determine and the published summary holds: (what, JSON paths).
LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("strict copy", ("L_copy", "copy_detector/strict/L_copy_strict", "delta_layers")),
    ("entropy collapse", ("L_copy_H",)),
    ("onset", ("L_semantic",)),
    ("KL thresholds", ("first_kl_below_0.5", "first_kl_below_1.0")),
    ("rank thresholds", ("first_rank_le_1", "first_rank_le_5", "first_rank_le_10")),
    ("soft copy", tuple(f"L_copy_soft/{k}" for k in "123")),
    ("soft copy, detector", tuple(f"copy_detector/soft/L_copy_soft/k{k}" for k in "123")),
    ("soft copy, deltas", tuple(f"delta_layers_soft/{k}" for k in "123")),
    (
        "copy deltas",
        (
            "copy_detector/deltas/Δ_sem_minus_copy_strict",
            "copy_detector/deltas/Δ_sem_minus_copy_soft",
        ),
    ),
    ("copy sweep", tuple(f"copy_thresholds/L_copy_strict/{tau}" for tau in TAUS)),
    ("copy sweep, depth", tuple(f"copy_thresholds/L_copy_strict_frac/{tau}" for tau in TAUS)),
    ("copy sweep, raw", tuple(f"copy_thresholds/norm_only_flags/{tau}" for tau in TAUS)),
    (
        "surface to meaning",
        (
            "L_surface_to_meaning_norm",
            "answer_mass_at_L_surface_norm",
            "echo_mass_at_L_surface_norm",
        ),
    ),
    (
        "geometry",
        ("L_geom_norm", "cos_to_answer_at_L_geom_norm", "cos_to_prompt_max_at_L_geom_norm"),
    ),
    ("top-k decay", ("L_topk_decay_norm", "topk_prompt_mass_at_L_norm")),
    ("cosine", tuple(f"cos_milestones/norm/ge_{t}" for t in ("0.2", "0.4", "0.6"))),
    (
        "depth fractions",
        tuple(
            f"depth_fractions/{name}_frac"
            for name in (
                "L_semantic",
                "first_rank_le_5",
                "L_copy_strict",
                "L_copy_soft_k1",
                "L_copy_soft_k2",
                "L_copy_soft_k3",
                "L_semantic_run2",
            )
        ),
    ),
    ("entropy gap", tuple(f"entropy_gap_bits_percentiles/{p}" for p in PERCENTILES)),
    ("entropy gap, rows", ("entropy_gap_samples",)),
    (
        "margin",
        (
            "L_semantic_margin_ok",
            "semantic_margin/delta_abs",
            "semantic_margin/p_uniform",
            "semantic_margin/L_semantic_margin_ok_norm",
            "semantic_margin/margin_ok_at_L_semantic_norm",
            "semantic_margin/p_answer_at_L_semantic_norm",
            "semantic_margin/L_semantic_confirmed_margin_ok_norm",
        ),
    ),
    ("run of two", ("semantic_gate/L_semantic_run2",)),
    ("run of two, window", ("semantic_gate/run2_overlaps_confirmed_window",)),
    (
        "control",
        (
            "control_summary/first_control_margin_pos",
            "control_summary/max_control_margin",
            "control_summary/first_control_strong_pos",
            "control_summary/max_control_top2_logit_gap",
            "control_summary/delta_top2_logit_ctl",
        ),
    ),
    ("ablation", ("ablation_summary",)),
    (
        "last row",
        (
            "last_layer_consistency/kl_to_final_bits",
            "last_layer_consistency/p_top1_lens",
            "last_layer_consistency/p_answer_lens",
            "last_layer_consistency/answer_rank_lens",
            "last_layer_consistency/warn_high_last_layer_kl",
            "last_layer_consistency/gates/warn_high_last_layer_kl",
            "last_layer_consistency/gates/threshold_bits",
        ),
    ),
    ("tempered KL by depth", tuple(f"kl_to_final_bits_norm_temp@{q}%" for q in (25, 50, 75))),
    (
        "raw, sweep",
        tuple(
            f"raw_lens_full/{name}"
            for name in (
                "pct_layers_kl_ge_1.0",
                "pct_layers_kl_ge_0.5",
                "n_norm_only_semantics_layers",
                "earliest_norm_only_semantic",
                "max_kl_norm_vs_raw_bits",
                "js_divergence_percentiles",
                "l1_prob_diff_percentiles",
                "first_js_le_0.1",
                "first_l1_le_0.5",
                "teacher_entropy_bits",
                "topk_overlap/K",
                "topk_overlap/jaccard_raw_norm_p50",
                "topk_overlap/first_jaccard_raw_norm_ge_0.5",
                "score",
                "mode",
            )
        ),
    ),
    ("raw, window", ("raw_lens_window",)),
    ("raw, spot checks", ("raw_lens_check/mode", "raw_lens_check/summary")),
    (
        "confirmed",
        (
            "L_semantic_confirmed",
            *(
                f"confirmed_semantics/{name}"
                for name in (
                    "L_semantic_norm",
                    "L_semantic_raw",
                    "L_semantic_tuned",
                    "Δ_window",
                    "L_semantic_confirmed",
                    "confirmed_source",
                )
            ),
        ),
    ),
    (
        "facts",
        tuple(
            f"micro_suite/facts/{i}/{name}"
            for i in range(5)
            for name in (
                "fact_key",
                "fact_index",
                "L_copy_strict",
                "L_copy_soft_k1",
                "L_semantic_norm",
                "L_semantic_margin_ok_norm",
                "delta_hat",
                "row_index",
            )
        ),
    ),
    (
        "facts, aggregates",
        tuple(
            f"micro_suite/aggregates/{name}"
            for name in (
                "n",
                "L_copy_strict_median",
                "L_copy_soft_k1_median",
                "L_semantic_norm_median",
                "L_semantic_margin_ok_norm_median",
                "delta_hat_median",
                "L_semantic_norm_iqr",
                "n_missing",
            )
        ),
    ),
    ("facts, citations", ("micro_suite/citations/fact_rows",)),
    ("trajectory", ("norm_trajectory/n_spikes", "norm_trajectory/shape")),
    ("trajectory, rows", ("norm_trajectory/sampled_layers",)),
    (
        "prism",
        tuple(
            f"prism_summary/metrics/{name}/{side}"
            for name in ("rank_milestones", "kl_bits_at_percentiles", "first_kl_le_1.0")
            for side in ("baseline", "prism", "delta")
        ),
    ),
    (
        "tuned",
        tuple(
            f"tuned_lens/summary/metrics/{name}/{side}"
            for name in ("rank_milestones", "kl_bits_at_percentiles", "first_kl_le_1.0")
            for side in ("baseline", "tuned", "delta")
        ),
    ),
    (
        "attribution",
        (
            *(
                f"tuned_lens/attribution/percentiles/{p}/{name}"
                for p in PERCENTILES
                for name in ("ΔKL_tuned", "ΔKL_temp", "ΔKL_rot")
            ),
            "tuned_lens/attribution/prefer_tuned",
        ),
    ),
    (
        "tuned audit",
        (
            *(
                f"tuned_lens/audit_summary/rotation_vs_temperature/delta_kl_{name}"
                for name in (
                    *(f"{part}_{p}" for part in ("rot", "temp") for p in PERCENTILES),
                    *("interaction_p50", "tuned_p50"),
                )
            ),
            "tuned_lens/audit_summary/tuned_is_calibration_only",
            "tuned_lens/audit_summary/preferred_semantics_lens_hint",
        ),
    ),
    ("tuned audit, positions", ("tuned_lens/audit_summary/positional",)),
    (
        "position window",
        tuple(f"position_window/{name}" for name in ("grid", "n_positions")),
    ),
    ("alignment", ("gold_alignment_rate",)),
    ("configuration", ("surface_diagnostics_config", "copy_soft_config", "answer_margin_unit")),
)

# Published as null by mistake (the gap never reached the summary), and what the rows say.
GAP = {
    "Meta-Llama-3-8B": {
        "semantic_gate/L_semantic_top2_ok_norm": 26,
        "semantic_gate/L_semantic_top2_ok_norm_frac": 0.812,
        "semantic_gate/L_semantic_strong": 32,
        "semantic_gate/L_semantic_strong_run2": None,
        "answer_margin_thresholds/gap_ge_0.5": 26,
        "answer_margin_thresholds/gap_ge_1.0": 32,
        "depth_fractions/L_semantic_strong_frac": 1.0,
        "depth_fractions/L_semantic_strong_run2_frac": None,
    },
    "gemma-2-9b": {
        "semantic_gate/L_semantic_top2_ok_norm": 42,
        "semantic_gate/L_semantic_top2_ok_norm_frac": 1.0,
        "semantic_gate/L_semantic_strong": 42,
        "semantic_gate/L_semantic_strong_run2": None,
        "answer_margin_thresholds/gap_ge_0.5": 42,
        "answer_margin_thresholds/gap_ge_1.0": 42,
        "depth_fractions/L_semantic_strong_frac": 1.0,
        "depth_fractions/L_semantic_strong_run2_frac": None,
    },
}
GAP_AT = "semantic_gate/gap_at_L_semantic_norm"
STABILITY = "copy_thresholds/stability"

# In the published summary from sources that its tables do not hold: null here.
NOT_IN_TABLES = (
    "norm_trajectory/slope",
    "norm_trajectory/r2",
    "numeric_health/max_abs_logit_p99",
    "numeric_health/min_prob_p01",
    "copy_mask/size",
    "last_layer_consistency/top1_agree",
    "last_layer_consistency/p_top1_model",
    "last_layer_consistency/temp_est",
    "last_layer_consistency/kl_after_temp_bits",
    "last_layer_consistency/gates/delta_kl_temp_bits",
)
# Not measurements: the model's short name, and the reworked guidance. The position window is the
# last fact's, and was shown as the first one's: see below.
WINDOW = ("L_semantic_norm", "rank1_frac")
OTHERWISE = (
    *("model", "measurement_guidance/"),
    *(f"{at}position_window/{name}" for at in ("", "diagnostics/") for name in WINDOW),
)


@pytest.mark.parametrize(("what", "paths"), LINES, ids=[what for what, _ in LINES])
def test_published_value_is_reproduced(model: str, what: str, paths: tuple[str, ...]) -> None:
    found = case(model)
    different = {
        path: (at(found.ours, path), at(found.published, path))
        for path in paths
        if not same(at(found.ours, path), at(found.published, path))
    }
    assert not different, f"{what}: (ours, published) {different}"


def test_corrected_values(model: str) -> None:
    found = case(model)
    for path, expected in GAP[model].items():
        assert same(at(found.ours, path), expected), path
        assert at(found.published, path) is None, path
    rows = [row for row in found.rows("-pure-next-token.csv") if _is_baseline(row)]
    onset = next(row for row in rows if row["is_answer"] == "True")
    gap = onset["answer_logit_gap"]
    assert gap is not None
    assert same(at(found.ours, GAP_AT), float(gap))


def test_corrected_stability(model: str) -> None:
    found = case(model)
    expected = {"Meta-Llama-3-8B": "none", "gemma-2-9b": "stable"}
    assert at(found.ours, STABILITY) == expected[model]
    assert at(found.published, STABILITY) == {"gemma-2-9b": "mixed"}.get(model, "none")


def test_the_audit_is_that_of_the_last_fact(model: str) -> None:
    # It was shown as the first fact's; its baseline divergences are those of the last one's rows.
    found = case(model)
    audit, window = (found.ours["diagnostics"][name] for name in ("tuned_audit", "position_window"))
    assert audit["fact_key"] == window["fact_key"] == "Canada→Ottawa"
    assert audit["prompt_index"] == window["prompt_index"] == 8
    n = found.table.meta.n_layers
    last = found.table.last(lens="norm", prompt_index=8)["kl_to_final_bits"].to_list()
    assert [row["kl_bits_baseline"] for row in audit["variants"]] == pytest.approx(last[1:])
    assert len(audit["variants"]) == n
    assert len(audit["positions"]) == n * len(window["grid"])
    tuned = found.table.last(lens="tuned", prompt_index=8)["kl_to_final_bits"].to_list()
    assert [row["kl_bits_tuned"] for row in audit["variants"]] == pytest.approx(tuned)


def test_ranks_are_published_at_one_position_only(model: str) -> None:
    # So the share was at most 1 in 6; here it is over known ranks, and one of them decides nothing.
    found = case(model)
    window = found.ours["position_window"]
    assert window["L_semantic_norm"] == found.ours["micro_suite"]["facts"][4]["L_semantic_norm"]
    assert (window["n_known"], window["n_positions"], window["rank1_frac"]) == (1, 6, 1.0)
    assert window["gate"] == {"position_window_stable": None}
    onset = found.ours["L_semantic"]  # of the first fact, which the publisher looked up
    ranks = [
        row["answer_rank_baseline"]
        for row in found.rows("-positions-tuned-audit.csv")
        if row["layer"] == str(onset)
    ]
    assert len(ranks) == window["n_positions"]
    share = ranks.count("1") / len(ranks)
    assert share == at(found.published, "position_window/rank1_frac")


def test_the_tuned_pass_of_the_first_fact(model: str) -> None:
    """Every milestone of the first of the published tuned summaries, from the tuned rows."""
    found = case(model)
    ours = next(
        entry
        for entry in found.ours["passes"]
        if (entry["prompt_index"], entry["lens"]) == (0, "tuned")
    )
    mine, theirs = dict(leaves(ours)), dict(leaves(at(found.published, "tuned_lens/summaries/0")))
    common = mine.keys() & theirs.keys()
    assert len(common) > 60
    # Not computed for the tuned lens there: null, not another value.
    never = ("semantic_gate/", "answer_margin", "semantic_margin", "L_semantic_margin_ok")
    never += ("copy_thresholds/norm_only_flags", "copy_thresholds/stability", "depth_fractions/")
    absent = {path for path in common if path.startswith(never) and theirs[path] is None}
    different = {
        path: (mine[path], theirs[path])
        for path in common - absent
        if not same(mine[path], theirs[path])
    }
    # As for the norm lens: the lowest threshold was looked up under a label that did not exist.
    stability = {"copy_thresholds/stability": ("stable", "mixed")}
    assert different == (stability if model == "gemma-2-9b" else {})


def test_confirmation_of_every_fact(model: str) -> None:
    # Published for the first fact only, though its median is said to be over facts.
    found = case(model)
    facts = at(found.ours, "micro_suite/facts")
    published = at(found.published, "micro_suite/facts")
    confirmed = [fact["L_semantic_confirmed"] for fact in facts]
    assert confirmed[0] == published[0]["L_semantic_confirmed"]
    assert [fact["L_semantic_confirmed"] for fact in published[1:]] == [None] * 4
    expected = {"Meta-Llama-3-8B": [25, 24, 23, 25, 26], "gemma-2-9b": [42] * 5}
    assert confirmed == expected[model]


def test_no_other_difference(model: str) -> None:
    """Every value that both summaries hold under one path is equal, or listed above."""
    found = case(model)
    published = dict(leaves(found.published))
    ours = dict(leaves(found.ours))
    common = ours.keys() & published.keys()
    assert len(common) > 290
    corrected = {*GAP[model], GAP_AT, STABILITY}
    corrected |= {f"micro_suite/facts/{i}/L_semantic_confirmed" for i in range(1, 5)}
    unexpected = {
        path: (ours[path], published[path])
        for path in sorted(common - corrected - set(NOT_IN_TABLES))
        if not path.startswith(OTHERWISE) and not same(ours[path], published[path])
    }
    assert not unexpected, f"(ours, published) {unexpected}"
    assert {path: ours[path] for path in NOT_IN_TABLES if ours[path] is not None} == {}


def test_spot_checks_of_every_fact(model: str) -> None:
    # The published samples are one unlabelled list, four per fact.
    found = case(model)
    published = at(found.published, "raw_lens_check/samples")
    checks: dict[str, Any] = found.ours["per_fact"]["raw_lens_check"]
    ours = [sample for check in checks.values() for sample in check["samples"]]
    assert len(ours) == 20
    assert same(ours, published)


def test_milestone_table(model: str) -> None:
    found = case(model)
    rows = found.rows("-milestones.csv")
    soft = [layer for layer in found.ours["L_copy_soft"].values() if layer is not None]
    layers = [
        found.ours["L_copy"],
        min(soft, default=None),
        found.ours["L_semantic"],
        found.ours["L_semantic_confirmed"],
    ]
    assert [row["layer"] and int(row["layer"]) for row in rows] == layers
    assert rows[3]["lens"] == found.ours["confirmed_semantics"]["confirmed_source"]


def test_artefact_table(model: str) -> None:
    found = case(model)
    summary = found.rows("-artifact-audit.csv")[0]
    full = found.ours["raw_lens_full"]
    pairs = {
        "js_divergence": full["js_divergence_percentiles"]["p50"],
        "l1_prob_diff": full["l1_prob_diff_percentiles"]["p50"],
        "topk_jaccard_raw_norm@50": full["topk_overlap"]["jaccard_raw_norm_p50"],
        "lens_artifact_score_v2": full["score"]["lens_artifact_score_v2"],
    }
    for name, value in pairs.items():
        cell = summary[name]
        assert cell is not None
        assert same(value, float(cell)), name
    assert summary["risk_tier"] == full["score"]["tier"]


def _is_baseline(row: dict[str, str | None]) -> bool:
    return (row["prompt_id"], row["prompt_variant"], row["fact_index"]) == ("pos", "orig", "0")
