"""From questions to token sequences and batches; what cannot be asked is listed, not fatal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerscope.errors import AlignmentError, PromptError
from layerscope.experiments.battery.config import BatteryConfig
from layerscope.experiments.battery.items import Battery, Item
from layerscope.experiments.battery.questions import BASE, CONTROL, Question, questions
from layerscope.experiments.layers import LayersConfig
from layerscope.experiments.layers.prepare import PreparedPass, prepare
from layerscope.models import LanguageModel
from layerscope.models.answers import align_answer


@dataclass(frozen=True)
class Excluded:
    """An item or one of its variants that was not asked, and why.

    `stage` is "absent" (no answer in the table), "alignment", "prompt" (too long, not encodable),
    "in_prompt" (the answer's first token stands in the prompt) or "position".
    """

    item: str
    relation: str
    language: str
    variant: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """A question whose answer is aligned, ready to run."""

    index: int
    question: Question
    prepared: PreparedPass
    first_token_shared: int = 0  # other answers of the relation that begin with the same token


@dataclass(frozen=True)
class Control:
    """The control of one relation and language, and the first token of every item's answer."""

    question: Question
    prepared: PreparedPass
    items: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Prepared:
    """All that will be asked, what will not, and how many items were tried per language."""

    asked: tuple[Asked, ...]
    controls: tuple[Control, ...]
    excluded: tuple[Excluded, ...]
    tried: Mapping[tuple[str, str], int]


def prepare_battery(model: LanguageModel, battery: Battery, config: BatteryConfig) -> Prepared:
    """Tokenise every question and align its answer.

    An item whose plain question cannot be asked is excluded with all its variants; a variant that
    cannot be asked is excluded alone.
    """
    layers = config.layers()
    excluded = [_absent(key, reason) for key, reason in sorted(battery.absent)]
    kept: list[tuple[Question, PreparedPass]] = []
    controls: list[tuple[Question, PreparedPass]] = []
    lost: set[str] = set()
    fronts: dict[tuple[str, int], str] = {}
    tried: Counter[tuple[str, str]] = Counter()
    for question in questions(battery, config.parts, seed=config.seed):
        item = question.item
        if question.variant in BASE:
            tried[item.relation, item.language] += 1
        if item.key in lost and question.part != CONTROL:
            continue
        found = _prepare(model, question, layers, battery.wordings.neutral, fronts)
        if isinstance(found, PreparedPass):
            (controls if question.part == CONTROL else kept).append((question, found))
            continue
        stage, reason = found
        excluded.append(
            Excluded(item.key, item.relation, item.language, question.variant, stage, reason)
        )
        if question.variant in BASE:
            lost.add(item.key)
    asked = _numbered(kept)
    return Prepared(
        asked=asked,
        controls=tuple(_control(model, *pair, asked) for pair in controls),
        excluded=tuple(excluded),
        tried=tried,
    )


def _absent(key: str, reason: str) -> Excluded:
    relation, language, _ = key.split("/", 2)
    return Excluded(key, relation, language, "orig", "absent", reason)


def _numbered(kept: Sequence[tuple[Question, PreparedPass]]) -> tuple[Asked, ...]:
    """Number the questions, and count whose answers begin with the same token."""
    tokens: dict[tuple[str, str], dict[str, int]] = {}
    for question, prepared in kept:
        if question.variant == "orig":
            group = (question.item.relation, question.item.language)
            tokens.setdefault(group, {})[question.answer] = _first(prepared)
    counts = {group: Counter(answers.values()) for group, answers in tokens.items()}
    found: list[Asked] = []
    for index, (question, prepared) in enumerate(kept):
        group = (question.item.relation, question.item.language)
        others = counts.get(group, Counter[int]())[_first(prepared)]
        own = tokens.get(group, {}).get(question.answer) == _first(prepared)
        found.append(Asked(index, question, prepared, others - own))
    return tuple(found)


def _first(prepared: PreparedPass) -> int:
    token = prepared.alignment.first_id
    assert token is not None
    return token


def _prepare(
    model: LanguageModel,
    question: Question,
    config: LayersConfig,
    neutral: Sequence[str],
    fronts: dict[tuple[str, int], str],
) -> PreparedPass | tuple[str, str]:
    """Return the question's tokens, or the stage and the reason of its exclusion."""
    try:
        if question.shift:
            prepared = _shifted(model, question, config, neutral, fronts)
            if prepared is None:
                return "position", (
                    f"no neutral text moves the end of this prompt by exactly {question.shift} "
                    "tokens with this tokenizer"
                )
        else:
            prepared = _plain(model, question, config)
    except AlignmentError as error:
        return "alignment", str(error)
    except PromptError as error:
        return "prompt", str(error)
    if prepared.alignment.blank_first:
        return "alignment", (
            f"the answer {question.answer!r} begins with a token of white space alone, whose "
            "probability says nothing of the answer"
        )
    if not question.item.invented and _first(prepared) in prepared.prompt_ids:
        return "in_prompt", (
            f"the first token of {question.answer!r} stands in the prompt, so that copying cannot "
            "be told from knowing"
        )
    return prepared


def _plain(model: LanguageModel, question: Question, config: LayersConfig) -> PreparedPass:
    """Prepare a question; a foil that cannot be aligned is dropped, an answer raises."""
    try:
        (prepared,) = prepare(model, [question.asked(0)], config)
    except AlignmentError:
        if question.foil is None:
            raise
        (prepared,) = prepare(model, [replace(question, foil=None).asked(0)], config)
    return prepared


def _shifted(
    model: LanguageModel,
    question: Question,
    config: LayersConfig,
    neutral: Sequence[str],
    fronts: dict[tuple[str, int], str],
) -> PreparedPass | None:
    """Put neutral text in front so that the prompt grows by exactly the shift, None if none does.

    What worked for another prompt of the same language is tried first.
    """
    (plain,) = prepare(model, [question.asked(0)], config)
    known = fronts.get((question.item.language, question.shift))
    tries = ([known] if known is not None else []) + [unit * question.shift for unit in neutral]
    for front in tries:
        try:
            (moved,) = prepare(model, [question.asked(0, front + question.text)], config)
        except PromptError:
            continue
        same = moved.prompt_ids[question.shift :] == plain.prompt_ids
        if moved.length - plain.length == question.shift and same:
            fronts[question.item.language, question.shift] = front
            return moved
    return None


def _control(
    model: LanguageModel, question: Question, prepared: PreparedPass, asked: Sequence[Asked]
) -> Control:
    """Align every item's answer with the control's prompt; those that are its own are left out."""
    found: list[tuple[str, int]] = []
    for other in asked:
        item = other.question.item
        if other.question.variant != "orig" or not _comparable(item, question.item):
            continue
        alignment = align_answer(
            model.tokenizer,
            prepared.rendered.text,
            item.answer,
            variant=question.joint,
            strict=False,
        )
        if alignment.ok and alignment.first_id not in (None, _first(prepared)):
            found.append((item.key, int(alignment.first_id or 0)))
    return Control(question, prepared, tuple(found))


def _comparable(item: Item, control: Item) -> bool:
    return (
        not item.prompts
        and item.key != control.key
        and (item.relation, item.language) == (control.relation, control.language)
    )


def batches(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Cut questions into batches of similar length; the cut depends on their content alone."""
    ordered = sorted(asked, key=lambda entry: (entry.prepared.length, entry.index))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def content(asked: Sequence[Asked]) -> list[Any]:
    """Return what decides the rows of a batch, JSON-able."""
    return [
        [
            entry.index,
            entry.question.item.key,
            entry.question.variant,
            entry.prepared.prompt_sha256,
            list(entry.prepared.alignment.ids),
            entry.prepared.foil_id,
        ]
        for entry in asked
    ]
