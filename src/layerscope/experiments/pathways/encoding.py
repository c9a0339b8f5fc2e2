"""Texts through the model once, and what the selected features are at every counted token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import polars as pl
import torch
from torch import Tensor

from layerscope.experiments.pathways.corpus import Text
from layerscope.experiments.pathways.words import words_of_tokens
from layerscope.experiments.pathways.workspace import SampledPrompt, Workspace
from layerscope.models import Capture, TokenBatch

_SCHEMA: dict[str, Any] = {
    "text": pl.Int64(),
    "position": pl.Int64(),
    "token_id": pl.Int64(),
    "word": pl.Int64(),
    "features": pl.List(pl.Int64()),
    "values": pl.List(pl.Float64()),
}
_TOKENS = 4096  # of one batch, padding included


def texts_schema() -> pl.DataFrame:
    """Return the table of no texts."""
    return pl.DataFrame(schema=_SCHEMA)


class Encoder:
    """The selected features, ready to be read at any token.

    Only the read rows of these features are held; whole matrices where a gate ranks features.
    """

    def __init__(
        self,
        work: Workspace,
        features: Sequence[dict[str, Any]],
        prompts: Sequence[SampledPrompt],
    ) -> None:
        self._work = work
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._members: dict[int, list[int]] = defaultdict(list)
        for index, feature in enumerate(features):
            self._members[feature["layer"]].append(index)
        self._ids = {
            layer: [features[index]["feature_id"] for index in members]
            for layer, members in self._members.items()
        }
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def encode(self, texts: Sequence[Text], first: int) -> tuple[pl.DataFrame, list[float | None]]:
        """Return a row per counted token of the texts, and their nats per token.

        Args:
            texts: to be encoded. first: index of the first of them among all texts.
        """
        sequences = [self._ids_of(text) for text in texts]
        rows: list[tuple[Any, ...]] = []
        nats: list[float | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(sequences[index][0]))
        for part in _batches(order, [len(ids) for ids, _ in sequences]):
            batch = TokenBatch.from_ids([sequences[index][0] for index in part])
            found, logits = self._run(batch)
            for place, index in enumerate(part):
                ids, skip = sequences[index]
                nats[index] = _surprise(logits[place], ids, skip)
                said = words_of_tokens(texts[index].text, ids[skip:], self._work.model.tokenizer)
                words = said or [None] * (len(ids) - skip)
                rows += [
                    (first + index, at, ids[at], words[at - skip], *found[place][at])
                    for at in range(skip, len(ids))
                ]
        rows.sort(key=lambda row: row[:2])
        return pl.DataFrame(rows, schema=_SCHEMA, orient="row"), nats

    def _ids_of(self, text: Text) -> tuple[list[int], int]:
        """Return the ids of a text behind its context, and how many of them are not counted."""
        model = self._work.model
        limit = model.n_ctx
        context: list[int] = []
        if text.context is not None:
            context = list(self._prompts[text.context].ids)
            batch = model.tokenize(text.text, prepend_bos=False)
            ids = [*context, *batch.ids[0].tolist()]
            return ids[:limit], min(len(context), len(ids[:limit]))
        ids = [int(each) for each in model.tokenizer.encode(text.text, verbose=False)][:limit]
        bos = model.tokenizer.bos_token_id
        return ids, int(bool(ids) and bos is not None and ids[0] == bos)

    def _run(self, batch: TokenBatch) -> tuple[list[list[tuple[list[int], list[float]]]], Tensor]:
        """Return active features and values at every [row][position], and logits."""
        work = self._work
        sites = {layer: str(work.every_dictionary[layer].reads) for layer in self._members}
        result = work.model.run(batch, capture=Capture(list(sites.values())))
        found: list[list[tuple[list[int], list[float]]]] = [
            [([], []) for _ in range(batch.width)] for _ in range(len(batch))
        ]
        for layer in sorted(self._members):
            values = self._values(layer, result[sites[layer]])
            row, at, which = values.nonzero(as_tuple=True)
            active = values[row, at, which].tolist()
            for r, p, w, value in zip(
                row.tolist(), at.tolist(), which.tolist(), active, strict=True
            ):
                features, held = found[r][p]
                features.append(self._members[layer][w])
                held.append(value)
        return found, cast("Tensor", result.logits)

    def _values(self, layer: int, residual: Tensor) -> Tensor:
        dictionary, ids = self._work.every_dictionary[layer], self._ids[layer]
        if not dictionary.gate.local or dictionary.token_norm is not None:
            return dictionary.encode(residual, ids)
        if layer not in self._rows:
            self._rows[layer] = (dictionary.read_rows(ids), dictionary.read_bias(ids))
        rows, bias = self._rows[layer]
        rows = rows.to(residual.device, torch.promote_types(rows.dtype, torch.float32))
        pre = residual.to(rows.dtype) @ rows.T + bias.to(rows)
        return dictionary.gate.activate(pre, torch.tensor(ids))


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Group texts of similar length, so that a batch stays within `_TOKENS`."""
    groups: list[list[int]] = []
    for index in order:
        if not lengths[index]:
            continue
        if not groups or (len(groups[-1]) + 1) * lengths[index] > _TOKENS:
            groups.append([])
        groups[-1].append(index)
    return groups


def _surprise(logits: Tensor, ids: Sequence[int], skip: int) -> float | None:
    """Return the mean negative log-probability of the counted tokens that have one before them."""
    first = max(skip, 1)
    if len(ids) <= first:
        return None
    given = logits[first - 1 : len(ids) - 1].float()
    wanted = torch.tensor(list(ids[first:]), device=given.device)
    return float(torch.nn.functional.cross_entropy(given, wanted))
