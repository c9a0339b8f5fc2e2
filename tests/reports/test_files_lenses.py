"""Files and JSON of a run with fitted lenses and with checks that looked at the model again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.measures.sections import skipped
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.measures.tuned_audit import POSITION_COLUMNS, VARIANT_COLUMNS
from layerscope.reports.files import write_run_files
from layerscope.reports.files.dialect import Contract
from support.tables import synthetic_table

Row = dict[str, str]
STEM = "output-synthetic"


def row(columns: tuple[str, ...], prompt_index: int, layer: int) -> dict[str, Any]:
    values = {name: 1 if "rank" in name or name == "pos_index" else 0.5 for name in columns}
    return values | {"layer": layer, "prompt_index": prompt_index, "fact_key": "x", "extra": 9.0}


AUDIT = {
    "status": "ok",
    "rotation_vs_temperature": {"delta_kl_rot_p50": 0.5},
    "positional": None,
    "head_mismatch": None,
    "tuned_is_calibration_only": False,
    "preferred_semantics_lens_hint": "tuned",
    "variants": [row(VARIANT_COLUMNS, i, layer) for i in (0, 2) for layer in range(7)],
    "positions": [row(POSITION_COLUMNS, i, layer) for i in (0, 2) for layer in range(7)],
}
SECTIONS: dict[str, Any] = {
    "tuned_audit": AUDIT,
    "repeatability": {
        "status": "ok",
        "gates": {"repeatable.precision": True},
        **{"max_rank_dev": 2.0, "p95_rank_dev": 1.0, "top1_flip_rate": 0.01},
        "flag": "repeatability_variance_high",  # over all rows; the gate is about clear ones
    },
    "decoding_point": skipped("no milestone"),
    "skip_layers_sanity": {
        "status": "ok",
        **{"m=2": 0.4, "tuned_lens_regression": True, "tuned_lens_skip_warning": 0.4},
    },
    "head_transforms": {
        "status": "ok",
        "at": [
            {
                "prompt_index": index,
                "lens": lens,
                "kl_after_transform_bits": {"scale": None, "softcap": index + len(lens)},
            }
            for index in (2, 0)
            for lens in ("raw", "tuned", "norm")
        ],
    },
}


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(lenses=("raw", "norm", "tuned", "prism"))


@pytest.fixture(scope="module")
def written(table: LayersTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files")
    write_run_files(table, summarise(table, diagnostics=SECTIONS).to_dict(), {}, out)
    return out


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, dialect=Contract))


def document(out: Path) -> dict[str, Any]:
    return json.loads((out / f"{STEM}.json").read_text(encoding="utf-8"))


def test_each_fitted_lens_has_its_files(written: Path, table: LayersTable) -> None:
    for name in ("pure-next-token", "records"):
        header = list(read(written / f"{STEM}-{name}.csv")[0])
        assert header == list(read(written / f"{STEM}-{name}-prism.csv")[0])
        assert header == list(read(written / f"{STEM}-{name}-tuned.csv")[0])
    prism = read(written / f"{STEM}-pure-next-token-prism.csv")
    tuned = read(written / f"{STEM}-pure-next-token-tuned.csv")
    assert [int(row["layer"]) for row in prism] == 5 * list(range(7))
    assert [int(row["layer"]) for row in tuned] == 5 * list(range(1, 7))
    ours = table.last(lens="tuned").filter(pl.col("layer") > 0)
    assert [row["p_answer"] for row in tuned] == [repr(p) for p in ours["p_answer"]]
    assert {row["semantic_margin_ok"] for row in tuned} == {""}
    records = read(written / f"{STEM}-records-tuned.csv")
    mine = table.rows.filter((pl.col("lens") == "tuned") & (pl.col("layer") > 0))
    assert len(records) == mine.height


def test_the_audit_is_that_of_the_baseline(written: Path) -> None:
    variants = read(written / f"{STEM}-pure-next-token-tuned-variants.csv")
    positions = read(written / f"{STEM}-positions-tuned-audit.csv")
    assert tuple(variants[0]) == VARIANT_COLUMNS
    assert tuple(positions[0]) == POSITION_COLUMNS
    assert [row["layer"] for row in variants] == [str(layer) for layer in range(1, 7)]
    assert variants[0]["answer_rank_tuned"] == "1"


def test_an_audit_of_another_fact_is_not_shown_as_the_baselines(
    table: LayersTable, tmp_path: Path
) -> None:
    others = [entry for entry in AUDIT["variants"] if entry["prompt_index"] == 2]
    sections = {"tuned_audit": AUDIT | {"variants": others, "positions": None}}
    write_run_files(table, summarise(table, diagnostics=sections).to_dict(), {}, tmp_path)
    assert not (tmp_path / f"{STEM}-pure-next-token-tuned-variants.csv").exists()
    assert not (tmp_path / f"{STEM}-positions-tuned-audit.csv").exists()


def test_checks_stand_where_they_were(written: Path) -> None:
    found = document(written)
    details, pack = found["diagnostics"], found["evaluation_pack"]
    assert details["repeatability"]["max_rank_dev"] == 2.0
    assert details["decoding_point"] == {"status": "skipped", "reason": "no milestone"}
    assert details["lens_consistency"]["status"] == "skipped"
    assert details["tuned_lens_skip_warning"] == 0.4
    assert details["L_surface_to_meaning_tuned"] is not None
    assert details["last_layer_consistency"]["kl_after_transform_bits"]["softcap"] == 4
    assert details["prism_summary"]["metrics"]["rank_milestones"]["baseline"]["le_1"] is not None
    assert found["tuned_lens"]["audit_summary"]["preferred_semantics_lens_hint"] == "tuned"
    assert "variants" not in found["tuned_lens"]["audit_summary"]
    assert found["tuned_lens"]["attribution"]["percentiles"].keys() == {"p25", "p50", "p75"}
    assert pack["repeatability"] == {
        **{"max_rank_dev": 2.0, "p95_rank_dev": 1.0, "top1_flip_rate": 0.01, "flag": "ok"}
    }
    assert pack["tuned_audit"]["rotation_vs_temperature"] == {"delta_kl_rot_p50": 0.5}
    for name in pack["citations"]["files"].values():
        assert (written / name).is_file()
    assert pack["citations"]["files"]["tuned_pure_csv"] == f"{STEM}-pure-next-token-tuned.csv"
    assert set(found["files"]) >= {"tuned_variants_csv", "positions_audit_csv", "prism_pure_csv"}


def test_flags_are_those_of_the_gates_and_lenses_they_are_about(
    table: LayersTable, tmp_path: Path
) -> None:
    repeats = SECTIONS["repeatability"] | {"gates": {"repeatable.precision": False}}
    skips = SECTIONS["skip_layers_sanity"] | {"lens": "norm"}
    sections = {"repeatability": repeats, "skip_layers_sanity": skips}
    write_run_files(table, summarise(table, diagnostics=sections).to_dict(), {}, tmp_path)
    found = document(tmp_path)
    assert found["evaluation_pack"]["repeatability"]["flag"] == "repeatability_variance_high"
    assert "tuned_lens_regression" not in found["diagnostics"]


def test_citations_point_to_the_rows_they_name(written: Path) -> None:
    pure = read(written / f"{STEM}-pure-next-token.csv")
    found = document(written)
    pack, base = found["evaluation_pack"], found["diagnostics"]
    rows = pack["citations"]["layers"]
    cited = {
        "L_copy_strict_row": ("copy_collapse", base["L_copy"]),
        "L_semantic_norm_row": ("is_answer", base["L_semantic"]),
        "L_semantic_confirmed_row": ("is_answer", base["L_semantic_confirmed"]),
    }
    for name, (flag, layer) in cited.items():
        row = pure[rows[name]]
        assert (row["fact_index"], row["prompt_variant"], row[flag]) == ("0", "orig", "True")
        assert int(row["layer"]) == layer
    for key, index in pack["micro_suite"]["citations"]["fact_rows"].items():
        row = pure[index]
        assert (row["fact_key"], row["prompt_variant"], row["is_answer"]) == (key, "orig", "True")
        before = pure[index - 1]
        assert before["is_answer"] == "False" or before["fact_key"] != key
