"""Opinionated reviews: praise or blame in a consistent vocabulary, then a judgement that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from layerscope.demo.documents import (
    DETERMINED,
    ORDINARY,
    Document,
    Item,
    Piece,
    for_validation,
    pick,
)

Verdict = Literal["good", "bad"]

_TITLES = (
    "The Silver River",
    "A Quiet Winter",
    "The Last Harbor",
    "Seven Lanterns",
    "The Glass Garden",
    "Midnight Train",
)
_PLACES = ("The Blue Door", "Casa Rosa", "The Old Mill", "Green Fork", "The Lantern")


@dataclass(frozen=True, slots=True)
class _Subject:
    name: str
    titles: tuple[str, ...]
    opening: str
    aspects: tuple[str, ...]


_SUBJECTS = (
    _Subject("film", _TITLES, "I watched", ("acting", "story", "music", "ending", "cast")),
    _Subject("book", _TITLES, "I read", ("story", "writing", "plot", "ending", "hero")),
    _Subject("restaurant", _PLACES, "I ate at", ("food", "service", "soup", "waiter", "dessert")),
    _Subject("hotel", _PLACES, "I stayed at", ("room", "service", "bed", "breakfast", "staff")),
)
_WORDS: dict[Verdict, tuple[str, ...]] = {
    "good": (
        "wonderful",
        "excellent",
        "brilliant",
        "great",
        "delightful",
        "perfect",
        "amazing",
        "lovely",
    ),
    "bad": ("terrible", "awful", "boring", "poor", "dreadful", "horrible", "disappointing", "bad"),
}
_REMARKS: dict[Verdict, tuple[str, ...]] = {
    "good": (
        "I smiled the whole time.",
        "It was worth every cent.",
        "I want to go back soon.",
        "My friends enjoyed it too.",
        "It made my day.",
    ),
    "bad": (
        "I was bored the whole time.",
        "It was a waste of money.",
        "I never want to go back.",
        "My friends complained too.",
        "It ruined my day.",
    ),
}
# Text before the judgement, then the judgement itself for a good and for a bad review.
_CONCLUSIONS: tuple[tuple[str, str, str], ...] = (
    ("Overall I", " loved it.", " hated it."),
    ("Rating:", " good", " bad"),
    ("Overall it was", " great.", " terrible."),
    ("In short, I", " recommend it.", " regret it."),
    ("Sentiment:", " positive", " negative"),
)
_STRENGTHS = ("", "really ", "very ", "truly ", "simply ")


def _body(rng: Random, subject: _Subject, verdict: Verdict) -> str:
    """Write the review without its judgement; a fifth have one remark that goes against it."""
    title = pick(rng, subject.titles)
    opening = pick(
        rng,
        (
            f"{subject.opening} {title} last week.",
            f"Review of the {subject.name} {title}.",
            f"{title} is a new {subject.name}.",
        ),
    )
    aspects = rng.sample(subject.aspects, 2 + int(rng.random() * 2))
    sentences: list[str] = []
    for aspect in aspects:
        word = pick(rng, _WORDS[verdict])
        sentences.append(f"The {aspect} was {pick(rng, _STRENGTHS)}{word}.")
    if rng.random() < 0.5:
        sentences.append(pick(rng, _REMARKS[verdict]))
    if len(sentences) > 2 and rng.random() < 0.2:
        other: Verdict = "bad" if verdict == "good" else "good"
        sentences[0] = f"The {aspects[0]} was {pick(rng, _WORDS[other])}, it is true."
    return " ".join([opening, *sentences])


def _review(rng: Random) -> tuple[str, str, list[tuple[str, str]]]:
    """Draw a review: its verdict, its body, and one or two judgement lines (text, judgement)."""
    verdict: Verdict = "good" if rng.random() < 0.5 else "bad"
    body = _body(rng, pick(rng, _SUBJECTS), verdict)
    lines = [
        (before, good if verdict == "good" else bad)
        for before, good, bad in rng.sample(_CONCLUSIONS, 1 + int(rng.random() * 2))
    ]
    return verdict, body, lines


def documents(rng: Random, validation: bool = False) -> Iterator[Document]:
    """Yield training documents (or those kept for validation) without end."""
    while True:
        _, body, lines = _review(rng)
        if for_validation(body) != validation:
            continue
        pieces = [Piece(body, ORDINARY)]
        for before, judgement in lines:
            pieces += [Piece(pick(rng, (" ", "\n")) + before), Piece(judgement, DETERMINED)]
        yield Document("reviews", tuple(pieces))


def held_out_items(rng: Random, count: int) -> list[Item]:
    """Ask for the judgement of reviews that are kept out of training."""
    items: list[Item] = []
    while len(items) < count:
        verdict, body, lines = _review(rng)
        if for_validation(body):
            before, judgement = lines[0]
            items.append(Item(verdict, f"{body} {before}", judgement.rstrip(".").split(" it")[0]))
    return items
