"""Which pairs of a set take part in a run, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from layerscope.errors import ConfigError, PromptError
from layerscope.interventions.patching import (
    PromptPair,
    Speed,
    Targets,
    TokenPair,
    batch_of,
    calibrate,
    metric_of,
    tokenize_pairs,
)
from layerscope.models import LanguageModel
from layerscope.models.vocabulary import decode_tokens
from layerscope.products import Products

AnsweredBy = Literal["foil", "top1"]
"""An answer above the foils (best of all where there is no foil), or an answer best of all."""

WRONG = "the model does not answer the clean prompt"
PAIR_SCHEMA = {
    "pair": pl.String,
    "clean": pl.String,
    "corrupt": pl.String,
    "answers": pl.String,
    "foils": pl.String,
    "n_clean": pl.Int64,
    "n_corrupt": pl.Int64,
    "answer_rank": pl.Int64,
    "answered": pl.Boolean,
    "used": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Answered:
    """How the model answers a prompt: the rank of its best answer, and whether it counts."""

    rank: int | None
    counts: bool


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs as tokens.

    Attributes:
        given: all. used: those that take part.
        tokens: by key, those that could be tokenized. refused: why others could not.
        answered: by key, how the model answers the clean prompt.
    """

    model: LanguageModel
    given: tuple[PromptPair, ...]
    used: tuple[TokenPair, ...]
    tokens: Mapping[str, TokenPair]
    refused: Mapping[str, str]
    answered: Mapping[str, Answered]

    def table(self) -> pl.DataFrame:
        """Return one row per pair given, with the reason of those that are left out."""
        used = {one.pair.key for one in self.used}
        rows: list[dict[str, Any]] = []
        for pair in self.given:
            tokens, answered = self.tokens.get(pair.key), self.answered.get(pair.key)
            reason = self.refused.get(pair.key, "")
            if answered is not None and not answered.counts and not reason:
                reason = WRONG
            rows.append(
                {
                    "pair": pair.key,
                    "clean": pair.clean,
                    "corrupt": pair.corrupt,
                    "answers": self._words(
                        tokens.targets.answers if tokens else None, pair.answers
                    ),
                    "foils": self._words(tokens and tokens.targets.foils, pair.foils),
                    "n_clean": len(tokens.clean) if tokens else None,
                    "n_corrupt": len(tokens.corrupt) if tokens else None,
                    "answer_rank": None if answered is None else answered.rank,
                    "answered": None if answered is None else answered.counts,
                    "used": pair.key in used,
                    "reason": reason,
                }
            )
        return pl.DataFrame(rows, schema=PAIR_SCHEMA)

    def _words(self, ids: Sequence[int] | None, words: Sequence[str]) -> str:
        if ids is not None:
            words = decode_tokens(self.model.tokenizer, list(ids))
        return " | ".join(words)


def gather(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    *,
    metrics: Sequence[str],
    answered: AnsweredBy = "foil",
    keep_wrong: bool = False,
    products: Products = "default",
    aligned: bool = False,
) -> PairSet:
    """Tokenize pairs, and leave out those that cannot be used or that the model gets wrong.

    Args:
        aligned: only pairs whose prompts have the same number of tokens can be used.

    Raises:
        PromptError: no pair can be used, which its first reason explains, or none is answered.
        ConfigError: a metric needs an answer or a foil that a pair does not have.
    """
    tokens, refused = tokenize_pairs(model, pairs)
    if aligned:
        refused |= {one.pair.key: _uneven(model, one) for one in tokens if not one.aligned}
        tokens = [one for one in tokens if one.aligned]
        if not tokens:
            raise PromptError(next(iter(refused.values())))
    check_metrics(metrics, {one.pair.key: one.targets for one in tokens})
    found = {
        one.pair.key: answers_of(model, one.clean, one.targets, by=answered, products=products)
        for one in tokens
    }
    used = tuple(one for one in tokens if keep_wrong or found[one.pair.key].counts)
    if not used:
        raise PromptError(
            f"the model answers the clean prompt of none of {len(pairs)} pairs; give others, or "
            "keep wrong ones"
        )
    by_key = {one.pair.key: one for one in tokens}
    return PairSet(model, tuple(pairs), used, by_key, refused, found)


def _uneven(model: LanguageModel, pair: TokenPair) -> str:
    return (
        f"pair '{pair.pair.key}': the prompts have {len(pair.clean)} and {len(pair.corrupt)} "
        f"tokens, {list(pair.tokens)} and {decode_tokens(model.tokenizer, pair.corrupt)}; a path "
        "is compared place by place, so reword one"
    )


def answers_of(
    model: LanguageModel,
    ids: Sequence[int],
    targets: Targets,
    *,
    by: AnsweredBy = "foil",
    products: Products = "default",
) -> Answered:
    """Return whether a prompt is answered; one without answers counts as it stands."""
    if not targets.answers:
        return Answered(None, True)
    logits = model.run(batch_of([ids]), logits="last", products=products).logits
    assert logits is not None
    row = logits[0, -1].float()
    best = row[list(targets.answers)].max()
    rank = 1 + int((row > best).sum())
    if by == "foil" and targets.foils:
        margin = row[list(targets.answers)].mean() - row[list(targets.foils)].mean()
        return Answered(rank, float(margin) > 0)
    return Answered(rank, rank == 1)


def check_metrics(
    metrics: Sequence[str], targets: Mapping[str, Targets], *, what: str = "pair"
) -> None:
    """Refuse metrics that a prompt has no tokens for, before anything runs.

    Args:
        targets: by key. what: such a thing is called.

    Raises:
        ConfigError: a metric is unknown, or a prompt lacks an answer or a foil.
    """
    for name in metrics:
        metric = metric_of(name)
        for key, own in targets.items():
            if not own.answers and name != "kl":
                raise ConfigError(
                    f"the metric '{name}' needs an answer, and {what} '{key}' has none: add it, or "
                    "measure kl"
                )
            if metric.foils and not own.foils:
                raise ConfigError(
                    f"the metric '{name}' needs a foil, and {what} '{key}' has none: add it, or "
                    "measure prob, logprob or rank"
                )


def speed_of(model: LanguageModel, ids: Sequence[int], *, products: Products = "default") -> Speed:
    """Measure this machine on a prompt, for predictions; a few short passes."""
    nothing = PromptPair(key="", clean="", corrupt="")
    pair = TokenPair(nothing, tuple(ids), tuple(ids), Targets(()), (), (), len(ids))
    return calibrate(model, pair, products=products)


def finite(value: float) -> float | None:
    """Return a number, or None where it is none."""
    return value if math.isfinite(value) else None
