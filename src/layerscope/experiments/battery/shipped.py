"""The shipped battery, built from its tables of countries, currencies and languages."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources

from layerscope.experiments.battery.items import Battery, Item, shared_answers
from layerscope.experiments.battery.wordings import Wordings

RELATIONS = ("capital", "currency", "language")
LANGUAGES = ("en", "de", "fr", "es", "zh")
CONTROL = "FRA"  # whose questions are the control of all others

Row = Mapping[str, str]


@cache
def shipped() -> Battery:
    """Return the shipped battery; see `Battery.builtin`."""
    currencies = {row["en"]: row for row in _table("currencies.csv")}
    languages = {row["en"]: row for row in _table("languages.csv")}
    items: list[Item] = []
    absent: list[tuple[str, str]] = []

    def add(row: Row, relation: str, language: str, answer: str, *, invented: bool) -> None:
        item = Item(
            relation=relation,
            subject=row[f"name_{language}"],
            answer=answer,
            language=language,
            entity=row["key"],
            of=row[f"of_{language}"],
            frequency=row["frequency"],
            invented=invented,
        )
        if answer:
            items.append(item)
        else:
            absent.append((item.key, "no answer in the battery: contested, shared or not sure"))

    for row in _table("countries.csv"):
        for language in LANGUAGES:
            add(row, "capital", language, row[f"capital_{language}"], invented=False)
            for relation, table in (("currency", currencies), ("language", languages)):
                known = table.get(row[relation])
                add(row, relation, language, known[language] if known else "", invented=False)
    for row in _table("invented.csv"):
        for language in LANGUAGES:
            for relation in RELATIONS:
                add(row, relation, language, row[f"{relation}_{language}"], invented=True)
    shared = shared_answers(items)
    return Battery("countries", tuple(items), Wordings.builtin(), tuple(absent), shared)


def control_item(relation: str, language: str) -> Item | None:
    """Return the control's own item for a relation in a language, None where there is none."""
    key = f"{relation}/{language}/{CONTROL}"
    return next((item for item in shipped().items if item.key == key), None)


def _table(name: str) -> list[Row]:
    path = resources.files("layerscope.experiments.battery").joinpath(f"data/{name}")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
