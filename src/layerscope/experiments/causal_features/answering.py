"""Sampled answers under patches: many features, conditions and trials side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from layerscope.experiments.causal_features.answers import parse_decision
from layerscope.experiments.causal_features.config import CausalConfig
from layerscope.experiments.causal_features.task import Game
from layerscope.features import DictionarySet, scale_features
from layerscope.features.row_edits import RowPatch, patch_rows
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.edits import Edit
from layerscope.models.generation import Generation

BASELINES: Mapping[str, str] = {"safe_baseline": "safe", "risky_baseline": "risky"}
"""Condition -> side of the prompts."""

PATCHED: Mapping[str, tuple[str, str]] = {
    "safe_with_safe_patch": ("safe", "safe"),
    "safe_with_risky_patch": ("safe", "risky"),
    "risky_with_safe_patch": ("risky", "safe"),
    "risky_with_risky_patch": ("risky", "risky"),
}
"""Condition -> side of the prompts, group whose mean the feature gets."""

EXPECTED: Mapping[str, str] = {
    "risky_with_safe_patch": "safe",
    "safe_with_risky_patch": "risky",
}
"""Condition -> side that it tests: the patch that moves a prompt towards the other group."""

RESPONSES: Mapping[str, Any] = {
    "layer": pl.Int64,
    "feature_id": pl.Int64,
    "kind": pl.String,
    "along": pl.Int64,
    "condition": pl.String,
    "trial": pl.Int64,
    "prompt": pl.Int64,
    "seed": pl.Int64,
    "value": pl.Float64,
    "response": pl.String,
    "action": pl.String,
    "bet": pl.Float64,
    "valid": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Ask:
    """One cell: a condition, and the patch that makes it.

    Attributes:
        condition: of `BASELINES` or `PATCHED`.
        layer, feature: what is patched; None in a baseline.
        along: feature that is written: `feature`, or a control.
        value: what the feature gets.
    """

    condition: str
    layer: int | None = None
    feature: int | None = None
    along: int | None = None
    value: float | None = None

    @property
    def side(self) -> str:
        """Side of the prompts."""
        return BASELINES.get(self.condition) or PATCHED[self.condition][0]

    @property
    def kind(self) -> str:
        """ "baseline", "feature" or "control"."""
        if self.feature is None:
            return "baseline"
        return "feature" if self.along == self.feature else "control"


@dataclass(frozen=True)
class _Row:
    ask: Ask
    trial: int
    prompt: int
    seed: int


def answer(
    model: LanguageModel,
    dictionaries: DictionarySet,
    asks: Sequence[Ask],
    games: Mapping[str, Sequence[Game]],
    config: CausalConfig,
) -> list[dict[str, Any]]:
    """Return one row per cell and trial, parsed.

    Trials go round the prompts of a side; trial i draws the same numbers in every cell, so that
    conditions can be compared trial by trial.
    """
    rows = [
        _Row(ask, trial, trial % len(games[ask.side]), config.seed * 1_000_000 + trial)
        for ask in asks
        for trial in range(config.trials)
    ]
    ids = {side: _ids(model, of) for side, of in games.items()}
    found: list[dict[str, Any]] = []
    for first in range(0, len(rows), config.batch_rows):
        batch = rows[first : first + config.batch_rows]
        edits = _edits(dictionaries, batch, config)
        prompts = [ids[row.ask.side][row.prompt] for row in batch]
        made = _generate(model, prompts, batch, edits, config, share=True)
        found += [
            _record(row, text, games) for row, text in zip(batch, made.texts, strict=True)
        ]  # fmt: skip
    return found


def identical_under_identity(
    model: LanguageModel,
    dictionaries: DictionarySet,
    features: Mapping[int, Sequence[int]],
    games: Mapping[str, Sequence[Game]],
    config: CausalConfig,
) -> dict[str, Any]:
    """Compare answers without edits to those under edits that give features their own value.

    Returns:
        how many answers were compared, and in how many any token or log-probability differs.
    """
    batch: list[_Row] = []
    ids: list[list[int]] = []
    for condition, side in BASELINES.items():
        for number, prompt in enumerate(_ids(model, games[side])):
            ids.append(prompt)
            batch.append(_Row(Ask(condition), number, number, config.seed * 1_000_000 + number))
    edits = [
        scale_features(dictionaries[layer], list(of), 1.0, scope=config.scope)
        for layer, of in features.items()
    ]
    plain = _generate(model, ids, batch, [], config)
    same = _generate(model, ids, batch, edits, config)
    differing = sum(
        a != b or x != y
        for a, b, x, y in zip(plain.ids, same.ids, plain.logprobs, same.logprobs, strict=True)
    )
    return {"compared": len(batch), "differing": differing}


def _generate(
    model: LanguageModel,
    ids: Sequence[Sequence[int]],
    batch: Sequence[_Row],
    edits: Sequence[Edit],
    config: CausalConfig,
    *,
    share: bool = False,
) -> Generation:
    return model.generate(
        TokenBatch.from_ids(ids, padding_side="left"),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=[row.seed for row in batch],
        stop=config.stop,
        edits=edits,
        share_prompts=share,
    )


def _edits(dictionaries: DictionarySet, batch: Sequence[_Row], config: CausalConfig) -> list[Edit]:
    patches: defaultdict[int, list[RowPatch]] = defaultdict(list)
    for at, row in enumerate(batch):
        ask = row.ask
        if ask.layer is not None and ask.feature is not None:
            assert ask.along is not None and ask.value is not None
            patches[ask.layer].append(RowPatch(at, ask.feature, ask.value, ask.along))
    return [
        patch_rows(dictionaries[layer], of, scope=config.scope)
        for layer, of in sorted(patches.items())
    ]


def _record(row: _Row, text: str, games: Mapping[str, Sequence[Game]]) -> dict[str, Any]:
    ask, game = row.ask, games[row.ask.side][row.prompt]
    parsed = parse_decision(text, low=game.low, high=game.high)
    return {
        "layer": ask.layer,
        "feature_id": ask.feature,
        "kind": ask.kind,
        "along": ask.along,
        "condition": ask.condition,
        "trial": row.trial,
        "prompt": row.prompt,
        "seed": row.seed,
        "value": ask.value,
        "response": text,
        "action": parsed.action,
        "bet": parsed.bet,
        "valid": parsed.valid,
        "reason": parsed.reason,
    }


def _ids(model: LanguageModel, games: Sequence[Game]) -> list[list[int]]:
    batch = model.tokenize([game.prompt for game in games])
    return [list(batch.row_ids(row)) for row in range(len(batch))]
