"""Reading the published audit: whose it is, and what is refused."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.errors import TableError
from layerscope.measures.published_audit import (
    audited_pass,
    companions,
    published_sections,
    read_positions,
    read_variants,
)
from layerscope.measures.rows import pass_rows
from layerscope.measures.tuned_audit import POSITION_COLUMNS, VARIANT_COLUMNS, variant_rows
from measures.test_tuned_audit import variants
from support.shared import shared_path
from support.tables import synthetic_table

TABLE = synthetic_table(n_layers=3)


def audit_of(prompt_index: int) -> pl.DataFrame:
    rows = TABLE.last(lens="norm", prompt_index=prompt_index).filter(pl.col("layer") > 0)
    measured = variants(1.0, 0.5, 0.2).with_columns(
        rows["kl_to_final_bits"].alias("kl_bits_baseline")
    )
    return variant_rows(measured)


def test_the_audit_names_the_fact_it_describes() -> None:
    for index in (0, 2):
        sections = published_sections(TABLE, variants=audit_of(index))
        assert sections["tuned_audit"]["prompt_index"] == index
        assert "position_window" not in sections
        assert len(sections["tuned_audit"]["variants"]) == 3
    nobody = audit_of(0).with_columns(pl.col("kl_bits_baseline") + 1e-6)
    assert audited_pass(nobody, pass_rows(TABLE)) is None
    assert published_sections(TABLE, variants=nobody)["tuned_audit"]["fact_key"] is None


def test_positions_need_a_fact() -> None:
    positions = pl.DataFrame(
        {
            "pos_frac": [0.5, 1.0] * 4,
            "pos_index": [3, 7] * 4,
            "layer": [0, 0, 1, 1, 2, 2, 3, 3],
            **{name: [1.0] * 8 for name in POSITION_COLUMNS if "bits" in name},
            **{name: [1, 1] * 4 for name in POSITION_COLUMNS if "rank" in name},
        }
    )
    found = published_sections(TABLE, variants=audit_of(0), positions=positions)
    window = found["position_window"]
    assert (window["fact_key"], window["rank1_frac"]) == ("Germany→Berlin", 1.0)
    assert window["gate"] == {"position_window_stable": True}
    assert published_sections(TABLE, positions=positions)["position_window"]["status"] == "skipped"
    nobody = audit_of(0).with_columns(pl.col("kl_bits_baseline") + 1e-6)
    found = published_sections(TABLE, variants=nobody, positions=positions)
    assert "none of the table's passes" in found["position_window"]["reason"]
    assert published_sections(TABLE) == {}


def test_files_of_one_run(tmp_path: Path) -> None:
    main = tmp_path / "output-x-pure-next-token.csv"
    for name in (
        "pure-next-token-tuned",
        "pure-next-token-tuned-variants",
        "positions-tuned-audit",
    ):
        (tmp_path / f"output-x-{name}.csv").write_text("")
    (tmp_path / "output-y-pure-next-token-prism.csv").write_text("")
    assert {name: path.name for name, path in companions(main).items()} == {
        "tuned": "output-x-pure-next-token-tuned.csv",
        "variants": "output-x-pure-next-token-tuned-variants.csv",
        "positions": "output-x-positions-tuned-audit.csv",
    }
    with pytest.raises(TableError, match="does not end in -pure-next-token"):
        companions(tmp_path / "table.csv")


def test_tables_that_are_not_an_audit(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_text("layer,kl_bits_baseline\n1,2.0\n")
    for read in (read_variants, read_positions):
        with pytest.raises(TableError, match=r"lacks the column\(s\)"):
            read(path)
    header = ",".join(VARIANT_COLUMNS)
    path.write_text(f"{header}\n{','.join(['1'] * 9)},1.5{',1' * (len(VARIANT_COLUMNS) - 10)}\n")
    with pytest.raises(TableError, match=r"'1.5' in column answer_rank_baseline is not a whole"):
        read_variants(path)


def test_companions_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = shared_path("published", "output-Meta-Llama-3-8B-pure-next-token.csv")
    assert run(["measures", str(table), "--companions", "--json"]) == 0
    out = capsys.readouterr().out
    assert '"tuned_is_calibration_only": false' in out
    assert '"preferred_semantics_lens_hint": "tuned"' in out
    assert run(["measures", str(table), "--json"]) == 0
    assert "tuned_is_calibration_only" not in capsys.readouterr().out
    parquet = tmp_path / "x.parquet"
    TABLE.write_parquet(parquet)
    assert run(["measures", str(parquet), "--companions"]) != 0
    assert "--companions goes with a published CSV" in capsys.readouterr().err
