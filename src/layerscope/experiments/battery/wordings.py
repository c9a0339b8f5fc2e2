"""Wordings of relations in several languages, as data: templates with slots for a fact."""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from layerscope.errors import PromptError, nearest

if TYPE_CHECKING:
    from layerscope.experiments.battery.items import Item

SINGLE = ("orig", "no_filler", "negated", "reversed", "wrong_role", "novel")
SLOTS = ("name", "of", "subject", "Subject", "the", "answer", "of_answer")
_VOWELS = "AEIOUYÀÂÄÉÈÊËÎÏÔÖÛÜaeiouyàâäéèêëîïôöûüHh"


@dataclass(frozen=True)
class Wordings:
    """Templates by relation and language, and what is particular to a language."""

    languages: Mapping[str, Mapping[str, Any]]
    relations: Mapping[str, Mapping[str, Mapping[str, Any]]]
    neutral: tuple[str, ...]

    @staticmethod
    def builtin() -> Wordings:
        """Return the shipped wordings of capital, currency and language."""
        return _builtin()

    def extended(self, own: Any) -> Wordings:
        """Add a user's wordings by relation and language; raises PromptError for bad ones.

        Each is a mapping with `orig` and, optionally, the other variants of the shipped file.
        """
        if not isinstance(own, Mapping):
            raise PromptError("wordings must map a relation to languages, and those to templates")
        relations: dict[str, Any] = copy.deepcopy(dict(self.relations))
        for relation, languages in own.items():
            if not isinstance(languages, Mapping):
                raise PromptError(f"wordings of {relation!r} must map languages to templates")
            for language, entry in languages.items():
                where = f"wordings of {relation!r} in {language!r}"
                relations.setdefault(str(relation), {})[str(language)] = _checked(entry, where)
        return Wordings(self.languages, relations, self.neutral)

    def check(self, relation: str, language: str, *, where: str) -> None:
        """Raise PromptError unless there is a wording of the relation in the language."""
        if relation not in self.relations:
            raise PromptError(
                f"{where}: relation {relation!r} has no wording{nearest(relation, self.relations)};"
                f" use {', '.join(self.relations)}, or give a prompt"
            )
        if language not in self.relations[relation]:
            known = self.relations[relation]
            raise PromptError(
                f"{where}: {relation} has no wording in {language!r}{nearest(language, known)}; "
                f"use {', '.join(known)}, or give a prompt"
            )

    def text(self, item: Item, variant: str) -> str | None:
        """Return an item's prompt in a wording (`p01` is the first paraphrase), None without one.

        An own prompt of the item goes before that of its relation.
        """
        if item.prompts:
            return item.prompts.get(variant)
        entry = self.relations[item.relation][item.language]
        if variant.startswith("p") and variant[1:].isdigit():
            template = dict(enumerate(entry.get("paraphrases", ()), start=1)).get(int(variant[1:]))
        else:
            template = entry.get(variant)
        return None if template is None else template.format(**slots(item))

    def paraphrases(self, item: Item) -> list[str]:
        """Return the names of an item's paraphrases: p01, p02, ..."""
        if item.prompts:
            return sorted(name for name in item.prompts if name[0] == "p" and name[1:].isdigit())
        count = len(self.relations[item.relation][item.language].get("paraphrases", ()))
        return [f"p{number:02d}" for number in range(1, count + 1)]

    def language(self, code: str) -> Mapping[str, Any]:
        """Return what is particular to a language; unknown ones are taken like English."""
        return self.languages.get(code, self.languages["en"])

    def length(self, item: Item) -> str:
        """Return whether an item's subject has a short, medium or long name."""
        own, count = self.language(item.language), len(item.subject)
        if count <= own["short_name"]:
            return "short"
        return "long" if count >= own["long_name"] else "medium"

    def to_dict(self) -> dict[str, Any]:
        """Return the wordings as plain values."""
        return {"languages": self.languages, "relations": self.relations, "neutral": self.neutral}


def of_name(name: str, language: str) -> str:
    """Return a name after "of" by the language's plain rule, without an article."""
    if language == "zh":
        return name
    if language == "de":
        return f"von {name}"
    if language == "fr":
        if name.startswith("Le "):
            return f"du {name[3:]}"
        return f"d'{name}" if name[:1] in _VOWELS else f"de {name}"
    return f"{'de' if language == 'es' else 'of'} {name}"


def slots(item: Item) -> dict[str, str]:
    """Return what a template may name, for one item."""
    of = item.of or of_name(item.subject, item.language)
    subject = of.removeprefix("of ") if item.language == "en" else item.subject
    return {
        "name": item.subject,
        "of": of,
        "subject": subject,
        "Subject": subject[:1].upper() + subject[1:],
        "the": " the" if subject.startswith("the ") else "",
        "answer": item.answer,
        "of_answer": of_name(item.answer, item.language),
    }


def _checked(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "orig" not in entry:
        raise PromptError(f"{where}: give a mapping with orig, and other variants if there are any")
    known = (*SINGLE, "paraphrases")
    for name, value in entry.items():
        if name not in known:
            raise PromptError(
                f"{where}: unknown variant {name!r}{nearest(str(name), known)}; "
                f"known: {', '.join(known)}"
            )
        texts: Any = value if name == "paraphrases" else [value]
        for text in texts if isinstance(texts, list) else [None]:
            _check_slots(text, f"{where}, {name}")
    return dict(entry)


def _check_slots(text: Any, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: give a text")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise PromptError(f"{where}: {error}; write a brace as {{{{ or }}}}") from None
    for name in names:
        if name not in SLOTS:
            raise PromptError(
                f"{where}: unknown slot {{{name}}}{nearest(name, SLOTS)}; known: {', '.join(SLOTS)}"
            )


@cache
def _builtin() -> Wordings:
    text = resources.files("layerscope.experiments.battery").joinpath("data/templates.yaml")
    content = yaml.safe_load(text.read_text(encoding="utf-8"))
    for relation, languages in content["relations"].items():
        for language, entry in languages.items():
            _checked(entry, f"{relation} in {language}")
    return Wordings(content["languages"], content["relations"], tuple(content["neutral"]))
