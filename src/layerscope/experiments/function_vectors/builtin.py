"""The in-context tasks of the embedded model, as tasks for function vectors."""

from __future__ import annotations

from typing import get_args

from layerscope.demo import tasks
from layerscope.errors import ConfigError, nearest
from layerscope.interventions.function_vectors.tasks import Layout, Task

PREFIX = "demo:"
TESTED = 15


def demo_task(name: str) -> Task:
    """Return a task of the embedded model, tested on words that other tasks ask for too.

    Verbs such as "give" have an antonym, a past tense and a translation, so that nothing but
    examples, or a vector, tells which is wanted; the plural is tested on nouns. Half of the verbs
    remain for examples.

    Raises:
        ConfigError: there is no such task.
    """
    known = get_args(tasks.Task)
    if name not in known:
        raise ConfigError(f"unknown task '{name}'{nearest(name, known)}; use {', '.join(known)}")
    pos = "noun" if name == "plural" else "verb"
    words = [
        row["word"]
        for row in tasks.word_table()
        if row["pos"] == pos and row[name] and (pos == "noun" or row["antonym"])
    ]
    return Task(name, tasks.words_for(name), tuple(words[:TESTED]))


def demo_layout(style: str = "question") -> Layout:
    """Return how the embedded model's training text writes a list of examples.

    Raises:
        ConfigError: there is no such style.
    """
    if style not in tasks.FORMATS:
        raise ConfigError(
            f"unknown layout '{style}'{nearest(style, tasks.FORMATS)}; use "
            f"{', '.join(tasks.FORMATS)}"
        )
    before, between, after = tasks.FORMATS[style]
    return Layout(before, between, after)
