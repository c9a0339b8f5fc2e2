"""Clean and corrupt prompts with their answers, as tokens whose positions correspond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from layerscope.errors import AlignmentError, LayerscopeError, PromptError
from layerscope.interventions.patching.metrics import Targets
from layerscope.models import LanguageModel, TokenBatch, align_answer
from layerscope.models.vocabulary import decode_tokens

Direction = Literal["denoise", "noise"]
LAST = "last"


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """Two prompts that differ in what is studied, and what the clean one should be answered.

    Attributes:
        key: name of the pair, unique in its set.
        clean: a prompt that the model answers with `answers`.
        corrupt: the same with another fact, name or ending.
        answers: right answers of the clean prompt; several count together.
        foils: wrong ones, right for the corrupt prompt where it has an answer.
        labels: name of a place -> (its text in clean, its text in corrupt), for prompts whose
            positions do not correspond by number. A label stands for the last token of its text.
    """

    key: str
    clean: str
    corrupt: str
    answers: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {})

    def to_dict(self) -> dict[str, Any]:
        """Return the pair as JSON values."""
        return {
            "key": self.key,
            "clean": self.clean,
            "corrupt": self.corrupt,
            "answers": list(self.answers),
            "foils": list(self.foils),
            "labels": {name: list(texts) for name, texts in self.labels.items()},
        }


@dataclass(frozen=True)
class Place:
    """A position of both prompts under one name."""

    label: str
    clean: int
    corrupt: int


@dataclass(frozen=True, eq=False)
class TokenPair:
    """A pair as token ids.

    Attributes:
        clean: ids with whatever the tokenizer puts in front. corrupt: the same.
        tokens: the clean prompt's tokens as text.
        places: the positions that can be patched, in order; of all tokens where both prompts have
            as many, else of the labels and of the last token.
        same: tokens at the start that both prompts share: nothing there differs between the runs.
    """

    pair: PromptPair
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    targets: Targets
    tokens: tuple[str, ...]
    places: tuple[Place, ...]
    same: int

    @property
    def aligned(self) -> bool:
        """Whether positions correspond by number."""
        return len(self.clean) == len(self.corrupt)


def tokenize_pair(model: LanguageModel, pair: PromptPair) -> TokenPair:
    """Return a pair as tokens with corresponding positions.

    Raises:
        PromptError: the prompts have different numbers of tokens and no labels, a label's text is
            not in its prompt, or the prompts are the same.
        AlignmentError: an answer or foil has no token of its own after the prompt.
    """
    clean, corrupt = model.tokenize([pair.clean]), model.tokenize([pair.corrupt])
    clean_ids, corrupt_ids = clean.row_ids(0), corrupt.row_ids(0)
    if clean_ids == corrupt_ids:
        raise PromptError(f"pair '{pair.key}': clean and corrupt are the same tokens; change one")
    tokens = tuple(decode_tokens(model.tokenizer, clean_ids))
    places = [
        Place(
            label,
            place_of(clean, pair.clean, texts[0], label, pair.key)[-1],
            place_of(corrupt, pair.corrupt, texts[1], label, pair.key)[-1],
        )
        for label, texts in pair.labels.items()
    ]
    if len(clean_ids) == len(corrupt_ids):
        if not places:
            places = [Place(str(at), at, at) for at in range(len(clean_ids))]
    elif not places:
        other = decode_tokens(model.tokenizer, corrupt_ids)
        raise PromptError(
            f"pair '{pair.key}': the prompts have {len(clean_ids)} and {len(corrupt_ids)} tokens, "
            f"{list(tokens)} and {other}; reword one, or give labels: texts of places that "
            "correspond"
        )
    ends = (len(clean_ids) - 1, len(corrupt_ids) - 1)
    if pair.labels and all((place.clean, place.corrupt) != ends for place in places):
        places.append(Place(LAST, *ends))
    same = next(
        (
            at
            for at, ids in enumerate(zip(clean_ids, corrupt_ids, strict=False))
            if ids[0] != ids[1]
        ),
        min(len(clean_ids), len(corrupt_ids)),
    )
    return TokenPair(
        pair,
        clean_ids,
        corrupt_ids,
        targets_of(model, pair.key, pair.clean, pair.answers, pair.foils),
        tokens,
        tuple(places),
        same,
    )


def tokenize_pairs(
    model: LanguageModel, pairs: Sequence[PromptPair]
) -> tuple[list[TokenPair], dict[str, str]]:
    """Return the pairs that can be used, and by key why the others cannot.

    Raises:
        PromptError: none can; says why the first cannot.
    """
    found: list[TokenPair] = []
    refused: dict[str, str] = {}
    for pair in pairs:
        try:
            found.append(tokenize_pair(model, pair))
        except LayerscopeError as error:
            refused[pair.key] = str(error)
    if not found:
        raise PromptError(next(iter(refused.values()), "there is no pair: give at least one"))
    return found, refused


def batch_of(ids: Sequence[Sequence[int]]) -> TokenBatch:
    """Return rows of ids of one length as a batch."""
    table = torch.tensor([list(row) for row in ids])
    return TokenBatch(
        table, torch.ones_like(table, dtype=torch.bool), (table.shape[1],) * table.shape[0]
    )


def targets_of(
    model: LanguageModel, key: str, prompt: str, answers: Sequence[str], foils: Sequence[str]
) -> Targets:
    """Return the first tokens of answers and foils after a prompt.

    Raises:
        AlignmentError: a word has no token of its own there, or an answer and a foil share theirs.
    """
    right = _first_ids(model, key, prompt, answers)
    wrong = _first_ids(model, key, prompt, foils)
    both = set(right) & set(wrong)
    if both:
        text = decode_tokens(model.tokenizer, [min(both)])[0]
        raise AlignmentError(
            f"'{key}': an answer and a foil begin with the same token {text!r}; choose "
            "words that differ in their first token"
        )
    return Targets(right, wrong)


def _first_ids(
    model: LanguageModel, key: str, prompt: str, words: Sequence[str]
) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for word in words:
        try:
            alignment = align_answer(model.tokenizer, prompt, word)
        except AlignmentError as error:
            raise AlignmentError(f"'{key}': {error}") from error
        assert alignment.first_id is not None
        if alignment.blank_first:
            raise AlignmentError(
                f"'{key}': the first token of {word!r} is only whitespace, which says "
                "nothing of the answer; reword the prompt so that it ends in a space"
            )
        found[alignment.first_id] = None
    return tuple(found)


def place_of(batch: TokenBatch, prompt: str, text: str, label: str, key: str) -> tuple[int, ...]:
    """Return the tokens of a text's last occurrence in the one prompt of a batch.

    Raises:
        PromptError: the text is not there, or the tokenizer does not say where its tokens lie.
    """
    offsets = batch.offsets[0] if batch.offsets else None
    if offsets is None:
        raise PromptError(
            f"pair '{key}': this tokenizer does not say where tokens lie in the text, so labels "
            "cannot be placed; use prompts of one length"
        )
    begin = prompt.rfind(text) if text else -1
    end = begin + len(text)
    inside = [
        at
        for at, span in enumerate(offsets)
        if begin >= 0 and span is not None and span[0] < end and span[1] > begin
    ]
    if not inside:
        raise PromptError(
            f"pair '{key}': the text {text!r} of the label '{label}' is not in {prompt!r}"
        )
    return tuple(inside)
