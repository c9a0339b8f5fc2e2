"""Chat: messages become text through the tokenizer's own template, for models tuned on one.

Templates come with a model and are foreign code; transformers renders them in jinja2's immutable
sandbox, and so do we. What a template makes of a prompt must not depend on the day, so its clock
stands at `TEMPLATE_DATE`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from layerscope.errors import ConfigError, PromptError
from layerscope.models.batches import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["raw", "chat"]
FORMATS: tuple[Format, ...] = ("raw", "chat")

# What Llama 3 templates fall back on where there is no clock.
TEMPLATE_DATE = datetime.date(2024, 7, 26)

_TUNED_STEMS = ("instruct", "chat")
_TUNED_WORDS = frozenset({"it", "inst", "sft", "dpo", "rlhf", "assistant"})
_BASE_WORDS = frozenset({"base", "pt", "pretrain", "pretrained"})


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Tuning:
    """Whether a model is instruct-tuned, so that it expects a chat, and how one knows."""

    instruct: bool
    reason: str

    @property
    def default_format(self) -> Format:
        """``chat`` for an instruct model, else ``raw``."""
        return "chat" if self.instruct else "raw"

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return asdict(self)


def decide_tuning(
    name: str, *, has_template: bool, eos_ends_turn: bool = False, instruct: bool | None = None
) -> Tuning:
    """Decide whether a model is instruct-tuned; a chat template alone proves nothing.

    Base models often ship the template of their tuned sibling, so a word of the name or the
    tokenizer's end-of-sequence token must bear it out.

    Args:
        name: the model's name, e.g. ``Llama-3.1-8B-Instruct``.
        has_template: the tokenizer has a chat template.
        eos_ends_turn: that template closes a user's turn with the end-of-sequence token, which
            then ends turns and not documents.
        instruct: the user's word, which settles it.

    Raises:
        ConfigError: the user says instruct, and there is no template to chat with.
    """
    if instruct is not None:
        if instruct and not has_template:
            raise ConfigError(
                f"instruct=True needs a chat template and the tokenizer of {name} has none: set "
                "tokenizer.chat_template, or leave instruct out"
            )
        return Tuning(instruct, f"instruct={instruct} was given")
    if not has_template:
        return Tuning(False, "its tokenizer has no chat template")
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    for word in words:
        if word in _TUNED_WORDS or word.startswith(_TUNED_STEMS):
            return Tuning(True, f"it has a chat template and its name says {word!r}")
    for word in words:
        if word in _BASE_WORDS:
            return Tuning(False, f"it has a chat template, but its name says {word!r}")
    if eos_ends_turn:
        return Tuning(True, "its chat template ends a turn with its end-of-sequence token")
    return Tuning(False, "it has a chat template, but nothing says that it was tuned on it")


def find_tuning(
    tokenizer: PreTrainedTokenizerBase, source: str, *, instruct: bool | None = None
) -> Tuning:
    """Decide for a tokenizer and a model's hub id or folder; see `decide_tuning`."""
    has_template = bool(tokenizer.chat_template)
    return decide_tuning(
        _model_name(source),
        has_template=has_template,
        eos_ends_turn=has_template and instruct is None and _eos_ends_turn(tokenizer),
        instruct=instruct,
    )


@dataclass(frozen=True)
class RenderedChat:
    """A rendered chat, and where in its text each content (and the answer's prefix) stands.

    `parts` is None where the template rewrote a content, so that no place can be named.
    """

    text: str
    parts: tuple[Span, ...] | None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    answer_prefix: str = "",
) -> RenderedChat:
    """Render messages with the tokenizer's own chat template.

    Args:
        tokenizer: the model's tokenizer.
        messages: the turns, a system message first if there is one.
        add_generation_prompt: end with the opening of the assistant's turn.
        answer_prefix: the beginning of the assistant's answer, appended as it stands.

    Raises:
        PromptError: there is no template, it refuses the messages, it drops one of them, or a
            content spells the BOS that the template or the tokenizer writes.
    """
    contents = [message.content for message in messages]
    bos = tokenizer.bos_token
    if isinstance(bos, str) and any(bos in content for content in (*contents, answer_prefix)):
        raise PromptError(
            f"a message spells the BOS {bos!r}, and the chat brings its own: drop it from the "
            "message, or pass the whole text with format='raw'"
        )
    text = _render(tokenizer, messages, add_generation_prompt)
    marked = [Message(turn.role, _mark(index)) for index, turn in enumerate(messages)]
    try:
        skeleton = _render(tokenizer, marked, add_generation_prompt)
    except PromptError:  # a template may check what a content looks like
        skeleton = ""
    for index, message in enumerate(messages):
        kept = _mark(index) in skeleton if skeleton else message.content.strip() in text
        if not kept:
            raise PromptError(
                f"the chat template drops the {message.role} message: leave it out or put it into "
                "the user's text"
            )
    parts = _locate(text, skeleton, contents)
    if parts is not None and answer_prefix:
        parts = (*parts, (len(text), len(text) + len(answer_prefix)))
    return RenderedChat(text + answer_prefix, parts)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise PromptError(
            "a chat prompt needs a chat template and this tokenizer has none: use format='raw', or "
            "set tokenizer.chat_template"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            chat_template=_with_fixed_clock(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    # A template is foreign code: it refuses by raising, and breaks in ways of its own.
    except Exception as error:
        line = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise PromptError(
            f"the chat template refuses the roles {[message.role for message in messages]}: "
            f"{line}; change the messages (a system message can go into the user's text)"
        ) from error
    return str(rendered)


def _with_fixed_clock(template: str) -> str:
    """Define the clock that transformers offers to templates, standing still, before the template.

    Some templates write today's date into the prompt; the same run would differ tomorrow.
    """
    formats = set(re.findall(r"strftime_now\(\s*[\"']([^\"']*)[\"']", template))
    if not formats:
        return template
    dates = {pattern: TEMPLATE_DATE.strftime(pattern) for pattern in sorted(formats)}
    clock = f"{{{{- {json.dumps(dates)}[format] -}}}}"
    # The empty expression keeps jinja from trimming a line break that begins the template.
    return f"{{% macro strftime_now(format) %}}{clock}{{% endmacro %}}{{{{ '' }}}}{template}"


def _mark(index: int) -> str:
    # Private-use characters: no text, no white space to trim, nothing a template looks for.
    return f"\ue000{index}\ue001"


def _locate(text: str, skeleton: str, contents: Sequence[str]) -> tuple[Span, ...] | None:
    """Find each content in `text`, given the same chat with marks in the contents' places.

    Templates may trim a content. None where text and skeleton differ in anything else.
    """
    if re.findall("\ue000(\\d+)\ue001", skeleton) != [str(index) for index in range(len(contents))]:
        return None
    between = re.split("\ue000\\d+\ue001", skeleton)
    found: list[Span] = []
    end = 0
    for index, content in enumerate(contents):
        before, after = between[index], between[index + 1]
        start = end + len(before)
        if not text.startswith(before, end):
            return None
        spellings = (content, content.strip(), content.rstrip(), content.lstrip())
        fitting = [shown for shown in spellings if text.startswith(shown + after, start)]
        if not fitting:
            return None
        end = start + len(fitting[0])
        found.append((start, end))
    return tuple(found) if text[end:] == between[-1] else None


def _eos_ends_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    eos = tokenizer.eos_token
    if not isinstance(eos, str) or eos == tokenizer.bos_token:
        return False
    try:
        turn = _render(tokenizer, [Message("user", _mark(0))], False)
    except PromptError:
        return False
    return turn.partition(_mark(0))[2].lstrip().startswith(eos)


def _model_name(source: str) -> str:
    """Return a model's own name from its id or folder; the hub's cache spells ids its own way."""
    parts = [part for part in re.split(r"[\\/]", source) if part]
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].rsplit("--", 1)[-1] if cached else (parts[-1] if parts else source)
