"""Which prompts of a set can be asked of a model; the others are listed, and stop nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from layerscope.errors import AlignmentError, PromptError
from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.prepare import PreparedPass, named, prepare, try_prepare
from layerscope.experiments.layers.prompts import Fact, Pass, PromptSet
from layerscope.models import LanguageModel


@dataclass(frozen=True)
class LeftOut:
    """A prompt that was not asked, and why.

    `variant` is "orig", "no_filler" or "control". `stage` is "alignment" (no answer or foil in
    whole tokens), "prompt" (too long, not encodable) or "fact": nothing is wrong with it, but the
    fact that it belongs to was not asked.
    """

    prompt: str
    variant: str
    stage: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What will be asked, as if the set had held nothing else, and what will not."""

    prompts: PromptSet
    passes: tuple[PreparedPass, ...]
    left_out: tuple[LeftOut, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return how many prompts were given, and those that were left out."""
        return {
            "given": len(self.passes) + len(self.left_out),
            "left_out": [entry.to_dict() for entry in self.left_out],
        }


def ask(model: LanguageModel, prompts: PromptSet, config: LayersConfig) -> Asked:
    """Prepare a set, without what cannot be asked.

    A fact whose own prompt fails is left out with its ablated wording and its control; one of
    these two that fails is left out alone.

    Raises:
        PromptError: no fact is left; says what is wrong with the first.
    """
    passes = prompts.passes()
    failures: dict[tuple[int, str], PromptError] = {}
    prepared: list[PreparedPass] = []
    for source, found in zip(passes, try_prepare(model, passes, config), strict=True):
        if isinstance(found, PreparedPass):
            prepared.append(found)
        else:
            failures[_place(source, prompts)] = found
    if not failures:
        return Asked(prompts, tuple(prepared))
    kept = [_without(fact, n, failures) for n, fact in enumerate(prompts.facts)]
    facts = tuple(fact for fact in kept if fact is not None)
    if not facts:
        source = passes[0]
        raise named(source, failures[_place(source, prompts)])
    rest = replace(prompts, facts=facts)
    left = (_left(source, prompts, failures) for source in passes)
    # Prepared again, because their numbers are those of the smaller set.
    return Asked(
        rest,
        tuple(prepare(model, rest.passes(), config)),
        tuple(entry for entry in left if entry is not None),
    )


def _place(source: Pass, prompts: PromptSet) -> tuple[int, str]:
    """Return the number of the fact that a pass comes from, and which of its prompts it is."""
    if source.prompt_id != "ctl":
        assert source.fact_index is not None
        return source.fact_index, source.variant
    if source.fact_index is not None:
        return source.fact_index, "control"
    # The one control of a set belongs to no fact in the table; here to the one that brings it.
    return next(n for n, fact in enumerate(prompts.facts) if fact.control), "control"


def _without(
    fact: Fact, number: int, failures: Mapping[tuple[int, str], PromptError]
) -> Fact | None:
    """Return a fact with what of it can be asked; None without its own prompt."""
    if (number, "orig") in failures:
        return None
    if (number, "no_filler") in failures:
        fact = replace(fact, ablated=None)
    return replace(fact, control=None) if (number, "control") in failures else fact


def _left(
    source: Pass, prompts: PromptSet, failures: Mapping[tuple[int, str], PromptError]
) -> LeftOut | None:
    number, variant = _place(source, prompts)
    key = prompts.facts[number].key
    error = failures.get((number, variant))
    if error is not None:
        stage = "alignment" if isinstance(error, AlignmentError) else "prompt"
        return LeftOut(key, variant, stage, str(error))
    if (number, "orig") in failures:
        return LeftOut(key, variant, "fact", "its fact's own prompt was left out")
    return None
