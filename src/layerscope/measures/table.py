"""The typed table that everything downstream reads: one row per (prompt, lens, layer, position).

CSV, JSON, database and report are views of this one table, so no two of them can disagree. It
knows no torch: a table published by someone else can be read into the same shape and measured.

Row convention: row ("layer") 0 is the embedding before block 0, row k is the residual after block
k - 1; a model of n blocks has rows 0..n and a depth fraction is row / n.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.errors import TableError, nearest

SCHEMA_VERSION = 1
METADATA_KEY = "layerscope"

KEY_COLUMNS: tuple[str, ...] = ("prompt_index", "lens", "layer", "pos")

# Identity of a row. `pos` counts the tokens of the unpadded sequence; a beginning-of-sequence token
# is position 0.
IDENTITY: dict[str, pl.DataType] = {
    "prompt_index": pl.Int32(),  # order of the pass within its run
    "fact_key": pl.String(),  # null for a control pass that shares its fact with none
    "fact_index": pl.Int32(),
    "prompt_id": pl.String(),  # "pos" (a fact) or "ctl" (the control)
    "prompt_variant": pl.String(),  # "orig" or "no_filler" (the ablated wording)
    "lens": pl.String(),  # "raw", "norm", ...
    "layer": pl.Int32(),  # row index 0..n_layers
    "pos": pl.Int32(),
    "is_last": pl.Boolean(),  # the position whose next token is asked for
    "token": pl.String(),  # the token at `pos`
    "norm_choice": pl.String(),  # "final", "next_norm" or "none"
    "norm_module": pl.String(),  # dotted name of the module that was used, "" for the raw lens
}

# Known at every position that was decoded.
EVERY_POSITION: dict[str, pl.DataType] = {
    "entropy_bits": pl.Float64(),
    "top_ids": pl.List(pl.Int32()),  # most likely first
    "top_tokens": pl.List(pl.String()),
    "top_probs": pl.List(pl.Float64()),
    "top1_top2_gap": pl.Float64(),  # logits
    "kl_to_final_bits": pl.Float64(),  # KL(lens || model) at this position
    "final_top1_rank": pl.Int32(),  # rank, in this row, of the model's own top-1 at this position
    "final_top1_prob": pl.Float64(),
    "resid_norm": pl.Float64(),  # L2 norm of the undecoded residual
    "max_abs_logit": pl.Float64(),
    "min_prob": pl.Float64(),
    "nonfinite": pl.Boolean(),  # NaN or infinity in residual, normalised vector or logits
}

# Known at the last position only; null elsewhere.
LAST_POSITION: dict[str, pl.DataType] = {
    "p_top1": pl.Float64(),
    "p_top5": pl.Float64(),
    "p_answer": pl.Float64(),  # first token of the answer
    "answer_rank": pl.Int32(),  # 1 + number of tokens that are strictly more likely
    "answer_log2p": pl.Float64(),  # bits (<= 0)
    "answer_full_log2p": pl.Float64(),  # all tokens of the answer, teacher-forced, bits
    "answer_logit_gap": pl.Float64(),  # z[answer] - second largest; null unless the answer is top-1
    "answer_vs_top1_gap": pl.Float64(),  # z[answer] - largest; null unless the answer is not top-1
    "p_foil": pl.Float64(),
    "control_margin": pl.Float64(),  # p_answer - p_foil; null without a foil
    "teacher_entropy_bits": pl.Float64(),
    "kl_from_final_bits": pl.Float64(),  # KL(model || lens)
    "js_to_final_bits": pl.Float64(),
    "l1_to_final": pl.Float64(),
    # the norm lens under one temperature per row; on its rows only
    "kl_to_final_bits_norm_temp": pl.Float64(),
    "kl_from_final_bits_norm_temp": pl.Float64(),
    "cos_to_final": pl.Float64(),  # cosine of bias-free, untransformed logits
    "cos_to_answer": pl.Float64(),  # unembedded vector with the answer's unembedding row
    "cos_to_prompt_max": pl.Float64(),
    "echo_mass_prompt": pl.Float64(),
    "topk_prompt_mass": pl.Float64(),  # probability on prompt tokens among the 50 most likely
    "top1_ignorable": pl.Boolean(),  # top-1 is only white space, punctuation or control characters
    "resid_norm_ratio": pl.Float64(),  # |normalised| / |residual|
    "delta_resid_cos": pl.Float64(),  # cosine of residual and normalised vector
    "topk_jaccard_consecutive": pl.Float64(),  # top-50 sets of this row and the row before
    # raw against norm; on the norm rows only
    "kl_norm_vs_raw_bits": pl.Float64(),
    "kl_raw_to_norm_bits": pl.Float64(),
    "js_norm_raw_bits": pl.Float64(),
    "l1_norm_raw": pl.Float64(),
    "topk_jaccard_raw_norm": pl.Float64(),
}

# The order in which lenses are shown.
LENS_ORDER: dict[str, int] = {
    name: place
    for place, name in enumerate(
        ("norm", "raw", "temperature", "bias", "tuned", "prism", "jacobian")
    )
}

ROW_SCHEMA: dict[str, pl.DataType] = IDENTITY | EVERY_POSITION | LAST_POSITION
JACCARD_K = 50  # size of the token sets behind topk_jaccard_* and topk_prompt_mass


@dataclass(frozen=True)
class HeadInfo:
    """What the model itself predicts after the last token of a prompt (its true head)."""

    entropy_bits: float | None
    top_ids: tuple[int, ...]
    top_tokens: tuple[str, ...]
    top_probs: tuple[float, ...]
    p_answer: float | None = None
    answer_rank: int | None = None


@dataclass(frozen=True)
class LastRowInfo:
    """How the last row of a lens compares with the model's head at the last position (bits)."""

    lens: str
    kl_to_final_bits: float | None
    top1_agree: bool | None
    p_top1_lens: float | None
    p_top1_model: float | None
    p_answer_lens: float | None
    answer_rank_lens: int | None
    temp_est: float | None
    kl_after_temp_bits: float | None


@dataclass(frozen=True)
class PromptInfo:
    """One pass: its text, its tokens, its answer and how the answer was aligned.

    `text` is what was asked. `format` and `template` say what became of it before the model read
    it, and `prompt_sha256` covers both, the rendered text and its token ids.
    """

    prompt_index: int
    fact_key: str | None
    fact_index: int | None
    prompt_id: str
    prompt_variant: str
    text: str
    prompt_ids: tuple[int, ...]  # of the text: no special tokens, nothing of a chat template
    tokens: tuple[str, ...]  # of the whole unpadded sequence, special tokens included
    format: str = "raw"  # or "chat"
    template: str | None = None  # id of the task template
    prompt_sha256: str | None = None
    answer: str | None = None
    answer_ids: tuple[int, ...] = ()
    answer_pieces: tuple[str, ...] = ()
    answer_variant: str | None = None  # "with_space" or "no_space"
    alignment_status: str = "ok"  # "ok", or why there is no gold token
    foil: str | None = None
    foil_id: int | None = None
    head: HeadInfo | None = None
    last_rows: tuple[LastRowInfo, ...] = ()


@dataclass(frozen=True)
class TableMeta:
    """What one needs to know about a table to measure it."""

    model: str
    n_layers: int
    d_vocab: int
    d_model: int | None = None
    n_heads: int | None = None
    n_ctx: int | None = None
    architecture: str | None = None  # "pre_norm" or "post_norm"
    norm_choice: str = "final"
    softcap: float | None = None
    logit_scale: float | None = None
    unembed_bias: Mapping[str, Any] | None = None  # {present, l2_norm, max_abs}
    ignored_token_count: int | None = None
    ignored_token_sample: tuple[str, ...] = ()
    prompts: tuple[PromptInfo, ...] = ()
    # By lens: {status, reason} where it is not ready; else hash, held-out figures, warnings.
    lenses: Mapping[str, Any] = field(default_factory=lambda: {})
    # Of kl_*_norm_temp: {source: "artifact" or "in_run", tau: one per row, prompts: fitted on}.
    norm_temperature: Mapping[str, Any] | None = None
    source: str = "layerscope"
    schema_version: int = SCHEMA_VERSION
    provenance: Mapping[str, Any] = field(default_factory=lambda: {})

    def to_json(self) -> str:
        """Serialise to one line of JSON without NaN."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> TableMeta:
        """Read what `to_json` wrote; unknown keys of a newer minor version are ignored."""
        data: dict[str, Any] = json.loads(text)
        if data.get("schema_version", 0) > SCHEMA_VERSION:
            raise TableError(
                f"table schema {data['schema_version']} is newer than this layerscope understands "
                f"({SCHEMA_VERSION}); upgrade layerscope"
            )
        data["prompts"] = tuple(prompt_from_dict(entry) for entry in data.get("prompts", ()))
        data["ignored_token_sample"] = tuple(data.get("ignored_token_sample", ()))
        return TableMeta(**_known(TableMeta, data))


def _known(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(cls)}
    return {key: value for key, value in data.items() if key in names}


def prompt_from_dict(data: Mapping[str, Any]) -> PromptInfo:
    """Rebuild a pass from plain JSON values; unknown keys are ignored."""
    values = _known(PromptInfo, data)
    for name in ("prompt_ids", "tokens", "answer_ids", "answer_pieces"):
        values[name] = tuple(values.get(name, ()))
    if values.get("head") is not None:
        head = _known(HeadInfo, values["head"])
        for name in ("top_ids", "top_tokens", "top_probs"):
            head[name] = tuple(head[name])
        values["head"] = HeadInfo(**head)
    values["last_rows"] = tuple(
        LastRowInfo(**_known(LastRowInfo, row)) for row in values.get("last_rows", ())
    )
    return PromptInfo(**values)


@dataclass(frozen=True)
class LayersTable:
    """The rows of one model's run and what is needed to measure them."""

    rows: pl.DataFrame
    meta: TableMeta

    def __post_init__(self) -> None:
        check_columns(self.rows.columns)

    def passes(self) -> Iterable[PromptInfo]:
        """Return the passes in the order in which they were run."""
        return self.meta.prompts

    def last(self, *, lens: str, prompt_index: int | None = None) -> pl.DataFrame:
        """Return the last-position rows of one lens (and one pass), sorted by pass and layer."""
        frame = self.rows.filter(pl.col("is_last") & (pl.col("lens") == lens))
        if prompt_index is not None:
            frame = frame.filter(pl.col("prompt_index") == prompt_index)
        return frame.sort("prompt_index", "layer")

    @property
    def lenses(self) -> list[str]:
        """Names of the lenses in the table: norm, raw, the fitted ones, then any other."""
        names: list[str] = self.rows["lens"].unique(maintain_order=True).to_list()
        return sorted(names, key=lambda name: LENS_ORDER.get(name, len(LENS_ORDER)))

    def write_parquet(self, path: Path) -> None:
        """Write rows and metadata to one Parquet file (the caller renames it into place)."""
        self.rows.write_parquet(path, metadata={METADATA_KEY: self.meta.to_json()})

    @staticmethod
    def read_parquet(path: Path) -> LayersTable:
        """Read what `write_parquet` wrote; raises TableError when it is not such a file."""
        try:
            metadata = pl.read_parquet_metadata(path)
            rows = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise TableError(f"{path} is not a readable Parquet file: {error}") from error
        if METADATA_KEY not in metadata:
            raise TableError(
                f"{path} carries no layerscope metadata; pass the *-layers.parquet that a run wrote"
            )
        return LayersTable(rows=rows, meta=TableMeta.from_json(metadata[METADATA_KEY]))


def check_columns(columns: Iterable[str]) -> None:
    """Raise TableError when an identity column is missing or a column's name is a near miss."""
    present = list(columns)
    missing = [name for name in IDENTITY if name not in present]
    if missing:
        hint = nearest(missing[0], present)
        raise TableError(f"table lacks the column(s) {', '.join(missing)}{hint}")


def conform(frame: pl.DataFrame) -> pl.DataFrame:
    """Cast to the schema, add absent optional columns as nulls, order columns and rows.

    Columns beyond the schema (precomputed flags of a published table) are kept at the end.
    """
    check_columns(frame.columns)
    known = [
        (pl.col(name).cast(dtype) if name in frame.columns else pl.lit(None, dtype).alias(name))
        for name, dtype in ROW_SCHEMA.items()
    ]
    extra = [pl.col(name) for name in frame.columns if name not in ROW_SCHEMA]
    return frame.select(known + extra).sort(list(KEY_COLUMNS), maintain_order=True)
