"""Prompts with their answers: read from files, tokenized, and asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.errors import LayerscopeError, PromptError
from layerscope.experiments.patching.files import load_file, read_pairs, words_of
from layerscope.experiments.patching.gather import (
    Answered,
    AnsweredBy,
    answers_of,
    check_metrics,
)
from layerscope.interventions.patching import Place, Targets
from layerscope.interventions.patching.pairs import LAST, place_of, targets_of
from layerscope.models import LanguageModel
from layerscope.models.vocabulary import decode_tokens
from layerscope.products import Products

WRONG = "the model does not answer the prompt"
QUESTION_SCHEMA = {
    "prompt": pl.String,
    "text": pl.String,
    "answers": pl.String,
    "foils": pl.String,
    "n_tokens": pl.Int64,
    "answer_rank": pl.Int64,
    "answered": pl.Boolean,
    "used": pl.Boolean,
    "reason": pl.String,
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and what should follow it.

    Attributes:
        key: name, unique in its set.
        answers: right ones; several count together. foils: wrong ones of the same kind.
        labels: name of a place -> its text; a label stands for the last token of its text.
    """

    key: str
    prompt: str
    answers: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: {})

    def to_dict(self) -> dict[str, Any]:
        """Return the question as JSON values."""
        return {
            "key": self.key,
            "prompt": self.prompt,
            "answers": list(self.answers),
            "foils": list(self.foils),
            "labels": dict(self.labels),
        }


@dataclass(frozen=True, eq=False)
class TokenQuestion:
    """A question as token ids.

    Attributes:
        places: labelled positions, and the last; of every token where there is no label.
        front: tokens at the start that say nothing: the BOS, where the model has one.
    """

    question: Question
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    targets: Targets
    places: tuple[Place, ...]
    front: int


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions as tokens: those that take part, and why the others do not."""

    model: LanguageModel
    given: tuple[Question, ...]
    used: tuple[TokenQuestion, ...]
    tokens: Mapping[str, TokenQuestion]
    refused: Mapping[str, str]
    answered: Mapping[str, Answered]

    def table(self) -> pl.DataFrame:
        """Return one row per question given, with the reason of those that are left out."""
        used = {one.question.key for one in self.used}
        rows: list[dict[str, Any]] = []
        for one in self.given:
            tokens, answered = self.tokens.get(one.key), self.answered.get(one.key)
            reason = self.refused.get(one.key, "")
            if answered is not None and not answered.counts and not reason:
                reason = WRONG
            rows.append(
                {
                    "prompt": one.key,
                    "text": one.prompt,
                    "answers": " | ".join(one.answers),
                    "foils": " | ".join(one.foils),
                    "n_tokens": None if tokens is None else len(tokens.ids),
                    "answer_rank": None if answered is None else answered.rank,
                    "answered": None if answered is None else answered.counts,
                    "used": one.key in used,
                    "reason": reason,
                }
            )
        return pl.DataFrame(rows, schema=QUESTION_SCHEMA)

    def counts(self) -> dict[str, Any]:
        """Return how many were given, used and left out, and why."""
        table = self.table()
        return {
            "given": table.height,
            "used": len(self.used),
            "not_answered": int((table["answered"] == False).sum()),  # noqa: E712
            "refused": len(self.refused),
            "left_out": table.filter(~pl.col("used")).select("prompt", "reason").to_dicts(),
        }


def read_questions(
    path: str | Path, *, model: LanguageModel | None = None, limit: int | None = None
) -> list[Question]:
    """Read prompts with answers from a YAML, CSV, JSON or JSON-lines file.

    An entry has `prompt` and `answer(s)`, and may have `foil(s)`, `key` and `labels`. A file of
    prompt pairs of any shape that `read_pairs` understands will do too: its clean prompts are read.

    Raises:
        PromptError: the file cannot be read, or an entry lacks something; says which.
    """
    path = Path(path)
    rows: Any = None if path.is_dir() else load_file(path)
    if isinstance(rows, Mapping):
        rows = rows.get("prompts")
    listed: list[Any] = rows if isinstance(rows, list) else []
    if not any(isinstance(row, Mapping) and row.get("prompt") for row in listed):
        return [
            Question(
                key=pair.key,
                prompt=pair.clean,
                answers=pair.answers,
                foils=pair.foils,
                labels={name: texts[0] for name, texts in pair.labels.items()},
            )
            for pair in read_pairs(path, model=model, limit=limit)
        ]
    found: dict[str, Question] = {}
    for number, row in enumerate(listed if limit is None else listed[:limit], start=1):
        one = _question(row, f"{path}, entry {number}", number)
        if one.key in found:
            raise PromptError(f"{path}: key {one.key!r} occurs twice; every key must be unique")
        found[one.key] = one
    return list(found.values())


def read_texts(path: str | Path, *, model: LanguageModel | None = None) -> list[str]:
    """Read prompts alone: from a file of questions or pairs, or a .txt with one per line.

    Raises:
        PromptError: the file cannot be read, or holds none.
    """
    path = Path(path)
    if path.suffix.lower() != ".txt":
        return [one.prompt for one in read_questions(path, model=model)]
    try:
        texts = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist; give prompts, one per line") from None
    except (UnicodeDecodeError, OSError) as error:
        raise PromptError(f"{path} cannot be read: {error}; save it as UTF-8 text") from None
    if not texts:
        raise PromptError(f"{path} holds no prompt; give at least one line")
    return texts


def _question(row: Any, where: str, number: int) -> Question:
    if not isinstance(row, Mapping) or not row.get("prompt"):
        raise PromptError(f"{where}: prompt is missing; give prompt and answer")
    labels: Any = row.get("labels") or {}
    if not isinstance(labels, Mapping):
        raise PromptError(f"{where}: labels is a mapping of a place's name to its text")
    return Question(
        key=str(row.get("key") or f"{number:04d}"),
        prompt=str(row["prompt"]),
        answers=words_of(row.get("answers") or row.get("answer")),
        foils=words_of(row.get("foils") or row.get("foil")),
        labels={str(name): str(text) for name, text in labels.items()},
    )


def ask(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    metrics: Sequence[str],
    answered: AnsweredBy = "foil",
    keep_wrong: bool = False,
    products: Products = "default",
) -> QuestionSet:
    """Tokenize questions, and leave out those that cannot be used or that the model gets wrong.

    Raises:
        PromptError: no question can be used, which its first reason explains.
        ConfigError: a metric needs an answer or a foil that a question does not have.
    """
    tokens: dict[str, TokenQuestion] = {}
    refused: dict[str, str] = {}
    for one in questions:
        try:
            tokens[one.key] = _tokenize(model, one)
        except LayerscopeError as error:
            refused[one.key] = str(error)
    if not tokens:
        raise PromptError(next(iter(refused.values()), "there is no prompt: give at least one"))
    check_metrics(metrics, {key: one.targets for key, one in tokens.items()}, what="prompt")
    found = {
        key: answers_of(model, one.ids, one.targets, by=answered, products=products)
        for key, one in tokens.items()
    }
    used = tuple(one for key, one in tokens.items() if keep_wrong or found[key].counts)
    return QuestionSet(model, tuple(questions), used, tokens, refused, found)


def leading(model: LanguageModel, ids: Sequence[int]) -> int:
    """Return how many tokens at the start are the BOS: 1 or 0."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return int(len(ids) > 1 and ids[0] == bos)


def _tokenize(model: LanguageModel, one: Question) -> TokenQuestion:
    batch = model.tokenize([one.prompt])
    ids = batch.row_ids(0)
    places: list[Place] = []
    for label, text in one.labels.items():
        at = place_of(batch, one.prompt, text, label, one.key)[-1]
        places.append(Place(label, at, at))
    end = len(ids) - 1
    if not places:
        places = [Place(str(at), at, at) for at in range(end)]
    if all(place.clean != end for place in places):
        places.append(Place(LAST, end, end))
    targets = targets_of(model, one.key, one.prompt, one.answers, one.foils)
    tokens = tuple(decode_tokens(model.tokenizer, ids))
    return TokenQuestion(one, ids, tokens, targets, tuple(places), leading(model, ids))
