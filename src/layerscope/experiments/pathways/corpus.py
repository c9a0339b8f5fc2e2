"""The texts over which tokens are counted: prompts, responses, and whatever else is given."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscope.experiments.pathways.audit import find_files
from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.experiments.pathways.records import response_record
from layerscope.experiments.pathways.streams import RecordStream, StreamError
from layerscope.experiments.pathways.workspace import SampledPrompt

PROMPTS, RESPONSES, TEXTS = "prompts", "responses", "texts"


@dataclass(frozen=True)
class Text:
    """One text: what stands before it and is not counted, and what is.

    Attributes:
        corpus: "prompts", "responses" or "texts".
        condition: under which a response was made.
        context: prompt that a response answers, by id, where its text is known.
        text: what is counted.
    """

    corpus: str
    condition: str
    context: str | None
    text: str


def corpora(config: PathwaysConfig, prompts: list[SampledPrompt]) -> list[Text]:
    """Return all texts, each once, in an order that does not depend on the files' order.

    Of responses and further texts at most `max_texts` are drawn, by a hash of their content and the
    seed. Copies of one text are one text: they are no independent draws.
    """
    known = {prompt.id for prompt in prompts}
    found = [Text(PROMPTS, "", None, prompt.text) for prompt in prompts]
    found += _drawn(_responses(config, known), config)
    if config.texts:
        found += _drawn(_texts(Path(config.texts)), config)
    return found


def _drawn(source: Iterator[Text], config: PathwaysConfig) -> list[Text]:
    """Keep the texts whose hashes are smallest: a draw that streams."""
    heap: list[tuple[int, str]] = []
    held: dict[str, Text] = {}
    for text in source:
        words = f"{config.seed}\0{text.condition}\0{text.context}\0{text.text}"
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()
        if digest in held:
            continue
        entry = (-int(digest, 16), digest)
        if len(heap) < config.max_texts:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            del held[heapq.heapreplace(heap, entry)[1]]
        else:
            continue
        held[digest] = text
    return [held[digest] for digest in sorted(held)]


def _responses(config: PathwaysConfig, known: set[str]) -> Iterator[Text]:
    aliases = dict(config.aliases)
    for path in find_files(Path(config.data), config.responses):
        try:
            for raw in RecordStream(path):
                record, _ = response_record(raw, aliases)
                if record is None or not record.response.strip():
                    continue
                side = record.condition.split("_", 1)[0]
                context = side if side in known else None
                yield Text(RESPONSES, record.condition, context, record.response)
        except StreamError:
            continue  # the audit named it


def _texts(path: Path) -> Iterator[Text]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.strip():
                continue
            words: Any = line.rstrip("\n")
            if path.suffix == ".jsonl":
                content = json.loads(line)
                words = content.get("text") if isinstance(content, dict) else content
            if isinstance(words, str) and words.strip():
                yield Text(TEXTS, "", None, words)
