"""Prompt sets of the layers experiment: the built-in suite, and users' own CSV or YAML files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from layerscope.errors import PromptError, nearest

REQUIRED_COLUMNS = ("key", "prompt", "answer")
OPTIONAL_COLUMNS = ("foil", "control", "ablated")
COLUMNS = REQUIRED_COLUMNS + OPTIONAL_COLUMNS


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One question to the model, with its answer and what to compare it with.

    `foil` is a wrong answer of the same kind. `control` is the same question about something else,
    whose right answer is the foil. `ablated` is the prompt without a word that should not matter.
    """

    key: str
    prompt: str
    answer: str
    foil: str | None = None
    control: str | None = None
    ablated: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One prompt that goes through the model: a fact, its ablated wording, or a control."""

    index: int
    fact_key: str | None
    fact_index: int | None
    prompt_id: str  # "pos" or "ctl"
    variant: str  # "orig" or "no_filler"
    text: str
    answer: str
    foil: str | None = None
    joint: Literal["with_space", "no_space"] | None = None  # how the answer follows; None: either


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of facts under a name."""

    name: str
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        if not self.facts:
            raise PromptError(f"prompt set {self.name!r} is empty; give at least one prompt")
        seen: set[str] = set()
        for fact in self.facts:
            _check(fact)
            if fact.key in seen:
                raise PromptError(f"key {fact.key!r} occurs twice; every key must be unique")
            seen.add(fact.key)

    @staticmethod
    def builtin() -> PromptSet:
        """Return the built-in suite: five capitals, with and without a filler word, one control."""
        capitals = (
            ("Germany", "Berlin"),
            ("France", "Paris"),
            ("Italy", "Rome"),
            ("Japan", "Tokyo"),
            ("Canada", "Ottawa"),
        )
        stem = "Give the city name only, plain text. The capital of {} is called"
        facts = [
            Fact(
                key=f"{country}→{city}",
                prompt=stem.format(country) + " simply",
                answer=city,
                ablated=stem.format(country),
                foil="Paris" if country == "Germany" else None,
                control=stem.format("France") + " simply" if country == "Germany" else None,
            )
            for country, city in capitals
        ]
        return PromptSet("capitals", tuple(facts))

    @staticmethod
    def from_file(path: str | Path) -> PromptSet:
        """Read a set from CSV, or from YAML (a list of facts, or `{name, prompts: [...]}`).

        Raises PromptError, with the line or entry, for missing columns, empty cells and
        duplicate keys.
        """
        path = Path(path)
        readers = {".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
        if path.suffix.lower() not in readers:
            raise PromptError(f"{path}: prompts must be a .csv, .yaml or .yml file")
        try:
            name, facts = readers[path.suffix.lower()](path)
        except FileNotFoundError:
            raise PromptError(f"{path} does not exist; give a .csv or .yaml file") from None
        except UnicodeDecodeError:
            raise PromptError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            raise PromptError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return PromptSet(name, tuple(facts))
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from None

    @staticmethod
    def from_records(name: str, records: Iterable[Mapping[str, Any]]) -> PromptSet:
        """Build a set from mappings with the columns of a prompt file; raises PromptError."""
        facts = [_fact(record, f"prompt {n}") for n, record in enumerate(records, start=1)]
        return PromptSet(name, tuple(facts))

    def passes(self) -> tuple[Pass, ...]:
        """Return every pass in running order: facts with their ablated wording, then controls."""
        found: list[Pass] = []
        for number, fact in enumerate(self.facts):
            wordings = [("orig", fact.prompt), ("no_filler", fact.ablated)]
            for variant, text in wordings:
                if text is not None:
                    found.append(
                        Pass(
                            index=len(found),
                            fact_key=fact.key,
                            fact_index=number,
                            prompt_id="pos",
                            variant=variant,
                            text=text,
                            answer=fact.answer,
                            foil=fact.foil,
                        )
                    )
        controlled = [(number, fact) for number, fact in enumerate(self.facts) if fact.control]
        # A set with one control has it for the whole set, so it belongs to no single fact.
        shared = len(controlled) == 1
        for number, fact in controlled:
            found.append(
                Pass(
                    index=len(found),
                    fact_key=None if shared else fact.key,
                    fact_index=None if shared else number,
                    prompt_id="ctl",
                    variant="orig",
                    text=fact.control or "",
                    answer=fact.foil or "",
                    foil=fact.answer,
                )
            )
        return tuple(found)

    def digest(self) -> str:
        """Return the sha256 of the set's content; its name does not matter."""
        content = json.dumps([asdict(fact) for fact in self.facts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def _check(fact: Fact) -> None:
    for column in REQUIRED_COLUMNS:
        if not str(getattr(fact, column)).strip():
            raise PromptError(f"prompt {fact.key!r} has an empty {column}; fill it in")
    if fact.control and not fact.foil:
        raise PromptError(
            f"prompt {fact.key!r} has a control but no foil; the foil is the control's right answer"
        )


def _fact(record: Mapping[str, Any], where: str) -> Fact:
    unknown = [str(name) for name in record if name not in COLUMNS]
    if unknown:
        hint = nearest(unknown[0], COLUMNS)
        raise PromptError(
            f"{where}: unknown column {unknown[0]!r}{hint}; known: {', '.join(COLUMNS)}"
        )
    values = {
        name: (str(record[name]) if record.get(name) not in (None, "") else None)
        for name in COLUMNS
    }
    empty = [name for name in REQUIRED_COLUMNS if values[name] is None]
    if empty:
        raise PromptError(f"{where}: {' and '.join(empty)} missing; fill in {', '.join(empty)}")
    return Fact(**{name: value for name, value in values.items() if value is not None})


def _read_csv(path: Path) -> tuple[str, Iterable[Fact]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        header: Sequence[str] = reader.fieldnames or ()
        missing = [name for name in REQUIRED_COLUMNS if name not in header]
        if missing:
            hint = nearest(missing[0], header)
            raise PromptError(
                f"{path}: column(s) {', '.join(missing)} missing{hint}; "
                f"the header must hold {', '.join(REQUIRED_COLUMNS)}"
            )
        facts: list[Fact] = []
        try:
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise PromptError(
                        f"{where}: {len(header)} cells expected; quote commas in a cell"
                    )
                facts.append(_fact(record, where))
        except csv.Error as error:
            raise PromptError(f"{path}, line {reader.line_num}: {error}") from None
    return path.stem, facts


def _read_yaml(path: Path) -> tuple[str, Iterable[Fact]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PromptError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    name = path.stem
    if isinstance(content, dict):
        name = str(content.get("name", name))
        content = content.get("prompts")
    if not isinstance(content, list):
        raise PromptError(
            f"{path}: give a list of prompts, each with {', '.join(REQUIRED_COLUMNS)}"
        )
    facts: list[Fact] = []
    for number, record in enumerate(content, start=1):
        if not isinstance(record, dict):
            raise PromptError(f"{path}, prompt {number}: give a mapping with {', '.join(COLUMNS)}")
        facts.append(_fact(record, f"{path}, prompt {number}"))
    return name, facts
