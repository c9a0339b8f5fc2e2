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

VALUE_BYTES = 4
WIDTHS_PER_TOKEN = 16  # of d_model: what a block holds of one token at its widest, inside the MLP
HEAD_COPIES = 3  # of the head's logits: as computed, in float32, while they are ranked


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
    excluded = [_absent(key, reason) for key, reason in sorted(battery.absent)]
    kept: list[tuple[Question, PreparedPass]] = []
    controls: list[tuple[Question, PreparedPass]] = []
    lost: set[str] = set()
    tried: Counter[tuple[str, str]] = Counter()
    aligner = _Aligner(model, config.layers(), battery.wordings.neutral)
    for question in questions(battery, config.parts, seed=config.seed):
        item = question.item
        if question.variant in BASE:
            tried[item.relation, item.language] += 1
        if item.key in lost and question.part != CONTROL:
            continue
        found = aligner.ask(question)
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


class _Aligner:
    """Prepares questions one by one, in order: an item's plain question before its others."""

    def __init__(self, model: LanguageModel, config: LayersConfig, neutral: Sequence[str]) -> None:
        self.model, self.config, self.neutral = model, config, neutral
        self.strings = model.token_strings()
        self.plain: PreparedPass | None = None  # of the item at hand
        self.fronts: dict[tuple[str, int], str] = {}  # what worked, by language and shift

    def ask(self, question: Question) -> PreparedPass | tuple[str, str]:
        """Return the question's tokens, or the stage and the reason of its exclusion."""
        try:
            prepared = self._shifted(question) if question.shift else self._aligned(question)
        except AlignmentError as error:
            return "alignment", str(error)
        except PromptError as error:
            return "prompt", str(error)
        if prepared is None:
            return "position", (
                f"no neutral text moves the end of this prompt by exactly {question.shift} "
                "tokens with this tokenizer"
            )
        if question.variant in BASE:
            self.plain = prepared
        if prepared.alignment.blank_first:
            return "alignment", (
                f"the answer {question.answer!r} begins with a token of white space alone, whose "
                "probability says nothing of the answer"
            )
        if not question.item.invented and _first(prepared) in prepared.prompt_ids:
            return "in_prompt", (
                f"the first token of {question.answer!r} stands in the prompt, so that copying "
                "cannot be told from knowing"
            )
        return prepared

    def _prepare(self, question: Question, front: str = "") -> PreparedPass:
        asked = question.asked(0, front + question.text)
        (prepared,) = prepare(self.model, [asked], self.config, strings=self.strings)
        return prepared

    def _aligned(self, question: Question) -> PreparedPass:
        """Prepare a question; a foil that cannot be aligned is dropped, an answer raises."""
        try:
            return self._prepare(question)
        except AlignmentError:
            if question.foil is None:
                raise
            return self._prepare(replace(question, foil=None))

    def _shifted(self, question: Question) -> PreparedPass | None:
        """Put neutral text in front so that the prompt grows by exactly the shift, else None.

        What worked for another prompt of the same language is tried first.
        """
        plain, shift = self.plain, question.shift
        assert plain is not None and plain.source.fact_key == question.item.key
        known = self.fronts.get((question.item.language, shift))
        tries = ([known] if known is not None else []) + [unit * shift for unit in self.neutral]
        for front in tries:
            try:
                moved = self._prepare(question, front)
            except PromptError:
                continue
            same = moved.prompt_ids[shift:] == plain.prompt_ids
            if moved.length - plain.length == shift and same:
                self.fronts[question.item.language, shift] = front
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


def batches(
    asked: Sequence[Asked], model: LanguageModel, config: BatteryConfig, *, n_lenses: int
) -> list[list[Asked]]:
    """Cut questions into batches of similar length that respect the memory for one batch.

    The cut depends on the questions' content, the model and the configuration alone.
    """
    states = (model.n_layers + 1) * model.d_model * (2 + n_lenses)
    fixed = VALUE_BYTES * (states + HEAD_COPIES * model.d_vocab)
    per_token = VALUE_BYTES * WIDTHS_PER_TOKEN * model.d_model
    groups: list[list[Asked]] = []
    for entry in sorted(asked, key=lambda entry: (entry.prepared.length, entry.index)):
        per_prompt = fixed + per_token * entry.prepared.length  # the longest so far
        room = min(config.prompts_per_batch, max(1, config.batch_bytes // per_prompt))
        if not groups or len(groups[-1]) >= room:
            groups.append([])
        groups[-1].append(entry)
    return groups


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
