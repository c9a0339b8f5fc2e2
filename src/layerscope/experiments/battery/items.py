"""Batteries of facts: the shipped one, and users' own tables in CSV or YAML."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from layerscope.errors import PromptError, nearest
from layerscope.experiments.battery.wordings import Wordings, of_name

REQUIRED = ("relation", "subject", "answer")
OPTIONAL = ("language", "of", "entity", "foil", "frequency", "prompt", "variant")
COLUMNS = REQUIRED + OPTIONAL


@dataclass(frozen=True, kw_only=True)
class Item:
    """One fact in one language: a relation, a subject, and the right answer.

    `entity` is the subject independent of language. `of` is the subject after "of". `foil` is a
    wrong answer to compare with; without it another item's answer is taken. `frequency` is a
    stratum. `prompts` are the user's own wordings by variant; without them those of the relation
    are used. `invented` marks a subject that does not exist.
    """

    relation: str
    subject: str
    answer: str
    language: str = "en"
    entity: str = ""
    of: str = ""
    foil: str | None = None
    frequency: str | None = None
    invented: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> str:
        """The item's name within its battery."""
        return f"{self.relation}/{self.language}/{self.entity or self.subject}"


@dataclass(frozen=True)
class Battery:
    """Items under a name, and the wordings of their relations.

    `absent` lists (item key, reason) of what the table has no answer for. `shared` holds (relation,
    language, answer) of answers that several subjects have, before any selection: asked the other
    way round, such an item has no single answer.
    """

    name: str
    items: tuple[Item, ...]
    wordings: Wordings
    absent: tuple[tuple[str, str], ...] = ()
    shared: frozenset[tuple[str, str, str]] = frozenset()

    def __post_init__(self) -> None:
        if not any(not item.invented for item in self.items):
            raise PromptError(f"battery {self.name!r} is empty; give at least one item")
        seen: set[str] = set()
        for item in self.items:
            if item.key in seen:
                raise PromptError(
                    f"{item.key} occurs twice; give each subject once per relation and language "
                    "(other wordings of it need a variant each)"
                )
            seen.add(item.key)
            if not item.prompts:
                self.wordings.check(item.relation, item.language, where=item.key)

    @staticmethod
    def builtin() -> Battery:
        """Return the shipped battery: capital, currency and official language of countries.

        193 countries, in English, German, French, Spanish and simplified Chinese. Facts that are
        contested or not single-valued are left out, and listed in `absent`.
        """
        from layerscope.experiments.battery.shipped import shipped

        return shipped()

    @staticmethod
    def from_file(path: str | Path) -> Battery:
        """Read a battery from CSV, or from YAML: a list of items, or `{name, wordings, items}`.

        Raises PromptError, in one line with the place, for missing or unknown columns, empty
        cells, duplicates and relations without a wording.
        """
        path = Path(path)
        if path.suffix.lower() not in (".csv", ".yaml", ".yml"):
            raise PromptError(f"{path}: a battery must be a .csv, .yaml or .yml file")
        wordings = Wordings.builtin()
        try:
            if path.suffix.lower() == ".csv":
                return from_records(path.stem, _read_csv(path), wordings)
            name, records, own = _read_yaml(path)
            return from_records(name, records, wordings.extended(own))
        except FileNotFoundError:
            raise PromptError(f"{path} does not exist; give a .csv or .yaml file") from None
        except UnicodeDecodeError:
            raise PromptError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            raise PromptError(f"{path} cannot be read: {error.strerror}") from error
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from None

    def select(
        self,
        *,
        relations: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Battery:
        """Keep some relations and languages, and at most `limit` entities per relation.

        The limit takes the same entities in every language, evenly from the strata of frequency,
        in an order that depends on their names alone. Invented subjects stay.

        Raises:
            PromptError: an unknown relation or language, or a limit below 1.
        """
        for kind, wanted in (("relation", relations), ("language", languages)):
            known = sorted({getattr(item, kind) for item in self.items})
            for name in wanted or ():
                if name not in known:
                    raise PromptError(
                        f"the battery has no {kind} {name!r}{nearest(name, known)}; "
                        f"it has {', '.join(known)}"
                    )
        if limit is not None and limit < 1:
            raise PromptError(f"limit is {limit}; give at least 1")

        def wanted_key(relation: str, language: str) -> bool:
            return (relations is None or relation in relations) and (
                languages is None or language in languages
            )

        items = [item for item in self.items if wanted_key(item.relation, item.language)]
        absent = [entry for entry in self.absent if wanted_key(*entry[0].split("/")[:2])]
        if limit is not None:
            items = _limited(items, limit)
            absent = []
        return replace(self, items=tuple(items), absent=tuple(absent))

    def digest(self) -> str:
        """Return the sha256 of items and wordings; order and name do not matter."""
        items = sorted((asdict(item) for item in self.items), key=lambda entry: json.dumps(entry))
        content = json.dumps([items, self.wordings.to_dict()], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def shared_answers(items: Iterable[Item]) -> frozenset[tuple[str, str, str]]:
    """Return (relation, language, answer) of the answers that several real subjects have."""
    counts = Counter(
        (item.relation, item.language, item.answer) for item in items if not item.invented
    )
    return frozenset(answer for answer, count in counts.items() if count > 1)


def _limited(items: Sequence[Item], limit: int) -> list[Item]:
    """Take `limit` entities per relation, in turn from every stratum."""
    kept: set[tuple[str, str]] = set()
    for relation in {item.relation for item in items}:
        strata: dict[str, dict[str, None]] = {}
        for item in items:
            if item.relation == relation and not item.invented:
                strata.setdefault(item.frequency or "", {})[item.entity or item.subject] = None
        queues = [sorted(names, key=_shuffled) for _, names in sorted(strata.items())]
        order = [
            queue[turn]
            for turn in range(max(map(len, queues), default=0))
            for queue in queues
            if turn < len(queue)
        ]
        kept |= {(relation, entity) for entity in order[:limit]}
    return [
        item
        for item in items
        if item.invented or (item.relation, item.entity or item.subject) in kept
    ]


def _shuffled(name: str) -> str:
    """Return a key that orders names without regard to the alphabet, alike on every machine."""
    return hashlib.sha256(name.encode()).hexdigest()


def from_records(name: str, records: Iterable[Mapping[str, Any]], wordings: Wordings) -> Battery:
    """Build a battery from mappings with the columns of a battery file; raises PromptError."""
    items: dict[str, Item] = {}
    seen: set[tuple[str, str]] = set()
    for number, record in enumerate(records, start=1):
        where = f"row {number}"
        values = _values(record, where)
        variant = values.pop("variant", None)
        prompt = values.pop("prompt", None)
        if variant is not None and prompt is None:
            raise PromptError(f"{where}: variant {variant!r} has no prompt; fill in both, or none")
        values.setdefault("of", of_name(values["subject"], values.get("language", "en")))
        values.setdefault("entity", values["subject"])
        item = Item(**values)
        label = variant or "orig"
        if (item.key, label) in seen:
            raise PromptError(
                f"{where}: {item.key} ({label}) occurs twice; give each wording once, with a "
                "variant name of its own"
            )
        seen.add((item.key, label))
        known = items.get(item.key)
        if known is not None and (known.answer != item.answer or not known.prompts or not prompt):
            raise PromptError(
                f"{where}: {item.key} occurs twice; rows of one subject need the same answer, and "
                "a prompt and variant each"
            )
        own = dict(known.prompts) if known is not None else {}
        items[item.key] = replace(item, prompts=own | ({label: prompt} if prompt else {}))
    without = [item.key for item in items.values() if item.prompts and "orig" not in item.prompts]
    if without:
        raise PromptError(f"{without[0]} has variants but no plain wording; add one named orig")
    found = tuple(items.values())
    return Battery(name, found, wordings, shared=shared_answers(found))


def _values(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = [str(name) for name in record if name not in COLUMNS]
    if unknown:
        raise PromptError(
            f"{where}: unknown column {unknown[0]!r}{nearest(unknown[0], COLUMNS)}; "
            f"known: {', '.join(COLUMNS)}"
        )
    values = {
        name: str(record[name]).strip() if name != "prompt" else str(record[name])
        for name in COLUMNS
        if record.get(name) is not None and str(record[name]).strip()
    }
    empty = [name for name in REQUIRED if name not in values]
    if empty:
        raise PromptError(f"{where}: {' and '.join(empty)} missing; fill in {', '.join(empty)}")
    return values


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        header: Sequence[str] = reader.fieldnames or ()
        missing = [name for name in REQUIRED if name not in header]
        if missing:
            raise PromptError(
                f"column(s) {', '.join(missing)} missing{nearest(missing[0], header)}; "
                f"the header must hold {', '.join(REQUIRED)}"
            )
        try:
            records = list(reader)
        except csv.Error as error:
            raise PromptError(f"line {reader.line_num}: {error}") from None
    for number, record in enumerate(records, start=1):
        if None in record or None in record.values():
            raise PromptError(f"row {number}: {len(header)} cells expected; quote commas in a cell")
    return records


def _read_yaml(path: Path) -> tuple[str, list[dict[str, Any]], Mapping[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PromptError(f"not valid YAML: {' '.join(str(error).split())}") from None
    name, own = path.stem, {}
    if isinstance(content, dict):
        unknown = [str(key) for key in content if key not in ("name", "items", "wordings")]
        if unknown:
            raise PromptError(
                f"unknown entry {unknown[0]!r}; a battery has name, items and wordings"
            )
        name, own = str(content.get("name", name)), content.get("wordings") or {}
        content = content.get("items")
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise PromptError(f"give a list of items, each with {', '.join(REQUIRED)}")
    return name, content, own
