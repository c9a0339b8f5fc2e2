"""Onset of the answer: ranks, divergence from the final distribution, margins and gaps.

Definitions after the layer-lens reference definitions (semantic onset family). The answer is
identified by its first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from layerscope.measures.config import MeasureConfig, decimal, trimmed
from layerscope.measures.detectors import (
    Milestone,
    depth_fraction,
    first_true,
    milestone,
    run_of_two,
)
from layerscope.measures.rows import PassRows

CONFIRMING_LENSES = ("raw", "tuned")


def is_answer(part: PassRows) -> Bool[np.ndarray, " row"]:
    """Say where the answer is top-1: rank 1, or, where the rank is unknown, equal trimmed text."""
    rank = part.floats("answer_rank")
    first = rank == 1
    if np.isnan(rank).any() and part.prompt.answer is not None:
        texts = part.entries("top_tokens", 0)
        gold = part.prompt.answer.strip()
        same = np.array([text is not None and text.strip() == gold for text in texts], dtype=bool)
        first = first | (np.isnan(rank) & same)
    return first


def margin_ok(part: PassRows, config: MeasureConfig, d_vocab: int) -> Bool[np.ndarray, " row"]:
    """Say where the answer is rank 1 and its probability exceeds uniform by the margin or more."""
    above = part.floats("p_answer") - 1.0 / d_vocab
    return (part.floats("answer_rank") == 1) & (above >= config.semantic_margin)


def gap_ok(part: PassRows, gap: float) -> Bool[np.ndarray, " row"]:
    """Say where the answer leads the runner-up by at least `gap` logits."""
    return part.floats("answer_logit_gap") >= gap


def strong(part: PassRows, config: MeasureConfig, d_vocab: int) -> Bool[np.ndarray, " row"]:
    """Say where rank 1, margin above uniform and gap to the runner-up all hold."""
    return margin_ok(part, config, d_vocab) & gap_ok(part, config.semantic_gap)


def semantic_milestones(
    part: PassRows, config: MeasureConfig, *, d_vocab: int
) -> dict[str, Milestone]:
    """Return every milestone of the onset family for one pass through one lens."""
    layers, n = part.layers, part.n_layers
    rank, kl = part.floats("answer_rank"), part.floats("kl_to_final_bits")
    cosine = part.floats("cos_to_final")
    top, firm = rank == 1, strong(part, config, d_vocab)
    conditions: dict[str, Bool[np.ndarray, " row"]] = {
        "L_semantic": is_answer(part),
        **{f"first_rank_le_{k}": rank <= k for k in config.rank_thresholds},
        **{f"first_kl_below_{decimal(t)}": kl <= t for t in config.kl_thresholds_bits},
        "L_semantic_margin_ok": margin_ok(part, config, d_vocab),
        "L_semantic_top2_ok": top & gap_ok(part, config.semantic_gap),
        "L_semantic_strong": firm,
        **{f"gap_ge_{decimal(t)}": gap_ok(part, t) for t in config.gap_thresholds},
        **{f"cos_ge_{trimmed(t)}": cosine >= t for t in config.cos_thresholds},
    }
    found = {name: milestone(hits, layers, n_layers=n) for name, hits in conditions.items()}
    # A run is known on every row but the last, which has no successor.
    for name, base in (("L_semantic_run2", top), ("L_semantic_strong_run2", firm)):
        found[name] = milestone(run_of_two(base), layers[:-1], n_layers=n)
    return found


def semantic_fields(
    part: PassRows,
    found: Mapping[str, Milestone],
    config: MeasureConfig,
    *,
    d_vocab: int,
    confirmed: int | None,
) -> dict[str, Any]:
    """Return the published onset fields of one pass."""
    first = {name: item.first for name, item in found.items()}
    semantic, run2 = first["L_semantic"], first["L_semantic_run2"]
    p_at = part.at("p_answer", semantic)
    margin_first = first["L_semantic_margin_ok"]
    direct = [f"first_kl_below_{decimal(t)}" for t in config.kl_thresholds_bits]
    direct += [f"first_rank_le_{k}" for k in config.rank_thresholds]
    gate = {
        "delta_top2_logit": config.semantic_gap,
        "delta_abs": config.semantic_margin,
        "L_semantic_top2_ok_norm": first["L_semantic_top2_ok"],
        "L_semantic_top2_ok_norm_frac": found["L_semantic_top2_ok"].fraction,
        "gap_at_L_semantic_norm": part.at("answer_logit_gap", semantic),
        "L_semantic_run2": run2,
        "L_semantic_strong": first["L_semantic_strong"],
        "L_semantic_strong_run2": first["L_semantic_strong_run2"],
        "run2_overlaps_confirmed_window": run_overlaps_window(
            run2, confirmed, window=config.confirm_window
        ),
    }
    return {
        "L_semantic": semantic,
        **{name: first[name] for name in direct},
        "L_semantic_margin_ok": margin_first,
        "semantic_margin": {
            "delta_abs": config.semantic_margin,
            "p_uniform": 1.0 / d_vocab,
            "L_semantic_margin_ok_norm": margin_first,
            "margin_ok_at_L_semantic_norm": None
            if p_at is None
            else p_at - 1.0 / d_vocab >= config.semantic_margin,
            "p_answer_at_L_semantic_norm": p_at,
            "L_semantic_confirmed_margin_ok_norm": confirmed if confirmed == margin_first else None,
        },
        "semantic_gate": gate,
        "answer_margin_thresholds": {
            f"gap_ge_{decimal(t)}": first[f"gap_ge_{decimal(t)}"] for t in config.gap_thresholds
        },
        "cos_milestones": {
            part.lens: {
                f"ge_{label}": first[f"cos_ge_{label}"]
                for label in (trimmed(t) for t in config.cos_thresholds)
            }
        },
    }


def semantic_fractions(found: Mapping[str, Milestone], *, n_layers: int) -> dict[str, Any]:
    """Return the depth fractions of the onset milestones under their published names."""
    names = (
        "L_semantic",
        "first_rank_le_5",
        "L_semantic_run2",
        "L_semantic_strong",
        "L_semantic_strong_run2",
    )
    return {
        f"{name}_frac": depth_fraction(found[name].first, n_layers)
        for name in names
        if name in found
    }


def run_overlaps_window(run2: int | None, confirmed: int | None, *, window: int) -> bool | None:
    """Say whether rows {run2, run2 + 1} meet [confirmed - window, confirmed + window]."""
    if run2 is None or confirmed is None:
        return None
    return run2 + 1 >= confirmed - window and run2 <= confirmed + window


def confirmed_semantics(
    norm: PassRows, others: Mapping[str, PassRows], config: MeasureConfig
) -> dict[str, Any]:
    """Test one fact's L_semantic against other lenses: is the answer rank 1 there, nearby?

    Confirmed when a raw or tuned row within `confirm_window` rows of the norm lens's L_semantic has
    rank 1. The source names the lenses that do: raw, tuned, both or none.
    """
    layer = first_true(is_answer(norm), norm.layers)
    result: dict[str, Any] = {"L_semantic_norm": layer}
    sources: list[str] = []
    for lens in CONFIRMING_LENSES:
        result[f"L_semantic_{lens}"] = None
        if lens not in others:
            continue
        part = others[lens]
        hits = part.floats("answer_rank") == 1
        result[f"L_semantic_{lens}"] = first_true(hits, part.layers)
        if (
            layer is not None
            and (hits & (np.abs(part.layers - layer) <= config.confirm_window)).any()
        ):
            sources.append(lens)
    source = "both" if len(sources) == 2 else sources[0] if sources else "none"
    return result | {
        "Δ_window": config.confirm_window,
        "L_semantic_confirmed": layer if sources else None,
        "confirmed_source": source,
        "lenses_available": [lens for lens in CONFIRMING_LENSES if lens in others],
    }
