"""Which input tokens make a feature fire where it does, and which output tokens it writes for.

Gradients and integrated gradients (Sundararajan, Taly and Yan, 2017) share the credit; leaving
tokens out one by one tells what really happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.features.dictionary import SparseDictionary
from layerscope.interventions.stream import freeze_norm
from layerscope.models import LanguageModel, Start, TokenBatch
from layerscope.models.batched_gradients import KEPT

TOLERANCE = 0.02
_MOST_STEPS = 512
_GAIN = 0.8  # what a doubling must leave of the gap: below that, rounding is what is left
_ROWS = 32
_BYTES = 2**30  # of what one backward pass keeps


@dataclass(frozen=True, eq=False)
class Drivers:
    """What the tokens of a prompt contribute to one feature at one position.

    Attributes:
        table: position, token_id, gradient_x_input, integrated, left_out (null where it was not
            tried), in units of the pre-activation.
        value: pre-activation on the prompt. baseline: on the baseline.
        steps: of the integral.
        gap: share of ``value - baseline`` that the integral misses.
    """

    table: pl.DataFrame
    value: float
    baseline: float
    steps: int
    gap: float

    @property
    def complete(self) -> bool:
        """Whether integrated gradients sum up to the whole, within `TOLERANCE`."""
        return self.gap <= TOLERANCE


def drivers(
    model: LanguageModel,
    batch: TokenBatch,
    dictionary: SparseDictionary,
    feature: int,
    position: int = -1,
    *,
    steps: int = 32,
    leave_out: int = 5,
) -> Drivers:
    """Share a feature's pre-activation among the tokens before it, and leave the foremost out.

    The baseline of every token is the mean of the prompt's embeddings (learned positions included);
    a first BOS stays as it is, being no content. Steps are doubled until the sum is complete, or
    that stops helping: in half precision rounding remains.

    Args:
        model: with gradients. batch: one prompt without padding.
        dictionary: an autoencoder of the residual stream. feature: of it.
        position: where the feature is looked at; negative counts from the end.
        steps: of the integral, to begin with.
        leave_out: tokens that are tried, those with the largest integrated gradients.

    Raises:
        ConfigError: more than one prompt, or the position is beyond it.
    """
    length = batch.lengths[0]
    if len(batch) != 1 or not -length <= position < length:
        raise ConfigError(f"drivers look at one prompt, at one of its {length} tokens")
    at = position % length
    ids = batch.ids[:, : at + 1]
    with torch.no_grad():
        found = model.run(batch, capture="resid_pre.0", logits=None, stop_after=0)
    actual = found["resid_pre.0"][0, : at + 1].detach()
    first = int(ids[0, 0]) == model.tokenizer.bos_token_id
    neutral = actual[int(first) :].mean(0) if at >= int(first) else actual[0]
    base = neutral.expand_as(actual).clone()
    if first:
        base[0] = actual[0]
    read = _Read(model, ids, dictionary, feature)
    with torch.no_grad():
        value, baseline = read(torch.stack([actual, base])).tolist()
    whole = value - baseline
    before = float("inf")
    while True:
        integrated = _integrated(read, actual, base, steps)
        gap = abs(float(integrated.sum()) - whole) / max(abs(whole), 1e-12)
        if gap <= TOLERANCE or steps >= _MOST_STEPS or gap > _GAIN * before:
            break
        before = gap
        steps *= 2
    slope = _gradients(read, actual[None])[0]
    product = ((actual - base).double() * slope.double()).sum(-1)
    order = torch.argsort(integrated.abs(), descending=True, stable=True)[:leave_out].tolist()
    left: list[float | None] = [None] * (at + 1)
    for place, change in zip(order, _left_out(read, actual, base, order, value), strict=True):
        left[place] = change
    table = pl.DataFrame(
        {
            "position": list(range(at + 1)),
            "token_id": ids[0].tolist(),
            "gradient_x_input": product.tolist(),
            "integrated": integrated.tolist(),
            "left_out": left,
        },
        schema_overrides={"left_out": pl.Float64},
    )
    return Drivers(table, value, baseline, steps, gap)


@torch.no_grad()
def logit_weights(
    model: LanguageModel, directions: Float[Tensor, "feature d_model"], *, top: int = 10
) -> list[dict[str, Any]]:
    """Return the tokens that write directions raise and lower most, on the direct path alone.

    Weights are ``W_U (gain * direction)``, the final norm's scale left out, as z-scores over the
    vocabulary.

    Args:
        model: whose head is used. directions: in the residual stream. top: tokens each way.
    """
    width = model.d_model
    _, norm = model.norm_at(model.n_layers, "final")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=generator).to(model.device, model.dtype)
    frozen = freeze_norm(norm, rows, norm(rows), model.dtype, "the final norm")
    read = directions.double().cpu()
    if frozen.centred:
        read = read - read.mean(-1, keepdim=True)
    read = (read * frozen.gain).float()
    weight, scale = model.unembedding.weight, model.unembedding.scale
    found: list[dict[str, Any]] = []
    for part in read.split(_ROWS):
        raw = part.to(weight.device, weight.dtype) @ weight.T
        raw = (raw.double() if raw.device.type == "cuda" else raw.cpu().double()) * scale
        z = (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True).clamp_min(1e-12)
        for row in z:
            high, low = torch.topk(row, top), torch.topk(row, top, largest=False)
            found.append(
                {
                    "top": list(zip(high.indices.tolist(), high.values.tolist(), strict=True)),
                    "bottom": list(zip(low.indices.tolist(), low.values.tolist(), strict=True)),
                    "kurtosis": float(((row - row.mean()) ** 4).mean() / row.var() ** 2),
                }
            )
    return found


class _Read:
    """The pre-activation of a feature at the last position, from what enters block 0."""

    def __init__(
        self,
        model: LanguageModel,
        ids: Int[Tensor, "1 pos"],
        dictionary: SparseDictionary,
        feature: int,
    ) -> None:
        self._model = model
        self._ids = ids
        self._site = str(dictionary.reads)
        self._last = dictionary.layer
        self._row = dictionary.read_rows([feature])[0].float()
        self._bias = dictionary.read_bias([feature])[0].float()
        kept = ids.shape[1] * (self._last + 1) * KEPT * model.d_model * model.dtype.itemsize
        self.rows = max(1, min(_ROWS, _BYTES // kept))

    def __call__(self, entering: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        ids = self._ids.expand(len(entering), -1).contiguous()
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (ids.shape[1],) * len(ids))
        result = self._model.run(
            batch,
            start=Start(0, entering),
            stop_after=self._last,
            capture=self._site,
            logits=None,
            gradients=entering.requires_grad,
        )
        last = result[self._site][:, -1].float()
        return last @ self._row.to(last.device) + self._bias.to(last.device)


def _gradients(read: _Read, points: Float[Tensor, "row pos d_model"]) -> Tensor:
    with torch.enable_grad():
        leaf = points.detach().clone().requires_grad_(True)
        return torch.autograd.grad(read(leaf).sum(), leaf)[0]


def _integrated(
    read: _Read, actual: Float[Tensor, "pos d_model"], base: Tensor, steps: int
) -> Float[Tensor, " pos"]:
    """Integrate along the straight line by the midpoint rule."""
    difference = actual - base
    total = torch.zeros_like(actual, dtype=torch.float64)
    places = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for part in places.split(read.rows):
        points = base + part.to(actual)[:, None, None] * difference
        total += _gradients(read, points).double().sum(0)
    return (total / steps * difference.double()).sum(-1).cpu()


@torch.no_grad()
def _left_out(
    read: _Read, actual: Tensor, base: Tensor, places: Sequence[int], value: float
) -> list[float]:
    """Return what the value loses where one token at a time is replaced by the baseline."""
    if not places:
        return []
    points = actual.expand(len(places), -1, -1).clone()
    for row, place in enumerate(places):
        points[row, place] = base[place]
    return [value - after for after in read(points).tolist()]
