"""From readout statistics to the columns of the typed table and the description of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.measures.table import ROW_SCHEMA, HeadInfo, LastRowInfo, PromptInfo, conform
from layerscope.readout import Divergences, Readout

Columns = dict[str, Any]
T = TypeVar("T")
ANSWER, FOIL, HEAD_TOP1 = 0, 1, 2  # columns of the tokens asked for at the last position
LN2 = float(np.log(2.0))
HEAD_TOP = 20
EPS = 1e-12


def frame(columns: Columns) -> pl.DataFrame:
    """Build typed rows; NaN ("does not exist" in a readout) and infinity become null."""
    built = pl.DataFrame(
        {name: _series(name, values) for name, values in columns.items() if values is not None}
    )
    numbers = pl.selectors.float()
    return conform(built.with_columns(pl.when(numbers.is_finite()).then(numbers).name.keep()))


def _series(name: str, values: Any) -> pl.Series:
    if isinstance(values, Tensor):
        values = values.numpy()
    dtype = ROW_SCHEMA[name]
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pl.Series(name, values.tolist(), dtype=dtype)
    return pl.Series(name, values).cast(dtype)


def every_position(
    result: Readout,
    *,
    head_top1: int,
    strings: Sequence[str],
    states: Float[Tensor, "place row d_model"],
) -> Columns:
    """Columns known at every position; `head_top1` is the token column of the model's own top-1."""
    ids = _need(result.top_ids).tolist()
    probs = _need(result.top_log2p).double().exp2().tolist()
    # A row with NaN or infinity has no ranking: its lists are null, not lists of nothing.
    broken_rows = result.nonfinite.tolist()
    norms = states.float().norm(dim=-1)
    broken = ~torch.isfinite(states).all(-1).flatten().cpu() | result.nonfinite
    return {
        "entropy_bits": result.entropy_bits,
        "top_ids": _unless(broken_rows, ids),
        "top_tokens": _unless(broken_rows, [_texts(row, strings) for row in ids]),
        "top_probs": _unless(broken_rows, probs),
        "top1_top2_gap": result.top1_top2_gap,
        "kl_to_final_bits": _need(result.reference).kl_to_bits,
        "final_top1_rank": _rank(result, head_top1),
        "final_top1_prob": _token(result, head_top1).exp2(),
        "resid_norm": norms.flatten().cpu(),
        "max_abs_logit": result.max_abs_logit,
        "min_prob": _need(result.min_log2p).double().exp2(),
        "nonfinite": broken,
    }


def last_position(result: Readout, passes: Sequence[PreparedPass], n_rows: int) -> Columns:
    """Columns known at the last position only."""
    log2p = _token(result, ANSWER)
    p_answer = log2p.exp2()
    p_foil = _token(result, FOIL).exp2()
    control = np.repeat([item.source.prompt_id == "ctl" for item in passes], n_rows)
    reference = _need(result.reference)
    probs = _need(result.top_log2p).double().exp2()
    answer_is_top = _need(result.top_ids)[:, 0] == _answer_ids(passes, n_rows)
    answer_logit = _need(result.token_logit)[:, ANSWER].double()
    behind = answer_logit - _need(result.top_logits)[:, 0].double()
    columns: Columns = {
        "p_top1": probs[:, 0],
        "p_top5": probs[:, :5].sum(-1),
        "p_answer": p_answer,
        "answer_rank": _rank(result, ANSWER),
        "answer_log2p": log2p,
        "answer_logit_gap": _where(answer_is_top, _need(result.top1_top2_gap).double()),
        "answer_vs_top1_gap": _where(_need(result.token_rank)[:, ANSWER] > 1, behind),
        "p_foil": p_foil,
        "control_margin": _where(torch.from_numpy(control), p_answer - p_foil),
        "teacher_entropy_bits": result.reference_entropy_bits,
        "kl_from_final_bits": reference.kl_from_bits,
        "js_to_final_bits": reference.js_bits,
        "l1_to_final": reference.l1,
        "cos_to_answer": _need(result.cos_to_token)[:, ANSWER],
        "cos_to_prompt_max": _need(result.cos_to_set_max)[:, 0],
        "echo_mass_prompt": _need(result.set_mass)[:, 0],
        "topk_prompt_mass": _need(result.set_topk_mass)[:, 0],
        "topk_jaccard_consecutive": _consecutive(_need(result.overlap_ids).numpy(), n_rows),
    }
    return columns | raw_against_norm(result.against)


def raw_against_norm(against: Divergences | None) -> Columns:
    """Columns that compare the norm lens with the raw lens, on the rows of the norm lens."""
    if against is None:
        return {}
    return {
        "kl_norm_vs_raw_bits": against.kl_to_bits,
        "kl_raw_to_norm_bits": against.kl_from_bits,
        "js_norm_raw_bits": against.js_bits,
        "l1_norm_raw": against.l1,
        "topk_jaccard_raw_norm": against.jaccard,
    }


def norm_effect(
    states: Float[Tensor, "place row d_model"], hidden: Float[Tensor, "place row d_model"]
) -> Columns:
    """What the lens's norm does to the residual: ratio of lengths, cosine of directions."""
    raw, normed = states.double(), hidden.double()
    raw_length, length = raw.norm(dim=-1), normed.norm(dim=-1)
    cosine = (raw * normed).sum(-1) / (raw_length * length).clamp_min(EPS)
    return {
        "resid_norm_ratio": ((length + EPS) / (raw_length + EPS)).flatten().cpu(),
        "delta_resid_cos": cosine.clamp(-1.0, 1.0).flatten().cpu(),
    }


def prompt_info(
    item: PreparedPass,
    head_logits: Float[Tensor, " vocab"],
    strings: Sequence[str],
    last_rows: Sequence[LastRowInfo],
) -> PromptInfo:
    """Describe one pass: its tokens, its aligned answer, and the model's own prediction."""
    source, alignment = item.source, item.alignment
    return PromptInfo(
        prompt_index=source.index,
        fact_key=source.fact_key,
        fact_index=source.fact_index,
        prompt_id=source.prompt_id,
        prompt_variant=source.variant,
        text=source.text,
        format=item.rendered.format,
        template=item.rendered.template,
        prompt_sha256=item.prompt_sha256,
        prompt_ids=item.prompt_ids,
        tokens=tuple(strings[token] for token in item.sequence[: item.length]),
        answer=source.answer,
        answer_ids=tuple(alignment.ids),
        answer_pieces=tuple(alignment.pieces),
        answer_variant=alignment.variant,
        alignment_status=alignment.status,
        foil=source.foil,
        foil_id=item.foil_id,
        head=_head(head_logits, strings, alignment.first_id),
        last_rows=tuple(last_rows),
    )


def _head(logits: Float[Tensor, " vocab"], strings: Sequence[str], answer: int | None) -> HeadInfo:
    probs = logits.double().softmax(-1).cpu()
    if not bool(torch.isfinite(probs).all()):
        return HeadInfo(entropy_bits=None, top_ids=(), top_tokens=(), top_probs=())
    top = probs.topk(min(HEAD_TOP, probs.numel()))
    ids = [int(token) for token in top.indices]
    entropy = torch.special.entr(probs).sum() / LN2
    return HeadInfo(
        entropy_bits=number(entropy),
        top_ids=tuple(ids),
        top_tokens=tuple(strings[token] for token in ids),
        top_probs=tuple(float(value) for value in top.values),
        p_answer=None if answer is None else number(probs[answer]),
        answer_rank=None if answer is None else 1 + int((logits > logits[answer]).sum()),
    )


def number(value: Tensor | float) -> float | None:
    """Return a finite float, or None: NaN and infinity never leave as numbers."""
    found = float(value)
    return found if math.isfinite(found) else None


def _unless(broken: Sequence[bool], lists: Sequence[list[Any]]) -> list[list[Any] | None]:
    return [None if bad else values for bad, values in zip(broken, lists, strict=True)]


def _texts(ids: Sequence[int], strings: Sequence[str]) -> list[str]:
    return [strings[token] if token >= 0 else "" for token in ids]


def _consecutive(sets: np.ndarray, n_rows: int) -> list[float | None]:
    """Jaccard overlap of each row's most likely tokens with those of the row before it."""
    found: list[float | None] = []
    for number, tokens in enumerate(sets):
        if number % n_rows == 0 or tokens.min() < 0 or sets[number - 1].min() < 0:
            found.append(None)
            continue
        shared = np.intersect1d(tokens, sets[number - 1]).size
        found.append(shared / (2 * tokens.size - shared) if tokens.size else 1.0)
    return found


def _answer_ids(passes: Sequence[PreparedPass], n_rows: int) -> Tensor:
    ids = torch.tensor([item.alignment.first_id for item in passes])
    return ids.repeat_interleave(n_rows)


def _token(result: Readout, column: int) -> Tensor:
    return _need(result.token_log2p)[:, column].double()


def _rank(result: Readout, column: int) -> pl.Series:
    """Ranks of one token column; 0, the readout's "no such token", becomes null."""
    ranks = pl.Series(_need(result.token_rank)[:, column].numpy())
    return ranks.replace(0, None)


def _where(condition: Tensor, values: Tensor) -> Tensor:
    return torch.where(condition, values, torch.full_like(values, torch.nan))


def _need(value: T | None) -> T:
    assert value is not None, "the readout was asked for this statistic"
    return value
