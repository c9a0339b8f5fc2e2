from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import flag_columns
from layerscope.measures.published import (
    RAW_REQUIRED,
    REQUIRED,
    is_published,
    model_name,
    read_published,
)
from layerscope.measures.rows import pass_rows
from layerscope.measures.summary import summarise

Cells = dict[str, str]
FLAGS = ("copy_collapse", *flag_columns(MeasureConfig()))
PASSES = (
    ("Germany→Berlin", "0", "pos", "orig"),
    ("Germany→Berlin", "0", "pos", "no_filler"),
    ("", "", "ctl", "orig"),
)
KEYS = ("fact_key", "fact_index", "prompt_id", "prompt_variant")
D_VOCAB = 50257
TOKENS = (' "\n', "a,b", "back\\slash", "\ufffd", " called")


def main_rows() -> list[Cells]:
    rows: list[Cells] = []
    for identity in PASSES:
        for layer in range(3):
            p = (0.0, 0.25, 0.5)[layer]
            row = dict.fromkeys((*REQUIRED, *FLAGS, "topk_jaccard_consecutive@50"), "")
            row |= dict(zip(KEYS, identity, strict=True))
            row |= {"layer": str(layer), "pos": "6", "token": "⟨NEXT⟩", "p_top1": "0.5"}
            row |= {f"top{i + 1}": token for i, token in enumerate(TOKENS)}
            row |= {f"prob{i}": str(0.5 / i) for i in range(1, 6)}
            row |= {"p_answer": repr(p), "answer_minus_uniform": repr(p - 1 / D_VOCAB)}
            row |= {"answer_rank": str(3 - layer), "is_answer": str(layer == 2)}
            row |= {name: str(layer == 1) for name in FLAGS}
            row |= {"entropy_bits": "1.5", "teacher_entropy_bits": "1.0"}
            rows.append(row)
    return rows


def raw_rows() -> list[Cells]:
    rows: list[Cells] = []
    for identity in PASSES:
        for layer in range(3):
            row = dict.fromkeys(RAW_REQUIRED, "0.5")
            row |= dict(zip(KEYS, identity, strict=True))
            row |= {"layer": str(layer), "answer_rank_raw": str(layer + 1)}
            row |= {"top1_token_id_raw": "7", "top1_token_id_norm": "7", "p_top1_raw": "0.96"}
            row |= {"top1_token_str_raw": " called"}
            row["topk_jaccard_consecutive@50"] = "0.5" if layer else ""
            rows.append(row)
    return rows


def write(path: Path, rows: list[Cells]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), escapechar="\\", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    return write(tmp_path / "output-tiny-pure-next-token.csv", main_rows())


@pytest.fixture
def rawlens(tmp_path: Path) -> Path:
    return write(tmp_path / "output-tiny-pure-next-token-rawlens.csv", raw_rows())


def test_shape_and_passes(pure: Path) -> None:
    table = read_published(pure)
    meta = table.meta
    assert (meta.model, meta.n_layers, meta.d_vocab) == ("tiny", 2, D_VOCAB)
    assert (meta.source, meta.norm_choice) == ("published", "next_norm")
    assert [p.prompt_variant for p in meta.prompts] == ["orig", "no_filler", "orig"]
    assert [p.fact_key for p in meta.prompts] == ["Germany→Berlin", "Germany→Berlin", None]
    assert [p.answer for p in meta.prompts] == ["Berlin", "Berlin", None]
    assert table.rows.height == 9
    assert table.rows["is_last"].all()


def test_tokens_with_quotes_commas_newlines_and_backslashes(pure: Path) -> None:
    assert read_published(pure).rows["top_tokens"][0].to_list() == list(TOKENS)


def test_empty_cells_are_null(pure: Path) -> None:
    rows = read_published(pure).rows
    assert rows["kl_to_final_bits"].null_count() == rows.height
    assert rows["fact_index"].to_list()[-1] is None


def test_flags_are_kept(pure: Path) -> None:
    table = read_published(pure)
    assert table.rows["copy_strict@0.95"].to_list() == [False, True, False] * 3


def test_raw_companion(pure: Path, rawlens: Path) -> None:
    table = read_published(pure, rawlens=rawlens)
    assert sorted(table.lenses) == ["norm", "raw"]
    raw = pass_rows(table)[0, "raw"]
    assert raw.floats("answer_rank").tolist() == [1, 2, 3]
    assert raw.floats("teacher_entropy_bits").tolist() == [1.0] * 3
    norm = pass_rows(table)[0, "norm"]
    assert norm.floats("js_norm_raw_bits").tolist() == [0.5] * 3
    assert norm.known("topk_jaccard_consecutive").tolist() == [False, True, True]
    # Layer 1 of the norm lens shows that id 7 is a prompt token.
    assert raw.true("copy_strict@0.95").tolist() == [True] * 3
    assert (
        summarise(table).to_dict()["confirmed_semantics"]["Germany→Berlin"]["L_semantic_raw"] == 0
    )


def test_raw_flags_that_do_not_follow_are_unknown(tmp_path: Path, pure: Path) -> None:
    rows = raw_rows()
    for row, id_, p in zip(rows, ("8", "8", "7"), ("0.96", "0.5", "0.95"), strict=False):
        row |= {"top1_token_id_raw": id_, "p_top1_raw": p}
    raw = pass_rows(read_published(pure, rawlens=write(tmp_path / "raw.csv", rows)))[0, "raw"]
    assert raw.known("copy_strict@0.95").tolist() == [False, True, True]
    assert raw.true("copy_strict@0.95").tolist() == [False, False, False]


def test_other_lenses(pure: Path, tmp_path: Path) -> None:
    tuned = [row for row in main_rows() if row["layer"] != "0"]
    table = read_published(pure, others={"tuned": write(tmp_path / "tuned.csv", tuned)})
    assert pass_rows(table)[0, "tuned"].layers.tolist() == [1, 2]
    assert table.meta.n_layers == 2


def test_answers_of_unknown_probability_are_unaligned(tmp_path: Path) -> None:
    rows = main_rows()
    for row in rows[:3]:
        row |= {"p_answer": "", "answer_minus_uniform": "", "answer_rank": ""}
    prompts = read_published(write(tmp_path / "x.csv", rows)).meta.prompts
    assert [p.alignment_status for p in prompts] == ["unresolved", "ok", "ok"]


def _drop(rows: list[Cells], *names: str) -> list[Cells]:
    return [{key: cell for key, cell in row.items() if key not in names} for row in rows]


def _set(rows: list[Cells], **cells: str) -> list[Cells]:
    return [row | cells for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: _drop(rows, "answer_rank"), r"lacks the column\(s\) answer_rank"),
        (lambda rows: _drop(rows, "layer", "prob3"), r"column\(s\) layer, prob3"),
        (lambda rows: _drop(rows, *FLAGS), "lacks the columns copy_strict@"),
        (lambda rows: rows + rows[:2], "4 rows with the same prompt and layer"),
        (lambda rows: _set(rows, p_answer="much"), "not a number"),
        (lambda rows: _set(rows, answer_rank="1.5"), "'1.5' in column answer_rank is not a whole"),
        (lambda rows: _set(rows, is_answer="yes"), "row 1: 'yes' in column is_answer"),
        (lambda rows: _set(rows, p_answer="", answer_minus_uniform=""), "no row with p_answer"),
        (lambda rows: _set(rows, p_answer="0.1", answer_minus_uniform="0.2"), "1 / d_vocab"),
        (lambda rows: _set(rows, layer=""), "rows without a layer"),
    ],
)
def test_unusable_tables(
    tmp_path: Path, change: Callable[[list[Cells]], list[Cells]], message: str
) -> None:
    path = write(tmp_path / "x.csv", change(main_rows()))
    with pytest.raises(TableError, match=message) as caught:
        read_published(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_header_only(tmp_path: Path, pure: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(pure.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    with pytest.raises(TableError, match="no rows"):
        read_published(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary\x00", b"PAR1....", b'a,"b\nc'])
def test_not_a_table(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"x\.csv"):
        read_published(path)


def test_cut_off_table(tmp_path: Path, pure: Path) -> None:
    text = pure.read_text(encoding="utf-8")
    path = tmp_path / "x.csv"
    path.write_text(text[: len(text) - 30], encoding="utf-8")
    with pytest.raises(TableError, match="cut off"):
        read_published(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="not a readable CSV"):
        read_published(tmp_path / "nowhere.csv")


def test_companion_of_another_run(tmp_path: Path, pure: Path) -> None:
    other = write(tmp_path / "raw.csv", _set(raw_rows(), fact_key="Spain→Madrid"))
    with pytest.raises(TableError, match="one run"):
        read_published(pure, rawlens=other)


def test_companions_exchanged(pure: Path, rawlens: Path) -> None:
    with pytest.raises(TableError, match="lacks the column"):
        read_published(rawlens, rawlens=pure)


def test_names() -> None:
    assert model_name(Path("runs/output-gemma-2-9b-pure-next-token.csv")) == "gemma-2-9b"
    assert model_name(Path("mine.csv")) == "mine"
    assert is_published(Path("a.CSV"))
    assert not is_published(Path("a.parquet"))
