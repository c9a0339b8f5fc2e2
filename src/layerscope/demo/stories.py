"""Small stories and sentences that bind people to things: ordinary English from a grammar."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from layerscope.demo.documents import (
    DETERMINED,
    ORDINARY,
    Document,
    Item,
    Piece,
    for_validation,
    pick,
)
from layerscope.demo.wordlists import ALL_NAMES, GIRLS, OBJECTS, PLACES

_CAUSES = (
    ("It started to rain", "got wet", "opened an umbrella"),
    ("The sun was very hot", "got thirsty", "drank some water"),
    ("The wind was cold", "felt cold", "put on a coat"),
    ("There was no lunch", "got hungry", "ate some bread"),
    ("The day was long", "felt tired", "went to sleep"),
    ("A dog barked", "was afraid", "ran home"),
    ("A friend called", "was happy", "smiled"),
)
_TIMES = ("One day", "One morning", "In the evening", "Yesterday", "Last week")
_VERBS = ("found", "lost", "saw", "bought", "dropped", "hid")


def _pronouns(name: str) -> tuple[str, str, str]:
    return ("She", "her", "her") if name in GIRLS else ("He", "him", "his")


def _story(rng: Random) -> tuple[Piece, ...]:
    """Tell of one or two people, an object and a place, with a cause and its effect."""
    first, second = rng.sample(ALL_NAMES, 2)
    thing, place = pick(rng, OBJECTS), pick(rng, PLACES)
    subject, _, possessive = _pronouns(first)
    cause, state, act = pick(rng, _CAUSES)
    opening = pick(
        rng,
        (
            f"{pick(rng, _TIMES)} {first} went to the {place}.",
            f"{first} was in the {place}.",
            f"{first} and {second} walked to the {place}.",
        ),
    )
    pieces = [Piece(opening, ORDINARY * 0.5)]
    if " and " in opening:
        pieces.append(Piece(f" They {pick(rng, _VERBS)} a {thing}."))
    else:
        pieces += [Piece(f" {subject}", DETERMINED), Piece(f" {pick(rng, _VERBS)} a {thing}.")]
    pieces += [Piece(f" {cause}, so"), Piece(f" {first}"), Piece(f" {state}.")]
    pieces += [Piece(f" Then {subject.lower()} {act}.", DETERMINED)]
    if rng.random() < 0.6:
        ending = pick(
            rng,
            (
                f" At home {first} showed {possessive} mother the {thing}.",
                f" {first} told {possessive} friends about the {place}.",
                f" In the end {first} gave the {thing} to {second}.",
            ),
        )
        pieces.append(Piece(ending, ORDINARY))
    return tuple(pieces)


def _binding(rng: Random) -> tuple[tuple[Piece, ...], Item]:
    """Give things (or places) to two or three people, then ask who has which."""
    people = rng.sample(ALL_NAMES, 2 + int(rng.random() * 2))
    things = rng.sample(OBJECTS, len(people))
    verb = pick(rng, ("has", "holds", "carries", "owns"))
    clauses = [f"{name} {verb} the {thing}" for name, thing in zip(people, things, strict=True)]
    setting = ", ".join(clauses[:-1]) + f" and {clauses[-1]}."
    asked = int(rng.random() * len(people))
    question = pick(
        rng,
        (
            (f" The {things[asked]} belongs to", f" {people[asked]}"),
            (f" The one with the {things[asked]} is", f" {people[asked]}"),
            (f" {people[asked]} {verb} the", f" {things[asked]}"),
            (f" Question: Who {verb} the {things[asked]}? Answer:", f" {people[asked]}"),
        ),
    )
    pieces = (
        Piece(setting, ORDINARY * 0.5),
        Piece(question[0], ORDINARY * 0.5),
        Piece(question[1], DETERMINED),
        Piece("."),
    )
    return pieces, Item("binding", setting + question[0], question[1])


def documents(rng: Random, validation: bool = False) -> Iterator[Document]:
    """Yield training documents (or those kept for validation) without end."""
    while True:
        pieces = _binding(rng)[0] if rng.random() < 0.5 else _story(rng)
        document = Document("stories", pieces)
        if for_validation(document.text) == validation:
            yield document


def held_out_items(rng: Random, count: int) -> list[Item]:
    """Ask who has which thing, in texts that are kept out of training."""
    items: list[Item] = []
    while len(items) < count:
        pieces, item = _binding(rng)
        if for_validation("".join(piece.text for piece in pieces)):
            items.append(item)
    return items
