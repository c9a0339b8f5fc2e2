"""Residuals of contrasts, read at the last token, at a labelled one, or averaged over the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, PromptError, nearest
from layerscope.interventions.steering.contrasts import Contrast
from layerscope.models import Capture, LanguageModel, TokenBatch
from layerscope.models.prompts import encode_plain

ReadAt = Literal["last", "mean", "label"]
READ_AT: tuple[ReadAt, ...] = ("last", "mean", "label")


@dataclass(frozen=True, eq=False)
class States:
    """What the contrasts look like inside the model.

    Attributes:
        layers: blocks whose output was read (``resid_post``).
        positive, negative: [layer, contrast, d_model] in float32.
        norms: [layer], median length of the residual over all tokens of the texts, BOS left out.
    """

    layers: tuple[int, ...]
    positive: Float[Tensor, "layer contrast d_model"]
    negative: Float[Tensor, "layer contrast d_model"]
    norms: Float[Tensor, " layer"]


def read_states(
    model: LanguageModel,
    contrasts: Sequence[Contrast],
    layers: Sequence[int],
    *,
    at: ReadAt = "last",
    batch_size: int = 16,
) -> States:
    """Run both texts of every contrast and keep one residual of each, and the typical lengths.

    Args:
        model: the model.
        contrasts: what to read.
        layers: blocks whose output is wanted.
        at: "last" token of the text; "mean" over what differs, that is the tokens after the prompt
            (all but BOS where there is none); "label": last token of the contrast's label.
        batch_size: texts of one pass.

    Raises:
        PromptError: a label is missing from its text, or a text does not fit the context.
    """
    if at not in READ_AT:
        raise ConfigError(
            f"unknown position '{at}'{nearest(at, READ_AT)}; use {', '.join(READ_AT)}"
        )
    sides: list[Tensor] = []
    lengths: list[Tensor] = []
    for side in (0, 1):
        parts: list[Tensor] = []
        for begin in range(0, len(contrasts), batch_size):
            some = contrasts[begin : begin + batch_size]
            kept, norms = _read(model, some, side, layers, at)
            parts.append(kept)
            lengths.append(norms)
        sides.append(torch.cat(parts, dim=1))
    typical = torch.cat(lengths, dim=1).median(dim=1).values
    return States(tuple(layers), sides[0], sides[1], typical)


def real_tokens(model: LanguageModel, batch: TokenBatch) -> Tensor:
    """Return [batch, pos], True at tokens that are neither padding nor special."""
    special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.long)
    mask = batch.attention_mask & ~torch.isin(batch.ids, special)
    # A text of nothing else still counts.
    return torch.where(mask.any(dim=1, keepdim=True), mask, batch.attention_mask)


def _read(
    model: LanguageModel,
    contrasts: Sequence[Contrast],
    side: int,
    layers: Sequence[int],
    at: ReadAt,
) -> tuple[Tensor, Tensor]:
    batch = model.tokenize([contrast.texts[side] for contrast in contrasts])
    result = model.run(
        batch, capture=Capture([f"resid_post.{layer}" for layer in layers]), logits=None
    )
    states = torch.stack([result[site].float() for site in result])
    real = real_tokens(model, batch).to(states.device)
    norms = states[:, real].norm(dim=-1)
    weights = _weights(model, contrasts, side, batch, real, at).to(states)
    # Where nothing is asked for there may be padding that is no number.
    states = torch.where(weights[None, :, :, None] > 0, states, torch.zeros_like(states))
    kept = (states * weights[None, :, :, None]).sum(2) / weights.sum(1)[None, :, None]
    return kept.cpu(), norms.cpu()


def _weights(
    model: LanguageModel,
    contrasts: Sequence[Contrast],
    side: int,
    batch: TokenBatch,
    real: Tensor,
    at: ReadAt,
) -> Tensor:
    weights = torch.zeros(batch.ids.shape)
    for row, contrast in enumerate(contrasts):
        if at == "last":
            weights[row, batch.column(row, -1)] = 1.0
        elif at == "label":
            weights[row, batch.column(row, _label(batch, row, contrast, side))] = 1.0
        else:
            weights[row] = real[row].cpu().float()
            own = len(encode_plain(model.tokenizer, contrast.prompt)[0]) if contrast.prompt else 0
            places = real[row].nonzero().flatten().tolist()
            for column in places[: own if own < len(places) else 0]:
                weights[row, column] = 0.0
    return weights


def _label(batch: TokenBatch, row: int, contrast: Contrast, side: int) -> int:
    """Return the position of the last token of a contrast's label."""
    text = contrast.texts[side]
    begin = -1 if not contrast.label else text.rfind(contrast.label)
    if begin < 0:
        raise PromptError(
            f"the label {contrast.label!r} is not part of {text[:60]!r}: give every contrast a "
            "label that both its texts hold, or read at last or mean"
        )
    offsets = batch.offsets[row]
    end = begin + len(contrast.label or "")
    if offsets is None:
        raise PromptError(
            "this tokenizer does not say where its tokens stand: read at last or mean"
        )
    inside = [
        position
        for position, span in enumerate(offsets)
        if span is not None and span[0] < end and span[1] > begin
    ]
    return inside[-1]
