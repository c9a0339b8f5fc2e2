"""Milestones of every question through every lens, from the rows of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.battery.decode import FOIL_RANK
from layerscope.experiments.battery.prepare import Asked
from layerscope.experiments.battery.wordings import Wordings
from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.copy import CopyFlags
from layerscope.measures.detectors import difference, earliest, first_true
from layerscope.measures.distribution import entropy_gap_fields
from layerscope.measures.raw_norm import RawNorm
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.semantics import confirmed_semantics, semantic_milestones
from layerscope.measures.table import LayersTable, PromptInfo, TableMeta

KEPT_ROWS = (
    "prompt_index",
    "lens",
    "layer",
    "answer_rank",
    "answer_log2p",
    "p_answer",
    "p_top1",
    "top1",
    "entropy_bits",
    "kl_to_final_bits",
    "kl_norm_vs_raw_bits",
    FOIL_RANK,
    "nonfinite",
)
"""Columns of the rows table, as far as one batch knows them."""

_ONSETS = ("L_semantic_run2", "L_semantic_margin_ok", "L_semantic_strong")


def describe(entry: Asked, wordings: Wordings) -> dict[str, Any]:
    """Return what is known of a question before it is run."""
    question, prepared = entry.question, entry.prepared
    item = question.item
    return {
        "prompt_index": entry.index,
        "item": item.key,
        "relation": item.relation,
        "language": item.language,
        "entity": item.entity or item.subject,
        "subject": item.subject,
        "frequency": item.frequency,
        "name_length": wordings.length(item),
        "invented": item.invented,
        "part": question.part,
        "variant": question.variant,
        "prompt": prepared.source.text,
        "prompt_sha256": prepared.prompt_sha256,
        "tokens": prepared.length,
        "answer": question.answer,
        "answer_tokens": len(prepared.alignment.ids),
        "answer_first": (prepared.alignment.pieces or ("",))[0],
        "first_token_shared": entry.first_token_shared,
        "foil": prepared.source.foil,
    }


def measure(
    rows: pl.DataFrame,
    asked: Sequence[Asked],
    config: MeasureConfig,
    *,
    n_layers: int,
    d_vocab: int,
) -> list[dict[str, Any]]:
    """Return one record per question and lens: its milestones as row indices, and its checks."""
    infos = tuple(
        PromptInfo(
            prompt_index=entry.index,
            fact_key=entry.question.item.key,
            fact_index=None,
            prompt_id="pos",
            prompt_variant=entry.question.variant,
            text=entry.prepared.source.text,
            prompt_ids=entry.prepared.prompt_ids,
            tokens=(),
            answer=entry.question.answer,
        )
        for entry in asked
    )
    meta = TableMeta(model="", n_layers=n_layers, d_vocab=d_vocab, prompts=infos)
    parts = pass_rows(LayersTable(rows, meta))
    found: list[dict[str, Any]] = []
    for (index, lens), part in parts.items():
        others = {
            name: parts[index, name]
            for name in ("raw", "tuned")
            if name != lens and (index, name) in parts
        }
        found.append(_record(part, others, config, d_vocab=d_vocab))
    return found


def _record(
    part: PassRows, others: Mapping[str, PassRows], config: MeasureConfig, *, d_vocab: int
) -> dict[str, Any]:
    milestones = semantic_milestones(part, config, d_vocab=d_vocab)
    onset = milestones["L_semantic"].first
    flags = CopyFlags(part, config)
    strict = first_true(flags.strict(config.copy_threshold).true, part.layers)
    soft = {
        k: first_true(flags.soft(k, config.copy_soft_threshold).true, part.layers)
        for k in config.copy_soft_window_ks
    }
    copy = strict if strict is not None else earliest(list(soft.values()))
    delta = difference(onset, copy)
    gaps = entropy_gap_fields(part)["entropy_gap_bits_percentiles"]
    names = [f"first_rank_le_{k}" for k in config.rank_thresholds]
    names += [f"first_kl_below_{decimal(t)}" for t in config.kl_thresholds_bits]
    record: dict[str, Any] = {
        "prompt_index": part.prompt.prompt_index,
        "lens": part.lens,
        "L_semantic": onset,
        "onset": None if onset is None else onset / part.n_layers,
        **{name: milestones[name].first for name in (*_ONSETS, *names)},
        "L_copy": strict,
        **{f"L_copy_soft_k{k}": layer for k, layer in soft.items()},
        "delta_hat": None if delta is None else delta / part.n_layers,
        **{f"entropy_gap_bits_{name}": value for name, value in gaps.items()},
        "p_answer_at_onset": part.at("p_answer", onset),
        "p_answer_last": part.at("p_answer", part.n_layers),
        "answer_rank_last": _whole(part.at("answer_rank", part.n_layers)),
        "foil_rank_at_onset": _whole(part.at(FOIL_RANK, onset)),
        "kl_to_final_bits_last": part.at("kl_to_final_bits", part.n_layers),
        "nonfinite_rows": int(part.true("nonfinite").sum()),
        "artifact_score": None,
        "artifact_tier": None,
        "L_semantic_confirmed": None,
        "confirmed_source": None,
    }
    if part.lens == "norm":
        if "raw" in others:
            score = RawNorm(part, others["raw"]).full(config)["score"]
            record["artifact_score"] = score["lens_artifact_score"]
            record["artifact_tier"] = score["tier"]
        if others:
            confirmed = confirmed_semantics(part, others, config)
            record["L_semantic_confirmed"] = confirmed["L_semantic_confirmed"]
            record["confirmed_source"] = confirmed["confirmed_source"]
    return record


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
