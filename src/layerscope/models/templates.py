"""Task templates: how a text becomes a prompt for a task, per model family, in numbered versions.

get_template("qa").prompt("What is the capital of France?", format="raw")

The text of a template never changes under its id. Users add their own with `register`, or read
them from a YAML file with `read_templates`; what was registered last is taken where no version is
named. What a chat looks like is up to the model's chat template (`layerscope.models.chat`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from layerscope.errors import ConfigError, PromptError, nearest
from layerscope.models.chat import FORMATS, Format, Message
from layerscope.models.prompt import Prompt

DEFAULT_FAMILY = "default"

Shot = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class TaskTemplate:
    """How a text becomes the prompt of a task.

    ``{text}`` stands for the text, in `shot` also ``{answer}`` for what belongs to it; other braces
    are left alone.

    Attributes:
        task: completion, qa, icl, chat, or a word of one's own.
        version: part of the id; layerscope's own are numbers.
        family: row of the family table that it is for (`LanguageModel.family`), or ``default``.
        raw: the raw prompt; None where the task has none.
        user: what the user says in a chat; None where the task has no chat.
        shot: one example, put before the raw prompt; in a chat each example is a pair of turns.
        system: system message of the chat, unless another is given.
        answer_prefix: how the assistant's answer begins.

    Raises:
        ConfigError: a name is malformed or a placeholder is missing.
    """

    task: str
    version: str
    family: str = DEFAULT_FAMILY
    raw: str | None = None
    user: str | None = None
    shot: str | None = None
    system: str | None = None
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("task", "version", "family"):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(r"[\w.:-]+", value):
                raise ConfigError(
                    f"a template's {name} must be a text of letters, digits and . _ : -, "
                    f"not {value!r}"
                )
        for name in ("raw", "user", "shot", "system", "answer_prefix"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"template {self.id}: {name} must be a text, not {value!r}")
        if self.raw is None and self.user is None:
            raise ConfigError(f"template {self.id} needs a raw or a user text")
        needed = {"raw": ("{text}",), "user": ("{text}",), "shot": ("{text}", "{answer}")}
        for name, marks in needed.items():
            value = getattr(self, name)
            missing = [mark for mark in marks if value is not None and mark not in value]
            if missing:
                raise ConfigError(f"template {self.id}: {name} lacks {' and '.join(missing)}")

    @property
    def id(self) -> str:
        """``task/version``, with the family in front where it is not the default."""
        own = f"{self.task}/{self.version}"
        return own if self.family == DEFAULT_FAMILY else f"{self.family}/{own}"

    def prompt(
        self,
        text: str,
        *,
        format: Format,
        shots: Sequence[Shot] = (),
        system: str | None = None,
        key: str | None = None,
    ) -> Prompt:
        """Return the prompt of a text; the same arguments always give the same prompt.

        Args:
            text: what the task is about: a beginning, a question, an input.
            format: ``raw`` or ``chat``; `LanguageModel.tuning.default_format` is the model's own.
            shots: (text, answer) examples, for a template that takes them; those of `icl` need one.
            system: the system message of a chat.
            key: names the prompt.

        Raises:
            PromptError: the template has no such format, or the shots or system do not fit it.
        """
        if format not in FORMATS:
            raise PromptError(f"unknown format {format!r}{nearest(format, FORMATS)}; raw or chat")
        if shots and self.shot is None:
            raise PromptError(f"template {self.id} takes no shots: leave them out or use icl")
        if self.shot is not None and not shots:
            raise PromptError(f"template {self.id} needs shots: pairs of a text and its answer")
        if (self.raw if format == "raw" else self.user) is None:
            other = "chat" if format == "raw" else "raw"
            raise PromptError(f"template {self.id} has no {format} form: use format={other!r}")
        if format == "raw":
            if system is not None:
                raise PromptError("system belongs to a chat: write it into the text")
            examples = [
                _fill(self.shot or "", text=before, answer=after) for before, after in shots
            ]
            whole = "".join(examples) + _fill(self.raw or "", text=text)
            return Prompt(text=whole, key=key, format="raw", template=self.id)
        turns: list[Message] = []
        for before, after in shots:
            turns.append(Message("user", _fill(self.user or "", text=before)))
            turns.append(Message("assistant", after))
        turns.append(Message("user", _fill(self.user or "", text=text)))
        return Prompt(
            messages=turns,
            key=key,
            format="chat",
            system=self.system if system is None else system,
            answer_prefix=self.answer_prefix,
            template=self.id,
        )


def get_template(task: str, *, family: str = DEFAULT_FAMILY) -> TaskTemplate:
    """Return the template of a task.

    Args:
        task: a task, e.g. ``qa`` (the version registered last; the family's own before the
            default), or an id, ``qa/1``.
        family: `LanguageModel.family`.

    Raises:
        ConfigError: there is none of that name.
    """
    rows = templates()
    by_id = {row.id: row for row in rows}
    for name in (task, f"{family}/{task}"):
        if name in by_id:
            return by_id[name]
    for wanted in (family, DEFAULT_FAMILY):
        found = [row for row in rows if row.task == task and row.family == wanted]
        if found:
            return found[-1]
    known = sorted({row.task for row in rows} | set(by_id))
    raise ConfigError(f"unknown task {task!r}{nearest(task, known)}; known: {', '.join(known)}")


def templates() -> tuple[TaskTemplate, ...]:
    """Return every template: layerscope's own, then those registered, in their order."""
    return (*_builtin(), *_registered.values())


def register(template: TaskTemplate) -> TaskTemplate:
    """Add a template of one's own, which is taken from now on where no version is named.

    Raises:
        ConfigError: its id belongs to another text already.
    """
    known = next((row for row in templates() if row.id == template.id), None)
    if known is not None and known != template:
        raise ConfigError(
            f"template {template.id} exists with another text: give yours another version, "
            "e.g. mine-1"
        )
    if known is None:
        _registered[template.id] = template
    return template


def unregister(template: TaskTemplate) -> None:
    """Forget a registered template; layerscope's own stay."""
    _registered.pop(template.id, None)


def read_templates(path: str | Path) -> tuple[TaskTemplate, ...]:
    """Read templates from a YAML list of mappings with the fields of `TaskTemplate`.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong; names the entry.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a YAML file of templates") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(text, str(path))


_registered: dict[str, TaskTemplate] = {}


@cache
def _builtin() -> tuple[TaskTemplate, ...]:
    own = resources.files("layerscope.models") / "templates.yaml"
    return _parse(own.read_text(encoding="utf-8"), "templates.yaml")


def _parse(text: str, source: str) -> tuple[TaskTemplate, ...]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{source} is not valid YAML: {line}") from None
    if not isinstance(content, list):
        raise ConfigError(f"{source}: give a list of templates, each with task, version and raw")
    return tuple(_entries(content, source))


def _entries(content: Sequence[Any], source: str) -> Iterable[TaskTemplate]:
    known = [field.name for field in fields(TaskTemplate)]
    for number, entry in enumerate(content, start=1):
        where = f"{source}, template {number}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: give a mapping with {', '.join(known)}")
        unknown = [str(name) for name in entry if name not in known]
        if unknown:
            hint = nearest(unknown[0], known)
            raise ConfigError(
                f"{where}: unknown field {unknown[0]!r}{hint}; known: {', '.join(known)}"
            )
        missing = [name for name in ("task", "version") if name not in entry]
        if missing:
            raise ConfigError(f"{where}: {' and '.join(missing)} missing")
        try:
            yield TaskTemplate(**{**entry, "version": str(entry["version"])})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _fill(pattern: str, **values: str) -> str:
    """Put values into their places at once, so that a value may itself hold ``{text}``."""
    return re.sub(r"\{(text|answer)\}", lambda found: values.get(found[1], found[0]), pattern)
