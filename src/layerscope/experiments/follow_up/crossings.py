"""Which facts are crossed into which languages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from layerscope.experiments.follow_up.facts import Fact, Ledger, Prompt, drawn
from layerscope.experiments.follow_up.languages import Crossing
from layerscope.experiments.follow_up.prepare import Plan

STAGE = "language"


def crossings_of(planned: Plan, facts: Sequence[Fact], ledger: Ledger) -> list[Crossing]:
    """Return every fact of the source language beside the same fact in each other language.

    The corrupted prompt asks, in that language, about the fact's partner, or about another subject
    where the partner cannot be asked there or has an answer that begins alike.
    """
    config = planned.config
    asked: dict[tuple[str, str], dict[str, Prompt]] = defaultdict(dict)
    for prompt in planned.prompts:
        asked[prompt.item.relation, prompt.item.language][prompt.name] = prompt
    spoken = sorted({item.language for item in planned.battery.items} - {config.language})
    found: list[Crossing] = []
    for fact in facts:
        relation, own = fact.group
        if own != config.language:
            continue
        for language in spoken:
            there = asked[relation, language]
            clean = there.get(fact.clean.name)
            if clean is None:
                reason = f"its question cannot be asked in {language}"
                ledger.add(fact.clean.item, STAGE, reason)
                continue
            others = [other for other in there.values() if other.answer != clean.answer]
            others.sort(
                key=lambda other: (
                    other.name != fact.partner.name,
                    drawn(config.seed, fact.key, other.item.key),
                )
            )
            if not others:
                reason = f"no other subject with another answer can be asked about in {language}"
                ledger.add(fact.clean.item, STAGE, reason)
                continue
            found.append(Crossing(fact.clean, clean, others[0], fact.third))
    return found
