"""Read the earlier system's tables (`*-pure-next-token.csv` and companions) into a LayersTable."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from layerscope.errors import TableError, nearest
from layerscope.measures.config import trimmed
from layerscope.measures.copy import PUBLISHED_MARGIN, margin_exceeds
from layerscope.measures.table import HeadInfo, LayersTable, PromptInfo, TableMeta, conform

PASS_KEY = ["fact_key", "fact_index", "prompt_id", "prompt_variant"]
ARROW = "→"
TEXTS = ("fact_key", "prompt_id", "prompt_variant", "token")
TOP = 5  # tokens per row that the earlier system filled in

# Published column -> column of our schema.
RENAMED = {
    "entropy_bits": "entropy_bits",
    "p_top1": "p_top1",
    "p_top5": "p_top5",
    "p_answer": "p_answer",
    "answer_rank": "answer_rank",
    "answer_logit_gap": "answer_logit_gap",
    "answer_vs_top1_gap": "answer_vs_top1_gap",
    "control_margin": "control_margin",
    "teacher_entropy_bits": "teacher_entropy_bits",
    "kl_to_final_bits": "kl_to_final_bits",
    "kl_to_final_bits_norm_temp": "kl_to_final_bits_norm_temp",
    "cos_to_final": "cos_to_final",
    "cos_to_answer": "cos_to_answer",
    "cos_to_prompt_max": "cos_to_prompt_max",
    "echo_mass_prompt": "echo_mass_prompt",
    "topk_prompt_mass@50": "topk_prompt_mass",
    "resid_norm_ratio": "resid_norm_ratio",
    "delta_resid_cos": "delta_resid_cos",
}
REQUIRED = (
    *PASS_KEY,
    "layer",
    "pos",
    "token",
    *(f"{kind}{i}" for i in range(1, TOP + 1) for kind in ("top", "prob")),
    "is_answer",
    "answer_minus_uniform",
    *RENAMED,
)
RAW_REQUIRED = (
    *PASS_KEY,
    "layer",
    "p_top1_raw",
    "top1_token_id_raw",
    "top1_token_str_raw",
    "p_answer_raw",
    "answer_rank_raw",
    "top1_token_id_norm",
    "kl_norm_vs_raw_bits",
    "kl_raw_to_norm_bits",
    "js_divergence",
    "entropy_bits_raw",
    "l1_prob_diff",
    "topk_jaccard_raw_norm@50",
    "topk_jaccard_consecutive@50",
)
# Overlaps in the main table were overwritten by later facts; these are the right ones.
RAW_ON_NORM = {
    "kl_norm_vs_raw_bits": "kl_norm_vs_raw_bits",
    "kl_raw_to_norm_bits": "kl_raw_to_norm_bits",
    "js_divergence": "js_norm_raw_bits",
    "l1_prob_diff": "l1_norm_raw",
    "topk_jaccard_raw_norm@50": "topk_jaccard_raw_norm",
    "topk_jaccard_consecutive@50": "topk_jaccard_consecutive",
}


def is_published(path: Path) -> bool:
    """Say whether a path looks like one of the earlier system's tables (a CSV file)."""
    return path.suffix.lower() == ".csv"


def read_published(
    path: Path, *, rawlens: Path | None = None, others: Mapping[str, Path] | None = None
) -> LayersTable:
    """Read a published table of the norm lens, its raw-lens companion and other lenses' tables.

    `others` maps a lens name to a table of the same layout as `path`, e.g. {"tuned": ...}. The
    model's name is taken from the file name; n_layers is the largest layer; d_vocab follows from
    p_answer - answer_minus_uniform = 1 / d_vocab. Raises TableError naming missing columns, rows
    that occur twice, or a companion that belongs to another table.
    """
    main = _read(path, REQUIRED)
    if main.height == 0:
        raise TableError(f"{path} has a header but no rows; give a table of a finished run")
    passes = main.select(PASS_KEY).unique(maintain_order=True).with_row_index("prompt_index")
    frames = [_main_rows(main, passes, path, lens="norm")]
    if rawlens is not None:
        raw = _read(rawlens, RAW_REQUIRED)
        keyed = _join(raw, passes, rawlens)
        frames[0] = _with_comparison(frames[0], keyed)
        frames.append(_raw_rows(keyed, frames[0]))
    for lens, other in (others or {}).items():
        frames.append(_main_rows(_read(other, REQUIRED), passes, other, lens=lens))
    rows = conform(pl.concat(frames, how="diagonal"))
    return LayersTable(rows=rows, meta=_meta(path, rows, passes, main))


def read_numbers(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    """Read a published table of numbers alone, its columns in the given order.

    Raises TableError naming missing columns, or the first cell that is no number.
    """
    frame = _cells(path)
    _need(frame, required, path)
    counts = ("layer", "pos_index", "answer_rank", "rank_shift")
    return frame.select(
        _typed(frame[name], pl.Int64() if name.startswith(counts) else pl.Float64(), path)
        for name in required
    )


def _cells(path: Path) -> pl.DataFrame:
    """Parse the published dialect (comma, doubled quotes, backslash escapes); "" is null."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, escapechar="\\")
            header = next(reader, [])
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"{path} is not a readable CSV file: {error}") from error
    for number, cells in lines:
        if len(cells) != len(header):
            raise TableError(
                f"{path}, line {number}: {len(cells)} cells under {len(header)} columns; the file "
                "is cut off or not of the published dialect"
            )
    columns = zip(*(cells for _, cells in lines), strict=True) if lines else ((),) * len(header)
    return pl.DataFrame(
        {
            name: pl.Series([cell or None for cell in column], dtype=pl.String)
            for name, column in zip(header, columns, strict=True)
        }
    )


def _read(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    """Read one CSV and type the columns that are numbers or flags."""
    frame = _cells(path)
    _need(frame, required, path)
    return frame.select(_typed(frame[name], _kind(name, required), path) for name in frame.columns)


def _need(frame: pl.DataFrame, required: tuple[str, ...], path: Path) -> None:
    missing = [name for name in required if name not in frame.columns]
    if missing:
        hint = nearest(missing[0], frame.columns)
        raise TableError(f"{path} lacks the column(s) {', '.join(missing)}{hint}")


def _kind(name: str, required: tuple[str, ...]) -> pl.DataType | None:
    """Return the type of a column, None for text (and for columns that are not read)."""
    if name in ("is_answer", "copy_collapse", "norm_only_semantics") or name.startswith(
        ("copy_strict@", "copy_soft_k")
    ):
        return pl.Boolean()
    if name in ("fact_index", "layer", "pos") or name.startswith(("answer_rank", "top1_token_id")):
        return pl.Int32()
    if name in TEXTS or re.fullmatch(r"top\d+|top1_token_str.*", name) or name not in required:
        return None
    return pl.Float64()


def _typed(cells: pl.Series, kind: pl.DataType | None, path: Path) -> pl.Series:
    """Cast one column; raises TableError with the first cell that does not fit."""
    if kind is None:
        return cells
    if isinstance(kind, pl.Boolean):
        typed = cells.replace_strict(
            {"True": True, "False": False}, default=None, return_dtype=pl.Boolean
        )
        expected = "True or False"
    else:
        typed = cells.cast(kind, strict=False)
        expected = "a whole number" if kind.is_integer() else "a number"
    wrong = (typed.is_null() & cells.is_not_null()).arg_true()
    if len(wrong):
        raise TableError(
            f"{path}, data row {wrong[0] + 1}: {cells[wrong[0]]!r} in column {cells.name} is not "
            f"{expected}"
        )
    return typed


def _join(frame: pl.DataFrame, passes: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Attach the pass number; refuse rows that belong to no pass or layer, or occur twice."""
    if frame["layer"].null_count():
        raise TableError(f"{path} holds rows without a layer; every row needs one")
    keyed = frame.join(passes, on=PASS_KEY, how="left", nulls_equal=True, maintain_order="left")
    if keyed["prompt_index"].null_count():
        raise TableError(f"{path} holds prompts that the main table lacks; give tables of one run")
    twice = keyed.select(keyed.select("prompt_index", "layer").is_duplicated().sum()).item()
    if twice:
        raise TableError(
            f"{path} holds {twice} rows with the same prompt and layer; remove repeats"
        )
    return keyed.with_columns(pl.col("prompt_index").cast(pl.Int32))


def _main_rows(frame: pl.DataFrame, passes: pl.DataFrame, path: Path, *, lens: str) -> pl.DataFrame:
    keyed = _join(frame, passes, path)
    for stem in ("copy_strict@", "copy_soft_k"):
        if not any(name.startswith(stem) for name in keyed.columns):
            raise TableError(
                f"{path} lacks the columns {stem}...; without the prompt's tokens echo cannot be "
                "found in another way"
            )
    flags = [name for name in keyed.columns if name.startswith(("copy_strict@", "copy_soft_k"))]
    keep = [name for name in ("copy_collapse", *flags) if name in keyed.columns]
    tops = [pl.col(f"top{i}") for i in range(1, TOP + 1)]
    probs = [pl.col(f"prob{i}") for i in range(1, TOP + 1)]
    return keyed.select(
        pl.col("prompt_index", *PASS_KEY, "layer", "pos", "token"),
        pl.lit(lens).alias("lens"),
        pl.lit(True).alias("is_last"),
        pl.lit("next_norm").alias("norm_choice"),
        pl.lit("").alias("norm_module"),
        pl.concat_list(tops).alias("top_tokens"),
        pl.concat_list(probs).alias("top_probs"),
        *(pl.col(name).alias(ours) for name, ours in RENAMED.items()),
        pl.col("topk_jaccard_consecutive@50").alias("topk_jaccard_consecutive")
        if lens != "norm" and "topk_jaccard_consecutive@50" in keyed.columns
        else pl.lit(None, pl.Float64).alias("topk_jaccard_consecutive"),
        pl.col("is_answer", "answer_minus_uniform", *keep),
    ).with_columns(pl.col("topk_jaccard_consecutive").cast(pl.Float64))


def _with_comparison(norm: pl.DataFrame, keyed: pl.DataFrame) -> pl.DataFrame:
    """Add to the norm rows what the raw-lens table says about them."""
    extra = keyed.select(
        "prompt_index",
        "layer",
        pl.col("top1_token_id_norm").alias("_top1_id"),
        *(pl.col(name).cast(pl.Float64).alias(ours) for name, ours in RAW_ON_NORM.items()),
    )
    known = norm.drop("topk_jaccard_consecutive")
    joined = known.join(extra, on=["prompt_index", "layer"], how="left", maintain_order="left")
    # Only the first of the listed tokens has a published id.
    ids = pl.concat_list(pl.col("_top1_id"), *[pl.lit(None, pl.Int32)] * (TOP - 1))
    return joined.with_columns(
        pl.when(pl.col("_top1_id").is_not_null()).then(ids).alias("top_ids")
    ).drop("_top1_id")


def _raw_rows(keyed: pl.DataFrame, norm: pl.DataFrame) -> pl.DataFrame:
    raw = keyed.select(
        pl.col("prompt_index", *PASS_KEY, "layer"),
        pl.lit("raw").alias("lens"),
        pl.lit(True).alias("is_last"),
        pl.lit("none").alias("norm_choice"),
        pl.lit("").alias("norm_module"),
        pl.concat_list("top1_token_id_raw").alias("top_ids"),
        pl.concat_list("top1_token_str_raw").alias("top_tokens"),
        pl.concat_list(pl.col("p_top1_raw").cast(pl.Float64)).alias("top_probs"),
        pl.col("p_top1_raw").cast(pl.Float64).alias("p_top1"),
        pl.col("p_answer_raw").cast(pl.Float64).alias("p_answer"),
        pl.col("answer_rank_raw").alias("answer_rank"),
        pl.col("entropy_bits_raw").cast(pl.Float64).alias("entropy_bits"),
    )
    where = norm.select("prompt_index", "layer", "pos", "token", "teacher_entropy_bits")
    raw = raw.join(where, on=["prompt_index", "layer"], how="left", maintain_order="left")
    return raw.with_columns(_raw_flags(raw, norm))


def _raw_flags(raw: pl.DataFrame, norm: pl.DataFrame) -> list[pl.Series]:
    """Derive the strict flags of the raw rows, which were not published, as far as they follow.

    A raw row is flagged when its top-1 id is one that made a norm row of the same pass a flagged
    echo (so it is a prompt token) and its probability suffices; it is not flagged when the
    probability does not; otherwise its flag is unknown.
    """
    labels = [name for name in norm.columns if name.startswith("copy_strict@")]
    if not labels or "top_ids" not in norm.columns:
        return []
    echoes: dict[int, set[int]] = {}
    any_flag = norm.filter(pl.any_horizontal(pl.col(label) for label in labels))
    for index, ids in any_flag.select("prompt_index", "top_ids").iter_rows():
        if ids and ids[0] is not None:
            echoes.setdefault(index, set()).add(ids[0])
    p1 = raw["p_top1"].fill_null(float("nan")).to_numpy()
    clear = margin_exceeds(p1, np.full(len(p1), np.nan), PUBLISHED_MARGIN)
    in_prompt = [
        bool(ids) and ids[0] in echoes.get(index, ())
        for index, ids in raw.select("prompt_index", "top_ids").iter_rows()
    ]
    columns: list[pl.Series] = []
    for label in labels:
        threshold = float(label.removeprefix("copy_strict@"))
        values = [
            False if not p > threshold else True if known and sure else None
            for p, known, sure in zip(p1, in_prompt, clear, strict=True)
        ]
        columns.append(pl.Series(label, values, dtype=pl.Boolean))
    return columns


def _meta(path: Path, rows: pl.DataFrame, passes: pl.DataFrame, main: pl.DataFrame) -> TableMeta:
    n_layers = int(rows["layer"].to_numpy().max())
    prompts = tuple(_prompt(entry, rows) for entry in passes.iter_rows(named=True))
    labels = [name for name in rows.columns if name.startswith("copy_strict@")]
    return TableMeta(
        model=model_name(path),
        n_layers=n_layers,
        d_vocab=_d_vocab(main, path),
        architecture="pre_norm",
        norm_choice="next_norm",
        prompts=prompts,
        source="published",
        provenance={
            "file": path.name,
            "copy_thresholds": [trimmed(float(name.split("@")[1])) for name in labels],
        },
    )


def model_name(path: Path) -> str:
    """Return the model's name from `output-NAME-pure-next-token.csv`, else the file's stem."""
    return path.stem.removeprefix("output-").removesuffix("-pure-next-token")


def _d_vocab(main: pl.DataFrame, path: Path) -> int:
    """Recover the vocabulary size from the row with the least likely answer (no cancellation)."""
    known = main.drop_nulls(["p_answer", "answer_minus_uniform"]).sort("p_answer")
    if known.height == 0:
        raise TableError(f"{path} has no row with p_answer and answer_minus_uniform")
    p, above = known.select("p_answer", "answer_minus_uniform").row(0)
    if not p - above > 0:
        raise TableError(
            f"{path}: p_answer - answer_minus_uniform must be 1 / d_vocab, is {p - above}"
        )
    return round(1.0 / (p - above))


def _prompt(entry: dict[str, Any], rows: pl.DataFrame) -> PromptInfo:
    part = rows.filter((pl.col("prompt_index") == entry["prompt_index"]) & pl.col("is_last"))
    norm = part.filter(pl.col("lens") == "norm")
    aligned = norm["p_answer"].null_count() < norm.height
    entropy = norm["teacher_entropy_bits"].drop_nulls()
    key: str | None = entry["fact_key"]
    head = (
        HeadInfo(entropy_bits=float(entropy[0]), top_ids=(), top_tokens=(), top_probs=())
        if len(entropy)
        else None
    )
    return PromptInfo(
        prompt_index=entry["prompt_index"],
        fact_key=key,
        fact_index=entry["fact_index"],
        prompt_id=entry["prompt_id"],
        prompt_variant=entry["prompt_variant"],
        text="",
        prompt_ids=(),
        tokens=(),
        answer=key.split(ARROW)[-1] if key and ARROW in key else None,
        alignment_status="ok" if aligned else "unresolved",
        head=head,
    )
