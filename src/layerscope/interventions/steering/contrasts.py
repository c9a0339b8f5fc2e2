"""Contrast sets: texts with and without a property, in pairs where they have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from layerscope.errors import PromptError
from layerscope.interventions.records import read_records


@dataclass(frozen=True)
class Contrast:
    """A text that has a property, and one that has it not.

    Attributes:
        positive, negative: the texts, or what follows `prompt`.
        prompt: what both begin with; may be empty.
        label: a part of both texts where their states are to be read; None for none.
    """

    positive: str
    negative: str
    prompt: str = ""
    label: str | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """The positive and the negative text in full."""
        return join(self.prompt, self.positive), join(self.prompt, self.negative)


@dataclass(frozen=True)
class ContrastSet:
    """Contrasts under a name.

    Attributes:
        paired: whether the two texts of a contrast belong together; else they were matched by
            their place in two lists, and only estimators that need no pairs mean something.
    """

    name: str
    contrasts: tuple[Contrast, ...]
    paired: bool = True

    def __post_init__(self) -> None:
        if len(self.contrasts) < 2:
            raise PromptError(f"contrast set {self.name!r} needs 2 contrasts or more")
        for number, contrast in enumerate(self.contrasts, start=1):
            if not contrast.positive.strip() or not contrast.negative.strip():
                raise PromptError(f"contrast {number} of {self.name!r} has an empty text")
            if contrast.positive == contrast.negative:
                raise PromptError(f"contrast {number} of {self.name!r} has one text twice")

    def __len__(self) -> int:
        return len(self.contrasts)

    def split(
        self, *, validation: float, test: float, seed: int
    ) -> tuple[ContrastSet, ContrastSet | None, ContrastSet | None]:
        """Divide at random, once for a seed: training, validation, test; None for an empty part."""
        order = list(self.contrasts)
        Random(seed).shuffle(order)
        n_test, n_validation = round(test * len(order)), round(validation * len(order))
        parts = (
            order[n_test + n_validation :],
            order[n_test : n_test + n_validation],
            order[:n_test],
        )
        if len(parts[0]) < 2:
            raise PromptError(
                f"contrast set {self.name!r} has {len(self)} contrasts, which leaves "
                f"{len(parts[0])} for training: add some, or change the split"
            )
        train, *others = (
            ContrastSet(self.name, tuple(part), self.paired) if len(part) > 1 else None
            for part in parts
        )
        assert train is not None
        return train, others[0], others[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the set, ready for JSON."""
        rows = [[c.prompt, c.positive, c.negative, c.label] for c in self.contrasts]
        return {"name": self.name, "paired": self.paired, "contrasts": rows}


def join(prompt: str, text: str) -> str:
    """Return a prompt and what follows it, with one space where neither has its own."""
    if not prompt or prompt[-1].isspace() or text[:1].isspace():
        return prompt + text
    return f"{prompt} {text}"


def read_contrasts(
    path: str | Path,
    *,
    against: str | Path | None = None,
    positive: str | None = None,
    negative: str | None = None,
) -> ContrastSet:
    """Read a contrast set from JSON, YAML or CSV.

    Understood are rows of ``positive`` and ``negative`` (and ``prompt``, ``label``); rows of
    ``statement`` and ``label`` 1 or 0; TruthfulQA, as multiple choice (``question``,
    ``mc1_targets``) or as its table (``Question``, ``Best Answer``, ``Incorrect Answers``); a list
    of texts with another list to hold `against` it; and a list of texts that are put into a
    `positive` and a `negative` template with ``{text}``.

    Raises:
        PromptError: the file cannot be read, or is of no such shape.
    """
    path = Path(path)
    content = read_records(path)
    if isinstance(content, Mapping):
        entry = cast("Mapping[str, Any]", content)
        content = next((entry[key] for key in ("contrasts", "pairs", "data") if key in entry), None)
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise PromptError(f"{path}: give a list of contrasts, each with 'positive' and 'negative'")
    rows = cast("Sequence[Any]", content)
    if all(isinstance(row, str) for row in rows):
        return _from_texts(path, cast("Sequence[str]", rows), against, positive, negative)
    if against is not None or positive is not None or negative is not None:
        raise PromptError(
            f"{path} has both sides of its contrasts; leave out the other file or texts"
        )
    first: Any = rows[0]
    if isinstance(first, Mapping) and {"statement", "label"} <= set(first):
        return _from_labels(path, rows)
    found = [_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    return ContrastSet(path.stem, tuple(found))


def _row(row: Any, where: str) -> Contrast:
    if isinstance(row, Mapping):
        entry = cast("Mapping[str, Any]", row)
        if "mc1_targets" in entry and "question" in entry:
            targets = cast("Mapping[str, int]", entry["mc1_targets"])
            true = [text for text, right in targets.items() if right]
            false = [text for text, right in targets.items() if not right]
            if true and false:
                return Contrast(true[0], false[0], f"Q: {entry['question']}\nA:")
        if "Best Answer" in entry and "Incorrect Answers" in entry:
            wrong = str(entry["Incorrect Answers"]).split(";")[0].strip()
            return Contrast(str(entry["Best Answer"]), wrong, f"Q: {entry['Question']}\nA:")
        if isinstance(entry.get("positive"), str) and isinstance(entry.get("negative"), str):
            label = entry.get("label")
            return Contrast(
                entry["positive"],
                entry["negative"],
                str(entry.get("prompt") or ""),
                None if label is None else str(label),
            )
    raise PromptError(f"{where}: give 'positive' and 'negative' as texts")


def _from_labels(path: Path, rows: Sequence[Any]) -> ContrastSet:
    sides: dict[str, list[str]] = {"1": [], "0": []}
    for number, row in enumerate(rows, start=1):
        label = str(row["label"]).strip()
        if label not in sides:
            raise PromptError(f"{path}, row {number}: the label must be 1 or 0, not {label!r}")
        sides[label].append(str(row["statement"]))
    return _matched(path.stem, sides["1"], sides["0"])


def _from_texts(
    path: Path,
    texts: Sequence[str],
    against: str | Path | None,
    positive: str | None,
    negative: str | None,
) -> ContrastSet:
    if against is not None:
        others = read_records(against)
        if not isinstance(others, Sequence) or not all(isinstance(text, str) for text in others):
            raise PromptError(f"{against}: give a list of texts")
        name = f"{path.stem} against {Path(against).stem}"
        return _matched(name, texts, cast("Sequence[str]", others))
    if positive is None or negative is None:
        raise PromptError(
            f"{path} is a list of texts, which is one side only: name a second file, or give a "
            "positive and a negative template with {text}"
        )
    for template in (positive, negative):
        if "{text}" not in template:
            raise PromptError(f"the template {template!r} lacks {{text}}")
    pairs = [
        Contrast(positive.replace("{text}", text), negative.replace("{text}", text))
        for text in dict.fromkeys(texts)
    ]
    return ContrastSet(path.stem, tuple(pairs))


def _matched(name: str, ones: Sequence[str], others: Sequence[str]) -> ContrastSet:
    pairs = [
        Contrast(one, other)
        for one, other in zip(
            [text for text in ones if text.strip()],
            [text for text in others if text.strip()],
            strict=False,
        )
        if one != other
    ]
    return ContrastSet(name, tuple(pairs), paired=False)
