"""What every experiment shares: resumable work units, progress, and the shape of an outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import polars as pl

from layerscope.allocator import peak_memory_bytes
from layerscope.experiments import provenance
from layerscope.files import canonical_json, sha256_text
from layerscope.models import LanguageModel

Progress = Callable[[int, int], None]
"""Called with (work done, work in all)."""


class UnitStore(Protocol):
    """Where finished work units are kept, so that a killed run goes on where it stopped."""

    def get_unit(self, key: str) -> tuple[pl.DataFrame, dict[str, Any] | None] | None:
        """Return a finished unit's rows and payload, or None."""
        ...

    def put_unit(self, key: str, frame: pl.DataFrame, payload: dict[str, Any]) -> None:
        """Keep a finished unit; called once per unit."""
        ...


@dataclass(frozen=True)
class Piece:
    """What one work unit yields: rows, and a JSON-able payload that goes with them."""

    rows: pl.DataFrame
    payload: dict[str, Any] = field(default_factory=lambda: {})


@dataclass(frozen=True)
class Work:
    """One idempotent work unit: a content key, how to do it, and how much of the whole it is."""

    key: str
    do: Callable[[], Piece]
    size: int = 1


@dataclass(frozen=True)
class Outcome:
    """What an experiment found: named tables, a plain summary, and where both come from."""

    tables: Mapping[str, pl.DataFrame]
    summary: dict[str, Any]
    provenance: dict[str, Any]


def work_key(experiment: str, *content: Any) -> str:
    """Return the content key of a work unit: equal content, equal key."""
    return sha256_text(canonical_json([experiment, *content]))


def run_units(
    works: Sequence[Work], *, units: UnitStore | None = None, progress: Progress | None = None
) -> list[Piece]:
    """Do every unit that is not kept already, in order, and return all pieces."""
    total, done = sum(work.size for work in works), 0
    pieces: list[Piece] = []
    for work in works:
        pieces.append(_one(work, units))
        done += work.size
        if progress is not None:
            progress(done, total)
    return pieces


def shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return the progress of one stage of several, begun when `before` of `total` was done."""
    if progress is None:
        return None
    return lambda done, _stage: progress(before + done, total)


def _one(work: Work, units: UnitStore | None) -> Piece:
    kept = units.get_unit(work.key) if units is not None else None
    if kept is not None:
        return Piece(kept[0], kept[1] or {})
    piece = work.do()
    if units is not None:
        units.put_unit(work.key, piece.rows, piece.payload)
    return piece


def describe_run(
    experiment: str,
    model: LanguageModel,
    config: Mapping[str, Any],
    watch: provenance.Stopwatch,
    *,
    read: Iterable[Sequence[int]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the provenance of a run: configuration, model, versions, machine, timing, memory.

    Args:
        read: token rows as the model was given them, special tokens included: what templates and
            tokenizer made of the prompts. Their hash is stored, so that runs over other tokens are
            told apart whatever the prompts were called.
    """
    rows = None if read is None else [[int(token) for token in row] for row in read]
    tokens = {} if rows is None else {"tokens_sha256": sha256_text(canonical_json(rows))}
    return {
        "experiment": experiment,
        "config": dict(config),
        **more,
        **tokens,
        "model": model.provenance(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "git_commit": provenance.git_commit(),
        "timing": watch.to_dict(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
