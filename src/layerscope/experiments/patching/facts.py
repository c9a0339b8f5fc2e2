"""Facts for causal tracing, and the shapes in which published sets come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerscope.errors import PromptError
from layerscope.experiments.patching.files import load_file


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A prompt, the words in it that name its subject, and its answer."""

    key: str
    prompt: str
    subject: str
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON values."""
        return asdict(self)


def read_facts(path: str | Path, *, limit: int | None = None) -> list[Fact]:
    """Read facts: `prompt`, `subject`, `answer` (or `attribute`), or a relation with its samples.

    Raises:
        PromptError: the file cannot be read, or an entry lacks something; says which.
    """
    path = Path(path)
    content: Any = load_file(path)
    if isinstance(content, dict) and "samples" in content:
        template = str(content["prompt_templates"][0])
        content = [
            {
                "key": sample["subject"],
                "prompt": template.format(sample["subject"]),
                "subject": sample["subject"],
                "answer": sample["object"],
            }
            for sample in content["samples"]
        ]
    elif isinstance(content, dict):
        content = content.get("facts", content.get("prompts"))
    if not isinstance(content, list) or not content:
        raise PromptError(f"{path}: give a list of facts, each with prompt, subject and answer")
    facts: list[Fact] = []
    rows: list[Any] = content
    for number, row in enumerate(rows if limit is None else rows[:limit], start=1):
        if not isinstance(row, Mapping):
            raise PromptError(f"{path}, entry {number}: give prompt, subject and answer")
        answer = row.get("answer") or row.get("attribute")
        if not (row.get("prompt") and row.get("subject") and answer):
            raise PromptError(f"{path}, entry {number}: prompt, subject or answer is missing")
        key = row.get("key", row.get("known_id", number))
        facts.append(
            Fact(
                key=str(key),
                prompt=str(row["prompt"]),
                subject=str(row["subject"]),
                answer=str(answer),
            )
        )
    return facts
