"""Which pairs a run with gradients can use, and why it cannot use the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import polars as pl

from layerscope.errors import PromptError
from layerscope.experiments import provenance
from layerscope.experiments.patching.gather import WRONG, check_metrics
from layerscope.experiments.units import Progress
from layerscope.interventions.attribution import Contrast, resolve_sites
from layerscope.interventions.attribution.contrast import Direction
from layerscope.interventions.attribution.pairs import MetricName, contrast_of
from layerscope.interventions.patching.pairs import PromptPair, TokenPair, tokenize_pairs
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.vocabulary import decode_tokens

PAIR_SCHEMA = {
    "pair": pl.String,
    "clean": pl.String,
    "corrupt": pl.String,
    "answers": pl.String,
    "foils": pl.String,
    "answered": pl.Boolean,
    "used": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pairs that are used, and a table of all that were given.

    Attributes:
        pairs: used, in the order given. table: one row per pair, ``reason`` for those left out.
    """

    model: LanguageModel
    pairs: tuple[TokenPair, ...]
    table: pl.DataFrame
    metric: MetricName
    direction: Direction

    def contrast(self, pairs: Sequence[TokenPair] | None = None) -> Contrast:
        """Return the contrast of all pairs, or of some."""
        chosen = self.pairs if pairs is None else pairs
        return contrast_of(self.model, chosen, metric=self.metric, direction=self.direction)

    def chunks(self, size: int) -> Iterator[tuple[TokenPair, ...]]:
        """Yield the pairs a few at a time."""
        for first in range(0, len(self.pairs), size):
            yield self.pairs[first : first + size]

    @property
    def left_out(self) -> dict[str, int]:
        """How many pairs were left out, by reason."""
        found = self.table.filter(~pl.col("used")).group_by("reason", maintain_order=True).len()
        return dict(found.iter_rows())

    def notes(self) -> list[str]:
        """Say which pairs were left out, one line per reason."""
        return [
            f"{count} {'pair' if count == 1 else 'pairs'} left out: {reason}"
            for reason, count in self.left_out.items()
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(pair.clean) for pair in self.pairs)


def prepare(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    *,
    metric: MetricName,
    direction: Direction,
    keep_wrong: bool = False,
    per_pass: int = 8,
) -> Prepared:
    """Tokenize pairs, and leave out those that cannot be used or that the model gets wrong.

    A clean prompt is answered where its answers' mean logit is above that of its foils, or, without
    foils, where the likeliest token is an answer.

    Raises:
        PromptError: no pair can be used; says why.
        ConfigError: the metric needs an answer or foil that a pair does not have.
    """
    tokens, refused = tokenize_pairs(model, pairs)
    for pair in tokens:
        if not pair.aligned:
            refused[pair.pair.key] = (
                f"{len(pair.clean)} clean and {len(pair.corrupt)} corrupt tokens: gradients "
                f"compare place by place; clean is {list(pair.tokens)}, corrupt is "
                f"{decode_tokens(model.tokenizer, pair.corrupt)}"
            )
    usable = [pair for pair in tokens if pair.pair.key not in refused]
    check_metrics((metric,), {pair.pair.key: pair.targets for pair in usable})
    answered = _answered(model, usable, per_pass)
    used = [pair for pair in usable if keep_wrong or answered[pair.pair.key]]
    rows = [
        {
            "pair": pair.key,
            "clean": pair.clean,
            "corrupt": pair.corrupt,
            "answers": " | ".join(pair.answers),
            "foils": " | ".join(pair.foils),
            "answered": answered.get(pair.key),
            "used": any(one.pair.key == pair.key for one in used),
            "reason": refused.get(pair.key)
            or ("" if keep_wrong or answered.get(pair.key) else WRONG),
        }
        for pair in pairs
    ]
    if not used:
        raise PromptError(
            f"none of {len(pairs)} pairs can be used: {rows[0]['reason'] or WRONG}; give others, "
            "or keep wrong ones"
        )
    table = pl.DataFrame(rows, schema=PAIR_SCHEMA)
    return Prepared(model, tuple(used), table, metric, direction)


class PairConfig(Protocol):
    """What the settings of a run over pairs have in common."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Groups of nodes, or sites."""
        ...

    @property
    def metric(self) -> MetricName:
        """What is measured."""
        ...

    @property
    def direction(self) -> Direction:
        """From which run into which."""
        ...

    @property
    def keep_wrong(self) -> bool:
        """Whether pairs that the model gets wrong take part."""
        ...

    @property
    def pairs_per_unit(self) -> int:
        """Pairs of one work unit."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        ...


C = TypeVar("C", bound=PairConfig)


@dataclass(frozen=True, eq=False)
class PairPlan(Generic[C]):
    """A run over pairs that is ready to start: sites and pairs checked, nothing computed."""

    model: LanguageModel
    config: C
    prepared: Prepared
    given: tuple[PromptPair, ...]

    def chunks(self) -> list[tuple[TokenPair, ...]]:
        """Return the pairs of every work unit."""
        return list(self.prepared.chunks(self.config.pairs_per_unit))

    def identity(self) -> dict[str, Any]:
        """Return all that decides a work unit's result."""
        return {
            "model": self.model.provenance(),
            "versions": provenance.versions(),
            "config": self.config.to_dict(),
            "pairs": [pair.to_dict() for pair in self.given],
        }

    def ends(self) -> tuple[float, float]:
        """Return the mean metric of the runs that are changed, and of those that give values."""
        base, donor = self.prepared.contrast().ends
        return float(base.double().mean()), float(donor.double().mean())


def plan_pairs(model: LanguageModel, pairs: Sequence[PromptPair], config: C) -> PairPlan[C]:
    """Check sites and pairs.

    Raises:
        PromptError, ConfigError, SiteError, CapabilityError: what does not fit.
    """
    resolve_sites(model, list(config.sites))
    prepared = prepare(
        model,
        pairs,
        metric=config.metric,
        direction=config.direction,
        keep_wrong=config.keep_wrong,
        per_pass=config.pairs_per_unit,
    )
    return PairPlan(model, config, prepared, tuple(pairs))


def _answered(model: LanguageModel, pairs: Sequence[TokenPair], per_pass: int) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for first in range(0, len(pairs), per_pass):
        chunk = pairs[first : first + per_pass]
        batch = TokenBatch.from_ids([pair.clean for pair in chunk])
        logits = model.run(batch, logits="last").logits
        assert logits is not None
        for pair, row in zip(chunk, logits[:, -1].float(), strict=True):
            answers, foils = list(pair.targets.answers), list(pair.targets.foils)
            if foils:
                found[pair.pair.key] = float(row[answers].mean()) > float(row[foils].mean())
            else:
                found[pair.pair.key] = not answers or int(row.argmax()) in answers
    return found


def within(progress: Progress | None, *, done: int, total: int) -> Progress | None:
    """Return what tells of one stage's progress as a part of the whole run's."""
    if progress is None:
        return None

    def tell(now: int, _of_stage: int) -> None:
        progress(done + now, total)

    return tell
