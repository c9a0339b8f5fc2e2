"""Work units of a follow-up, stage by stage: later stages depend on what earlier ones found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from layerscope.experiments import provenance
from layerscope.experiments.follow_up.facts import Fact
from layerscope.experiments.follow_up.prepare import Plan
from layerscope.experiments.units import Piece, Progress, UnitStore, Work, run_units, work_key

T = TypeVar("T")

EXPERIMENT = "follow-up"
SCHEMA_VERSION = 1
STAGES = ("observe", "patch", "heads", "curve", "fit", "directions", "languages")
PERCENT = 100


class Stages:
    """Runs units stage by stage; progress counts percent, because stages depend on one another."""

    def __init__(
        self,
        planned: Plan,
        units: UnitStore | None,
        progress: Progress | None,
        watch: provenance.Stopwatch,
    ) -> None:
        self.units, self.progress, self.watch = units, progress, watch
        self.identity = {
            "model": planned.model.provenance(),
            "versions": provenance.versions(),
            "config": planned.config.content(),
        }

    def told(self, stage: str) -> Progress | None:
        """Return the progress of one stage."""
        tell, number = self.progress, STAGES.index(stage)
        if tell is None:
            return None
        return lambda done, total: tell(
            round(PERCENT * (number + done / max(total, 1)) / len(STAGES)), PERCENT
        )

    def work(self, stage: str, content: Any, do: Callable[[], Piece]) -> Work:
        """Return a unit under the key of its content."""
        return Work(work_key(EXPERIMENT, SCHEMA_VERSION, self.identity, stage, content), do)

    def run(self, stage: str, works: Sequence[Work]) -> list[Piece]:
        """Do the units of a stage."""
        pieces = run_units(works, units=self.units, progress=self.told(stage))
        self.watch.lap(stage)
        return pieces


def chunks(entries: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into parts of at most `size`."""
    return [entries[begin : begin + size] for begin in range(0, len(entries), size)]


def contents(facts: Sequence[Fact]) -> list[Any]:
    """Return what decides the results of facts, JSON-able."""
    return [
        [
            fact.plain().content(),
            fact.corrupted().content(),
            None if fact.third is None else fact.third.slot().content(),
        ]
        for fact in facts
    ]
