"""Test queries under vectors of every size, layer and control: one row per query and condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Literal

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.function_vectors.config import FunctionVectorConfig
from layerscope.experiments.units import Piece
from layerscope.interventions.function_vectors.effects import (
    Head,
    HeadMeans,
    probabilities,
    top_heads,
)
from layerscope.interventions.function_vectors.suffix import LastToken
from layerscope.interventions.function_vectors.tasks import Trial
from layerscope.interventions.function_vectors.vector import (
    finish_with_heads,
    finish_with_vectors,
    function_vector,
    head_writes,
)
from layerscope.models import LanguageModel

SCHEMA = {
    "part": pl.String,
    "setting": pl.String,
    "kind": pl.String,
    "heads": pl.Int64,
    "draw": pl.Int64,
    "layer": pl.Int64,
    "query": pl.String,
    "answer": pl.String,
    "predicted": pl.String,
    "rank": pl.Int64,
    "correct": pl.Boolean,
    "probability": pl.Float64,
}


@dataclass(frozen=True)
class HeadSet:
    """Heads whose outputs are summed: the top ones, or a random set from outside them."""

    kind: Literal["vector", "random"]
    heads: tuple[Head, ...]
    draw: int = 0


class Sweep:
    """Validation and test queries, read once in every setting."""

    def __init__(
        self,
        model: LanguageModel,
        config: FunctionVectorConfig,
        parts: Mapping[str, Sequence[Trial]],
        means: Callable[[], HeadMeans],
    ) -> None:
        self._model = model
        self._config = config
        self._parts = parts
        self._means = means

    def head_sets(self, effects: Mapping[Head, float]) -> tuple[HeadSet, ...]:
        """Return the top heads of every size, and random sets of as many others."""
        sets: list[HeadSet] = []
        for size in sorted(set(self._config.heads)):
            top = top_heads(effects, size)
            others = sorted(head for head in effects if head not in top)
            if len(top) < size:
                continue
            sets.append(HeadSet("vector", top))
            if len(others) < size:  # as many others do not exist, so there is no such control
                continue
            rng = Random(self._config.seed + size)
            sets += [
                HeadSet("random", tuple(sorted(rng.sample(others, size))), draw)
                for draw in range(self._config.random_sets)
            ]
        return tuple(sets)

    def at_layer(self, layer: int, sets: Sequence[HeadSet]) -> Piece:
        """Add the vector of every set to one block."""
        vectors = torch.stack([function_vector(self._writes, chosen.heads) for chosen in sets])
        rows: list[dict[str, Any]] = []
        for part, setting, trials, read in self._settings():
            logits = finish_with_vectors(read, vectors, layer, coefficient=self._config.coefficient)
            for chosen, of_set in zip(sets, logits, strict=True):
                rows += self._rows(part, setting, trials, of_set, chosen, chosen.kind, layer)
        return Piece(pl.DataFrame(rows, schema=SCHEMA))

    def in_place(self, sets: Sequence[HeadSet]) -> Piece:
        """Let every head of a set act at its own layer (the distributed variant)."""
        rows: list[dict[str, Any]] = []
        for part, setting, trials, read in self._settings():
            for chosen in sets:
                logits = finish_with_heads(read, self._means(), chosen.heads)
                kind = "in_place" if chosen.kind == "vector" else "random_in_place"
                rows += self._rows(part, setting, trials, logits, chosen, kind, None)
        return Piece(pl.DataFrame(rows, schema=SCHEMA))

    def in_texts(
        self, texts: Mapping[str, Sequence[Trial]], sets: Sequence[HeadSet], layer: int
    ) -> Piece:
        """Add vectors to one block in texts of another form, beside none."""
        vectors = torch.stack([function_vector(self._writes, chosen.heads) for chosen in sets])
        rows: list[dict[str, Any]] = []
        for text, trials in texts.items():
            read = LastToken(self._model, [trial.zero_shot for trial in trials])
            rows += self._rows("text", text, trials, read.logits, None, "none", None)
            logits = finish_with_vectors(read, vectors, layer, coefficient=self._config.coefficient)
            for chosen, of_set in zip(sets, logits, strict=True):
                rows += self._rows("text", text, trials, of_set, chosen, chosen.kind, layer)
        return Piece(pl.DataFrame(rows, schema=SCHEMA))

    def untouched(self) -> Piece:
        """Ask every query without a vector, and after its examples."""
        rows: list[dict[str, Any]] = []
        for part, setting, trials, read in self._settings():
            rows += self._rows(part, setting, trials, read.logits, None, "none", None)
        for part, trials in self._parts.items():
            read = LastToken(self._model, [trial.clean for trial in trials])
            rows += self._rows(part, "clean", trials, read.logits, None, "none", None)
        return Piece(pl.DataFrame(rows, schema=SCHEMA))

    @cached_property
    def _reads(self) -> dict[tuple[str, str], LastToken]:
        return {
            (part, setting): LastToken(self._model, [getattr(trial, setting) for trial in trials])
            for part, trials in self._parts.items()
            for setting in ("zero_shot", "shuffled")
        }

    def _settings(self) -> list[tuple[str, str, Sequence[Trial], LastToken]]:
        return [
            (part, setting, self._parts[part], read)
            for (part, setting), read in self._reads.items()
        ]

    @cached_property
    def _writes(self) -> dict[Head, Float[Tensor, " d_model"]]:
        return head_writes(self._model, self._means())

    def vector(self, heads: Sequence[Head]) -> Float[Tensor, " d_model"]:
        """Return the vector of some heads."""
        return function_vector(self._writes, heads)

    def _rows(
        self,
        part: str,
        setting: str,
        trials: Sequence[Trial],
        logits: Float[Tensor, "trial vocab"],
        chosen: HeadSet | None,
        kind: str,
        layer: int | None,
    ) -> list[dict[str, Any]]:
        wanted = torch.tensor([trial.target for trial in trials], device=logits.device)
        own = logits.gather(1, wanted[:, None])
        ranks = (1 + (logits > own).sum(-1)).tolist()
        best = logits.argmax(-1).tolist()
        chances = probabilities(logits, wanted).tolist()
        return [
            {
                "part": part,
                "setting": setting,
                "kind": kind,
                "heads": None if chosen is None else len(chosen.heads),
                "draw": None if chosen is None else chosen.draw,
                "layer": layer,
                "query": trial.query,
                "answer": trial.answer,
                "predicted": self._model.decode_token(predicted),
                "rank": rank,
                "correct": predicted == trial.target,
                "probability": chance,
            }
            for trial, rank, predicted, chance in zip(trials, ranks, best, chances, strict=True)
        ]
