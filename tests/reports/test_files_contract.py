from __future__ import annotations

import csv
import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope import files
from layerscope.errors import OutputError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.reports.files import write_failure, write_run_files
from layerscope.reports.files.dialect import Contract, write_csv
from layerscope.reports.files.rows import raw_window
from layerscope.reports.files.view import View, soft_copy
from support.tables import synthetic_table

Row = dict[str, str]
PROVENANCE: dict[str, Any] = {
    "model": {"id": "org/synthetic", "device": "cpu", "dtype": "float32"},
    "versions": {"python": "3.11", "torch": "2"},
    "timing": {"seconds": float("nan")},
}


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table()


@pytest.fixture(scope="module")
def written(table: LayersTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files")
    write_run_files(table, summarise(table).to_dict(), PROVENANCE, out)
    return out


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, dialect=Contract))


def document(out: Path) -> dict[str, Any]:
    text = (out / "output-synthetic.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=pytest.fail)


def value(text: str) -> float | None:
    return None if text == "" else float(text)


def test_all_files_are_there_and_nothing_else(written: Path) -> None:
    stem = "output-synthetic"
    suffixes = (
        "-layers.parquet",
        "-records.csv",
        "-pure-next-token.csv",
        "-pure-next-token-rawlens.csv",
        "-pure-next-token-rawlens-window.csv",
        "-milestones.csv",
        "-artifact-audit.csv",
        ".json",
    )
    assert sorted(path.name for path in written.iterdir()) == sorted(stem + s for s in suffixes)


def test_the_same_run_gives_the_same_bytes(
    table: LayersTable, written: Path, tmp_path: Path
) -> None:
    write_run_files(table, summarise(table).to_dict(), PROVENANCE, tmp_path)
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_typed_table_comes_back(table: LayersTable, written: Path) -> None:
    back = LayersTable.read_parquet(written / "output-synthetic-layers.parquet")
    assert back.meta == table.meta and back.rows.equals(table.rows, null_equal=True)


def test_pure_rows_are_those_of_the_table(table: LayersTable, written: Path) -> None:
    rows = read(written / "output-synthetic-pure-next-token.csv")
    last = table.last(lens="norm")
    assert len(rows) == last.height == 5 * 7
    passes = [(row["fact_key"], row["prompt_id"], row["prompt_variant"]) for row in rows[::7]]
    assert passes == [
        ("Germany→Berlin", "pos", "orig"),
        ("Germany→Berlin", "pos", "no_filler"),
        ("France→Paris", "pos", "orig"),
        ("France→Paris", "pos", "no_filler"),
        ("", "ctl", "orig"),
    ]
    for row, ours in zip(rows, last.iter_rows(named=True), strict=True):
        assert row["token"] == "⟨NEXT⟩" and int(row["layer"]) == ours["layer"]
        assert row["entropy"] == row["entropy_bits"] == repr(ours["entropy_bits"])
        assert row["top1"] == ours["top_tokens"][0] and row["prob5"] == repr(ours["top_probs"][4])
        assert row["top6"] == row["prob20"] == ""
        rest = 1 - sum(ours["top_probs"][:5])
        assert float(row["rest_mass"]) == pytest.approx(max(0, rest), abs=1e-12)
        assert row["answer_rank"] == str(ours["answer_rank"])
        assert row["is_answer"] == str(ours["answer_rank"] == 1)
        above = ours["p_answer"] - 1 / table.meta.d_vocab
        assert float(row["answer_minus_uniform"]) == above
        assert row["semantic_margin_ok"] == str(ours["answer_rank"] == 1 and above >= 0.002)
        assert row["entropy_collapse"] == str(ours["entropy_bits"] <= 1)
        crossed = ours["cos_to_answer"] >= ours["cos_to_prompt_max"] + 0.02
        assert row["geom_crossover"] == str(crossed)
        ratio = ours["p_answer"] / (ours["echo_mass_prompt"] + 1e-9)
        assert float(row["mass_ratio_ans_over_prompt"]) == pytest.approx(ratio, rel=1e-12)
        assert value(row["control_margin"]) == ours["control_margin"]
        assert value(row["topk_jaccard_consecutive@50"]) == ours["topk_jaccard_consecutive"]
        assert value(row["answer_logit_gap"]) == ours["answer_logit_gap"]


def test_milestones_of_the_json_follow_from_the_csv(written: Path) -> None:
    rows = read(written / "output-synthetic-pure-next-token.csv")
    baseline = [row for row in rows if row["fact_index"] == "0" and row["prompt_variant"] == "orig"]
    found = document(written)["diagnostics"]

    def first(hits: list[bool]) -> int | None:
        return hits.index(True) if True in hits else None

    assert found["L_semantic"] == first([row["is_answer"] == "True" for row in baseline])
    assert found["L_copy"] == first([row["copy_collapse"] == "True" for row in baseline]) == 0
    assert found["L_copy_H"] == first([row["entropy_collapse"] == "True" for row in baseline])
    kl = [float(row["kl_to_final_bits"]) <= 0.5 for row in baseline]
    assert found["first_kl_below_0.5"] == first(kl)
    soft = [row["copy_soft_k1@0.5"] == "True" for row in baseline]
    assert found["L_copy_soft"]["1"] == first(soft)


def test_records_show_twenty_tokens_where_it_matters(written: Path, table: LayersTable) -> None:
    rows = read(written / "output-synthetic-records.csv")
    assert len(rows) == table.rows.filter(pl.col("lens") == "norm").height
    order = [(row["fact_key"], row["prompt_variant"], int(row["layer"])) for row in rows]
    assert order[0] == order[7] != order[8], "all positions of a layer come before the next layer"
    assert [int(row["pos"]) for row in rows[:8]] == list(range(8))
    for row in rows[:8]:
        verbose = row["token"].strip() in ("capital", "Germany", "simply")
        assert (row["top20"] != "") == verbose, row["token"]
        listed = [float(row[f"prob{i}"]) for i in range(1, 21) if row[f"prob{i}"]]
        assert len(listed) == (20 if verbose else 5)
        assert float(row["rest_mass"]) == pytest.approx(max(0, 1 - sum(listed)), abs=1e-12)


def test_raw_beside_norm(written: Path, table: LayersTable) -> None:
    rows = read(written / "output-synthetic-pure-next-token-rawlens.csv")
    norm, raw = table.last(lens="norm"), table.last(lens="raw")
    assert len(rows) == norm.height
    pairs = zip(norm.iter_rows(named=True), raw.iter_rows(named=True), strict=True)
    for row, (ours, other) in zip(rows, pairs, strict=True):
        assert row["p_top1_raw"] == repr(other["p_top1"])
        assert row["top1_token_id_raw"] == str(other["top_ids"][0])
        assert row["top1_token_str_norm"] == ours["top_tokens"][0]
        assert row["js_divergence"] == repr(ours["js_norm_raw_bits"])
        assert row["l1_prob_diff"] == repr(ours["l1_norm_raw"])
        gap = ours["entropy_bits"] - ours["teacher_entropy_bits"]
        assert float(row["entropy_gap_bits"]) == gap
        only = ours["answer_rank"] == 1 and other["answer_rank"] != 1
        assert row["norm_only_semantics"] == str(only)


def test_the_window_is_that_of_the_summary(written: Path, table: LayersTable) -> None:
    rows = read(written / "output-synthetic-pure-next-token-rawlens-window.csv")
    checked = summarise(table).to_dict()["raw_lens_window"]["France→Paris"]["layers_checked"]
    own = [
        (int(row["layer"]), row["lens"])
        for row in rows
        if row["fact_index"] == "1" and row["prompt_variant"] == "orig"
    ]
    assert own == [(layer, lens) for layer in checked for lens in ("norm", "raw")]
    assert {row["prompt_id"] for row in rows} == {"pos", "ctl"}


def test_the_window_leaves_rows_out() -> None:
    table = synthetic_table()
    layers: list[list[int]] = [[2], [], [0, 6], [], []]
    rows = raw_window(table, layers)
    assert rows.select("fact_index", "layer", "lens").rows() == [
        (0, 2, "norm"),
        (0, 2, "raw"),
        (1, 0, "norm"),
        (1, 0, "raw"),
        (1, 6, "norm"),
        (1, 6, "raw"),
    ]


def test_milestone_rows_point_into_the_pure_file(written: Path) -> None:
    pure = read(written / "output-synthetic-pure-next-token.csv")
    rows = read(written / "output-synthetic-milestones.csv")
    flags = ("is_copy_strict", "is_semantic_norm", "is_semantic_confirmed")
    expected = [("True", "False", "False"), ("False",) * 3]
    expected += [("False", "True", "False"), ("False", "False", "True")]
    assert [tuple(row[flag] for flag in flags) for row in rows] == expected
    assert [row["is_copy_soft_k"] for row in rows] == ["", "1", "", ""]
    assert [row["lens"] for row in rows] == ["norm", "norm", "norm", "raw"]
    for row in rows:
        cited = pure[int(row["csv_row_index"])]
        for name in ("layer", "answer_rank", "p_answer", "kl_to_final_bits", "entropy_bits"):
            assert cited[name] == row[name]


def test_rows_are_cited_right_when_the_baseline_is_not_first() -> None:
    table = synthetic_table()
    moved = LayersTable(
        rows=table.rows.with_columns(4 - pl.col("prompt_index")).sort("prompt_index", "layer"),
        meta=table.meta,
    )
    prompts = tuple(replace(p, prompt_index=4 - p.prompt_index) for p in table.meta.prompts[::-1])
    moved = LayersTable(moved.rows, replace(table.meta, prompts=prompts))
    view = View(moved, summarise(moved).to_dict())
    assert view.baseline["fact_key"] == "France→Paris"
    start = 7 * view.baseline["prompt_index"]
    assert start > 0 and view.cite(3) == start + 3
    suite = view.summary["micro_suite"]["citations"]["fact_rows"]
    assert suite["France→Paris"] == view.cite(view.baseline["L_semantic"])


def test_the_audit_holds_medians_and_the_score(written: Path) -> None:
    rows = read(written / "output-synthetic-artifact-audit.csv")
    assert [row["layer"] for row in rows] == ["_summary", *map(str, range(7))]
    for name in ("js_divergence", "kl_raw_to_norm_bits", "l1_prob_diff"):
        values = sorted(float(row[name]) for row in rows[1:])
        assert float(rows[0][name]) == values[3]
    full = document(written)["diagnostics"]["raw_lens_full"]
    assert float(rows[0]["js_divergence"]) == full["js_divergence_percentiles"]["p50"]
    assert float(rows[0]["lens_artifact_score_v2"]) == full["score"]["lens_artifact_score_v2"]
    assert rows[0]["risk_tier"] == full["score"]["tier"]
    assert all(row["risk_tier"] == row["lens_artifact_score_v2"] == "" for row in rows[1:])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"1": 7, "2": 3, "3": None}, (2, 3)),
        ({"3": 4, "2": 4}, (2, 4)),
        ({"1": 0, "2": 5}, (1, 0)),
        ({"1": None}, (None, None)),
        (None, (None, None)),
    ],
)
def test_the_earliest_soft_copy(
    layers: dict[str, int | None] | None, expected: tuple[int | None, int | None]
) -> None:
    assert soft_copy({"L_copy_soft": layers}) == expected


# -- the dialect ----------------------------------------------------------------------------------


def test_the_dialect_byte_for_byte(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "f": [0.1, 1e-05, None, 1e22, float("nan"), 0.0],
            "b": [True, False, None, True, False, True],
            "t": ['a,"b"', "new\nline", "back\\slash", " →", "�", "\ufeff\r"],
            "i": [1, None, 3, 4, 5, 6],
        }
    )
    path = write_csv(tmp_path / "x.csv", frame)
    assert (
        path.read_bytes()
        == (
            "f,b,t,i\n"
            '0.1,True,"a,""b""",1\n'
            '1e-05,False,"new\nline",\n'
            ",,back\\\\slash,3\n"
            "1e+22,True, →,4\n"
            "nan,False,�,5\n"
            '0.0,True,"\ufeff\r",6\n'
        ).encode()
    )
    assert [row["t"] for row in read(path)] == frame["t"].to_list()


# -- the JSON -------------------------------------------------------------------------------------

TREE = {
    "": "prompt test_prompts temperature_exploration final_prediction model_stats raw_lens_check "
    "prompts provenance copy_flag_columns gold_answer control_prompt control_summary "
    "ablation_summary diagnostics tuned_lens summary micro_suite measurement_guidance "
    "evaluation_pack schema_version status model",
    "prompt": "type context_prompt ground_truth fact_key fact_index",
    "final_prediction": "type entropy topk",
    "model_stats": "type num_layers d_model n_heads d_vocab n_ctx architecture",
    "raw_lens_check": "mode samples summary",
    "raw_lens_check.summary": "first_norm_only_semantic_layer max_kl_norm_vs_raw_bits "
    "lens_artifact_risk",
    "prompts": "facts_micro_suite",
    "gold_answer": "string pieces first_id answer_ids variant",
    "control_prompt": "context_prompt gold_answer gold_alignment",
    "control_prompt.gold_alignment": "ok status variant first_id answer_ids pieces",
    "control_summary": "first_control_margin_pos max_control_margin first_control_strong_pos "
    "max_control_top2_logit_gap delta_top2_logit_ctl",
    "ablation_summary": "L_copy_orig L_sem_orig L_copy_nf L_sem_nf delta_L_copy delta_L_sem",
    "diagnostics": "type model device use_norm_lens unembed_dtype context_prompt "
    "target_prediction surface_diagnostics_config answer_margin_unit unembed_bias flags "
    "prism_summary copy_soft_config tau_norm_per_layer copy_mask L_copy L_copy_H L_semantic "
    "delta_layers copy_thresh copy_window_k copy_match_level first_kl_below_0.5 "
    "first_kl_below_1.0 first_rank_le_1 first_rank_le_5 first_rank_le_10 copy_soft_threshold "
    "copy_soft_window_ks L_copy_soft delta_layers_soft copy_detector answer_margin_thresholds "
    "entropy_gap_bits_percentiles entropy_gap_samples copy_thresholds "
    "L_surface_to_meaning_norm answer_mass_at_L_surface_norm echo_mass_at_L_surface_norm "
    "L_geom_norm cos_to_answer_at_L_geom_norm cos_to_prompt_max_at_L_geom_norm "
    "L_topk_decay_norm topk_prompt_mass_at_L_norm topk_prompt_tau_norm surface_delta_norm "
    "geom_gamma_norm cos_milestones depth_fractions L_semantic_margin_ok semantic_margin "
    "semantic_gate gate_stability_small_scale raw_lens_window raw_lens_full config "
    "normalization_provenance layer_map numeric_health repeatability decoding_point "
    "lens_consistency gold_alignment gold_alignment_rate gold_alignment_prompts "
    "repeatability_forward last_layer_consistency kl_to_final_bits_norm_temp@25% "
    "kl_to_final_bits_norm_temp@50% kl_to_final_bits_norm_temp@75% tuned_lens "
    "confirmed_semantics L_semantic_confirmed micro_suite position_window norm_trajectory "
    "topk_overlap",
    "diagnostics.semantic_gate": "delta_top2_logit delta_abs L_semantic_top2_ok_norm "
    "L_semantic_top2_ok_norm_frac gap_at_L_semantic_norm L_semantic_run2 L_semantic_strong "
    "L_semantic_strong_run2 run2_overlaps_confirmed_window",
    "diagnostics.confirmed_semantics": "L_semantic_norm L_semantic_raw Δ_window "
    "L_semantic_confirmed confirmed_source",
    "diagnostics.raw_lens_full.score": "lens_artifact_score lens_artifact_score_v2 tier",
    "diagnostics.config.lens_artifact_score": "weights thresholds v2_addends",
    "diagnostics.numeric_health": "any_nan any_inf max_abs_logit_p99 min_prob_p01 layers_flagged",
    "diagnostics.last_layer_consistency": "kl_to_final_bits top1_agree p_top1_lens p_top1_model "
    "p_answer_lens answer_rank_lens temp_est kl_after_temp_bits cfg_transform "
    "warn_high_last_layer_kl gates",
    "summary": "semantic_margin semantic_gate micro_suite cos_milestones depth_fractions "
    "copy_thresholds confirmed_semantics entropy",
    "micro_suite": "facts aggregates",
    "measurement_guidance": "prefer_ranks suppress_abs_probs reasons notes "
    "preferred_lens_for_reporting use_confirmed_semantics notes_append",
    "evaluation_pack": "model n_layers preferred_lens_for_reporting use_confirmed_semantics "
    "milestones artifact repeatability alignment norm_trajectory entropy tuned_audit citations "
    "micro_suite",
    "evaluation_pack.citations.layers": "L_copy_strict_row L_copy_soft_row L_semantic_norm_row "
    "L_semantic_confirmed_row",
}


@pytest.mark.parametrize("path", TREE)
def test_the_key_tree(written: Path, path: str) -> None:
    node = document(written)
    for step in path.split(".") if path else ():
        node = node[step]
    assert set(TREE[path].split()) <= set(node)


def test_what_did_not_run_says_so(written: Path) -> None:
    found = document(written)
    stages = [found["test_prompts"], found["tuned_lens"], found["diagnostics"]["decoding_point"]]
    assert all(stage["status"] == "skipped" and stage["reason"] for stage in stages)


def test_json_agrees_with_the_summary(written: Path, table: LayersTable) -> None:
    found, summary = document(written), summarise(table).to_dict()
    assert found["status"] == "ok" and found["schema_version"] == 1
    assert found["model"] == "org/synthetic"
    assert found["provenance"]["timing"]["seconds"] is None
    assert found["provenance"]["env"] == {
        "device": "cpu",
        "dtype_compute": "float32",
        "python": "3.11",
        "torch_version": "2",
    }
    reasons = summary["measurement_guidance"]["reasons"]
    assert found["measurement_guidance"]["reasons"] == [reason["code"] for reason in reasons]
    assert found["measurement_guidance"]["reason_details"] == reasons
    assert len(found["passes"]) == len(summary["passes"])
    assert len(found["passes"]) == 10
    for name in found["files"].values():
        assert (written / name).is_file()


def test_thresholds_of_the_summary_are_those_of_the_files(tmp_path: Path) -> None:
    table = synthetic_table()
    config = MeasureConfig(copy_thresholds=(0.6, 0.9), copy_soft_threshold=0.4)
    write_run_files(table, summarise(table, config).to_dict(), {}, tmp_path)
    header = list(read(tmp_path / "output-synthetic-pure-next-token.csv")[0])
    flags = [name for name in header if name.startswith("copy_s")]
    soft = ["copy_soft_k1@0.4", "copy_soft_k2@0.4", "copy_soft_k3@0.4"]
    assert flags == ["copy_strict@0.95", "copy_strict@0.6", "copy_strict@0.9", *soft]
    assert document(tmp_path)["copy_flag_columns"] == flags


@pytest.mark.parametrize("lenses", [("raw",), ("norm",)])
def test_a_lens_that_was_not_run_has_no_files(tmp_path: Path, lenses: tuple[str, ...]) -> None:
    table = synthetic_table(lenses=lenses)
    paths = write_run_files(table, summarise(table).to_dict(), {}, tmp_path)
    names = {path.name.removeprefix("output-synthetic") for path in paths}
    assert "-pure-next-token-rawlens.csv" not in names
    assert ("-pure-next-token.csv" in names) == (lenses == ("norm",))
    assert document(tmp_path)["raw_lens_check"]["status"] == "skipped"


def test_unknown_numbers_are_empty_cells_and_null(tmp_path: Path) -> None:
    table = synthetic_table()
    known = {"p_answer", "answer_rank", "cos_to_answer", "answer_log2p", "answer_full_log2p"}
    rows = table.rows.with_columns(
        pl.lit(None, table.rows.schema[name]).alias(name) for name in known
    )
    rows = rows.with_columns(pl.lit(math.inf).alias("kl_norm_vs_raw_bits"))
    blind = LayersTable(rows, table.meta)
    write_run_files(blind, summarise(blind).to_dict(), {}, tmp_path)
    row = read(tmp_path / "output-synthetic-pure-next-token.csv")[0]
    assert row["p_answer"] == row["answer_minus_uniform"] == row["geom_crossover"] == ""
    assert row["semantic_margin_ok"] == "" and row["is_answer"] == "False"
    document(tmp_path)


# -- failure --------------------------------------------------------------------------------------


def test_a_failed_model_is_valid_json(tmp_path: Path) -> None:
    path = write_failure("org/broken", "no such model;\nchoose another", tmp_path)
    assert path.name == "output-broken.json"
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "status": "failed",
        "model": "org/broken",
        "error": "no such model; choose another",
    }


def test_two_models_of_the_same_name_do_not_overwrite_one_another(tmp_path: Path) -> None:
    assert write_failure("a/x", "1", tmp_path).name == "output-x.json"
    assert write_failure("b/x", "2", tmp_path).name == "output-x-2.json"
    assert write_failure("a/x", "3", tmp_path).name == "output-x.json"
    assert write_failure("b/x", "4", tmp_path).name == "output-x-2.json"
    assert json.loads((tmp_path / "output-x.json").read_text())["error"] == "3"


@pytest.mark.parametrize("after", range(8))
def test_a_full_disk_leaves_whole_files_only(
    table: LayersTable, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    left = after
    really_replace = os.replace

    def filling(source: str, target: str) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        really_replace(source, target)

    monkeypatch.setattr(files.os, "replace", filling)
    summary = summarise(table).to_dict()
    with pytest.raises(OutputError, match="no space left writing"):
        write_run_files(table, summary, PROVENANCE, tmp_path)
    found = list(tmp_path.iterdir())
    assert len(found) == after
    for path in found:
        assert path.read_bytes() == (written / path.name).read_bytes()
