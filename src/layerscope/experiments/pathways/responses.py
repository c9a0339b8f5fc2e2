"""Response logs: streamed, counted, and judged; no response is kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.experiments.pathways.copies import find_copies
from layerscope.experiments.pathways.findings import Findings
from layerscope.experiments.pathways.records import ResponseRecord, response_record
from layerscope.experiments.pathways.streams import RecordStream, StreamError

_DISTINCT = 64  # responses of one cell among which copies are counted
_WORST = 10


@dataclass(eq=False)
class Cell:
    """Trials of one feature under one condition.

    Attributes:
        trials: unique ones. unnumbered: records without a trial number.
        hashes: of the first `_DISTINCT` responses, to look for copies. letters: of these.
    """

    trials: int = 0
    seen: int = 0  # one bit per trial number
    hashes: array[int] = field(default_factory=lambda: array("q"))
    letters: int = 0


@dataclass(eq=False)
class ResponseTally:
    """Counts over all response logs.

    Attributes:
        records: usable ones. empty: without any text. repeated: the same trial once more.
        features: responses by feature; shared baselines are not among them.
        conditions: responses by condition.
        cells: trials by feature ("" for shared ones) and condition.
        parsed: responses that say whether they could be parsed. valid: that could.
    """

    records: int = 0
    empty: int = 0
    repeated: int = 0
    parsed: int = 0
    valid: int = 0
    features: Counter[str] = field(default_factory=lambda: Counter[str]())
    conditions: Counter[str] = field(default_factory=lambda: Counter[str]())
    cells: dict[tuple[str, str], Cell] = field(default_factory=lambda: {})

    def add(self, record: ResponseRecord) -> None:
        """Count one record."""
        name = "" if record.shared else record.feature
        cell = self.cells.setdefault((name, record.condition), Cell())
        if record.trial is not None and 0 <= record.trial < 1 << 16:
            bit = 1 << record.trial
            if cell.seen & bit:
                self.repeated += 1
                return
            cell.seen |= bit
        self.records += 1
        cell.trials += 1
        self.conditions[record.condition] += 1
        if not record.shared:
            self.features[record.feature] += 1
        if not record.response.strip():
            self.empty += 1
        if record.valid is not None:
            self.parsed += 1
            self.valid += record.valid
        if len(cell.hashes) < _DISTINCT:
            cell.letters += len(record.response)
            cell.hashes.append(hash(record.response))

    def trials(self, feature: str, condition: str) -> int:
        """Return the trials of a feature, shared ones included."""
        own, shared = self.cells.get((feature, condition)), self.cells.get(("", condition))
        return sum(cell.trials for cell in (own, shared) if cell is not None)

    def to_dict(self, conditions: Sequence[str]) -> dict[str, Any]:
        """Return the counts as JSON values."""
        looked = sum(len(cell.hashes) for cell in self.cells.values())
        distinct = sum(len(set(cell.hashes)) for cell in self.cells.values())
        return {
            "records": self.records,
            "repeated_trials": self.repeated,
            "empty": self.empty,
            "empty_rate": self.empty / self.records if self.records else None,
            "parse_rate": self.valid / self.parsed if self.parsed else None,
            "unique_share": distinct / looked if looked else None,
            "features": len(self.features),
            "conditions": {
                **{name: self.conditions.get(name, 0) for name in conditions},
                **{
                    name: n for name, n in sorted(self.conditions.items()) if name not in conditions
                },
            },
        }


def read_responses(
    data: Path, files: Sequence[Path], config: PathwaysConfig, findings: Findings
) -> ResponseTally:
    """Read every response log, and judge what was counted."""
    tally = ResponseTally()
    aliases = dict(config.aliases)
    for path in files:
        name = path.relative_to(data).as_posix()
        index = -1
        try:
            for index, raw in enumerate(RecordStream(path)):
                record, faults = response_record(raw, aliases)
                for fault in faults:
                    findings.error(fault.code, fault.message, file=name, record=index)
                if record is None:
                    continue
                if not record.response.strip():
                    findings.warn("empty_response", "a response is empty", file=name, record=index)
                tally.add(record)
        except StreamError as error:
            findings.error(
                "unreadable_json",
                "a response log is no whole JSON; write it again or remove it",
                file=name,
                byte=error.offset,
                detail=error.reason,
            )
        if index < 0:
            findings.warn("no_responses", "a response log holds no record", file=name)
    _judge(tally, config, findings)
    return tally


def _judge(tally: ResponseTally, config: PathwaysConfig, findings: Findings) -> None:
    if not tally.records:
        return
    if tally.empty / tally.records > config.empty_rate:
        findings.error(
            "many_empty_responses",
            f"more than {config.empty_rate:.1%} of the responses are empty",
            count=tally.empty,
            rate=round(tally.empty / tally.records, 4),
        )
    if tally.repeated:
        findings.warn(
            "repeated_trials",
            "the same trial stands in the logs more than once; it is counted once",
            count=tally.repeated,
        )
    if tally.parsed and tally.valid / tally.parsed < config.min_parse_rate:
        findings.warn(
            "low_parse_rate",
            f"less than {config.min_parse_rate:.0%} of the responses could be parsed; verdicts "
            "rest on the others",
            count=tally.parsed - tally.valid,
            rate=round(tally.valid / tally.parsed, 4),
        )
    _judge_conditions(tally, config, findings)
    _judge_trials(tally, config, findings)
    _judge_copies(tally, config, findings)


def _judge_conditions(tally: ResponseTally, config: PathwaysConfig, findings: Findings) -> None:
    for name in config.conditions:
        if not tally.conditions[name]:
            findings.error("missing_condition", f"no response was made under '{name}'")
    for name, count in sorted(tally.conditions.items()):
        if name not in config.conditions:
            findings.warn(
                "unknown_condition",
                f"the condition '{name}' is not one of the experiment's; give it an alias",
                count=count,
            )
    gaps = [
        (feature, [name for name in config.conditions if not tally.trials(feature, name)])
        for feature in sorted(tally.features)
    ]
    incomplete = [(feature, names) for feature, names in gaps if names]
    present = [name for name in config.conditions if tally.conditions[name]]
    partly = [
        (feature, [name for name in names if name in present]) for feature, names in incomplete
    ]
    partly = [(feature, names) for feature, names in partly if names]
    if partly:
        findings.warn(
            "incomplete_conditions",
            "features were not tried under every condition",
            count=len(partly),
            features=dict(partly[:_WORST]),
        )


def _judge_trials(tally: ResponseTally, config: PathwaysConfig, findings: Findings) -> None:
    least = {
        feature: min(
            (
                tally.trials(feature, name)
                for name in config.conditions
                if tally.trials(feature, name)
            ),
            default=0,
        )
        for feature in tally.features
    }
    short = sorted((n, feature) for feature, n in least.items() if 0 < n < config.min_trials)
    if short:
        findings.warn(
            "few_trials",
            f"features have fewer than {config.min_trials} trials under some condition "
            f"(about {config.expected_trials} are expected)",
            count=len(short),
            worst={feature: n for n, feature in short[:_WORST]},
        )


def _judge_copies(tally: ResponseTally, config: PathwaysConfig, findings: Findings) -> None:
    found = find_copies(
        {key: np.frombuffer(cell.hashes, dtype=np.int64) for key, cell in tally.cells.items()},
        {key: cell.letters / max(len(cell.hashes), 1) for key, cell in tally.cells.items()},
        min_unique=config.min_unique,
    )
    copies = sorted(
        (share, feature or "baseline", condition)
        for (feature, condition), share in found.share.items()
        if share < config.min_unique
    )
    if copies:
        findings.warn(
            "copied_responses",
            "most responses of a feature and condition are copies of one another, of texts that "
            "hardly occur elsewhere: greedy generation repeats itself, and copies are no "
            "independent trials",
            count=len(copies),
            worst=[
                {"feature": feature, "condition": condition, "unique_share": round(share, 4)}
                for share, feature, condition in copies[:_WORST]
            ],
        )
    if found.uniform:
        findings.warn(
            "unvaried_responses",
            "responses do not vary as samples do: the answer is certain, or generation was greedy; "
            "then trials are copies",
            count=len(found.uniform),
            unique_share={side: round(share, 4) for side, share in found.uniform.items()},
        )
