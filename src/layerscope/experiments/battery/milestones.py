"""Milestones of every question through every lens, from the rows of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from layerscope.experiments.battery.decode import FOIL_RANK
from layerscope.experiments.battery.prepare import Asked
from layerscope.experiments.battery.wordings import Wordings
from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.copy import CopyFlags
from layerscope.measures.detectors import difference, earliest, first_true
from layerscope.measures.raw_norm import RawNorm
from layerscope.measures.rows import Columns, PassRows, pass_rows
from layerscope.measures.semantics import confirmed_semantics, margin_ok, strong
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
        for entry in sorted(asked, key=lambda entry: entry.index)
    )
    meta = TableMeta(model="", n_layers=n_layers, d_vocab=d_vocab, prompts=infos)
    parts = pass_rows(LayersTable(rows, meta))
    found: list[dict[str, Any]] = []
    for lens in rows["lens"].unique(maintain_order=True):
        own = [parts[info.prompt_index, lens] for info in infos]
        onsets = _onsets(rows, lens, own, config, d_vocab=d_vocab)
        for part, onset in zip(own, onsets, strict=True):
            index = part.prompt.prompt_index
            record = {"prompt_index": index, "lens": lens, **onset, **_echo(part, onset, config)}
            others = {
                name: parts[index, name]
                for name in ("raw", "tuned")
                if name != lens and (index, name) in parts
            }
            found.append(record | _trust(part, others if lens == "norm" else {}, config))
    return found


def _onsets(
    rows: pl.DataFrame, lens: str, parts: Sequence[PassRows], config: MeasureConfig, *, d_vocab: int
) -> list[dict[str, Any]]:
    """Return the onset family of all questions through one lens at once.

    The measures' conditions hold row by row, so they take all questions as one long pass.
    """
    frame = rows.filter(pl.col("lens") == lens).sort("prompt_index", "layer")
    n_layers = parts[0].n_layers
    shape = (len(parts), n_layers + 1)
    whole = PassRows(parts[0].prompt, lens, Columns(frame), 0, frame.height, n_layers)
    rank, kl = whole.floats("answer_rank"), whole.floats("kl_to_final_bits")
    top = rank == 1
    conditions = {
        "L_semantic": top,
        "L_semantic_margin_ok": margin_ok(whole, config, d_vocab),
        "L_semantic_strong": strong(whole, config, d_vocab),
        **{f"first_rank_le_{k}": rank <= k for k in config.rank_thresholds},
        **{f"first_kl_below_{decimal(t)}": kl <= t for t in config.kl_thresholds_bits},
    }
    first = {name: _first(hits.reshape(shape)) for name, hits in conditions.items()}
    twice = top.reshape(shape)
    first["L_semantic_run2"] = _first(twice[:, :-1] & twice[:, 1:])
    last = {
        "p_answer_last": whole.floats("p_answer"),
        "answer_rank_last": rank,
        "kl_to_final_bits_last": kl,
    }
    ends = {name: values.reshape(shape)[:, -1] for name, values in last.items()}
    p_answer = whole.floats("p_answer").reshape(shape)
    foil = whole.floats(FOIL_RANK).reshape(shape)
    broken = whole.true("nonfinite").reshape(shape).sum(1)
    gaps = _gaps(whole.floats("entropy_bits") - whole.floats("teacher_entropy_bits"), shape)
    found: list[dict[str, Any]] = []
    for number in range(len(parts)):
        record: dict[str, Any] = {name: layers[number] for name, layers in first.items()}
        onset = record["L_semantic"]
        record["onset"] = None if onset is None else onset / n_layers
        record["p_answer_at_onset"] = None if onset is None else _value(p_answer[number, onset])
        record["foil_rank_at_onset"] = None if onset is None else _whole(foil[number, onset])
        record |= {name: _value(values[number]) for name, values in ends.items()}
        record["answer_rank_last"] = _whole(ends["answer_rank_last"][number])
        record |= {name: _value(values[number]) for name, values in gaps.items()}
        found.append(record | {"nonfinite_rows": int(broken[number])})
    return found


def _gaps(
    gap: Float[np.ndarray, " question_row"], shape: tuple[int, int]
) -> dict[str, Float[np.ndarray, " question"]]:
    """Return quartiles over the known rows of every question, as `detectors.percentile` has it."""
    ordered = np.sort(gap.reshape(shape), axis=1)  # NaN comes last
    last = (~np.isnan(ordered)).sum(1) - 1
    every = np.arange(len(ordered))
    found: dict[str, Float[np.ndarray, " question"]] = {}
    for q in (0.25, 0.5, 0.75):
        rank = np.maximum(last, 0) * q
        low, high = np.floor(rank).astype(int), np.ceil(rank).astype(int)
        weight = rank - low
        between = ordered[every, low] * (1.0 - weight) + ordered[every, high] * weight
        found[f"entropy_gap_bits_p{round(100 * q)}"] = between
    return found


def _echo(part: PassRows, onset: Mapping[str, Any], config: MeasureConfig) -> dict[str, Any]:
    """Return the rows that echo the prompt, and delta-hat: (onset - echo) / n_layers."""
    flags = CopyFlags(part, config)
    strict = first_true(flags.strict(config.copy_threshold).true, part.layers)
    soft = {
        k: first_true(flags.soft(k, config.copy_soft_threshold).true, part.layers)
        for k in config.copy_soft_window_ks
    }
    copy = strict if strict is not None else earliest(list(soft.values()))
    delta = difference(onset["L_semantic"], copy)
    return {
        "L_copy": strict,
        **{f"L_copy_soft_k{k}": layer for k, layer in soft.items()},
        "delta_hat": None if delta is None else delta / part.n_layers,
    }


def _trust(part: PassRows, others: Mapping[str, PassRows], config: MeasureConfig) -> dict[str, Any]:
    """Return the artefact tier (norm against raw) and which lens confirms the onset."""
    record: dict[str, Any] = dict.fromkeys(
        ("artifact_score", "artifact_tier", "L_semantic_confirmed", "confirmed_source")
    )
    if "raw" in others:
        score = RawNorm(part, others["raw"]).full(config)["score"]
        record["artifact_score"] = score["lens_artifact_score"]
        record["artifact_tier"] = score["tier"]
    if others:
        confirmed = confirmed_semantics(part, others, config)
        record["L_semantic_confirmed"] = confirmed["L_semantic_confirmed"]
        record["confirmed_source"] = confirmed["confirmed_source"]
    return record


def _first(hits: Bool[np.ndarray, "question row"]) -> list[int | None]:
    """Return the first row of each question where a condition holds; rows are all layers from 0."""
    rows = hits.argmax(1)
    found = np.take_along_axis(hits, rows[:, None], 1)[:, 0]
    return [int(row) if there else None for row, there in zip(rows, found, strict=True)]


def _value(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)
