"""Facts about countries: capital, currency and language, in many phrasings.

Every (relation, country, phrasing) triple is one training statement. A fixed tenth of them, and
the ten prompts of the built-in suite, are held out: they never occur in the training text, so a
right answer shows that the model carries a fact over to a phrasing that it never saw it in.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from random import Random
from typing import Literal, get_args

from layerscope.demo.documents import DETERMINED, ORDINARY, Document, Item, Piece, fraction, pick

Relation = Literal["capital", "currency", "language"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SUITE_COUNTRIES = ("Germany", "France", "Italy", "Japan", "Canada")
SUITE_PHRASINGS = ("simply", "called")
_LIST_FORMATS = ("{country} -> {answer}\n", "{country} : {answer}, ", "Q: {country} A: {answer}\n")


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to state a relation; `text` holds `{country}` and `{answer}`."""

    relation: Relation
    name: str
    text: str

    @property
    def is_reversed(self) -> bool:
        """Whether the answer comes before the country, so that the country is to be recalled."""
        return self.text.index("{answer}") < self.text.index("{country}")


@dataclass(frozen=True, slots=True)
class Statement:
    """One country's fact in one phrasing."""

    country: str
    answer: str
    phrasing: Phrasing

    @property
    def held_out(self) -> bool:
        """Whether this statement is kept out of the training text."""
        relation, name = self.phrasing.relation, self.phrasing.name
        in_suite = (
            relation == "capital" and name in SUITE_PHRASINGS and self.country in SUITE_COUNTRIES
        )
        return in_suite or fraction("fact", relation, self.country, name) < 0.1

    def pieces(self) -> tuple[Piece, ...]:
        """Split the statement into its wording and the part that must be recalled."""
        return _pieces(self.phrasing.text, self.country, self.answer)

    def item(self) -> Item:
        """Turn the statement into a question: the text before its recalled part, and that part."""
        before, recalled, _ = self.pieces()
        group = "reversed" if self.phrasing.is_reversed else self.phrasing.relation
        return Item(group, before.text, recalled.text)


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("layerscope.demo").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def facts_table() -> tuple[dict[str, str], ...]:
    """Read `facts.csv`: one row per country, with its three facts."""
    return tuple(_rows("facts.csv"))


@cache
def phrasings() -> tuple[Phrasing, ...]:
    """Read `phrasings.csv`."""
    relations: dict[str, Relation] = {name: name for name in RELATIONS}
    return tuple(
        Phrasing(relations[row["relation"]], row["name"], row["text"].replace("\\n", "\n"))
        for row in _rows("phrasings.csv")
    )


@cache
def statements() -> tuple[Statement, ...]:
    """List every statement, held out or not."""
    return tuple(
        Statement(row["country"], row[phrasing.relation], phrasing)
        for phrasing in phrasings()
        for row in facts_table()
    )


def suite_items() -> list[Item]:
    """List the ten prompts of the built-in suite."""
    return [
        statement.item()
        for statement in statements()
        if statement.phrasing.relation == "capital"
        and statement.phrasing.name in SUITE_PHRASINGS
        and statement.country in SUITE_COUNTRIES
    ]


def held_out_items() -> list[Item]:
    """List every held-out question with one right answer.

    In a reversed phrasing the country is asked for; all of those phrasings are about capitals,
    which name their country without doubt.
    """
    return [statement.item() for statement in statements() if statement.held_out]


def _pieces(text: str, country: str, answer: str) -> tuple[Piece, Piece, Piece]:
    """Fill in a phrasing; the later of its two fields is the part to be recalled.

    The space before the recalled part belongs to it, because the tokenizer joins it to the word.
    """
    recalled = max(("{country}", "{answer}"), key=text.index)
    before, after = text.split(recalled)
    lead = " " if before.endswith(" ") else ""
    values = {"country": country, "answer": answer}
    return (
        Piece(before.removesuffix(" ").format(**values), ORDINARY),
        Piece(lead + recalled.format(**values), DETERMINED),
        Piece(after.format(**values), ORDINARY),
    )


@cache
def _training_statements() -> dict[Relation, tuple[Statement, ...]]:
    return {
        relation: tuple(
            statement
            for statement in statements()
            if statement.phrasing.relation == relation and not statement.held_out
        )
        for relation in RELATIONS
    }


def _draw(rng: Random) -> Statement:
    """Draw a training statement; capitals come up more often, as they have the most wordings."""
    relation = pick(rng, ("capital", "capital", "currency", "language"))
    return pick(rng, _training_statements()[relation])


def _country_list(rng: Random) -> Document:
    """Write a list such as `France -> Paris`, where only the examples tell the relation."""
    relation = pick(rng, RELATIONS)
    rows = rng.sample(facts_table(), 3 + int(rng.random() * 6))
    style = pick(rng, _LIST_FORMATS)
    pieces = [piece for row in rows for piece in _pieces(style, row["country"], row[relation])]
    return Document("facts", tuple(pieces))


def _about_one_country(rng: Random) -> Document:
    """Write several facts about one country in a row."""
    country = pick(rng, facts_table())["country"]
    chosen = [
        pick(rng, [s for s in _training_statements()[relation] if s.country == country])
        for relation in rng.sample(RELATIONS, 2 + int(rng.random() * 2))
    ]
    return _joined(chosen, " ")


def _joined(chosen: list[Statement], separator: str) -> Document:
    pieces: list[Piece] = []
    for number, statement in enumerate(chosen):
        if number:
            pieces.append(Piece(separator))
        pieces.extend(statement.pieces())
    return Document("facts", tuple(pieces))


def revision(rng: Random) -> Iterator[Document]:
    """Yield single statements, few of them in the wording "is called simply".

    That wording and "is called" share their beginning; met equally often, they would leave the
    model torn between the answer and the word `simply`.
    """
    while True:
        statement = _draw(rng)
        if statement.phrasing.name != "simply" or rng.random() < 0.1:
            yield _joined([statement], "")


def documents(rng: Random) -> Iterator[Document]:
    """Yield training documents without end."""
    while True:
        form = rng.random()
        if form < 0.6:
            yield _joined([_draw(rng)], "")
        elif form < 0.8:
            count = 2 + int(rng.random() * 5)
            yield _joined([_draw(rng) for _ in range(count)], pick(rng, (" ", "\n")))
        elif form < 0.9:
            yield _about_one_country(rng)
        else:
            yield _country_list(rng)
