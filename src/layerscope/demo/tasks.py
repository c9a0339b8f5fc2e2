"""In-context tasks: lists of examples from which alone the task can be told.

The same query word occurs in several tasks (`give` has an antonym, a past tense and a Spanish
translation), so a model that does not read the examples cannot know the answer. A fixed set of
(task, word, list format) triples is held out: they never occur in the training text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from importlib import resources
from random import Random
from typing import Literal, get_args

from layerscope.demo.documents import (
    DETERMINED,
    ORDINARY,
    RANDOM,
    Document,
    Item,
    Piece,
    fraction,
    pick,
)

Task = Literal["antonym", "plural", "past", "spanish"]
TASKS: tuple[Task, ...] = get_args(Task)
MOST_SHOTS = 8
FEWEST_SHOTS = 3

# Format name -> (text before the query word, between word and answer, after the answer).
FORMATS: dict[str, tuple[str, str, str]] = {
    "arrow": ("", " ->", "\n"),
    "double_arrow": ("", " =>", "\n"),
    "question": ("Q: ", " A:", "\n"),
    "question_lines": ("Q: ", "\nA:", "\n"),
    "colon": ("", " :", ", "),
    "input": ("Input: ", " Output:", "\n"),
}


@cache
def word_table() -> tuple[dict[str, str], ...]:
    """Read `words.csv`: one row per English word, with its part of speech and its forms."""
    text = resources.files("layerscope.demo").joinpath("words.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


@cache
def words_for(task: Task, pos: str | None = None) -> tuple[tuple[str, str], ...]:
    """List the (word, answer) pairs of a task, all of them or those of one part of speech."""
    return tuple(
        (row["word"], row[task])
        for row in word_table()
        if row[task] and (pos is None or row["pos"] == pos)
    )


def held_out(task: Task, word: str, style: str) -> bool:
    """Whether this word never occurs in this task and this format in the training text."""
    return fraction("task", task, word, style) < 0.1


def _pool(rng: Random, task: Task) -> tuple[tuple[str, str], ...]:
    """Choose the words of one list: mostly one part of speech, so that the words do not tell."""
    if task == "spanish" and rng.random() < 0.7:
        return words_for(task, pick(rng, ("adjective", "noun", "verb", "verb")))
    return words_for(task)


def _line(style: str, word: str, answer: str, number: int) -> tuple[Piece, ...]:
    before, between, after = FORMATS[style]
    return (
        Piece(before, ORDINARY),
        Piece(word, RANDOM),
        Piece(between, ORDINARY),
        Piece(f" {answer}", DETERMINED if number else RANDOM),
        Piece(after, ORDINARY),
    )


def documents(rng: Random) -> Iterator[Document]:
    """Yield training documents without end."""
    while True:
        task = pick(rng, TASKS)
        style = pick(rng, tuple(FORMATS))
        pairs = [pair for pair in _pool(rng, task) if not held_out(task, pair[0], style)]
        count = FEWEST_SHOTS + 1 + int(rng.random() * (MOST_SHOTS - FEWEST_SHOTS + 1))
        chosen = rng.sample(pairs, count)
        pieces = [
            piece
            for number, (word, answer) in enumerate(chosen)
            for piece in _line(style, word, answer, number)
        ]
        yield Document("tasks", tuple(pieces))


def held_out_items(rng: Random, per_task: int) -> list[Item]:
    """Ask every task about held-out triples, after examples of the same part of speech.

    The examples are drawn from all words, so they too may be triples never seen in training.
    """
    items: list[Item] = []
    for task in TASKS:
        queries = [
            (row["word"], row[task], row["pos"], style)
            for row in word_table()
            for style in FORMATS
            if row[task] and held_out(task, row["word"], style)
        ]
        for _ in range(per_task):
            word, answer, pos, style = pick(rng, queries)
            others = [pair for pair in words_for(task, pos) if pair[0] != word]
            count = FEWEST_SHOTS + int(rng.random() * (MOST_SHOTS - FEWEST_SHOTS + 1))
            lines = [
                "".join(piece.text for piece in _line(style, shot, reply, 1))
                for shot, reply in rng.sample(others, count)
            ]
            before, between, _ = FORMATS[style]
            items.append(Item(task, "".join(lines) + before + word + between, f" {answer}"))
    return items
