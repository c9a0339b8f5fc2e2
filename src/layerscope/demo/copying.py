"""Sequences that come twice or more: what teaches a model to look back and copy (induction)."""

from __future__ import annotations

import string
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from random import Random

from layerscope.demo.documents import DETERMINED, RANDOM, Document, Item, Piece, pick
from layerscope.demo.facts import facts_table
from layerscope.demo.tasks import word_table
from layerscope.demo.wordlists import ALL_NAMES, OBJECTS

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
_JUMPS = 0.1
_ENDS = ("", "", "n", "l", "r", "s")


@cache
def _words() -> tuple[str, ...]:
    """List the words that the other grammars use, to be strung together at random."""
    found: dict[str, None] = {}
    for row in word_table():
        for column in ("word", "antonym", "plural", "past", "spanish"):
            found[row[column]] = None
    for row in facts_table():
        for column in ("country", "capital", "currency", "language"):
            found[row[column]] = None
    found.pop("", None)
    return tuple(dict.fromkeys((*found, *ALL_NAMES, *OBJECTS)))


def _invented(rng: Random) -> str:
    """Invent a name such as `Tolo` or `Ved`."""
    count = 1 + int(rng.random() * 2)
    return ("".join(pick(rng, _SYLLABLES) for _ in range(count)) + pick(rng, _ENDS)).capitalize()


def _sequence(rng: Random, length: int) -> list[str]:
    """Draw random units of one sort: words, letters, invented names, digits or a mixture."""
    sort = rng.random()
    if sort < 0.45:
        return [pick(rng, _words()) for _ in range(length)]
    if sort < 0.6:
        return [pick(rng, string.ascii_uppercase) for _ in range(length)]
    if sort < 0.8:
        return [_invented(rng) for _ in range(max(2, length // 2))]
    if sort < 0.85:
        return [pick(rng, string.digits) for _ in range(length)]
    return [
        pick(rng, _words()) if rng.random() < 0.5 else _invented(rng)
        for _ in range(max(2, length * 2 // 3))
    ]


def _repeats(rng: Random, length: int, room: int) -> int:
    """Choose how often a sequence comes: at least twice, oftener the shorter it is."""
    return 2 + int(rng.random() * min(5, max(1, room // length - 1)))


def _repeated(rng: Random) -> Document:
    """Write a random sequence two to six times, at times with a mark or other words between."""
    length = 3 + int(rng.random() ** 2 * 38)
    repeats = _repeats(rng, length, 60)
    units = _sequence(rng, length)
    mark = pick(rng, ("", "", ".", " |", "\n", ";"))
    joined = (", " if rng.random() < 0.15 else " ").join(units)
    pieces: list[Piece] = []
    for number in range(repeats):
        lead = " " if number and mark != "\n" else ""
        if number and rng.random() < 0.2:
            filler = " ".join(pick(rng, _words()) for _ in range(1 + int(rng.random() * 6)))
            pieces.append(Piece(f"{lead}{filler}", RANDOM))
            lead = " "
        pieces.append(Piece(lead + joined, DETERMINED if number else RANDOM))
        pieces.append(Piece(mark, RANDOM))
    return Document("copying", tuple(pieces))


def _tokens(rng: Random) -> Document:
    """Draw a sequence of arbitrary tokens, repeated."""
    length = 3 + int(rng.random() ** 2 * 123)
    numbers = tuple(rng.random() for _ in range(length))
    return Document("copying", numbers=numbers, repeats=_repeats(rng, length, 160))


def _walk(rng: Random) -> Document:
    """Walk at random over a few units, each of which is nearly always followed by the same one.

    Only a look back at what followed the present unit earlier on tells the next unit: it is
    neither a fixed distance away nor known from other documents.
    """
    size = 3 + int(rng.random() * 10)
    length = min(size * (3 + int(rng.random() * 8)), 90)
    as_tokens = rng.random() < 0.5
    units = [str(rng.random()) for _ in range(size)] if as_tokens else _sequence(rng, size)
    units = list(dict.fromkeys(units))
    order = rng.sample(range(len(units)), len(units))
    path = [order[0]]
    follows = dict(zip(order, [*order[1:], order[0]], strict=True))
    for _ in range(length):
        jump = rng.random() < _JUMPS
        path.append(int(rng.random() * len(units)) if jump else follows[path[-1]])
    if as_tokens:
        return Document("copying", numbers=tuple(float(units[at]) for at in path), repeats=1)
    known: set[tuple[int, int]] = set()
    pieces = [Piece(units[path[0]], RANDOM)]
    for step in pairwise(path):
        weight = DETERMINED if step in known else RANDOM
        known.add(step)
        pieces.append(Piece(f" {units[step[1]]}", weight))
    return Document("copying", tuple(pieces))


def _look_up(rng: Random) -> Document:
    """Pair random words, then ask for the partner of some of them again."""
    keys = rng.sample(_words(), 3 + int(rng.random() * 6))
    pairs = [(key, pick(rng, _words())) for key in keys]
    between, after = pick(rng, ((" ->", "\n"), (" =", ", "), (" :", "\n"), (" is", ". ")))
    pieces = [Piece(f"{key}{between} {value}{after}", RANDOM) for key, value in pairs]
    for key, value in rng.sample(pairs, 1 + int(rng.random() * len(pairs))):
        pieces += [Piece(key + between, RANDOM), Piece(f" {value}", DETERMINED), Piece(after)]
    return Document("copying", tuple(pieces))


def documents(rng: Random) -> Iterator[Document]:
    """Yield training documents without end."""
    while True:
        form = rng.random()
        if form < 0.5:
            yield _repeated(rng)
        elif form < 0.78:
            yield _tokens(rng)
        elif form < 0.88:
            yield _walk(rng)
        else:
            yield _look_up(rng)


def drill(rng: Random) -> Iterator[Document]:
    """Yield the short, dense sequences from which looking back is learned the quickest."""
    while True:
        form = rng.random()
        if form < 0.7:
            yield _walk(rng)
        elif form < 0.85:
            yield _repeated(rng)
        else:
            yield _tokens(rng)


def held_out_items(rng: Random, count: int) -> list[Item]:
    """Ask for the next unit inside the second copy of a fresh random sequence of words or names."""
    items: list[Item] = []
    for number in range(count):
        length = 6 + int(rng.random() * 20)
        by_words = number % 2 == 0
        units = [pick(rng, _words()) if by_words else _invented(rng) for _ in range(length)]
        # Units that occur twice would make the right continuation ambiguous.
        units = list(dict.fromkeys(units))
        cut = 1 + int(rng.random() * (len(units) - 1))
        prompt = " ".join([*units, *units[:cut]])
        items.append(Item("words" if by_words else "names", prompt, f" {units[cut]}"))
    return items
