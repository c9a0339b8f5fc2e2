"""Which tokens an answer is, given the prompt it follows.

An answer is aligned when the tokens of the prompt are a real prefix of the tokens of prompt and
answer together: only then is the first token after the prompt the first token of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from layerscope.errors import AlignmentError, PromptError
from layerscope.models.prompts import encode_plain
from layerscope.models.vocabulary import decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Variant = Literal["with_space", "no_space"]
Status = Literal[
    "ok", "empty_prompt", "empty_answer", "not_encodable", "unknown_token", "starts_inside_token"
]
MAX_PIECES = 4


@dataclass(frozen=True)
class AnswerAlignment:
    """The tokens of an answer after its prompt; `status` is ``ok`` or the reason there are none."""

    status: Status
    message: str = ""
    """One line on what failed and what to do; empty when `status` is ``ok``."""
    ids: tuple[int, ...] = ()
    """All tokens of the answer, for its full log-probability."""
    pieces: tuple[str, ...] = ()
    """The tokenizer's own strings of the first four tokens, e.g. ``ĠBerlin``."""
    variant: Variant | None = None
    blank_first: bool = False
    """The first token is only whitespace, so that its probability says nothing of the answer."""

    @property
    def ok(self) -> bool:
        """Whether the answer has tokens."""
        return self.status == "ok"

    @property
    def first_id(self) -> int | None:
        """The token right after the prompt, or None."""
        return self.ids[0] if self.ids else None


def align_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    *,
    variant: Variant | None = None,
    strict: bool = True,
) -> AnswerAlignment:
    """Find the tokens of `answer` as a continuation of `prompt`.

    Tries ``prompt + " " + answer`` and then ``prompt + answer``, without special tokens, and takes
    the first that continues the prompt's own tokens. A prompt that ends in whitespace gets no
    second space; an answer that begins with whitespace keeps its own and gets no other.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the text before the answer.
        answer: the answer; whitespace at its end is dropped.
        variant: allow only this joint.
        strict: raise where there is no alignment; else return the reason as `status`.

    Raises:
        AlignmentError: with `strict`, the answer cannot be aligned.
    """
    alignment = _align(tokenizer, prompt, answer.rstrip(), variant)
    if strict and not alignment.ok:
        raise AlignmentError(alignment.message)
    return alignment


def _align(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, variant: Variant | None
) -> AnswerAlignment:
    if not prompt:
        return AnswerAlignment("empty_prompt", f"the prompt of the answer {answer!r} is empty")
    if not answer:
        return AnswerAlignment("empty_answer", f"the answer to {_tail(prompt)} is empty")
    try:
        base, _ = encode_plain(tokenizer, prompt)
    except PromptError as error:
        return AnswerAlignment("not_encodable", str(error))
    failures: list[AnswerAlignment] = []
    for joint, text in _joints(prompt, answer):
        if variant is not None and joint != variant:
            continue
        alignment = _align_text(tokenizer, prompt, base, text, answer, joint)
        if alignment.ok:
            return alignment
        failures.append(alignment)
    if failures:
        # The last is the plain joint, which adds nothing of ours to what the user wrote.
        return failures[-1]
    return AnswerAlignment(
        "not_encodable",
        f"the answer {answer!r} cannot follow {_tail(prompt)} as {variant!r}: one of them has its "
        "own whitespace there; leave variant out",
    )


def _joints(prompt: str, answer: str) -> list[tuple[Variant, str]]:
    """Return the texts to try, in order of preference."""
    if prompt[-1].isspace():
        return [("no_space", prompt + answer.lstrip())]
    if answer[0].isspace():
        return [("with_space", prompt + answer)]
    return [("with_space", f"{prompt} {answer}"), ("no_space", prompt + answer)]


def _align_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    base: tuple[int, ...],
    text: str,
    answer: str,
    joint: Variant,
) -> AnswerAlignment:
    """Align one way of joining prompt and answer to `text`."""
    try:
        full, _ = encode_plain(tokenizer, text)
    except PromptError as error:
        return AnswerAlignment("not_encodable", str(error))
    ids = full[len(base) :]
    if full[: len(base)] != base or not ids:
        return AnswerAlignment("starts_inside_token", _merge_message(tokenizer, prompt, base, full))
    if tokenizer.unk_token_id in ids:
        return AnswerAlignment(
            "unknown_token",
            f"the tokenizer has no token for part of the answer {answer!r}: use another spelling",
        )
    pieces = cast(list[str], tokenizer.convert_ids_to_tokens(list(ids[:MAX_PIECES])))
    blank = not decode_tokens(tokenizer, ids[:1])[0].strip()
    return AnswerAlignment("ok", "", ids, tuple(pieces), joint, blank)


def _merge_message(
    tokenizer: PreTrainedTokenizerBase, prompt: str, base: tuple[int, ...], full: tuple[int, ...]
) -> str:
    """Show where the two tokenisations part, from the last token they share on."""
    same = next(
        (index for index, (a, b) in enumerate(zip(base, full, strict=False)) if a != b),
        min(len(base), len(full)),
    )
    start = max(same - 1, 0)
    alone = decode_tokens(tokenizer, base[start:])
    joined = decode_tokens(tokenizer, full[start : start + len(alone) + 3])
    fix = (
        "drop the whitespace at the end of the prompt"
        if prompt[-1].isspace()
        else "end the prompt at a word boundary"
    )
    return (
        f"the answer starts inside a token: {_tail(prompt)} alone ends in {alone}, with the answer "
        f"in {joined}; {fix}"
    )


def _tail(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else "..." + prompt[-37:])
