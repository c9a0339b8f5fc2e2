"""The per-row CSV files as frames: the same columns in the same order as the earlier system's."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import flag_columns, with_copy_flags
from layerscope.measures.table import LayersTable

NEXT_TOKEN = "⟨NEXT⟩"
TOP_CELLS = 20  # top1, prob1, ..., top20, prob20
PURE_TOP = 5  # of which a last-position row fills this many
RECORD_TOP = 5  # and a record this many, except at the positions below, which fill all
VERBOSE_WORDS = ("Germany", "Berlin", "capital", "Answer", "word", "simply")
MASS_RATIO_EPSILON = 1e-9
_STRIPPED = ".,!?;:"
_PASS = ("fact_key", "fact_index", "prompt_id", "prompt_variant")
_ROW = ("prompt_index", "layer")


def last_rows(table: LayersTable, lens: str) -> pl.DataFrame:
    """Return the last-position rows of one lens, by pass and layer."""
    rows = table.rows.filter(pl.col("is_last") & (pl.col("lens") == lens))
    return rows.sort(*_ROW, maintain_order=True)


def of_lens(table: LayersTable, lens: str) -> pl.DataFrame:
    """Return all rows of one lens; a tuned lens has no row 0 in these files."""
    rows = table.rows.filter(pl.col("lens") == lens)
    return rows.filter(pl.col("layer") > 0) if lens == "tuned" else rows


def pure_next_token(table: LayersTable, config: MeasureConfig, lens: str = "norm") -> pl.DataFrame:
    """Return one row per pass and layer of a lens at the last position (85 columns)."""
    own = LayersTable(last_rows(LayersTable(of_lens(table, lens), table.meta), lens), table.meta)
    rows = with_copy_flags(own, config).rows
    present = set(rows.columns)
    uniform = 1.0 / table.meta.d_vocab
    p_answer, echo = pl.col("p_answer"), pl.col("echo_mass_prompt")
    above = p_answer - uniform
    if "answer_minus_uniform" in present:  # a published table brings its own rounding
        above = pl.coalesce("answer_minus_uniform", above)
    rank_one = pl.col("answer_rank") == 1
    return rows.select(
        *_PASS,
        "layer",
        "pos",
        pl.lit(NEXT_TOKEN).alias("token"),
        pl.col("entropy_bits").alias("entropy"),
        "entropy_bits",
        *_top_cells(pl.lit(PURE_TOP)),
        _rest_mass(PURE_TOP).alias("rest_mass"),
        "copy_collapse",
        *flag_columns(config),
        (pl.col("entropy_bits") <= config.entropy_collapse_bits).alias("entropy_collapse"),
        _is_answer(table, rows).alias("is_answer"),
        "p_top1",
        "p_top5",
        "p_answer",
        above.alias("answer_minus_uniform"),
        # Defined for the norm lens alone.
        pl.when(pl.lit(lens == "norm"))
        .then(rank_one & (above >= config.semantic_margin))
        .alias("semantic_margin_ok"),
        "teacher_entropy_bits",
        "kl_to_final_bits",
        "kl_to_final_bits_norm_temp",
        "answer_rank",
        pl.col("topk_jaccard_raw_norm").alias("topk_jaccard_raw_norm@50"),
        pl.col("topk_jaccard_consecutive").alias("topk_jaccard_consecutive@50"),
        "cos_to_final",
        "cos_to_answer",
        "cos_to_prompt_max",
        (pl.col("cos_to_answer") >= pl.col("cos_to_prompt_max") + config.geom_gamma).alias(
            "geom_crossover"
        ),
        "echo_mass_prompt",
        pl.when(echo.is_not_null()).then(p_answer).alias("answer_mass"),
        (p_answer - echo).alias("answer_minus_echo_mass"),
        (p_answer / (echo + MASS_RATIO_EPSILON)).alias("mass_ratio_ans_over_prompt"),
        pl.col("topk_prompt_mass").alias("topk_prompt_mass@50"),
        "control_margin",
        "resid_norm_ratio",
        "delta_resid_cos",
        "answer_logit_gap",
        "answer_vs_top1_gap",
    )


def records(table: LayersTable, lens: str = "norm") -> pl.DataFrame:
    """Return one row per pass, layer and position of a lens: entropy and top tokens."""
    rows = of_lens(table, lens)
    rows = rows.sort(*_ROW, "pos", maintain_order=True)
    word = pl.col("token").str.strip_chars().str.strip_chars(_STRIPPED).str.to_lowercase()
    verbose = pl.col("is_last") | pl.any_horizontal(
        word.str.contains(text.lower(), literal=True) for text in VERBOSE_WORDS
    )
    shown = pl.when(verbose.fill_null(False)).then(TOP_CELLS).otherwise(RECORD_TOP)
    rows = rows.with_columns(shown.alias("_shown"))
    return rows.select(
        *_PASS,
        "layer",
        "pos",
        "token",
        pl.col("entropy_bits").alias("entropy"),
        "entropy_bits",
        *_top_cells(pl.col("_shown")),
        pl.when(pl.col("_shown") == TOP_CELLS)
        .then(_rest_mass(TOP_CELLS))
        .otherwise(_rest_mass(RECORD_TOP))
        .alias("rest_mass"),
    )


def raw_against_norm(table: LayersTable) -> pl.DataFrame:
    """Return one row per pass and layer that both lenses have: raw beside norm."""
    both = _both(table)
    rank_norm, rank_raw = pl.col("answer_rank"), pl.col("answer_rank_raw")
    return both.select(
        *_PASS,
        "layer",
        "p_top1_raw",
        "top1_token_id_raw",
        "top1_token_str_raw",
        "p_answer_raw",
        "answer_rank_raw",
        pl.col("p_top1").alias("p_top1_norm"),
        "top1_token_id_norm",
        "top1_token_str_norm",
        pl.col("p_answer").alias("p_answer_norm"),
        rank_norm.alias("answer_rank_norm"),
        "kl_norm_vs_raw_bits",
        "kl_raw_to_norm_bits",
        pl.col("js_norm_raw_bits").alias("js_divergence"),
        pl.col("entropy_bits").alias("entropy_bits_norm"),
        "entropy_bits_raw",
        (pl.col("entropy_bits") - pl.col("teacher_entropy_bits")).alias("entropy_gap_bits"),
        pl.col("l1_norm_raw").alias("l1_prob_diff"),
        pl.col("topk_jaccard_raw_norm").alias("topk_jaccard_raw_norm@50"),
        pl.col("topk_jaccard_consecutive").alias("topk_jaccard_consecutive@50"),
        ((rank_norm == 1) & (rank_raw != 1)).alias("norm_only_semantics"),
    )


def raw_window(table: LayersTable, layers: Sequence[Sequence[int]]) -> pl.DataFrame:
    """Return two rows, norm and raw, per checked layer; `layers` lists them per pass, in order."""
    passes = [prompt.prompt_index for prompt in table.passes()]
    checked = pl.DataFrame(
        {"prompt_index": passes, "layer": [list(entry) for entry in layers]},
        schema={"prompt_index": pl.Int32, "layer": pl.List(pl.Int32)},
    ).explode("layer", empty_as_null=False)
    both = _both(table).join(checked, on=list(_ROW), how="semi", maintain_order="left")
    kl = pl.col("kl_norm_vs_raw_bits")
    sides = [
        both.select(
            *_ROW,
            *_PASS,
            pl.lit(lens).alias("lens"),
            pl.col(f"p_top1{suffix}").alias("p_top1"),
            pl.col(f"top1_token_id_{lens}").alias("top1_token_id"),
            pl.col(f"top1_token_str_{lens}").alias("top1_token_str"),
            pl.col(f"p_answer{suffix}").alias("p_answer"),
            pl.col(f"answer_rank{suffix}").alias("answer_rank"),
            kl,
        )
        for lens, suffix in (("norm", ""), ("raw", "_raw"))
    ]
    rows = pl.concat(sides).sort(*_ROW, "lens", maintain_order=True)
    statistics = ("p_top1", "top1_token_id", "top1_token_str", "p_answer", "answer_rank")
    return rows.select(*_PASS, "layer", "lens", *statistics, "kl_norm_vs_raw_bits")


def _both(table: LayersTable) -> pl.DataFrame:
    """Return the norm rows with the raw lens's values beside them, suffixed `_raw`."""
    top_id = pl.col("top_ids").list.get(0, null_on_oob=True)
    top_text = pl.col("top_tokens").list.get(0, null_on_oob=True)
    norm = last_rows(table, "norm").with_columns(
        top_id.alias("top1_token_id_norm"), top_text.alias("top1_token_str_norm")
    )
    raw = last_rows(table, "raw").select(
        *_ROW,
        pl.col("p_top1", "p_answer", "answer_rank", "entropy_bits").name.suffix("_raw"),
        top_id.alias("top1_token_id_raw"),
        top_text.alias("top1_token_str_raw"),
    )
    return norm.join(raw, on=list(_ROW), how="inner", maintain_order="left")


def _top_cells(shown: pl.Expr) -> list[pl.Expr]:
    """Return top1, prob1, ..., top20, prob20, of which the first `shown` are filled."""
    cells: list[pl.Expr] = []
    for index in range(TOP_CELLS):
        for kind, source in (("top", "top_tokens"), ("prob", "top_probs")):
            value = pl.col(source).list.get(index, null_on_oob=True)
            cells.append(pl.when(shown > index).then(value).alias(f"{kind}{index + 1}"))
    return cells


def _rest_mass(listed: int) -> pl.Expr:
    """Return the probability outside the first `listed` tokens, at least 0; null if none is."""
    total = pl.col("top_probs").list.head(listed).list.sum()
    known = pl.col("top_probs").list.len() > 0
    return pl.when(known).then((1.0 - total).clip(lower_bound=0.0))


def _is_answer(table: LayersTable, rows: pl.DataFrame) -> pl.Expr:
    """Rank 1; where the rank is unknown, the trimmed text of the top token equals the answer."""
    answers = {prompt.prompt_index: (prompt.answer or "").strip() for prompt in table.passes()}
    gold = pl.col("prompt_index").replace_strict(answers, default=None, return_dtype=pl.String)
    text = pl.col("top_tokens").list.get(0, null_on_oob=True).str.strip_chars()
    by_text = pl.when(gold.is_not_null() & (gold != "")).then(text == gold)
    by_rank = pl.col("answer_rank") == 1
    if "is_answer" in rows.columns:
        return pl.coalesce("is_answer", by_rank, by_text)
    return pl.coalesce(by_rank, by_text)
