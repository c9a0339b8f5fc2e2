"""From items to questions: every variant of every item, with its gold and its foil."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layerscope.experiments.battery.config import DERANGEMENT_BATCH
from layerscope.experiments.battery.items import Battery, Item
from layerscope.experiments.battery.shipped import control_item
from layerscope.experiments.battery.wordings import Wordings
from layerscope.experiments.layers.prompts import Pass

SHIFTS = (1, 3, 7)  # tokens by which the answer slot moves
BASE = ("orig", "novel")  # the variant that an item's summary row describes
CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of an item. `shift` is the number of tokens still to be put in front of it."""

    item: Item
    part: str
    variant: str
    text: str
    answer: str
    foil: str | None = None
    shift: int = 0
    joint: Literal["with_space", "no_space"] | None = None

    def asked(self, index: int, text: str) -> Pass:
        """Return the question, with this text, as a pass of the layers experiment."""
        return Pass(
            index=index,
            fact_key=self.item.key,
            fact_index=None,
            prompt_id="ctl" if self.part == CONTROL else "pos",
            variant=self.variant,
            text=text,
            answer=self.answer,
            foil=self.foil,
            joint=self.joint,
        )


def questions(battery: Battery, parts: Sequence[str], *, seed: int) -> list[Question]:
    """Return the questions of a battery, ordered by content and not by where items stand."""
    items = sorted(battery.items, key=lambda item: item.key)
    foils = permuted_answers(items, seed=seed) if "permuted" in parts else {}
    found: list[Question] = []
    for item in items:
        if not item.invented or "novelty" in parts:
            foil = item.foil or foils.get(item.key)
            found += _of_item(item, battery, parts, foil)
    if CONTROL in parts:
        found += _controls(items, battery.wordings)
    return found


Variant = tuple[str, str, str | None, str, int]  # part, name, text, answer, shift


def _of_item(
    item: Item, battery: Battery, parts: Sequence[str], foil: str | None
) -> Iterator[Question]:
    """Yield the questions of one item; a wording that its relation lacks is none."""
    joint = battery.wordings.language(item.language)["joint"]
    if item.prompts and joint == "with_space":
        joint = None  # a prompt of the user's may end in white space, or in a quotation mark
    plain = battery.wordings.text(item, "orig")
    assert plain is not None
    if item.invented:
        told = battery.wordings.text(item, "novel")
        text = None if told is None else told + plain
        variants: list[Variant] = [("novelty", "novel", text, item.answer, 0)]
    else:
        variants = [("orig", "orig", plain, item.answer, 0)]
        variants += _reworded(item, battery.wordings, parts)
        variants += _displaced(item, plain, battery.wordings, parts)
        if "roles" in parts:
            variants += _turned(item, battery)
    for part, variant, text, answer, shift in variants:
        if text is not None:
            yield Question(
                item=item,
                part=part,
                variant=variant,
                text=text,
                answer=answer,
                foil=foil if variant in BASE else None,
                shift=shift,
                joint=joint,
            )


def _reworded(item: Item, wordings: Wordings, parts: Sequence[str]) -> Iterator[Variant]:
    """Yield what says it in other words, and its negation beside what it negates."""
    if "wording" in parts or "negation" in parts:
        yield "wording", "no_filler", wordings.text(item, "no_filler"), item.answer, 0
    if "negation" in parts:
        yield "negation", "negated", wordings.text(item, "negated"), item.answer, 0
    if "paraphrases" in parts:
        for variant in wordings.paraphrases(item):
            yield "paraphrases", variant, wordings.text(item, variant), item.answer, 0


def _displaced(
    item: Item, plain: str, wordings: Wordings, parts: Sequence[str]
) -> Iterator[Variant]:
    """Yield the plain question at other positions and with other punctuation."""
    if "position" in parts:
        for shift in SHIFTS:
            yield "position", f"shift_{shift}", plain, item.answer, shift
    if "punctuation" in parts:
        for variant, text in _punctuated(plain, wordings, item.language):
            yield "punctuation", variant, text, item.answer, 0


def _turned(item: Item, battery: Battery) -> Iterator[Variant]:
    """Yield the question the other way round, where it has one answer, and in the wrong role."""
    text = battery.wordings.text
    if (item.relation, item.language, item.answer) not in battery.shared:
        yield "roles", "reversed", text(item, "reversed"), item.subject, 0
    yield "roles", "wrong_role", text(item, "wrong_role"), item.subject, 0


def _punctuated(text: str, wordings: Wordings, language: str) -> Iterator[tuple[str, str]]:
    own = wordings.language(language)
    yield "comma", text + own["comma"]
    yield "colon", text + own["colon"]
    old, new = own["space"]
    if old in text:
        yield "space", text.replace(old, new, 1)


def _controls(items: Sequence[Item], wordings: Wordings) -> Iterator[Question]:
    """Ask about the control's subject once per relation and language."""
    asked = sorted({(i.relation, i.language) for i in items if not i.prompts and not i.invented})
    for relation, language in asked:
        item = control_item(relation, language)
        text = None if item is None else wordings.text(item, "orig")
        if item is not None and text is not None:
            joint = wordings.language(language)["joint"]
            yield Question(
                item=item, part=CONTROL, variant=CONTROL, text=text, answer=item.answer, joint=joint
            )


def permuted_answers(items: Sequence[Item], *, seed: int) -> dict[str, str]:
    """Give every item another item's answer: a derangement within batches of one relation.

    Items of one relation and language are shuffled by `seed` and cut into batches of 50. Within a
    batch no item keeps its own answer; where more than half share one, those that would are left
    out.
    """
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in sorted(items, key=lambda item: item.key):
        if not item.invented:
            groups.setdefault((item.relation, item.language), []).append(item)
    found: dict[str, str] = {}
    for number, (_, members) in enumerate(sorted(groups.items())):
        order = np.random.default_rng([seed, number]).permutation(len(members))
        shuffled = [members[index] for index in order]
        cuts = list(range(0, len(shuffled), DERANGEMENT_BATCH))
        if len(shuffled) - cuts[-1] == 1 and len(cuts) > 1:
            cuts.pop()  # a batch of one has nobody to swap with
        for start, stop in zip(cuts, [*cuts[1:], len(shuffled)], strict=True):
            found |= _deranged(shuffled[start:stop])
    return found


def _deranged(batch: Sequence[Item]) -> dict[str, str]:
    """Rotate a batch, equal answers side by side, past the longest run of one answer."""
    first = {item.answer: number for number, item in reversed(list(enumerate(batch)))}
    grouped = sorted(batch, key=lambda item: first[item.answer])
    answers = [item.answer for item in grouped]
    step = max(answers.count(answer) for answer in first)
    rotated = answers[step % len(answers) :] + answers[: step % len(answers)]
    pairs = zip(grouped, rotated, strict=True)
    return {item.key: other for item, other in pairs if other != item.answer}
