"""Published tables, read and written again: the same names, columns, order, dialect and cells."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from layerscope.measures.published import read_published
from layerscope.measures.published_audit import (
    companions,
    published_sections,
    read_positions,
    read_variants,
)
from layerscope.measures.summary import summarise
from layerscope.reports.files import write_run_files
from layerscope.reports.files.dialect import Contract
from support.shared import shared_path

pytestmark = pytest.mark.golden

MODELS = ("Meta-Llama-3-8B", "gemma-2-9b")
PURE, RAW = "pure-next-token.csv", "pure-next-token-rawlens.csv"
WINDOW = "pure-next-token-rawlens-window.csv"
# Overwritten with values of later facts; the published raw-lens file has the right ones.
OVERWRITTEN = ("topk_jaccard_raw_norm@50", "topk_jaccard_consecutive@50")
# Published with 1e-30 inside the logarithm here, and without it in the main file.
OTHER_FORMULA = {"entropy_bits_norm": 1e-4, "entropy_gap_bits": 1e-4}

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, dialect=Contract))


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Return (file name stem, published folder, folder written from the published tables)."""
    stem = f"output-{request.param}-"
    published = shared_path("published", stem + PURE).parent
    files = companions(published / (stem + PURE))
    table = read_published(
        published / (stem + PURE),
        rawlens=files["rawlens"],
        others={lens: files[lens] for lens in ("tuned", "prism")},
    )
    sections = published_sections(
        table,
        variants=read_variants(files["variants"]),
        positions=read_positions(files["positions"]),
    )
    # The publisher shows the audit of the last fact as the first one's; to compare files, so do we.
    assert sections["tuned_audit"]["prompt_index"] == 8
    sections["tuned_audit"]["prompt_index"] = 0
    ours = tmp_path_factory.mktemp(request.param)
    write_run_files(table, summarise(table, diagnostics=sections).to_dict(), {}, ours)
    return stem, published, ours


def test_every_published_file_is_written(pair: tuple[str, Path, Path]) -> None:
    stem, published, ours = pair
    theirs = {path.name for path in published.glob(f"{stem.removesuffix('-')}*")}
    mine = {path.name for path in ours.iterdir()}
    assert theirs <= mine
    more = {name.removeprefix(stem) for name in mine - theirs}
    # Published for the smaller models only, and not in this folder; and the typed table.
    assert more == {"records.csv", "records-prism.csv", "records-tuned.csv", "layers.parquet"}


@pytest.mark.parametrize(
    "name",
    [
        *("milestones.csv", "artifact-audit.csv", "positions-tuned-audit.csv"),
        *(f"pure-next-token-{end}.csv" for end in ("prism", "tuned", "tuned-variants")),
    ],
)
def test_files_are_equal_byte_for_byte(pair: tuple[str, Path, Path], name: str) -> None:
    stem, published, ours = pair
    assert (ours / (stem + name)).read_bytes() == (published / (stem + name)).read_bytes()


@pytest.mark.parametrize("name", [PURE, RAW, WINDOW])
def test_headers_are_equal_byte_for_byte(pair: tuple[str, Path, Path], name: str) -> None:
    stem, published, ours = pair
    with (published / (stem + name)).open("rb") as one, (ours / (stem + name)).open("rb") as two:
        assert two.readline() == one.readline()


def test_every_cell_of_the_last_position_is_equal(pair: tuple[str, Path, Path]) -> None:
    stem, published, ours = pair
    theirs, written = read(published / (stem + PURE)), read(ours / (stem + PURE))
    right = read(published / (stem + RAW))
    assert len(written) == len(theirs) == len(right)
    for one, two, overlap in zip(theirs, written, right, strict=True):
        assert {k: v for k, v in two.items() if k not in OVERWRITTEN} == {
            k: v for k, v in one.items() if k not in OVERWRITTEN
        }
        assert [two[name] for name in OVERWRITTEN] == [overlap[name] for name in OVERWRITTEN]


def test_a_file_without_overwritten_columns_is_equal_byte_for_byte(
    pair: tuple[str, Path, Path], tmp_path: Path
) -> None:
    stem, published, ours = pair
    kept = read(published / (stem + PURE))
    for one, overlap in zip(kept, read(published / (stem + RAW)), strict=True):
        one.update({name: overlap[name] for name in OVERWRITTEN})
    with (tmp_path / PURE).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(kept[0]), dialect=Contract)
        writer.writeheader()
        writer.writerows(kept)
    assert (ours / (stem + PURE)).read_bytes() == (tmp_path / PURE).read_bytes()


def test_every_cell_of_raw_beside_norm_is_equal(pair: tuple[str, Path, Path]) -> None:
    stem, published, ours = pair
    theirs, written = read(published / (stem + RAW)), read(ours / (stem + RAW))
    assert len(written) == len(theirs)
    for one, two in zip(theirs, written, strict=True):
        for name, cell in one.items():
            if name in OTHER_FORMULA:
                assert float(two[name]) == pytest.approx(float(cell), abs=OTHER_FORMULA[name])
            else:
                assert two[name] == cell, name


def test_rows_around_milestones_are_equal_where_both_check(pair: tuple[str, Path, Path]) -> None:
    # The publisher took the radius of every fact from the first one's risk, ours is the fact's own.
    stem, published, ours = pair

    def keyed(rows: Rows) -> dict[tuple[str, ...], dict[str, str]]:
        names = ("fact_key", "prompt_id", "prompt_variant", "layer", "lens")
        return {tuple(row[name] for name in names): row for row in rows}

    theirs, written = keyed(read(published / (stem + WINDOW))), keyed(read(ours / (stem + WINDOW)))
    common = theirs.keys() & written.keys()
    assert len(common) > 0.75 * len(theirs)
    assert {key: written[key] for key in common} == {key: theirs[key] for key in common}
    assert {key[:3] for key in written} == {key[:3] for key in theirs}
