"""What the rules of the guidance look at, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from layerscope.measures.config import MeasureConfig
from layerscope.measures.pass_summary import PassSummary
from layerscope.measures.table import TableMeta

Severity = Literal["high", "medium", "low"]


@dataclass(frozen=True)
class Reason:
    """One reason for caution: plain words, the numbers behind them, and what to do."""

    code: str
    severity: Severity
    message: str
    evidence: dict[str, Any]
    action: str


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: a summary per fact, the run's sections, thresholds, the model."""

    facts: Sequence[PassSummary]
    sections: dict[str, Any]
    config: MeasureConfig
    meta: TableMeta

    @cached_property
    def n(self) -> int:
        """Number of facts."""
        return len(self.facts)

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """The sections of the checks that looked at the model again, by name."""
        return self.sections.get("diagnostics") or {}

    def layers(self, name: str) -> list[int | None]:
        """Return a milestone's first layer, one per fact."""
        return [fact.milestones[name].first for fact in self.facts]
