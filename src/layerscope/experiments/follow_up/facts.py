"""Which facts are followed up, what their subjects are swapped for, and what is left out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from layerscope.experiments.battery.items import Item
from layerscope.experiments.battery.prepare import Asked
from layerscope.experiments.follow_up.slots import Slot
from layerscope.models.answers import Variant


@dataclass(frozen=True)
class Left:
    """A fact, or a part of its follow-up, that was left out, and why."""

    item: str
    relation: str
    language: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Prompt:
    """A question of the battery as the follow-up uses it."""

    item: Item
    variant: str
    text: str
    ids: tuple[int, ...]
    answer: int
    joint: Variant | None = None

    @property
    def name(self) -> str:
        """The entity that is asked about, whatever the language."""
        return self.item.entity or self.item.subject

    def slot(self, foil: int | None = None) -> Slot:
        """Return the prompt with its own answer."""
        return Slot(self.item.key, self.ids, self.answer, foil)


@dataclass(frozen=True)
class Onset:
    """The observational onset of a fact, as a row of depth, and the lens that confirms it."""

    row: int
    source: str


@dataclass(frozen=True)
class Fact:
    """A fact that is followed up.

    Attributes:
        clean: its question. partner: the same question about another subject.
        third: about a third subject, whose values serve as a control; None where there is none.
    """

    clean: Prompt
    partner: Prompt
    third: Prompt | None
    onset: Onset

    @property
    def key(self) -> str:
        """The item's name."""
        return self.clean.item.key

    @property
    def group(self) -> tuple[str, str]:
        """Relation and language."""
        return self.clean.item.relation, self.clean.item.language

    def corrupted(self) -> Slot:
        """Return the partner's prompt, read for the fact's own answer."""
        return Slot(self.key, self.partner.ids, self.clean.answer, self.partner.answer)

    def plain(self) -> Slot:
        """Return the fact's own prompt, with the partner's answer as foil."""
        return self.clean.slot(self.partner.answer)


@dataclass
class Ledger:
    """Collects what is left out, in the order in which it is found."""

    left: list[Left] = field(default_factory=lambda: [])

    def add(self, item: Item, stage: str, reason: str) -> None:
        """Note an item that is left out of a stage."""
        self.left.append(Left(item.key, item.relation, item.language, stage, reason))


def prompt_of(entry: Asked) -> Prompt:
    """Return a prepared question as the follow-up uses it."""
    prepared = entry.prepared
    answer = prepared.alignment.first_id
    assert answer is not None, "only aligned answers are asked"
    ids = prepared.sequence[: prepared.length]
    question, text = entry.question, prepared.rendered.text
    return Prompt(question.item, question.variant, text, ids, answer, question.joint)


def onsets_of(items: pl.DataFrame) -> dict[str, tuple[Onset | None, int | None]]:
    """Return, by item, the confirmed onset of the norm lens and the rank that the model gives."""
    rows = items.filter(pl.col("lens") == "norm")
    found: dict[str, tuple[Onset | None, int | None]] = {}
    columns = ("item", "L_semantic_confirmed", "confirmed_source", "answer_rank_model")
    for key, row, source, rank in rows.select(columns).iter_rows():
        found[key] = (None if row is None else Onset(int(row), str(source)), rank)
    return found


def choose_facts(
    prompts: Sequence[Prompt],
    onsets: Mapping[str, tuple[Onset | None, int | None]],
    ledger: Ledger,
    *,
    seed: int,
) -> list[Fact]:
    """Return the facts with a confirmed onset, each with a partner; note the others.

    A partner is a fact of the same relation and language that the model answers too, whose prompt
    has as many tokens and whose answer begins with another one; which of them, the seed decides.
    """
    known: list[tuple[Prompt, Onset]] = []
    for prompt in prompts:
        onset, rank = onsets.get(prompt.item.key, (None, None))
        if rank != 1:
            ledger.add(prompt.item, "not_answered", f"the model gives its answer rank {rank}")
        elif onset is None:
            ledger.add(prompt.item, "no_onset", "no other lens confirms its onset")
        else:
            known.append((prompt, onset))
    pools: dict[tuple[str, str, int], list[Prompt]] = defaultdict(list)
    for prompt, _ in known:
        pools[prompt.item.relation, prompt.item.language, len(prompt.ids)].append(prompt)
    facts: list[Fact] = []
    for prompt, onset in known:
        item = prompt.item
        pool = pools[item.relation, item.language, len(prompt.ids)]
        others = [other for other in pool if other.answer != prompt.answer]
        others.sort(key=lambda other: drawn(seed, item.key, other.item.key))
        if not others:
            ledger.add(
                item,
                "no_partner",
                f"no other {item.relation} that the model answers has a prompt of "
                f"{len(prompt.ids)} tokens and another answer",
            )
            continue
        partner = others[0]
        thirds = [other for other in others[1:] if other.answer != partner.answer]
        facts.append(Fact(prompt, partner, thirds[0] if thirds else None, onset))
    return facts


def drawn(seed: int, *names: str) -> str:
    """Return a sort key that shuffles by a seed, alike on every machine."""
    return hashlib.sha256("\n".join([str(seed), *names]).encode()).hexdigest()


def split(
    facts: Sequence[Fact], *, share: float, most: int, seed: int
) -> tuple[list[Fact], list[Fact]]:
    """Return training and held-out facts, divided by entity and not by row."""
    names = sorted({fact.clean.name for fact in facts}, key=lambda name: drawn(seed, name))
    chosen = set(names[: min(round(share * len(names)), most)])
    train = [fact for fact in facts if fact.clean.name in chosen]
    return train, [fact for fact in facts if fact.clean.name not in chosen]
