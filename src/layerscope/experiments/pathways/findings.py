"""What an audit objects to: errors and warnings, each with its offenders counted and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]
EXAMPLES = 20


@dataclass(eq=False)
class Finding:
    """One kind of fault: what it is, how often it occurs, and the first offenders.

    Attributes:
        code: of the fault, such as "missing_field".
        severity: an "error" stops the pipeline, a "warning" does not.
        message: one line that says what is wrong and what to do.
        count: offenders, all of them.
        examples: the first `EXAMPLES`, with file and record index where they have one.
    """

    code: str
    severity: Severity
    message: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=lambda: [])

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "code": self.code,
            "message": self.message,
            "count": self.count,
            "examples": self.examples,
        }


class Findings:
    """All faults found so far; nothing raises, nothing is lost."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found.values())

    def error(self, code: str, message: str, *, count: int = 1, **example: Any) -> None:
        """Add an error; equal code and message are one finding."""
        self._add("error", code, message, count, example)

    def warn(self, code: str, message: str, *, count: int = 1, **example: Any) -> None:
        """Add a warning; equal code and message are one finding."""
        self._add("warning", code, message, count, example)

    def of(self, severity: Severity) -> list[dict[str, Any]]:
        """Return the findings of one severity as JSON values."""
        return [finding.to_dict() for finding in self if finding.severity == severity]

    @property
    def exit_code(self) -> int:
        """0 nothing found, 1 warnings, 2 errors."""
        severities = {finding.severity for finding in self}
        return 2 if "error" in severities else 1 if severities else 0

    def _add(
        self, severity: Severity, code: str, message: str, count: int, example: dict[str, Any]
    ) -> None:
        finding = self._found.setdefault((code, message), Finding(code, severity, message))
        finding.count += count
        if example and len(finding.examples) < EXAMPLES:
            finding.examples.append(example)
