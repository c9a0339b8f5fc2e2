"""Where heads look on repeated random tokens.

In the second half of ``r1 .. rn r1 .. rn``, the token after the earlier occurrence of the present
one is `n - 1` back (induction; Olsson et al. 2022), the occurrence itself `n` back (duplicate
token), and the token before is one back (previous token; scored in both halves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.heads.copying import copying_scores
from layerscope.interventions.heads.sequences import Repeated
from layerscope.models import LanguageModel, Site

KINDS = ("induction", "previous_token", "duplicate_token", "first_token", "present_token")
ROWS = 4
"""Sequences of one pass: all patterns of a model are kept at once."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of every head, by kind: [layer, head]; NaN in a block without patterns.

    Attention scores are mean attention weights (0 to 1). ``copying`` and ``own_token_first`` are
    those of `copying_scores`. `uniform` is what a head that looks everywhere alike would get.
    """

    values: Mapping[str, Float[Tensor, "layer head"]]
    uniform: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def top(self, kind: str, limit: int) -> list[tuple[int, int]]:
        """Return the (layer, head) of the largest scores of a kind."""
        scores = self.values[kind]
        flat = torch.nan_to_num(scores, nan=-torch.inf).flatten()
        order = torch.argsort(flat, descending=True, stable=True)[:limit].tolist()
        return [divmod(index, scores.shape[1]) for index in order]

    def above(self, kind: str, threshold: float) -> list[tuple[int, int]]:
        """Return the heads whose score is at least `threshold`, the strongest first."""
        scores = self.values[kind]
        ranked = self.top(kind, scores.numel())
        return [(at, head) for at, head in ranked if float(scores[at, head]) >= threshold]

    def table(self) -> pl.DataFrame:
        """Return one row per head: ``layer, head`` and one column per kind."""
        n_layers, n_heads = next(iter(self.values.values())).shape
        columns: dict[str, list[object]] = {
            "layer": [layer for layer in range(n_layers) for _ in range(n_heads)],
            "head": [head for _ in range(n_layers) for head in range(n_heads)],
        }
        for kind, values in self.values.items():
            flat = values.double().flatten().tolist()
            columns[kind] = [None if value != value else value for value in flat]
        schema = {"layer": pl.Int64, "head": pl.Int64} | dict.fromkeys(self.values, pl.Float64)
        return pl.DataFrame(columns, schema=schema)


def head_scores(model: LanguageModel, repeated: Repeated, *, copying: bool = True) -> HeadScores:
    """Score all heads of a model on repeated tokens, a few sequences at a time.

    Raises:
        CapabilityError: no block of the model shows its attention patterns.
    """
    layers = [
        layer
        for layer in range(model.n_layers)
        if model.backend.why_not(Site("attn.pattern", layer)) is None
    ]
    if not layers:
        raise CapabilityError(str(model.backend.why_not(Site("attn.pattern", 0))))
    sites = [Site("attn.pattern", layer) for layer in layers]
    shape = (model.n_layers, model.n_heads)
    sums = {kind: torch.full(shape, torch.nan, dtype=torch.float64) for kind in KINDS}
    for kind in KINDS:
        sums[kind][layers] = 0.0
    n_rows = len(repeated.batch)
    for first in range(0, n_rows, ROWS):
        ids = repeated.batch.ids[first : first + ROWS]
        batch = type(repeated.batch).from_tensors(ids, torch.ones_like(ids))
        result = model.run(batch, capture=sites, logits=None)
        for layer in layers:
            pattern = result[Site("attn.pattern", layer)].detach().double().cpu()
            for kind, weights in _looks(pattern, repeated).items():
                sums[kind][layer] += weights.mean(-1).sum(0) / n_rows
    notes: list[str] = []
    if copying:
        try:
            sums |= copying_scores(model, repeated)
        except CapabilityError as error:
            notes.append(f"no copying scores: {error}")
    return HeadScores(sums, _uniform(repeated), tuple(notes))


def _looks(
    pattern: Float[Tensor, "row head query key"], repeated: Repeated
) -> dict[str, Float[Tensor, "row head place"]]:
    second = torch.tensor(repeated.second)
    anywhere = torch.arange(1, pattern.shape[-1])
    n = repeated.length
    return {
        "induction": pattern[:, :, second, second - n + 1],
        "previous_token": pattern[:, :, anywhere, anywhere - 1],
        "duplicate_token": pattern[:, :, second, second - n],
        "first_token": pattern[:, :, second, 0],
        "present_token": pattern[:, :, second, second],
    }


def _uniform(repeated: Repeated) -> dict[str, float]:
    second = sum(1 / (column + 1) for column in repeated.second) / repeated.length
    width = repeated.front + 2 * repeated.length
    anywhere = sum(1 / (column + 1) for column in range(1, width)) / (width - 1)
    return {kind: anywhere if kind == "previous_token" else second for kind in KINDS}
