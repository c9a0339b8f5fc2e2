"""Prompt pairs from files: our own columns, and the shapes in which published sets come."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layerscope.errors import PromptError
from layerscope.interventions.patching import PromptPair
from layerscope.models import LanguageModel

_CLEAN = ("clean", "clean_prefix", "clean_prompt")
_CORRUPT = ("corrupt", "corrupted", "patch_prefix", "corrupt_prompt", "corrupted_prompt")
_ANSWER = ("answers", "answer", "clean_answer")
_FOIL = ("foils", "foil", "patch_answer", "corrupt_answer")
GENERATED = 64


def read_pairs(
    path: str | Path, *, model: LanguageModel | None = None, limit: int | None = None
) -> list[PromptPair]:
    """Read prompt pairs from a YAML, CSV, JSON or JSON-lines file, or a folder of templates.

    Understood are: `clean`, `corrupt`, `answer(s)`, `foil(s)`, `key` and `labels` (several answers
    as a list, in CSV with ``|`` between them); the tables of EAP-IG (`corrupted` with `label` for
    greater-than, with `correct_idx` and `incorrect_idx` for a Llama 3 tokenizer); subject-verb
    agreement (`clean_prefix`, `patch_prefix`, `clean_answer`, `patch_answer`); the IOI names and
    templates of ACDC and of MIB, from which pairs are drawn; relations (`prompt_templates` and
    `samples`), each subject paired with the next of equal length in tokens.

    Args:
        model: needed for tables that hold token ids, and to pair relations.
        limit: take only the first so many.

    Raises:
        PromptError: the file cannot be read, or an entry lacks something; says which.
    """
    path = Path(path)
    if path.is_dir():
        pairs = _mib_folder(path, limit)
    else:
        content = load_file(path)
        if isinstance(content, dict) and "NAMES" in content:
            templates = [_words(text) for text in content["BABA_TEMPLATES"]]
            places, objects = content["PLACES"], content["OBJECTS"]
            pairs = ioi_pairs(content["NAMES"], templates, places, objects, limit or GENERATED)
        elif isinstance(content, dict) and "samples" in content:
            pairs = _relation(content, model)
        else:
            if isinstance(content, dict):
                content = content.get("pairs", content.get("prompts"))
            if not isinstance(content, list):
                raise PromptError(f"{path}: give a list of pairs, each with clean and corrupt")
            rows = content if limit is None else content[:limit]
            pairs = [_pair(row, f"{path}, entry {at}", model, at) for at, row in enumerate(rows, 1)]
    if not pairs:
        raise PromptError(f"{path} holds no pair; give at least one")
    seen: set[str] = set()
    for pair in pairs:
        if pair.key in seen:
            raise PromptError(f"{path}: key {pair.key!r} occurs twice; every key must be unique")
        seen.add(pair.key)
    return pairs if limit is None else pairs[:limit]


def load_file(path: Path) -> Any:
    """Return what a YAML, CSV, JSON or JSON-lines file holds.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist; give a .yaml, .csv or .json file") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return list(csv.DictReader(text.splitlines(), strict=True))
        if suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        if suffix in (".json", ".jsonl"):
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                # One object per line, whatever the file is called.
                return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (csv.Error, yaml.YAMLError, json.JSONDecodeError) as error:
        kind = suffix.lstrip(".").upper()
        raise PromptError(f"{path} is not valid {kind}: {' '.join(str(error).split())}") from None
    raise PromptError(f"{path}: pairs must be a .yaml, .csv, .json or .jsonl file")


def _pair(row: Any, where: str, model: LanguageModel | None, number: int) -> PromptPair:
    if not isinstance(row, Mapping):
        raise PromptError(f"{where}: give a mapping with clean, corrupt and answer")
    clean, corrupt = _first(row, _CLEAN), _first(row, _CORRUPT)
    if not clean or not corrupt:
        missing = "clean" if not clean else "corrupt"
        raise PromptError(f"{where}: {missing} is missing; give clean, corrupt and answer")
    answers, foils = words_of(_first(row, _ANSWER)), words_of(_first(row, _FOIL))
    if "correct_idx" in row:
        answers = (_word(row["correct_idx"], str(clean), model, where),)
        foils = (_word(row["incorrect_idx"], str(clean), model, where),)
    elif "label" in row and not answers:
        answers, foils = _greater_than(str(row["label"]), where)
    labels: Any = row.get("labels") or {}
    if isinstance(labels, str):
        labels = json.loads(labels)
    spans = {
        str(name): (str(texts), str(texts)) if isinstance(texts, str) else tuple(map(str, texts))
        for name, texts in labels.items()
    }
    if any(len(texts) != 2 for texts in spans.values()):
        raise PromptError(f"{where}: a label needs its text in clean and its text in corrupt")
    return PromptPair(
        key=str(row.get("key") or row.get("") or row.get("id") or f"{number:04d}"),
        clean=str(clean),
        corrupt=str(corrupt),
        answers=answers,
        foils=foils,
        labels={name: (texts[0], texts[1]) for name, texts in spans.items()},
    )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def words_of(value: Any) -> tuple[str, ...]:
    """Return the words of a field: a list, or a text with ``|`` between them."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part for part in value.split("|") if part.strip())
    return tuple(str(part) for part in (value if isinstance(value, Iterable) else [value]))


def _word(token_id: Any, prompt: str, model: LanguageModel | None, where: str) -> str:
    """Return the word of a token id, refusing ids of another tokenizer."""
    if model is None:
        raise PromptError(f"{where} gives answers as token ids; pass the model whose ids they are")
    id_ = int(token_id)
    known = len(model.token_strings())
    text = model.decode_token(id_) if id_ < known else ""
    if not text.strip() or text.strip() not in prompt:
        raise PromptError(
            f"{where}: token id {id_} is {text!r} for this model, which is not in its prompt, so "
            "the ids are another tokenizer's; give the answers as words"
        )
    return text.strip()


def _greater_than(label: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return two-digit years above and up to the label."""
    if not (label.isdigit() and int(label) < 99):
        raise PromptError(f"{where}: label {label!r} is no two-digit year")
    years = [f"{year:02d}" for year in range(100)]
    return tuple(years[int(label) + 1 :]), tuple(years[: int(label) + 1])


def ioi_pairs(
    names: Sequence[str],
    templates: Sequence[str],
    places: Sequence[str],
    objects: Sequence[str],
    count: int,
    *,
    seed: int = 0,
) -> list[PromptPair]:
    """Draw indirect-object pairs: the corrupt prompt has the other name as its subject.

    Templates hold ``{name_A}``, ``{name_B}``, ``{name_C}`` (who acts), ``{place}``, ``{object}``.
    """
    draw = random.Random(seed)
    pairs: list[PromptPair] = []
    for number in range(count):
        first, second = draw.sample(list(names), 2)
        values = {"place": draw.choice(list(places)), "object": draw.choice(list(objects))}
        template = draw.choice(list(templates))
        values |= {"name_A": first, "name_B": second}
        clean = template.format(**values, name_C=second)
        corrupt = template.format(**values, name_C=first)
        pairs.append(
            PromptPair(
                key=f"ioi-{number:03d}",
                clean=clean,
                corrupt=corrupt,
                answers=(first,),
                foils=(second,),
            )
        )
    return pairs


def _words(template: str) -> str:
    """Return an ACDC template in MIB's form: ends before the recipient [A]; its last [B] acts."""
    text = template.rpartition("[A]")[0].rstrip()
    begin, _, end = text.rpartition("[B]")
    text = f"{begin}{{name_C}}{end}"
    for name, new in (
        ("[A]", "{name_A}"),
        ("[B]", "{name_B}"),
        ("[PLACE]", "{place}"),
        ("[OBJECT]", "{object}"),
    ):
        text = text.replace(name, new)
    return text


def _mib_folder(path: Path, limit: int | None) -> list[PromptPair]:
    parts: dict[str, Any] = {}
    for name in ("names", "templates", "places", "objects"):
        parts[name] = load_file(path / f"{name}.json")
    return ioi_pairs(
        parts["names"], parts["templates"], parts["places"], parts["objects"], limit or GENERATED
    )


def _relation(content: Mapping[str, Any], model: LanguageModel | None) -> list[PromptPair]:
    """Pair every sample of a relation with the next whose prompt has as many tokens."""
    if model is None:
        raise PromptError("a relation is paired by its tokens; pass the model")
    template = str(content["prompt_templates"][0])
    samples = [(str(one["subject"]), str(one["object"])) for one in content["samples"]]
    lengths = [len(model.tokenize([template.format(one)]).row_ids(0)) for one, _ in samples]
    pairs: list[PromptPair] = []
    for at, (subject, answer) in enumerate(samples):
        others = [*range(at + 1, len(samples)), *range(at)]
        other = next(
            (n for n in others if lengths[n] == lengths[at] and samples[n][1] != answer), None
        )
        if other is not None:
            pairs.append(
                PromptPair(
                    key=f"{subject}→{samples[other][0]}",
                    clean=template.format(subject),
                    corrupt=template.format(samples[other][0]),
                    answers=(answer,),
                    foils=(samples[other][1],),
                )
            )
    return pairs
