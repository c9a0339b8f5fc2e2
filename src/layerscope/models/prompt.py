"""One prompt: what is asked, in which format, and the text that the tokenizer gets to see."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from layerscope.errors import PromptError, nearest
from layerscope.files import canonical_json, sha256_text
from layerscope.models.batches import Span
from layerscope.models.chat import FORMATS, Format, Message, Tuning, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = ("text", "ids", "messages")


@dataclass(frozen=True)
class Prompt:
    """One prompt: a text, the messages of a chat, or token ids taken exactly as they are.

    Attributes:
        text: the prompt, or in a chat what the user says.
        ids: token ids; they have no format.
        key: names the prompt in messages and tables.
        format: ``raw`` is the text as it stands, ``chat`` the tokenizer's own chat template around
            it. None is the model's default: chat for an instruct model, raw for a base model.
            `messages`, `system` and `answer_prefix` make it a chat.
        messages: (role, content) pairs or ``{"role", "content"}`` mappings, instead of a text.
        system: the system message, put in front.
        answer_prefix: how the assistant's answer begins; the next token continues it.
        add_generation_prompt: end with the opening of the assistant's turn, which is where an
            answer begins. False renders a finished conversation.
        template: id of the task template that made the prompt (`layerscope.models.templates`).

    Raises:
        PromptError: the parts contradict each other.
    """

    text: str | None = None
    ids: tuple[int, ...] | None = None
    key: str | None = None
    _: KW_ONLY
    format: Format | None = None
    messages: Sequence[Message | tuple[str, str] | Mapping[str, str]] | None = None
    system: str | None = None
    answer_prefix: str = ""
    add_generation_prompt: bool = True
    template: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PromptError("a Prompt takes a text, messages or ids: give exactly one of them")
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(operator.index(id_) for id_ in self.ids))
        if self.messages is not None:
            object.__setattr__(self, "messages", _messages(self.messages))
        if self.format is not None and self.format not in FORMATS:
            raise PromptError(
                f"unknown format {self.format!r}{nearest(self.format, FORMATS)}; use raw or chat, "
                "or leave it out for the model's default"
            )
        self._settle_format()
        if self.format == "chat":
            self._check_turns()

    def _settle_format(self) -> None:
        """Let what only a chat has make this a chat; refuse it in anything else."""
        parts = {
            "messages": self.messages is not None,
            "system": self.system is not None,
            "answer_prefix": bool(self.answer_prefix),
            "add_generation_prompt=False": not self.add_generation_prompt,
        }
        chat = [name for name, present in parts.items() if present]
        if self.ids is not None and (chat or self.format == "chat"):
            raise PromptError("ids are taken as they are: a chat needs a text or messages")
        if self.format == "raw" and chat:
            raise PromptError(
                f"{chat[0]} belongs to a chat and the format is raw: write it into the text, or "
                "use format='chat'"
            )
        if chat:
            object.__setattr__(self, "format", "chat")

    def _check_turns(self) -> None:
        turns = self.turns()
        last = turns[-1]
        empty = next((turn.role for turn in turns if not turn.content), None)
        if empty is not None:
            raise PromptError(f"the {empty} message is empty: give it a text or leave it out")
        if len(turns) > 1 and self.system is not None and turns[1].role == "system":
            raise PromptError("there are two system messages: give system, or one in messages")
        if self.add_generation_prompt and last.role == "assistant":
            raise PromptError(
                "the chat ends in an assistant message: pass it as answer_prefix to go on with it, "
                "or add_generation_prompt=False to leave it finished"
            )
        if self.answer_prefix and not self.add_generation_prompt:
            raise PromptError(
                "answer_prefix needs the assistant's turn: add_generation_prompt=True"
            )

    def turns(self) -> tuple[Message, ...]:
        """Return the messages of the prompt as a chat, its system message first."""
        said = (Message("user", self.text or ""),)
        if self.messages is not None:
            said = cast(tuple[Message, ...], self.messages)
        return said if self.system is None else (Message("system", self.system), *said)


@dataclass(frozen=True)
class Rendered:
    """The text of a prompt as the tokenizer gets to see it.

    `parts` are the ``(start, end)`` characters of what was written by whoever asks (the text, or
    each message in order and the answer's prefix), in the coordinates of `text` and of a
    `TokenBatch`'s offsets; None where the chat template rewrote a message.
    """

    text: str
    format: Format
    parts: tuple[Span, ...] | None
    template: str | None = None


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, tuning: Tuning | None = None
) -> Rendered:
    """Return the text that stands for a prompt; special tokens of the tokenizer are not in it.

    Args:
        tokenizer: the model's tokenizer, with its chat template.
        prompt: a prompt with a text or messages.
        tuning: whether the model is instruct-tuned; decides where the prompt has no format.

    Raises:
        PromptError: the prompt has only ids, is a chat for a base model, or the chat template does
            not take it.
    """
    if prompt.ids is not None:
        raise PromptError("ids are taken as they are and have no text: render a text or messages")
    default = "raw" if tuning is None else tuning.default_format
    format_ = prompt.format or default
    if format_ == "raw":
        text = prompt.text or ""
        return Rendered(text, "raw", ((0, len(text)),), prompt.template)
    if tuning is not None and not tuning.instruct:
        raise PromptError(
            f"a chat prompt for a base model ({tuning.reason}): use format='raw', or load it with "
            "instruct=True if it was tuned on its chat template"
        )
    prompt = replace(prompt, format="chat")  # which checks the turns
    chat = render_chat(
        tokenizer,
        prompt.turns(),
        add_generation_prompt=prompt.add_generation_prompt,
        answer_prefix=prompt.answer_prefix,
    )
    return Rendered(chat.text, "chat", chat.parts, prompt.template)


def prompt_sha256(ids: Sequence[int], rendered: Rendered | None = None) -> str:
    """Return the sha256 of what a model gets to read: ids, rendered text, format and template.

    Args:
        ids: the token ids of the whole prompt, special tokens included, padding not.
        rendered: where they come from; None for a prompt that was given as ids.
    """
    content: dict[str, Any] = {"ids": [int(id_) for id_ in ids]}
    if rendered is not None:
        content |= {
            "text": rendered.text,
            "format": rendered.format,
            "template": rendered.template,
        }
    return sha256_text(canonical_json(content))


def _messages(
    given: Sequence[Message | tuple[str, str] | Mapping[str, str]],
) -> tuple[Message, ...]:
    if isinstance(given, str | Mapping) or not given:
        raise PromptError("messages are a list of turns, at least one: [{'role', 'content'}, ...]")
    return tuple(_message(item, index) for index, item in enumerate(given))


def _message(item: Any, index: int) -> Message:
    pair: Any = item
    if isinstance(item, Mapping):
        pair = tuple(item[name] for name in Message._fields if name in item and len(item) == 2)
    if isinstance(pair, Sequence) and len(pair) == 2 and not isinstance(pair, str):
        role, content = pair
        if isinstance(role, str) and isinstance(content, str) and role:
            return Message(role, content)
    raise PromptError(
        f"message {index} must be {{'role': ..., 'content': ...}} with two texts, got {item!r}"
    )
