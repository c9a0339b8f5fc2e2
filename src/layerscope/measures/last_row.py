"""Does the last row of a lens equal the model's own head? If not, it misreads every row."""

from __future__ import annotations

from typing import Any

from layerscope.measures.config import MeasureConfig
from layerscope.measures.rows import PassRows
from layerscope.measures.table import LastRowInfo, TableMeta


def last_row_warns(kl: float | None, kl_after_temp: float | None, config: MeasureConfig) -> bool:
    """Say whether KL, or what a single temperature removes of it, reaches the gate (0.25 bits)."""
    if kl is None:
        return False
    removed = kl - kl_after_temp if kl_after_temp is not None else 0.0
    return kl >= config.last_row_kl_bits or removed >= config.last_row_kl_bits


def last_row_consistency(part: PassRows, meta: TableMeta, config: MeasureConfig) -> dict[str, Any]:
    """Compare row n of one pass with the model's head at the last position (bits).

    Uses what the run recorded; for a table without that record, what row n itself holds.
    """
    info = next((row for row in part.prompt.last_rows if row.lens == part.lens), None)
    values = _recorded(info) if info is not None else _from_row(part)
    kl, after = values["kl_to_final_bits"], values["kl_after_temp_bits"]
    warns = last_row_warns(kl, after, config)
    return {
        "prompt_index": part.prompt.prompt_index,
        "fact_key": part.prompt.fact_key,
        "prompt_id": part.prompt.prompt_id,
        "prompt_variant": part.prompt.prompt_variant,
        "lens": part.lens,
        **values,
        "cfg_transform": {"scale": meta.logit_scale, "softcap": meta.softcap},
        "warn_high_last_layer_kl": warns,
        "gates": {
            "warn_high_last_layer_kl": warns,
            "threshold_bits": config.last_row_kl_bits,
            "delta_kl_temp_bits": None if kl is None or after is None else kl - after,
        },
    }


def _recorded(info: LastRowInfo) -> dict[str, Any]:
    return {
        "kl_to_final_bits": info.kl_to_final_bits,
        "top1_agree": info.top1_agree,
        "p_top1_lens": info.p_top1_lens,
        "p_top1_model": info.p_top1_model,
        "p_answer_lens": info.p_answer_lens,
        "answer_rank_lens": info.answer_rank_lens,
        "temp_est": info.temp_est,
        "kl_after_temp_bits": info.kl_after_temp_bits,
    }


def _from_row(part: PassRows) -> dict[str, Any]:
    n, head = part.n_layers, part.prompt.head
    rank = part.at("answer_rank", n)
    return {
        "kl_to_final_bits": part.at("kl_to_final_bits", n),
        "top1_agree": None,
        "p_top1_lens": part.at("p_top1", n),
        "p_top1_model": head.top_probs[0] if head is not None and head.top_probs else None,
        "p_answer_lens": part.at("p_answer", n),
        "answer_rank_lens": None if rank is None else int(rank),
        "temp_est": None,
        "kl_after_temp_bits": None,
    }
